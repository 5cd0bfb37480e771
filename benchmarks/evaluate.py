"""Score a checkpoint on a set of problems: avg@n, pass@k, maj@n, truncation and length, with 95 % intervals.

    python benchmarks/evaluate.py --model Qwen/Qwen3-8B --task aime24 --protocol hsd
    python benchmarks/evaluate.py --model runs/NAME/checkpoints/step_000100 --task sciknoweval/physics --samples 4

Writes responses.jsonl (a line per question, as soon as it is judged), summary.json and table.md to a folder under
results/evaluate/. The same command resumes an interrupted evaluation. A sample's random numbers depend only on the seed,
the question's place and the sample's index, so a resumed run gives the same results as an uninterrupted one.

avg@n    mean reward of the n samples of a question, then over questions
pass@k   chance that one of k samples is right: 1 − C(n−c, k)/C(n, k) with c of n right (unbiased; 2107.03374, Eq. 1)
maj@n    whether the answer given most often is right; answers given equally often share the win. Not for code and tools
Intervals: percentiles over 10,000 resamplings of the questions. They cover the choice of questions, not the variation
between training runs.
"""
from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from math import comb
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import transformers
import tyro
from tqdm import tqdm

from common.chat import chat_ids, load_tokenizer
from common.sampler import HFSampler
from common.tasks import in_hash_order, load_problems
from common.verifiers.answers import final_answer, last_block
from common.verifiers.pool import Verifier
from common.verifiers.thoughts import final_part
from sdzero import RESTARTS


@dataclass
class Args:
    model: str  # folder or hub id of a checkpoint
    task: str  # a named set, jsonl:FILE, hf:NAME[:CONF][@SPLIT], gym:NAME or chain
    protocol: Literal["", "sdzero", "sdpo", "hsd"] = ""
    """the sampling settings of that paper's evaluation; what is typed wins"""
    data_dir: str = ""  # folder with the named sets; empty reads them from the hub
    split: Literal["test", "train"] = "test"  # of a named set
    fields: str = ""  # names of the data's fields if they differ, e.g. question=prompt,answer=gold
    kind: Literal["", "math", "choice", "tool", "code"] = ""
    """kind of the records of jsonl and hf; empty: as the records state, or as their fields show"""
    instruction: str | None = None
    """text added to every maths question; the default asks for \\boxed{}"""
    questions: int = 0  # number of questions, the same ones for every model; 0: all
    samples: int = 8  # n, responses per question
    ks: tuple[int, ...] = (1, 2, 4, 8, 16)  # k of pass@k; those above n are left out
    temperature: float = 0.7  # sampling temperature; 0 is greedy
    top_p: float = 1.0  # nucleus of sampling
    top_k: int = 0  # sample from this many likeliest tokens; 0: all
    max_tokens: int = 4096  # most tokens per response
    thinking: bool = False  # switch on the chat template's thinking mode
    seed: int = 0  # random seed of sampling
    sampler: Literal["hf", "vllm"] = "hf"  # engine
    sampler_rows: int = 128  # hf: responses decoded at the same time (limits the KV cache)
    chunk: int = 32  # questions between two writes to disk
    workers: int = 4  # verifier processes
    allow_unsafe_exec: bool = False  # run a model's programs outside of bubblewrap
    threads: int = 0  # CPU threads of torch; 0: its default
    out: str = "results/evaluate"  # parent of the result folders
    name: str = ""  # name of the result folder; empty: model, task and protocol


PROTOCOLS = {  # what each paper says about its evaluation; otherwise the default holds
    "sdzero": dict(samples=8, temperature=0.7, max_tokens=32768),  # 2604.12002: avg@8
    "sdpo": dict(samples=16, temperature=0.6, top_p=0.95, max_tokens=8192),  # 2601.20802, Table 12: avg@16
    "hsd": dict(samples=16, temperature=1.0),  # 2606.15576: mean of 16; neither top-p nor a length limit is given
}


def main(args: Args) -> dict:
    if args.threads:
        torch.set_num_threads(args.threads)
    problems = load_problems(args.task, args.split, heldout=args.questions, fields=args.fields, kind=args.kind,
                             instruction=args.instruction, data_dir=args.data_dir)
    problems = in_hash_order(problems)[: args.questions or None]  # the first are those that load_task holds out
    verifier = Verifier(args.workers, allow_unsafe_exec=args.allow_unsafe_exec, restarts=RESTARTS)
    verifier.check(problems)
    parts = [Path(args.model).name, args.task.replace("/", "-").replace(":", "-"), args.protocol]
    folder = Path(args.out) / (args.name or "-".join(filter(None, parts)))
    done = resume(folder, args)
    missing = [i for i, p in enumerate(problems) if p.id not in done]
    if missing:
        tokenizer = load_tokenizer(args.model, args.thinking, problems)
        sampler = engine(args, tokenizer)
        for part in tqdm([missing[i : i + args.chunk] for i in range(0, len(missing), args.chunk)], disable=None):
            start = time.perf_counter()
            prompts = [chat_ids(tokenizer, problems[i].messages, args.thinking) for i in part]
            groups = sampler.sample(prompts, args.samples, seed=(args.seed, 2), keys=part, max_tokens=args.max_tokens,
                                    temperature=args.temperature, top_p=args.top_p, top_k=args.top_k)
            sampled = time.perf_counter()
            verdicts = verifier([problems[i] for i in part for _ in range(args.samples)],
                                [rollout.text for group in groups for rollout in group])
            seconds = dict(sample=(sampled - start) / len(part), verify=(time.perf_counter() - sampled) / len(part))
            with open(folder / "responses.jsonl", "a", encoding="utf-8") as f:
                for n, (i, group) in enumerate(zip(part, groups)):
                    own = verdicts[n * args.samples : (n + 1) * args.samples]
                    samples = [dict(reward=v.reward, feedback=v.feedback, tokens=len(r.response_ids),
                                    truncated=r.truncated, text=r.text) for r, v in zip(group, own)]
                    row = dict(id=problems[i].id, verifier=problems[i].kind, seconds=seconds, samples=samples)
                    f.write(json.dumps(row) + "\n")
                    done[row["id"]] = row
    verifier.close()
    rows = [done[p.id] for p in problems]
    summary = dict(metrics=summarise(rows, [k for k in args.ks if k <= args.samples]), questions=len(rows),
                   seconds={k: round(sum(r["seconds"][k] for r in rows), 1) for k in ("sample", "verify")},
                   command="python benchmarks/evaluate.py " + " ".join(sys.argv[1:]), args=asdict(args), **machine())
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    (folder / "table.md").write_text(table(args, summary))
    print(table(args, summary))
    return summary


def engine(args: Args, tokenizer) -> object:
    """The sampler that --sampler names; each has sample(prompts, n, …) → groups of rollouts."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.sampler == "hf":
        return HFSampler(args.model, tokenizer, device, rows=args.sampler_rows)
    try:
        from common.sampler import VLLMSampler
    except ImportError as error:
        raise SystemExit(f"error: --sampler vllm: {error}; install vllm, or use --sampler hf") from None
    return VLLMSampler(args.model, tokenizer, device)


def resume(folder: Path, args: Args) -> dict[str, dict]:
    """The questions that an earlier run with the same settings has answered. Raises SystemExit if the settings differ."""
    fixed = {k: v for k, v in asdict(args).items() if k in (
        "model", "task", "split", "fields", "kind", "instruction", "samples", "temperature", "top_p", "top_k", "max_tokens",
        "thinking", "seed", "sampler", "questions")}
    folder.mkdir(parents=True, exist_ok=True)
    note, rows = folder / "settings.json", folder / "responses.jsonl"
    if note.exists() and (before := json.loads(note.read_text())) != fixed:
        changed = ", ".join(f"{k} was {before.get(k)!r}" for k in fixed if before.get(k) != fixed[k])
        raise SystemExit(f"error: {folder} holds a run with other settings ({changed}); give another --name")
    note.write_text(json.dumps(fixed, indent=1) + "\n")
    lines = rows.read_text(encoding="utf-8").split("\n") if rows.exists() else []
    whole = [line for line in lines if line.endswith("}")]  # a line that a kill cut short is sampled again
    rows.write_text("".join(line + "\n" for line in whole), encoding="utf-8")
    return {row["id"]: row for row in map(json.loads, whole)}


def given_answer(verifier: str, text: str) -> str | None:
    """The answer of a response, for the vote; None if it gives none or if such answers cannot be voted on.

    >>> given_answer("math", r"So \\boxed{ 1/2 }."), given_answer("choice", "<answer>B</answer>")
    ('1/2', 'B')
    """
    text = final_part(text, RESTARTS)
    if verifier in ("choice", "gym"):
        return last_block(text, "<answer>", "</answer>")
    if verifier not in ("math", "chain"):
        return None
    answer = final_answer(text)
    return "".join(answer.strip("$").split()) if answer else None


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n samples, drawn without replacement, include one of the c right ones.

    >>> pass_at_k(4, 2, 1), pass_at_k(4, 1, 4), pass_at_k(4, 0, 4)
    (0.5, 1.0, 0.0)
    """
    return 1 - comb(n - c, k) / comb(n, k)


def majority(answers: list[str | None], rewards: list[float]) -> float:
    """The mean reward of the answers that were given most often; 0 if none was given.

    >>> majority(["5", "6", "5", None], [1, 0, 1, 0]), majority(["5", "6"], [1, 0]), majority([None, None], [0, 0])
    (1.0, 0.5, 0.0)
    """
    votes = Counter(a for a in answers if a is not None)
    winners = [a for a in votes if votes[a] == max(votes.values())]
    shares = [sum(r for a, r in zip(answers, rewards) if a == winner) / votes[winner] for winner in winners]
    return sum(shares) / len(shares) if shares else 0.0


def summarise(rows: list[dict], ks: list[int]) -> dict[str, dict[str, float]]:
    """metric → its mean over questions and the ends of its 95 % interval."""
    columns: dict[str, list[float]] = {}
    for row in rows:
        samples = row["samples"]
        n, rewards = len(samples), [s["reward"] for s in samples]
        right = sum(r >= 1 for r in rewards)
        values = {f"avg@{n}": sum(rewards) / n, **{f"pass@{k}": pass_at_k(n, right, k) for k in ks}}
        if row["verifier"] not in ("code", "tool"):
            values[f"maj@{n}"] = majority([given_answer(row["verifier"], s["text"]) for s in samples], rewards)
        values["truncated"] = sum(s["truncated"] for s in samples) / n
        values["tokens"] = sum(s["tokens"] for s in samples) / n
        for name, value in values.items():
            columns.setdefault(name, []).append(value)
    return {name: interval(np.array(values)) for name, values in columns.items()}


def interval(values: np.ndarray, resamplings: int = 10_000) -> dict[str, float]:
    """Mean, and 2.5 and 97.5 percentiles of the means of resampled questions. values [questions]."""
    rng = np.random.default_rng(0)
    n = len(values)
    counts = rng.multinomial(n, np.full(n, 1 / n), size=resamplings)  # [resamplings, n] draws of each
    low, high = np.percentile(counts @ values / n, [2.5, 97.5])
    return {"mean": round(float(values.mean()), 4), "low": round(float(low), 4), "high": round(float(high), 4)}


def table(args: Args, summary: dict) -> str:
    lines = [f"{args.model} on {args.task} ({args.split}): {summary['questions']} questions × {args.samples} samples, "
             f"T {args.temperature:g}, top-p {args.top_p:g}, at most {args.max_tokens} tokens", "",
             "| metric | mean | 95 % interval |", "|---|---|---|"]
    for name, m in summary["metrics"].items():
        digits = 1 if name == "tokens" else 3
        lines.append(f"| {name} | {m['mean']:.{digits}f} | {m['low']:.{digits}f} … {m['high']:.{digits}f} |")
    return "\n".join(lines) + "\n"


def machine() -> dict:
    """What produced the numbers: commit, hardware, versions."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = info.partition("model name\t: ")[2].partition("\n")[0] or platform.machine()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cpu}, {torch.get_num_threads()} threads"
    return dict(commit=commit, device=device, python=platform.python_version(), torch=torch.__version__,
                transformers=transformers.__version__)


if __name__ == "__main__":
    typed = tyro.cli(Args)
    main(tyro.cli(Args, default=Args(typed.model, typed.task, **PROTOCOLS.get(typed.protocol, {}))))
