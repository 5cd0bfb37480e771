"""HSD: Hindsight Self-Distillation (arXiv 2606.15576), with OPSD (2601.18734) and the GRPO hybrid.

For a question q with answer a*, sample a group of G responses o_i and judge them, R_i ∈ {0, 1}. The
teacher is the same model with the answer and a successful peer in its prompt; the student sees only
the question.

    S_i   = { j ≠ i : R_j = 1 }                                    successful peers, never itself
    c_i   = (a*, o_i⁺), o_i⁺ ~ Uniform(S_i);  c_i = a* if S_i = ∅                            Eq. 9
    J(θ)  = E[ 1/G Σ_i 1/|o_i| Σ_t L_i,t ] + Ω(θ),  Ω = β KL(π_θ ‖ π_0)    minimised  Eq. 10, §2.2
    L_i,t = KL( sg[π_θ(· | q, c_i, o_i,<t)] ‖ π_θ(· | q, o_i,<t) )    whole vocabulary      Eq. 13
    A_i,t = log π_θ(o_i,t | q, c_i, o_i,<t) − log π_θ(o_i,t | q, o_i,<t)      logged         Eq. 2
    τ_i   = the first token at which o_i leaves o_i⁺                           logged        Eq. 11
    f     = (1 − p)(1 − (1 − p)^(G−1)): failed rollouts that have a peer       logged        Eq. 12

There is no advantage, ratio or clip: GRPO only supplies groups and a verifier. All rollouts are
trained, successful ones too (each distils from another success). A group without success falls
back to the answer alone (OPSD), if the question has a textual answer.

    python hsd.py --demo                                    # embedded model, 3 minutes on a laptop
    torchrun --nproc_per_node=8 hsd.py --model Qwen/Qwen3-8B                 # the paper's settings
    torchrun --nproc_per_node=8 hsd.py --context solution --entry_clip 0.05 --teacher frozen \\
        --beta 0                                             # OPSD: full solution, per-entry clip
    torchrun --nproc_per_node=8 hsd.py --context answer --grpo_mix 0.5      # GRPO+OPSD baseline

The paper contradicts itself on the direction: the text says "reverse KL", Eq. 10 and 13 are
KL(teacher ‖ student), which the literature calls forward. The formula is the default; --kl reverse
is the other reading. The paper prints no prompt: the wording is ours, the fields and their order
(question, answer, peer) are the paper's. It does not say how Ω is estimated; we use k2.
Left out: one packed forward for both passes, the EMA refresh of π_0 after 2,000 steps.
Details: docs/hsd.md.
"""
from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from common import require
from common.microbatches import Micro, micro_batches
from common.policy import (
    ema_update, frozen_copy, load_policy, make_optimizer, mismatch, optimizer_step, score,
    warm_up,
)
from common.rollouts import Batch, Group, Rollouts, check_fits
from common.run import Run
from common.settings import Flat, Setup, parse
from common.tasks import Problem
from common.teacher import kl_by_place, teacher_answers
from kernels.head import Divergence, TokenStats


# --------------------------------------------------------------------------------------------------
# 1. settings
# --------------------------------------------------------------------------------------------------
@dataclass
class Args:
    """HSD. Defaults: §5.1, App. A.2 and A.3 of the paper, for Qwen3-8B."""

    model: str = "Qwen/Qwen3-8B"  # folder or hub id: student, teacher and reference
    task: str = "4*gsm8k+1*mbpp"  # see common/tasks; this is a mixture
    # the method
    context: Literal["peer", "answer", "solution"] = "peer"  # answer + peer (Eq. 9); one alone
    peer: Literal["uniform", "shortest", "low_ppl", "high_ppl"] = "uniform"  # which peer (Fig. 4d)
    kl: Literal["forward", "reverse", "jsd"] = "forward"  # forward: KL(teacher‖student), Eq. 13
    entry_clip: float = 0.0  # OPSD: bound on each entry's summand of --kl forward, nats; 0: off
    teacher: Literal["live", "frozen", "ema"] = "live"  # live: the student itself (the paper)
    teacher_rate: float = 0.05  # --teacher ema: rate per step
    train_on: Literal["all", "failed"] = "all"  # Eq. 10 trains all rollouts
    beta: float = 0.001  # β, weight of the KL to the start π_0; 0: no reference model
    grpo_mix: float = 0.0  # m in (1 − m) L − m ρ A (GRPO+OPSD: 0.5)
    group_size: int = 8  # G, responses per question
    # sampling
    batch_size: int = 128  # questions per step, over all processes
    max_tokens: int = 4096  # most tokens per response
    temperature: float = 1.0  # of sampling and of both sides of the KL
    top_p: float = 0.95  # nucleus of sampling; the KL is over the full softmax
    thinking: bool = False  # switch on the chat template's thinking mode, for both sides
    # optimisation
    steps: int = 1500  # each has its own rollouts
    lr: float = 1e-6  # AdamW (0.9, 0.95), constant after the warm-up
    warmup: int = 0  # steps of linear warm-up
    weight_decay: float = 0.0  # AdamW's
    max_norm: float = 1.0  # gradient clipping (not given in the paper)
    demo: bool = False  # the embedded model and task, small enough for a laptop: see DEMO

    setup: Flat[Setup] = field(default_factory=Setup)  # data, machine, log: common/settings.py


DEMO = dict(
    model="assets/chain", task="chain", group_size=8, batch_size=16, max_tokens=64, beta=0.0,
    lr=3e-4, steps=60, teacher="frozen",
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
CLOSING = "Now answer the original question."  # what works on which task: docs/teacher.md
LAYOUT = ("question", "answer", "solution", "closing")  # the paper's order of the fields


def choose_peer(group: Group, i: int, how: str, rng: random.Random) -> int | None:
    """o_i⁺ as an index into the group; None if S_i is empty (Eq. 9)."""
    S = [j for j, verdict in enumerate(group.verdicts) if j != i and verdict.reward == 1]
    if not S:
        return None
    if how == "uniform":
        return rng.choice(S)
    if how == "shortest":
        return min(S, key=lambda j: len(group.rollouts[j].response_ids))
    log_likelihood = [rollout.mean_logprob for rollout in group.rollouts]  # −log perplexity
    if how == "low_ppl":
        return max(S, key=lambda j: log_likelihood[j])
    return min(S, key=lambda j: log_likelihood[j])


def teacher_chat(problem: Problem, peer: str | None, args: Args) -> list[dict] | None:
    """The chat with c_i in it; None if there is nothing to show.

    >>> p = Problem("1", [{"role": "user", "content": "1+1?"}], answer="2")
    >>> teacher_chat(p, "1+1=2", Args())[0]["content"].split("\\n\\n")[1:3]
    ['The final answer is 2.', 'A solution that passed the check:\\n1+1=2']
    """
    blocks = {}
    if args.context != "solution" and problem.answer is not None:
        blocks["answer"] = ANSWER.format(answer=problem.answer)
    if args.context == "peer" and peer is not None:
        blocks["solution"] = SOLUTION.format(solution=peer)
    if args.context == "solution" and problem.solution is not None:
        blocks["solution"] = SOLUTION.format(solution=problem.solution)
    if not blocks:  # code without a textual answer and without a peer
        return None
    *system, user = problem.messages
    blocks |= {"question": user["content"], "closing": CLOSING}
    content = "\n\n".join(blocks[name] for name in LAYOUT if blocks.get(name))
    return [*system, {"role": "user", "content": content}]


def teacher_prompts(batch: Batch, rollouts: Rollouts, step: int, args: Args) -> tuple:
    """For every rollout: the teacher's prompt ids, whether it has a context [Q, G], and its peer.

    Without a context the prompt is the student's own. If a peer does not fit the model's context,
    the teacher sees the answer alone.
    """
    prompts, has_context, peers = [], [], []
    for group in batch.groups:
        rng = random.Random(f"{args.setup.seed}/{step}/{group.problem.id}")
        for i, rollout in enumerate(group.rollouts):
            j = None
            if args.context == "peer":
                j = choose_peer(group, i, args.peer, rng)
            ids = None
            if j is not None:
                peer = rollouts.as_text(group.rollouts[j].text)
                ids = rollouts.chat_ids(teacher_chat(group.problem, peer, args))
                if len(ids) + len(rollout.response_ids) > rollouts.context_length:
                    j = None
            if j is None:
                chat = teacher_chat(group.problem, None, args)
                ids = None if chat is None else rollouts.chat_ids(chat)
            has_context.append(ids is not None)
            prompts.append(ids or rollout.prompt_ids)
            peers.append(j)
    check_fits(prompts, batch, rollouts)
    return prompts, torch.tensor(has_context).view_as(batch.rewards), peers


# --------------------------------------------------------------------------------------------------
# 3. the loss
# --------------------------------------------------------------------------------------------------
class Inputs(NamedTuple):
    """What the loss needs to know about each response token, all [T]."""

    weight: Tensor  # 1/(G|o_i|) of Eq. 10, over the whole batch
    has_context: Tensor  # 1 if the teacher was shown anything, else 0
    advantage: Tensor  # GRPO's, for --grpo_mix
    sampler_logp: Tensor  # log π_sampler, for the log
    ref_logp: Tensor | None  # log π_0; None: no reference


def token_weights(lengths: Tensor, kept: Tensor) -> Tensor:
    """1/G 1/|o_i| of Eq. 10 as the weight of each token of a rollout, [Q, G].

    kept [Q, G]: False drops a rollout from the loss and from the mean. Counts are summed over all
    ranks, so the loss does not depend on how the batch is split.
    """
    count = kept.sum().double()
    dist.all_reduce(count)
    return kept / lengths / count.clamp(min=1)


def loss(stats: TokenStats, x: Inputs, args: Args) -> Tensor:
    """Each token's loss [T]; the sum over the batch is J (Eq. 10)."""
    per_token = x.has_context * stats.kl  # L_i,t, Eq. 13: see divergence()
    if args.grpo_mix > 0:
        ratio = (stats.logp - stats.logp.detach()).exp()  # one update per step: π_old = π_θ
        per_token = (1 - args.grpo_mix) * per_token - args.grpo_mix * ratio * x.advantage
    if x.ref_logp is not None:
        per_token = per_token + args.beta * k2(stats.logp, x.ref_logp)  # Ω, §2.2
    return x.weight * per_token


def divergence(args: Args) -> Divergence:
    """L_i,t between student p and teacher q, which kernels/head.py sums chunk by chunk.

    >>> from kernels.reference import divergence_of
    >>> p, q = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.5, 0.5]])  # student, teacher
    >>> eq_13 = (q * (q.log() - p.log())).sum(-1)
    >>> torch.allclose(divergence_of(divergence(Args()), p, q), eq_13)
    True
    """
    if args.kl == "forward":
        return Divergence("forward_kl", clip=args.entry_clip or None)
    if args.kl == "reverse":
        return Divergence("reverse_kl")
    return Divergence("jsd", beta=0.5)


def k2(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """½(log π_θ/π_0)², [T]: on samples of π_θ its gradient is that of KL(π_θ‖π_0)."""
    return 0.5 * (logp - ref_logp).square()


def advantages(rewards: Tensor) -> Tensor:
    """GRPO's A_i for rewards [Q, G], for --grpo_mix.

    >>> advantages(torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]]))
    tensor([[ 1.1547, -0.5774, -0.5774],
            [ 0.0000,  0.0000,  0.0000]])
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    deviation = rewards.std(1, keepdim=True)
    unequal = deviation > 1e-6  # not 0: rounding error must not count; False if G = 1
    return (centred / deviation).masked_fill(~unequal, 0.0)


def credit(stats: TokenStats) -> Tensor:
    """A_i,t, [T], nats: how much likelier hindsight makes each sampled token."""
    return (stats.teacher_logp - stats.logp).detach()  # Eq. 2


# --------------------------------------------------------------------------------------------------
# 4. the loop
# --------------------------------------------------------------------------------------------------
def main(args: Args) -> None:
    run = Run(args, __file__, fixed=("teacher",))
    rollouts = Rollouts(args, run)
    check(rollouts, args)
    if args.setup.dry_run:
        return run.dry_run(rollouts, copies=(args.teacher != "live") + (args.beta > 0))
    policy = load_policy(args.model, run.device, args.setup)
    teacher = policy if args.teacher == "live" else frozen_copy(policy, run.device)
    reference = frozen_copy(policy, run.device) if args.beta > 0 else None
    optimizer = make_optimizer(policy, args, betas=(0.9, 0.95))
    run.resume(policy, optimizer, rollouts, teacher, moving=args.teacher == "ema")

    for step in run.steps(args.steps):
        if step % args.setup.eval_every == 0:
            run.collect(rollouts.evaluate())

        # sample and judge
        batch = rollouts.sample(step)
        A = advantages(batch.rewards)

        # the teacher's prompts
        hinted, has_context, peers = teacher_prompts(batch, rollouts, step, args)
        if step == 0:
            run.collect(teacher_answers(rollouts, teacher, policy, batch, hinted, has_context))
        kept = has_context | (args.grpo_mix > 0)
        kept &= (batch.rewards < 1) | (args.train_on == "all")
        weight = token_weights(batch.lengths, kept)

        # score
        rollouts.sleep()
        ref_logp = score(reference, batch.prompts, batch.responses, args.setup, args.temperature)

        # update
        run.phase("update")
        credits: dict[int, Tensor] = {}  # rollout → A_i,t [|o_i|]
        for micro in micro_batches(hinted, batch.responses, kept, args.setup, run.device):
            seen = [teacher.read(micro)]
            inputs = Inputs(
                micro.per_token(weight), micro.per_token(has_context), micro.per_token(A),
                micro.concat(batch.sampler_logp), micro.concat(ref_logp),
            )
            student = micro.with_prompts(batch.prompts, batch.responses)
            total, stats = policy(
                student, partial(loss, args=args), inputs, seen, divergence=divergence(args),
                temperature=args.temperature,
            )
            total.backward()
            run.collect(diagnostics(stats, inputs, micro, batch, rollouts.tokenizer))
            credits |= micro.split(credit(stats))
        lr = args.lr * warm_up(step, args.warmup)
        run.collect(optimizer_step(policy, optimizer, lr, args.max_norm))
        if args.teacher == "ema":
            ema_update(teacher, policy, args.teacher_rate)
        teacher.reshard()  # to be read, its embeddings and head were gathered

        rollouts.sync(policy)
        run.collect(where_credit_is(batch, has_context, peers, credits))
        run.log(batch, hinted)
    run.finish(rollouts)


def check(rollouts: Rollouts, args: Args) -> None:
    require(
        args.entry_clip == 0 or args.kl == "forward",
        "--entry_clip bounds the entries of --kl forward: add it, or leave out --entry_clip",
    )
    require(
        args.group_size > 1 or (args.context != "peer" and args.grpo_mix == 0),
        "--group_size 1: a group of one has no peers and no advantages; raise it, or take "
        "--context answer with --grpo_mix 0",
    )
    chats = [teacher_chat(problem, None, args) for problem in rollouts.task.at_hand]
    require(
        args.context == "peer" or args.grpo_mix > 0 or any(chats) or not chats,
        f"--context {args.context}: no problem has one, so there is nothing to learn from; take "
        "another --context, or other data",
    )
    rollouts.check_lengths(chats, why=" (with the teacher's context)")


# --------------------------------------------------------------------------------------------------
# 5. measurements
# --------------------------------------------------------------------------------------------------
def diagnostics(stats: TokenStats, x: Inputs, micro: Micro, batch: Batch,
                tokenizer) -> dict[str, Tensor]:
    """Per-token metrics [T] (docs/metrics.md); the log takes their mean or maximum."""
    informed = x.has_context == 1
    reward = micro.per_token(batch.rewards)
    out = {
        "entropy": stats.entropy,
        "teacher/entropy": stats.teacher_entropy[informed],
        "kl": stats.kl[informed],
        "kl/right": stats.kl[informed & (reward == 1)],
        "kl/wrong": stats.kl[informed & (reward < 1)],
        "credit/mean_abs": credit(stats)[informed].abs(),
    }
    if x.ref_logp is not None:
        out["kl_ref"] = k2(stats.logp, x.ref_logp)
    out |= kl_by_place(stats.kl, micro, tokenizer, informed)
    return out | mismatch(stats.logp, x.sampler_logp)


def divergence_point(response: list[int], peer: list[int]) -> int | None:
    """τ of Eq. 11: the first position, from 0, at which the response leaves its peer, or None.

    >>> divergence_point([5, 6, 7], [5, 9, 7]), divergence_point([5, 6], [5, 6, 7])
    (1, None)
    """
    for t, (token, other) in enumerate(zip(response, peer)):
        if token != other:
            return t
    return None


def failed_with_peer(batch: Batch, peers: list[int | None]) -> Iterator[tuple[int, list[int]]]:
    """The rollouts that Eq. 12 counts, as (row of the batch, the peer's response ids)."""
    row = 0
    for group in batch.groups:
        for verdict in group.verdicts:
            if verdict.reward < 1 and peers[row] is not None:
                yield row, group.rollouts[peers[row]].response_ids
            row += 1


def coverage(p: Tensor, G: int) -> Tensor:
    """f(p, G), Eq. 12: the expected share of failed rollouts with a peer, at pass rates p [Q]."""
    return (1 - p) * (1 - (1 - p) ** (G - 1))


def where_credit_is(batch: Batch, has_context: Tensor, peers: list, credits: dict) -> dict:
    """|A_t| at, before and after τ in failed rollouts that have a peer (§5.3), and their share.

    peers: one index or None per rollout. credits: rollout → A_i,t [|o_i|], nats.
    """
    out = {"tau": [], "credit/at_tau": [], "credit/before_tau": [], "credit/after_tau": []}
    covered = torch.zeros(len(peers))
    for row, peer in failed_with_peer(batch, peers):
        covered[row] = 1.0
        tau = divergence_point(batch.responses[row], peer)
        if tau is None or row not in credits:
            continue
        size = credits[row].abs()
        out["tau"].append(tau)
        out["credit/at_tau"].append(size[tau].item())
        if tau > 0:
            out["credit/before_tau"].append(size[:tau].mean().item())
        if tau + 1 < len(size):
            out["credit/after_tau"].append(size[tau + 1 :].mean().item())
    pass_rate = (batch.rewards == 1).float().mean(1)
    return out | {
        "coverage": covered,
        "coverage/expected": coverage(pass_rate, batch.rewards.shape[1]),
        "context/peer": [j is not None for j in peers],
        "context/none": ~has_context,
    }


if __name__ == "__main__":
    main(parse(Args, presets))
