"""The five files on one GPU with vLLM: does all of it work there, how fast is it, how much memory?

    python benchmarks/gpu.py --model QWEN2_5_CODER_0_5B_INSTRUCT
    python benchmarks/gpu.py --model THE_SAME --only hsd full shape

The first five learn to multiply two digits by one: 256 rollouts per step, adapters of rank 16.
"full" is grpo.py with all weights. "shape" is hsd.py on a model of Qwen3-1.7B's shape with random
weights, whose responses all run to 1,024 tokens: it says nothing of learning, but what a step of
that size costs. It takes the other model's tokenizer. These two are ended after --steps steps.

Writes results/gpu/NAME.json (the command, every metric of every step) and results/gpu/table.md.
"""
from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

ROOT = Path(__file__).resolve().parent.parent
ENGINE = "--sampler vllm --sampler_rows 128 --vllm_memory 0.3"
PRODUCTS = (
    f"--task jsonl:benchmarks/products.jsonl {ENGINE} --max_tokens 96 "
    "--instruction 'Work briefly and finish with the final answer in \\boxed{}.'"
)
ADAPTERS = f"{PRODUCTS} --heldout 48 --eval_samples 8 --eval_every 4 --lora_rank 16 --lr 1e-4"
ROLLOUTS = "--batch_size 32 --group_size 8"
RUNS = {
    "grpo": f"grpo.py {ADAPTERS} {ROLLOUTS} --steps 8 --beta 0",
    "rlsd": f"rlsd.py {ADAPTERS} {ROLLOUTS} --steps 8",
    "sdpo": f"sdpo.py {ADAPTERS} {ROLLOUTS} --steps 8 --kl reverse",
    "hsd": f"hsd.py {ADAPTERS} {ROLLOUTS} --steps 8 --teacher frozen --beta 0 --top_p 1",
    "sdzero": f"sdzero.py {ADAPTERS} --srt_questions 64 --srt_max_tokens 96 --srt_batch 32 "
              "--srt_lr 1e-4 --sd_questions 256 --rounds 7 --batch_size 256 --mean token",
    "full": f"grpo.py {PRODUCTS} --batch_size 64 --group_size 8 --heldout 48 --eval_every 1000 "
            "--lr 1e-5",
    "shape": f"hsd.py --task jsonl:benchmarks/products.jsonl {ENGINE} --max_tokens 1024 "
             "--heldout 8 --eval_every 1000 --lr 1e-6 --teacher frozen --beta 0 --context answer "
             "--batch_size 32 --group_size 8",
}
ENDED = ("full", "shape")  # after --steps
SHAPE = Qwen3Config(
    vocab_size=151_936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=28,
    num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    max_position_embeddings=40_960, eos_token_id=151_645, pad_token_id=151_643,
)


@dataclass
class Args:
    model: str  # folder of the model
    only: list[str] = field(default_factory=lambda: list(RUNS))  # some of RUNS
    steps: int = 4  # of "full" and "shape", at least 2


def main(args: Args) -> None:
    results = ROOT / "results" / "gpu"
    results.mkdir(parents=True, exist_ok=True)
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    about = {"commit": commit, "hardware": torch.cuda.get_device_name(), "torch": torch.__version__}
    for name in args.only:
        metrics = execute(name, args)
        found = {**about, "command": f"python {RUNS[name]} --model MODEL", "metrics": metrics}
        (results / f"{name}.json").write_text(json.dumps(found, indent=1))
        print(row_of(name, metrics), flush=True)
    table = table_of(results)
    (results / "table.md").write_text(table)
    print(table)


def random_model(path: Path, tokenizer: str) -> str:
    """A model of SHAPE, in bf16."""
    with torch.device("cuda"):
        lm = AutoModelForCausalLM.from_config(SHAPE, dtype=torch.bfloat16)
    lm.save_pretrained(path)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(path)
    return str(path)


def execute(name: str, args: Args) -> list[dict]:
    """Every step's metrics."""
    with tempfile.TemporaryDirectory() as out:
        model = args.model
        if name == "shape":
            model = random_model(Path(out) / "model", args.model)
        metrics = Path(out) / name / "metrics.jsonl"
        command = [sys.executable, *shlex.split(RUNS[name]), "--model", model, "--out", out,
                   "--name", name]
        run = subprocess.Popen(command, cwd=ROOT)
        while run.poll() is None:
            time.sleep(0.2)
            if name in ENDED and len(lines_of(metrics)) >= args.steps:
                run.kill()
        rows = lines_of(metrics)
    if (run.returncode != 0 and name not in ENDED) or len(rows) < args.steps:
        raise SystemExit(f"{name} ended after {len(rows)} steps")
    return rows


def lines_of(path: Path) -> list[dict]:
    """The whole lines that are there."""
    if not path.exists():
        return []
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


# --------------------------------------------------------------------------------------------------
# the table
# --------------------------------------------------------------------------------------------------
COLUMNS = (
    "run", "held-out pass@1", "tokens per rollout", "sample, s", "sampled tokens per s",
    "score, s", "update, s", "TFLOP/s", "sync, s", "GiB", "mismatch: first", "later",
)


def row_of(name: str, metrics: list[dict]) -> list[str]:
    """Means over the steps after the first, of those in which rollouts were sampled."""
    rows = [row for row in metrics[1:] if "length/mean" in row]

    def mean(key: str) -> float:
        return sum(row.get(key, 0.0) for row in rows) / len(rows)

    settings = shlex.split(RUNS[name])
    count = int(settings[settings.index("--batch_size") + 1])
    if "--group_size" in settings:
        count *= int(settings[settings.index("--group_size") + 1])
    length = mean("length/mean")
    scores = [row["heldout/pass@1"] for row in metrics if "heldout/pass@1" in row]
    gap = "mismatch/max_abs_dlogp"
    gaps = [row[gap] for row in metrics if gap in row]
    mismatch = ["–", "–"]
    if len(gaps) > 1:
        mismatch = [f"{gaps[0]:.2f}", f"{max(gaps[1:]):.2f}"]
    return [
        name, " → ".join(f"{score:.2f}" for score in scores), f"{length:.0f}",
        f"{mean('time/sample'):.2f}", f"{count * length / mean('time/sample'):,.0f}",
        f"{mean('time/score'):.2f}", f"{mean('time/update'):.2f}", f"{mean('tflops/update'):.0f}",
        f"{mean('time/sync'):.2f}", f"{max(row['peak_gib'] for row in metrics):.1f}",
        *mismatch,
    ]


def table_of(results: Path) -> str:
    found = {name: json.loads((results / f"{name}.json").read_text()) for name in RUNS
             if (results / f"{name}.json").exists()}
    first = next(iter(found.values()))
    lines = [
        f"`python benchmarks/gpu.py --model QWEN2_5_CODER_0_5B_INSTRUCT`, {first['hardware']}, "
        f"torch {first['torch']}, commit {first['commit']}. Seconds are means over the steps after "
        "the first; GiB: most of the card in use; mismatch: most nats by which a token's "
        "log-probability in sampler and trainer differs, in the first step and in the later ones.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    lines += ["| " + " | ".join(row_of(n, f["metrics"])) + " |" for n, f in found.items()]
    lines += ["", "Commands:", ""]
    lines += [f"- {name}: `{f['command']}`" for name, f in found.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    os.chdir(ROOT)
    main(tyro.cli(Args))
