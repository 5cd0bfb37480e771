"""Every file's --demo, and the variants that the pages mention, on three seeds.

    python benchmarks/demos.py                   # the five files: half an hour on two cores
    python benchmarks/demos.py --only hsd-live   # one of RUNS
    python benchmarks/demos.py --time            # how long the longest take, on a quiet machine

Writes to results/demo: NAME.json (held-out pass@1 at every evaluation, seconds, entropy and length
of each seed), NAME.png (the curves of the first seed) and table.md of all results there. With
--time it writes seconds.json alone.
"""
from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "results" / "demo"
FILES = ("grpo", "rlsd", "sdpo", "hsd", "sdzero")
RUNS = {
    **{file: f"{file}.py --demo" for file in FILES},
    "hsd-live": "hsd.py --demo --teacher live",
    "hsd-ema": "hsd.py --demo --teacher ema",
    "hsd-reverse": "hsd.py --demo --kl reverse --lr 1e-4",
    "sdzero-srt": "sdzero.py --demo --phase srt",
    "sdzero-sd": "sdzero.py --demo --phase sd",
}
TIMED = ["hsd.py --demo", "sdzero.py --demo"]  # the longest


@dataclass
class Args:
    only: str = ""  # some of RUNS, joined by commas; empty: the five files
    seeds: tuple[int, ...] = (0, 1, 2)  # seeds of the runs
    jobs: int = 2  # runs at the same time
    threads: int = 1  # CPU threads of each run
    time: bool = False  # instead time the demos, one after the other, each with all threads


def main(args: Args) -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    machine = f"{os.cpu_count()} CPU cores ({platform.processor() or platform.machine()})"
    if args.time:
        found = {"commit": commit, "hardware": machine, "seconds": time_demos()}
        (OUT / "seconds.json").write_text(json.dumps(found, indent=1))
        return
    threads = f"{args.jobs} runs at a time, {args.threads} thread(s) each"
    for name, results in run_all(args):
        found = {
            "command": f"python {RUNS[name]} --seed SEED", "commit": commit,
            "hardware": f"{machine}, {threads}", "runs": results,
        }
        (OUT / f"{name}.json").write_text(json.dumps(found, indent=1))
    lines = table()
    (OUT / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def time_demos() -> dict[str, float]:
    seconds = {}
    for command in TIMED:
        with tempfile.TemporaryDirectory() as runs:
            line = [sys.executable, *command.split(), "--out", runs]
            start = time.perf_counter()
            subprocess.run(line, cwd=ROOT, capture_output=True, check=True)
            took = round(time.perf_counter() - start, 1)
        print(f"{command}: {took} s", flush=True)
        seconds[f"python {command}"] = took
    return seconds


def run_all(args: Args) -> Iterator[tuple[str, list[dict]]]:
    """Each name and its results, a seed each, as soon as they are there."""
    names = args.only.split(",") if args.only else FILES
    with tempfile.TemporaryDirectory() as runs, ThreadPoolExecutor(args.jobs) as pool:
        jobs = {}
        for seed in args.seeds:
            for name in names:
                jobs[name, seed] = pool.submit(demo, name, seed, args, runs)
        for name in names:
            yield name, [jobs[name, seed].result() for seed in args.seeds]


def demo(name: str, seed: int, args: Args, out: str) -> dict:
    folder = Path(out) / f"{name}-s{seed}"
    command = [sys.executable, *RUNS[name].split(), "--seed", str(seed)]
    command += ["--out", out, "--name", folder.name]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    if seed == args.seeds[0]:
        shutil.copy(folder / "curves.png", OUT / f"{name}.png")
    result = {"seed": seed, "seconds": seconds, **result_of(folder)}
    first, last = result["heldout"][0][1], result["heldout"][-1][1]
    print(f"{name}, seed {seed}: {first:.3f} → {last:.3f} in {seconds:.0f} s", flush=True)
    return result


def result_of(folder: Path) -> dict:
    """What NAME.json keeps of a run: curves as [step, value]."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    curve = lambda key: [[row["step"], row[key]] for row in rows if key in row]
    every = max(1, len(rows) // 10)
    mismatch = [value for _, value in curve("mismatch/max_abs_dlogp")]
    return {
        "heldout": curve("heldout/pass@1"),
        "phases": sorted({row["phase"] for row in rows if "phase" in row}),
        "entropy": curve("entropy")[::every],
        "length": curve("length/mean")[::every],
        "mismatch/max_abs_dlogp": max(mismatch, default=None),
    }


def table() -> list[str]:
    """A line for each of RUNS that has results."""
    lines = ["| command | start | end, by seed | gain, least |", "|---|---|---|---|"]
    for name, command in RUNS.items():
        path = OUT / f"{name}.json"
        if not path.exists():
            continue
        scores = [run["heldout"] for run in json.loads(path.read_text())["runs"]]
        first = [curve[0][1] for curve in scores]
        last = [curve[-1][1] for curve in scores]
        start = sum(first) / len(first)
        ends = " ".join(f"{score:.3f}" for score in last)
        least = min(b - a for a, b in zip(first, last))
        lines.append(f"| `{command}` | {start:.3f} | {ends} | {least:+.3f} |")
    return lines


if __name__ == "__main__":
    main(tyro.cli(Args))
