"""Memory: counted of large models on GPUs, and measured of a small one on a CPU.

    python benchmarks/memory.py --count                # counted: no weights, no GPU; needs g++
    python benchmarks/memory.py --model SMOLLM2 --data_dir DATA    # measured on a CPU

Counted, into results/memory/counted.json:

    kept       the bytes that autograd keeps per token and layer (saved-tensor hooks)
    updates    the bytes that are alive in an update over pretended ranks (tests/cuda/live.py),
               beside the sum that --dry_run makes (common/memory.py)
    fits       which settings fit which GPUs, by that sum

Models are counted with 3 and with 4 layers and continued to all: their layers are the same, so
bytes are linear in the number of layers. One case is counted with 8 layers too and held against
that.

Measured, into results/memory/NAME.{json,md}: two steps of hsd.py with a frozen teacher on a small
batch. Each setting in RUNS has a process of its own. Its peak resident memory is read before the
first checkpoint, and stands beside the part of it that is arithmetic.
"""
from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
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
FEW = (3, 4)  # layers that are counted


@dataclass
class Args:
    count: bool = False  # count, and measure nothing
    model: str = ""  # folder of the model that is measured
    data_dir: str = ""  # folder that gsm8k is read from
    name: str = "smollm2"  # of the result files
    rounds: int = 1  # runs of each setting


def main(args: Args) -> None:
    if args.count:
        write_counted()
        return
    path = write_measured(measured(args), args)
    print(f"wrote {path.relative_to(ROOT)}")


def commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


# --------------------------------------------------------------------------------------------------
# counted: the Qwen3 models by their published shapes
# --------------------------------------------------------------------------------------------------
QWEN3 = {  # layers, width, width within the MLP, heads, whether the head is the embedding
    "0.6B": (28, 1024, 3072, 16, True),
    "1.7B": (28, 2048, 6144, 16, True),
    "4B": (36, 2560, 9728, 32, True),
    "8B": (36, 4096, 12288, 32, False),
    "14B": (40, 5120, 17408, 40, False),
    "32B": (64, 5120, 25600, 64, False),
}
KEY_HEADS, HEAD_WIDTH = 8, 128  # the same in all of them


def depth_of(name: str) -> int:
    return QWEN3[name][0]


def config_of(name: str, layers: int = 0) -> Qwen3Config:
    """layers: 0 for all."""
    depth, width, inner, heads, tied = QWEN3[name]
    return Qwen3Config(
        num_hidden_layers=layers or depth, hidden_size=width, intermediate_size=inner,
        num_attention_heads=heads, num_key_value_heads=KEY_HEADS, head_dim=HEAD_WIDTH,
        vocab_size=151936, tie_word_embeddings=tied, max_position_embeddings=40960,
    )


def lm_of(name: str, layers: int = 0) -> PreTrainedModel:
    """Without its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config_of(name, layers))


def adapted(name: str, layers: int, rank: int) -> PreTrainedModel:
    """lm_of, with LoRA's adapters unless the rank is 0."""
    lm = lm_of(name, layers)
    if rank:
        add_adapters(Policy(lm), rank, 32.0)
    return lm


def linear(three: dict | tuple, four: dict | tuple, layers: int):
    """What was counted with 3 and with 4 layers, with `layers`.

    >>> linear((10, {"peak": 5}), (12, {"peak": 5}), 8)
    (20, {'peak': 5})
    """
    if isinstance(three, dict):
        return {key: linear(three[key], four[key], layers) for key in three}
    if isinstance(three, tuple):
        make = getattr(three, "_make", tuple)
        return make(linear(a, b, layers) for a, b in zip(three, four))
    return three + (layers - 3) * (four - three)


def kept(name: str, layers: int, tokens: int) -> int:
    """Bytes of the tensors that autograd keeps of `tokens` tokens, weights apart, by saved-tensor
    hooks."""
    lm = lm_of(name, layers).bfloat16()
    weights = {p.untyped_storage()._cdata for p in lm.parameters()}
    storages = {}  # by identity: a view keeps the whole

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in weights:
            storages[storage._cdata] = storage
        return x

    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
    with memory.flash_attention(), memory.Ledger("meta"), hooks:
        lm.base_model(input_ids=ids, use_cache=False)
    return sum(storage.nbytes() for storage in storages.values())


def kept_per_token(name: str) -> dict:
    """Per token and layer, with and without checkpointing."""
    tokens = 4096
    three, four = (kept(name, layers, tokens) for layers in FEW)
    whole = (four - three) / tokens
    three, four = (activations(name, layers, 0, tokens, tokens, True)[0] for layers in FEW)
    inputs = (four - three) / tokens
    width = QWEN3[name][1]
    return {"all": whole, "all_per_width": round(whole / width, 1), "checkpointing": inputs}


@cache
def activations(name: str, layers: int, rank: int, tokens: int, longest: int,
                checkpointing: bool) -> tuple[int, int]:
    """What common/memory.py counts for a Qwen3."""
    load = memory.Load(tokens, longest, 1, 0, False, checkpointing)
    return run_without_data(adapted(name, layers, rank), load)


# --------------------------------------------------------------------------------------------------
# counted: whole updates, beside the sum
# --------------------------------------------------------------------------------------------------
BASE = {"ranks": 8, "tokens": 16384, "longest": 8192, "copies": 1, "teacher": True,
        "checkpointing": True}
SMALL = {"ranks": 1, "tokens": 4096, "longest": 2048, "copies": 0, "teacher": False}
CASES = [
    *({"model": name} | BASE for name in QWEN3),
    {"model": "8B"} | BASE | {"checkpointing": False},
    {"model": "8B"} | BASE | {"copies": 0},
    {"model": "8B"} | BASE | {"lora_rank": 32},
    {"model": "32B"} | BASE | {"ranks": 32},
    {"model": "0.6B"} | BASE | SMALL,
    {"model": "4B"} | BASE | SMALL | {"lora_rank": 32},
    {"model": "8B"} | BASE | {"ranks": 1, "lora_rank": 32},
]
LOADS = ("tokens", "longest", "copies", "teacher", "checkpointing", "rows", "sampled", "vllm",
         "tensor_parallel")  # of a case, what memory.Load calls by the same name


def updates() -> list[dict]:
    """A row for each case: its bytes at most in each phase, and the sum."""
    eight = {"model": "0.6B", "layers": 8} | BASE
    few = [case | {"layers": layers} for case in CASES for layers in FEW]
    of_eight, *of_few = live([eight, *few])
    rows = []
    for case, three, four in zip(CASES, of_few[::2], of_few[1::2]):
        if case | {"layers": 8} == eight:
            assert linear(three, four, 8) == of_eight, (three, four, of_eight)
        phases = linear(three, four, depth_of(case["model"]))
        count = summed(case)
        by_sum = count.weights + count.copies + count.update
        rows.append(case | {
            "live_gib": {name: round(size / GIB, 2) for name, size in phases.items()},
            "peak_gib": round(max(phases.values()) / GIB, 2),
            "sum_gib": round(by_sum / GIB, 2),
        })
        print(rows[-1], flush=True)
    return rows


def live(cases: list[dict]) -> list[dict]:
    """Bytes at most in the phases of an update of each case, on pretended ranks."""
    command = [sys.executable, "tests/cuda/live.py", *map(json.dumps, cases)]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return [json.loads(row) for row in done.stdout.splitlines() if row.startswith("{")]


def summed(case: dict) -> memory.Count:
    """The sum of common/memory.py, with all layers."""
    given = {name: case[name] for name in LOADS if name in case}
    load = memory.Load(shards=case["ranks"], **given)
    name, rank = case["model"], case.get("lora_rank", 0)
    counts = []
    for layers in FEW:
        held = activations(name, layers, rank, load.tokens, load.longest, load.checkpointing)
        counts.append(memory.count(adapted(name, layers, rank), load, held))
    return linear(*counts, depth_of(name))


# --------------------------------------------------------------------------------------------------
# counted: which settings fit
# --------------------------------------------------------------------------------------------------
MACHINES = {  # GPUs, and GiB of each
    "1 × 24 GB": (1, 24), "1 × 80 GB": (1, 80), "8 × 80 GB": (8, 80), "8 × 141 GB": (8, 141),
}
STATES = {"": 0, "--lora_rank 32": 32}  # flags → the rank
BATCHES = {  # flags → tokens of a micro-batch, and vLLM's share of a GPU; from the defaults down
    "": (16384, 0.6),
    "--token_budget 8192 --vllm_memory 0.4": (8192, 0.4),
    "--token_budget 4096 --vllm_memory 0.3": (4096, 0.3),
}
LENGTH, ROWS = 4608, 8  # tokens of a prompt and response; rows that vLLM must have room for


def fits() -> list[list[str]]:
    """A row for each model: the first setting that fits each machine."""
    rows = []
    for name in QWEN3:
        cells = [first_that_fits(name, gpus, gib) for gpus, gib in MACHINES.values()]
        rows.append([f"Qwen3-{name}", *cells])
    return rows


def first_that_fits(name: str, gpus: int, gib: int) -> str:
    """The flags of the first setting that fits, and its GiB."""
    for lora, batch, parallel in product(STATES, BATCHES, sorted({1, gpus})):
        tokens, share = BATCHES[batch]
        vllm = int(share * gib * GIB)
        case = {"model": name} | BASE | {
            "ranks": gpus, "lora_rank": STATES[lora], "tokens": tokens, "longest": tokens // 2,
            "sampled": LENGTH, "vllm": vllm, "tensor_parallel": parallel,
        }
        peak = summed(case).peak
        if peak > memory.ROOM * gib * GIB or vllm * parallel < vllm_bytes(name):
            continue
        flags = [lora, batch]
        if parallel > 1:
            flags.append(f"--tensor_parallel {parallel}")
        typed = " ".join(filter(None, flags))
        setting = f"`{typed}`" if typed else "as it stands"
        return f"{setting}: {peak / GIB:.0f}"
    return "–"


@cache
def vllm_bytes(name: str) -> int:
    """vLLM's weights, and keys and values of ROWS rows, all in bf16."""
    layers = depth_of(name)
    three, four = (memory.sizes(lm_of(name, few)).all for few in FEW)
    parameters = linear(three, four, layers)
    per_token = 2 * KEY_HEADS * HEAD_WIDTH * layers
    return 2 * (parameters + ROWS * LENGTH * per_token)


def write_counted() -> None:
    result = {
        "command": "python benchmarks/memory.py --count", "commit": commit(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "how": "counted on a CPU, not measured on a GPU",
        "kept": {name: kept_per_token(name) for name in QWEN3},
        "fits": fits(), "updates": updates(),
    }
    path = ROOT / "results" / "memory" / "counted.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    about = f"`{result['command']}`, commit {result['commit']}, {result['how']}."
    path.with_suffix(".md").write_text(f"{about}\n\n{tables(result)}\n")
    print(tables(result))


def tables(result: dict) -> str:
    """The tables of docs/memory.md."""
    lines = ["| | all activations kept | per width | `--checkpointing` |", "|---|---|---|---|"]
    for name, row in result["kept"].items():
        lines.append(f"| Qwen3-{name} | {row['all']:,.0f} | {row['all_per_width']} | "
                     f"{row['checkpointing']:,.0f} |")
    lines += [
        "",
        "| Qwen3 | GPUs | tokens | | at most, GiB | in which phase | the sum of `--dry_run` |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [row_of_update(row) for row in result["updates"]]
    lines += ["", "| model | " + " | ".join(MACHINES) + " |", "|---|" + "---|" * len(MACHINES)]
    lines += ["| " + " | ".join(row) + " |" for row in result["fits"]]
    return "\n".join(lines)


def row_of_update(row: dict) -> str:
    setting = []
    if "lora_rank" in row:
        setting.append(f"`--lora_rank {row['lora_rank']}`")
    if not row["checkpointing"]:
        setting.append("`--no-checkpointing`")
    if not row["teacher"]:
        setting.append("no teacher")
    elif row["copies"]:
        setting.append("teacher")
    else:
        setting.append("live teacher")
    phase = max(row["live_gib"], key=row["live_gib"].get)
    cells = [row["model"], str(row["ranks"]), f"{row['tokens']:,}", ", ".join(setting),
             f"{row['peak_gib']:.1f}", phase, f"{row['sum_gib']:.1f}"]
    return "| " + " | ".join(cells) + " |"


# --------------------------------------------------------------------------------------------------
# measured on a CPU
# --------------------------------------------------------------------------------------------------
RUNS = {
    "all weights": ["--no-checkpointing"],
    "all weights, checkpointing": ["--checkpointing"],
    "LoRA of rank 16": ["--lora_rank", "16", "--no-checkpointing"],
    "LoRA of rank 16, checkpointing": ["--lora_rank", "16", "--checkpointing"],
}
COMMON = ["--teacher", "frozen", "--beta", "0", "--context", "answer", "--heldout", "2",
          "--batch_size", "2", "--group_size", "2", "--max_tokens", "24", "--token_budget", "1200",
          "--eval_every", "1000000", "--steps", "2"]
BARE = ("import hsd, resource; "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)")


def measured(args: Args) -> dict:
    """What the results keep: of each setting its peaks and the arithmetic part."""
    done = subprocess.run([sys.executable, "-c", BARE], cwd=ROOT, check=True, capture_output=True,
                          text=True)
    rows = {}
    for name, flags in list(RUNS.items()) * args.rounds:
        row = rows.setdefault(name, {"flags": " ".join(flags), "peak_gib": []})
        rank = 16 if "--lora_rank" in flags else 0
        row["arithmetic_gib"] = arithmetic(args.model, rank) / GIB
        row["peak_gib"].append(peak(args, flags))
        print(f"{name:36s} {row['peak_gib'][-1]:.2f} GiB, arithmetic {row['arithmetic_gib']:.2f}",
              flush=True)
    settings = asdict(args)
    for name in ("model", "data_dir"):  # the reader's paths are others
        del settings[name]
    run = "python hsd.py --model MODEL --task jsonl:32_QUESTIONS_OF_GSM8K"
    return {
        "command": "python benchmarks/memory.py --model MODEL --data_dir DATA", "commit": commit(),
        "runs": " ".join([run, *COMMON]),
        "hardware": f"{os.cpu_count()} CPU cores ({platform.machine()})",
        "parameters": sum(p.numel() for p in empty_lm(args.model).parameters()),
        "code_and_libraries_gib": float(done.stdout), "args": settings, "rows": rows,
    }


def peak(args: Args, flags: list[str]) -> float:
    """GiB of resident memory at most, up to the last update."""
    with tempfile.TemporaryDirectory() as out:
        questions = Path(out) / "gsm8k.jsonl"
        questions.write_text("".join(few_questions(args)))
        command = [
            sys.executable, "hsd.py", "--model", args.model, "--task", f"jsonl:{questions}",
            "--instruction", "", *COMMON, *flags, "--out", out, "--name", "run",
        ]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        lines = (Path(out) / "run" / "metrics.jsonl").read_text().splitlines()
    second = json.loads(lines[1])
    assert second["grad_norm"] > 0
    return second["peak_gib"]


def few_questions(args: Args) -> Iterator[str]:
    """Lines of 32 questions: to check the references of all would take longer than the run."""
    for problem in load_task("gsm8k", heldout=1, data_dir=args.data_dir).train[:32]:
        question = problem.messages[-1]["content"]
        yield json.dumps({"question": question, "answer": problem.answer}) + "\n"


def arithmetic(model: str, rank: int) -> int:
    """Bytes of weights, gradient, moments, teacher and what the sampler owns, all in fp32."""
    lm = empty_lm(model)
    if rank:
        add_adapters(Policy(lm), rank, 32.0)
    load = memory.Load(64, 64, 1, 1, True, True, rows=1, sampled=64, device="cpu")
    count = memory.count(lm, load, (0, 0))
    return count.weights + count.copies + count.sampler


def write_measured(result: dict, args: Args) -> Path:
    path = ROOT / "results" / "memory" / f"{args.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1))
    path.with_suffix(".md").write_text(table(result))
    return path


def table(result: dict) -> str:
    bare = result["code_and_libraries_gib"]
    lines = [
        f"`{result['command']}`, commit {result['commit']}, {result['hardware']}. "
        f"{result['parameters'] / 1e6:.0f}M parameters in fp32, with a frozen teacher. Code and "
        f"libraries alone: {bare:.2f} GiB. Each run: `{result['runs']}` and the flags of its row.",
        "",
        "| setting | flags | peak resident memory, GiB (each run) | arithmetic, GiB | peak without "
        "arithmetic, code and libraries |",
        "|---|---|---|---|---|",
    ]
    for name, row in result["rows"].items():
        peaks = ", ".join(f"{x:.2f}" for x in row["peak_gib"])
        rest = min(row["peak_gib"]) - row["arithmetic_gib"] - bare
        lines.append(f"| {name} | `{row['flags'] or '–'}` | {peaks} | "
                     f"{row['arithmetic_gib']:.2f} | {rest:.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(tyro.cli(Args))
