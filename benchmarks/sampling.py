"""Sampling without vLLM: common/sampler.py's HFSampler against transformers' own `generate`, which TRL uses for
sampling without vLLM (whole steps of both trainers: benchmarks/speed.py).

    python benchmarks/sampling.py                                                     # the embedded model
    python benchmarks/sampling.py --name smollm2 --model SMOLLM2 --task gsm8k --data_dir DATA --prompts 4 --samples 4

Same model object, prompts, samples per prompt, temperature 1 and full distribution; `generate` gets the prompts in
their order, padded on the left, `rows` at a time. Two settings: responses that end where they end (as in training), and all of
--max_tokens (end tokens off: the cost of decoding alone). HFSampler returns log-probabilities as well; `generate` is
not asked for them. The two run in turns; a ratio compares the two runs of a round. Writes results/sampling/NAME.{json,md}.
"""
from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers
import tyro

from common.chat import chat_ids, load_tokenizer
from common.sampler import HFSampler
from common.tasks import load_task

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Args:
    name: str = "chain"  # name of the result files
    model: str = "assets/chain"  # model folder
    task: str = "chain"  # task that the prompts come from
    data_dir: str = ""  # folder that named sets are read from
    prompts: int = 16  # questions
    samples: int = 8  # responses per question
    max_tokens: int = 64  # most tokens per response
    rows: int = 128  # responses decoded at the same time
    rounds: int = 7  # timed runs of each side, in turns, after one warm-up run
    threads: int = 1  # CPU threads


def ours(sampler: HFSampler, prompts: list[list[int]], args: Args, seed: int) -> list[int]:
    """Lengths of the responses."""
    groups = sampler.sample(prompts, args.samples, seed=(seed,), keys=range(len(prompts)), max_tokens=args.max_tokens)
    return [len(o.response_ids) for g in groups for o in g]


def theirs(sampler: HFSampler, prompts: list[list[int]], args: Args, seed: int) -> list[int]:
    torch.manual_seed(seed)
    rows = [p for p in prompts for _ in range(args.samples)]
    lengths: list[int] = []
    for start in range(0, len(rows), args.rows):
        part = rows[start : start + args.rows]
        width = max(map(len, part))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in part])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part])
        with torch.no_grad():
            out = sampler.lm.generate(input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                                      max_new_tokens=args.max_tokens, eos_token_id=sampler.ends or None, pad_token_id=0)
        for row in out[:, width:]:
            ended = torch.isin(row, torch.tensor(sampler.ends, dtype=torch.long)).nonzero()
            lengths.append(int(ended[0]) + 1 if len(ended) else len(row))
        sampler.tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
    return lengths


def main(args: Args) -> None:
    torch.set_num_threads(args.threads)
    tokenizer = load_tokenizer(args.model)
    problems = load_task(args.task, heldout=256, data_dir=args.data_dir).train[: args.prompts]
    prompts = [chat_ids(tokenizer, p.messages) for p in problems]
    sampler = HFSampler(args.model, tokenizer, torch.device("cpu"), rows=args.rows)
    sampler.lm.generation_config.eos_token_id = None  # given with each call
    ends, sides, table = sampler.ends, {"generate": theirs, "HFSampler": ours}, {}
    for setting in ("responses end where they end", "all of max_tokens"):
        sampler.ends = ends if setting.startswith("responses") else []
        runs: dict[str, list[dict]] = {side: [] for side in sides}
        for i in range(args.rounds + 1):
            for side, run in sides.items():
                start = time.perf_counter()
                lengths = run(sampler, prompts, args, i)
                if i:
                    runs[side].append({"seconds": time.perf_counter() - start, "tokens": sum(lengths), "longest": max(lengths)})
        rate = {side: [r["tokens"] / r["seconds"] for r in found] for side, found in runs.items()}
        ratios = [mine / other for mine, other in zip(rate["HFSampler"], rate["generate"])]
        table[setting] = {"tokens_per_s": {side: statistics.median(x) for side, x in rate.items()},
                          "times_faster": statistics.median(ratios), "least": min(ratios), "most": max(ratios), "runs": runs}
        print(f"{setting}: {table[setting]['times_faster']:.2f} ({min(ratios):.2f} to {max(ratios):.2f}) times as fast")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    typed = " ".join(sys.argv[1:]).replace(args.data_dir or "\0", "DATA")
    typed = typed if args.model.startswith("assets") else typed.replace(args.model, "MODEL")
    shown = {k: v for k, v in asdict(args).items() if k not in ("model", "data_dir")}
    result = {"command": f"python benchmarks/sampling.py {typed}".strip(), "commit": commit.strip(), "args": shown,
              "hardware": f"{os.cpu_count()} CPU cores ({platform.machine()}), {args.threads} threads",
              "versions": f"torch {torch.__version__}, transformers {transformers.__version__}", "table": table}
    path = ROOT / "results" / "sampling" / f"{args.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1))
    lines = [f"`{result['command']}`, commit {result['commit']}, {result['hardware']}, {result['versions']}. {args.prompts} "
             f"prompts × {args.samples} samples, at most {args.max_tokens} tokens, {args.rounds} rounds in turns.", "",
             "| setting | `generate`, tokens/s | HFSampler, tokens/s | ratio: median (least to most of a round) |",
             "|---|---|---|---|"]
    for setting, row in table.items():
        rate = row["tokens_per_s"]
        lines.append(f"| {setting} | {rate['generate']:.0f} | {rate['HFSampler']:.0f} | {row['times_faster']:.2f} "
                     f"({row['least']:.2f} to {row['most']:.2f}) |")
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main(tyro.cli(Args))
