"""GRPO: Group Relative Policy Optimization (DeepSeekMath, arXiv 2402.03300), and its variants.

For a question q, sample a group of G responses o_i from the policy and judge them: r_i. Then

    A_i    = (r_i − mean(r)) / std(r)                                   §4.1.2: outcome supervision
    ρ_i,t  = π_θ(o_i,t | q, o_i,<t) / π_old(o_i,t | q, o_i,<t)
    J(θ)   = E[ 1/G Σ_i 1/|o_i| Σ_t min(ρ A, clip(ρ, 1−ε, 1+ε) A) − β D_KL ]                  Eq. 3
    D_KL   = π_ref/π_θ − log(π_ref/π_θ) − 1   at the sampled token                 Eq. 4 ("k3")

--loss replaces the surrogate or the mean: dr_grpo (2503.20783), dapo (2503.14476), gspo
(2507.18071), cispo (2506.13585). It also sets the defaults in VARIANTS; what you type wins.

    python grpo.py --demo                                   # embedded model, 3 minutes on a laptop
    python grpo.py --model Qwen/Qwen3-0.6B --group_size 8 --beta 0 --lr 3e-6              # one GPU
    torchrun --nproc_per_node=8 grpo.py --model Qwen/Qwen3-8B --sampler vllm          # one machine

What the paper leaves open: here ε = 0.2; the standard deviation is unbiased; a group whose rewards
are all equal has A = 0 and still counts in the mean; truncated responses are judged as they are.
The printed objective does not correct for a sampler that differs from the trainer. Here each
token's loss is multiplied by sg(min(π_old/π_sampler, C)), --tis, which is 1 when the two agree.
Left out: process supervision and a learnt reward model (a verifier judges outcomes), iterative
reference refresh, a value function, asynchronous sampling. Details: docs/grpo.md.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from common import require
from common.microbatches import micro_batches
from common.policy import (
    bounded_exp, bounded_expm1, frozen_copy, load_policy, make_optimizer, mismatch,
    optimizer_step, rollout_mean, score, warm_up,
)
from common.rollouts import Batch, Rollouts
from common.run import Run
from common.settings import Flat, Setup, parse
from kernels.head import TokenStats


# --------------------------------------------------------------------------------------------------
# 1. settings
# --------------------------------------------------------------------------------------------------
@dataclass
class Args:
    """GRPO. Defaults: the values that DeepSeekMath §4.2 gives."""

    model: str = "deepseek-ai/deepseek-math-7b-instruct"  # folder or hub id; also the reference
    task: str = "gsm8k"  # see common/tasks; a mixture is 4*gsm8k+1*mbpp
    # the method
    loss: Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo"] = "grpo"  # also sets VARIANTS
    group_size: int = 64  # G, responses per question (§4.2)
    beta: float = 0.04  # weight of the KL to the reference (§4.2); 0: no reference model
    clip_low: float = 0.2  # ε below 1 in clip(ρ, 1−ε_low, 1+ε_high)
    clip_high: float = 0.2  # ε above 1; DAPO's clip-higher uses a larger value than clip_low
    std: bool = True  # divide advantages by the group's standard deviation
    epochs: int = 1  # passes over the rollouts of a step (§4.2: one update per exploration)
    minibatches: int = 1  # optimizer updates per pass; each takes an equal share of the questions
    dynamic_sampling: int = 0  # DAPO: most rounds of refilling groups with equal rewards; 0: off
    overlong: Literal["keep", "mask", "shape"] = "keep"  # truncated: judge, drop, or DAPO's penalty
    tis: float = 2.0  # C in sg(min(π_old/π_sampler, C)), truncated importance sampling; 0: off
    # sampling
    batch_size: int = 16  # questions per step, over all processes (§4.2: 1,024 responses)
    max_tokens: int = 1024  # most tokens per response (§4.2)
    temperature: float = 1.0  # of sampling and of the trained log-probabilities
    top_p: float = 1.0  # nucleus of sampling; below 1 sampler and trainer differ
    thinking: bool = False  # switch on the chat template's thinking mode
    # optimisation
    steps: int = 500  # exploration stages
    lr: float = 1e-6  # AdamW (§4.2), constant after the warm-up
    warmup: int = 0  # steps of linear warm-up
    weight_decay: float = 0.0  # AdamW's
    max_norm: float = 1.0  # gradient clipping
    demo: bool = False  # the embedded model and task, small enough for a laptop: see DEMO

    setup: Flat[Setup] = field(default_factory=Setup)  # data, machine, log: common/settings.py


VARIANTS = {  # what belongs to each formula; for DAPO also the settings of its §4.1
    "grpo": {},
    "dr_grpo": dict(std=False, beta=0.0),
    "dapo": dict(
        clip_high=0.28, beta=0.0, group_size=16, batch_size=512, minibatches=16, warmup=20,
        dynamic_sampling=8, overlong="shape", max_tokens=20480,
    ),
    "gspo": dict(clip_low=3e-4, clip_high=4e-4, beta=0.0),
    "cispo": dict(beta=0.0),
}
DEMO = dict(
    model="assets/chain", task="chain", group_size=8, batch_size=16, minibatches=1, max_tokens=64,
    beta=0.0, lr=1e-4, warmup=0, steps=80,
    setup=Setup(checkpointing=False, share_prompts=True, sampler_rows=128, eval_every=10,
                eval_samples=2, save_every=40),
)


def presets(args: Args) -> dict:
    """Defaults that depend on --loss and --demo; what is typed wins."""
    overrides = DEMO if args.demo else {}
    return VARIANTS[args.loss] | overrides


# --------------------------------------------------------------------------------------------------
# 2. rewards and advantages
# --------------------------------------------------------------------------------------------------
def advantages(rewards: Tensor, std: bool) -> Tensor:
    """A_i of §4.1.2 for rewards [Q, G].

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


def shaped_rewards(rewards: Tensor, lengths: Tensor, args: Args) -> Tensor:
    """DAPO's rewards [Q, G]: ±1 (Eq. 7) plus the soft overlong punishment (Eq. 13).

    The punishment is 0 up to L_max − L_cache tokens and falls linearly to −1 at L_max, with
    L_cache = L_max/5 as in DAPO's §4.1.
    """
    cache = args.max_tokens / 5
    punishment = ((args.max_tokens - cache - lengths) / cache).clamp(-1, 0)
    return 2 * rewards - 1 + punishment


def token_weights(lengths: Tensor, kept: Tensor, args: Args) -> Tensor:
    """The weight in the batch's mean of each token of a rollout, [Q, G].

    lengths: response tokens, [Q, G]. kept [Q, G]: False drops a rollout.
    Counts are summed over all ranks, so the loss does not depend on how the batch is split.
    """
    if args.loss in ("dapo", "cispo"):  # 1/Σ_i|o_i|: a mean over a group's tokens, then over groups
        share = kept / (kept * lengths).sum(1, keepdim=True).clamp(min=1)
        count = kept.any(1).sum().double()
    elif args.loss == "dr_grpo":  # the generation limit instead of |o_i|
        share = kept / args.max_tokens
        count = kept.sum().double()
    else:  # 1/|o_i| of Eq. 3, then a mean over responses
        share = kept / lengths
        count = kept.sum().double()
    dist.all_reduce(count)
    return share / count.clamp(min=1)


# --------------------------------------------------------------------------------------------------
# 3. the loss
# --------------------------------------------------------------------------------------------------
class Inputs(NamedTuple):
    """What the loss needs to know about each response token, all [T]."""

    advantage: Tensor
    weight: Tensor  # from token_weights
    sampler_logp: Tensor  # log π_sampler
    old_logp: Tensor | None  # log π_old; None: one update per step, so π_old = π_θ
    ref_logp: Tensor | None  # log π_ref; None: no reference
    rollout: Tensor  # which rollout of the micro-batch the token belongs to


def loss(stats: TokenStats, x: Inputs, args: Args) -> Tensor:
    """Each token's loss [T]; the sum over the batch is −J (Eq. 3)."""
    A = x.advantage
    old_logp = stats.logp.detach() if x.old_logp is None else x.old_logp
    ratio = importance_ratio(stats.logp, old_logp, x, args)
    if args.loss == "cispo":  # sg(min(ρ, 1+ε_high)) A log π_θ: a clipped token keeps its gradient
        surrogate = ratio.detach().clamp(max=1 + args.clip_high) * A * stats.logp
    else:
        clipped = ratio.clamp(1 - args.clip_low, 1 + args.clip_high)
        surrogate = torch.minimum(ratio * A, clipped * A)  # Eq. 3
    per_token = -surrogate
    if x.ref_logp is not None:
        per_token = per_token + args.beta * k3(stats.logp, x.ref_logp)  # Eq. 4
    if args.tis > 0:  # the rollouts are the sampler's, not π_old's
        per_token = per_token * (old_logp - x.sampler_logp).exp().clamp(max=args.tis)
    return x.weight * per_token


def importance_ratio(logp: Tensor, old_logp: Tensor, x: Inputs, args: Args) -> Tensor:
    """ρ_i,t of Eq. 3, [T]; for GSPO s_i = exp(1/|o_i| Σ_t log ρ_i,t), equal within a rollout."""
    log_ratio = logp - old_logp
    if args.loss == "gspo":
        log_ratio = rollout_mean(log_ratio, x.rollout)
    return bounded_exp(log_ratio)


def k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Eq. 4: π_ref/π_θ − log(π_ref/π_θ) − 1 ≥ 0, [T].

    The value estimates KL(π_θ‖π_ref). On samples of π_θ the gradient is that of KL(π_ref‖π_θ).
    """
    log_ratio = ref_logp - logp
    return bounded_expm1(log_ratio) - log_ratio


# --------------------------------------------------------------------------------------------------
# 4. the loop
# --------------------------------------------------------------------------------------------------
def main(args: Args) -> None:
    run = Run(args, __file__, updates=args.epochs * args.minibatches)
    check(args)
    rollouts = Rollouts(args, run)
    if args.setup.dry_run:
        return run.dry_run(rollouts, copies=int(args.beta > 0))
    policy = load_policy(args.model, run.device, args.setup)
    reference = frozen_copy(policy, run.device) if args.beta > 0 else None
    optimizer = make_optimizer(policy, args)
    run.resume(policy, optimizer, rollouts)

    for step in run.steps(args.steps):
        if step % args.setup.eval_every == 0:
            run.collect(rollouts.evaluate())

        # sample and judge
        batch = sample(rollouts, step, args)
        rewards = batch.rewards
        if args.overlong == "shape":
            rewards = shaped_rewards(rewards, batch.lengths, args)
        A = advantages(rewards, args.std)
        kept = torch.ones_like(batch.truncated)
        if args.overlong == "mask":
            kept = ~batch.truncated

        # score
        rollouts.sleep()
        old_logp = None
        if run.updates > 1:  # with one update, π_old is the policy in the update's own forward
            old_logp = score(policy, batch.prompts, batch.responses, args.setup, args.temperature)
        ref_logp = score(reference, batch.prompts, batch.responses, args.setup, args.temperature)

        # update
        run.phase("update")
        for part in batch.minibatches(args.minibatches, args.epochs):
            weight = token_weights(batch.lengths, kept & part, args)
            rows = weight > 0
            if reference is None:  # a response with A = 0 has no gradient: skip its forward
                rows &= A != 0
            for micro in micro_batches(
                batch.prompts, batch.responses, rows, args.setup, run.device
            ):
                inputs = Inputs(
                    micro.per_token(A), micro.per_token(weight), micro.concat(batch.sampler_logp),
                    micro.concat(old_logp), micro.concat(ref_logp), micro.rollout,
                )
                total, stats = policy(
                    micro, partial(loss, args=args), inputs, temperature=args.temperature,
                    per_response=args.loss == "gspo",  # the loss takes means over whole responses
                )
                total.backward()
                run.collect(diagnostics(stats, inputs, args))
            lr = args.lr * warm_up(step, args.warmup)
            run.collect(optimizer_step(policy, optimizer, lr, args.max_norm))

        rollouts.sync(policy)
        run.collect({"frac_all_right": (batch.rewards == 1).all(1)})
        run.log(batch)
    run.finish(rollouts)


def check(args: Args) -> None:
    require(
        args.group_size > 1,
        "--group_size 1: advantages compare the responses of a group; take 2 or more",
    )
    require(
        args.dynamic_sampling == 0 or args.setup.tensor_parallel == 1,
        "--dynamic_sampling: ranks that share an engine (--tensor_parallel) cannot sample "
        "different numbers of rounds; take --dynamic_sampling 0 or --tensor_parallel 1",
    )


def sample(rollouts: Rollouts, step: int, args: Args) -> Batch:
    """This rank's groups. With --dynamic_sampling, new questions replace groups whose rewards are
    all equal.

    After the last round, groups with equal rewards fill the batch, so that a step always ends.
    Groups stay in the order of their questions.
    """
    rounds = args.dynamic_sampling + 1
    groups = []
    for attempt in range(rounds):
        batch = rollouts.sample(step * rounds + attempt)
        share = len(batch.groups)
        groups += batch.groups
        if sum(group.mixed for group in groups) >= share:
            break
    mixed = [i for i, group in enumerate(groups) if group.mixed]
    equal = [i for i, group in enumerate(groups) if not group.mixed]
    chosen = (mixed + equal)[:share]
    return Batch([groups[i] for i in sorted(chosen)])


# --------------------------------------------------------------------------------------------------
# 5. measurements
# --------------------------------------------------------------------------------------------------
def diagnostics(stats: TokenStats, x: Inputs, args: Args) -> dict[str, Tensor]:
    """Per-token metrics [T] (docs/metrics.md); the log takes their mean or maximum."""
    A = x.advantage
    old_logp = stats.logp if x.old_logp is None else x.old_logp
    ratio = importance_ratio(stats.logp, old_logp, x, args)
    above, below = ratio > 1 + args.clip_high, ratio < 1 - args.clip_low
    clipped = (above & (A > 0)) | (below & (A < 0))
    if args.loss == "cispo":  # the bound holds for both signs of A
        clipped = above
    out = {"entropy": stats.entropy, "clip_frac": clipped.float()}
    if x.ref_logp is not None:
        out["kl_ref"] = k3(stats.logp, x.ref_logp)
    return out | mismatch(old_logp, x.sampler_logp, args.tis)


if __name__ == "__main__":
    main(parse(Args, presets))
