"""Step time and memory of a file against its trainer in TRL: same model, prompts, group size, lengths and update.

    python benchmarks/speed.py --trl_python TRL_ENV/bin/python                                   # the embedded model
    python benchmarks/speed.py --trl_python … --file sdpo --name chain-sdpo                      # or hsd
    python benchmarks/speed.py --trl_python … --model SMOLLM2 --task jsonl:gsm8k/train.jsonl …   # a real one

TRL needs an environment of its own (pip install torch==2.13.0 trl==1.16.0). The two run in turns, so that other
load affects both alike. The first two steps of a run (warm-up) do not count. Writes results/speed/NAME.json.
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


@dataclass
class Args:
    trl_python: str  # interpreter of the environment that has TRL
    file: Literal["grpo", "sdpo", "hsd"] = "grpo"
    """grpo.py and GRPOTrainer; sdpo.py and SDPOTrainer (siblings, average, reverse KL); hsd.py as self-distillation from the worked
    solution (frozen teacher, reverse KL) and SDFTTrainer"""
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
    per_device: int = 128
    """TRL's per_device_train_batch_size; TRL is fastest with as many rows as fit the memory"""
    token_budget: int = 16384  # the method file's padded tokens per forward pass
    threads: int = 2  # CPU threads of each side


METHOD = {"grpo": [], "sdpo": ["--kl", "reverse", "--teacher", "ema", "--context", "solution"],
          "hsd": ["--kl", "reverse", "--teacher", "frozen", "--context", "solution", "--beta", "0", "--top_p", "1"]}


def ours(args: Args, seed: int, out: str) -> dict:
    command = [sys.executable, f"{args.file}.py", "--demo", *METHOD[args.file], *flags(args, "model", "task", "heldout", "batch_size", "group_size",
               "max_tokens", "lr", "steps", "token_budget"), "--seed", str(seed), "--out", out, "--name", "run",
               "--eval_every", "1000000", "--eval_samples", "1", "--save_every", "1000000"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=environment)
    rows = [json.loads(line) for line in (Path(out) / "run" / "metrics.jsonl").read_text().splitlines()][: args.steps]
    phases = {k: [r.get(f"time/{k}", 0.0) for r in rows] for k in ("sample", "verify", "score", "update", "sync")}
    seconds = [sum(p[i] for p in phases.values()) for i in range(len(rows))]
    return {"seconds": seconds, "phases": phases, "lengths": [r["length/mean"] for r in rows],
            "rewards": [r["reward/mean"] for r in rows], "peak_gib": max(r["peak_gib"] for r in rows)}


def theirs(args: Args, seed: int, out: str) -> dict:
    options = json.dumps({**asdict(args), "seed": seed, "out": out})
    done = subprocess.run([args.trl_python, "benchmarks/trl_side.py", options], cwd=ROOT, check=True, text=True,
                          capture_output=True, env={**os.environ, "OMP_NUM_THREADS": str(args.threads)})
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))[7:])


def flags(args: Args, *names: str) -> list[str]:
    return [x for n in names for x in (f"--{n}", str(getattr(args, n)))]


def main(args: Args) -> None:
    runs: dict[str, list[dict]] = {f"{args.file}.py": [], "TRL": []}
    for i in range(args.rounds):
        for side, run in (("TRL", theirs), (f"{args.file}.py", ours)):
            with tempfile.TemporaryDirectory() as out:
                runs[side].append(run(args, i, out))
            print(f"round {i}  {side:8s} {statistics.median(runs[side][-1]['seconds'][2:]):.3f} s a step", flush=True)
    count = args.batch_size * args.group_size
    table = {}
    for side, results in runs.items():
        steady = [s for r in results for s in r["seconds"][2:]]
        table[side] = {"median_step_s": statistics.median(steady), "samples_per_s": count / statistics.median(steady),
                       "per_round_s": [statistics.median(r["seconds"][2:]) for r in results],
                       "mean_length": statistics.mean([x for r in results for x in r["lengths"]] or [float("nan")]),
                       "peak_gib": max(r["peak_gib"] for r in results)}
    ratio = table["TRL"]["median_step_s"] / table[f"{args.file}.py"]["median_step_s"]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    names = {args.trl_python: "TRL_PYTHON", args.model: Path(args.model).name,  # the reader's paths are others
             args.task: ":".join(Path(part).name for part in args.task.split(":"))}
    typed = " ".join(names.get(word, word) for word in sys.argv[1:])
    result = {"command": f"python benchmarks/speed.py {typed}", "commit": commit.strip(),
              "args": {k: names.get(v, v) for k, v in asdict(args).items() if k != "trl_python"},
              "hardware": f"{os.cpu_count()} CPU cores ({platform.processor() or platform.machine()})",
              "table": table, "times_faster": ratio, "runs": runs}
    path = ROOT / "results" / "speed" / f"{args.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1))
    for side, row in table.items():
        print(f"{side:8s} {row['median_step_s']:.3f} s a step  {row['samples_per_s']:.0f} samples/s  "
              f"mean length {row['mean_length']:.1f} tokens  peak {row['peak_gib']:.2f} GiB")
    print(f"{args.file}.py is {ratio:.2f} times as fast; wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main(tyro.cli(Args))
