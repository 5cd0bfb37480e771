"""Every file's --demo on three seeds: the figures that the README and the pages quote.

    python benchmarks/demos.py              # about half an hour on two cores, two runs at a time, one thread each
    python benchmarks/demos.py --only hsd   # one file

Writes results/demo/FILE.json (held-out pass@1 at every evaluation, seconds, entropy and length of each seed) and
results/demo/FILE.png (the curves of seed 0), and results/demo/table.md of all files that are there.
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


@dataclass
class Args:
    only: str = ""
    """one of the files; empty: all"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """seeds of the runs"""
    jobs: int = 2
    """runs at a time"""
    threads: int = 1
    """CPU threads of each"""


def demo(file: str, seed: int, args: Args, out: str) -> dict:
    start = time.perf_counter()
    command = [sys.executable, f"{file}.py", "--demo", "--seed", str(seed), "--out", out, "--name", f"{file}-s{seed}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": str(args.threads)})
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    seconds = time.perf_counter() - start
    folder = Path(out) / f"{file}-s{seed}"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curve = lambda name: [[row["step"], row[name]] for row in rows if name in row]
    if seed == args.seeds[0]:
        shutil.copy(folder / "curves.png", ROOT / "results" / "demo" / f"{file}.png")
    found = curve("heldout/pass@1")
    print(f"{file}, seed {seed}: {found[0][1]:.3f} → {found[-1][1]:.3f} in {seconds:.0f} s", flush=True)
    return {"seed": seed, "seconds": seconds, "heldout": found, "phases": sorted({r["phase"] for r in rows if "phase" in r}),
            "entropy": curve("entropy")[-1:], "length": curve("length/mean")[:: max(1, len(rows) // 10)],
            "mismatch/max_abs_dlogp": max((v for _, v in curve("mismatch/max_abs_dlogp")), default=None)}


def main(args: Args) -> None:
    out = ROOT / "results" / "demo"
    out.mkdir(parents=True, exist_ok=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    files = [f for f in FILES if args.only in ("", f)]
    with tempfile.TemporaryDirectory() as runs, ThreadPoolExecutor(args.jobs) as pool:
        jobs = {(f, s): pool.submit(demo, f, s, args, runs) for s in args.seeds for f in files}
        for f in files:
            results = [jobs[f, s].result() for s in args.seeds]
            (out / f"{f}.json").write_text(json.dumps({
                "command": f"python {f}.py --demo --seed SEED", "commit": commit.strip(),
                "hardware": f"{os.cpu_count()} CPU cores ({platform.processor() or platform.machine()}), {args.jobs} runs at "
                            f"a time, {args.threads} thread(s) each", "runs": results}, indent=1))
    lines = ["| file | start | end, by seed | gain, least | seconds, most |", "|---|---|---|---|---|"]
    for f in FILES:
        if (out / f"{f}.json").exists():
            runs = json.loads((out / f"{f}.json").read_text())["runs"]
            first, last = ([r["heldout"][i][1] for r in runs] for i in (0, -1))
            lines.append(f"| `{f}.py --demo` | {sum(first) / len(first):.3f} | {' '.join(f'{x:.3f}' for x in last)} | "
                         f"{min(b - a for a, b in zip(first, last)):+.3f} | {max(r['seconds'] for r in runs):.0f} |")
    (out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main(tyro.cli(Args))
