"""SDPO: Self-Distillation Policy Optimization ("Reinforcement Learning via Self-Distillation",
arXiv 2601.20802).

For a question x, sample G responses y_i and judge them. What the environment says about them
becomes the context f of a self-teacher: the same model (slowed down) with f in its prompt. The
student learns the teacher's distribution on its own tokens.

    f_i: a successful sibling's solution, else feedback on y_i; without either y_i has no loss
    L(θ) = Σ_t KL( π_θ(· | x, y_<t) ‖ sg[q(· | x, f, y_<t)] ),    y ~ sg[π_θ(· | x)]         Eq. 1
    A_t(ŷ) = log[ q(ŷ | x, f, y_<t) / π_θ(ŷ | x, y_<t) ]   for every vocabulary entry ŷ         §2
    A    = λ A^GRPO + (1 − λ) A^SDPO                                         the hybrid      Eq. 3
    q: EMA of θ;  or the trust region q* ∝ exp((1 − α) log q_ref + α log q_θ)              Table 4

The reward only decides which responses count as successful.

    python sdpo.py --demo                                   # embedded model, 3 minutes on a laptop
    torchrun --nproc_per_node=4 sdpo.py --task sciknoweval/chemistry --context solution \\
        --kl jsd --top_k 100                                                    # Table 12, Sec. 3
    torchrun --nproc_per_node=8 sdpo.py --task livecodebench --kl reverse --top_k 20 \\
        --teacher_rate 0.01 --minibatches 4 --lr 1e-6 --warmup 0                # Table 12, Sec. 4

Test-time self-distillation (Sec. 5) is benchmarks/discovery.py.
Equations are v2's (v1 printed the gradient without π inside the sum). The default divergence is
over the whole vocabulary; the paper's top-K + tail is --top_k. The released code masks and averages
per sequence within a micro-batch. Here the mean is over tokens, as in the paper's pseudo-code
(--mean sequence averages each sequence first). A response is never its own demonstration, as in the
code (the caption of the paper's Table 2 says otherwise). Left out: the sequence-level estimator of
Eq. 7 (the authors saw no gain), multi-modal inputs. Details: docs/sdpo.md.
"""
from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from common import require
from common.microbatches import Micro, micro_batches
from common.policy import (
    Policy, bounded_exp, ema_update, frozen_copy, load_policy, make_optimizer, mismatch,
    optimizer_step, rollout_mean, score, warm_up,
)
from common.rollouts import Batch, Group, Rollouts, check_fits
from common.run import Run
from common.sampler import Rollout
from common.settings import Flat, Setup, parse
from common.tasks import Problem
from common.teacher import kl_by_place, teacher_answers
from common.verifiers import Verdict
from common.verifiers.thoughts import after_thoughts
from kernels.divergence import Pair
from kernels.head import Divergence, TokenStats


# --------------------------------------------------------------------------------------------------
# 1. settings
# --------------------------------------------------------------------------------------------------
@dataclass
class Args:
    """SDPO. Defaults: Table 12, Sec. 3, but over the whole vocabulary and with feedback shown when
    no sibling succeeds (Sec. 3 shows none: --context solution)."""

    model: str = "Qwen/Qwen3-8B"  # folder or hub id; also the first teacher
    task: str = "sciknoweval/chemistry"  # see common/tasks; a mixture is 4*gsm8k+1*mbpp
    # the method
    kl: Literal["jsd", "reverse", "forward"] = "jsd"  # reverse: Eq. 1 (Sec. 4, 5); jsd: Sec. 3
    top_k: int = 0  # student's K likeliest entries + tail (Sec. 3: 100; Sec. 4, 5: 20); 0: all
    granularity: Literal["logit", "token", "sampled", "sequence"] = "logit"  # Fig. 10, divergence()
    adv_clip: float = 0.0  # bound on |A_t(ŷ)| of --kl reverse, nats (Sec. 5: 5.0); 0: off
    teacher: Literal["ema", "trust_region", "frozen", "live"] = "ema"  # whose weights (Table 4)
    teacher_rate: float = 0.05  # α: EMA rate per step, or the live model's share in the mix
    context: Literal["either", "solution", "feedback", "both"] = "either"  # f; solution first
    lam: float = 0.0  # λ of Eq. 3, the share of GRPO's advantage (the paper's hybrid: 0.9)
    clip_low: float = 0.2  # --lam: ε below 1 in the clip of GRPO's share, Eq. 12 (released)
    clip_high: float = 0.28  # --lam: ε above 1 (Table 13)
    tis: float = 2.0  # ρ of Table 12: bound on the weights π_θ/π_old and π_old/π_sampler; 0: off
    mean: Literal["token", "sequence"] = "token"  # over all tokens, or within a response first
    group_size: int = 8  # G, responses per question
    minibatches: int = 1  # optimizer updates per step; each takes an equal share of the questions
    # sampling
    batch_size: int = 32  # questions per step, over all processes
    max_tokens: int = 8192  # most tokens per response
    temperature: float = 1.0  # of sampling and of both sides of the divergence
    top_p: float = 1.0  # nucleus of sampling; below 1 sampler and trainer differ
    thinking: bool = False  # switch on the chat template's thinking mode, for both sides
    # optimisation
    steps: int = 500  # each has its own rollouts
    lr: float = 1e-5  # AdamW, constant after the warm-up
    warmup: int = 10  # steps of linear warm-up
    weight_decay: float = 0.01  # AdamW's
    max_norm: float = 1.0  # gradient clipping
    demo: bool = False  # the embedded model and task, small enough for a laptop: see DEMO

    setup: Flat[Setup] = field(default_factory=Setup)  # data, machine, log: common/settings.py


DEMO = dict(
    model="assets/chain", task="chain", kl="reverse", group_size=8, batch_size=16, max_tokens=64,
    lr=1e-4, warmup=0, steps=60,
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
SOLUTION = "A solution that passed the check:\n{solution}"
FEEDBACK = "What the checker said about an earlier attempt:\n{feedback}"
TOO_LONG = "It is too long: it was cut off after {tokens} tokens."  # instead of the checker's words
CLOSING = "Now answer the original question."  # what works on which task: docs/teacher.md
LAYOUT = ("question", "solution", "feedback", "closing")  # the order of Table 2


def choose_sibling(group: Group, i: int, rng: random.Random) -> int | None:
    """A successful sibling of rollout i, drawn uniformly, never itself; None if there is none."""
    others = [j for j, verdict in enumerate(group.verdicts) if verdict.reward == 1 and j != i]
    if not others:
        return None
    return rng.choice(others)


def teacher_chat(problem: Problem, solution: str | None, feedback: str | None,
                 args: Args) -> list[dict] | None:
    """The chat with f in it: question, solution, feedback, closing. None if there is no f.

    The attempt itself is not shown (Table 6), and the thoughts of a solution are cut out.

    >>> p = Problem("1", [{"role": "user", "content": "1+1?"}])
    >>> teacher_chat(p, "<think>hm</think>2", "no", Args())[0]["content"].split("\\n\\n")[1:-1]
    ['A solution that passed the check:\\n2']
    """
    blocks = {}
    if solution is not None and args.context != "feedback":
        blocks["solution"] = SOLUTION.format(solution=after_thoughts(solution))
    wanted = args.context in ("feedback", "both") or (args.context == "either" and not blocks)
    if feedback and wanted:
        blocks["feedback"] = FEEDBACK.format(feedback=feedback)
    if not blocks:
        return None
    *system, user = problem.messages
    blocks |= {"question": user["content"], "closing": CLOSING}
    content = "\n\n".join(blocks[name] for name in LAYOUT if blocks.get(name))
    return [*system, {"role": "user", "content": content}]


def feedback_on(rollout: Rollout, verdict: Verdict) -> str:
    """What a failed attempt is told."""
    if rollout.truncated:
        return TOO_LONG.format(tokens=len(rollout.response_ids))
    return verdict.feedback


def teacher_prompts(batch: Batch, rollouts: Rollouts, step: int, args: Args) -> tuple:
    """For every rollout: the teacher's prompt ids, whether it has a context [Q, G], and its KIND.

    Without a context the prompt is the student's own.
    """
    prompts, has_context, shown = [], [], []
    for group in batch.groups:
        rng = random.Random(f"{args.setup.seed}/{step}/{group.problem.id}")
        for i, (rollout, verdict) in enumerate(zip(group.rollouts, group.verdicts)):
            j = choose_sibling(group, i, rng)
            solution = feedback = None
            if j is not None and args.context != "feedback":
                # cut the thoughts before as_text changes control tokens: their tags may be such
                solution = rollouts.as_text(after_thoughts(group.rollouts[j].text))
            if verdict.reward < 1:  # a success needs no correction
                feedback = rollouts.as_text(feedback_on(rollout, verdict))
            chat = teacher_chat(group.problem, solution, feedback, args)
            has_context.append(chat is not None)
            if chat is None:
                prompts.append(rollout.prompt_ids)
                shown.append("none")
                continue
            prompts.append(rollouts.chat_ids(chat))
            kind = "feedback" if solution is None else "solution"
            shown.append(kind)
    check_fits(prompts, batch, rollouts)
    return prompts, torch.tensor(has_context).view_as(batch.rewards), shown


# --------------------------------------------------------------------------------------------------
# 3. the loss
# --------------------------------------------------------------------------------------------------
class Inputs(NamedTuple):
    """What the loss needs to know about each response token, all [T]."""

    weight: Tensor  # from token_weights
    has_context: Tensor  # 1 if the teacher was shown anything, else 0
    advantage: Tensor  # GRPO's, r − mean(r), for the hybrid
    sampler_logp: Tensor  # log π_sampler
    old_logp: Tensor | None  # log π_old; None: one update per step, so π_old = π_θ
    rollout: Tensor  # which rollout of the micro-batch the token belongs to


def token_weights(lengths: Tensor, kept: Tensor, args: Args) -> Tensor:
    """The weight in the batch's mean of each token of a rollout, [Q, G].

    lengths: response tokens, [Q, G]. kept [Q, G]: False drops a rollout.
    Counts are summed over all ranks, so the loss does not depend on how the batch is split.
    """
    if args.mean == "token":  # one mean over all trained tokens
        share = kept.float()
    else:
        share = kept / lengths
    count = (share * lengths).sum().double()
    dist.all_reduce(count)
    return share / count.clamp(min=1)


def loss(stats: TokenStats, x: Inputs, args: Args) -> Tensor:
    """Each token's loss [T]; the sum over the batch is L (Eq. 1) or the hybrid (Eq. 3)."""
    old_logp = stats.logp.detach() if x.old_logp is None else x.old_logp
    ratio = bounded_exp(stats.logp - old_logp)
    distil = stats.kl  # Eq. 1: see divergence()
    if args.granularity in ("sampled", "sequence"):
        distil = -sampled_advantage(stats, x, args) * stats.logp
    if args.tis > 0:  # truncated weight of an off-policy token, as released
        distil = distil * ratio.detach().clamp(max=args.tis)
    per_token = x.has_context * distil
    if args.lam > 0:  # Eq. 3, with the clip of Eq. 12 on GRPO's share
        clipped = ratio.clamp(1 - args.clip_low, 1 + args.clip_high)
        surrogate = torch.minimum(ratio * x.advantage, clipped * x.advantage)
        per_token = (1 - args.lam) * per_token - args.lam * surrogate
    if args.tis > 0:  # the rollouts are the sampler's, not π_old's
        per_token = per_token * (old_logp - x.sampler_logp).exp().clamp(max=args.tis)
    return x.weight * per_token


def sampled_advantage(stats: TokenStats, x: Inputs, args: Args) -> Tensor:
    """A_t(y_t) of §2, [T], without gradient; with --granularity sequence its mean per response."""
    A = (stats.teacher_logp - stats.logp).detach()
    if args.granularity == "sequence":
        A = rollout_mean(A, x.rollout)
    return A


def clipped_reverse_kl(pair: Pair, divergence: Divergence) -> tuple[Tensor, Tensor]:
    """KL(π‖q) whose gradient bounds the advantages A(ŷ) = log q − log π (Table 12: 5.0 nats).

    A custom divergence (docs/kernels.md): (value, slope) of each entry, [C, V]; pair.x is A(ŷ).
    """
    A = pair.x
    bounded = A.clamp(-divergence.clip, divergence.clip)
    return pair.gap - pair.p * A, -pair.p * bounded


def divergence(args: Args) -> Divergence:
    """Eq. 1 between student p and teacher q, which kernels/head.py sums chunk by chunk.

    --top_k: Eq. 11 (v2), the student's K likeliest entries and one more for the rest.
    --granularity token: K = 1.

    >>> from kernels.reference import divergence_of
    >>> p, q = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.5, 0.5]])  # student, teacher
    >>> eq_1 = (p * (p.log() - q.log())).sum(-1)
    >>> torch.allclose(divergence_of(divergence(Args(kl="reverse")), p, q), eq_1)
    True
    """
    top_k = args.top_k
    if args.granularity == "token":
        top_k = 1
    if args.adv_clip > 0:
        return Divergence(clipped_reverse_kl, clip=args.adv_clip, top_k=top_k)
    if args.kl == "reverse":
        return Divergence("reverse_kl", top_k=top_k)
    if args.kl == "forward":
        return Divergence("forward_kl", top_k=top_k)
    return Divergence("jsd", beta=0.5, top_k=top_k)  # against the mixture ½π + ½q


# --------------------------------------------------------------------------------------------------
# 4. the loop
# --------------------------------------------------------------------------------------------------
def main(args: Args) -> None:
    run = Run(args, __file__, updates=args.minibatches, fixed=("teacher",))
    rollouts = Rollouts(args, run)
    check(rollouts, args)
    if args.setup.dry_run:
        return run.dry_run(rollouts, copies=int(args.teacher != "live"))
    policy = load_policy(args.model, run.device, args.setup)
    slow = policy if args.teacher == "live" else frozen_copy(policy, run.device)
    teachers, mix = teacher_models(slow, policy, args)
    optimizer = make_optimizer(policy, args)
    run.resume(policy, optimizer, rollouts, slow, moving=args.teacher == "ema")

    for step in run.steps(args.steps):
        if step % args.setup.eval_every == 0:
            run.collect(rollouts.evaluate())

        # sample and judge
        batch = rollouts.sample(step)
        A = batch.rewards - batch.rewards.mean(1, keepdim=True)

        # the teacher's prompts
        hinted, has_context, shown = teacher_prompts(batch, rollouts, step, args)
        if step % args.setup.eval_every == 0:
            run.collect(teacher_answers(rollouts, slow, policy, batch, hinted, has_context))
        kept = has_context | (args.lam > 0)

        # score
        rollouts.sleep()
        old_logp = None
        if run.updates > 1:  # with one update, π_old is the policy in the update's own forward
            old_logp = score(policy, batch.prompts, batch.responses, args.setup, args.temperature)

        # update
        run.phase("update")
        for part in batch.minibatches(args.minibatches):
            weight = token_weights(batch.lengths, kept & part, args)
            for micro in micro_batches(hinted, batch.responses, weight > 0, args.setup, run.device):
                seen = [teacher.read(micro) for teacher in teachers]
                student = micro.with_prompts(batch.prompts, batch.responses)
                inputs = Inputs(
                    micro.per_token(weight), micro.per_token(has_context), micro.per_token(A),
                    micro.concat(batch.sampler_logp), micro.concat(old_logp), micro.rollout,
                )
                total, stats = policy(
                    student, partial(loss, args=args), inputs, seen, teacher_mix=mix,
                    divergence=divergence(args), temperature=args.temperature,
                    per_response=args.granularity == "sequence",
                )
                total.backward()
                run.collect(diagnostics(stats, inputs, micro, batch, rollouts.tokenizer))
            lr = args.lr * warm_up(step, args.warmup)
            run.collect(optimizer_step(policy, optimizer, lr, args.max_norm))
        if args.teacher == "ema":  # once per step, after all its updates, as released
            ema_update(slow, policy, args.teacher_rate)
        slow.reshard()  # to be read, its embeddings and head were gathered
        rollouts.sync(policy)
        run.collect({f"context/{kind}": [k == kind for k in shown] for kind in KINDS})
        run.log(batch, hinted)
    run.finish(rollouts)


def teacher_models(slow: Policy, policy: Policy, args: Args) -> tuple[list, tuple]:
    """The models and the mix of a teacher whose logits are Σ mix·(logits of a model) (Table 4)."""
    if args.teacher == "trust_region":
        return [slow, policy], (1 - args.teacher_rate, args.teacher_rate)
    return [slow], (1.0,)


def check(rollouts: Rollouts, args: Args) -> None:
    require(
        args.adv_clip == 0 or (args.kl == "reverse" and args.granularity in ("logit", "token")),
        "--adv_clip bounds the advantages of --kl reverse with --granularity logit or token: give "
        "both, or leave out --adv_clip",
    )
    require(
        args.kl == "reverse" or args.granularity in ("logit", "token"),
        f"--granularity {args.granularity} needs the reverse KL: add --kl reverse",
    )
    require(
        args.top_k == 0 or args.granularity == "logit",
        f"--granularity {args.granularity} compares no {args.top_k} entries: leave out --top_k",
    )
    require(
        args.group_size > 1 or (args.context != "solution" and args.lam == 0),
        "--group_size 1: a response has no sibling whose solution the teacher could see, and no "
        "advantage; raise it, or take --context either with --lam 0",
    )
    if args.context != "feedback":
        chats = [teacher_chat(problem, "", None, args) for problem in rollouts.task.at_hand]
        why = " (the teacher reads a sibling's response before the student's)"
        rollouts.check_lengths(chats, responses=2, why=why)


# --------------------------------------------------------------------------------------------------
# 5. measurements
# --------------------------------------------------------------------------------------------------
KINDS = ("solution", "feedback", "none")  # what a teacher's prompt shows; a solution comes first


def diagnostics(stats: TokenStats, x: Inputs, micro: Micro, batch: Batch,
                tokenizer) -> dict[str, Tensor]:
    """Per-token metrics [T] (docs/metrics.md); the log takes their mean or maximum."""
    informed = x.has_context == 1
    reward = micro.per_token(batch.rewards)
    old_logp = stats.logp if x.old_logp is None else x.old_logp
    out = {
        "entropy": stats.entropy,
        "teacher/entropy": stats.teacher_entropy[informed],
        "kl": stats.kl[informed],
        "kl/right": stats.kl[informed & (reward == 1)],
        "kl/wrong": stats.kl[informed & (reward < 1)],
        "advantage/mean_abs": (stats.teacher_logp - stats.logp)[informed].abs(),
    }
    out |= kl_by_place(stats.kl, micro, tokenizer, informed)
    return out | mismatch(old_logp, x.sampler_logp)


if __name__ == "__main__":
    main(parse(Args, presets))
