"""Sampling: HFSampler of common/sampler.py against `generate` of transformers, and against vLLM.

    python benchmarks/sampling.py                                           # the embedded model
    python benchmarks/sampling.py --name smollm2 --model SMOLLM2 --task gsm8k --data_dir DATA \\
        --prompts 4 --samples 4
    .venv-vllm/bin/python benchmarks/sampling.py --vllm …                   # vLLM as a third side

TRL samples with `generate` if it has no vLLM (whole steps of both trainers: benchmarks/speed.py).
All sides have the same weights, prompts, samples per prompt, temperature 1 and the full
distribution, in fp32. `generate` gets the prompts in their order, padded on the left, `rows` at a
time. The samplers return log-probabilities as well; `generate` is not asked for them.

There are two settings: responses end where they end, as in training; and all take --max_tokens,
without an end token, which shows the cost of decoding alone. The sides run in turns; a ratio
compares two runs of a round. Writes results/sampling/NAME.{json,md}.
"""
from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers
import tyro

from common.chat import chat_ids, load_tokenizer
from common.sampler import HFSampler, VLLMSampler
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
    vllm: bool = False  # also sample with VLLMSampler: needs the environment of make test-vllm
    vllm_memory: float = 0.3  # share of the memory for vLLM's weights and KV cache


class Sides(NamedTuple):
    hf: HFSampler
    vllm: VLLMSampler | None

    def end_at(self, ends: list[int]) -> None:
        """The tokens that end a response."""
        for sampler in filter(None, self):
            sampler.ends = ends


def main(args: Args) -> None:
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # vLLM's
    torch.set_num_threads(args.threads)
    tokenizer = load_tokenizer(args.model)
    task = load_task(args.task, heldout=256, data_dir=args.data_dir)
    problems = task.train[: args.prompts]
    prompts = [chat_ids(tokenizer, problem.messages) for problem in problems]
    cpu = torch.device("cpu")
    hf, vllm = HFSampler(args.model, tokenizer, cpu, rows=args.rows), None
    hf.lm.generation_config.eos_token_id = None  # given with each call
    if args.vllm:
        vllm = VLLMSampler(args.model, tokenizer, cpu, rows=args.rows, memory=args.vllm_memory)
    sides = Sides(hf, vllm)
    settings = {"responses end where they end": hf.ends, "all of max_tokens": []}
    found = {}
    for setting, ends in settings.items():
        sides.end_at(ends)
        found[setting] = compare(sides, prompts, args)
        print(f"{setting}: {found[setting]['ratios']}")
    path = write(found, args)
    print(path.with_suffix(".md").read_text())
    if vllm is not None:
        vllm.close()


def with_hf(sides: Sides, prompts: list[list[int]], args: Args, seed: int) -> list[int]:
    """Lengths of the responses."""
    return lengths_from(sides.hf, prompts, args, seed)


def with_vllm(sides: Sides, prompts: list[list[int]], args: Args, seed: int) -> list[int]:
    """Lengths of the responses. No prompt is in the engine's prefix cache from an earlier round."""
    sides.vllm.llm.reset_prefix_cache()
    return lengths_from(sides.vllm, prompts, args, seed)


def lengths_from(sampler, prompts: list[list[int]], args: Args, seed: int) -> list[int]:
    groups = sampler.sample(prompts, args.samples, seed=(seed,), keys=range(len(prompts)),
                            max_tokens=args.max_tokens)
    return [len(rollout.response_ids) for group in groups for rollout in group]


def with_generate(sides: Sides, prompts: list[list[int]], args: Args, seed: int) -> list[int]:
    """Lengths of the responses, which are turned into text, as the samplers' are."""
    sampler = sides.hf
    torch.manual_seed(seed)
    rows = [prompt for prompt in prompts for _ in range(args.samples)]
    lengths: list[int] = []
    for start in range(0, len(rows), args.rows):
        responses = generate(sampler, rows[start : start + args.rows], args)
        lengths += [length_of(response, sampler.ends) for response in responses]
        sampler.tokenizer.batch_decode(responses, skip_special_tokens=True)
    return lengths


def generate(sampler: HFSampler, prompts: list[list[int]], args: Args) -> torch.Tensor:
    """One response to each prompt, [B, tokens]."""
    width = max(map(len, prompts))
    ids, mask = [], []
    for prompt in prompts:
        padding = [0] * (width - len(prompt))
        ids.append(padding + prompt)
        mask.append(padding + [1] * len(prompt))
    with torch.no_grad():
        out = sampler.lm.generate(
            input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), do_sample=True,
            temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=args.max_tokens,
            eos_token_id=sampler.ends or None, pad_token_id=0,
        )
    return out[:, width:]


def length_of(response: torch.Tensor, ends: list[int]) -> int:
    """Up to the first end token, which counts."""
    ended = torch.isin(response, torch.tensor(ends, dtype=torch.long)).nonzero()
    if len(ended) == 0:
        return len(response)
    return int(ended[0]) + 1


def compare(sides: Sides, prompts: list[list[int]], args: Args) -> dict:
    """All sides in turns: their runs, their rates, and HFSampler's ratio to each in each round."""
    samples: dict[str, Callable] = {"generate": with_generate, "HFSampler": with_hf}
    if sides.vllm is not None:
        samples["vLLM"] = with_vllm
    runs: dict[str, list[dict]] = {side: [] for side in samples}
    for i in range(args.rounds + 1):
        for side, sample in samples.items():
            start = time.perf_counter()
            lengths = sample(sides, prompts, args, i)
            seconds = time.perf_counter() - start
            if i > 0:  # the first is a warm-up
                runs[side].append(
                    {"seconds": seconds, "tokens": sum(lengths), "longest": max(lengths)}
                )
    rates = {}  # tokens per second of each round
    for side, results in runs.items():
        rates[side] = [result["tokens"] / result["seconds"] for result in results]
    ratios = {}  # median, least and most of a round
    for side in samples:
        if side != "HFSampler":
            each = [mine / other for mine, other in zip(rates["HFSampler"], rates[side])]
            ratios[side] = (statistics.median(each), min(each), max(each))
    return {
        "tokens_per_s": {side: statistics.median(of_side) for side, of_side in rates.items()},
        "ratios": ratios, "runs": runs,
    }


def write(found: dict, args: Args) -> Path:
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True,
                          text=True)
    settings = asdict(args)
    for name in ("model", "data_dir"):  # the reader's paths are others
        del settings[name]
    result = {
        "command": f"python benchmarks/sampling.py {typed(args)}".strip(),
        "commit": head.stdout.strip(), "args": settings,
        "hardware": f"{os.cpu_count()} CPU cores ({platform.machine()}), {args.threads} threads",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "table": found,
    }
    path = ROOT / "results" / "sampling" / f"{args.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1))
    path.with_suffix(".md").write_text(table(result, args))
    return path


def typed(args: Args) -> str:
    """What was typed, without the paths of this machine."""
    words = " ".join(sys.argv[1:]).replace(args.data_dir or "\0", "DATA")
    if args.model.startswith("assets"):
        return words
    return words.replace(args.model, "MODEL")


def table(result: dict, args: Args) -> str:
    lines = [
        f"`{result['command']}`, commit {result['commit']}, {result['hardware']}, "
        f"{result['versions']}. {args.prompts} prompts × {args.samples} samples, at most "
        f"{args.max_tokens} tokens, {args.rounds} rounds in turns.",
        "",
        "| setting | HFSampler, tokens/s | beside | tokens/s | ratio: median (least to most of a "
        "round) |",
        "|---|---|---|---|---|",
    ]
    for setting, row in result["table"].items():
        rate = row["tokens_per_s"]
        for side, (median, least, most) in row["ratios"].items():
            lines.append(f"| {setting} | {rate['HFSampler']:.0f} | {side} | {rate[side]:.0f} | "
                         f"{median:.2f} ({least:.2f} to {most:.2f}) |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(tyro.cli(Args))
