"""Test-time self-distillation (SDPO §5): learn on one hard problem until an attempt passes.

Two baselines get the same budget of attempts: best-of-k samples the initial policy again and again;
multi-turn samples it once per turn, with the feedback on its earlier attempts in the prompt, the
oldest dropped when they no longer fit the context.

    python benchmarks/discovery.py --demo      # the embedded model, 24 problems: long
    python benchmarks/discovery.py --task livecodebench --kl reverse --top_k 20 --adv_clip 5 \\
        --teacher_rate 0.01 --group_size 16 --budget 2750 --seeds 5 --warmup 0 --lora_rank 32 \\
        --lr 1e-5                              # Table 12, Sec. 5, with LoRA: one GPU

Takes the flags of sdpo.py, and its own, which come first. The problems are held-out ones that the
initial policy solves seldom but not never. Writes into the run's folder: discovery.json (rates, and
the attempt that solved each trial, by method; null: none within the budget), discovery.png and
table.md (discovery@k, with bootstrap 90 % intervals over problems, and how many attempts each
method needs for what best-of-k reaches with all of them). One process; --resume auto goes on with
the trials that are not finished.
"""
from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
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

FIRST, ANSWERS, TURNS = 3, 5, 4  # random streams under the run's seed
METHODS = ("SDPO", "best-of-k", "multi-turn")


@dataclass
class Args(sdpo.Args):
    """SDPO at test time: sdpo.py's settings, applied to one held-out problem after the other."""

    questions: int = 24  # held-out problems that the initial policy solves seldom
    tries: int = 128  # attempts that estimate a problem's pass rate
    most: float = 0.03  # highest pass rate of a hard problem; one that was never solved is left out
    budget: int = 512  # attempts per trial
    seeds: int = 3  # trials of each problem


DEMO = sdpo.DEMO | dict(
    task="chain:14", group_size=16, batch_size=1, max_tokens=192, seeds=1, budget=512,
    setup=Setup(checkpointing=False, sampler_rows=128, heldout=192),
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
        if args.minibatches > 1:
            old_logp = score(
                self.policy, batch.prompts, batch.responses, args.setup, args.temperature
            )
        for part in batch.minibatches(args.minibatches):
            weight = sdpo.token_weights(batch.lengths, kept & part, args)
            for micro in micro_batches(hinted, batch.responses, weight > 0, args.setup, run.device):
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
    store = Store(run.folder / "discovery.json", args)
    if "problems" not in store.data:
        store.keep(problems=hard_problems(rollouts, args))
    trials = []
    for row in store.data["problems"]:
        problem = rollouts.task.heldout[row["index"]]
        trials += [(row["index"], problem, repetition) for repetition in range(args.seeds)]
    rounds = args.budget // args.group_size

    found = store.data["solved_at"]
    left = range(len(found["SDPO"]), len(trials))
    for n in tqdm(left, desc="SDPO", unit="trial", disable=None):
        i, problem, repetition = trials[n]
        learner.reset()
        found["SDPO"].append(solve(learner, problem, rounds, (repetition, i), args))
        store.keep()
    learner.reset()
    left = range(len(found["best-of-k"]), len(trials))
    for n in tqdm(left, desc="best-of-k", unit="trial", disable=None):
        i, problem, repetition = trials[n]
        attempts = answer(rollouts, [problem] * rounds, (repetition, i), range(rounds), args)
        found["best-of-k"].append(first_right(attempts))
        store.data["right"].append(sum(int(r.reward == 1) for g in attempts for r in g.verdicts))
        store.keep()
    if not found["multi-turn"]:
        store.keep(turns=multi_turn(rollouts, trials, found, args))
    curves = curves_of(store.data, args.seeds)
    draw_discovery(curves, run.folder / "discovery.png")
    table = table_of(curves)
    (run.folder / "table.md").write_text(table)
    run.say(table)
    run.collect(rollouts.evaluate())
    run.finish(rollouts)


class Store:
    """discovery.json: what is finished is not done again."""

    def __init__(self, path: Path, args: Args):
        self.path = path
        self.data = {
            "budget": args.budget // args.group_size * args.group_size, "seeds": args.seeds,
            "tries": args.tries, "most": args.most, "right": [],
            "solved_at": {method: [] for method in METHODS},
        }
        if path.exists():
            held = json.loads(path.read_text())
            for name in ("budget", "seeds", "tries", "most"):
                same = held[name] == self.data[name]
                require(same, f"{path} holds trials with other settings; give another --name")
            self.data = held

    def keep(self, **more) -> None:
        self.data |= more
        self.path.write_text(json.dumps(self.data, indent=1) + "\n")


def check(args: Args, run: Run) -> None:
    require(run.world == 1, "benchmarks/discovery.py runs in one process")
    require(
        args.setup.resume in ("", "auto"),
        "a trial always begins at --model: --resume auto goes on with the trials of --name",
    )
    require(
        args.budget >= args.group_size,
        f"--budget {args.budget}: at least --group_size {args.group_size} attempts",
    )


def hard_problems(rollouts: Rollouts, args: Args) -> list[dict]:
    """Held-out problems with a pass rate above 0 and at most --most: their places, ids and rates.

    If there are more than --questions, those that come first.
    """
    problems = rollouts.task.heldout
    groups = rollouts.answer(problems, args.tries, FIRST, range(len(problems)))
    hard = []
    for i, group in enumerate(groups):
        rate = sum(verdict.reward == 1 for verdict in group.verdicts) / args.tries
        if 0 < rate <= args.most:
            hard.append({"index": i, "id": group.problem.id, "rate": rate})
    require(
        hard,
        f"no held-out problem has a pass rate above 0 and at most {args.most}: raise --most, "
        "--tries or --heldout, or take another task",
    )
    return hard[: args.questions]


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


def multi_turn(rollouts: Rollouts, trials: list, found: dict, args: Args) -> list[int]:
    """One attempt per turn at every open trial, shown the feedback on its earlier attempts (not the
    attempts): as much of it as fits, the oldest dropped. Fills found["multi-turn"]; → how many
    feedbacks the last prompt of each trial held."""
    solved: list[int | None] = [None] * len(trials)
    said: list[list[str]] = [[] for _ in trials]
    for turn in tqdm(range(args.budget), desc="multi-turn", unit="turn", disable=None):
        still_open = [n for n in range(len(trials)) if solved[n] is None]
        if not still_open:
            break
        problems = [trials[n][1] for n in still_open]
        prompts = [with_feedback(rollouts, trials[n][1], said[n], args) for n in still_open]
        groups = rollouts.answer(problems, 1, TURNS + 100 * turn, still_open, prompts=prompts)
        for n, group in zip(still_open, groups):
            (rollout,), (verdict,) = group.rollouts, group.verdicts
            feedback = sdpo.feedback_on(rollout, verdict)
            if verdict.reward == 1:
                solved[n] = turn + 1
            elif feedback not in said[n]:
                said[n].append(feedback)
    found["multi-turn"] = solved
    return [len(feedbacks) for feedbacks in said]


def with_feedback(rollouts: Rollouts, problem: Problem, said: list[str], args: Args) -> list[int]:
    """The prompt of the next turn, token ids. Drops from `said` the oldest that do not fit."""
    only_feedback = replace(args, context="feedback")
    while said:
        feedback = rollouts.as_text("\n".join(said))
        ids = rollouts.chat_ids(sdpo.teacher_chat(problem, None, feedback, only_feedback))
        if len(ids) + args.max_tokens <= rollouts.sampler.context:
            return ids
        del said[0]
    return rollouts.chat_ids(problem.messages)


def first_right(groups: list[Group]) -> int | None:
    """The first attempt of the groups that passed, from 1; None if none did."""
    attempt = 0
    for group in groups:
        for verdict in group.verdicts:
            attempt += 1
            if verdict.reward == 1:
                return attempt
    return None


def curves_of(data: dict, seeds: int) -> dict[str, np.ndarray]:
    """method → discovery@k of each problem, [problems, budget]: the share of its trials in which an
    attempt up to the k-th passed. Of best-of-k the unbiased estimate from all attempts."""
    budget = data["budget"]
    ks = np.arange(1, budget + 1)
    curves = {}
    for method, times in data["solved_at"].items():
        solved = np.array([math.inf if t is None else t for t in times])
        rows = (solved[:, None] <= ks).astype(float)
        if method == "best-of-k":
            rows = np.stack([pass_at(ks, right, budget) for right in data["right"]])
        curves[method] = rows.reshape(-1, seeds, budget).mean(1)
    return curves


def pass_at(ks: np.ndarray, right: int, n: int) -> np.ndarray:
    """1 − C(n − right, k)/C(n, k): P(one of k attempts is right) from `right` of n.

    >>> pass_at(np.arange(1, 5), 1, 4).tolist()
    [0.25, 0.5, 0.75, 1.0]
    """
    out = []
    for k in ks.tolist():
        out.append(1 - math.comb(n - right, k) / math.comb(n, k))
    return np.array(out)


def resampled(problems: int, draws: int = 2000) -> np.ndarray:
    """Bootstrap over problems: [draws, problems]."""
    return np.random.default_rng(0).integers(problems, size=(draws, problems))


def band(curve: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean discovery@k over problems within its 90 % interval: low, mean, high, each [budget]."""
    means = curve[resampled(len(curve))].mean(1)
    low, high = np.quantile(means, [0.05, 0.95], axis=0)
    return low, curve.mean(0), high


def attempts_for(mean: np.ndarray, level: float) -> float:
    """The least k with discovery@k ≥ level; infinity if there is none.

    >>> attempts_for(np.array([0.1, 0.4, 0.5]), 0.4), attempts_for(np.array([0.1]), 0.4)
    (2.0, inf)
    """
    reached = np.flatnonzero(mean >= level - 1e-12)
    return float(reached[0] + 1) if len(reached) else math.inf


def speedup(curves: dict[str, np.ndarray], method: str, share: float) -> tuple[float, float, float]:
    """How many times fewer attempts than best-of-k the method needs for `share` of what best-of-k
    discovers with all: low, estimate, high of a bootstrap 90 % interval over problems."""
    base, mine = curves["best-of-k"], curves[method]

    def ratio(rows: np.ndarray) -> float:
        level = share * base[rows].mean(0)[-1]
        k = attempts_for(mine[rows].mean(0), level)
        return attempts_for(base[rows].mean(0), level) / k

    draws = [ratio(rows) for rows in resampled(len(base), 500)]
    low, high = np.quantile(draws, [0.05, 0.95])
    return float(low), ratio(np.arange(len(base))), float(high)


def table_of(curves: dict[str, np.ndarray]) -> str:
    budget = next(iter(curves.values())).shape[1]
    ks = [k for k in (16, 64, 256, 1024) if k < budget] + [budget]
    shares = (0.25, 0.5, 1.0)
    head = ["method", *(f"discovery@{k}" for k in ks)]
    head += [f"times fewer attempts for {share:.0%} of best-of-k's" for share in shares]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for method, curve in curves.items():
        low, mean, high = band(curve)
        cells = [method]
        for k in ks:
            cells.append(f"{mean[k - 1]:.2f} ({low[k - 1]:.2f} to {high[k - 1]:.2f})")
        for share in shares:
            least, ratio, most = speedup(curves, method, share)
            fewer = f"{ratio:.1f} ({least:.1f} to {most:.1f})"
            cells.append("" if method == "best-of-k" else fewer)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw_discovery(curves: dict[str, np.ndarray], path: Path) -> None:
    from matplotlib.figure import Figure  # not pyplot, which looks for a display

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for method, curve in curves.items():
        low, mean, high = band(curve)
        ks = np.arange(1, len(mean) + 1)
        (line,) = axis.plot(ks, mean, label=method)
        axis.fill_between(ks, low, high, alpha=0.15, color=line.get_color())
    axis.set(xscale="log", xlabel="attempts k", ylabel="discovery@k", ylim=(0, 1))
    axis.set_title("test-time self-distillation, 90 % interval over problems")
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(parse(Args, presets))
