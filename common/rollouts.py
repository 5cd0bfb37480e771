"""Rollouts: sample responses to a task's problems, judge them, and evaluate without hints.

`Rollouts` holds what turns a policy into judged responses: problems, tokenizer, sampling engine
and verifier. `Batch` is what comes out: the groups of one step with rewards and lengths [Q, G].
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from common import require
from common.architecture import check_architecture, context_length, empty_lm
from common.chat import as_text, chat_ids, load_tokenizer
from common.policy import Policy, full_weights, score
from common.report import heldout_row
from common.sampler import HFSampler, Rollout, make_sampler
from common.settings import Setup
from common.tasks import Problem, load_task, take
from common.verifiers import Verdict
from common.verifiers.pool import Verifier

# random streams under the run's seed; the method files use higher numbers
TRAIN, EVALUATE = 0, 1


class Group(NamedTuple):
    """One question, its G responses and their verdicts."""

    problem: Problem
    rollouts: list[Rollout]
    verdicts: list[Verdict]

    @property
    def mixed(self) -> bool:
        """True if the rewards differ; otherwise every group-relative advantage is 0."""
        return len({verdict.reward for verdict in self.verdicts}) > 1


@dataclass
class Batch:
    """This rank's groups of one step. Lists hold one entry per rollout, question by question."""

    groups: list[Group]

    def __post_init__(self):
        self.rollouts: list[Rollout] = []
        rewards, lengths, truncated = [], [], []
        for group in self.groups:
            self.rollouts += group.rollouts
            rewards.append([verdict.reward for verdict in group.verdicts])
            lengths.append([len(rollout.response_ids) for rollout in group.rollouts])
            truncated.append([rollout.truncated for rollout in group.rollouts])
        self.prompts = [rollout.prompt_ids for rollout in self.rollouts]
        self.responses = [rollout.response_ids for rollout in self.rollouts]
        self.sampler_logp = [rollout.logprobs for rollout in self.rollouts]
        self.rewards = torch.tensor(rewards, dtype=torch.float32)  # [Q, G]
        self.lengths = torch.tensor(lengths, dtype=torch.float32)  # [Q, G] response tokens
        self.truncated = torch.tensor(truncated)  # [Q, G] bool

    def minibatches(self, count: int, epochs: int = 1) -> Iterator[Tensor]:
        """Masks [Q, 1] of questions: `count` random parts per epoch, one per optimizer update."""
        questions = len(self.groups)
        for _ in range(epochs):
            order = torch.arange(questions)
            if count > 1:
                order = torch.randperm(questions)
            for part in order.chunk(count):
                mask = torch.zeros(questions, 1, dtype=torch.bool)
                mask[part] = True
                yield mask

    def metrics(self) -> dict:
        """The metrics that every method logs; the log averages over ranks."""
        out = {
            "reward/mean": self.rewards,
            "length/mean": self.lengths,
            "length/max": self.lengths,
            "frac_truncated": self.truncated,
        }
        if self.rewards.shape[1] > 1:
            out["frac_zero_std"] = [not group.mixed for group in self.groups]
            out["frac_any_right"] = (self.rewards == 1).any(1)
        return out

    def examples(self, groups: int = 2) -> list[dict]:
        """The first groups as rows of rollouts.jsonl."""
        rows = []
        for group in self.groups[:groups]:
            for rollout, verdict in zip(group.rollouts, group.verdicts):
                rows.append({
                    "id": group.problem.id,
                    "response": rollout.text,
                    "finish": rollout.finish_reason,
                    "reward": verdict.reward,
                    "feedback": verdict.feedback,
                })
        return rows


class Rollouts:
    """Samples and judges responses to a task's problems. The first `sync` starts the engine."""

    def __init__(self, args, run, restarts: Sequence[str] = ()):
        """restarts: phrases with which a response begins another attempt (see Verifier)."""
        setup = args.setup
        self.args, self.run, self.sampler = args, run, None
        self.task = load_task(
            args.task, heldout=setup.heldout, fields=setup.fields, kind=setup.kind,
            instruction=setup.instruction, data_dir=setup.data_dir, against=setup.against,
            bad_records=setup.bad_records, gym_reward=setup.gym_reward,
        )
        problems = self.task.at_hand
        self.tokenizer = load_tokenizer(args.model, args.thinking, problems)
        self.verifier = Verifier(
            allow_unsafe_exec=setup.allow_unsafe_exec, restarts=restarts
        )
        bad = self.verifier.unusable(problems[run.rank :: run.world])
        everywhere = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, bad)
        self.task = self.task.without([pair for part in everywhere for pair in part])
        problems = self.task.at_hand
        # tokens that the model can read
        self.context_length = context_length(AutoConfig.from_pretrained(args.model))
        self.longest = 0  # tokens of the longest sequence that `check_lengths` expects
        self.check_lengths([problem.messages for problem in problems])
        self.sampled = self.longest  # the same for what the sampler reads: it sees no hint

    def sync(self, policy: Policy) -> None:
        """Give the engine the policy's weights. A collective."""
        self.run.phase("sync")
        if self.sampler is not None:
            self.sampler.load(full_weights(policy))
            return
        self.sampler = make_sampler(self.args, self.tokenizer, self.run.device)
        first_sync(self.sampler, policy, self.chat_ids(self.task.heldout[0].messages))
        require(
            self.sampled <= self.sampler.context,
            f"a sequence of up to {self.sampled} tokens can exceed the {self.sampler.context} "
            "tokens that the sampler has room for; lower --max_tokens (in phase 1 of sdzero.py "
            "--srt_max_tokens), or raise --vllm_memory",
        )

    def sleep(self) -> None:
        """Let the engine free its memory: nothing is sampled until the next `sync`.

        Time from here on is logged as scoring.
        """
        self.sampler.sleep()
        self.run.phase("score")

    def check_lengths(self, chats: list[list[dict] | None], responses: int = 1,
                      flag: str = "max_tokens", why: str = "") -> None:
        """Check that each chat and `responses` responses fit the model's context; exit if not.

        flag: the setting that limits a response's tokens. why: the reason that a response counts
        more than once, for the message. Each rank measures its share of the chats, longest first.
        A token has at least one byte. So a chat with fewer bytes, template included, than the
        longest chat has tokens cannot be the longest and is not measured.
        """
        most = getattr(self.args, flag)
        room = self.context_length - responses * most  # tokens of a prompt
        shown = [chat for chat in chats if chat is not None]
        if not shown:
            return
        shown.sort(key=bytes_of, reverse=True)
        template = 64 + len(self.chat_ids(shown[-1]))  # about what it adds
        longest = 0
        for chat in shown[self.run.rank :: self.run.world]:
            if bytes_of(chat) + template <= longest:
                break
            length = len(self.chat_ids(chat))
            if length > longest:
                longest, worst = length, chat
        self.longest = max(self.longest, longest + responses * most)
        if longest <= room:
            return
        text = max((message["content"] for message in worst), key=len)
        words = " ".join(text.split())[:40]
        raise SystemExit(
            f"error: the problem “{words} …”: a prompt of {longest} tokens and {responses} × "
            f"--{flag} {most} can exceed the model's context of {room + responses * most}{why}; "
            f"lower --{flag}, or take such problems out of the data"
        )

    def check_model(self) -> PreTrainedModel:
        """The model without weights, for --dry_run, checked as far as that is possible."""
        lm = empty_lm(self.args.model)
        setup = self.args.setup
        check_architecture(
            lm, self.args.model, sampler=setup.sampler, checkpointing=setup.checkpointing,
            share_prompts=setup.share_prompts,
        )
        return lm

    @property
    def ends(self) -> list[int]:
        """The tokens that end a response."""
        return self.sampler.ends

    def chat_ids(self, messages: list[dict]) -> list[int]:
        """Token ids of a chat that the model is to answer; the same for student and teacher."""
        return chat_ids(self.tokenizer, messages, self.args.thinking)

    def as_text(self, text: str) -> str:
        """Text of a model or a checker for use in a prompt: its control tokens become plain text.
        """
        return as_text(self.tokenizer, text)

    def sample(self, step: int) -> Batch:
        """This rank's share of the questions of `step`: G responses each, with verdicts."""
        share = self.args.batch_size // self.run.world
        start = (step * self.run.world + self.run.rank) * share
        problems = take(self.task.train, self.args.setup.seed, start, share)
        keys = range(start, start + share)
        return Batch(self.answer(problems, self.args.group_size, TRAIN, keys))

    def evaluate(self) -> dict:
        """pass@1 and length on the held-out problems, without hints."""
        _, groups = self.heldout_groups()
        return heldout_metrics(groups)

    def heldout_groups(self) -> tuple[range, list[Group]]:
        """Responses to this rank's held-out problems, every world-th of them, and their keys."""
        mine = range(self.run.rank, len(self.task.heldout), self.run.world)
        problems = [self.task.heldout[i] for i in mine]
        samples = self.args.setup.eval_samples
        groups = self.answer(problems, samples, EVALUATE, mine, "evaluate")
        with self.run.writing(self.run.folder / "heldout.jsonl"):
            self.run.append("heldout", [heldout_row(self.run.step, groups)])
        return mine, groups

    def answer(self, problems: Sequence[Problem], n: int, stream: int, keys: Sequence[int],
               phase: str = "", prompts: Sequence[list[int]] | None = None,
               **sampling) -> list[Group]:
        """n responses to each problem with their verdicts.

        stream, keys: choose the random numbers, one key per problem (see common/sampler.py).
        phase: log the time under this name, not under "sample" and "verify".
        prompts: token ids to answer, if not the chats of the problems.
        sampling: `max_tokens`, `temperature`, `top_p`, if they differ from the run's.
        """
        args = self.args
        if prompts is None:
            prompts = [self.chat_ids(problem.messages) for problem in problems]
        settings = {
            "max_tokens": args.max_tokens, "temperature": args.temperature, "top_p": args.top_p,
        }
        self.run.phase(phase or "sample")
        seed = (args.setup.seed, stream)
        sampled = self.sampler.sample(prompts, n, seed=seed, keys=keys, **(settings | sampling))
        self.run.collect({"preempted": self.sampler.preempted()})
        self.run.phase(phase or "verify")
        repeated, texts = [], []
        for problem, rollouts in zip(problems, sampled):
            repeated += [problem] * n
            texts += [rollout.text for rollout in rollouts]
        verdicts = self.verifier(repeated, texts)
        self.run.phase("other")
        parts = [verdicts[i : i + n] for i in range(0, len(verdicts), n)]
        return list(map(Group, problems, sampled, parts))

    def close(self) -> None:
        if self.sampler is not None:
            self.sampler.close()
        self.verifier.close()


ROUNDING = {"cuda": 0.2, "cpu": 0.01}  # nats per token, mean: what rounding (bf16, fp32) may cause


def first_sync(sampler, policy: Policy, prompt: list[int]) -> None:
    """Give the sampler its first weights and check that it computes the policy's probabilities.
    A collective.

    An engine silently skips weights that it does not know. Raises SystemExit if the
    log-probabilities of a few samples are not the policy's.
    """
    sampler.sleep()  # drops the weights, as after every update: those that `load` omits are missing
    sampler.load(full_weights(policy))
    rollouts = sampler.sample([prompt], 4, seed=(0,), keys=[0], max_tokens=16)[0]
    responses = [rollout.response_ids for rollout in rollouts]
    scored = torch.cat(score(policy, [prompt] * 4, responses, Setup())).cpu()  # [T]
    sampled = torch.tensor([logp for rollout in rollouts for logp in rollout.logprobs])  # [T]
    gap = (sampled - scored).abs().mean().nan_to_num(nan=torch.inf)
    dist.all_reduce(gap, dist.ReduceOp.MAX)
    engine, other = "vllm", "hf"
    if isinstance(sampler, HFSampler):
        engine, other = "hf", "vllm"
    device = next(policy.parameters()).device
    require(
        gap < ROUNDING[device.type],
        f"--sampler {engine}: with the weights of the policy, a {type(policy.lm).__name__}, its "
        f"log-probabilities differ from the policy's by {gap:.2g} nats per token; take --sampler "
        f"{other} or another checkpoint",
    )


def bytes_of(chat: list[dict]) -> int:
    return sum(len(message["content"].encode(errors="replace")) for message in chat)


def heldout_metrics(groups: list[Group]) -> dict:
    rewards, lengths = [], []
    for group in groups:
        rewards += [verdict.reward for verdict in group.verdicts]
        lengths += [len(rollout.response_ids) for rollout in group.rollouts]
    return {"heldout/pass@1": rewards, "heldout/length": lengths}


def check_fits(prompts: list[list[int]], batch: Batch, rollouts: Rollouts) -> None:
    """Exit if a teacher's prompt and its response exceed the context: nothing is cut silently."""
    for prompt, response in zip(prompts, batch.responses):
        length = len(prompt) + len(response)
        require(
            length <= rollouts.context_length,
            f"a teacher's prompt and a response take {length} tokens, more than the model's "
            f"context of {rollouts.context_length}: lower --max_tokens",
        )
