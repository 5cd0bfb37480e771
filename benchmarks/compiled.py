"""Would torch.compile pay? Whole steps of a method file, with and without, in turns.

    python benchmarks/compiled.py                          # grpo.py --demo
    python benchmarks/compiled.py --name smollm2 --flags="--model SMOLLM2 --max_tokens 32"

Nothing else may run beside it. Each decoder layer is compiled by itself with dynamic shapes, once
in the policy and once in the sampler: a micro-batch has its own number of rows and its own length,
and so has each decoding step. The method files have no such flag; here the layers are compiled from
outside, when the model is loaded. The first two steps of a run hold most of the compiling. The
table has their excess over later steps, the median of the later steps, and how many steps it takes
until compiling has paid. Writes results/speed/compiled-NAME.{json,md}.
"""
from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import platform
import runpy
import shlex
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import tyro
from transformers import PreTrainedModel

import common.policy
import common.sampler
from benchmarks.turns import PHASES, ROOT, WARM_UP, commit

SIDES = ("eager", "policy", "sampler")  # what is compiled


@dataclass
class Args:
    file: str = "grpo"  # method file
    flags: str = ""  # more of its flags
    name: str = "chain"  # of the result files
    sides: tuple[str, ...] = SIDES
    steps: int = 12  # of a run, the first two included
    rounds: int = 2  # runs of each side, in turns
    threads: int = 2  # CPU threads


def main(args: Args) -> None:
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # of the runs' processes
    runs: dict[str, list[list[dict]]] = {side: [] for side in args.sides}
    for seed in range(args.rounds):
        for side in args.sides:
            rows = run_alone(side, seed, args)
            runs[side].append(rows)
            seconds = [f"{total(row):.2f}" for row in rows]
            print(f"round {seed}  {side:8s} {' '.join(seconds)} s", flush=True)
    write(runs, args)


def run_alone(side: str, seed: int, args: Args) -> list[dict]:
    """The seconds of each phase of each step of a run, in a process and a cache of its own."""
    with tempfile.TemporaryDirectory() as out:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{out}/cache"
        command = [
            f"{args.file}.py", "--demo", *shlex.split(args.flags), "--steps", str(args.steps),
            "--seed", str(seed), "--out", out, "--name", "run", "--eval_every", "1000000",
            "--eval_samples", "1", "--save_every", "1000000",
        ]
        context = multiprocessing.get_context("spawn")
        process = context.Process(target=run_method, args=(side, command))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"error: {side}: {' '.join(command)} ended with {process.exitcode}")
        lines = (Path(out) / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines][: args.steps]
    return [{phase: row.get(f"time/{phase}", 0.0) for phase in PHASES} for row in rows]


def run_method(side: str, command: list[str]) -> None:
    """A method file as a script, in this process, with `side` compiled."""
    if side == "policy":
        load_policy = common.policy.load_policy

        def load_and_compile(*given):
            policy = load_policy(*given)
            compile_layers(policy.lm)
            return policy

        common.policy.load_policy = load_and_compile
    if side == "sampler":
        make = common.sampler.HFSampler.__init__

        def make_and_compile(self, *given, **named):
            make(self, *given, **named)
            compile_layers(self.lm)

        common.sampler.HFSampler.__init__ = make_and_compile
    os.chdir(ROOT)
    sys.argv = command
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        runpy.run_path(command[0], run_name="__main__")


def compile_layers(lm: PreTrainedModel) -> None:
    for layer in lm.base_model.layers:
        layer.compile(dynamic=True)


def total(row: dict[str, float]) -> float:
    return sum(row.values())


def summary(rounds: list[list[dict]]) -> dict[str, float]:
    """Medians over the later steps of all rounds, and the mean excess of the first steps, in s."""
    later = [row for rows in rounds for row in rows[WARM_UP:]]
    found = {phase: statistics.median(row[phase] for row in later) for phase in PHASES}
    found["step"] = statistics.median(map(total, later))
    first = [sum(map(total, rows[:WARM_UP])) for rows in rounds]
    found["compiling"] = statistics.mean(first) - WARM_UP * found["step"]
    return found


def write(runs: dict[str, list[list[dict]]], args: Args) -> None:
    table = {side: summary(rounds) for side, rounds in runs.items()}
    command = f"python benchmarks/compiled.py {shlex.join(sys.argv[1:])}".strip()
    about = {
        "command": command, "commit": commit(ROOT), "torch": torch.__version__,
        "hardware": f"{os.cpu_count()} CPU cores ({platform.machine()}), {args.threads} thread(s)",
    }
    lines = [
        f"`{command}`, commit {about['commit']}, torch {torch.__version__}, {about['hardware']}. "
        f"Seconds; median of a step, {args.steps - WARM_UP} × {args.rounds} steps.", "",
        "| compiled | sample | update | step | more in the first two steps | paid after |",
        "|---|---|---|---|---|---|",
    ]
    for side, row in table.items():
        cells = [f"{row[name]:.2f}" for name in ("sample", "update", "step")]
        lines.append(f"| {side} | {' | '.join(cells)} | {row['compiling']:.1f} "
                     f"| {paid_after(row, table['eager'])} |")
    out = ROOT / "results" / "speed" / f"compiled-{args.name}"
    out.parent.mkdir(parents=True, exist_ok=True)
    result = {**about, "args": asdict(args), "table": table, "runs": runs}
    out.with_suffix(".json").write_text(json.dumps(result, indent=1))
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def paid_after(row: dict[str, float], eager: dict[str, float]) -> str:
    """The number of steps after which a run with compiled layers is ahead of an eager one.

    >>> paid_after({"compiling": 9, "step": 2}, {"compiling": 1, "step": 4})
    '4 steps'
    >>> paid_after({"compiling": 9, "step": 4}, {"compiling": 1, "step": 4})
    'never'
    """
    if row is eager:
        return "–"
    saved = eager["step"] - row["step"]
    if saved <= 0:
        return "never"
    steps = (row["compiling"] - eager["compiling"]) / saved
    return f"{steps:.0f} steps"


if __name__ == "__main__":
    main(tyro.cli(Args))
