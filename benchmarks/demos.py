"""Every file's --demo, and the variants that the pages mention, on three seeds.

    python benchmarks/demos.py                   # the five files: half an hour on two cores, two runs at a time
    python benchmarks/demos.py --only hsd-live   # one of RUNS
    python benchmarks/demos.py --time            # how long the longest take, alone on a quiet machine

Writes results/demo/NAME.json (held-out pass@1 at every evaluation, seconds, entropy and length of each seed),
results/demo/NAME.png (the curves of the first seed) and results/demo/table.md of all results there; with --time,
results/demo/seconds.json.
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
FILES = ("grpo", "rlsd", "sdpo", "hsd", "sdzero")
RUNS = {**{file: f"{file}.py --demo" for file in FILES},
        "hsd-live": "hsd.py --demo --teacher live", "hsd-ema": "hsd.py --demo --teacher ema",
        "hsd-reverse": "hsd.py --demo --kl reverse --lr 1e-4", "sdzero-srt": "sdzero.py --demo --phase srt",
        "sdzero-sd": "sdzero.py --demo --phase sd"}
TIMED = ["hsd.py --demo", "sdzero.py --demo"]  # the longest


@dataclass
class Args:
    only: str = ""  # some of RUNS, joined by commas; empty: the five files
    seeds: tuple[int, ...] = (0, 1, 2)  # seeds of the runs
    jobs: int = 2  # runs at the same time
    threads: int = 1  # CPU threads of each run
    time: bool = False  # instead time the demos, one after the other, each with all threads


def demo(name: str, seed: int, args: Args, out: str) -> dict:
    start = time.perf_counter()
    command = [sys.executable, *RUNS[name].split(), "--seed", str(seed), "--out", out, "--name", f"{name}-s{seed}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": str(args.threads)})
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    seconds = time.perf_counter() - start
    folder = Path(out) / f"{name}-s{seed}"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curve = lambda key: [[row["step"], row[key]] for row in rows if key in row]
    if seed == args.seeds[0]:
        shutil.copy(folder / "curves.png", ROOT / "results" / "demo" / f"{name}.png")
    found = curve("heldout/pass@1")
    print(f"{name}, seed {seed}: {found[0][1]:.3f} → {found[-1][1]:.3f} in {seconds:.0f} s", flush=True)
    return {"seed": seed, "seconds": seconds, "heldout": found, "phases": sorted({r["phase"] for r in rows if "phase" in r}),
            "entropy": curve("entropy")[:: max(1, len(rows) // 10)], "length": curve("length/mean")[:: max(1, len(rows) // 10)],
            "mismatch/max_abs_dlogp": max((v for _, v in curve("mismatch/max_abs_dlogp")), default=None)}


def main(args: Args) -> int | None:
    out = ROOT / "results" / "demo"
    out.mkdir(parents=True, exist_ok=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    machine = f"{os.cpu_count()} CPU cores ({platform.processor() or platform.machine()})"
    if args.time:
        seconds = {}
        for command in TIMED:
            with tempfile.TemporaryDirectory() as runs:
                start = time.perf_counter()
                subprocess.run([sys.executable, *command.split(), "--out", runs], cwd=ROOT, capture_output=True, check=True)
                seconds[f"python {command}"] = round(time.perf_counter() - start, 1)
            print(f"{command}: {seconds[f'python {command}']} s", flush=True)
        found = {"commit": commit.strip(), "hardware": machine, "seconds": seconds}
        return (out / "seconds.json").write_text(json.dumps(found, indent=1))
    files = args.only.split(",") if args.only else FILES
    with tempfile.TemporaryDirectory() as runs, ThreadPoolExecutor(args.jobs) as pool:
        jobs = {(f, s): pool.submit(demo, f, s, args, runs) for s in args.seeds for f in files}
        for f in files:
            results = [jobs[f, s].result() for s in args.seeds]
            (out / f"{f}.json").write_text(json.dumps({
                "command": f"python {RUNS[f]} --seed SEED", "commit": commit.strip(),
                "hardware": f"{machine}, {args.jobs} runs at a time, {args.threads} thread(s) each", "runs": results}, indent=1))
    lines = ["| command | start | end, by seed | gain, least |", "|---|---|---|---|"]
    for f in RUNS:
        if (out / f"{f}.json").exists():
            runs = json.loads((out / f"{f}.json").read_text())["runs"]
            first, last = ([r["heldout"][i][1] for r in runs] for i in (0, -1))
            lines.append(f"| `{RUNS[f]}` | {sum(first) / len(first):.3f} | {' '.join(f'{x:.3f}' for x in last)} | "
                         f"{min(b - a for a, b in zip(first, last)):+.3f} |")
    (out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main(tyro.cli(Args))
