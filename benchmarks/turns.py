"""Step time of this checkout against another one of this repository, in turns.

    git worktree add /tmp/before COMMIT
    python benchmarks/turns.py --other /tmp/before

    # what a flag costs
    python benchmarks/turns.py --other . --other_flags=--no-share_prompts --name share-prompts

Nothing else may run beside it. Each file's --demo runs for `steps` steps in each checkout, one
after the other, `rounds` times. The first two steps of a run are a warm-up and do not count. Writes
results/turns/NAME.json: seconds per step of each round, and the ratio of the medians.
"""
from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
PHASES = ("sample", "verify", "score", "update", "sync")
WARM_UP = 2  # steps that do not count


@dataclass
class Args:
    other: Path  # the other checkout
    name: str = "editions"  # of the result file
    files: tuple[str, ...] = ("grpo", "rlsd", "sdpo", "hsd", "sdzero")  # method files to time
    steps: int = 10  # steps of a run, the two warm-up steps included
    rounds: int = 3  # runs of each checkout, in turns
    threads: int = 1  # CPU threads
    other_flags: str = ""  # more flags of the other's runs


def main(args: Args) -> None:
    sides = {"other": (args.other, args.other_flags), "this": (ROOT, "")}
    found = {}
    for file in args.files:
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        for seed in range(args.rounds):
            for side, (root, flags) in sides.items():
                steps = seconds_per_step(root, file, flags, seed, args)
                seconds[side].append(statistics.median(steps))
        ratio = statistics.median(seconds["this"]) / statistics.median(seconds["other"])
        found[file] = {"seconds per step": seconds, "this / other": round(ratio, 3)}
        print(f"{file}: {seconds} → {ratio:.3f}", flush=True)
        write(args, found)


def seconds_per_step(root: Path, file: str, flags: str, seed: int, args: Args) -> list[float]:
    """Of each step of a run, without the warm-up."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    with tempfile.TemporaryDirectory() as out:
        command = [*command_of(file, flags, seed, args), "--out", out]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        lines = (Path(out) / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "time/update" in row]
    seconds = []
    for row in rows[WARM_UP : args.steps]:
        seconds.append(sum(row.get(f"time/{phase}", 0.0) for phase in PHASES))
    return seconds


def command_of(file: str, flags: str, seed: int, args: Args) -> list[str]:
    length = ["--steps", str(args.steps)]
    if file == "sdzero":
        length = ["--phase", "sd", "--sd_questions", str(64 * args.steps)]
    return [
        sys.executable, f"{file}.py", "--demo", *shlex.split(flags), *length,
        "--seed", str(seed), "--name", "run", "--eval_every", "1000000", "--save_every", "1000000",
    ]


def write(args: Args, found: dict) -> None:
    typed = ["OTHER" if word == str(args.other) else word for word in sys.argv[1:]]
    result = {
        "command": " ".join(["python", "benchmarks/turns.py", *typed]),
        "this": commit(ROOT), "other": commit(args.other),
        "hardware": f"{os.cpu_count()} CPU cores ({platform.machine()}), {args.threads} thread(s)",
        "files": found,
    }
    out = ROOT / "results" / "turns"
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{args.name}.json").write_text(json.dumps(result, indent=1))


def commit(root: Path) -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    return done.stdout.strip()


if __name__ == "__main__":
    main(tyro.cli(Args))
