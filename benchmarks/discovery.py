"""Test-time self-distillation (SDPO §5): learn on one hard problem at a time until an attempt passes.

Two baselines get the same budget of attempts: best-of-k samples the initial policy again and again;
multi-turn samples it with the feedback on its last attempts in the prompt.

    python benchmarks/discovery.py --demo                     # the embedded model, two minutes
    python benchmarks/discovery.py --task livecodebench --kl reverse --top_k 20 --adv_clip 5 \\
        --teacher_rate 0.01 --group_size 16 --budget 2750 --seeds 5 --warmup 0 --lora_rank 32 \\
        --lr 1e-5                                             # Table 12, Sec. 5, with LoRA: one GPU

Takes the flags of sdpo.py, and its own, which come first. Writes discovery.json (the attempt that solved each
problem, by method and repetition; null: none within the budget) and discovery.png (discovery@k with
bootstrap 90 % intervals) into the run's folder. One process; an interrupted run begins again.
"""
from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import sdpo  # noqa: E402
from common import require  # noqa: E402
from common.microbatches import micro_batches  # noqa: E402
from common.policy import (  # noqa: E402
    ema_update,
    frozen_copy,
    load_policy,
    make_optimizer,
    optimizer_step,
    score,
    warm_up,
)
from common.rollouts import Batch, Group, Rollouts  # noqa: E402
from common.run import Run  # noqa: E402
from common.settings import Setup, parse  # noqa: E402
from common.tasks import Problem  # noqa: E402

WINDOW = 4  # most feedbacks in the multi-turn prompt, first in, first out
FIRST, ANSWERS, TURNS = 3, 5, 4  # random streams under the run's seed


@dataclass
class Args(sdpo.Args):
    """SDPO at test time: sdpo.py's settings, applied to one held-out problem after the other."""

    questions: int = 8  # held-out problems that the initial policy solves least often
    budget: int = 512  # attempts per problem
    seeds: int = 3  # repetitions of each problem


DEMO = sdpo.DEMO | dict(
    task="chain:14", group_size=16, batch_size=1, max_tokens=192, questions=4, seeds=1, budget=256,
    setup=Setup(checkpointing=False, sampler_rows=128, heldout=64),
)


def presets(args: Args) -> dict:
    if args.demo:
        return DEMO
    return {"batch_size": 1}


class Learner:
    """SDPO's policy, teacher and optimizer, which `reset` sets back to the start."""

    def __init__(self, args: Args, run: Run, rollouts: Rollouts):
        self.args, self.run, self.rollouts = args, run, rollouts
        self.policy = load_policy(args.model, run.device, args.setup)
        self.start = frozen_copy(self.policy, run.device)
        self.slow = self.policy
        if args.teacher != "live":
            self.slow = frozen_copy(self.policy, run.device)
        self.optimizer = make_optimizer(self.policy, args)
        rollouts.sync(self.policy)

    def reset(self) -> None:
        for model in {id(model): model for model in (self.policy, self.slow)}.values():
            ema_update(model, self.start, rate=1.0)
        self.optimizer.state.clear()
        self.rollouts.sync(self.policy)

    def learn(self, groups: list[Group], step: int) -> None:
        """One step of sdpo.py's loop on judged groups."""
        args, run, batch = self.args, self.run, Batch(groups)
        teachers, mix = sdpo.teacher_models(self.slow, self.policy, args)
        A = batch.rewards - batch.rewards.mean(1, keepdim=True)
        hinted, has_context, _ = sdpo.teacher_prompts(batch, self.rollouts, step, args)
        kept = has_context | (args.lam > 0)
        self.rollouts.sleep()
        run.phase("update")
        old_logp = None
        budget = args.setup.token_budget
        if args.minibatches > 1:
            old_logp = score(self.policy, batch.prompts, batch.responses, budget, args.temperature)
        for part in batch.minibatches(args.minibatches):
            weight = sdpo.token_weights(batch.lengths, kept & part, args)
            for micro in micro_batches(hinted, batch.responses, weight > 0, budget, run.device):
                seen = [teacher.read(micro) for teacher in teachers]
                inputs = sdpo.Inputs(
                    micro.per_token(weight), micro.per_token(has_context), micro.per_token(A),
                    micro.concat(batch.sampler_logp), micro.concat(old_logp), micro.rollout,
                )
                total, stats = self.policy(
                    micro.with_prompts(batch.prompts, batch.responses),
                    partial(sdpo.loss, args=args), inputs, seen, teacher_mix=mix,
                    divergence=sdpo.divergence(args), temperature=args.temperature,
                    per_response=args.granularity == "sequence",
                )
                total.backward()
                tokenizer = self.rollouts.tokenizer
                run.collect(sdpo.diagnostics(stats, inputs, micro, batch, tokenizer))
            lr = args.lr * warm_up(step, args.warmup)
            run.collect(optimizer_step(self.policy, self.optimizer, lr, args.max_norm))
        if args.teacher == "ema":
            ema_update(self.slow, self.policy, args.teacher_rate)
        self.rollouts.sync(self.policy)
        run.log(batch, hinted)
        run.step += 1


def main(args: Args) -> None:
    run = Run(args, "sdpo-test-time", updates=args.minibatches)
    check(args, run)
    rollouts = Rollouts(args, run)
    sdpo.check(rollouts, args)
    if args.setup.dry_run:
        return run.dry_run(rollouts, copies=1 + (args.teacher != "live"))
    run.tokenizer = rollouts.tokenizer
    learner = Learner(args, run, rollouts)
    trials = hardest(rollouts, args)
    rounds = args.budget // args.group_size
    found = {method: [None] * len(trials) for method in ("SDPO", "best-of-k", "multi-turn")}

    def keep() -> None:
        names = [problem.id for _, problem, _ in trials]
        result = {"budget": rounds * args.group_size, "problems": names, "solved_at": found}
        (run.folder / "discovery.json").write_text(json.dumps(result))

    for n, (i, problem, repetition) in enumerate(tqdm(trials, unit="trial", disable=None)):
        learner.reset()
        found["SDPO"][n] = solve(learner, problem, rounds, (repetition, i), args)
        keep()
    learner.reset()
    for n, (i, problem, repetition) in enumerate(trials):
        attempts = answer(rollouts, [problem] * rounds, (repetition, i), range(rounds), args)
        found["best-of-k"][n] = first_right(attempts)
        keep()
    multi_turn(rollouts, trials, rounds, found["multi-turn"], args)
    keep()
    budget = rounds * args.group_size
    draw_discovery(found, budget, run.folder / "discovery.png")
    for method, times in found.items():
        low, mean, high = discovery(times, budget)
        run.say(f"{method:10s} discovery@{budget} {mean:.2f} (90 %: {low:.2f} to {high:.2f})")
    run.collect(rollouts.evaluate())
    run.finish(rollouts)


def check(args: Args, run: Run) -> None:
    require(run.world == 1, "benchmarks/discovery.py runs in one process")
    require(not args.setup.resume, "a test-time run always begins at --model: leave out --resume")
    require(
        args.budget >= args.group_size,
        f"--budget {args.budget}: at least --group_size {args.group_size} attempts",
    )


def hardest(rollouts: Rollouts, args: Args) -> list[tuple[int, Problem, int]]:
    """(index, problem, repetition) of the held-out problems that the start solves least often."""
    problems = rollouts.task.heldout
    groups = rollouts.answer(problems, 32, FIRST, range(len(problems)))
    rates = [sum(verdict.reward for verdict in group.verdicts) for group in groups]
    order = sorted(range(len(problems)), key=lambda i: (rates[i], i))
    hard = order[: args.questions]
    return [(i, problems[i], repetition) for i in hard for repetition in range(args.seeds)]


def answer(rollouts: Rollouts, problems: list[Problem], place: tuple[int, int], keys: range,
           args: Args) -> list[Group]:
    """G attempts at each problem; `place` is (repetition, problem) and names the random stream."""
    repetition, i = place
    stream = ANSWERS + 100 * (repetition + 1000 * i)
    return rollouts.answer(problems, args.group_size, stream, keys)


def solve(learner: Learner, problem: Problem, rounds: int, place: tuple[int, int],
          args: Args) -> int | None:
    """Attempt, learn, attempt …: the attempt that passed, from 1; None if none did."""
    tried: list[Group] = []
    while len(tried) < rounds and first_right(tried) is None:
        if tried:
            learner.learn(tried[-1:], len(tried) - 1)
        done = len(tried)
        tried += answer(learner.rollouts, [problem], place, range(done, done + 1), args)
    return first_right(tried)


def multi_turn(rollouts: Rollouts, trials: list, rounds: int, found: list[int | None],
               args: Args) -> None:
    """G attempts per turn at every open trial, shown the last feedbacks (not the attempts)."""
    said: list[list[str]] = [[] for _ in trials]
    only_feedback = replace(args, context="feedback")
    for turn in range(rounds):
        still_open = [n for n in range(len(trials)) if found[n] is None]
        problems = []
        for n in still_open:
            problem = trials[n][1]
            feedback = rollouts.as_text("\n".join(said[n][-WINDOW:]))
            chat = sdpo.teacher_chat(problem, None, feedback, only_feedback)
            problems.append(replace(problem, messages=chat or problem.messages))
        keys = range(len(problems))
        groups = rollouts.answer(problems, args.group_size, TURNS + 100 * turn, keys)
        for n, group in zip(still_open, groups):
            right = first_right([group])
            if right is not None:
                found[n] = turn * args.group_size + right
            for verdict in group.verdicts:
                if verdict.feedback not in said[n][-WINDOW:]:
                    said[n].append(verdict.feedback)


def first_right(groups: list[Group]) -> int | None:
    """The first attempt of the groups that passed, from 1; None if none did."""
    attempt = 0
    for group in groups:
        for verdict in group.verdicts:
            attempt += 1
            if verdict.reward == 1:
                return attempt
    return None


def discovery(times: list[int | None], k: int, draws: int = 2000) -> tuple[float, float, float]:
    """discovery@k = P(an attempt up to the k-th passes) within a bootstrap 90 % interval over trials.

    With several repetitions of a problem the interval is too narrow, because they are alike.

    >>> discovery([1, 3, None, 9], k=4)[1]
    0.5
    """
    hits = torch.tensor([float(t is not None and t <= k) for t in times])
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(hits), (draws, len(hits)), generator=generator)
    low, high = hits[picks].mean(1).quantile(torch.tensor([0.05, 0.95])).tolist()
    return low, hits.mean().item(), high


def draw_discovery(found: dict[str, list[int | None]], budget: int, path: Path) -> None:
    from matplotlib.figure import Figure  # not pyplot, which looks for a display

    ks = {budget}
    k = 1.0
    while k <= budget:
        ks.add(int(k))
        k *= 2**0.25
    ks = sorted(ks)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for method, times in found.items():
        low, mean, high = zip(*(discovery(times, k) for k in ks))
        (line,) = axis.plot(ks, mean, label=method)
        axis.fill_between(ks, low, high, alpha=0.15, color=line.get_color())
    axis.set(xscale="log", xlabel="attempts k", ylabel="discovery@k", ylim=(0, 1))
    axis.set_title("test-time self-distillation")
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(parse(Args, presets))
