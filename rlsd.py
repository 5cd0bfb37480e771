"""RLSD: RLVR with Self-Distillation (arXiv 2604.03128).

The verifier sets the sign of the update. A teacher that sees the reference r (the final answer
alone) sets how much of the update each token gets. For a prompt x, G responses y and their
group-relative advantages A:

    Δ_t  = sg[ log π_T(y_t | x, r, y_<t) − log π_θ(y_t | x, y_<t) ]     the sampled token    Eq. 13
    w_t  = exp( sign(A)·Δ_t )                                                                Eq. 14
    Â_t  = A·( (1 − λ) + λ·clip(w_t, 1 − ε_w, 1 + ε_w) )                Eq. 15, Algorithm 1, line 17
    J(θ) = E[ 1/G Σ_i 1/|y_i| Σ_t min(ρ_t Â_t, clip(ρ_t, 1 − ε_low, 1 + ε_high) Â_t) ]       §4.2

sign(Â_t) = sign(A) always. λ falls from 0.5 to 0 over the first 50 steps; after that this is GRPO.
π_T is a snapshot of the student, refreshed every 10 steps. There is no KL term.

    python rlsd.py --demo                                   # embedded model, 3 minutes on a laptop
    torchrun --nproc_per_node=8 rlsd.py --model Qwen/Qwen3-8B                   # the paper's table
    torchrun --nproc_per_node=8 rlsd.py --mean token --dual_clip 3 --lam_steps 60 \\
        --teacher_every 20 --weight_decay 0.01                      # the released script's values
    torchrun --nproc_per_node=8 rlsd.py --lam 0                                # its GRPO baseline

The paper's Eq. 16 and the last line of its Algorithm 1 have no differentiable term as printed: w_t
and Â_t are stop-gradients. Only "Â in place of A in the GRPO surrogate" (§4.2, its appendix and its
code) can be trained, so that is what this file does. Eq. 16's min(w A, clip(w) A) would also leave
the blame for A < 0 unbounded, so the clip here is two-sided.
The authors' teacher prompt differs from the student's by more than r, which puts a change of format
into Δ. Here the teacher sees the student's own prompt with the reference added.
Left out: images, the format and length rewards of the released code. Details: docs/rlsd.md.
"""
from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from common import require
from common.microbatches import micro_batches
from common.policy import (
    bounded_exp, ema_update, frozen_copy, load_policy, make_optimizer, mismatch, optimizer_step,
    score, warm_up,
)
from common.rollouts import Batch, Rollouts, check_fits
from common.run import Run
from common.settings import Flat, Setup, parse
from common.tasks import Problem
from common.teacher import teacher_answers
from kernels.head import TokenStats


# --------------------------------------------------------------------------------------------------
# 1. settings
# --------------------------------------------------------------------------------------------------
@dataclass
class Args:
    """RLSD. Defaults: the paper's table."""

    model: str = "Qwen/Qwen3-8B"  # folder or hub id; also the first teacher
    task: str = "gsm8k"  # see common/tasks; a mixture is 4*gsm8k+1*mbpp
    # the method
    lam: float = 0.5  # λ at step 0: share of the teacher's weights in Â (Eq. 15); 0: GRPO
    lam_steps: int = 50  # steps until λ is 0
    eps_w: float = 0.2  # ε_w, bound on a token's weight w_t
    hint: Literal["answer", "solution"] = "answer"  # r: the final answer, or the worked solution
    teacher_every: int = 10  # steps between copies of the student into the teacher
    group_size: int = 8  # G, responses per question
    clip_low: float = 0.2  # ε_low, bound on ρ below 1
    clip_high: float = 0.28  # ε_high, bound on ρ above 1
    dual_clip: float = 0.0  # bound on ρ for A < 0 (released: 3); 0: off
    mean: Literal["sequence", "token"] = "sequence"  # 1/|y| first (printed), or over all tokens
    std: bool = True  # divide advantages by the group's standard deviation
    minibatches: int = 1  # optimizer updates per step; each takes an equal share of the questions
    tis: float = 2.0  # C in sg(min(π_old/π_sampler, C)), truncated importance sampling; 0: off
    # sampling
    batch_size: int = 256  # questions per step, over all processes
    max_tokens: int = 4096  # most tokens per response
    temperature: float = 1.0  # of sampling and of the trained log-probabilities
    top_p: float = 1.0  # nucleus of sampling; below 1 sampler and trainer differ
    thinking: bool = False  # switch on the chat template's thinking mode, for both sides
    # optimisation
    steps: int = 200  # each has its own rollouts
    lr: float = 1e-6  # AdamW, constant after the warm-up
    warmup: int = 0  # steps of linear warm-up
    weight_decay: float = 0.0  # AdamW's
    max_norm: float = 1.0  # gradient clipping
    demo: bool = False  # the embedded model and task, small enough for a laptop: see DEMO

    setup: Flat[Setup] = field(default_factory=Setup)  # data, machine, log: common/settings.py


DEMO = dict(
    model="assets/chain", task="chain", group_size=8, batch_size=16, max_tokens=64, lr=1e-4,
    steps=80,
    setup=Setup(checkpointing=False, share_prompts=True, sampler_rows=128, eval_every=10,
                eval_samples=2, save_every=40),
)


def presets(args: Args) -> dict:
    """Defaults that depend on --demo; what is typed wins."""
    if args.demo:
        return DEMO
    return {}


# --------------------------------------------------------------------------------------------------
# 2. the teacher's context
# --------------------------------------------------------------------------------------------------
ANSWER = "The final answer is {answer}."
SOLUTION = "A solution that passed the check:\n{solution}"
LAYOUT = ("question", "reference")


def teacher_chat(problem: Problem, args: Args) -> list[dict]:
    """The student's own chat with the reference r added to the question.

    >>> p = Problem("1", [{"role": "user", "content": "1+1?"}], answer="2")
    >>> teacher_chat(p, Args())[0]["content"]
    '1+1?\\n\\nThe final answer is 2.'
    """
    if args.hint == "answer":
        reference, block = problem.answer, ANSWER.format(answer=problem.answer)
    else:
        reference, block = problem.solution, SOLUTION.format(solution=problem.solution)
    missing = f"problem {problem.id} has no {args.hint}: take the other --hint, or other data"
    require(reference is not None, missing)
    *system, user = problem.messages
    blocks = {"question": user["content"], "reference": block}
    content = "\n\n".join(blocks[name] for name in LAYOUT)
    return [*system, {"role": "user", "content": content}]


def teacher_prompts(batch: Batch, rollouts: Rollouts, args: Args) -> list[list[int]]:
    """The teacher's prompt for every rollout of the batch, as token ids."""
    prompts = []
    for group in batch.groups:
        ids = rollouts.chat_ids(teacher_chat(group.problem, args))
        prompts += [ids] * len(group.rollouts)
    check_fits(prompts, batch, rollouts)
    return prompts


# --------------------------------------------------------------------------------------------------
# 3. the loss
# --------------------------------------------------------------------------------------------------
def advantages(rewards: Tensor, std: bool) -> Tensor:
    """GRPO's A_i for rewards [Q, G].

    >>> advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]]), std=False)
    tensor([[ 0.5000, -0.5000, -0.5000,  0.5000],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    deviation = rewards.std(1, keepdim=True)
    equal = deviation <= 1e-6  # no signal: keeps rounding error from creating one
    if std:
        centred = centred / deviation
    return centred.masked_fill(equal, 0.0)


def lam_at(step: int, args: Args) -> float:
    """λ at a step, counted from 0: falls linearly to 0 at --lam_steps.

    >>> [lam_at(s, Args()) for s in (0, 25, 50, 150)]
    [0.5, 0.25, 0.0, 0.0]
    """
    return args.lam * max(0.0, 1 - step / args.lam_steps)


def token_weights(lengths: Tensor, kept: Tensor, args: Args) -> Tensor:
    """The weight in the batch's mean of each token of a rollout, [Q, G].

    lengths: response tokens, [Q, G]. kept [Q, G]: False drops a rollout.
    Counts are summed over all ranks, so the loss does not depend on how the batch is split.
    """
    if args.mean == "token":  # released: one mean over all tokens
        share = kept.float()
    else:  # 1/|y_i|, printed
        share = kept / lengths
    count = (share * lengths).sum().double()
    dist.all_reduce(count)
    return share / count.clamp(min=1)


class Inputs(NamedTuple):
    """What the loss needs to know about each response token, all [T]."""

    advantage: Tensor
    weight: Tensor  # from token_weights
    sampler_logp: Tensor  # log π_sampler
    old_logp: Tensor | None  # log π_old; None: one update per step, so π_old = π_θ
    teacher_logp: Tensor | None  # log π_T(y_t | x, r, y_<t); None: λ is 0


def token_credit(logp: Tensor, x: Inputs) -> Tensor:
    """w_t of Eq. 14, [T], without gradient."""
    delta = (x.teacher_logp - logp).detach()  # Eq. 13, nats
    return bounded_exp(x.advantage.sign() * delta)  # Eq. 14


def redistribute(A: Tensor, w: Tensor, lam: float, eps_w: float) -> Tensor:
    """Â_t, [T]: the rollout's advantage A [T], weighted token by token with w [T]."""
    return A * ((1 - lam) + lam * w.clamp(1 - eps_w, 1 + eps_w))  # Eq. 15 in Algorithm 1, line 17


def loss(stats: TokenStats, x: Inputs, lam: float, args: Args) -> Tensor:
    """Each token's loss [T]; the sum over the batch is −J (§4.2)."""
    A = x.advantage
    if x.teacher_logp is not None:
        A = redistribute(A, token_credit(stats.logp, x), lam, args.eps_w)
    old_logp = stats.logp.detach() if x.old_logp is None else x.old_logp
    ratio = bounded_exp(stats.logp - old_logp)  # ρ_t
    clipped = ratio.clamp(1 - args.clip_low, 1 + args.clip_high)
    surrogate = torch.minimum(ratio * A, clipped * A)
    if args.dual_clip > 0:
        bounded = torch.maximum(surrogate, args.dual_clip * A)
        surrogate = torch.where(A < 0, bounded, surrogate)
    per_token = -surrogate
    if args.tis > 0:  # the rollouts are the sampler's, not π_old's
        per_token = per_token * (old_logp - x.sampler_logp).exp().clamp(max=args.tis)
    return x.weight * per_token


# --------------------------------------------------------------------------------------------------
# 4. the loop
# --------------------------------------------------------------------------------------------------
def main(args: Args) -> None:
    run = Run(args, __file__, updates=args.minibatches, fixed=("lam",))
    rollouts = Rollouts(args, run)
    check(rollouts, args)
    if args.setup.dry_run:
        return run.dry_run(rollouts, copies=int(args.lam > 0))
    policy = load_policy(args.model, run.device, args.setup)
    teacher = frozen_copy(policy, run.device) if args.lam > 0 else None
    optimizer = make_optimizer(policy, args)
    run.resume(policy, optimizer, rollouts, teacher=teacher)

    for step in run.steps(args.steps):
        if step % args.setup.eval_every == 0:
            run.collect(rollouts.evaluate())

        # sample and judge
        batch = rollouts.sample(step)
        A = advantages(batch.rewards, args.std)
        lam = lam_at(step, args)

        # the teacher's prompts
        hinted = teacher_prompts(batch, rollouts, args) if lam > 0 else None  # 0: no teacher
        if hinted and step == 0:
            everywhere = torch.ones_like(A)
            run.collect(teacher_answers(rollouts, teacher, policy, batch, hinted, everywhere))

        # score
        rollouts.sleep()
        old_logp = teacher_logp = None
        if run.updates > 1:  # with one update, π_old is the policy in the update's own forward
            old_logp = score(policy, batch.prompts, batch.responses, args.setup, args.temperature)
        if hinted:
            teacher_logp = score(teacher, hinted, batch.responses, args.setup, args.temperature)

        # update
        run.phase("update")
        for part in batch.minibatches(args.minibatches):
            weight = token_weights(batch.lengths, part.expand_as(A), args)
            rows = (weight > 0) & (A != 0)  # a response with A = 0 has no gradient: skip it
            for micro in micro_batches(
                batch.prompts, batch.responses, rows, args.setup, run.device
            ):
                inputs = Inputs(
                    micro.per_token(A), micro.per_token(weight), micro.concat(batch.sampler_logp),
                    micro.concat(old_logp), micro.concat(teacher_logp),
                )
                total, stats = policy(
                    micro, partial(loss, lam=lam, args=args), inputs, temperature=args.temperature,
                )
                total.backward()
                run.collect(diagnostics(stats, inputs, lam, args))
            lr = args.lr * warm_up(step, args.warmup)
            run.collect(optimizer_step(policy, optimizer, lr, args.max_norm))
        if teacher is not None and (step + 1) % args.teacher_every == 0:
            ema_update(teacher, policy, rate=1.0)

        rollouts.sync(policy)
        run.collect({"lam": [lam], "leak/rate": leaks(batch)})
        run.log(batch, hinted)
    run.finish(rollouts)


def check(rollouts: Rollouts, args: Args) -> None:
    require(
        args.group_size > 1,
        "--group_size 1: advantages compare the responses of a group; take 2 or more",
    )
    require(
        args.dual_clip == 0 or args.dual_clip > 1,
        f"--dual_clip {args.dual_clip} must be above 1; 0 switches it off",
    )
    if args.lam > 0:  # exits here if a problem has no hint, or one that is too long
        rollouts.check_lengths([teacher_chat(problem, args) for problem in rollouts.task.at_hand])


# --------------------------------------------------------------------------------------------------
# 5. measurements
# --------------------------------------------------------------------------------------------------
def diagnostics(stats: TokenStats, x: Inputs, lam: float, args: Args) -> dict[str, Tensor]:
    """Per-token metrics [T] (docs/metrics.md); the log takes their mean or maximum."""
    A = x.advantage
    old_logp = stats.logp if x.old_logp is None else x.old_logp
    ratio = bounded_exp(stats.logp - old_logp)
    above, below = ratio > 1 + args.clip_high, ratio < 1 - args.clip_low
    clipped = (above & (A > 0)) | (below & (A < 0))
    if args.dual_clip > 0:
        clipped |= (ratio > args.dual_clip) & (A < 0)
    out = {"entropy": stats.entropy, "nll": -stats.logp, "clip_frac": clipped.float()}
    if x.teacher_logp is not None:
        w = token_credit(stats.logp, x)
        delta = x.teacher_logp - stats.logp  # Eq. 13
        out |= {
            "w/mean": w.clamp(max=1e3),
            "w/clip_high": (w > 1 + args.eps_w).float(),
            "w/clip_low": (w < 1 - args.eps_w).float(),
            "w/shift": (redistribute(A, w, lam, args.eps_w) - A).abs(),
            "delta/right": delta[A > 0],
            "delta/wrong": delta[A < 0],
        }
    return out | mismatch(old_logp, x.sampler_logp, args.tis)


def leaks(batch: Batch) -> list[bool]:
    """For every rollout: whether it mentions a reference that it could not see."""
    return [refers_to_a_reference(rollout.text) for rollout in batch.rollouts]


def refers_to_a_reference(text: str) -> bool:
    """True if a response mentions a reference that is not in its prompt: a symptom of leakage."""
    pattern = (
        r"\b(final answer is given (as|to)|(reference|given|provided) (answer|solution)"
        r"|solution that passed)"
    )
    return re.search(pattern, text, re.IGNORECASE) is not None


if __name__ == "__main__":
    main(parse(Args, presets))
