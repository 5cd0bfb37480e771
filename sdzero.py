"""SD-Zero: Self-Distillation Zero (arXiv 2604.12002). One model writes, revises its own writing, and learns from that.

Phase 1, Self-Revision Training (SRT). For a question x the model answers, y_init; a verifier says r ∈ {0, 1}; a control
phrase P_r is appended in the same assistant turn, and the model goes on, y_rev. Traces whose y_rev is right are kept:

    L_revision   = −Σ_t log π_θ(y_rev,t | x, y_init, P_r, y_rev,<t)                                           Eq. 1
    L_generation = −Σ_t log π_θ(y'_t | x, y'_<t),   y' = [y_init, P_r, y_rev]                                  Eq. 2
    L_SRT        = L_revision + L_generation   : one forward, token weights 1, 1 and 2                          Eq. 3

Phase 2, self-distillation. Teacher: the reviser, frozen at θ_SRT, which has read the whole response y and P_r and is
made to say y again; student: the generator that wrote y:

    L_SD(θ) = E_{y ~ π_θ(·|x)} Σ_t KL( π_θ(· | x, y_<t) ‖ sg[π_SRT(· | x, y, P_r, y_<t)] )                     Eq. 4

Nothing but the verifier's bit enters: no reference solution, no reward in a loss. --rounds 2 syncs the teacher
(θ_SRT := θ) between passes over the questions of phase 2: iterative self-evolution (§3.4).

    python sdzero.py --demo                                        # both phases on the embedded model, two minutes
    torchrun --nproc_per_node=4 sdzero.py                          # both phases, the paper's tables
    torchrun --nproc_per_node=4 sdzero.py --phase srt              # phase 1 alone; its checkpoint then feeds
    torchrun --nproc_per_node=4 sdzero.py --phase sd --model runs/NAME/checkpoints/step_N
    torchrun --nproc_per_node=4 sdzero.py --phase srt --baseline rft    # rejection sampling; sft beside it

Paper and released code disagree on almost every knob; the default is the paper, and the released choice is a flag:
--kl mixed --top_k 64 (teacher's, renormalised), --mean token, --srt_temperature 1.0 --srt_top_p 0.9. Left out on
purpose: its two sequential SFT stages on disjoint traces and its clean-up of openings and repeated tails. The end token
of the first copy of y is stripped, that of the second is kept and trained. Details: docs/sdzero.md.
"""
from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from common.chat import chat_ids, load_tokenizer
from common.policy import (
    Micro,
    blend,
    frozen_copy,
    full_weights,
    load_policy,
    make_optimizer,
    micro_batches,
    optimizer_step,
)
from common.run import Run, parse, require, within
from common.sampler import Rollout, first_sync, make_sampler
from common.tasks import Problem, in_hash_order, load_task, take
from common.verifiers import Verdict, Verifier
from kernels.head import Divergence, TokenStats, head_loss


# ---------------------------------------------------------------------------------------------------------------------
# 1. settings
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class Args:
    """SD-Zero. Defaults: the paper's tables for Qwen3-4B-Instruct; where text and tables differ, the tables, except
    that the KL is Eq. 4's, over the whole vocabulary."""

    model: str = "Qwen/Qwen3-4B-Instruct-2507"
    """folder or hub id of a causal LM with a chat template"""
    task: str = "hf:open-r1/OpenR1-Math-220k"
    """a named set (gsm8k, mbpp …), jsonl:FILE, hf:NAME[:CONFIG], gym:NAME, chain, or a mixture: 4*gsm8k+1*mbpp"""
    data_dir: str = ""
    """folder that named sets are read from; empty reads them from the hub"""
    against: str = ""
    """further evaluation sets, joined by commas: training questions that stand in one are removed"""
    fields: str = ""
    """names of the data's fields where they differ, e.g. question=prompt,answer=gold"""
    instruction: str | None = None
    """text added to every maths question; the default asks for \\boxed{}"""
    heldout: int = 500
    """problems set aside for evaluation, never trained on"""

    # which part
    phase: Literal["both", "srt", "sd"] = "both"
    """both phases, self-revision training alone, or self-distillation alone from --model as it is"""
    baseline: Literal["", "rft", "sft"] = ""
    """phase 1 on other data: all right ones of 4 answers to each question, or the given solutions"""

    # phase 1: self-revision training
    srt_questions: int = 10000
    """N1, questions of phase 1; phase 2 never sees them"""
    inits: int = 1
    """y_init for each question"""
    revisions: int = 3
    """y_rev for each y_init, right or wrong"""
    kept_traces: int = 6000
    """size of D_REVISION at most"""
    wrong_share: float | None = None
    """share of traces whose y_init was wrong; None keeps all that end right, as the paper does"""
    per_question: int = 3
    """traces of one question at most (not given in the paper)"""
    srt_temperature: float = 0.7
    """of sampling y_init and y_rev (released: 1.0)"""
    srt_top_p: float = 1.0
    """nucleus of that sampling (released: 0.9)"""
    srt_max_tokens: int = 16384
    """limit of y_init and of y_rev, in tokens"""
    collect_batch: int = 256
    """questions collected at a time; an interrupted collection goes on after the last complete batch"""
    traces: str = ""
    """a traces.jsonl of an earlier run, instead of collecting"""
    terms: Literal["both", "generation", "revision"] = "both"
    """terms of Eq. 3 (Table 11)"""
    srt_epochs: int = 3
    """passes over the traces (Table 4; Table 3 says 1)"""
    srt_batch: int = 4
    """traces an update, over all processes"""
    srt_lr: float = 5e-6
    """peak learning rate, cosine to 0 after the warm-up"""
    srt_warmup: float = 0.05
    """share of the updates of phase 1 that warm up"""
    srt_weight_decay: float = 1e-4
    """of AdamW (betas 0.9, 0.95)"""

    # phase 2: self-distillation
    sd_questions: int = 9000
    """N2, questions of phase 2"""
    rounds: int = 1
    """passes over them; the teacher is synced between passes"""
    kl: Literal["reverse", "forward", "mixed"] = "reverse"
    """reverse: KL(student‖teacher), Eq. 4; forward: its opposite; mixed: the mean of both (released)"""
    top_k: int = 0
    """over the teacher's K likeliest tokens, both sides renormalised (the paper's table and the released code: 64); 0:
    the whole vocabulary, as Eq. 4 is written"""
    mean: Literal["sum", "token"] = "sum"
    """in both phases: sums over tokens, mean over responses, as printed; or one mean over all tokens (released)"""
    batch_size: int = 128
    """questions a step, over all processes; one response each"""
    max_tokens: int = 8192
    """limit of a response, in tokens"""
    temperature: float = 1.0
    """of sampling; both sides of the KL are at the same temperature"""
    top_p: float = 1.0
    """nucleus of sampling"""
    thinking: bool = False
    """chat templates with a thinking mode: switch it on, for student and teacher alike"""
    lr: float = 5e-6
    """learning rate of AdamW, constant after the warm-up"""
    warmup: int = 20
    """steps of linear warm-up"""
    weight_decay: float = 0.01
    """of AdamW (betas 0.9, 0.999: released)"""
    max_norm: float = 1.0
    """gradient norm limit, both phases (the paper gives it for phase 2)"""

    # the machine
    token_budget: int = 16384
    """padded tokens in a forward pass of training"""
    sampler: Literal["hf", "vllm"] = "hf"
    """engine of the rollouts: the model's Hugging Face code, or vLLM inside each process"""
    sampler_rows: int = 128
    """rollouts that decode at a time; their KV cache must fit"""
    tensor_parallel: int = 1
    """--sampler vllm: ranks that share an engine"""
    vllm_memory: float = 0.4
    """--sampler vllm: share of the GPU's memory for its weights and KV cache"""
    checkpointing: bool = False
    """recompute activations in the backward pass: less memory, a third more time"""
    lora_rank: int = 0
    """train adapters of this rank on a frozen base, with a learning rate of about ten times; 0 trains all weights"""
    lora_alpha: float = 32.0
    """adapters add alpha/rank·B·A to a weight"""
    optimizer_state: Literal["fp32", "bf16", "offload"] = "fp32"
    """AdamW's moments: 8 bytes a trained weight, 4, or 8 in the CPU's memory"""
    workers: int = 4
    """verdicts at a time"""
    allow_unsafe_exec: bool = False
    """run a model's programs without bubblewrap, with your own rights"""

    # the run
    seed: int = 0
    """of data order and sampling"""
    name: str = ""
    """folder under --out; made up from the task and the seed where empty"""
    out: str = "runs"
    """where run folders go"""
    resume: str = ""
    """"auto": go on from this run's last checkpoint, if there is one; or a checkpoint folder"""
    eval_every: int = 20
    """steps between evaluations on the held-out problems"""
    eval_samples: int = 1
    """responses for each held-out problem"""
    eval_only: bool = False
    """evaluate --model and stop"""
    dry_run: bool = False
    """print the plan and the memory it takes, check model, data and engine, and stop"""
    save_every: int = 100
    """steps between checkpoints; the last step is always saved"""
    keep: int = 2
    """checkpoints kept"""
    track: Literal["", "tensorboard", "wandb", "trackio"] = ""
    """also send metrics there"""
    demo: bool = False
    """the embedded model and task, small enough for a laptop: the overrides in DEMO"""


DEMO = dict(model="assets/chain", task="chain", heldout=256, srt_questions=1024, kept_traces=1500, srt_max_tokens=64,
            srt_temperature=1.0, wrong_share=0.5, srt_batch=32, srt_lr=3e-4, srt_epochs=1,
            sd_questions=2560, batch_size=64, max_tokens=192, lr=1e-4, warmup=5, mean="token",
            eval_every=16, save_every=64)


# Settings that say which step is on which traces or questions: a resume may not change them.
STAGES = ("traces", "srt_questions", "kept_traces", "wrong_share", "per_question", "srt_epochs",
          "srt_batch", "sd_questions", "batch_size")
BASELINES = {"": {}, "rft": dict(inits=4, per_question=4, kept_traces=10**9), "sft": dict(kept_traces=10**9)}


def presets(args: Args) -> dict:
    return {**(DEMO if args.demo else {}), **BASELINES[args.baseline]}


# ---------------------------------------------------------------------------------------------------------------------
# 2. the control phrase
# ---------------------------------------------------------------------------------------------------------------------
CONTROL = {0: "Wait, this response is not correct, let me start over.", 1: "Let me rephrase the above solution."}  # P_r


def control_ids(tokenizer, r: int) -> list[int]:
    """P_r as it stands inside the assistant's turn, a blank line before and after it, in token ids."""
    return tokenizer.encode(f"\n\n{CONTROL[r]}\n\n", add_special_tokens=False)


def reviser_prompt(rollout: Rollout, r: int, tokenizer, ends: list[int]) -> list[int]:
    """x, y, P_r: what stands before y_rev in phase 1, and before the second copy of y in phase 2. The end token of y is
    stripped: the turn goes on."""
    y = rollout.response_ids[:-1] if rollout.response_ids[-1] in ends else rollout.response_ids
    return [*rollout.prompt_ids, *y, *control_ids(tokenizer, r)]


def turn_end(tokenizer) -> int:
    """The token that the chat template puts after an assistant's message, or the tokenizer's eos if
    there is none. Some families end a turn and a document with different tokens."""
    mark = "the-answer"
    turn = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": mark}]
    text = tokenizer.apply_chat_template(turn, tokenize=False)
    after = tokenizer.encode(text.rpartition(mark)[2].strip(), add_special_tokens=False)
    if after and after[0] in tokenizer.added_tokens_decoder:
        return after[0]
    return tokenizer.eos_token_id


# ---------------------------------------------------------------------------------------------------------------------
# 3. phase 1: traces
# ---------------------------------------------------------------------------------------------------------------------
class Trace(NamedTuple):
    """One line of traces.jsonl: token ids of the question and of what the model wrote, the verdicts, and the text."""

    id: str
    r: int  # verdict on y_init
    right: bool  # y_rev (of rft: the response) is right and not cut off
    prompt_ids: list[int]
    init_ids: list[int]  # y_init without its end token; empty in the baselines
    control_ids: list[int]  # P_r; empty in the baselines
    revised_ids: list[int]  # y_rev, end token included
    text: str


def select(traces: list[Trace], args: Args) -> list[Trace]:
    """D_REVISION: traces whose revision is right, without repetitions, at most --per_question of a question, and at
    most --kept_traces, the first in the order of the questions.

    With a --wrong_share, this share of them started wrong: fewer if too few did, and no more right
    ones than fit to them. If too few started right, the share is larger. The paper keeps 6,000 of
    about 40,000 generations, filters by the revision's verdict alone, and names neither a mix nor a
    cap per question.
    """
    right: list[Trace] = []
    count: dict[str, int] = {}
    seen: set[tuple] = set()
    for t in traces:
        key = (t.id, tuple(t.init_ids), tuple(t.revised_ids))
        if t.right and key not in seen and count.get(t.id, 0) < args.per_question:
            seen.add(key)
            count[t.id] = count.get(t.id, 0) + 1
            right.append(t)
    share = args.wrong_share
    if args.baseline or share is None:
        return right[: args.kept_traces]
    corrected = [t for t in right if t.r == 0]
    rephrased = [t for t in right if t.r == 1]
    wrong = min(len(corrected), round(args.kept_traces * share))
    room = args.kept_traces - wrong
    if share > 0:
        room = min(room, round(wrong * (1 - share) / share))
    return corrected[:wrong] + rephrased[:room]


def trace_weights(trace: Trace, terms: str) -> list[float]:
    """Eq. 1 to 3 as the weight of each token of [y_init, P_r, y_rev]: generation counts all of them, revision the last
    part; an end token belongs to its part."""
    generation, revision = float(terms != "revision"), float(terms != "generation")
    before = len(trace.init_ids) + len(trace.control_ids)
    if not before:  # a baseline: there is one term
        return [1.0] * len(trace.revised_ids)
    return [generation] * before + [generation + revision] * len(trace.revised_ids)


# ---------------------------------------------------------------------------------------------------------------------
# 4. the loss
# ---------------------------------------------------------------------------------------------------------------------
class Tokens(NamedTuple):
    """What the losses need to know of each response token, [T]."""

    weight: Tensor  # its share in the batch's mean; in phase 1 times its weight in Eq. 3


def srt_loss(token: TokenStats, batch: Tokens) -> Tensor:
    """The loss of each token [T]; their sum is L_SRT (Eq. 3) of the batch."""
    return -batch.weight * token.logp


def divergence(args: Args) -> Divergence:
    """Between student p and teacher q."""
    kind = {"reverse": "reverse_kl", "forward": "forward_kl", "mixed": "mixed_kl"}[args.kl]  # mixed: ½ of each
    return Divergence(kind, beta=0.5, top_k=args.top_k, support="teacher", tail=False)


def loss(token: TokenStats, batch: Tokens) -> Tensor:
    """The loss of each token [T]; their sum is L_SD (Eq. 4) of the batch. The teacher's side carries no gradient."""
    return batch.weight * token.kl


def token_share(lengths: list[int], mean: str) -> float:
    """The share of each token in the batch's mean, counted over all ranks: 1/responses as printed, or 1/tokens."""
    count = torch.tensor(float(len(lengths) if mean == "sum" else sum(lengths)), dtype=torch.float64)
    dist.all_reduce(count)
    return 1.0 / max(1.0, count.item())


def srt_lr(update: int, updates: int, args: Args) -> float:
    """Linear warm-up over the first --srt_warmup of the updates, then a half cosine to 0."""
    warm = max(1, round(args.srt_warmup * updates))
    if update < warm:
        return args.srt_lr * (update + 1) / warm
    return args.srt_lr * 0.5 * (1 + math.cos(math.pi * (update - warm) / max(1, updates - warm)))


# ---------------------------------------------------------------------------------------------------------------------
# 5. the loop
# ---------------------------------------------------------------------------------------------------------------------
class Group(NamedTuple):
    """A question, its G responses and their verdicts."""

    problem: Problem
    rollouts: list[Rollout]
    verdicts: list[Verdict]

    @property
    def mixed(self) -> bool:
        """Whether the verifier's rewards differ; where they do not, every advantage made of them is 0."""
        return len({v.reward for v in self.verdicts}) > 1


def main(args: Args) -> None:
    if args.wrong_share is not None:
        within(args, wrong_share=(0, 1))
    within(args, srt_questions=(1, 1e9), inits=(1, 1e3), revisions=(1, 1e3),
           kept_traces=(1, 1e9), per_question=(1, 1e3), srt_temperature=(0.01, 9),
           srt_top_p=(0.01, 1), srt_max_tokens=(1, 1e6),
           top_k=(0, 1e6), collect_batch=(1, 1e6), srt_epochs=(1, 1e3), srt_batch=(1, 1e6), srt_lr=(0, 0.1),
           srt_warmup=(0, 1), srt_weight_decay=(0, 1), sd_questions=(1, 1e9), rounds=(1, 1e3))
    require(not args.baseline or (args.phase == "srt" and not args.traces), f"--baseline {args.baseline} replaces "
            "phase 1 and its traces: add --phase srt, leave out --traces")
    run = Run(args, f"sdzero-{args.baseline or args.phase}", fixed=STAGES)
    for size in ("batch_size", "srt_batch"):
        require(getattr(args, size) % run.world == 0, f"--{size} {getattr(args, size)} does not divide into "
                f"{run.world} process(es)")
    task = load_task(args.task, heldout=args.heldout, fields=args.fields, instruction=args.instruction,
                     data_dir=args.data_dir, against=args.against)
    train = in_hash_order(list({p.id: p for p in task.train}.values()))  # a mixture comes part by part, and repeats
    sd_count = args.sd_questions if args.phase != "srt" else 0
    require(args.srt_questions + sd_count <= len(train), "the phases must not share a question, also where each runs "
            f"alone: lower --srt_questions {args.srt_questions} or --sd_questions {sd_count}; there are {len(train)}")
    srt_problems, sd_problems = train[: args.srt_questions], train[args.srt_questions : args.srt_questions + sd_count]
    tokenizer = load_tokenizer(args.model, args.thinking, [*task.heldout, *task.train])
    a_round = len(sd_problems) // args.batch_size
    require(args.phase == "srt" or a_round > 0, f"--batch_size {args.batch_size} is more than --sd_questions")
    verifier = Verifier(args.workers, allow_unsafe_exec=args.allow_unsafe_exec)
    verifier.check([*task.heldout, *task.train][run.rank :: run.world])  # a bad reference ends here, not in step 900
    run.check_lengths(tokenizer, task.heldout)
    twice = dict(reads=2, more=len(control_ids(tokenizer, 0)),
                 why=" (what is revised or taught is read twice)")
    if args.baseline == "rft":
        run.check_lengths(tokenizer, srt_problems, flag="srt_max_tokens")
    elif args.phase != "sd" and not (args.baseline or args.traces):
        run.check_lengths(tokenizer, srt_problems, flag="srt_max_tokens", **twice)
    if args.phase != "srt":
        run.check_lengths(tokenizer, sd_problems, **twice)
    if args.dry_run:
        updates = -(-args.kept_traces * args.srt_epochs // args.srt_batch) if args.phase != "sd" else 0
        run.say(f"phase 1: {args.srt_questions:,} questions × {args.inits} answers × {args.revisions} revisions, "
                f"then at most {updates:,} updates on {args.srt_batch} traces; phase 2:")
        return run.plan(task, tokenizer, verifier, copies=1, reads=2, steps=args.rounds * a_round)
    policy = load_policy(args.model, run.device, checkpointing=args.checkpointing, lora_rank=args.lora_rank,
                         lora_alpha=args.lora_alpha)
    teacher = frozen_copy(policy, args.model, run.device)  # becomes θ_SRT when phase 2 begins
    optimizer = make_optimizer(policy, args.optimizer_state, lr=args.lr)
    sampler = make_sampler(args, tokenizer, run.device)

    def chats(problems: list[Problem]) -> list[list[int]]:
        return [chat_ids(tokenizer, p.messages, args.thinking) for p in problems]

    run.begin(*task.notes, context=sampler.context)
    first_step = run.resume(policy, optimizer, teacher=teacher)
    # on a resume the first rollouts must be the resumed policy's
    first_sync(sampler, policy, chat_ids(tokenizer, task.heldout[0].messages, args.thinking))

    def judged(problems: list[Problem], prompts: list[list[int]], n: int, seed: tuple[int, ...], keys, max_tokens: int,
               temperature: float, top_p: float) -> list[Group]:
        """n responses to each prompt and their verdicts; of a response that revises itself the last part counts."""
        with run.timer("sample"):
            groups = sampler.sample(prompts, n, seed=seed, keys=keys, max_tokens=max_tokens, temperature=temperature,
                                    top_p=top_p)
        with run.timer("verify"):
            verdicts = verifier([p for p in problems for _ in range(n)], [o.text for g in groups for o in g])
        return [Group(p, g, verdicts[i * n : i * n + n]) for i, (p, g) in enumerate(zip(problems, groups))]

    def evaluate() -> dict:
        """Held-out problems, each rank every world-th: first attempts, then a revision of one (generate-then-revise)
        where both fit the model's context."""
        sampler.load(full_weights(policy))
        mine = range(run.rank, len(task.heldout), run.world)
        problems, options = [task.heldout[i] for i in mine], (args.max_tokens, args.temperature, args.top_p)
        with run.timer("evaluate"):
            first = judged(problems, chats(problems), args.eval_samples, (args.seed, 1), mine, *options)
            again = [reviser_prompt(g.rollouts[0], int(g.verdicts[0].reward), tokenizer, sampler.ends) for g in first]
            fits = [(key, g, p) for key, g, p in zip(mine, first, again) if len(p) + args.max_tokens <= sampler.context]
            second = judged([g.problem for _, g, _ in fits], [p for *_, p in fits], 1, (args.seed, 2),
                            [key for key, *_ in fits], *options)
        r1, r2 = [g.verdicts[0].reward for _, g, _ in fits], [g.verdicts[0].reward for g in second]
        responses = [o for g in first for o in g.rollouts]
        return {"heldout/pass@1": [v.reward for g in first for v in g.verdicts], "revise/pass@1": r2,
                "heldout/length": [len(o.response_ids) for o in responses],
                "revise/corrected": [b for a, b in zip(r1, r2) if a < 1],  # of wrong first attempts
                "revise/kept": [b for a, b in zip(r1, r2) if a == 1],  # of right ones
                "heldout/keyword_rate": [speaks_of_revision(o.text) for o in responses]}

    def collect(path: Path) -> list[Trace]:
        """Phase 1's traces: read from `path` as far as they stand there, sampled and appended batch by batch after."""
        batches = range(0, len(srt_problems), args.collect_batch)
        _, done, size = read_traces(path)
        if run.rank == 0 and path.exists():
            os.truncate(path, size)  # what an interrupted batch left behind
        require(not first_step or len(done) == len(batches), f"{path} does not hold all the traces that the checkpoint "
                "was trained on: give them by --traces, or go on under its run's --name")
        place = {p.id: i for i, p in enumerate(srt_problems)}
        for b in batches[len(done) :]:
            mine = range(b + run.rank, min(b + args.collect_batch, len(srt_problems)), run.world)
            traces, spent = collect_batch([srt_problems[i] for i in mine], mine)
            parts: list = [None] * run.world
            dist.all_gather_object(parts, (traces, spent))
            if run.rank == 0:
                found = sorted((t for part, _ in parts for t in part), key=lambda t: place[t.id])  # as in one process
                lines = [json.dumps(t._asdict()) for t in found]
                total = {k: sum(s[k] for _, s in parts) for k in ("generations", "sampled_tokens")}
                with open(path, "a") as f:  # the last line says that the batch is whole
                    f.write("\n".join([*lines, json.dumps({"batch": b, **total})]) + "\n")
                run.say(f"traces: {min(b + args.collect_batch, len(place))} of {len(place)} questions")
        dist.barrier()
        return read_traces(path)[0]

    def collect_batch(problems: list[Problem], keys: range) -> tuple[list[Trace], dict[str, int]]:
        if args.baseline == "sft":
            for p in problems:
                require(p.solution is not None, f"--baseline sft: problem {p.id} has no solution to train on")
            ids = [tokenizer.encode(p.solution, add_special_tokens=False) for p in problems]
            end = turn_end(tokenizer)
            traces = [Trace(p.id, 1, True, prompt, [], [], [*solution, end], p.solution)
                      for p, prompt, solution in zip(problems, chats(problems), ids)]
            return traces, {"generations": 0, "sampled_tokens": 0}
        options = (args.srt_max_tokens, args.srt_temperature, args.srt_top_p)
        first = judged(problems, chats(problems), args.inits, (args.seed, 3), keys, *options)
        inits = [(g.problem, o, int(v.reward == 1)) for g in first for o, v in zip(g.rollouts, g.verdicts)]
        spent = [len(o.response_ids) for _, o, _ in inits]
        if args.baseline == "rft":
            traces = [Trace(p.id, r, r == 1 and not o.truncated, o.prompt_ids, [], [], o.response_ids, o.text)
                      for p, o, r in inits]
        else:
            again = [reviser_prompt(o, r, tokenizer, sampler.ends) for _, o, r in inits]
            names = [key * args.inits + k for key in keys for k in range(args.inits)]
            second = judged([p for p, _, _ in inits], again, args.revisions, (args.seed, 4), names, *options)
            traces = []
            for (p, o, r), prompt, g in zip(inits, again, second):
                control = control_ids(tokenizer, r)
                y = prompt[len(o.prompt_ids) : len(prompt) - len(control)]
                for new, v in zip(g.rollouts, g.verdicts):
                    spent.append(len(new.response_ids))
                    traces.append(Trace(p.id, r, v.reward == 1 and not new.truncated, o.prompt_ids, y, control,
                                        new.response_ids, f"{o.text}\n\n{CONTROL[r]}\n\n{new.text}"))
        return traces, {"generations": len(spent), "sampled_tokens": sum(spent)}

    traces: list[Trace] = []
    if args.phase != "sd" and not args.eval_only:
        path = Path(args.traces) if args.traces else run.folder / "traces.jsonl"
        require(not args.traces or path.is_file(), f"--traces {args.traces}: no such file")
        with run.timer("collect"):
            found = read_traces(path)[0] if args.traces else collect(path)
        shared = {t.id for t in found} & {p.id for p in [*sd_problems, *task.heldout]}
        require(not shared, f"--traces {args.traces}: {len(shared)} of its questions are held out or phase 2's; give "
                "the --heldout and --srt_questions that it was collected with")
        traces = select(found, args)
        run.say(f"kept {len(traces)} of {len(found)} traces; y_init was wrong in {sum(t.r == 0 for t in traces)}")
        require(len(traces) > 0, f"no trace is left to train on: of {len(found)}, {sum(t.right for t in found)} end "
                f"right and whole, {sum(t.right and not t.r for t in found)} of them from a wrong start; raise "
                "--revisions, --srt_questions or --srt_max_tokens, leave out --wrong_share, or "
                "take easier problems")
    updates = -(-len(traces) * args.srt_epochs // args.srt_batch)
    last_step = updates + args.rounds * a_round

    if args.eval_only:
        run.log(first_step, evaluate())
        return run.finish(sampler, verifier)

    def train_on_traces(step: int, metrics: dict) -> None:
        """One update of phase 1 (Eq. 3)."""
        optimizer.param_groups[0].update(betas=(0.9, 0.95), weight_decay=args.srt_weight_decay)
        share = args.srt_batch // run.world
        batch = take(traces, args.seed, (step * run.world + run.rank) * share, share)
        weights = [trace_weights(t, args.terms) for t in batch]
        per_token = token_share([sum(w > 0 for w in each) for each in weights], args.mean)
        sampler.rest()
        with run.timer("update"):
            losses = []
            prompts = [t.prompt_ids for t in batch]
            responses = [t.init_ids + t.control_ids + t.revised_ids for t in batch]
            for micro in micro_batches(prompts, responses, range(share), args.token_budget, run.device):
                tokens = Tokens(weight=micro.gather(weights) * per_token)
                total, _ = policy(micro, lambda hidden, weight: head_loss(
                    srt_loss, hidden, weight, micro.targets, tokens))
                (total * run.world).backward()  # FSDP averages over ranks; the weights are already global
                losses.append(total.item())
            metrics["lr"] = srt_lr(step, updates, args)
            optimizer_step(policy, optimizer, metrics["lr"], args.max_norm, metrics)
        trained = sum(map(sum, weights))  # App. C.2 counts y_rev once for each term
        # in lists: the log takes their mean over ranks, so times their number it is the sum
        metrics |= {"srt/loss": [sum(losses) * run.world], "budget/loss_tokens": [trained * run.world]}

    def distil(step: int, metrics: dict) -> list[Group]:
        """One step of phase 2 (Eq. 4); step counts from its beginning."""
        if step % a_round == 0:  # θ_SRT at the beginning; with more rounds, the teacher is synced
            blend(teacher, policy, 1.0)
            if step == 0:
                optimizer.state.clear()
                sampler.load(full_weights(policy))  # phase 1 does not sync
        optimizer.param_groups[0].update(betas=(0.9, 0.999), weight_decay=args.weight_decay)
        share = args.batch_size // run.world
        place = step // a_round * len(sd_problems) + step % a_round * args.batch_size + run.rank * share
        problems = take(sd_problems, args.seed, place, share)
        groups = judged(problems, chats(problems), 1, (args.seed, 5), range(place, place + share), args.max_tokens,
                        args.temperature, args.top_p)
        rollouts, r = [g.rollouts[0] for g in groups], [int(g.verdicts[0].reward == 1) for g in groups]
        prompts, responses = [o.prompt_ids for o in rollouts], [o.response_ids for o in rollouts]
        teacher_prompts = [reviser_prompt(o, k, tokenizer, sampler.ends) for o, k in zip(rollouts, r)]
        for g, p, y in zip(groups, teacher_prompts, responses):
            require(len(p) + len(y) <= sampler.context, f"problem {g.problem.id}: the teacher reads the response "
                    f"twice, {len(p) + len(y)} tokens; the model's context is {sampler.context}; lower --max_tokens")
        if step == 0:
            run.show(tokenizer, prompts[0], responses[0], f"teacher's prompt:\n{tokenizer.decode(teacher_prompts[0])}")
        per_token = token_share([len(y) for y in responses], args.mean)
        sampler.rest()
        with run.timer("update"):
            collected: dict[str, list[Tensor]] = {}
            for micro in micro_batches(teacher_prompts, responses, range(share), args.token_budget, run.device):
                with torch.no_grad():
                    seen = teacher(micro, lambda hidden, weight: (hidden, weight))
                student = micro.behind(prompts, responses)
                batch = Tokens(weight=torch.full_like(micro.targets, per_token, dtype=torch.float32))
                total, stats = policy(student, head(student, batch, seen, args))
                (total * run.world).backward()
                gap = stats.logp - micro.gather([o.logprobs for o in rollouts])  # log π_θ/π_sampler
                for name, value in diagnostics(stats, micro.spread(r), gap).items():
                    collected.setdefault(name, []).append(value)
                for row, kl in zip(micro.rows, stats.kl.cpu().split(micro.lengths)):
                    if len(curves[r[row]]) < 200 and len(kl) >= 20:
                        curves[r[row]].append(localisation(kl))
            metrics["lr"] = args.lr * min(1.0, (step + 1) / max(1, args.warmup))
            optimizer_step(policy, optimizer, metrics["lr"], args.max_norm, metrics)
        with run.timer("sync"):
            sampler.load(full_weights(policy))
        lengths = [len(y) for y in responses]
        metrics |= {"reward/mean": [v.reward for g in groups for v in g.verdicts], "length/mean": lengths,
                    "length/max": lengths, "frac_truncated": [o.truncated for o in rollouts],
                    "budget/generations": args.batch_size, "budget/sampled_tokens": [sum(lengths) * run.world],
                    "budget/loss_tokens": [2 * sum(lengths) * run.world],  # student and teacher
                    **{name: torch.cat(parts) for name, parts in collected.items()}}
        return groups

    curves: dict[int, list[list[float]]] = {0: [], 1: []}  # of this process's first responses in phase 2, by verdict
    for step in run.steps(first_step, last_step):
        every = args.eval_every if step >= updates else max(args.eval_every, updates // 10)  # many small updates
        metrics: dict = evaluate() if step % every == 0 or step == updates else {}
        metrics["phase"] = 1 if step < updates else 2
        groups: list[Group] = []
        if step < updates:
            train_on_traces(step, metrics)
        else:
            groups = distil(step - updates, metrics)
        run.log(step, metrics, [dict(id=g.problem.id, response=o.text, finish=o.finish_reason, reward=v.reward,
                                     feedback=v.feedback) for g in groups[:8] for o, v in zip(g.rollouts, g.verdicts)])
        if run.due(step + 1, updates, last_step):  # at intervals, at the ends, and where SIGTERM asks to stop
            run.save(step + 1, policy, optimizer, tokenizer, teacher=teacher)
        if run.stopping:
            return run.finish(sampler, verifier)

    run.log(last_step, evaluate())
    if run.rank == 0:
        if any(curves.values()):
            (run.folder / "self_localisation.json").write_text(json.dumps(curves))
            draw_localisation(curves, run.folder / "self_localisation.png")
        collected = read_traces(Path(args.traces or run.folder / "traces.jsonl"))[1]
        run.say(budget_table(args, run.history, collected, traces, updates, last_step))
    run.finish(sampler, verifier)


def head(micro: Micro, batch: Tokens, seen: tuple[Tensor, Tensor], args: Args):
    """What the policy does with hidden states [T, D] and the head's weight [V, D], given what the teacher saw at the
    second copy of the same tokens: its hidden states [T, D] and its head. → (loss, TokenStats)."""
    return lambda hidden, weight: head_loss(loss, hidden, weight, micro.targets, batch, *seen,
                                            divergence=divergence(args), temperature=args.temperature)


BOUND = 20.0  # nats: a log ratio above it counts as this much in mismatch/kl


def diagnostics(token: TokenStats, r: Tensor, gap: Tensor) -> dict[str, Tensor]:
    """Per-token metrics of phase 2 [T]; r [T] is the verdict on the token's response, gap [T] is log π_θ/π_sampler.
    teacher/copies is how often the teacher's likeliest token is the one that stands there in the first copy of y, as a
    mere copy would have it."""
    right, wrong = r == 1, r == 0
    near = gap.clamp(max=BOUND)
    return {"entropy": token.entropy, "teacher/entropy": token.teacher_entropy, "kl": token.kl,
            "kl/right": token.kl[right], "kl/wrong": token.kl[wrong],
            "mismatch/kl": near.expm1() - near, "mismatch/max_abs_dlogp": gap.abs(),
            "teacher/copies_right": token.teacher_greedy[right], "teacher/copies_wrong": token.teacher_greedy[wrong]}


# ---------------------------------------------------------------------------------------------------------------------
# 6. traces on disk, and what the paper reports
# ---------------------------------------------------------------------------------------------------------------------
def read_traces(path: Path) -> tuple[list[Trace], list[dict], int]:
    """The traces of the whole batches in a file, the lines that close them, and the bytes up to the last of those."""
    traces, batches, pending, size, position = [], [], [], 0, 0
    for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else []:
        if not line.endswith(b"\n"):  # a kill in the middle of a line
            break
        position += len(line)
        row = json.loads(line)
        if "batch" in row:
            traces, batches, pending, size = traces + pending, [*batches, row], [], position
        else:
            pending.append(Trace(**row))
    return traces, batches, size


KEYWORDS = (  # the 27 phrases of the paper's appendix; P_1 has none of them, P_0 two
    "wait", "wait a minute", "hold on", "actually", "on second thought", "oops", "incorrect",
    "my mistake", "i made a mistake", "this is wrong", "that is wrong", "that's wrong",
    "let me check", "let's check", "let me double check", "let's double check",
    "let me recheck", "let's recheck", "let me rethink", "let's rethink",
    "let me recalculate", "let's recalculate", "re-evaluate", "let's re-evaluate",
    "let me correct", "let me start over", "let me try again",
)


def speaks_of_revision(text: str) -> bool:
    """Whether a response holds one of KEYWORDS, as whole words: "loops" and "waiter" are none.

    >>> speaks_of_revision("Oops. Let’s recheck."), speaks_of_revision("Two nested loops.")
    (True, False)
    """
    phrases = "|".join(map(re.escape, KEYWORDS))
    return bool(re.search(rf"\b({phrases})\b", text.replace("’", "'"), re.IGNORECASE))


def localisation(kl: Tensor, buckets: int = 20) -> list[float]:
    """Fig. 4: the per-token KL of one response [|y|], sorted from large to small, as the mean of `buckets` equal parts.

    >>> localisation(torch.tensor([0.0, 4.0, 2.0, 2.0]), buckets=2)
    [3.0, 1.0]
    """
    return [part.mean().item() for part in kl.sort(descending=True).values.tensor_split(buckets)]


def draw_localisation(curves: dict[int, list[list[float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4), constrained_layout=True)
    for r, name in ((0, "wrong (r = 0)"), (1, "right (r = 1)")):
        if curves[r]:
            mean = torch.tensor(curves[r]).mean(0)
            axis.plot(range(1, len(mean) + 1), mean, marker="o", label=f"{name}, {len(curves[r])} responses")
    axis.set(xlabel="tokens of a response in 20 parts, by falling KL", ylabel="mean divergence (--kl), nats",
             title="self-localisation", yscale="log")
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def budget_table(args: Args, history: list[dict], batches: list[dict], traces: list[Trace],
                 updates: int, last_step: int) -> str:
    """The paper's budget (App. C.2) up to the start, the end of phase 1 and the end: responses and
    tokens that were sampled, tokens that went through a loss, and the outcome. A row includes the
    rows above it.

    As in the paper, the traces count for one pass, whatever --srt_epochs is, and each term counts
    its own tokens, so that y_rev counts twice. In phase 2 student and teacher count.
    """
    scores = {r["step"]: r["heldout/pass@1"] for r in history if "heldout/pass@1" in r}
    generations = sampled = trained = 0
    rows = [("start", generations, sampled, trained, scores.get(0, math.nan))]
    phase_1 = args.baseline.upper() or "SRT"
    if updates:
        generations = sum(b["generations"] for b in batches)
        sampled = sum(b["sampled_tokens"] for b in batches)
        trained = sum(sum(trace_weights(t, args.terms)) for t in traces)
        rows.append((phase_1, generations, sampled, trained, scores.get(updates, math.nan)))
    if last_step > updates:
        phase_2 = [r for r in history if r["step"] >= updates]
        generations += sum(r.get("budget/generations", 0) for r in phase_2)
        sampled += sum(r.get("budget/sampled_tokens", 0) for r in phase_2)
        trained += sum(r.get("budget/loss_tokens", 0) for r in phase_2)
        name = f"{phase_1} + SD" if updates else "SD only"
        rows.append((name, generations, sampled, trained, scores.get(last_step, math.nan)))
    columns = ("generations", "sampled tokens", "loss tokens", "held-out pass@1")
    lines = ["{:9s} {:>12s} {:>15s} {:>12s} {:>16s}".format("", *columns)]
    lines += ["{:9s} {:12,.0f} {:15,.0f} {:12,.0f} {:16.3f}".format(*row) for row in rows]
    if updates:
        passes = "pass" if args.srt_epochs == 1 else "passes"
        lines.append(f"Loss tokens of {phase_1}: of one pass over its traces; the run made "
                     f"{args.srt_epochs} {passes}.")
    return "\n".join(lines)


if __name__ == "__main__":
    main(parse(Args, presets))
