"""Memory: what is counted of large models on GPUs, and what was measured of a small one on a CPU.

    python benchmarks/memory.py --count                               # counted: no weights, no GPU; needs g++
    python benchmarks/memory.py --model SMOLLM2 --data_dir DATA       # measured: peak resident memory on a CPU

Counted, into results/memory/counted.json: the bytes that autograd keeps per token and layer (saved-tensor hooks); the bytes
that are alive in an update over pretended ranks (tests/cuda/live.py), beside the sum that --dry_run makes
(common/memory.py); and which settings fit which GPUs by that sum. Both are counted with 3 and with 4 layers and continued: all
layers are the same, so bytes are linear in their number. One case is counted with 8 layers too and held against that.

Measured, into results/memory/NAME.{json,md}: two steps of hsd.py with a frozen teacher on a small batch, for each setting in
RUNS in a process of its own, its peak resident memory before the first checkpoint. Beside it the part that is arithmetic.
"""
from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from common import memory
from common.architecture import empty_lm
from common.memory import activations as run_without_data
from common.policy import Policy, add_adapters
from common.tasks import load_task

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
RUNS = {
    "all weights": ["--no-checkpointing"],
    "all weights, checkpointing": ["--checkpointing"],
    "LoRA of rank 16": ["--lora_rank", "16", "--no-checkpointing"],
    "LoRA of rank 16, checkpointing": ["--lora_rank", "16", "--checkpointing"],
}


@dataclass
class Args:
    count: bool = False  # count, and measure nothing
    model: str = ""  # folder of the model that is measured
    data_dir: str = ""  # folder that gsm8k is read from
    name: str = "smollm2"  # of the result files
    rounds: int = 1  # runs of each setting


# ---------------------------------------------------------------------------------------------------------------------
# counted: the Qwen3 models by their published shapes
# ---------------------------------------------------------------------------------------------------------------------
QWEN3 = {  # layers, width, width within the MLP, heads, whether the head is the embedding
    "0.6B": (28, 1024, 3072, 16, True), "1.7B": (28, 2048, 6144, 16, True), "4B": (36, 2560, 9728, 32, True),
    "8B": (36, 4096, 12288, 32, False), "14B": (40, 5120, 17408, 40, False), "32B": (64, 5120, 25600, 64, False),
}


def config_of(name: str, layers: int = 0) -> Qwen3Config:
    depth, width, inner, heads, tied = QWEN3[name]
    return Qwen3Config(
        num_hidden_layers=layers or depth, hidden_size=width, intermediate_size=inner, num_attention_heads=heads,
        num_key_value_heads=8, head_dim=128, vocab_size=151936, tie_word_embeddings=tied, max_position_embeddings=40960,
    )


def lm_of(name: str, layers: int = 0) -> PreTrainedModel:
    """Without its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config_of(name, layers))


def linear(three: dict | tuple, four: dict | tuple, layers: int):
    """What was counted with 3 and with 4 layers, with `layers`."""
    if isinstance(three, dict):
        return {key: linear(three[key], four[key], layers) for key in three}
    if isinstance(three, tuple):
        make = getattr(three, "_make", tuple)
        return make(linear(a, b, layers) for a, b in zip(three, four))
    return three + (layers - 3) * (four - three)


def kept(name: str, layers: int, tokens: int) -> int:
    """Bytes of the tensors that autograd keeps of `tokens` tokens, weights apart, by saved-tensor hooks."""
    lm = lm_of(name, layers).bfloat16()
    weights = {p.untyped_storage()._cdata for p in lm.parameters()}
    storages = {}  # by identity: a view keeps the whole

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in weights:
            storages[storage._cdata] = storage
        return x

    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    with memory.flash_attention(), memory.Ledger("meta"), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        lm.base_model(input_ids=ids, use_cache=False)
    return sum(storage.nbytes() for storage in storages.values())


def kept_per_token(name: str) -> dict:
    """Per token and layer, with and without checkpointing."""
    tokens = 4096
    whole = (kept(name, 4, tokens) - kept(name, 3, tokens)) / tokens
    inputs = [memory.activations(lm_of(name, layers), memory.Load(tokens, tokens, 1, 0, False, True))[0] for layers in (3, 4)]
    width = QWEN3[name][1]
    return {"all": whole, "all_per_width": round(whole / width, 1), "checkpointing": (inputs[1] - inputs[0]) / tokens}


# ---------------------------------------------------------------------------------------------------------------------
# counted: whole updates, beside the sum
# ---------------------------------------------------------------------------------------------------------------------
BASE = dict(ranks=8, tokens=16384, longest=8192, copies=1, teacher=True, checkpointing=True)
CASES = [
    *({"model": name} | BASE for name in QWEN3),
    {"model": "8B"} | BASE | {"checkpointing": False},
    {"model": "8B"} | BASE | {"copies": 0},
    {"model": "8B"} | BASE | {"lora_rank": 32},
    {"model": "32B"} | BASE | {"ranks": 32},
    {"model": "0.6B"} | BASE | {"ranks": 1, "tokens": 4096, "longest": 2048, "copies": 0, "teacher": False},
    {"model": "4B"} | BASE | {"ranks": 1, "tokens": 4096, "longest": 2048, "lora_rank": 32, "copies": 0, "teacher": False},
    {"model": "8B"} | BASE | {"ranks": 1, "lora_rank": 32},
]


@cache
def activations(model: str, layers: int, rank: int, tokens: int, longest: int, checkpointing: bool) -> tuple[int, int]:
    return run_without_data(adapted(model, layers, rank), memory.Load(tokens, longest, 1, 0, False, checkpointing))


def adapted(model: str, layers: int, rank: int) -> PreTrainedModel:
    lm = lm_of(model, layers)
    if rank:
        add_adapters(Policy(lm), rank, 32.0)
    return lm


def summed(case: dict) -> memory.Count:
    """The sum of common/memory.py, with all layers."""
    names = ("tokens", "longest", "copies", "teacher", "checkpointing", "rows", "sampled", "vllm", "tensor_parallel")
    load = memory.Load(shards=case["ranks"], **{name: case[name] for name in names if name in case})
    model, rank = case["model"], case.get("lora_rank", 0)
    few = []
    for layers in (3, 4):
        kept = activations(model, layers, rank, load.tokens, load.longest, load.checkpointing)
        few.append(memory.count(adapted(model, layers, rank), load, kept))
    return linear(*few, QWEN3[model][0])


def live(cases: list[dict]) -> list[dict]:
    """Bytes at most in the phases of an update of each case, on pretended ranks."""
    command = [sys.executable, "tests/cuda/live.py", *map(json.dumps, cases)]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return [json.loads(row) for row in done.stdout.splitlines() if row.startswith("{")]


def updates() -> list[dict]:
    eight = {"model": "0.6B", "layers": 8} | BASE
    counted = live([eight, *(case | {"layers": layers} for case in CASES for layers in (3, 4))])
    rows = []
    for case, three, four in zip(CASES, counted[1::2], counted[2::2]):
        layers = QWEN3[case["model"]][0]
        phases = linear(three, four, layers)
        if case | {"layers": 8} == eight:
            assert linear(three, four, 8) == counted[0], (three, four, counted[0])
        c = summed(case)
        by_sum = c.weights + c.copies + c.update
        rows.append(case | {"live_gib": {name: round(size / GIB, 2) for name, size in phases.items()},
                            "peak_gib": round(max(phases.values()) / GIB, 2), "sum_gib": round(by_sum / GIB, 2)})
        print(rows[-1], flush=True)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# counted: which settings fit
# ---------------------------------------------------------------------------------------------------------------------
MACHINES = {"1 × 24 GB": (1, 24), "1 × 80 GB": (1, 80), "8 × 80 GB": (8, 80), "8 × 141 GB": (8, 141)}
STATES = {"": {}, "--lora_rank 32": {"lora_rank": 32}}
BATCHES = {  # from the defaults down
    "": {"tokens": 16384, "share": 0.6},
    "--token_budget 8192 --vllm_memory 0.4": {"tokens": 8192, "share": 0.4},
    "--token_budget 4096 --vllm_memory 0.3": {"tokens": 4096, "share": 0.3},
}
LENGTH, ROWS = 4608, 8  # tokens of a prompt and response; rows that vLLM must have room for


def first_that_fits(name: str, ranks: int, gib: int) -> str:
    for (kept_apart, state), (cut, batch), parallel in product(STATES.items(), BATCHES.items(), sorted({1, ranks})):
        vllm = int(batch["share"] * gib * GIB)
        case = {"model": name} | BASE | state | {"ranks": ranks, "tokens": batch["tokens"], "longest": batch["tokens"] // 2,
                                                 "sampled": LENGTH, "vllm": vllm, "tensor_parallel": parallel}
        c = summed(case)
        layers = QWEN3[name][0]
        parameters = linear(*(memory.sizes(lm_of(name, few)).all for few in (3, 4)), layers)
        cache = ROWS * LENGTH * 2 * 2 * 8 * 128 * layers
        if c.peak <= memory.ROOM * gib * GIB and vllm * parallel >= 2 * parameters + cache:
            flags = " ".join(filter(None, (kept_apart, cut, f"--tensor_parallel {parallel}" if parallel > 1 else "")))
            return f"{f'`{flags}`' if flags else 'as it stands'}: {c.peak / GIB:.0f}"
    return "–"


def fits() -> list[list[str]]:
    return [[f"Qwen3-{name}", *(first_that_fits(name, *machine) for machine in MACHINES.values())] for name in QWEN3]


def tables(result: dict) -> str:
    """The tables of docs/memory.md."""
    lines = ["| | all activations kept | per width | `--checkpointing` |", "|---|---|---|---|"]
    for name, row in result["kept"].items():
        lines.append(f"| Qwen3-{name} | {row['all']:,.0f} | {row['all_per_width']} | {row['checkpointing']:,.0f} |")
    lines += ["", "| Qwen3 | GPUs | tokens | | at most, GiB | in which phase | the sum of `--dry_run` |", "|---|---|---|---|---|---|---|"]
    for row in result["updates"]:
        told = [f"`--lora_rank {row['lora_rank']}`"] if "lora_rank" in row else []
        told += [] if row["checkpointing"] else ["`--no-checkpointing`"]
        told += ["teacher" if row["copies"] else "live teacher"] if row["teacher"] else ["no teacher"]
        phase = max(row["live_gib"], key=row["live_gib"].get)
        lines.append(f"| {row['model']} | {row['ranks']} | {row['tokens']:,} | {', '.join(told)} | {row['peak_gib']:.1f} | "
                     f"{phase} | {row['sum_gib']:.1f} |")
    lines += ["", "| model | " + " | ".join(MACHINES) + " |", "|---|" + "---|" * len(MACHINES)]
    lines += ["| " + " | ".join(row) + " |" for row in result["fits"]]
    return "\n".join(lines)


def counted() -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    result = {
        "command": "python benchmarks/memory.py --count", "commit": commit.strip(), "versions": versions,
        "how": "counted on a CPU, not measured on a GPU",
        "kept": {name: kept_per_token(name) for name in QWEN3}, "fits": fits(), "updates": updates(),
    }
    path = ROOT / "results" / "memory" / "counted.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    path.with_suffix(".md").write_text(f"`{result['command']}`, commit {result['commit']}, {result['how']}.\n\n{tables(result)}\n")
    print(tables(result))


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


def arithmetic(model: str, rank: int) -> int:
    """Bytes of weights, gradient, moments, teacher and what the sampler owns, all in fp32."""
    lm = empty_lm(model)
    if rank:
        add_adapters(Policy(lm), rank, 32.0)
    c = memory.count(lm, memory.Load(64, 64, 1, 1, True, True, rows=1, sampled=64, device="cpu"), (0, 0))
    return c.weights + c.copies + c.sampler


def main(args: Args) -> None:
    if args.count:
        return counted()
    bare = subprocess.run([sys.executable, "-c", "import hsd, resource; print(resource.getrusage(resource.RUSAGE_SELF)"
                           ".ru_maxrss / 2**20)"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    parameters = sum(p.numel() for p in empty_lm(args.model).parameters())
    rows = {}
    for name, flags in [run for _ in range(args.rounds) for run in RUNS.items()]:
        rank = 16 if "--lora_rank" in flags else 0
        row = rows.setdefault(name, {"flags": " ".join(flags), "peak_gib": []})
        row["arithmetic_gib"] = arithmetic(args.model, rank) / GIB
        row["peak_gib"].append(peak(args, flags))
        print(f"{name:36s} {row['peak_gib'][-1]:.2f} GiB, arithmetic {row['arithmetic_gib']:.2f}", flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    result = {"command": "python benchmarks/memory.py --model MODEL --data_dir DATA", "commit": commit.strip(),
              "runs": "python hsd.py --model MODEL --task jsonl:32_QUESTIONS_OF_GSM8K " + " ".join(COMMON),
              "hardware": f"{os.cpu_count()} CPU cores ({platform.machine()})", "parameters": parameters, "code_and_libraries_gib": float(bare),
              "args": {k: v for k, v in asdict(args).items() if k not in ("model", "data_dir")}, "rows": rows}
    path = ROOT / "results" / "memory" / f"{args.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1))
    lines = [f"`{result['command']}`, commit {result['commit']}, {result['hardware']}. {parameters / 1e6:.0f}M parameters "
             f"in fp32, with a frozen teacher. Code and libraries alone: {float(bare):.2f} GiB. Each run: "
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
