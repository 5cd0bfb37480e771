"""Step time of this checkout against another one of this repository, in turns, alone on the machine
(`--files` names the method files).

    git worktree add /tmp/before COMMIT
    python benchmarks/turns.py --other /tmp/before
    python benchmarks/turns.py --other . --other_flags=--no-share_prompts --name share-prompts   # what a flag costs

Each file's --demo runs for `steps` steps in each checkout, one after the other, `rounds` times. The first two steps of
a run (warm-up) do not count. Writes results/turns/NAME.json: seconds per step of each round and the ratio of medians.
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


@dataclass
class Args:
    other: Path  # the other checkout
    name: str = "editions"  # of the result file
    files: tuple[str, ...] = ("grpo", "rlsd", "sdpo", "hsd", "sdzero")  # method files to time
    steps: int = 10  # steps of a run, the two warm-up steps included
    rounds: int = 3  # runs of each checkout, in turns
    threads: int = 1  # CPU threads
    other_flags: str = ""  # more flags of the other's runs


def seconds_per_step(root: Path, file: str, flags: str, seed: int, args: Args) -> list[float]:
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, f"{file}.py", "--demo", *shlex.split(flags), "--seed", str(seed), "--out", out, "--name", "run",
                   "--eval_every", "1000000", "--save_every", "1000000"]
        if file == "sdzero":
            command += ["--phase", "sd", "--sd_questions", str(64 * args.steps)]
        else:
            command += ["--steps", str(args.steps)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        lines = (Path(out) / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "time/update" in row]
    return [sum(row.get(f"time/{phase}", 0.0) for phase in PHASES) for row in rows[2 : args.steps]]


def commit(root: Path) -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=root, capture_output=True, text=True).stdout.strip()


def main(args: Args) -> None:
    found = {}
    for file in args.files:
        seconds = {"other": [], "this": []}
        for seed in range(args.rounds):
            for side, root, flags in (("other", args.other, args.other_flags), ("this", ROOT, "")):
                seconds[side].append(statistics.median(seconds_per_step(root, file, flags, seed, args)))
        ratio = statistics.median(seconds["this"]) / statistics.median(seconds["other"])
        found[file] = {"seconds per step": seconds, "this / other": round(ratio, 3)}
        print(f"{file}: {seconds} → {ratio:.3f}", flush=True)
        write(args, found)


def write(args: Args, found: dict) -> None:
    out = ROOT / "results" / "turns"
    out.mkdir(parents=True, exist_ok=True)
    hardware = f"{os.cpu_count()} CPU cores ({platform.machine()}), {args.threads} thread(s)"
    typed = ["OTHER" if word == str(args.other) else word for word in sys.argv[1:]]
    result = {"command": " ".join(["python", "benchmarks/turns.py", *typed]), "this": commit(ROOT),
              "other": commit(args.other), "hardware": hardware, "files": found}
    (out / f"{args.name}.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Args))
