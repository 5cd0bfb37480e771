"""Memory of a training process: what is measured on a CPU, and what arithmetic says of larger models and GPUs.

    python benchmarks/memory.py --model SMOLLM2 --data_dir DATA       # peak resident memory, five minutes on two CPU cores
    python benchmarks/memory.py --fits                                # the table of docs/memory.md, by arithmetic alone

Measured: two steps of hsd.py with a frozen teacher on a small batch, for each setting in RUNS in a process of its own:
its peak resident memory before the first checkpoint. Beside it the arithmetic for the same setting: 4 bytes a parameter
for the policy, 4 for its gradient, 8 for the moments, 4 for the teacher, 4 for the sampler's copy (fp32 on a CPU),
without activations, code and libraries. Writes results/memory/NAME.{json,md}.
"""
from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.tasks import load_task

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
RUNS = {
    "all weights": [],
    "all weights, checkpointing": ["--checkpointing"],
    "LoRA of rank 16": ["--lora_rank", "16"],
    "LoRA of rank 16, checkpointing": ["--lora_rank", "16", "--checkpointing"],
}


@dataclass
class Args:
    model: str = ""
    """folder of the model that is measured"""
    data_dir: str = ""
    """folder that gsm8k is read from"""
    name: str = "smollm2"
    """of the result files"""
    rounds: int = 1
    """runs of each setting"""
    fits: bool = False
    """print the table of docs/memory.md instead"""


class Shape(NamedTuple):
    """Of a dense decoder, as its config.json says."""

    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool

    @property
    def linear(self) -> list[tuple[int, int]]:
        """[in, out] of the linear layers of a decoder layer."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return [(self.width, q), (self.width, kv), (self.width, kv), (q, self.width),
                (self.width, self.inner), (self.width, self.inner), (self.inner, self.width)]

    @property
    def layer(self) -> int:
        return sum(a * b for a, b in self.linear)

    @property
    def root(self) -> int:
        """Parameters outside the layers: embeddings and head."""
        return self.vocab * self.width * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        return self.layers * self.layer + self.root

    def adapters(self, rank: int) -> int:
        return self.layers * sum(rank * (a + b) for a, b in self.linear)


def states(model: Shape, *, rank: int = 0, moments: int = 8, copies: int = 0, base: int = 4) -> int:
    """Bytes of weights, gradients, moments and `copies` of teachers and references. base: bytes of a frozen weight."""
    if rank:
        return base * model.parameters + (4 + 4 + moments + 4 * copies) * model.adapters(rank)
    return (4 + 4 + moments + 4 * copies) * model.parameters


# ---------------------------------------------------------------------------------------------------------------------
# arithmetic: which settings fit
# ---------------------------------------------------------------------------------------------------------------------
QWEN3 = {
    "0.6B": Shape(28, 1024, 3072, 16, 8, 128, 151936, True), "1.7B": Shape(28, 2048, 6144, 16, 8, 128, 151936, True),
    "4B": Shape(36, 2560, 9728, 32, 8, 128, 151936, True), "8B": Shape(36, 4096, 12288, 32, 8, 128, 151936, False),
    "14B": Shape(40, 5120, 17408, 40, 8, 128, 151936, False), "32B": Shape(64, 5120, 25600, 64, 8, 128, 151936, False),
}
MACHINES = {"1 × 24 GB": (1, 24e9), "1 × 80 GB": (1, 80e9), "8 × 80 GB": (8, 80e9), "8 × 141 GB": (8, 141e9)}
STATES = {  # from the least compromise to the most; all with a frozen teacher or a reference beside the policy
    "": {},
    "--lora_rank 32": dict(rank=32, base=2),
}
BATCHES = {"": dict(), "--sampler_rows 8 --token_budget 4096": dict(rows=8, tokens=4096)}  # the first: 32 and 8192
LENGTH, ROOM = 4096, 0.9  # prompt and response in tokens; the share of the memory that is planned with


def update_bytes(model: Shape, world: int, state: dict, tokens: int) -> float:
    """On one GPU during the update, with --checkpointing and the sampler asleep."""
    gathered = 2 * (model.root + 2 * model.layer)  # bf16: embeddings and head, and two layers at a time
    activations = 2 * tokens * model.width * model.layers + 34 * tokens * model.width  # layer inputs, and one layer whole
    head = 2 * 640 * 2**20 + 4 * 1024 * model.vocab * 2  # fp32 logits of policy and teacher, bf16 gradients of four chunks
    head += 0 if state.get("rank") else 6 * model.vocab * model.width  # the head's gradient in fp32, then in bf16
    return states(model, copies=1, **state) / world + gathered + activations + head


def sampling_bytes(model: Shape, world: int, state: dict, rows: int, shared: int) -> float:
    """On one GPU while it samples: what stays of the training, and its share of the sampler's bf16 copy and KV cache."""
    cache = rows * LENGTH * 2 * 2 * model.layers * model.kv_heads * model.head_dim
    return states(model, copies=1, **state) / world + (2 * model.parameters + cache) / shared


def first_that_fits(model: Shape, world: int, memory: float) -> str:
    for (kept, state), (cut, batch), shared in product(STATES.items(), BATCHES.items(), (1, 8) if world == 8 else (1,)):
        need = max(update_bytes(model, world, state, batch.get("tokens", 8192)),
                   sampling_bytes(model, world, state, batch.get("rows", 32), shared))
        if need < ROOM * memory:
            flags = " ".join(filter(None, (kept, cut, f"--tensor_parallel {shared}" if shared > 1 else "")))
            return f"{f'`{flags}`' if flags else 'no further flag'}: {need / 1e9:.0f} GB"
    return "–"


def fits() -> str:
    lines = ["| model | " + " | ".join(MACHINES) + " |", "|---|" + "---|" * len(MACHINES)]
    for name, model in QWEN3.items():
        cells = [first_that_fits(model, *machine) for machine in MACHINES.values()]
        lines.append(f"| Qwen3-{name} ({model.parameters / 1e9:.2f}B) | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# measured on a CPU
# ---------------------------------------------------------------------------------------------------------------------
COMMON = ["--teacher", "frozen", "--beta", "0", "--context", "answer", "--heldout", "2", "--batch_size", "2", "--group_size",
          "2", "--max_tokens", "24", "--token_budget", "1200", "--eval_every", "1000000", "--steps", "2"]


def peak(args: Args, flags: list[str]) -> float:
    """GiB of resident memory at most, up to the last update."""
    with tempfile.TemporaryDirectory() as out:
        few = Path(out) / "gsm8k.jsonl"  # checking the references of all would take longer than the run
        few.write_text("".join(json.dumps({"question": p.messages[-1]["content"], "answer": p.answer}) + "\n"
                               for p in load_task("gsm8k", heldout=1, data_dir=args.data_dir).train[:32]))
        command = [sys.executable, "hsd.py", "--model", args.model, "--task", f"jsonl:{few}", "--instruction", "", *COMMON,
                   *flags, "--out", out, "--name", "run"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        rows = [json.loads(line) for line in (Path(out) / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[1]["grad_norm"] > 0
    return rows[1]["peak_gib"]


def shape_of(folder: str) -> Shape:
    c = json.loads((Path(folder) / "config.json").read_text())
    head_dim = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    return Shape(c["num_hidden_layers"], c["hidden_size"], c["intermediate_size"], c["num_attention_heads"],
                 c["num_key_value_heads"], head_dim, c["vocab_size"], c.get("tie_word_embeddings", False))


def main(args: Args) -> None:
    if args.fits:
        return print(fits())
    model = shape_of(args.model)
    bare = subprocess.run([sys.executable, "-c", "import hsd, resource; print(resource.getrusage(resource.RUSAGE_SELF)"
                           ".ru_maxrss / 2**20)"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    rows = {}
    for name, flags in [run for _ in range(args.rounds) for run in RUNS.items()]:
        rank = 16 if "--lora_rank" in flags else 0
        row = rows.setdefault(name, {"flags": " ".join(flags), "peak_gib": []})
        row["arithmetic_gib"] = (states(model, rank=rank, copies=1) + 4 * model.parameters) / GIB
        row["peak_gib"].append(peak(args, flags))
        print(f"{name:36s} {row['peak_gib'][-1]:.2f} GiB, arithmetic {row['arithmetic_gib']:.2f}", flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    result = {"command": "python benchmarks/memory.py --model MODEL --data_dir DATA", "commit": commit.strip(),
              "runs": "python hsd.py --model MODEL --task jsonl:32_QUESTIONS_OF_GSM8K " + " ".join(COMMON),
              "hardware": f"{os.cpu_count()} CPU cores ({platform.machine()})", "parameters": model.parameters,
              "adapters_of_rank_16": model.adapters(16), "code_and_libraries_gib": float(bare),
              "args": {k: v for k, v in asdict(args).items() if k not in ("model", "data_dir")}, "rows": rows}
    path = ROOT / "results" / "memory" / f"{args.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1))
    lines = [f"`{result['command']}`, commit {result['commit']}, {result['hardware']}. {model.parameters / 1e6:.0f}M parameters "
             f"in fp32, with a frozen teacher and the sampler's copy. Code and libraries alone: {float(bare):.2f} GiB. Each run: "
             f"`{result['runs']}` and the flags of its row.", "",
             "| setting | flags | peak resident memory, GiB (each run) | arithmetic, GiB | peak without arithmetic, code and "
             "libraries |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        rest = min(row["peak_gib"]) - row["arithmetic_gib"] - float(bare)
        lines.append(f"| {name} | `{row['flags'] or '–'}` | {', '.join(f'{x:.2f}' for x in row['peak_gib'])} | "
                     f"{row['arithmetic_gib']:.2f} | {rest:.2f} |")
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main(tyro.cli(Args))
