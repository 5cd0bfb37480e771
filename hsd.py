"""HSD: Hindsight Self-Distillation (arXiv 2606.15576), with OPSD (2601.18734) and the GRPO hybrid beside it.

For a question q with answer a*, sample a group of G responses o_i and judge them: R_i ∈ {0, 1}. The same model, shown
in hindsight the answer and a peer that got there, teaches itself as it is without them:

    S_i     = { j ≠ i : R_j = 1 }                                    the successful peers; a rollout is never its own
    c_i     = (a*, o_i⁺),  o_i⁺ ~ Uniform(S_i);   c_i = a* if S_i = ∅                                          Eq. 9
    L_i,t   = KL( sg[π_θ(· | q, c_i, o_i,<t)] ‖ π_θ(· | q, o_i,<t) )     over the whole vocabulary            Eq. 13
    J(θ)    = E[ 1/G Σ_i 1/|o_i| Σ_t L_i,t ] + Ω(θ),  Ω = β KL(π_θ ‖ π_0)   minimised                  Eq. 10, §2.2
    A_i,t   = log π_θ(o_i,t | q, c_i, o_i,<t) − log π_θ(o_i,t | q, o_i,<t)   the credit that is measured       Eq. 2

There is no advantage, ratio or clip: GRPO only supplies groups and a verifier. All rollouts are trained, the successful
ones too (each distils from another success), and an all-fail group is plain answer-conditioned OPSD, where the question
has a textual answer.

    python hsd.py --demo                                                 # the embedded model, three minutes on a laptop
    torchrun --nproc_per_node=8 hsd.py --model Qwen/Qwen3-8B             # the paper's settings
    torchrun --nproc_per_node=8 hsd.py --context solution --entry_clip 0.05 --teacher frozen --beta 0
                                                                         # OPSD: full solution, per-entry clip
    torchrun --nproc_per_node=8 hsd.py --context answer --grpo_mix 0.5   # the paper's GRPO+OPSD baseline

The paper contradicts itself on the direction: its text says "reverse KL", its Eq. 10 and 13 are KL(teacher ‖ student),
which the distillation literature calls forward. The formula is the default; --kl reverse is the other reading. It
gives no prompt; the wording below is ours, its fields and their order (question, answer, peer) are the paper's. The
estimator of its reference KL is not given either; here it is k2. Left out on purpose: packing both passes into one
masked forward, and π_0 refreshed by an EMA in runs beyond 2,000 steps. Details: docs/hsd.md.
"""
from __future__ import annotations

import random
from dataclasses import dataclass
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
from common.verifiers import Verdict, Verifier
from kernels.head import Divergence, TokenStats, head_loss


# ---------------------------------------------------------------------------------------------------------------------
# 1. settings
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class Args:
    """HSD. Defaults: §5.1 and App. A.2, A.3 of the paper, for Qwen3-8B."""

    model: str = "Qwen/Qwen3-8B"
    """folder or hub id of a causal LM with a chat template; start, first teacher and reference"""
    task: str = "4*gsm8k+1*mbpp"
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
    context: Literal["peer", "answer", "solution"] = "peer"
    """what the teacher sees: answer and peer (Eq. 9), the answer alone, or the data's worked solution (OPSD)"""
    peer: Literal["uniform", "shortest", "low_ppl", "high_ppl"] = "uniform"
    """which successful peer (Fig. 4d); perplexity is in the distribution that was sampled from"""
    kl: Literal["forward", "reverse", "jsd"] = "forward"
    """forward: KL(teacher‖student), Eq. 13 as printed; reverse: KL(student‖teacher); jsd: Jensen–Shannon"""
    entry_clip: float = 0.0
    """OPSD: bound on each vocabulary entry of the forward KL, in nats; 0 is off"""
    teacher: Literal["live", "frozen", "snapshot", "ema"] = "live"
    """whose weights teach: the student's own at every step (the paper), the start's, or a slower copy"""
    teacher_every: int = 10
    """--teacher snapshot: steps between copies"""
    teacher_rate: float = 0.05
    """--teacher ema: share of the student that enters at each step"""
    train_on: Literal["all", "failed"] = "all"
    """rollouts in the loss: all of them (Eq. 10) or those with R = 0"""
    beta: float = 0.001
    """weight of the KL to the start π_0; 0 drops the reference model"""
    grpo_mix: float = 0.0
    """weight of a GRPO surrogate, 1 − it for the distillation (the GRPO+OPSD baseline: 0.5)"""
    overflow: Literal["error", "fallback"] = "error"
    """a peer that does not fit the model's context: end in words, or count it and show the answer alone"""
    group_size: int = 8
    """G, responses a question"""

    # sampling
    batch_size: int = 128
    """questions a step, over all processes"""
    max_tokens: int = 4096
    """limit of a response, in tokens"""
    temperature: float = 1.0
    """of sampling; log-probabilities and both sides of the KL are at the same temperature"""
    top_p: float = 0.95
    """nucleus of sampling; the KL is over the full softmax all the same"""
    thinking: bool = False
    """chat templates with a thinking mode: switch it on, for student and teacher alike"""

    # optimisation
    steps: int = 1500
    """optimizer steps; each has its own rollouts"""
    lr: float = 1e-6
    """learning rate of AdamW, constant after the warm-up"""
    warmup: int = 0
    """steps of linear warm-up"""
    weight_decay: float = 0.0
    """of AdamW (betas 0.9, 0.95)"""
    max_norm: float = 1.0
    """gradient norm limit (not given in the paper)"""

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


DEMO = dict(model="assets/chain", task="chain", group_size=8, batch_size=16, max_tokens=64, beta=0.0, lr=3e-4, steps=60,
            teacher="frozen", eval_every=10, eval_samples=2, save_every=40)


def presets(args: Args) -> dict:
    return DEMO if args.demo else {}


# ---------------------------------------------------------------------------------------------------------------------
# 2. the teacher's context
# ---------------------------------------------------------------------------------------------------------------------
ANSWER = "The final answer is {answer}."
SOLUTION = "A solution that passed the check:\n{solution}"
CLOSING = "Now solve the problem in your own words."


def context(problem: Problem, peer: str | None, args: Args) -> list[dict] | None:
    """The chat that the teacher reads before the student's response; None where there is nothing to show.

    >>> p = Problem("1", [{"role": "user", "content": "1+1?"}], answer="2")
    >>> context(p, "1+1=2", Args())[0]["content"].split("\\n\\n")[1:3]
    ['The final answer is 2.', 'A solution that passed the check:\\n1+1=2']
    """
    blocks = []
    if args.context != "solution" and problem.answer is not None:
        blocks.append(ANSWER.format(answer=problem.answer))  # the answer first
    shown = {"peer": peer, "answer": None, "solution": problem.solution}[args.context]
    if shown is not None:
        blocks.append(SOLUTION.format(solution=shown))
    if not blocks:  # code without a textual answer and without a peer
        return None
    *system, user = problem.messages
    return [*system, {"role": "user", "content": "\n\n".join([user["content"], *blocks, CLOSING])}]


def choose_peers(rewards: list[float], lengths: list[int], logprobs: list[float], how: str,
                 rng: random.Random) -> list[int | None]:
    """For each rollout of a group the peer o_i⁺ it is shown, by index, or None (Eq. 9).

    rewards, lengths (tokens) and logprobs (mean a token, of the sampler) of the group's rollouts.
    """
    peers: list[int | None] = []
    for i in range(len(rewards)):
        S = [j for j in range(len(rewards)) if j != i and rewards[j] == 1]
        if not S:
            peers.append(None)
        elif how == "uniform":
            peers.append(rng.choice(S))
        elif how == "shortest":
            peers.append(min(S, key=lambda j: lengths[j]))
        else:  # perplexity falls as the mean log-probability rises
            peers.append((max if how == "low_ppl" else min)(S, key=lambda j: logprobs[j]))
    return peers


# ---------------------------------------------------------------------------------------------------------------------
# 3. the loss
# ---------------------------------------------------------------------------------------------------------------------
class Tokens(NamedTuple):
    """What the loss needs to know of each response token, all [T]."""

    weight: Tensor  # from token_weights
    advantage: Tensor  # the group's, for --grpo_mix
    signal: Tensor  # 1 where the teacher has a context; the others only have GRPO's share
    sampler_logp: Tensor  # log π_sampler, for the log
    ref_logp: Tensor | None  # log π_0; None without a reference


def divergence(args: Args) -> Divergence:
    """Between student p and teacher q, over the whole vocabulary."""
    if args.kl == "forward":  # Eq. 13: Σ_v q_v (log q_v − log p_v); its gradient on the student's logits is p − q
        return Divergence("forward_kl", clip=args.entry_clip or None)
    return Divergence("reverse_kl") if args.kl == "reverse" else Divergence("jsd", beta=0.5)


def k2(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """½(log π_θ/π_0)²: on samples of π_θ its gradient is that of the token's KL(π_θ‖π_0) given its prefix, in the
    direction that the paper names."""
    return 0.5 * (logp - ref_logp).square()


def loss(token: TokenStats, batch: Tokens, args: Args) -> Tensor:
    """The loss of each token [T]; their sum is J (Eq. 10) of the batch. The teacher's side carries no gradient."""
    per_token = token.kl * batch.signal  # Eq. 13
    if args.grpo_mix > 0:
        ratio = (token.logp - token.logp.detach()).exp()  # one update a step: π_old is the policy itself
        per_token = (1 - args.grpo_mix) * per_token - args.grpo_mix * ratio * batch.advantage
    if batch.ref_logp is not None:
        per_token = per_token + args.beta * k2(token.logp, batch.ref_logp)  # Ω(θ), §2.2
    return batch.weight * per_token


def token_weights(lengths: Tensor, kept: Tensor) -> Tensor:
    """1/G 1/|o_i| of Eq. 10 as the weight of each token of a rollout, [Q, G], for lengths [Q, G] in tokens; kept [Q, G]
    takes rollouts out, of the loss and of the mean. Counted over all ranks, so any split gives the same loss."""
    share, count = kept.float() / lengths, kept.sum().double()
    dist.all_reduce(count)
    return share / count.clamp(min=1)


def advantages(rewards: Tensor, std: bool) -> Tensor:
    """Group-relative advantages of rewards [Q, G].

    >>> advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]]), std=False)
    tensor([[ 0.5000, -0.5000, -0.5000,  0.5000],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    spread = rewards.std(1, keepdim=True)
    # GRPO §4.1.2: A_i = (r_i − mean(r)) / std(r); rewards that are all equal have no signal; rounding must not make one
    return torch.where(spread > 1e-6, centred / spread if std else centred, torch.zeros(()))


# ---------------------------------------------------------------------------------------------------------------------
# 4. measurements: where the credit is
# ---------------------------------------------------------------------------------------------------------------------
def divergence_point(response: list[int], peer: list[int]) -> int | None:
    """τ of Eq. 11: the first position (from 0) where the response leaves the peer; None where it never does.

    >>> divergence_point([5, 6, 7], [5, 9, 7]), divergence_point([5, 6], [5, 6, 7])
    (1, None)
    """
    return next((t for t, (a, b) in enumerate(zip(response, peer)) if a != b), None)


def localisation(credit: Tensor, tau: int) -> dict[str, float]:
    """How |A_t| (Eq. 2; credit [|o|], nats) of one response is spread about τ (§5.3, App. E.3, Table 5).

    mass/w8 is the share of the whole response's |A| that lies within 8 tokens of τ; mass50/w8 the share of what lies
    within 50 tokens of τ: the paper does not state its denominator, and its own numbers fit the second.
    If teacher and student agree at all of these tokens, the share has no entry.
    """
    size = credit.abs()
    offset = (torch.arange(len(size)) - tau).abs()
    total, near = size.sum(), size[offset <= 50].sum()
    out = {"credit/at_tau": size[tau], "credit/before_tau": size[:tau].mean() if tau else None,
           "credit/after_tau": size[tau + 1 :].mean() if tau + 1 < len(size) else None}
    for w in (2, 4, 8, 16, 32):
        inside = size[offset <= w].sum()
        if total > 0:
            out[f"mass/w{w}"] = inside / total
        if near > 0:
            out[f"mass50/w{w}"] = inside / near
    return {name: float(value) for name, value in out.items() if value is not None}


def coverage(p: Tensor, G: int) -> Tensor:
    """f(p, G) = (1 − p)(1 − (1 − p)^{G−1}), Eq. 12: how often a rollout fails and has a successful peer.

    (The paper's Table 2 does not follow from its own formula: at G = 8 the maximum is 0.650, where it prints 0.344.)
    """
    return (1 - p) * (1 - (1 - p) ** (G - 1))


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
    within(args, group_size=(1, 1e5), beta=(0, 1e3), entry_clip=(0, 1e3), teacher_every=(1, 1e9), teacher_rate=(0, 1),
           grpo_mix=(0, 1))
    require(not args.entry_clip or args.kl == "forward", "--entry_clip bounds the entries of --kl forward")
    peers = args.context == "peer"
    alone = args.group_size == 1 and (peers or args.grpo_mix > 0)
    require(not alone, "--group_size 1: a group of one has no peers and no advantages; raise it, "
            "or take --context answer with --grpo_mix 0")
    run = Run(args, "hsd", fixed=("teacher",))
    require(args.batch_size % run.world == 0, f"--batch_size {args.batch_size} questions do not divide into "
            f"{run.world} process(es)")
    task = load_task(args.task, heldout=args.heldout, fields=args.fields, instruction=args.instruction,
                     data_dir=args.data_dir, against=args.against)
    tokenizer = load_tokenizer(args.model, args.thinking, [*task.heldout, *task.train])
    verifier = Verifier(args.workers, allow_unsafe_exec=args.allow_unsafe_exec)
    verifier.check([*task.heldout, *task.train][run.rank :: run.world])  # a bad reference ends here, not in step 900
    run.check_lengths(tokenizer, [*task.heldout, *task.train])
    run.check_lengths(tokenizer, task.train, lambda p: context(p, None, args))
    if peers and args.overflow == "error":
        run.check_lengths(tokenizer, task.train, lambda p: context(p, "", args), reads=2,
                          why=" (the teacher reads a peer before the response)")
    if args.dry_run:
        return run.plan(task, tokenizer, verifier, group=args.group_size, steps=args.steps,
                        copies=(args.teacher != "live") + (args.beta > 0))
    policy = load_policy(args.model, run.device, checkpointing=args.checkpointing, lora_rank=args.lora_rank,
                         lora_alpha=args.lora_alpha)
    teacher = policy if args.teacher == "live" else frozen_copy(policy, args.model, run.device)
    reference = frozen_copy(policy, args.model, run.device) if args.beta > 0 else None
    optimizer = make_optimizer(policy, args.optimizer_state, lr=args.lr, betas=(0.9, 0.95),
                               weight_decay=args.weight_decay)
    sampler = make_sampler(args, tokenizer, run.device)
    run.begin(*task.notes, context=sampler.context)
    moving = {"teacher": teacher} if args.teacher in ("snapshot", "ema") else {}
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

    def teach(group: Group, rng: random.Random) -> list[tuple[list[int] | None, int | None, bool]]:
        """For each rollout of a group the teacher's prompt (None: nothing to show), the peer that is in it, and whether
        a peer was left out because it is too long."""

        def prompt(j: int | None) -> list[int] | None:
            peer = None if j is None else as_text(tokenizer, group.rollouts[j].text)
            messages = context(group.problem, peer, args)
            return None if messages is None else chat_ids(tokenizer, messages, args.thinking)

        lengths = [len(o.response_ids) for o in group.rollouts]
        mean_logp = [sum(o.logprobs) / len(o.logprobs) for o in group.rollouts]
        peers = choose_peers([v.reward for v in group.verdicts], lengths, mean_logp, args.peer, rng)
        out = []
        for i, j in enumerate(peers if args.context == "peer" else [None] * len(peers)):
            ids, cut = prompt(j), False
            if j is not None and len(ids) + lengths[i] > sampler.context and args.overflow == "fallback":
                j, ids, cut = None, prompt(None), True
            require(ids is None or len(ids) + lengths[i] <= sampler.context, f"problem {group.problem.id}: the "
                    f"teacher's prompt and a response exceed the model's context of {sampler.context} tokens; lower "
                    "--max_tokens, or take --overflow fallback where the peer is what is too long")
            out.append((ids, j, cut))
        return out

    if args.eval_only:
        run.log(first_step, evaluate())
        return run.finish(sampler, verifier)

    for step in run.steps(first_step, args.steps):
        metrics: dict = evaluate() if step % args.eval_every == 0 else {}
        groups = explore(step)
        rollouts = [o for g in groups for o in g.rollouts]
        prompts, responses = [o.prompt_ids for o in rollouts], [o.response_ids for o in rollouts]
        rewards = torch.tensor([[v.reward for v in g.verdicts] for g in groups])  # [Q, G]
        lengths = torch.tensor([[float(len(o.response_ids)) for o in g.rollouts] for g in groups])
        truncated = torch.tensor([[o.truncated for o in g.rollouts] for g in groups])
        A = advantages(rewards, std=True) if args.group_size > 1 else torch.zeros_like(rewards)
        hints = [h for g in groups for h in teach(g, random.Random(f"{args.seed}/{step}/{g.problem.id}"))]
        teacher_prompts, peers, overflow = zip(*hints)
        signal = torch.tensor([p is not None for p in teacher_prompts]).view_as(rewards)
        before = [t or p for t, p in zip(teacher_prompts, prompts)]  # without a context: read only for GRPO's share
        kept = signal | (args.grpo_mix > 0)
        if args.train_on == "failed":
            kept &= rewards < 1
        weight = token_weights(lengths, kept)
        rows = kept.flatten().nonzero().flatten().tolist()

        sampler.rest()
        with run.timer("score"):
            ref_logp = None
            if reference is not None:
                ref_logp = [s.logp for s in score(reference, prompts, responses, args.token_budget, args.temperature)]

        with run.timer("update"):
            collected: dict[str, list[Tensor]] = {}
            credit: dict[int, Tensor] = {}  # rollout → A_t of Eq. 2, [|o|]
            for micro in micro_batches(before, responses, rows, args.token_budget, run.device):
                with torch.no_grad():
                    seen = teacher(micro, lambda hidden, weight: (hidden, weight))
                student = micro.behind(prompts, responses)
                batch = Tokens(weight=micro.spread(weight.flatten()), advantage=micro.spread(A.flatten()),
                               signal=micro.spread(signal.flatten()),
                               sampler_logp=micro.gather([o.logprobs for o in rollouts]),
                               ref_logp=None if ref_logp is None else micro.gather(ref_logp))
                total, stats = policy(student, head(student, batch, seen, teacher is policy, args))
                (total * run.world).backward()  # FSDP averages over ranks; the weights are already global
                found = zip(micro.rows, (stats.teacher_logp - stats.logp).cpu().split(micro.lengths))
                credit |= {row: a for row, a in found if teacher_prompts[row] is not None}
                for name, value in diagnostics(stats, batch).items():
                    collected.setdefault(name, []).append(value)
            lr = args.lr * min(1.0, (step + 1) / max(1, args.warmup))
            optimizer_step(policy, optimizer, lr, args.max_norm, metrics)
            if args.teacher == "ema":
                blend(teacher, policy, args.teacher_rate)
            elif args.teacher == "snapshot" and (step + 1) % args.teacher_every == 0:
                blend(teacher, policy, 1.0)

        with run.timer("sync"):
            sampler.load(full_weights(policy))

        metrics |= {"reward/mean": rewards, "length/mean": lengths, "length/max": lengths, "frac_truncated": truncated,
                    "frac_zero_std": [not g.mixed for g in groups], "lr": lr, **where_credit_is(groups, peers, credit),
                    "context/peer": [j is not None for j in peers],
                    "context/none": [p is None for p in teacher_prompts], "frac_overflow": overflow,
                    **{name: torch.cat(parts) for name, parts in collected.items()}}
        if step == first_step and rows:
            i = max(rows, key=lambda i: peers[i] is not None)
            run.show(tokenizer, prompts[i], responses[i], f"teacher's prompt:\n{tokenizer.decode(before[i])}")
        run.log(step, metrics, [dict(id=g.problem.id, response=o.text, finish=o.finish_reason, reward=v.reward,
                                     feedback=v.feedback) for g in groups[:2] for o, v in zip(g.rollouts, g.verdicts)])
        if run.due(step + 1, args.steps):  # at intervals, at the end, and where SIGTERM asks to stop
            run.save(step + 1, policy, optimizer, tokenizer, **moving)
        if run.stopping:
            return run.finish(sampler, verifier)

    run.log(args.steps, evaluate())
    run.finish(sampler, verifier)


def head(micro: Micro, batch: Tokens, seen: tuple[Tensor, Tensor], shared: bool, args: Args):
    """What the policy does with hidden states [T, D] and the head's weight [V, D], given what the teacher saw at the
    same tokens: its hidden states [T, D] and its head. → (loss, TokenStats)."""
    teacher_hidden, teacher_head = seen
    return lambda hidden, weight: head_loss(
        lambda token, part: loss(token, part, args), hidden, weight, micro.targets, batch, teacher_hidden,
        None if shared else teacher_head, divergence=divergence(args), temperature=args.temperature)


BOUND = 20.0  # nats: a log ratio above it counts as this much in mismatch/kl


def diagnostics(token: TokenStats, batch: Tokens) -> dict[str, Tensor]:
    """Per-token metrics of an update [T]; the log takes their mean (or their maximum)."""
    gap = token.logp - batch.sampler_logp  # log π_θ/π_sampler; not 0 where --top_p cuts the sampler's distribution
    near = gap.clamp(max=BOUND)
    shown = batch.signal == 1
    out = {"entropy": token.entropy, "teacher/entropy": token.teacher_entropy[shown], "kl": token.kl[shown],
           "credit/mean_abs": (token.teacher_logp - token.logp)[shown].abs(),
           "mismatch/kl": near.expm1() - near, "mismatch/max_abs_dlogp": gap.abs()}
    if batch.ref_logp is not None:
        out["kl_ref"] = k2(token.logp, batch.ref_logp)
    return out


def where_credit_is(groups: list[Group], peers: list[int | None], credit: dict[int, Tensor]) -> dict[str, list[float]]:
    """The paper's measurements on this step's rollouts, each a list over rollouts or groups."""
    out: dict[str, list[float]] = {name: [] for name in METRICS}
    for q, g in enumerate(groups):
        R = [v.reward for v in g.verdicts]
        p = sum(r == 1 for r in R) / len(R)
        out["coverage"].append(sum(r < 1 and p > 0 for r in R) / len(R))  # its mean over groups estimates Eq. 12
        for i, r in enumerate(R):
            k = q * len(R) + i
            if k not in credit:
                continue
            out["shift/peer" if peers[k] is not None else "shift/answer"].append(float(credit[k].abs().mean()))
            if r < 1 and peers[k] is not None:
                tau = divergence_point(g.rollouts[i].response_ids, g.rollouts[peers[k]].response_ids)
                if tau is not None:
                    found = localisation(credit[k], tau) | {"tau": tau}
                    bin = "easy" if p > 0.5 else "medium" if p >= 0.2 else "hard"
                    for name, value in (found | {f"peak/{bin}": found["credit/at_tau"]}).items():
                        out[name].append(value)
    return out


METRICS = ["tau", "credit/at_tau", "credit/before_tau", "credit/after_tau", "shift/peer", "shift/answer",
           "coverage", *(f"peak/{b}" for b in ("easy", "medium", "hard")),
           *(f"{m}/w{w}" for m in ("mass", "mass50") for w in (2, 4, 8, 16, 32))]


if __name__ == "__main__":
    main(parse(Args, presets))
