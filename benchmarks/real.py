"""A few steps of the method files on a real model and real problems: does everything work together?

    python benchmarks/real.py --model SMOLLM2_135M_INSTRUCT --data_dir DATA    # ten minutes

It shows that formats, verifiers, contexts and memory fit, not that a small model learns in four
steps. Writes results/real/NAME.json for each of RUNS: the command, every metric of every step, and
one rollout with its verdict.
"""
from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
SMALL = "--no-checkpointing --heldout 4 --eval_every 1000 --lr 1e-6 --warmup 0 --token_budget 2048"
GRPO = f"{SMALL} --batch_size 2 --group_size 8 --steps 4 --beta 0 --max_tokens 160 --share_prompts"
SDPO = f"{SMALL} --batch_size 1 --group_size 4 --steps 2 --max_tokens 96"
RUNS = {
    "grpo-gsm8k": f"grpo.py --task gsm8k {GRPO}",
    "sdpo-mbpp": f"sdpo.py --task mbpp {SDPO} --kl reverse --top_k 20",
    "sdpo-sciknoweval": f"sdpo.py --task sciknoweval/physics {SDPO}",
}


@dataclass
class Args:
    model: str  # folder of the model
    data_dir: str  # folder of the named sets
    only: str = ""  # one of RUNS; empty: all


def main(args: Args) -> None:
    out = ROOT / "results" / "real"
    out.mkdir(parents=True, exist_ok=True)
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    for name in [args.only] if args.only else RUNS:
        metrics, rollouts = execute(name, args)
        found = {
            "command": f"python {RUNS[name]} --model {Path(args.model).name} --data_dir DATA",
            "commit": commit,
            "hardware": f"{os.cpu_count()} CPU cores ({platform.machine()})",
            "metrics": metrics,
            "rollout": max(rollouts, key=lambda rollout: rollout["reward"]),
        }
        (out / f"{name}.json").write_text(json.dumps(found, indent=1))


def execute(name: str, args: Args) -> tuple[list[dict], list[dict]]:
    """Metrics of every step, and the rollouts that the run logged."""
    command = [*RUNS[name].split(), "--model", args.model, "--data_dir", args.data_dir]
    with tempfile.TemporaryDirectory() as runs:
        line = [sys.executable, *command, "--out", runs, "--name", name]
        subprocess.run(line, cwd=ROOT, check=True)
        folder = Path(runs) / name
        return lines_of(folder / "metrics.jsonl"), lines_of(folder / "rollouts.jsonl")


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    main(tyro.cli(Args))
