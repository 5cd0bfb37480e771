"""RLSD: RLVR with Self-Distillation (arXiv 2604.03128).

GRPO's verifier decides the direction of an update, a privileged teacher how it is spread over the tokens. For a prompt
x with reference r (the final answer alone), G responses and their group-relative advantages A:

    Δ_t = sg[ log π_T(y_t | x, r, y_<t) − log π_θ(y_t | x, y_<t) ]        the sampled token only             Eq. 13
    w_t = exp( sign(A)·Δ_t )                                                                                 Eq. 14
    Â_t = A·( (1 − λ) + λ·clip(w_t, 1 − ε_w, 1 + ε_w) )                                  Eq. 15, Algorithm 1 line 17
    J(θ) = E[ 1/G Σ_i 1/|y_i| Σ_t min(ρ_t Â_t, clip(ρ_t, 1 − ε_low, 1 + ε_high) Â_t) ]                        §4.2

sign(Â_t) = sign(A) always; λ goes from 0.5 to 0 over the first 50 steps, after which this is GRPO. π_T is a snapshot of
the student, refreshed every 10 steps. There is no KL term and no distillation loss.

    python rlsd.py --demo                                          # the embedded model, three minutes on a laptop
    torchrun --nproc_per_node=8 rlsd.py --model Qwen/Qwen3-8B      # the paper's table is the default
    torchrun --nproc_per_node=8 rlsd.py --mean token --dual_clip 3 --lam_steps 60 --teacher_every 20 --weight_decay 0.01
                                                                   # the released script's values
    torchrun --nproc_per_node=8 rlsd.py --lam 0                    # its GRPO baseline

The paper's Eq. 16 and the last line of its Algorithm 1 have no differentiable term as printed (w_t and Â_t are
stop-gradients); only "Â in place of A in the GRPO surrogate" (§4.2, its appendix and its code) can be run, and that is
what stands here. Eq. 16's min(w A, clip(w) A) would also leave the blame for A < 0 unbounded, so the clip is two-sided.
The authors' teacher prompt differs from the student's by more than r, which puts a change of format into Δ; here it is
the student's own prompt with the reference added, and --neutral_control takes out what an empty reference does.
Left out on purpose: images, the format and length rewards of the code. Details: docs/rlsd.md.
"""
from __future__ import annotations

import re
from dataclasses import dataclass
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
    score,
)
from common.run import Run, parse, require, within
from common.sampler import Rollout, first_sync, make_sampler
from common.tasks import Problem, load_task, take
from common.verifiers import Verdict, Verifier
from kernels.head import TokenStats, head_loss


# ---------------------------------------------------------------------------------------------------------------------
# 1. settings
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class Args:
    """RLSD. Defaults: the paper's experimental section, with a text model of the same size as its Qwen3-VL-8B."""

    model: str = "Qwen/Qwen3-8B"
    """folder or hub id of a causal LM with a chat template; start and first teacher"""
    task: str = "gsm8k"
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
    lam: float = 0.5
    """λ at the first step: the share of the advantage that w redistributes; 0 is GRPO"""
    lam_steps: int = 50
    """steps over which λ falls linearly to 0"""
    eps_w: float = 0.2
    """ε_w: the weights w are clipped to 1 ± ε_w"""
    hint: Literal["answer", "solution"] = "answer"
    """r: the final answer alone (the paper) or the data's worked solution"""
    teacher: Literal["snapshot", "live", "frozen", "ema"] = "snapshot"
    """whose weights teach: a copy of the student's every --teacher_every steps (the paper), the student's own at every
    step, the start's, or a moving average"""
    teacher_every: int = 10
    """--teacher snapshot: steps between copies"""
    teacher_rate: float = 0.05
    """--teacher ema: share of the student that enters at each step"""
    neutral_control: bool = False
    """measure Δ against the same prompt with an unknown reference, not against the student's prompt"""
    group_size: int = 8
    """G, responses a question"""
    clip_low: float = 0.2
    """ε below 1 in clip(ρ, 1−ε_low, 1+ε_high)"""
    clip_high: float = 0.28
    """ε above 1"""
    dual_clip: float = 0.0
    """bound on ρ·|Â| for Â < 0, in units of |Â| (the released code: 3); 0 is off"""
    mean: Literal["sequence", "token"] = "sequence"
    """1/G Σ 1/|y| Σ as printed, or one mean over all tokens of the batch as released"""
    std: bool = True
    """divide advantages by the group's standard deviation"""
    epochs: int = 1
    """passes over the rollouts of a step"""
    minibatches: int = 1
    """optimizer updates a pass; each takes an equal share of the questions"""
    tis: float = 2.0
    """C in sg(min(π_old/π_sampler, C)), the truncated importance weight of each token; 0 is off"""

    # sampling
    batch_size: int = 256
    """questions a step, over all processes"""
    max_tokens: int = 4096
    """limit of a response, in tokens"""
    temperature: float = 1.0
    """of sampling; log-probabilities are scored at the same temperature"""
    top_p: float = 1.0
    """nucleus of sampling; below 1 the sampler's distribution is not the trainer's"""
    thinking: bool = False
    """chat templates with a thinking mode: switch it on"""

    # optimisation
    steps: int = 200
    """exploration stages"""
    lr: float = 1e-6
    """learning rate of AdamW, constant after the warm-up"""
    warmup: int = 0
    """steps of linear warm-up"""
    weight_decay: float = 0.0
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


DEMO = dict(model="assets/chain", task="chain", group_size=8, batch_size=16, max_tokens=64, lr=1e-4, steps=80,
            eval_every=10, eval_samples=2, save_every=40)


def presets(args: Args) -> dict:
    return DEMO if args.demo else {}


# ---------------------------------------------------------------------------------------------------------------------
# 2. the teacher's context
# ---------------------------------------------------------------------------------------------------------------------
ANSWER = "The final answer is {answer}."
SOLUTION = "A solution that passed the check:\n{solution}"


def context(problem: Problem, args: Args, known: bool = True) -> list[dict]:
    """The student's own chat with the reference r added to its question; known=False: the same with an unknown one.

    >>> p = Problem("1", [{"role": "user", "content": "1+1?"}], answer="2")
    >>> context(p, Args())[0]["content"], context(p, Args(), known=False)[0]["content"]
    ('1+1?\\n\\nThe final answer is 2.', '1+1?\\n\\nThe final answer is unknown.')
    """
    reference = problem.answer if args.hint == "answer" else problem.solution
    require(reference is not None, f"problem {problem.id} has no {args.hint} for the teacher to see")
    template = ANSWER if args.hint == "answer" else SOLUTION
    *system, user = problem.messages
    block = template.format(**{args.hint: reference if known else "unknown"})
    return [*system, {"role": "user", "content": f"{user['content']}\n\n{block}"}]


# ---------------------------------------------------------------------------------------------------------------------
# 3. advantages and their distribution over tokens
# ---------------------------------------------------------------------------------------------------------------------
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


def lam_at(step: int, args: Args) -> float:
    """λ at a step, counted from 0: λ, then linearly down to 0 at --lam_steps.

    >>> [lam_at(s, Args()) for s in (0, 25, 50, 150)]
    [0.5, 0.25, 0.0, 0.0]
    """
    return args.lam * max(0.0, 1 - step / args.lam_steps)


BOUND = 20.0  # nats: up to here a log ratio is exponentiated as it is


def bounded_exp(x: Tensor) -> Tensor:
    """exp(x); beyond BOUND the tangent of exp at BOUND goes on. There the value still rises, and
    the slope stays at exp(BOUND): the gradient of one token can neither overflow nor vanish."""
    inside = x.clamp(max=BOUND)
    return torch.where(x > BOUND, inside.exp() * (1 + x - BOUND), inside.exp())


def spread(A: Tensor, teacher_logp: Tensor, logp: Tensor, lam: float, eps_w: float) -> tuple[Tensor, Tensor]:
    """Â_t and w_t, both [T] and without gradient, from A, log π_T(y_t) and log π_θ(y_t), all [T]."""
    delta = (teacher_logp - logp).detach()  # Eq. 13: what the reference says of this token, nats
    w = bounded_exp(A.sign() * delta)  # Eq. 14: (P_T/P_S)^sign(A)
    return A * ((1 - lam) + lam * w.clamp(1 - eps_w, 1 + eps_w)), w  # Eq. 15 in Algorithm 1, line 17


def token_weights(lengths: Tensor, args: Args) -> Tensor:
    """The weight of each token of a rollout in the batch's mean, [Q, G], for lengths [Q, G] in tokens. Counts go over
    all ranks, so any split of a batch gives the same loss."""
    share = torch.ones_like(lengths) if args.mean == "token" else 1 / lengths  # released: one mean; printed: 1/|y|
    count = (share * lengths).sum().double()
    dist.all_reduce(count)
    return share / count.clamp(min=1)


# ---------------------------------------------------------------------------------------------------------------------
# 4. the loss
# ---------------------------------------------------------------------------------------------------------------------
class Tokens(NamedTuple):
    """What the loss needs to know of each response token, all [T]."""

    advantage: Tensor
    weight: Tensor  # from token_weights
    sampler_logp: Tensor  # log π_sampler
    old_logp: Tensor | None  # log π_old; None where π_old is the policy itself (one update a step)
    teacher_logp: Tensor | None  # log π_T(y_t | x, r, y_<t); None where λ is 0
    neutral_logp: Tensor | None  # the same with an unknown reference, for --neutral_control


def loss(token: TokenStats, batch: Tokens, lam: float, args: Args) -> Tensor:
    """The loss of each token [T]; their sum is −J (§4.2) of the batch."""
    old_logp = token.logp.detach() if batch.old_logp is None else batch.old_logp
    ratio, A = bounded_exp(token.logp - old_logp), batch.advantage  # ρ_t
    if batch.teacher_logp is not None:
        without_r = token.logp if batch.neutral_logp is None else batch.neutral_logp
        A, _ = spread(A, batch.teacher_logp, without_r, lam, args.eps_w)
    surrogate = torch.minimum(ratio * A, ratio.clamp(1 - args.clip_low, 1 + args.clip_high) * A)
    if args.dual_clip > 0:
        surrogate = torch.where(A < 0, torch.maximum(surrogate, args.dual_clip * A), surrogate)
    per_token = -surrogate
    if args.tis > 0:  # truncated importance sampling: the rollouts are the sampler's, not π_old's
        per_token = per_token * (old_logp - batch.sampler_logp).exp().clamp(max=args.tis).detach()
    return batch.weight * per_token


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
    within(args, group_size=(2, 1e5), lam=(0, 1), lam_steps=(1, 1e9), eps_w=(0, 1), teacher_every=(1, 1e9),
           teacher_rate=(0, 1), clip_low=(0, 1), clip_high=(0, 1e3), dual_clip=(0, 1e3), tis=(0, 1e3), epochs=(1, 1e3),
           minibatches=(1, 1e5))
    run = Run(args, "rlsd", fixed=("teacher", "lam"))
    require(args.dual_clip == 0 or args.dual_clip > 1, f"--dual_clip {args.dual_clip} must be above 1, or 0 for off")
    require(args.batch_size % (run.world * args.minibatches) == 0, f"--batch_size {args.batch_size} questions do not "
            f"divide into {run.world} process(es) × {args.minibatches} minibatch(es)")
    task = load_task(args.task, heldout=args.heldout, fields=args.fields, instruction=args.instruction,
                     data_dir=args.data_dir, against=args.against)
    tokenizer = load_tokenizer(args.model, args.thinking, [*task.heldout, *task.train])
    verifier = Verifier(args.workers, allow_unsafe_exec=args.allow_unsafe_exec)
    verifier.check([*task.heldout, *task.train][run.rank :: run.world])  # a bad reference ends here, not in step 900
    for p in task.train if args.lam > 0 else ():
        context(p, args)  # so does a problem without the teacher's hint
    run.check_lengths(tokenizer, [*task.heldout, *task.train])
    if args.lam > 0:
        run.check_lengths(tokenizer, task.train, lambda p: context(p, args))
    if args.lam > 0 and args.neutral_control:
        run.check_lengths(tokenizer, task.train, lambda p: context(p, args, known=False))
    if args.dry_run:
        return run.plan(task, tokenizer, verifier, group=args.group_size, updates=args.epochs * args.minibatches,
                        copies=int(args.teacher != "live" and args.lam > 0), steps=args.steps)
    policy = load_policy(args.model, run.device, checkpointing=args.checkpointing, lora_rank=args.lora_rank,
                         lora_alpha=args.lora_alpha)
    teacher = policy if args.teacher == "live" or args.lam == 0 else frozen_copy(policy, args.model, run.device)
    optimizer = make_optimizer(policy, args.optimizer_state, lr=args.lr, weight_decay=args.weight_decay)
    sampler = make_sampler(args, tokenizer, run.device)
    run.begin(*task.notes, context=sampler.context)
    moving = {"teacher": teacher} if args.teacher in ("snapshot", "ema") and args.lam > 0 else {}
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

    def hinted(groups: list[Group], known: bool) -> list[list[int]]:
        """The teacher's prompt for each rollout."""
        out = []
        for g in groups:
            ids = chat_ids(tokenizer, context(g.problem, args, known), args.thinking)
            longest = max(len(o.response_ids) for o in g.rollouts)
            require(len(ids) + longest <= sampler.context, f"problem {g.problem.id}: the teacher's prompt and a "
                    f"response exceed the model's context of {sampler.context} tokens; lower --max_tokens or take "
                    "--hint answer")
            out += [ids] * len(g.rollouts)
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
        A, lam = advantages(rewards, args.std), lam_at(step, args)

        sampler.rest()
        with run.timer("score"):
            read = lambda model, before: [
                s.logp for s in score(model, before, responses, args.token_budget, args.temperature)]
            old_logp = teacher_logp = neutral_logp = None
            if args.epochs * args.minibatches > 1:  # else π_old is the policy that the update's own forward sees
                old_logp = read(policy, prompts)
            if lam > 0:  # from there on this is GRPO, and the teacher need not read
                teacher_prompts = hinted(groups, known=True)
                teacher_logp = read(teacher, teacher_prompts)
                if args.neutral_control:
                    neutral_logp = read(teacher, hinted(groups, known=False))

        with run.timer("update"):
            collected: dict[str, list[Tensor]] = {}
            for _ in range(args.epochs):
                order = torch.randperm(len(groups)) if args.minibatches > 1 else torch.arange(len(groups))
                for part in order.chunk(args.minibatches):
                    weight = torch.zeros_like(A)
                    weight[part] = token_weights(lengths[part], args)
                    # a response whose advantage is 0 has no gradient: it need not be read
                    rows = [q * args.group_size + i for q in part.tolist() for i in range(args.group_size)
                            if A[q, i] != 0]
                    for micro in micro_batches(prompts, responses, rows, args.token_budget, run.device):
                        batch = Tokens(advantage=micro.spread(A.flatten()), weight=micro.spread(weight.flatten()),
                                       sampler_logp=micro.gather([o.logprobs for o in rollouts]),
                                       old_logp=None if old_logp is None else micro.gather(old_logp),
                                       teacher_logp=None if teacher_logp is None else micro.gather(teacher_logp),
                                       neutral_logp=None if neutral_logp is None else micro.gather(neutral_logp))
                        total, stats = policy(micro, head(micro, batch, lam, args))
                        (total * run.world).backward()  # FSDP averages over ranks; the weights are already global
                        for name, value in diagnostics(stats, batch, lam, args).items():
                            collected.setdefault(name, []).append(value)
                    lr = args.lr * min(1.0, (step + 1) / max(1, args.warmup))
                    optimizer_step(policy, optimizer, lr, args.max_norm, metrics)
            if moving and args.teacher == "ema":
                blend(teacher, policy, args.teacher_rate)
            elif moving and (step + 1) % args.teacher_every == 0:
                blend(teacher, policy, 1.0)

        with run.timer("sync"):
            sampler.load(full_weights(policy))

        metrics |= {"reward/mean": rewards, "length/mean": lengths, "length/max": lengths, "frac_truncated": truncated,
                    "frac_zero_std": [not g.mixed for g in groups], "lam": lam, "lr": lr,
                    "leak/rate": [refers_to_a_reference(o.text) for o in rollouts],
                    **{name: torch.cat(parts) for name, parts in collected.items()}}
        if step == first_step:
            best = max(range(len(rollouts)), key=lambda i: A.flatten()[i])
            shown = tokenizer.decode(teacher_prompts[best]) if lam > 0 else "none"
            run.show(tokenizer, prompts[best], responses[best],
                     f"advantage {A.flatten()[best]:.3f}; teacher's prompt:\n{shown}")
        run.log(step, metrics, [dict(id=g.problem.id, response=o.text, finish=o.finish_reason, reward=v.reward,
                                     feedback=v.feedback) for g in groups[:2] for o, v in zip(g.rollouts, g.verdicts)])
        if run.due(step + 1, args.steps):  # at intervals, at the end, and where SIGTERM asks to stop
            run.save(step + 1, policy, optimizer, tokenizer, **moving)
        if run.stopping:
            return run.finish(sampler, verifier)

    run.log(args.steps, evaluate())
    run.finish(sampler, verifier)


def head(micro: Micro, batch: Tokens, lam: float, args: Args):
    """What the policy does with hidden states [T, D] and the head's weight [V, D]: → (loss, TokenStats)."""
    return lambda hidden, weight: head_loss(lambda token, part: loss(token, part, lam, args), hidden, weight,
                                            micro.targets, batch, temperature=args.temperature)


def diagnostics(token: TokenStats, batch: Tokens, lam: float, args: Args) -> dict[str, Tensor]:
    """Per-token metrics of an update [T]; the log takes their mean (or their maximum)."""
    old_logp = token.logp if batch.old_logp is None else batch.old_logp
    gap = old_logp - batch.sampler_logp  # log π_old/π_sampler, 0 where sampler and trainer agree
    ratio, A = bounded_exp(token.logp - old_logp), batch.advantage
    clipped = ((ratio > 1 + args.clip_high) & (A > 0)) | ((ratio < 1 - args.clip_low) & (A < 0))
    if args.dual_clip > 0:
        clipped |= (ratio > args.dual_clip) & (A < 0)
    near = gap.clamp(max=BOUND)
    out = {"entropy": token.entropy, "nll": -token.logp, "clip_frac": clipped.float(),
           "mismatch/kl": near.expm1() - near, "mismatch/max_abs_dlogp": gap.abs(),
           "mismatch/tis": near.exp().clamp(max=args.tis or torch.inf)}
    if batch.teacher_logp is not None:
        without_r = token.logp if batch.neutral_logp is None else batch.neutral_logp
        spread_A, w = spread(A, batch.teacher_logp, without_r, lam, args.eps_w)
        delta = batch.teacher_logp - without_r
        out |= {"w/mean": w.clamp(max=1e3), "w/clip_high": (w > 1 + args.eps_w).float(),
                "w/clip_low": (w < 1 - args.eps_w).float(), "w/shift": (spread_A - A).abs(),
                "delta/right": delta[A > 0], "delta/wrong": delta[A < 0]}
    return out


def refers_to_a_reference(text: str) -> bool:
    """Whether a response speaks of a reference that its prompt does not hold: the symptom of leakage."""
    pattern = r"\b(final answer is given (as|to)|(reference|given|provided) (answer|solution)|solution that passed)"
    return re.search(pattern, text, re.IGNORECASE) is not None


if __name__ == "__main__":
    main(parse(Args, presets))
