"""What a step of hsd.py costs, against its sizes: a formula, and measured points beside it.

    python benchmarks/scale.py    # eight minutes; nothing else may run beside it

One size is changed at a time: responses per question G, their length T, the vocabulary V, the
model's width D, the processes W. The models have random weights, so nearly all responses are
exactly T tokens long. The formula counts FLOPs (`step_flops`) and turns them into seconds with
three constants of this machine (`seconds`). They are fitted to three points and predict the others.
Writes results/scale/scale.json, scale.md and scale.png.
"""
from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from math import ceil
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import matplotlib  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import tyro  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

import hsd  # noqa: E402
from common.chat import chat_ids, load_tokenizer  # noqa: E402
from common.tasks import load_task  # noqa: E402
from common.work import Cost, cost_of  # noqa: E402

CHAIN = "assets/chain"
WARM_UP = 2  # steps that do not count
ROWS = 128  # --sampler_rows of the demo


@dataclass(frozen=True)
class Size:
    B: int = 4  # questions per step
    G: int = 8  # responses per question
    T: float = 64  # tokens per response
    V: int = 4096  # vocabulary
    D: int = 128  # width; the model has four layers
    W: int = 1  # processes
    P: float = 0.0  # tokens of the student's prompt, mean
    H: float = 0.0  # tokens of the teacher's prompt, mean
    C: int = 1  # different teacher's prompts per question; G if each response has its own


BASE = Size()
CHANGES = [
    {}, {"G": 4}, {"G": 16}, {"G": 32}, {"T": 16}, {"T": 128}, {"T": 256}, {"V": 525}, {"V": 32768},
    {"D": 64}, {"D": 256}, {"D": 512}, {"W": 2}, {"W": 4},
]
FITTED = [{}, {"G": 32}, {"D": 512}]


@dataclass
class Args:
    steps: int = 5  # of each run, the two warm-up steps included


class Flops(NamedTuple):
    sample: float
    update: float


def step_flops(size: Size, cost: Cost) -> Flops:
    """Model FLOPs of a step over all processes. Equal prompts are read once."""
    responses = size.B * size.G
    read = size.T - 1  # the last token of a response is not read

    def forward(prompt: float, different: int = 1) -> float:
        """A pass over all prompts and responses, without the head."""
        tokens = size.B * different * prompt + responses * read
        pairs = size.B * different * prompt * (prompt + 1) / 2
        pairs += responses * (prompt * read + read * (read + 1) / 2)
        return tokens * cost.token + pairs * cost.pair

    head = responses * size.T * cost.entry
    student = (1 + cost.backward) * (forward(size.P) + head)
    teacher = forward(size.H, size.C) + head
    return Flops(sample=forward(size.P) + head, update=student + teacher)


def seconds(size: Size, flops: Flops, constants: dict[str, float],
            cores: int) -> tuple[float, float]:
    """Of sampling and of the update, by the formula: FLOPs over a rate, and for sampling a fixed
    time per token of the longest response, in which the model's layers are called."""
    at_once = min(size.W, cores)
    calls = size.T * ceil(size.B * size.G / size.W / ROWS) * size.W / at_once
    sample = calls * constants["call"] + flops.sample / at_once / constants["sample"]
    return sample, flops.update / at_once / constants["update"]


def fit(points: list[dict]) -> dict[str, float]:
    """The three constants, from the fitted points: of sampling by least squares of the relative
    errors, of the update the median rate."""
    rows, rates = [], []
    for p in points:
        if p["change"] not in FITTED:
            continue
        size = Size(**p["size"])
        calls = size.T * ceil(size.B * size.G / ROWS)
        rows.append([calls / p["sample"], p["flops"]["sample"] / p["sample"]])
        rates.append(p["flops"]["update"] / p["update"])
    call, per_flop = np.linalg.lstsq(np.array(rows), np.ones(len(rows)), rcond=None)[0]
    return {"call": float(call), "sample": float(1 / per_flop), "update": statistics.median(rates)}


def write_model(size: Size, folder: Path) -> Cost:
    """A model of random weights with the tokenizer of the embedded one."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(CHAIN)
    config.hidden_size = size.D
    config.intermediate_size = 5 * size.D // 2
    config.head_dim = size.D // 4
    config.vocab_size = size.V
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    lm.save_pretrained(folder)
    load_tokenizer(CHAIN).save_pretrained(folder)
    return cost_of(lm)


def prompt_lengths() -> tuple[float, float]:
    """Mean tokens of the student's prompt and of the teacher's, which shows the answer."""
    tokenizer = load_tokenizer(CHAIN)
    problems = load_task("chain", heldout=8, data_dir="", instruction=None).train[:256]
    args = hsd.Args(context="answer")
    student = [len(chat_ids(tokenizer, p.messages)) for p in problems]
    teacher = [len(chat_ids(tokenizer, hsd.teacher_chat(p, None, args))) for p in problems]
    return statistics.mean(student), statistics.mean(teacher)


def measure(size: Size, steps: int) -> dict:
    """Median seconds of sampling and of the update; FLOPs by the formula, and the update's as the
    run counts them."""
    with tempfile.TemporaryDirectory() as out:
        model = Path(out) / "model"
        cost = write_model(size, model)
        command = [sys.executable, "hsd.py"]
        if size.W > 1:
            launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={size.W}"]
            command = [sys.executable, *launcher, "hsd.py"]
        command += ["--demo", "--model", str(model), "--context", "answer", "--top_p", "1",
                    "--batch_size", str(size.B), "--group_size", str(size.G),
                    "--max_tokens", str(size.T), "--steps", str(steps), "--heldout", "8",
                    "--eval_samples", "1", "--out", out, "--name", "run",
                    "--eval_every", "1000000", "--save_every", "1000000"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        lines = (Path(out) / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "time/update" in row][WARM_UP:]
    middle = lambda key: statistics.median(row[key] for row in rows)
    counted = [row["tflops/update"] * 1e12 * row["time/update"] * size.W for row in rows]
    length = statistics.mean(row["length/mean"] for row in rows)
    return {
        "size": asdict(size), "sample": middle("time/sample"), "update": middle("time/update"),
        "flops": step_flops(replace(size, T=length), cost)._asdict(),
        "counted": statistics.median(counted), "length": length,
    }


# Arithmetic, not measured: hsd.py's defaults on H100s, responses of 1,000 tokens on average
QWEN3_8B = Cost(token=2 * 6.946e9, pair=4 * 36 * 32 * 128, entry=2 * 0.622e9, backward=2.0)
PAPER = Size(B=128, G=8, T=1000, P=150, H=1150, C=8)
LONGEST = 4096  # --max_tokens: some response takes all of them
PRODUCTS = 0.4 * 989e12  # FLOP/s of a GPU, if an update reaches 0.4 of the data sheet's
BANDWIDTH = 3.35e12  # bytes/s that a GPU reads, by the data sheet
WEIGHTS = 2 * 8.19e9  # bytes of the sampler's weights, read for every token
KEYS = 2 * 2 * 36 * 8 * 128  # bytes of keys and values per token of a response, 8 KV heads of 128


def on_gpus(gpus: int) -> tuple[float, float]:
    """Seconds of sampling and of an update of PAPER, one engine per GPU.

    A token of the longest response reads the weights once, and every token the keys and values
    before it. The update reads each layer again in the backward pass (--checkpointing).
    Communication, Python and an engine's own work are left out.
    """
    tokens = PAPER.B * PAPER.G * PAPER.T / gpus
    past = PAPER.P + PAPER.T / 2
    sample = (LONGEST * WEIGHTS + tokens * past * KEYS) / BANDWIDTH
    flops = step_flops(PAPER, QWEN3_8B)
    again = flops.sample - PAPER.B * PAPER.G * PAPER.T * QWEN3_8B.entry
    return sample, (flops.update + again) / gpus / PRODUCTS


def arithmetic() -> str:
    lines = ["| GPUs | sampling, s | update, s | step, s |", "|---|---|---|---|"]
    for gpus in (8, 32):
        sample, update = on_gpus(gpus)
        lines.append(f"| {gpus} | {sample:.0f} | {update:.0f} | {sample + update:.0f} |")
    return "\n".join(lines) + "\n"


def named(change: dict) -> str:
    return ", ".join(f"{name} = {value:,}" for name, value in change.items()) or "the base"


def table(points: list[dict], constants: dict[str, float], cores: int) -> str:
    lines = [
        "| changed | update, GFLOP | counted by the run | sampling, s | formula | update, s "
        "| formula |",
        "|---|---|---|---|---|---|---|",
    ]
    for p in points:
        sample, update = seconds(Size(**p["size"]), Flops(**p["flops"]), constants, cores)
        fitted = " (fitted)" if p["change"] in FITTED else ""
        lines.append(f"| {named(p['change'])}{fitted} | {p['flops']['update'] / 1e9:.1f} | "
                     f"{p['counted'] / 1e9:.1f} | {p['sample']:.2f} | {sample:.2f} | "
                     f"{p['update']:.2f} | {update:.2f} |")
    return "\n".join(lines) + "\n"


def draw(points: list[dict], constants: dict[str, float], cores: int, path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    for phase, axis in enumerate(axes):
        name = ("sample", "update")[phase]
        for p in points:
            by_formula = seconds(Size(**p["size"]), Flops(**p["flops"]), constants, cores)[phase]
            colour = "tab:blue" if p["change"] in FITTED else "tab:orange"
            axis.plot(by_formula, p[name], "o", color=colour)
            axis.annotate(named(p["change"]), (by_formula, p[name]), fontsize=7,
                          xytext=(5, -3), textcoords="offset points")
        axis.axline((1, 1), slope=1, color="grey", linewidth=0.8)
        axis.set(xscale="log", yscale="log", xlabel="seconds per step by the formula",
                 ylabel="measured", title=("sampling", "update")[phase],
                 xlim=(0.1, 10), ylim=(0.1, 10))
    figure.suptitle("hsd.py, one size changed at a time (blue: fitted, orange: predicted)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def origin(about: dict, P: float, H: float, constants: dict[str, float]) -> str:
    return (
        f"`{about['command']}`, commit {about['commit']}, {about['hardware']}. The base: "
        f"{BASE.B} questions × {BASE.G} responses of {BASE.T} tokens, "
        f"prompts of {P:.0f} and {H:.0f}, width {BASE.D}, four layers, "
        f"vocabulary {BASE.V:,}, one process. Constants: {1e3 * constants['call']:.1f} ms per "
        f"token of the longest response, {constants['sample'] / 1e9:.1f} GFLOP/s in sampling, "
        f"{constants['update'] / 1e9:.1f} in the update.\n\n"
    )


def main(args: Args) -> None:
    P, H = prompt_lengths()
    points = []
    for change in CHANGES:
        size = replace(BASE, P=P, H=H, **change)
        points.append({"change": change, **measure(size, args.steps)})
        print(f"{named(change)}: sampling {points[-1]['sample']:.2f} s, update "
              f"{points[-1]['update']:.2f} s", flush=True)
    constants = fit(points)
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    cores = os.cpu_count() or 1
    about = {
        "command": " ".join(["python benchmarks/scale.py", *sys.argv[1:]]),
        "commit": commit,
        "hardware": f"{cores} CPU cores ({platform.machine()}), one thread per process",
    }
    out = ROOT / "results" / "scale"
    out.mkdir(parents=True, exist_ok=True)
    result = {**about, "constants": constants, "points": points}
    (out / "scale.json").write_text(json.dumps(result, indent=1))
    measured = origin(about, P, H, constants) + table(points, constants, cores)
    heading = "\nArithmetic, not measured: `hsd.py` with Qwen3-8B on H100s (`on_gpus`).\n\n"
    (out / "scale.md").write_text(measured + heading + arithmetic())
    draw(points, constants, cores, out / "scale.png")
    print(table(points, constants, cores))


if __name__ == "__main__":
    main(tyro.cli(Args))
