"""SD-Zero: Self-Distillation Zero (arXiv 2604.12002). A model learns from revising its own answers.

Phase 1, Self-Revision Training (SRT). The model answers a question x with y_init; a verifier says
r ∈ {0, 1}; a control phrase P_r is appended in the same assistant turn and the model continues with
y_rev. Traces whose y_rev is right are kept:

    L_revision   = −Σ_t log π_θ(y_rev,t | x, y_init, P_r, y_rev,<t)                          Eq. 1
    L_generation = −Σ_t log π_θ(y'_t | x, y'_<t),   y' = [y_init, P_r, y_rev]                Eq. 2
    L_SRT        = L_revision + L_generation   : one forward, token weights 1, 1 and 2       Eq. 3

Phase 2, self-distillation. The teacher is the reviser, frozen at θ_SRT: it has read the whole
response y and P_r and scores y once more. The student is the generator that wrote y:

    L_SD(θ) = E_{y ~ π_θ(·|x)} Σ_t KL( π_θ(· | x, y_<t) ‖ sg[π_SRT(· | x, y, P_r, y_<t)] )   Eq. 4

Only the verifier's bit enters: no reference solution, no reward in a loss. With --rounds 2 the
teacher is synced (θ_SRT := θ) between passes over phase 2's questions (§3.4).

    python sdzero.py --demo                              # both phases, 2 minutes on a laptop
    torchrun --nproc_per_node=4 sdzero.py                # both phases, the paper's tables
    torchrun --nproc_per_node=4 sdzero.py --phase srt    # phase 1 alone; its checkpoint feeds
    torchrun --nproc_per_node=4 sdzero.py --phase sd --model runs/NAME/checkpoints/step_N
    torchrun --nproc_per_node=4 sdzero.py --phase srt --baseline rft   # rejection sampling, or sft

Paper and released code disagree on most settings. The defaults are the paper's; the released
choices are flags: --kl mixed --top_k 64 (the teacher's K, renormalised), --mean token,
--srt_temperature 1.0 --srt_top_p 0.9. The end token of the first copy of y is stripped; that of the
second is trained. Left out: the two sequential SFT stages on disjoint traces, the clean-up of
openings and repeated tails. benchmarks/revision.py makes the paper's tables and figures of a run.
Details: docs/sdzero.md.
"""
from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from common import require
from common.chat import turn_end
from common.microbatches import Micro, micro_batches
from common.policy import (
    Policy, ema_update, frozen_copy, load_policy, make_optimizer, mismatch, optimizer_step,
    warm_up,
)
from common.rollouts import Batch, Rollouts, check_fits, heldout_metrics
from common.run import Run
from common.settings import FIXED, Flat, Setup, flat, parse, same
from common.sampler import Rollout
from common.tasks import Problem, first_different, take
from common.teacher import kl_by_place
from kernels.head import Divergence, TokenStats


# --------------------------------------------------------------------------------------------------
# 1. settings
# --------------------------------------------------------------------------------------------------
@dataclass
class Args:
    """SD-Zero. Defaults: the paper's tables for Qwen3-4B-Instruct, but the KL is Eq. 4's, over the
    whole vocabulary. When text and tables differ, the tables win."""

    model: str = "Qwen/Qwen3-4B-Instruct-2507"  # folder or hub id
    task: str = "hf:open-r1/OpenR1-Math-220k"  # see common/tasks; a mixture is 4*gsm8k+1*mbpp
    phase: Literal["both", "srt", "sd"] = "both"  # one phase alone; sd starts from --model
    baseline: Literal["", "rft", "sft"] = ""  # phase 1 on all right answers, or given solutions
    # phase 1: self-revision training
    srt_questions: int = 10000  # N1, questions of phase 1; phase 2 never sees them
    inits: int = 1  # y_init per question
    revisions: int = 3  # y_rev per y_init, right or wrong
    kept_traces: int = 6000  # most traces in D_REVISION
    wrong_share: float | None = None  # share of traces whose y_init was wrong; None: keep all
    per_question: int = 3  # most traces of one question (not given in the paper)
    srt_temperature: float = 0.7  # of sampling y_init and y_rev (released: 1.0)
    srt_top_p: float = 1.0  # nucleus of that sampling (released: 0.9)
    srt_max_tokens: int = 16384  # most tokens of y_init and of y_rev
    traces: str = ""  # a traces.jsonl of an earlier run instead of collecting
    terms: Literal["both", "generation", "revision"] = "both"  # terms of Eq. 3 (Table 11)
    srt_epochs: int = 3  # passes over the traces (Table 4; Table 3 says 1)
    srt_batch: int = 4  # traces per update, over all processes
    srt_lr: float = 5e-6  # peak learning rate, cosine to 0 after the warm-up
    srt_warmup: float = 0.05  # share of phase 1's updates that warm up
    srt_weight_decay: float = 1e-4  # AdamW's (betas 0.9, 0.95)
    # phase 2: self-distillation
    sd_questions: int = 9000  # N2, questions of phase 2
    rounds: int = 1  # passes over them; the teacher is synced between passes
    kl: Literal["reverse", "forward", "mixed"] = "reverse"  # reverse: Eq. 4; mixed: released
    top_k: int = 0  # the teacher's K likeliest entries, renormalised (released: 64); 0: all
    mean: Literal["sum", "token"] = "sum"  # both phases: sum over tokens (printed), or their mean
    batch_size: int = 128  # questions per step, over all processes; one response each
    max_tokens: int = 8192  # most tokens per response
    temperature: float = 1.0  # of sampling and of both sides of the KL
    top_p: float = 1.0  # nucleus of sampling
    thinking: bool = False  # switch on the chat template's thinking mode, for both sides
    lr: float = 5e-6  # AdamW, constant after the warm-up
    warmup: int = 20  # steps of linear warm-up
    weight_decay: float = 0.01  # AdamW's (betas 0.9, 0.999: released)
    max_norm: float = 1.0  # gradient clipping, both phases (the paper gives it for phase 2)
    demo: bool = False  # the embedded model and task, small enough for a laptop: see DEMO

    setup: Flat[Setup] = field(default_factory=lambda: Setup(heldout=500))  # data, machine, log


DEMO = dict(
    model="assets/chain", task="chain", srt_questions=1024, kept_traces=1500, wrong_share=0.5,
    srt_max_tokens=64, srt_temperature=1.0, srt_batch=32, srt_lr=3e-4, srt_epochs=1,
    sd_questions=2560, batch_size=64, max_tokens=192, lr=1e-4, warmup=5, mean="token",
    setup=Setup(
        checkpointing=False, sampler_rows=128, heldout=256, eval_every=16, save_every=64,
    ),
)
BASELINES = {
    "": {},
    "rft": dict(inits=4, per_question=4, kept_traces=10**9),
    "sft": dict(kept_traces=10**9),
}


STAGES = (  # they decide which step uses which traces or questions: a resume must not change them
    "traces", "srt_questions", "kept_traces", "wrong_share", "per_question", "srt_epochs",
    "srt_batch", "sd_questions", "batch_size",
    "srt_weight_decay",  # comes back with the optimizer's state
)


def presets(args: Args) -> dict:
    """Defaults that depend on --demo and --baseline; what is typed wins."""
    if args.demo:
        return DEMO | BASELINES[args.baseline]
    return BASELINES[args.baseline]


# --------------------------------------------------------------------------------------------------
# 2. the reviser's context
# --------------------------------------------------------------------------------------------------
CONTROL = {  # P_r
    0: "Wait, this response is not correct, let me start over.",
    1: "Let me rephrase the above solution.",
}
RESTARTS = (  # what begins another attempt in a response; the verifier judges the last attempt
    *CONTROL.values(),
    "Wait, this is wrong. Let me start over.",
    "Wait, this response is wrong. Let me correct it.",
    "Wrong. I need to redo all.",
)


def control_ids(tokenizer, r: int) -> list[int]:
    """P_r inside the assistant's turn, between blank lines, as token ids."""
    return tokenizer.encode(f"\n\n{CONTROL[r]}\n\n", add_special_tokens=False)


def without_end(response: list[int], ends: Sequence[int]) -> list[int]:
    """The response without its end token, so that the turn can continue."""
    if response[-1] in ends:
        return response[:-1]
    return response


def reviser_prompt(rollout: Rollout, r: int, rollouts: Rollouts) -> list[int]:
    """x, y, P_r: precedes y_rev in phase 1 and the second copy of y in phase 2."""
    y = without_end(rollout.response_ids, rollouts.ends)
    return [*rollout.prompt_ids, *y, *control_ids(rollouts.tokenizer, r)]


def teacher_prompts(batch: Batch, rollouts: Rollouts) -> list[list[int]]:
    """The reviser's prompt for every rollout of the batch, as token ids."""
    prompts = []
    for rollout, reward in zip(batch.rollouts, batch.rewards.flatten().tolist()):
        prompts.append(reviser_prompt(rollout, int(reward == 1), rollouts))
    check_fits(prompts, batch, rollouts)
    return prompts


# --------------------------------------------------------------------------------------------------
# 3. traces
# --------------------------------------------------------------------------------------------------
class Trace(NamedTuple):
    """One line of traces.jsonl: token ids, the verdicts, and the text."""

    id: str
    r: int  # verdict on y_init
    right: bool  # y_rev (for rft: the response) is right and not truncated
    prompt_ids: list[int]
    init_ids: list[int]  # y_init without its end token; empty in the baselines
    control_ids: list[int]  # P_r; empty in the baselines
    revised_ids: list[int]  # y_rev, end token included
    text: str


COLLECT_BATCH = 256  # questions at a time; an interrupted collection resumes after the last batch
COLLECTED = (  # the traces depend on these settings: a resumed collection must not change them
    *FIXED, "baseline", "srt_questions", "inits", "revisions", "srt_temperature", "srt_top_p",
    "srt_max_tokens",
)


def collect(problems: list[Problem], path: Path, rollouts: Rollouts, run: Run, args: Args) -> None:
    """Sample the traces of `problems` and append them to `path`, batch by batch.

    Batches that the file already holds are not sampled again.
    """
    starts = range(0, len(problems), COLLECT_BATCH)
    _, done, size = read_traces(path)
    settings = [flat(args)[name] for name in COLLECTED]
    require(
        all(all(map(same, COLLECTED, batch["settings"], settings)) for batch in done),
        f"{path} was begun with other settings of the model, the data, the seed or phase 1's "
        "sampling (they are in its lines): go on with those, or give another --name",
    )
    if run.rank == 0 and path.exists():
        os.truncate(path, size)  # drop what an interrupted batch left behind
    require(
        run.first_step == 0 or len(done) == len(starts),
        f"{path} does not hold all the traces that the checkpoint was trained on: copy that run's "
        "traces.jsonl to this place, or continue under that run's --name",
    )
    order = {problem.id: i for i, problem in enumerate(problems)}
    for start in starts[len(done) :]:
        end = min(start + COLLECT_BATCH, len(problems))
        keys = range(start + run.rank, end, run.world)
        mine = collect_batch([problems[i] for i in keys], keys, rollouts, args)
        parts = [None] * run.world
        dist.all_gather_object(parts, mine)
        if run.rank == 0:
            found = [trace for traces, _ in parts for trace in traces]
            found.sort(key=lambda trace: order[trace.id])  # the same file for any number of ranks
            lengths = [length for _, spent in parts for length in spent]
            rows = [trace._asdict() for trace in found]
            rows.append({
                "batch": start, "generations": len(lengths), "sampled_tokens": sum(lengths),
                "settings": settings,
            })
            with open(path, "a") as f:
                f.writelines(json.dumps(row) + "\n" for row in rows)
            run.say(f"traces: {end} of {len(problems)} questions")
    dist.barrier()


def collect_batch(problems: list[Problem], keys: range, rollouts: Rollouts,
                  args: Args) -> tuple[list, list]:
    """The traces of some questions, and the length in tokens of every response sampled for them."""
    if args.baseline == "sft":
        return [given_solution(problem, rollouts) for problem in problems], []
    sampling = {
        "max_tokens": args.srt_max_tokens, "temperature": args.srt_temperature,
        "top_p": args.srt_top_p,
    }
    groups = rollouts.answer(problems, args.inits, FIRST, keys, "collect", **sampling)
    inits, names = [], []
    for group, key in zip(groups, keys):
        for k, (rollout, verdict) in enumerate(zip(group.rollouts, group.verdicts)):
            inits.append((group.problem, rollout, int(verdict.reward == 1)))
            names.append(key * args.inits + k)
    spent = [len(rollout.response_ids) for _, rollout, _ in inits]
    traces = []
    if args.baseline == "rft":
        for problem, o, r in inits:
            right = r == 1 and not o.truncated
            traces.append(
                Trace(problem.id, r, right, o.prompt_ids, [], [], o.response_ids, o.text)
            )
        return traces, spent
    prompts = [reviser_prompt(rollout, r, rollouts) for _, rollout, r in inits]
    revised = rollouts.answer(
        [problem for problem, _, _ in inits], args.revisions, REVISION, names, "collect",
        prompts=prompts, **sampling,
    )
    for (problem, init, r), group in zip(inits, revised):
        y = without_end(init.response_ids, rollouts.ends)
        control = control_ids(rollouts.tokenizer, r)
        for new, verdict in zip(group.rollouts, group.verdicts):
            right = verdict.reward == 1 and not new.truncated
            text = f"{init.text}\n\n{CONTROL[r]}\n\n{new.text}"
            traces.append(
                Trace(problem.id, r, right, init.prompt_ids, y, control, new.response_ids, text)
            )
            spent.append(len(new.response_ids))
    return traces, spent


FIRST, REVISION, ATTEMPT, EVALUATE_REVISION = 3, 4, 5, 2  # random streams under the run's seed


def given_solution(problem: Problem, rollouts: Rollouts) -> Trace:
    """--baseline sft: the data's own solution and the end of the turn."""
    require(
        problem.solution is not None,
        f"--baseline sft: problem {problem.id} has no solution to train on",
    )
    ids = rollouts.tokenizer.encode(problem.solution, add_special_tokens=False)
    prompt = rollouts.chat_ids(problem.messages)
    ids.append(turn_end(rollouts.tokenizer, rollouts.ends))
    return Trace(problem.id, 1, True, prompt, [], [], ids, problem.solution)


def read_traces(path: Path) -> tuple[list[Trace], list[dict], int]:
    """The traces of the complete batches in a file, their closing lines, and the bytes read."""
    traces, batches, pending = [], [], []
    size = position = 0
    if not path.is_file():
        return traces, batches, size
    for line in path.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n"):  # killed in the middle of a line
            break
        position += len(line)
        row = json.loads(line)
        if "batch" in row:
            traces += pending
            batches.append(row)
            pending, size = [], position
        else:
            pending.append(Trace(**row))
    return traces, batches, size


def select(traces: list[Trace], args: Args) -> list[Trace]:
    """D_REVISION: traces whose revision is right, without repetitions, in the questions' order.

    At most --per_question per question and --kept_traces in all. With --wrong_share, that share of
    them has a wrong y_init. If there are too few of these, traces with a right y_init are dropped
    to keep the share; if too few y_init were right, the share is larger. The paper filters by the
    verdict on y_rev alone.
    """
    right = []
    count: dict[str, int] = {}
    seen: set[tuple] = set()
    for trace in traces:
        key = (trace.id, tuple(trace.init_ids), tuple(trace.revised_ids))
        if not trace.right or key in seen or count.get(trace.id, 0) >= args.per_question:
            continue
        seen.add(key)
        count[trace.id] = count.get(trace.id, 0) + 1
        right.append(trace)
    share = args.wrong_share
    if args.baseline or share is None:
        return right[: args.kept_traces]
    corrected = [trace for trace in right if trace.r == 0]
    rephrased = [trace for trace in right if trace.r == 1]
    wrong = min(len(corrected), round(args.kept_traces * share))
    room = args.kept_traces - wrong
    if share > 0:
        room = min(room, round(wrong * (1 - share) / share))
    return corrected[:wrong] + rephrased[:room]


# --------------------------------------------------------------------------------------------------
# 4. the losses
# --------------------------------------------------------------------------------------------------
class Inputs(NamedTuple):
    """What the losses need to know about each response token, [T]."""

    weight: Tensor  # the token's share in the batch's mean; in phase 1 times its weight in Eq. 3


def trace_weights(trace: Trace, terms: str) -> list[float]:
    """Eq. 1 to 3 as the weight of each token of [y_init, P_r, y_rev].

    L_generation counts all tokens, L_revision those of y_rev. An end token belongs to its part.
    """
    generation = 0.0 if terms == "revision" else 1.0
    revision = 0.0 if terms == "generation" else 1.0
    before = len(trace.init_ids) + len(trace.control_ids)
    if before == 0:  # a baseline has one term
        return [1.0] * len(trace.revised_ids)
    return [generation] * before + [generation + revision] * len(trace.revised_ids)


def srt_loss(stats: TokenStats, x: Inputs) -> Tensor:
    """Each token's loss [T]; the sum over the batch is L_SRT (Eq. 3)."""
    return -x.weight * stats.logp


def loss(stats: TokenStats, x: Inputs) -> Tensor:
    """Each token's loss [T]; the sum over the batch is L_SD (Eq. 4)."""
    return x.weight * stats.kl  # see divergence()


def divergence(args: Args) -> Divergence:
    """Eq. 4 between student p and teacher q, which kernels/head.py sums chunk by chunk.

    >>> from kernels.reference import divergence_of
    >>> p, q = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.5, 0.5]])  # student, teacher
    >>> eq_4 = (p * (p.log() - q.log())).sum(-1)
    >>> torch.allclose(divergence_of(divergence(Args()), p, q), eq_4)
    True
    """
    settings = {"top_k": args.top_k, "support": "teacher", "tail": False}
    if args.kl == "forward":
        return Divergence("forward_kl", **settings)
    if args.kl == "mixed":
        return Divergence("mixed_kl", beta=0.5, **settings)  # ½ of each direction
    return Divergence("reverse_kl", **settings)


def token_share(lengths: list[int], mean: str) -> float:
    """The weight of each token in the batch's mean: 1/responses as printed, or 1/tokens.

    Counted over all ranks, so the loss does not depend on how the batch is split.
    """
    count = sum(lengths) if mean == "token" else len(lengths)
    total = torch.tensor(count, dtype=torch.float64)
    dist.all_reduce(total)
    return 1.0 / max(1.0, total.item())


# --------------------------------------------------------------------------------------------------
# 5. the loop
# --------------------------------------------------------------------------------------------------
def main(args: Args) -> None:
    run = Run(args, f"sdzero-{args.baseline or args.phase}", fixed=STAGES)
    check(args, run.world)
    rollouts = Rollouts(args, run, RESTARTS)
    srt_problems, sd_problems = split_questions(rollouts.task.train, args)
    check_lengths(srt_problems, sd_problems, rollouts, args)
    if args.setup.dry_run:
        return run.dry_run(rollouts, copies=1)
    policy = load_policy(args.model, run.device, args.setup)
    teacher = frozen_copy(policy, run.device)  # becomes θ_SRT when phase 2 begins
    optimizer = make_optimizer(
        policy, args, betas=(0.9, 0.95), weight_decay=args.srt_weight_decay
    )
    run.resume(policy, optimizer, rollouts, teacher=teacher)

    traces = []
    if args.phase != "sd" and not args.setup.eval_only:
        path = Path(args.traces or run.folder / "traces.jsonl")
        if not args.traces:
            collect(srt_problems, path, rollouts, run, args)
        traces = load_traces(path, [*sd_problems, *rollouts.task.heldout], run, args)
    updates = math.ceil(len(traces) * args.srt_epochs / args.srt_batch)
    last = updates
    if args.phase != "srt":
        last += args.rounds * (len(sd_problems) // args.batch_size)
    require(
        run.first_step <= last,
        f"{run.first_step} steps are done, and the settings ask for {last}: ask for more, or "
        "evaluate the checkpoint as --model with --eval_only",
    )
    train_reviser(run, rollouts, policy, optimizer, traces, updates, args)

    if run.first_step <= updates:  # phase 2 begins: not resumed within phase 2
        optimizer = make_optimizer(policy, args, betas=(0.9, 0.999))
        run.optimizer = optimizer  # what checkpoints hold from here on
    if args.phase != "srt":
        distil(run, rollouts, policy, teacher, optimizer, sd_problems, updates, args)
    if not run.stopping:
        run.collect(evaluate(rollouts, policy, args))
    run.finish(rollouts)


def train_reviser(run: Run, rollouts: Rollouts, policy: Policy, optimizer, traces: list[Trace],
                  updates: int, args: Args) -> None:
    """Phase 1: supervised training on the traces (Eq. 3)."""
    eval_every = max(args.setup.eval_every, updates // 10)  # many small updates
    share = args.srt_batch // run.world
    for step in run.steps(0, updates):
        if step % eval_every == 0:
            run.collect(evaluate(rollouts, policy, args))
        batch = take(traces, args.setup.seed, (step * run.world + run.rank) * share, share)
        prompts = [trace.prompt_ids for trace in batch]
        responses = [trace.init_ids + trace.control_ids + trace.revised_ids for trace in batch]
        weights = [trace_weights(trace, args.terms) for trace in batch]
        trained = [sum(weight > 0 for weight in row) for row in weights]
        per_token = token_share(trained, args.mean)

        rollouts.sleep()
        run.phase("update")
        L_SRT = 0.0  # this rank's part
        for micro in micro_batches(prompts, responses, None, args.setup, run.device):
            inputs = Inputs(per_token * micro.concat(weights))
            total, _ = policy(micro, srt_loss, inputs)
            total.backward()
            L_SRT += total.item()
        lr = srt_lr(step, updates, args)
        run.collect(optimizer_step(policy, optimizer, lr, args.max_norm))
        # a token counts once per term of Eq. 3, as in App. C.2; the log averages over ranks
        run.collect({
            "phase": [1], "srt/loss": [L_SRT * run.world],
            "budget/loss_tokens": [sum(map(sum, weights)) * run.world],
        })
        run.log()
    rollouts.sync(policy)


def distil(run: Run, rollouts: Rollouts, policy: Policy, teacher: Policy, optimizer,
           problems: list[Problem], updates: int, args: Args) -> None:
    """Phase 2: on-policy distillation from the reviser (Eq. 4)."""
    steps_per_round = len(problems) // args.batch_size
    share = args.batch_size // run.world
    for step in run.steps(updates, updates + args.rounds * steps_per_round):
        this_round, position = divmod(step - updates, steps_per_round)
        if position == 0:
            ema_update(teacher, policy, rate=1.0)  # θ_SRT; in later rounds §3.4's sync
        if step % args.setup.eval_every == 0 or step == updates:
            run.collect(evaluate(rollouts, policy, args))

        # sample and judge
        start = this_round * len(problems) + position * args.batch_size + run.rank * share
        mine = take(problems, args.setup.seed, start, share)
        batch = Batch(rollouts.answer(mine, 1, ATTEMPT, range(start, start + share)))
        revising = teacher_prompts(batch, rollouts)
        per_token = token_share(list(map(len, batch.responses)), args.mean)

        # update
        rollouts.sleep()
        run.phase("update")
        for micro in micro_batches(revising, batch.responses, None, args.setup, run.device):
            seen = [teacher.read(micro)]
            inputs = Inputs(torch.full_like(micro.targets, per_token, dtype=torch.float32))
            total, stats = policy(
                micro.with_prompts(batch.prompts, batch.responses), loss, inputs, seen,
                divergence=divergence(args), temperature=args.temperature,
            )
            total.backward()
            run.collect(diagnostics(stats, micro, batch, rollouts.tokenizer))
        lr = args.lr * warm_up(step - updates, args.warmup)
        run.collect(optimizer_step(policy, optimizer, lr, args.max_norm))
        teacher.reshard()  # to be read, its embeddings and head were gathered

        rollouts.sync(policy)
        # what the step costs over all ranks, as in App. C.2; the log averages over ranks
        tokens = batch.lengths.sum().item() * run.world
        run.collect({
            "phase": [2],
            "budget/generations": [args.batch_size],
            "budget/sampled_tokens": [tokens],
            "budget/loss_tokens": [2 * tokens],  # student and teacher
        })
        run.log(batch, revising)


def check(args: Args, world: int) -> None:
    require(
        not args.baseline or (args.phase == "srt" and not args.traces),
        f"--baseline {args.baseline} replaces phase 1 and its traces: add --phase srt, leave out "
        "--traces",
    )
    require(
        not args.traces or Path(args.traces).is_file(), f"--traces {args.traces}: no such file"
    )
    require(
        args.phase == "sd" or args.srt_batch % world == 0,
        f"--srt_batch {args.srt_batch} does not divide into {world} process(es)",
    )
    require(
        args.wrong_share is None or 0 <= args.wrong_share <= 1,
        f"--wrong_share {args.wrong_share} must lie between 0 and 1",
    )
    require(
        args.phase == "srt" or args.batch_size <= args.sd_questions,
        f"--batch_size {args.batch_size} is more than --sd_questions {args.sd_questions}",
    )


def split_questions(train: list[Problem], args: Args) -> tuple[list, list]:
    """The questions of phase 1 and of phase 2: disjoint, also when each phase runs alone."""
    wanted = args.srt_questions
    if args.phase != "srt":
        wanted += args.sd_questions
    ordered = first_different(train, wanted)  # a mixture repeats its smaller parts
    require(
        wanted <= len(ordered),
        f"the phases take {wanted:,} different questions and there are {len(ordered):,}: lower "
        "--srt_questions or --sd_questions",
    )
    return ordered[: args.srt_questions], ordered[args.srt_questions : wanted]


def check_lengths(srt_problems: list[Problem], sd_problems: list[Problem], rollouts: Rollouts,
                  args: Args) -> None:
    """Check that prompts and responses fit the model's context. A response that is revised or
    taught is read a second time."""
    why = " (a response that is revised or taught is read twice)"
    control = [{"role": "assistant", "content": CONTROL[0]}]  # P_r adds about as many tokens
    if args.phase != "sd" and not args.traces and args.baseline != "sft":
        responses = 1 if args.baseline == "rft" else 2
        chats = [problem.messages + control for problem in srt_problems]
        rollouts.check_lengths(chats, responses, "srt_max_tokens", why)
        rollouts.sampled = rollouts.longest  # a revision is sampled behind its first attempt
    if args.phase != "srt":
        rollouts.check_lengths([problem.messages + control for problem in sd_problems], 2, why=why)


def load_traces(path: Path, reserved: list[Problem], run: Run, args: Args) -> list[Trace]:
    """The traces of a file that are trained on. Exits if none is left."""
    found, _, _ = read_traces(path)
    shared = {trace.id for trace in found} & {problem.id for problem in reserved}
    require(
        not shared,
        f"--traces {path}: {len(shared)} of its questions are held out or phase 2's; give the "
        "--heldout and --srt_questions that it was collected with",
    )
    kept = select(found, args)
    wrong = sum(trace.r == 0 for trace in kept)
    run.say(f"kept {len(kept)} of {len(found)} traces; y_init was wrong in {wrong}")
    right = sum(trace.right for trace in found)
    require(
        kept,
        f"no trace is left to train on: {right} of {len(found)} end right; raise --revisions, "
        "--srt_questions or --srt_max_tokens, take --wrong_share None, or easier problems",
    )
    return kept


def srt_lr(update: int, updates: int, args: Args) -> float:
    """Linear warm-up over the first --srt_warmup of the updates, then a half cosine to 0."""
    warm = max(1, round(args.srt_warmup * updates))
    if update < warm:
        return args.srt_lr * (update + 1) / warm
    progress = (update - warm) / max(1, updates - warm)
    return args.srt_lr * 0.5 * (1 + math.cos(math.pi * progress))


# --------------------------------------------------------------------------------------------------
# 6. measurements
# --------------------------------------------------------------------------------------------------
def evaluate(rollouts: Rollouts, policy: Policy, args: Args) -> dict:
    """pass@1 of held-out first attempts, and of one revision per problem if it fits the context."""
    rollouts.sync(policy)
    keys, groups = rollouts.heldout_groups()
    fits = []
    for key, group in zip(keys, groups):
        r = int(group.verdicts[0].reward == 1)
        prompt = reviser_prompt(group.rollouts[0], r, rollouts)
        if len(prompt) + args.max_tokens <= rollouts.sampler.context:
            fits.append((key, group.problem, prompt, r))
    revised = rollouts.answer(
        [problem for _, problem, _, _ in fits], 1, EVALUATE_REVISION,
        [key for key, _, _, _ in fits], "evaluate", prompts=[prompt for _, _, prompt, _ in fits],
    )
    corrected, kept = [], []
    for (_, _, _, r), group in zip(fits, revised):
        reward = group.verdicts[0].reward
        if r == 1:
            kept.append(reward)
        else:
            corrected.append(reward)
    return heldout_metrics(groups) | {
        "revise/pass@1": corrected + kept, "revise/corrected": corrected, "revise/kept": kept,
    }


def diagnostics(stats: TokenStats, micro: Micro, batch: Batch, tokenizer) -> dict[str, Tensor]:
    """Per-token metrics of phase 2, [T] (docs/metrics.md); the log takes their mean or maximum.

    teacher/copies: how often the teacher's argmax equals the token that it has already read in the
    first copy of y, which is what pure copying would give.
    """
    right = micro.per_token(batch.rewards) == 1
    out = {
        "entropy": stats.entropy,
        "teacher/entropy": stats.teacher_entropy,
        "kl": stats.kl,
        "kl/right": stats.kl[right],
        "kl/wrong": stats.kl[~right],
        "teacher/copies_right": stats.teacher_greedy[right],
        "teacher/copies_wrong": stats.teacher_greedy[~right],
    }
    out |= kl_by_place(stats.kl, micro, tokenizer)
    return out | mismatch(stats.logp, micro.concat(batch.sampler_logp))


if __name__ == "__main__":
    main(parse(Args, presets))
