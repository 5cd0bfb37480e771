"""How close a step is to the machine: seconds and FLOP/s of each part of a method file's step, beside
the machine's own fp32 matrix product in the same run.

    python benchmarks/machine.py                                     # the five files' demos
    python benchmarks/machine.py --name smollm2 --files grpo sdpo \\
        --flags "--model SMOLLM2 --lora_rank 16 --batch_size 4"      # other flags of the files

The parts are timed from outside: this script wraps the functions that do them and runs the file's
own main() in a process of its own. "Teacher" is all that is read without a gradient. Model FLOPs are those of common/work.py: padding and recomputation do
not count. The machine's product is measured before and after, at two sizes: 1,024 × 1,024
matrices, and 2,048 tokens at the model's widths, which its layers can hardly exceed. The first two
steps are a warm-up. Writes results/machine/NAME.json, NAME.md and NAME.png.
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
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

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
from common.work import WORK, cost_of  # noqa: E402

WARM_UP = 2  # steps that do not count
SAMPLE = ("sample: model", "sample: draw")
UPDATE = ("teacher", "student", "head", "backward", "optimizer")
PARTS = (*SAMPLE, "sample: rest", "verify", *UPDATE, "update: rest", "sync")


@dataclass
class Args:
    files: tuple[str, ...] = ("grpo", "rlsd", "sdpo", "hsd", "sdzero")  # method files
    flags: str = ""  # more flags of the files, in one string
    steps: int = 8  # per file, the two warm-up steps included
    threads: int = 1  # CPU threads
    name: str = "chain"  # of the result files


class Clock:
    """Seconds and model FLOPs of the parts of a step, from functions wrapped by `timed`."""

    def __init__(self):
        self.steps: list[tuple[dict, dict]] = []
        self.seconds, self.flops = defaultdict(float), defaultdict(float)

    def end_step(self) -> None:
        self.steps.append((self.seconds, self.flops))
        self.seconds, self.flops = defaultdict(float), defaultdict(float)

    def timed(self, part: str, function: Callable) -> Callable:
        def wrapped(*args, **named):
            start = time.perf_counter()
            try:
                return function(*args, **named)
            finally:
                self.seconds[part] += time.perf_counter() - start
        return wrapped


@contextlib.contextmanager
def watched(clock: Clock, method, model: str):
    """Wrap what the parts are made of; undo it at the end."""
    sampling = cost_of(empty_lm(model))
    decode, draw = HFSampler.logits, sampler_module.draw
    states, count_head, log = Policy.hidden_states, WORK.head, Run.log
    head_loss, token_stats = policy_module.head_loss, policy_module.token_stats

    def logits(sampler, ids, positions, reading):
        held = reading.mask.sum(1).double()  # [B] tokens of each row, those of this call included
        new = torch.ones_like(held) if ids.shape[1] == 1 else held
        pairs = new * (held - new) + new * (new + 1) / 2
        clock.flops["sample: model"] += float(
            new.sum() * sampling.token + pairs.sum() * sampling.pair + len(ids) * sampling.entry
        )
        return clock.timed("sample: model", decode)(sampler, ids, positions, reading)

    def hidden_states(policy, micro):
        forward = micro.tokens * policy.cost.token + micro.pairs * policy.cost.pair
        if not torch.is_grad_enabled():
            clock.flops["teacher"] += forward
            return states(policy, micro)
        clock.flops["student"] += forward
        clock.flops["backward"] += forward * policy.cost.backward
        return clock.timed("student", states)(policy, micro)

    def head(micro, cost, teachers):
        entries = len(micro.targets) * cost.entry
        if torch.is_grad_enabled():
            clock.flops["head"] += entries * (1 + cost.backward + teachers)
        else:
            clock.flops["teacher"] += entries
        count_head(micro, cost, teachers)

    def stats(*args, **named):  # without gradient it is a part of scoring
        if torch.is_grad_enabled():
            return clock.timed("head", token_stats)(*args, **named)
        return token_stats(*args, **named)

    def end_step(run, *args, **named):
        clock.end_step()
        return log(run, *args, **named)

    changes = [
        (HFSampler, "logits", logits),
        (sampler_module, "draw", clock.timed("sample: draw", draw)),
        (Policy, "hidden_states", hidden_states),
        (Policy, "read", clock.timed("teacher", Policy.read)),
        (Policy, "stats", clock.timed("teacher", Policy.stats)),
        (policy_module, "head_loss", clock.timed("head", head_loss)),
        (policy_module, "token_stats", stats),
        (torch.Tensor, "backward", clock.timed("backward", torch.Tensor.backward)),
        (method, "optimizer_step", clock.timed("optimizer", method.optimizer_step)),
        (WORK, "head", head),
        (Run, "log", end_step),
    ]
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    for owner, name, new in changes:
        setattr(owner, name, new)
    try:
        yield
    finally:
        for owner, name, old in kept:
            setattr(owner, name, old)


def measure(file: str, args: Args) -> dict:
    """Seconds and model FLOPs of each part of a step: medians over the steps that count."""
    torch.set_num_threads(args.threads)
    method, clock = importlib.import_module(file), Clock()
    length = ["--steps", str(args.steps)]
    if file == "sdzero":
        length = ["--phase", "sd", "--srt_questions", "64", "--sd_questions", str(64 * args.steps)]
    with tempfile.TemporaryDirectory() as out:
        sys.argv = [f"{file}.py", "--demo", *shlex.split(args.flags), *length, "--out", out, "--name",
                    "run", "--eval_every", "1000000", "--eval_samples", "1", "--save_every", "1000000"]
        settings = parse(method.Args, method.presets)
        quiet = io.StringIO()
        with watched(clock, method, settings.model), contextlib.redirect_stdout(quiet):
            method.main(settings)
        lines = (Path(out) / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    steps = []
    for (seconds, flops), row in zip(clock.steps, rows):
        if "time/update" not in row or "time/sample" not in row:
            continue
        sample, update = row["time/sample"], row["time/update"] + row.get("time/score", 0.0)
        seconds["sample: rest"] = sample - sum(seconds[part] for part in SAMPLE)
        seconds["update: rest"] = update - sum(seconds[part] for part in UPDATE)
        seconds["verify"], seconds["sync"] = row["time/verify"], row.get("time/sync", 0.0)
        steps.append((seconds, flops, row.get("padding/share", 0.0)))
    steps = steps[WARM_UP:]
    return {
        "seconds": {p: statistics.median(s[p] for s, _, _ in steps) for p in PARTS},
        "flops": {p: statistics.median(f[p] for _, f, _ in steps) for p in PARTS},
        "padding": statistics.median(share for _, _, share in steps),
    }


def product(m: int, k: int, n: int) -> float:
    """FLOP/s of an [m, k]·[k, n] product in fp32: the best of several."""
    a, b = torch.randn(m, k), torch.randn(k, n)
    best = 0.0
    for _ in range(12):
        start = time.perf_counter()
        a @ b
        best = max(best, 2 * m * k * n / (time.perf_counter() - start))
    return best


def products(model: str) -> dict[str, float]:
    config = AutoConfig.from_pretrained(model).get_text_config()
    return {
        "1,024 × 1,024": product(1024, 1024, 1024),
        "at the model's widths": product(2048, config.hidden_size, config.intermediate_size),
    }


def table(found: dict, machine: dict[str, float]) -> str:
    """One column per file: seconds of a part, and its FLOP/s over the machine's product."""
    files = list(found)
    most = machine["1,024 × 1,024"]
    lines = ["| part | " + " | ".join(f"{file}.py" for file in files) + " |", "|---|" + "---|" * len(files)]
    for part in PARTS:
        cells = []
        for file in files:
            seconds, flops = found[file]["seconds"][part], found[file]["flops"][part]
            share = f" ({flops / seconds / most:.0%})" if flops and seconds else ""
            cells.append(f"{seconds:.3f}{share}" if seconds >= 5e-4 else "–")
        lines.append(f"| {part} | " + " | ".join(cells) + " |")
    whole, padding = [], []
    for file in files:
        seconds = sum(found[file]["seconds"].values())
        whole.append(f"**{seconds:.2f} ({sum(found[file]['flops'].values()) / seconds / most:.0%})**")
        padding.append(f"{found[file]['padding']:.0%}")
    lines += ["| whole step | " + " | ".join(whole) + " |",
              "| padding, of the tokens read in the update | " + " | ".join(padding) + " |"]
    return "\n".join(lines) + "\n"


def draw(found: dict, path: Path) -> None:
    figure, axis = plt.subplots(figsize=(8, 0.7 * len(found) + 2), layout="constrained")
    colours = plt.get_cmap("tab20").colors
    left = dict.fromkeys(found, 0.0)
    for part, colour in zip(PARTS, colours):
        widths = [found[file]["seconds"][part] for file in found]
        axis.barh(list(left), widths, left=list(left.values()), label=part, color=colour)
        left = {file: at + width for (file, at), width in zip(left.items(), widths)}
    axis.invert_yaxis()
    axis.set(xlabel="seconds per step", title="where the time of a step goes")
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(args: Args) -> None:
    torch.set_num_threads(args.threads)
    words = shlex.split(args.flags)
    model = words[words.index("--model") + 1] if "--model" in words else "assets/chain"
    typed = shlex.join(sys.argv[1:]).replace(model, "MODEL")  # the reader's path is another
    before, found = products(model), {}
    for file in args.files:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # a fresh process
            found[file] = pool.submit(measure, file, args).result()
        print(f"{file}: {sum(found[file]['seconds'].values()):.2f} s per step", flush=True)
    machine = {name: max(rate, before[name]) for name, rate in products(model).items()}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    hardware = f"{os.cpu_count()} CPU cores ({platform.machine()}), {args.threads} thread(s)"
    command = f"python benchmarks/machine.py {typed}"
    about = {"command": command, "commit": commit.stdout.strip(), "hardware": hardware}
    rates = ", ".join(f"{name}: {rate / 1e9:.0f} GFLOP/s" for name, rate in machine.items())
    said = (f"`{command}`, {hardware}. Seconds per step (median); in brackets the model FLOP/s over the "
            f"machine's own product of 1,024 × 1,024 matrices. The machine's products: {rates}.\n\n")
    out = ROOT / "results" / "machine"
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{args.name}.json").write_text(json.dumps({**about, "machine": machine, "files": found}, indent=1))
    (out / f"{args.name}.md").write_text(said + table(found, machine))
    draw(found, out / f"{args.name}.png")
    print(table(found, machine))


if __name__ == "__main__":
    main(tyro.cli(Args))
