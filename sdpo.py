"""SDPO: Self-Distillation Policy Optimization ("Reinforcement Learning via Self-Distillation", arXiv 2601.20802).

For a question x, sample G responses y_i and judge them. What the environment says of them becomes the context f of a
self-teacher, the same model (slowed down) with f in its prompt; the student learns the teacher's distribution on its
own tokens:

    q(· | x, f_i, y_<t)  = teacher;   f_i: a successful sibling's solution, else feedback on y_i; neither: no loss
    L(θ) = Σ_t KL( π_θ(· | x, y_<t) ‖ sg[q(· | x, f, y_<t)] ),    y ~ sg[π_θ(· | x)]                           Eq. 1
    A_t(ŷ) = log[ q(ŷ | x, f, y_<t) / π_θ(ŷ | x, y_<t) ]          the advantage of every vocabulary entry           §2
    A      = λ A^GRPO + (1 − λ) A^SDPO                            the hybrid                                   Eq. 3
    q: EMA of θ;  or the trust region q* ∝ exp((1 − α) log q_ref + α log q_θ)                               Table 4

The reward enters only through which response counts as successful.

    python sdpo.py --demo                                          # the embedded model, three minutes on a laptop
    torchrun --nproc_per_node=4 sdpo.py --task sciknoweval/chemistry --context solution --kl jsd --top_k 100
                                                                   # Table 12, Sec. 3
    torchrun --nproc_per_node=8 sdpo.py --task livecodebench --kl reverse --top_k 20 --teacher_rate 0.01 \\
        --minibatches 4 --lr 1e-6 --warmup 0                    # Table 12, Sec. 4; one question a process and update
    python sdpo.py --test_time --task livecodebench --kl reverse --top_k 20 --adv_clip 5 --teacher_rate 0.01 \\
        --batch_size 1 --group_size 16 --budget 2750 --seeds 5 --warmup 0 --lora_rank 32 --lr 1e-5
                                                                   # Table 12, Sec. 5, with LoRA: one process, one GPU

Equations are v2's (v1 printed the gradient without π inside the sum). The default divergence is exact, over the whole
vocabulary; the paper's top-K + tail is --top_k. The released code masks and averages per sequence within a micro-batch;
here the mean is over tokens, as in the paper's pseudo-code (--mean sequence is the other). Own success is never its own
demonstration, as in the code (the paper's Table 2 caption says otherwise). Left out on purpose: the sequence-level
estimator of Eq. 7 (the authors saw no gain) and multi-modal inputs. Details: docs/sdpo.md.
"""
from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from common.chat import as_text, chat_ids, load_tokenizer
from common.policy import (
    Micro,
    blend,
    frozen_copy,
    full_weights,
    load_policy,
    make_optimizer,
    micro_batches,
    optimizer_step,
    score,
)
from common.run import Run, parse, require, within
from common.sampler import Rollout, first_sync, make_sampler
from common.tasks import Problem, load_task, take
from common.verifiers import Verdict, Verifier, after_thoughts
from kernels.head import Divergence, TokenStats, head_loss, token_stats


# ---------------------------------------------------------------------------------------------------------------------
# 1. settings
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class Args:
    """SDPO. Defaults: Table 12, column Sec. 3, but the divergence is over the whole vocabulary and, where no sibling
    succeeds, the checker's feedback is shown (Sec. 3 has none: --context solution)."""

    model: str = "Qwen/Qwen3-8B"
    """folder or hub id of a causal LM with a chat template; start and first teacher"""
    task: str = "sciknoweval/chemistry"
    """a named set (gsm8k, mbpp …), jsonl:FILE, hf:NAME[:CONFIG], gym:NAME, chain, or a mixture: 4*gsm8k+1*mbpp"""
    data_dir: str = ""
    """folder that named sets are read from; empty reads them from the hub"""
    against: str = ""
    """further evaluation sets, joined by commas: training questions that stand in one are removed"""
    fields: str = ""
    """names of the data's fields where they differ, e.g. question=prompt,answer=gold"""
    instruction: str | None = None
    """text added to every maths question; the default asks for \\boxed{}"""
    heldout: int = 256
    """problems set aside for evaluation, never trained on"""

    # the method
    kl: Literal["jsd", "reverse", "forward"] = "jsd"
    """jsd: symmetric Jensen–Shannon (Sec. 3); reverse: KL(student‖teacher), Eq. 1 (Sec. 4, 5); forward: its opposite"""
    top_k: int = 0
    """the divergence over the student's K likeliest tokens and one tail bucket (Sec. 3: 100; Sec. 4, 5: 20); 0: all"""
    granularity: Literal["logit", "token", "sampled", "sequence"] = "logit"
    """Fig. 10: an advantage for every entry, for the likeliest token, for the whole response; or (released) for the
    sampled token. The last two are of the reverse KL, on sampled tokens"""
    adv_clip: float = 0.0
    """bound on |A_t(ŷ)| of --kl reverse (Sec. 5: 5.0), nats; 0 is off"""
    teacher: Literal["ema", "trust_region", "frozen", "live"] = "ema"
    """whose weights teach (Table 4)"""
    teacher_rate: float = 0.05
    """α: of the average per step, or of the live model in the trust region (Sec. 4, 5: 0.01)"""
    context: Literal["either", "solution", "feedback", "both"] = "either"
    """f: a sibling's solution, or feedback where there is none; one of them only; or both in one prompt"""
    lam: float = 0.0
    """λ of Eq. 3: the share of GRPO's advantage (the paper's hybrid: 0.9)"""
    clip_low: float = 0.2
    """--lam: ε below 1 in the clip of GRPO's share, Eq. 12 (released: 0.2)"""
    clip_high: float = 0.28
    """--lam: ε above 1 (Table 13)"""
    is_clip: float = 2.0
    """bound on π_θ/π_old of a token, with more than one update a step (the released code: 2)"""
    tis: float = 2.0
    """ρ of Table 12: sg(min(π_old/π_sampler, ρ)), the truncated importance weight of each token; 0 is off"""
    mean: Literal["token", "sequence"] = "token"
    """over all tokens with a signal (the paper), or within a response first (as released, but without its zeros)"""
    group_size: int = 8
    """G, responses a question"""
    minibatches: int = 1
    """optimizer updates a step; each takes an equal share of the questions"""

    # test-time self-distillation (§5)
    test_time: bool = False
    """take --questions held-out problems one by one, learn on each until it is solved; see `discover`"""
    questions: int = 8
    """how many problems, the hardest of the held-out ones by the start's own pass rate"""
    budget: int = 512
    """attempts at a problem"""
    seeds: int = 3
    """repetitions of each problem"""

    # sampling
    batch_size: int = 32
    """questions a step, over all processes"""
    max_tokens: int = 8192
    """limit of a response, in tokens"""
    temperature: float = 1.0
    """of sampling; log-probabilities and both sides of the KL are at the same temperature"""
    top_p: float = 1.0
    """nucleus of sampling; below 1 the sampler's distribution is not the trainer's"""
    thinking: bool = False
    """chat templates with a thinking mode: switch it on, for student and teacher alike"""

    # optimisation
    steps: int = 500
    """of sampling, judging and updating"""
    lr: float = 1e-5
    """learning rate of AdamW, constant after the warm-up"""
    warmup: int = 10
    """steps of linear warm-up"""
    weight_decay: float = 0.01
    """of AdamW"""
    max_norm: float = 1.0
    """gradient norm limit"""

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


DEMO = dict(model="assets/chain", task="chain", kl="reverse", group_size=8, batch_size=16, max_tokens=64, lr=1e-4,
            warmup=0, steps=60, eval_every=10, eval_samples=2, save_every=40)
TEST_TIME_DEMO = dict(task="chain:14", group_size=16, batch_size=1, max_tokens=192, questions=4, seeds=1, budget=256,
                      heldout=64)


def presets(args: Args) -> dict:
    return {**(DEMO if args.demo else {}), **(TEST_TIME_DEMO if args.demo and args.test_time else {})}


# ---------------------------------------------------------------------------------------------------------------------
# 2. the teacher's context
# ---------------------------------------------------------------------------------------------------------------------
SOLUTION = "A solution that passed the check:\n{solution}"
FEEDBACK = "What the checker said about an earlier attempt:\n{feedback}"
CLOSING = "Now solve the problem in your own words."


def context(problem: Problem, solution: str | None, feedback: str | None, args: Args) -> list[dict] | None:
    """The chat of the self-teacher: question, solution, feedback, one closing line; None where there is no signal. The
    attempt itself is not shown (Table 6), and a demonstration's thoughts are cut out.

    >>> p = Problem("1", [{"role": "user", "content": "1+1?"}])
    >>> context(p, "<think>hm</think>2", "no", Args())[0]["content"].split("\\n\\n")[1:-1]
    ['A solution that passed the check:\\n2']
    """
    blocks = []
    if solution is not None and args.context != "feedback":
        blocks.append(SOLUTION.format(solution=after_thoughts(solution)))
    if feedback and (args.context in ("feedback", "both") or (args.context == "either" and not blocks)):
        blocks.append(FEEDBACK.format(feedback=feedback))
    if not blocks:
        return None
    *system, user = problem.messages
    return [*system, {"role": "user", "content": "\n\n".join([user["content"], *blocks, CLOSING])}]


def choose_siblings(rewards: list[float], rng: random.Random) -> list[int | None]:
    """For each rollout of a group a successful sibling, drawn uniformly, never itself; None where there is none."""
    out: list[int | None] = []
    for i in range(len(rewards)):
        others = [j for j, r in enumerate(rewards) if r == 1 and j != i]
        out.append(rng.choice(others) if others else None)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# 3. the loss
# ---------------------------------------------------------------------------------------------------------------------
class Tokens(NamedTuple):
    """What the loss needs to know of each response token, all [T]."""

    weight: Tensor  # from token_weights
    signal: Tensor  # 1 where the teacher has a context, else 0
    advantage: Tensor  # GRPO's, r − mean(r), for the hybrid
    sampler_logp: Tensor  # log π_sampler
    old_logp: Tensor | None  # log π_old; None where π_old is the policy itself (one update a step)
    rollout: Tensor  # which rollout the token belongs to, 0 … R−1


def clipped_advantages(bound: float):
    """KL(π‖q) with the advantages A(ŷ) = log q − log π bounded in the gradient (Table 12: 5.0): → a custom divergence
    for the kernels (docs/kernels.md), (value, slope) of each entry; at.x is A(ŷ)."""
    return lambda at, _: (at.gap - at.p * at.x, -at.p * at.x.clamp(-bound, bound))


def divergence(args: Args) -> Divergence:
    """Between student p and teacher q. top-K + tail: Eq. 11 (v2), the K of the student."""
    top_k = 1 if args.granularity == "token" else args.top_k
    if args.adv_clip > 0:
        return Divergence(clipped_advantages(args.adv_clip), top_k=top_k)
    kind = {"reverse": "reverse_kl", "forward": "forward_kl", "jsd": "jsd"}[args.kl]  # jsd: M = ½π + ½q
    return Divergence(kind, beta=0.5, top_k=top_k, support="student", tail=True)


BOUND = 20.0  # nats: up to here a log ratio is exponentiated as it is


def bounded_exp(x: Tensor) -> Tensor:
    """exp(x); beyond BOUND the tangent of exp at BOUND goes on. There the value still rises, and
    the slope stays at exp(BOUND): the gradient of one token can neither overflow nor vanish."""
    inside = x.clamp(max=BOUND)
    return torch.where(x > BOUND, inside.exp() * (1 + x - BOUND), inside.exp())


def loss(token: TokenStats, batch: Tokens, args: Args) -> Tensor:
    """The loss of each token [T]; their sum is L (Eq. 1) of the batch. The teacher's side carries no gradient."""
    old_logp = token.logp.detach() if batch.old_logp is None else batch.old_logp
    if args.granularity in ("logit", "token"):
        distil = token.kl  # Eq. 1
    else:  # −A log π_θ with the advantage of the sampled token, or its mean over the response
        A = (token.teacher_logp - token.logp).detach()
        distil = -(rollout_mean(A, batch.rollout) if args.granularity == "sequence" else A) * token.logp
    ratio = bounded_exp(token.logp - old_logp)
    distil = distil * ratio.detach().clamp(max=args.is_clip)  # truncated weight of an off-policy token, as released
    per_token = batch.signal * distil
    if args.lam > 0:  # Eq. 3, with the clip of Eq. 12 on GRPO's share
        clipped = ratio.clamp(1 - args.clip_low, 1 + args.clip_high)
        surrogate = torch.minimum(ratio * batch.advantage, clipped * batch.advantage)
        per_token = (1 - args.lam) * per_token - args.lam * surrogate
    if args.tis > 0:  # truncated importance sampling: the rollouts are the sampler's, not π_old's
        per_token = per_token * (old_logp - batch.sampler_logp).exp().clamp(max=args.tis).detach()
    return batch.weight * per_token


def rollout_mean(x: Tensor, rollout: Tensor) -> Tensor:
    """Each token's value becomes the mean over its rollout. x, rollout [T].

    >>> rollout_mean(torch.tensor([1.0, 3.0, 7.0]), torch.tensor([0, 0, 1]))
    tensor([2., 2., 7.])
    """
    lengths = torch.bincount(rollout)
    return (torch.zeros(len(lengths), dtype=x.dtype, device=x.device).index_add(0, rollout, x) / lengths)[rollout]


def token_weights(lengths: Tensor, kept: Tensor, args: Args) -> Tensor:
    """The weight of each token of a rollout in the batch's mean, [Q, G], for lengths [Q, G] in tokens and kept [Q, G]
    (0 takes a rollout out). Counts go over all ranks, so any split of a batch gives the same loss."""
    kept = kept.float()
    share = kept if args.mean == "token" else kept / lengths
    count = (share * lengths).sum().double()
    dist.all_reduce(count)
    return share / count.clamp(min=1)


# ---------------------------------------------------------------------------------------------------------------------
# 4. the loop
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
    within(args, group_size=(1, 1e5), top_k=(0, 1e6), adv_clip=(0, 1e3), teacher_rate=(0, 1), lam=(0, 1), tis=(0, 1e3),
           clip_low=(0, 1), clip_high=(0, 1e3), is_clip=(1, 1e3), minibatches=(1, 1e5),
           questions=(1, 1e6), budget=(1, 1e7), seeds=(1, 1e3))
    require(not args.adv_clip or (args.kl == "reverse" and args.granularity in ("logit", "token")), "--adv_clip bounds "
            "the advantages of --kl reverse, with --granularity logit or token")
    require(not args.test_time or (args.budget >= args.group_size and not args.resume), "--test_time needs a --budget "
            f"of at least --group_size {args.group_size} attempts, and always begins at --model: leave out --resume")
    method = "sdpo-test-time" if args.test_time else "sdpo"
    alone = args.group_size == 1 and args.context == "solution"
    require(not alone, "--group_size 1: a response has no sibling whose solution --context "
            "solution could show; raise it, or take --context either")
    run = Run(args, method, fixed=("teacher",), saves=not args.test_time)
    require(run.world == 1 or not args.test_time, "--test_time runs in one process")
    require(args.batch_size % (run.world * args.minibatches) == 0, f"--batch_size {args.batch_size} questions do not "
            f"divide into {run.world} process(es) × {args.minibatches} minibatch(es)")
    task = load_task(args.task, heldout=args.heldout, fields=args.fields, instruction=args.instruction,
                     data_dir=args.data_dir, against=args.against)
    tokenizer = load_tokenizer(args.model, args.thinking, [*task.heldout, *task.train])
    verifier = Verifier(args.workers, allow_unsafe_exec=args.allow_unsafe_exec)
    verifier.check([*task.heldout, *task.train][run.rank :: run.world])  # a bad reference ends here, not in step 900
    run.check_lengths(tokenizer, [*task.heldout, *task.train])
    if args.context != "feedback" and not args.test_time:
        run.check_lengths(tokenizer, task.train, lambda p: context(p, "", None, args), reads=2,
                          why=" (the teacher reads a sibling's before the response)")
    if args.dry_run:
        steps = args.questions * args.seeds * (args.budget // args.group_size) if args.test_time else args.steps
        return run.plan(task, tokenizer, verifier, group=args.group_size, updates=args.minibatches,
                        copies=(args.teacher != "live") + args.test_time, steps=steps)
    policy = load_policy(args.model, run.device, checkpointing=args.checkpointing, lora_rank=args.lora_rank,
                         lora_alpha=args.lora_alpha)
    slow = None if args.teacher == "live" else frozen_copy(policy, args.model, run.device)
    start = frozen_copy(policy, args.model, run.device) if args.test_time else None  # what each question begins with
    # the teacher's logits are Σ mix·(logits of a model): one model, or the reference and the live one (trust region)
    teachers = {"live": [policy], "trust_region": [slow, policy]}.get(args.teacher, [slow])
    mix = (1 - args.teacher_rate, args.teacher_rate) if args.teacher == "trust_region" else (1.0,)
    optimizer = make_optimizer(policy, args.optimizer_state, lr=args.lr, weight_decay=args.weight_decay)
    sampler = make_sampler(args, tokenizer, run.device)
    run.begin(*task.notes, context=sampler.context)
    moving = {"teacher": slow} if args.teacher == "ema" else {}
    first_step = run.resume(policy, optimizer, **moving)
    # on a resume the first rollouts must be the resumed policy's
    first_sync(sampler, policy, chat_ids(tokenizer, task.heldout[0].messages, args.thinking))

    def judged_groups(problems: list[Problem], n: int, seed: tuple[int, ...], keys: range) -> list[Group]:
        with run.timer("sample"):
            prompts = [chat_ids(tokenizer, p.messages, args.thinking) for p in problems]
            groups = sampler.sample(prompts, n, seed=seed, keys=keys, max_tokens=args.max_tokens,
                                    temperature=args.temperature, top_p=args.top_p)
        with run.timer("verify"):
            verdicts = verifier([p for p in problems for _ in range(n)], [o.text for g in groups for o in g])
        return [Group(p, g, verdicts[i * n : i * n + n]) for i, (p, g) in enumerate(zip(problems, groups))]

    def evaluate() -> dict:
        """Held-out problems, without hints, each rank every world-th of them."""
        mine = range(run.rank, len(task.heldout), run.world)
        with run.timer("evaluate"):
            groups = judged_groups([task.heldout[i] for i in mine], args.eval_samples, (args.seed, 1), mine)
        return {"heldout/pass@1": [v.reward for g in groups for v in g.verdicts],
                "heldout/length": [len(o.response_ids) for g in groups for o in g.rollouts]}

    def explore(step: int) -> list[Group]:
        """This rank's share of the questions as groups."""
        share = args.batch_size // run.world
        start = (step * run.world + run.rank) * share
        problems = take(task.train, args.seed, start, share)
        return judged_groups(problems, args.group_size, (args.seed, 0), range(start, start + share))

    def hinted(group: Group, rng: random.Random) -> list[tuple[list[int] | None, str]]:
        """The teacher's prompt for each rollout of a group (None where there is no signal), and what it shows."""
        out = []
        for i, j in enumerate(choose_siblings([v.reward for v in group.verdicts], rng)):
            solution = feedback = None
            if j is not None and args.context != "feedback":  # thoughts first: their tags may be control tokens
                solution = as_text(tokenizer, after_thoughts(group.rollouts[j].text))
            if group.verdicts[i].reward < 1:  # a success needs no correction
                feedback = as_text(tokenizer, group.verdicts[i].feedback)
            messages = context(group.problem, solution, feedback, args)
            ids = None if messages is None else chat_ids(tokenizer, messages, args.thinking)
            require(ids is None or len(ids) + len(group.rollouts[i].response_ids) <= sampler.context, f"problem "
                    f"{group.problem.id}: the teacher's prompt (with a solution or the environment's feedback) and a "
                    f"response exceed the model's context of {sampler.context} tokens; lower --max_tokens")
            out.append((ids, "none" if ids is None else "feedback" if solution is None else "solution"))
        return out

    def learn(groups: list[Group], step: int, metrics: dict) -> list[list[int] | None]:
        """One step on judged groups: contexts, gradients, optimizer, teacher, sampler. → the teacher's prompts."""
        rollouts = [o for g in groups for o in g.rollouts]
        prompts, responses = [o.prompt_ids for o in rollouts], [o.response_ids for o in rollouts]
        rewards = torch.tensor([[v.reward for v in g.verdicts] for g in groups])  # [Q, G]
        lengths = torch.tensor([[float(len(o.response_ids)) for o in g.rollouts] for g in groups])
        shown = [h for g in groups for h in hinted(g, random.Random(f"{args.seed}/{step}/{g.problem.id}"))]
        hints, kinds = zip(*shown)
        signal = torch.tensor([h is not None for h in hints]).view_as(rewards)
        teacher_prompts = [h or p for h, p in zip(hints, prompts)]  # without a signal: read only for GRPO's share
        A = rewards - rewards.mean(1, keepdim=True)

        sampler.rest()
        with run.timer("score"):
            old_logp = None
            if args.minibatches > 1:  # else π_old is the policy that the update's own forward sees
                old_logp = [s.logp for s in score(policy, prompts, responses, args.token_budget, args.temperature)]

        with run.timer("update"):
            collected: dict[str, list[Tensor]] = {}
            order = torch.randperm(len(groups)) if args.minibatches > 1 else torch.arange(len(groups))
            for part in order.chunk(args.minibatches):
                weight = torch.zeros_like(A)
                weight[part] = token_weights(lengths[part], signal[part] | (args.lam > 0), args)
                rows = weight.flatten().nonzero().flatten().tolist()
                for micro in micro_batches(teacher_prompts, responses, rows, args.token_budget, run.device):
                    with torch.no_grad():
                        seen = [model(micro, lambda h, w: (h, w)) for model in teachers]
                    student = micro.behind(prompts, responses)
                    batch = Tokens(weight=micro.spread(weight.flatten()), signal=micro.spread(signal.flatten()),
                                   advantage=micro.spread(A.flatten()), rollout=micro.rollout,
                                   sampler_logp=micro.gather([o.logprobs for o in rollouts]),
                                   old_logp=None if old_logp is None else micro.gather(old_logp))
                    total, stats = policy(student, head(student, batch, seen, mix, args))
                    (total * run.world).backward()  # FSDP averages over ranks; the weights are already global
                    for name, value in diagnostics(stats, batch, micro.spread(rewards.flatten())).items():
                        collected.setdefault(name, []).append(value)
                lr = args.lr * min(1.0, (step + 1) / max(1, args.warmup))
                optimizer_step(policy, optimizer, lr, args.max_norm, metrics)
            if args.teacher == "ema":  # once a step, after all its updates, as released
                blend(slow, policy, args.teacher_rate)

        with run.timer("sync"):
            sampler.load(full_weights(policy))

        metrics |= {"reward/mean": rewards, "length/mean": lengths, "length/max": lengths, "lr": lr,
                    "frac_truncated": [o.truncated for o in rollouts], "frac_zero_std": [not g.mixed for g in groups],
                    **{f"context/{name}": [k == name for k in kinds] for name in ("solution", "feedback", "none")},
                    **{name: torch.cat(parts) for name, parts in collected.items()}}
        return hints

    def teacher_accuracy(groups: list[Group], hints: list[list[int] | None]) -> list[float]:
        """Rewards of the teacher answering from its own context, one response for each rollout with a signal, where a
        longest one fits."""
        sampler.load(full_weights(slow if args.teacher in ("ema", "frozen") else policy))
        shown = [(h, g.problem) for h, g in zip(hints, (g for g in groups for _ in g.rollouts))
                 if h is not None and len(h) + args.max_tokens <= sampler.context]
        answers = sampler.sample([h for h, _ in shown], 1, seed=(args.seed, 2),
                                 keys=range(run.rank, len(shown) * run.world, run.world), max_tokens=args.max_tokens,
                                 temperature=args.temperature, top_p=args.top_p)
        sampler.load(full_weights(policy))
        return [v.reward for v in verifier([p for _, p in shown], [a[0].text for a in answers])]

    if args.test_time:

        def reset() -> None:
            for model in (policy, *moving.values()):
                blend(model, start, 1.0)
            optimizer.state.clear()
            sampler.load(full_weights(policy))

        def feedback_turn(problems: list[Problem], said: list[list[str]], n: int) -> list[Group]:
            """Each problem's next attempts, shown the last feedbacks on those before (not the attempts)."""
            only = replace(args, context="feedback")
            feedbacks = [as_text(tokenizer, "\n".join(s)) for s in said]
            shown = [replace(p, messages=context(p, None, feedback, only) or p.messages)
                     for p, feedback in zip(problems, feedbacks)]
            return judged_groups(shown, args.group_size, (args.seed, 4, n), range(len(shown)))

        discover(args, run, task.heldout, judged_groups, feedback_turn, learn, reset)
        return run.finish(sampler, verifier)
    if args.eval_only:
        run.log(first_step, evaluate())
        return run.finish(sampler, verifier)

    for step in run.steps(first_step, args.steps):
        metrics: dict = evaluate() if step % args.eval_every == 0 else {}
        groups = explore(step)
        hints = learn(groups, step, metrics)
        if step % args.eval_every == 0:
            with run.timer("evaluate"):
                metrics["teacher/accuracy"] = teacher_accuracy(groups, hints)
        if step == first_step and any(hints):
            i = next(i for i, h in enumerate(hints) if h is not None)
            o = groups[i // args.group_size].rollouts[i % args.group_size]
            run.show(tokenizer, o.prompt_ids, o.response_ids, f"teacher's prompt:\n{tokenizer.decode(hints[i])}")
        run.log(step, metrics, [dict(id=g.problem.id, response=o.text, finish=o.finish_reason, reward=v.reward,
                                     feedback=v.feedback) for g in groups[:2] for o, v in zip(g.rollouts, g.verdicts)])
        if run.due(step + 1, args.steps):  # at intervals, at the end, and where SIGTERM asks to stop
            run.save(step + 1, policy, optimizer, tokenizer, **moving)
        if run.stopping:
            return run.finish(sampler, verifier)

    run.log(args.steps, evaluate())
    run.finish(sampler, verifier)


def head(micro: Micro, batch: Tokens, seen: list[tuple[Tensor, Tensor]], mix: tuple[float, ...], args: Args):
    """What the policy does with hidden states [T, D] and the head's weight [V, D], given what each of the teacher's
    models saw at the same tokens: its hidden states [T, D] and its head. → (loss, TokenStats)."""
    options = dict(teacher_mix=mix, divergence=divergence(args), temperature=args.temperature)
    teacher = [h for h, _ in seen], [w for _, w in seen]

    def fused(hidden: Tensor, weight: Tensor) -> tuple[Tensor, TokenStats]:
        if args.granularity == "sequence":  # a mean over whole responses: all tokens' statistics first, then the loss
            stats = token_stats(hidden, weight, micro.targets, *teacher, **options)
            return loss(stats, batch, args).sum(), TokenStats(*(x.detach() for x in stats))
        return head_loss(lambda token, part: loss(token, part, args), hidden, weight, micro.targets, batch, *teacher,
                         **options)

    return fused


def diagnostics(token: TokenStats, batch: Tokens, reward: Tensor) -> dict[str, Tensor]:
    """Per-token metrics of an update [T]; the log takes their mean (or their maximum)."""
    old_logp = token.logp if batch.old_logp is None else batch.old_logp
    gap = old_logp - batch.sampler_logp  # log π_old/π_sampler, 0 where sampler and trainer agree
    near = gap.clamp(max=BOUND)
    shown = batch.signal == 1
    return {"entropy": token.entropy, "teacher/entropy": token.teacher_entropy[shown], "kl": token.kl[shown],
            "kl/right": token.kl[shown & (reward == 1)], "kl/wrong": token.kl[shown & (reward < 1)],
            "advantage/mean_abs": (token.teacher_logp - token.logp)[shown].abs(),
            "mismatch/kl": near.expm1() - near, "mismatch/max_abs_dlogp": gap.abs()}


# ---------------------------------------------------------------------------------------------------------------------
# 5. test-time self-distillation (§5)
# ---------------------------------------------------------------------------------------------------------------------
WINDOW = 4  # different feedbacks that the multi-turn baseline keeps in its prompt, first in first out


def discover(args: Args, run: Run, problems: list[Problem], judged_groups, feedback_turn, learn, reset) -> None:
    """Learn on one hard problem at a time until an attempt passes; the same budget of attempts goes to best-of-k (the
    start, again and again) and to multi-turn (the start, with the feedback on its last attempts in the prompt).

    Leaves discovery.json (the attempt that solved each problem, by method and repetition; null: none within the
    budget) and discovery.png (discovery@k with bootstrap 90 % intervals) in the run's folder.
    """
    first = judged_groups(problems, 32, (args.seed, 3), range(len(problems)))
    rates = [sum(v.reward for v in g.verdicts) for g in first]
    hard = sorted(range(len(problems)), key=lambda i: (rates[i], i))[: args.questions]
    trials = [(i, problems[i], s) for i in hard for s in range(args.seeds)]
    found: dict[str, list[int | None]] = {m: [None] * len(trials) for m in ("SDPO", "best-of-k", "multi-turn")}
    G, rounds, updates = args.group_size, args.budget // args.group_size, 0

    def keep() -> None:
        result = {"budget": rounds * G, "problems": [p.id for _, p, _ in trials], "solved_at": found}
        (run.folder / "discovery.json").write_text(json.dumps(result))

    for n in run.steps(0, len(trials)):
        i, problem, s = trials[n]
        reset()
        tried: list[Group] = []
        while len(tried) < rounds and first_right(tried) is None:
            if tried:
                metrics: dict = {}
                learn(tried[-1:], len(tried) - 1, metrics)
                run.log(updates, metrics, [dict(id=problem.id, repetition=s, round=len(tried))])
                updates += 1
            tried += judged_groups([problem], G, (args.seed, 5, s, i), range(len(tried), len(tried) + 1))
        found["SDPO"][n] = first_right(tried)
        keep()
        run.due(n + 1)
        require(not run.stopping, "stopped by SIGTERM: --test_time keeps no checkpoint, so it begins again")
    reset()
    for n, (i, problem, s) in enumerate(trials):
        found["best-of-k"][n] = first_right(judged_groups([problem] * rounds, G, (args.seed, 5, s, i), range(rounds)))
        keep()
    said: list[list[str]] = [[] for _ in trials]
    for turn in range(rounds):
        open_trials = [n for n in range(len(trials)) if found["multi-turn"][n] is None]
        groups = feedback_turn([trials[n][1] for n in open_trials], [said[n][-WINDOW:] for n in open_trials], turn)
        for n, group in zip(open_trials, groups):
            if right := first_right([group]):
                found["multi-turn"][n] = turn * G + right
            for verdict in group.verdicts:
                if verdict.feedback not in said[n][-WINDOW:]:
                    said[n].append(verdict.feedback)

    keep()
    draw_discovery(found, rounds * G, run.folder / "discovery.png")
    for method, times in found.items():
        low, mean, high = discovery(times, rounds * G)
        run.say(f"{method:10s} discovery@{rounds * G} {mean:.2f} (90 %: {low:.2f} to {high:.2f})")


def first_right(groups: list[Group]) -> int | None:
    """The first attempt of the groups that passed, from 1; None where none did."""
    return next((k for k, v in enumerate((v for g in groups for v in g.verdicts), 1) if v.reward == 1), None)


def discovery(times: list[int | None], k: int, draws: int = 2000) -> tuple[float, float, float]:
    """discovery@k = P(an attempt up to the k-th passes), between the bounds of a bootstrap 90 % interval over trials
    (with several repetitions of a problem it is too narrow, for they are alike).

    >>> discovery([1, 3, None, 9], k=4)[1]
    0.5
    """
    hits = torch.tensor([float(t is not None and t <= k) for t in times])
    picks = torch.randint(len(hits), (draws, len(hits)), generator=torch.Generator().manual_seed(0))
    low, high = hits[picks].mean(1).quantile(torch.tensor([0.05, 0.95])).tolist()
    return low, hits.mean().item(), high


def draw_discovery(found: dict[str, list[int | None]], budget: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ks = sorted({*(int(2 ** (i / 4)) for i in range(4 * budget.bit_length()) if 2 ** (i / 4) <= budget), budget})
    figure, axis = plt.subplots(figsize=(7, 4.5), constrained_layout=True)
    for method, times in found.items():
        low, mean, high = zip(*(discovery(times, k) for k in ks))
        line, = axis.plot(ks, mean, label=method)
        axis.fill_between(ks, low, high, alpha=0.15, color=line.get_color())
    axis.set(xscale="log", xlabel="attempts k", ylabel="discovery@k", ylim=(0, 1), title="test-time self-distillation")
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main(parse(Args, presets))
