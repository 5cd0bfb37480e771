"""How close a step is to the machine: seconds and FLOP/s of each part of a method file's step.

    python benchmarks/machine.py                                     # the five files' demos
    python benchmarks/machine.py --name smollm2 --files grpo sdpo \\
        --flags "--model SMOLLM2 --lora_rank 16 --batch_size 4"      # other flags of the files

The parts are timed from outside: this script wraps the functions that do them and runs the method
file's own main() in a process of its own. "teacher" is all that is read without a gradient. Model
FLOPs are those of common/work.py: padding and recomputation do not count.

The machine's own fp32 matrix product is measured in the same run, before and after, at two sizes:
1,024 × 1,024 matrices, and 2,048 tokens at the model's widths, which its layers can hardly exceed.
The first two steps are a warm-up. Writes results/machine/NAME.json, NAME.md and NAME.png.
"""
from __future__ import annotations

import contextlib
import importlib
import io
import json
import multiprocessing
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import matplotlib  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402
import tyro  # noqa: E402
from transformers import AutoConfig  # noqa: E402

from common import policy as policy_module  # noqa: E402
from common import sampler as sampler_module  # noqa: E402
from common.architecture import empty_lm  # noqa: E402
from common.policy import Policy  # noqa: E402
from common.run import Run  # noqa: E402
from common.sampler import HFSampler  # noqa: E402
from common.settings import parse  # noqa: E402
from common.work import WORK, Cost, cost_of  # noqa: E402

WARM_UP = 2  # steps that do not count
SAMPLE = ("sample: model", "sample: draw")
UPDATE = ("teacher", "student", "head", "backward", "optimizer")
PARTS = (*SAMPLE, "sample: rest", "verify", *UPDATE, "update: rest", "sync")
SQUARE = "1,024 × 1,024"  # the product that a part's FLOP/s are compared with


@dataclass
class Args:
    files: tuple[str, ...] = ("grpo", "rlsd", "sdpo", "hsd", "sdzero")  # method files
    flags: str = ""  # more flags of the files, in one string
    steps: int = 8  # per file, the two warm-up steps included
    threads: int = 1  # CPU threads
    name: str = "chain"  # of the result files


# --------------------------------------------------------------------------------------------------
# watching a run
# --------------------------------------------------------------------------------------------------
class Clock:
    """Seconds and model FLOPs of the parts of each step."""

    def __init__(self):
        self.steps: list[tuple[dict, dict]] = []
        self.begin_step()

    def begin_step(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.flops: dict[str, float] = defaultdict(float)

    def end_step(self) -> None:
        self.steps.append((self.seconds, self.flops))
        self.begin_step()

    def timed(self, part: str, function: Callable) -> Callable:
        """`function`, whose seconds are added to those of `part`."""
        def wrapped(*args, **named):
            start = time.perf_counter()
            try:
                return function(*args, **named)
            finally:
                self.seconds[part] += time.perf_counter() - start

        return wrapped


@contextlib.contextmanager
def watched(clock: Clock, method, model: str) -> Iterator[None]:
    """Wrap what the parts are made of; undo it at the end."""
    cost = cost_of(empty_lm(model))
    changes = [
        (HFSampler, "logits", watched_decoding(clock, HFSampler.logits, cost)),
        (sampler_module, "draw", clock.timed("sample: draw", sampler_module.draw)),
        (Policy, "hidden_states", watched_layers(clock, Policy.hidden_states)),
        (Policy, "read", clock.timed("teacher", Policy.read)),
        (Policy, "stats", clock.timed("teacher", Policy.stats)),
        (policy_module, "head_loss", clock.timed("head", policy_module.head_loss)),
        (policy_module, "token_stats", watched_stats(clock, policy_module.token_stats)),
        (torch.Tensor, "backward", clock.timed("backward", torch.Tensor.backward)),
        (method, "optimizer_step", clock.timed("optimizer", method.optimizer_step)),
        (WORK, "head", watched_head(clock, WORK.head)),
        (Run, "log", watched_log(clock, Run.log)),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, new in changes:
            stack.enter_context(mock.patch.object(owner, name, new))
        yield


def watched_decoding(clock: Clock, decode: Callable, cost: Cost) -> Callable:
    timed = clock.timed("sample: model", decode)

    def logits(sampler, ids, positions, reading):
        held = reading.mask.sum(1).double()  # [B] tokens of each row, those of this call included
        new = held
        if ids.shape[1] == 1:
            new = torch.ones_like(held)
        pairs = new * (held - new) + new * (new + 1) / 2
        layers = new.sum() * cost.token + pairs.sum() * cost.pair
        clock.flops["sample: model"] += float(layers + len(ids) * cost.entry)
        return timed(sampler, ids, positions, reading)

    return logits


def watched_layers(clock: Clock, hidden_states: Callable) -> Callable:
    timed = clock.timed("student", hidden_states)

    def layers(policy, micro):
        forward = micro.tokens * policy.cost.token + micro.pairs * policy.cost.pair
        if not torch.is_grad_enabled():
            clock.flops["teacher"] += forward
            return hidden_states(policy, micro)  # Policy.read is timed as a whole
        clock.flops["student"] += forward
        clock.flops["backward"] += forward * policy.cost.backward
        return timed(policy, micro)

    return layers


def watched_head(clock: Clock, count_head: Callable) -> Callable:
    def head(micro, cost, teachers):
        entries = len(micro.targets) * cost.entry
        if torch.is_grad_enabled():
            clock.flops["head"] += entries * (1 + cost.backward + teachers)
        else:
            clock.flops["teacher"] += entries
        count_head(micro, cost, teachers)

    return head


def watched_stats(clock: Clock, token_stats: Callable) -> Callable:
    timed = clock.timed("head", token_stats)

    def stats(*args, **named):
        if not torch.is_grad_enabled():
            return token_stats(*args, **named)  # Policy.stats is timed as a whole
        return timed(*args, **named)

    return stats


def watched_log(clock: Clock, log: Callable) -> Callable:
    def end_step(run, *args, **named):
        clock.end_step()
        return log(run, *args, **named)

    return end_step


# --------------------------------------------------------------------------------------------------
# measuring
# --------------------------------------------------------------------------------------------------
class Step(NamedTuple):
    seconds: dict[str, float]  # of each of PARTS
    flops: dict[str, float]
    padding: float  # share of the tokens read in the update


def measure(file: str, args: Args) -> dict:
    """Seconds and model FLOPs of each part of a step: medians over the steps that count."""
    torch.set_num_threads(args.threads)
    method, clock = importlib.import_module(file), Clock()
    with tempfile.TemporaryDirectory() as out:
        sys.argv = command_of(file, out, args)
        settings = parse(method.Args, method.presets)
        quiet = io.StringIO()
        with watched(clock, method, settings.model), contextlib.redirect_stdout(quiet):
            method.main(settings)
        lines = (Path(out) / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    steps = updates_of(clock, rows)[WARM_UP:]
    seconds, flops = {}, {}
    for part in PARTS:
        seconds[part] = statistics.median(step.seconds[part] for step in steps)
        flops[part] = statistics.median(step.flops[part] for step in steps)
    padding = statistics.median(step.padding for step in steps)
    return {"seconds": seconds, "flops": flops, "padding": padding}


def command_of(file: str, out: str, args: Args) -> list[str]:
    length = ["--steps", str(args.steps)]
    if file == "sdzero":
        questions = str(64 * args.steps)
        length = ["--phase", "sd", "--srt_questions", "64", "--sd_questions", questions]
    return [
        f"{file}.py", "--demo", *shlex.split(args.flags), *length, "--out", out, "--name", "run",
        "--eval_every", "1000000", "--eval_samples", "1", "--save_every", "1000000",
    ]


def updates_of(clock: Clock, rows: list[dict]) -> list[Step]:
    """The steps that sampled and updated. rows: the run's own metrics, which time whole phases."""
    steps = []
    for (seconds, flops), row in zip(clock.steps, rows):
        if "time/update" not in row or "time/sample" not in row:
            continue
        update = row["time/update"] + row.get("time/score", 0.0)
        seconds["sample: rest"] = row["time/sample"] - sum(seconds[part] for part in SAMPLE)
        seconds["update: rest"] = update - sum(seconds[part] for part in UPDATE)
        seconds["verify"] = row["time/verify"]
        seconds["sync"] = row.get("time/sync", 0.0)
        steps.append(Step(seconds, flops, row.get("padding/share", 0.0)))
    return steps


def products(model: str) -> dict[str, float]:
    """FLOP/s of the machine's matrix product, by size."""
    config = AutoConfig.from_pretrained(model).get_text_config()
    return {
        SQUARE: product(1024, 1024, 1024),
        "at the model's widths": product(2048, config.hidden_size, config.intermediate_size),
    }


def product(m: int, k: int, n: int) -> float:
    """FLOP/s of an [m, k]·[k, n] product in fp32: the best of several."""
    a, b = torch.randn(m, k), torch.randn(k, n)
    best = 0.0
    for _ in range(12):
        start = time.perf_counter()
        a @ b
        seconds = time.perf_counter() - start
        best = max(best, 2 * m * k * n / seconds)
    return best


# --------------------------------------------------------------------------------------------------
# writing
# --------------------------------------------------------------------------------------------------
def table(found: dict, machine: dict[str, float]) -> str:
    """One column per file: seconds of a part, and its FLOP/s over the machine's product."""
    results, most = found.values(), machine[SQUARE]
    lines = [row_of("part", [f"{file}.py" for file in found]), "|---|" + "---|" * len(found)]
    for part in PARTS:
        cells = [cell(r["seconds"][part], r["flops"][part], most) for r in results]
        lines.append(row_of(part, cells))
    whole = []
    for r in results:
        seconds, flops = sum(r["seconds"].values()), sum(r["flops"].values())
        whole.append(f"**{seconds:.2f} ({flops / seconds / most:.0%})**")
    padding = [f"{r['padding']:.0%}" for r in results]
    lines.append(row_of("whole step", whole))
    lines.append(row_of("padding, of the tokens read in the update", padding))
    return "\n".join(lines) + "\n"


def row_of(name: str, cells: list[str]) -> str:
    return f"| {name} | " + " | ".join(cells) + " |"


def cell(seconds: float, flops: float, most: float) -> str:
    if seconds < 5e-4:
        return "–"
    if flops == 0:
        return f"{seconds:.3f}"
    return f"{seconds:.3f} ({flops / seconds / most:.0%})"


def draw(found: dict, path: Path) -> None:
    figure, axis = plt.subplots(figsize=(8, 0.7 * len(found) + 2), layout="constrained")
    colours = plt.get_cmap("tab20").colors
    left = dict.fromkeys(found, 0.0)  # file → the seconds of the parts that are drawn
    for part, colour in zip(PARTS, colours):
        widths = [found[file]["seconds"][part] for file in found]
        axis.barh(list(left), widths, left=list(left.values()), label=part, color=colour)
        for file, width in zip(found, widths):
            left[file] += width
    axis.invert_yaxis()
    axis.set(xlabel="seconds per step", title="where the time of a step goes")
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write(found: dict, machine: dict[str, float], typed: str, args: Args) -> None:
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True,
                          text=True)
    command = f"python benchmarks/machine.py {typed}"
    hardware = f"{os.cpu_count()} CPU cores ({platform.machine()}), {args.threads} thread(s)"
    result = {"command": command, "commit": head.stdout.strip(), "hardware": hardware,
              "machine": machine, "files": found}
    rates = ", ".join(f"{name}: {rate / 1e9:.0f} GFLOP/s" for name, rate in machine.items())
    said = (f"`{command}`, {hardware}. Seconds per step (median); in brackets the model FLOP/s "
            f"over the machine's own product of {SQUARE} matrices. The machine's products: "
            f"{rates}.\n\n")
    out = ROOT / "results" / "machine"
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{args.name}.json").write_text(json.dumps(result, indent=1))
    (out / f"{args.name}.md").write_text(said + table(found, machine))
    draw(found, out / f"{args.name}.png")


def main(args: Args) -> None:
    torch.set_num_threads(args.threads)
    words = shlex.split(args.flags)
    model = "assets/chain"
    if "--model" in words:
        model = words[words.index("--model") + 1]
    typed = shlex.join(sys.argv[1:]).replace(model, "MODEL")  # the reader's path is another
    before = products(model)
    found = {}
    for file in args.files:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh_process:
            found[file] = fresh_process.submit(measure, file, args).result()
        print(f"{file}: {sum(found[file]['seconds'].values()):.2f} s per step", flush=True)
    after = products(model)
    machine = {size: max(rate, before[size]) for size, rate in after.items()}
    write(found, machine, typed, args)
    print(table(found, machine))


if __name__ == "__main__":
    main(tyro.cli(Args))
