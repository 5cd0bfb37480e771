"""Step time and memory of a method file against its trainer in TRL: same model, prompts, group
size, lengths and update.

    python benchmarks/speed.py --trl_python TRL_ENV/bin/python      # grpo.py, the embedded model
    python benchmarks/speed.py --trl_python … --file sdpo --name chain-sdpo              # or hsd
    python benchmarks/speed.py --trl_python … --model SMOLLM2 --task jsonl:gsm8k/train.jsonl …

TRL needs an environment of its own (pip install torch==2.13.0 trl==1.16.0). The two run in turns,
so that other load affects both alike. The first two steps of a run are a warm-up and do not count.
Writes results/speed/NAME.json.
"""
from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import tyro

ROOT = Path(__file__).resolve().parent.parent
PHASES = ("sample", "verify", "score", "update", "sync")
WARM_UP = 2  # steps that do not count
METHOD = {  # more flags of the file, so that both sides compute the same
    "grpo": [],
    "sdpo": ["--kl", "reverse", "--teacher", "ema", "--context", "solution"],
    "hsd": ["--kl", "reverse", "--teacher", "frozen", "--context", "solution", "--beta", "0",
            "--top_p", "1"],
}
SHARED = ("model", "task", "heldout", "batch_size", "group_size", "max_tokens", "lr", "steps",
          "token_budget")  # flags that have the same name in the method files


@dataclass
class Args:
    trl_python: str  # interpreter of the environment that has TRL
    # grpo.py and GRPOTrainer; sdpo.py and SDPOTrainer (siblings, average, reverse KL); hsd.py as
    # self-distillation from the worked solution (frozen teacher, reverse KL) and SDFTTrainer
    file: Literal["grpo", "sdpo", "hsd"] = "grpo"
    name: str = "chain"  # name of the result file
    model: str = "assets/chain"  # model folder
    task: str = "chain"  # chain or jsonl:FILE
    heldout: int = 256  # problems that neither side trains on
    batch_size: int = 16  # questions per step
    group_size: int = 8  # responses per question
    max_tokens: int = 64  # most tokens per response
    lr: float = 1e-4  # learning rate
    steps: int = 12  # steps per run, including the two warm-up steps
    rounds: int = 3  # runs of each side, in turns
    # TRL's per_device_train_batch_size; TRL is fastest with as many rows as fit the memory
    per_device: int = 128
    token_budget: int = 16384  # the method file's padded tokens per forward pass
    threads: int = 2  # CPU threads of each side


def main(args: Args) -> None:
    rollouts = args.batch_size * args.group_size
    if rollouts % args.per_device > 0:
        raise SystemExit(f"error: --per_device {args.per_device} does not divide the {rollouts} "
                         "rollouts of a step; lower it")
    sides = {"TRL": theirs, f"{args.file}.py": ours}
    runs: dict[str, list[dict]] = {f"{args.file}.py": [], "TRL": []}
    for i in range(args.rounds):
        for side, run in sides.items():
            with tempfile.TemporaryDirectory() as out:
                found = run(args, i, out)
            runs[side].append(found)
            median = statistics.median(found["seconds"][WARM_UP:])
            print(f"round {i}  {side:8s} {median:.3f} s a step", flush=True)
    table = {side: summary(results, args) for side, results in runs.items()}
    ratio = table["TRL"]["median_step_s"] / table[f"{args.file}.py"]["median_step_s"]
    path = write(table, ratio, runs, args)
    for side, row in table.items():
        print(f"{side:8s} {row['median_step_s']:.3f} s a step  "
              f"{row['samples_per_s']:.0f} samples/s  "
              f"mean length {row['mean_length']:.1f} tokens  peak {row['peak_gib']:.2f} GiB")
    print(f"{args.file}.py is {ratio:.2f} times as fast; wrote {path.relative_to(ROOT)}")


def ours(args: Args, seed: int, out: str) -> dict:
    """A run of the method file: seconds, lengths, rewards of each step, and its peak memory."""
    command = [sys.executable, f"{args.file}.py", "--demo", *METHOD[args.file]]
    for name in SHARED:
        command += [f"--{name}", str(getattr(args, name))]
    command += ["--seed", str(seed), "--out", out, "--name", "run", "--eval_every", "1000000",
                "--eval_samples", "1", "--save_every", "1000000"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=environment(args))
    lines = (Path(out) / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines][: args.steps]
    phases = {}
    for phase in PHASES:
        phases[phase] = [row.get(f"time/{phase}", 0.0) for row in rows]
    return {
        "seconds": [sum(of_step) for of_step in zip(*phases.values())],
        "phases": phases,
        "lengths": [row["length/mean"] for row in rows],
        "rewards": [row["reward/mean"] for row in rows],
        "peak_gib": max(row["peak_gib"] for row in rows),
    }


def theirs(args: Args, seed: int, out: str) -> dict:
    """The same of a run of TRL's trainer, with its versions."""
    options = json.dumps({**asdict(args), "seed": seed, "out": out})
    command = [args.trl_python, "benchmarks/trl_side.py", options]
    done = subprocess.run(command, cwd=ROOT, check=True, text=True, capture_output=True,
                          env=environment(args))
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(results[0].removeprefix("RESULT "))


def environment(args: Args) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(args.threads)}


def summary(results: list[dict], args: Args) -> dict:
    """One side's row of the table, over its rounds."""
    steady, per_round, lengths = [], [], []
    for result in results:
        counted = result["seconds"][WARM_UP:]
        steady += counted
        per_round.append(statistics.median(counted))
        lengths += result["lengths"]
    step = statistics.median(steady)
    return {
        "median_step_s": step,
        "samples_per_s": args.batch_size * args.group_size / step,
        "per_round_s": per_round,
        "mean_length": statistics.mean(lengths or [float("nan")]),
        "peak_gib": max(result["peak_gib"] for result in results),
    }


def write(table: dict, ratio: float, runs: dict, args: Args) -> Path:
    task = ":".join(Path(part).name for part in args.task.split(":"))
    # the reader's paths are others
    names = {args.trl_python: "TRL_PYTHON", args.model: Path(args.model).name, args.task: task}
    typed = " ".join(names.get(word, word) for word in sys.argv[1:])
    settings = asdict(args)
    del settings["trl_python"]
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True,
                          text=True)
    result = {
        "command": f"python benchmarks/speed.py {typed}",
        "commit": head.stdout.strip(),
        "args": {name: names.get(value, value) for name, value in settings.items()},
        "hardware": f"{os.cpu_count()} CPU cores ({platform.processor() or platform.machine()})",
        "table": table, "times_faster": ratio, "runs": runs,
    }
    path = ROOT / "results" / "speed" / f"{args.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1))
    return path


if __name__ == "__main__":
    main(tyro.cli(Args))
