"""Score a checkpoint on a set of problems: avg@n, pass@k, maj@n, with 95 % intervals.

    python benchmarks/evaluate.py --model Qwen/Qwen3-8B --task aime24 --protocol hsd
    python benchmarks/evaluate.py --model runs/NAME/checkpoints/step_000100 \\
        --task sciknoweval/physics --samples 4

avg@n    mean reward of the n samples of a question, then over questions
pass@k   chance that one of k samples is right: 1 − C(n−c, k)/C(n, k) with c of n right
         (unbiased; 2107.03374, Eq. 1)
maj@n    whether the answer given most often is right; answers given equally often share the win.
         Not for code and tools

The table also has the share of responses that were cut off and the mean length. Intervals are
percentiles over 10,000 resamplings of the questions. They cover the choice of questions, not the
variation between training runs.

Writes responses.jsonl (a line per question, as soon as it is judged), summary.json and table.md to
a folder under results/evaluate/. The same command resumes an interrupted evaluation. A sample's
random numbers depend only on the seed, the question's place and the sample's index, so a resumed
run gives the same results as an uninterrupted one.
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

from common import require
from common.chat import chat_ids, load_tokenizer
from common.sampler import HFSampler, Rollout
from common.tasks import Problem, in_hash_order, load_problems
from common.verifiers import Verdict
from common.verifiers.answers import final_answer, last_block
from common.verifiers.pool import Verifier
from common.verifiers.thoughts import final_part
from sdzero import RESTARTS


@dataclass
class Args:
    model: str  # folder or hub id of a checkpoint
    task: str  # a named set, jsonl:FILE, hf:NAME[:CONF][@SPLIT], gym:NAME or chain
    # the sampling settings of that paper's evaluation; what is typed wins
    protocol: Literal["", "sdzero", "sdpo", "hsd"] = ""
    data_dir: str = ""  # folder with the named sets; empty reads them from the hub
    split: Literal["test", "train"] = "test"  # of a named set
    fields: str = ""  # names of the data's fields if they differ, e.g. question=prompt,answer=gold
    # kind of the records of jsonl and hf; empty: as the records state, or as their fields show
    kind: Literal["", "math", "choice", "tool", "code"] = ""
    # text added to every maths question; the default asks for \boxed{}
    instruction: str | None = None
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
    # 2604.12002: avg@8
    "sdzero": dict(samples=8, temperature=0.7, max_tokens=32768),
    # 2601.20802, Table 12: avg@16
    "sdpo": dict(samples=16, temperature=0.6, top_p=0.95, max_tokens=8192),
    # 2606.15576: mean of 16; neither top-p nor a length limit is given
    "hsd": dict(samples=16, temperature=1.0),
}
FIXED = (  # settings that a resumed evaluation must share
    "model", "task", "split", "fields", "kind", "instruction", "samples", "temperature", "top_p",
    "top_k", "max_tokens", "thinking", "seed", "sampler", "questions",
)


def main(args: Args) -> dict:
    if args.threads:
        torch.set_num_threads(args.threads)
    problems = problems_of(args)
    verifier = Verifier(args.workers, allow_unsafe_exec=args.allow_unsafe_exec, restarts=RESTARTS)
    verifier.check(problems)
    folder = folder_of(args)
    done = resume(folder, args)
    missing = [i for i, problem in enumerate(problems) if problem.id not in done]
    if missing:
        done |= answer(problems, missing, verifier, folder, args)
    verifier.close()
    summary = summary_of([done[problem.id] for problem in problems], args)
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    (folder / "table.md").write_text(table(args, summary))
    print(table(args, summary))
    return summary


def problems_of(args: Args) -> list[Problem]:
    problems = load_problems(
        args.task, args.split, heldout=args.questions, fields=args.fields, kind=args.kind,
        instruction=args.instruction, data_dir=args.data_dir,
    )
    # the first are those that load_task holds out
    return in_hash_order(problems)[: args.questions or None]


def folder_of(args: Args) -> Path:
    task = args.task.replace("/", "-").replace(":", "-")
    parts = [Path(args.model).name, task, args.protocol]
    return Path(args.out) / (args.name or "-".join(filter(None, parts)))


def resume(folder: Path, args: Args) -> dict[str, dict]:
    """The questions that an earlier run with the same settings has answered. Raises SystemExit if
    the settings differ."""
    fixed = {name: value for name, value in asdict(args).items() if name in FIXED}
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / "settings.json"
    if note.exists():
        before = json.loads(note.read_text())
        different = [name for name in fixed if before.get(name) != fixed[name]]
        changed = ", ".join(f"{name} was {before.get(name)!r}" for name in different)
        require(
            before == fixed,
            f"{folder} holds a run with other settings ({changed}); give another --name",
        )
    note.write_text(json.dumps(fixed, indent=1) + "\n")
    responses = folder / "responses.jsonl"
    lines = []
    if responses.exists():
        lines = responses.read_text(encoding="utf-8").split("\n")
    whole = [line for line in lines if line.endswith("}")]  # a kill can cut the last one short
    responses.write_text("".join(line + "\n" for line in whole), encoding="utf-8")
    rows = [json.loads(line) for line in whole]
    return {row["id"]: row for row in rows}


# --------------------------------------------------------------------------------------------------
# sampling and judging
# --------------------------------------------------------------------------------------------------
def answer(problems: list[Problem], missing: list[int], verifier: Verifier, folder: Path,
           args: Args) -> dict[str, dict]:
    """id → row of the missing questions. Each chunk is written to responses.jsonl at once."""
    tokenizer = load_tokenizer(args.model, args.thinking, problems)
    sampler = engine(args, tokenizer)
    chunks = [missing[i : i + args.chunk] for i in range(0, len(missing), args.chunk)]
    found = {}
    for places in tqdm(chunks, disable=None):
        asked = [problems[i] for i in places]
        start = time.perf_counter()
        prompts = [chat_ids(tokenizer, problem.messages, args.thinking) for problem in asked]
        groups = sampler.sample(
            prompts, args.samples, seed=(args.seed, 2), keys=places, max_tokens=args.max_tokens,
            temperature=args.temperature, top_p=args.top_p, top_k=args.top_k,
        )
        sampled = time.perf_counter()
        verdicts = judge(asked, groups, verifier)
        judged = time.perf_counter()
        seconds = {
            "sample": (sampled - start) / len(places), "verify": (judged - sampled) / len(places),
        }
        with open(folder / "responses.jsonl", "a", encoding="utf-8") as file:
            for problem, group, own in zip(asked, groups, verdicts):
                row = row_of(problem, group, own, seconds)
                file.write(json.dumps(row) + "\n")
                found[problem.id] = row
    return found


def engine(args: Args, tokenizer) -> object:
    """The sampler that --sampler names; each has sample(prompts, n, …) → groups of rollouts."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.sampler == "hf":
        return HFSampler(args.model, tokenizer, device, rows=args.sampler_rows)
    try:
        from common.sampler import VLLMSampler
    except ImportError as error:
        remedy = "install vllm, or use --sampler hf"
        raise SystemExit(f"error: --sampler vllm: {error}; {remedy}") from None
    return VLLMSampler(args.model, tokenizer, device)


def judge(problems: list[Problem], groups: list[list[Rollout]],
          verifier: Verifier) -> list[list[Verdict]]:
    """The verdicts of every group, judged all at once."""
    asked, texts = [], []
    for problem, group in zip(problems, groups):
        asked += [problem] * len(group)
        texts += [rollout.text for rollout in group]
    verdicts = iter(verifier(asked, texts))
    return [[next(verdicts) for _ in group] for group in groups]


def row_of(problem: Problem, group: list[Rollout], verdicts: list[Verdict],
           seconds: dict[str, float]) -> dict:
    """A question's line in responses.jsonl."""
    samples = []
    for rollout, verdict in zip(group, verdicts):
        samples.append({
            "reward": verdict.reward,
            "feedback": verdict.feedback,
            "tokens": len(rollout.response_ids),
            "truncated": rollout.truncated,
            "text": rollout.text,
        })
    return {"id": problem.id, "verifier": problem.kind, "seconds": seconds, "samples": samples}


# --------------------------------------------------------------------------------------------------
# numbers
# --------------------------------------------------------------------------------------------------
def summary_of(rows: list[dict], args: Args) -> dict:
    seconds = {}
    for phase in ("sample", "verify"):
        seconds[phase] = round(sum(row["seconds"][phase] for row in rows), 1)
    return {
        "metrics": summarise(rows, [k for k in args.ks if k <= args.samples]),
        "questions": len(rows),
        "seconds": seconds,
        "command": "python benchmarks/evaluate.py " + " ".join(sys.argv[1:]),
        "args": asdict(args),
        **machine(),
    }


def summarise(rows: list[dict], ks: list[int]) -> dict[str, dict[str, float]]:
    """metric → its mean over questions and the ends of its 95 % interval."""
    columns: dict[str, list[float]] = {}
    for row in rows:
        for name, value in measures(row, ks).items():
            columns.setdefault(name, []).append(value)
    return {name: interval(np.array(values)) for name, values in columns.items()}


def measures(row: dict, ks: list[int]) -> dict[str, float]:
    """metric → its value of one question."""
    samples = row["samples"]
    n = len(samples)
    rewards = [sample["reward"] for sample in samples]
    right = sum(reward >= 1 for reward in rewards)
    out = {f"avg@{n}": sum(rewards) / n}
    for k in ks:
        out[f"pass@{k}"] = pass_at_k(n, right, k)
    if row["verifier"] not in ("code", "tool"):
        answers = [given_answer(row["verifier"], sample["text"]) for sample in samples]
        out[f"maj@{n}"] = majority(answers, rewards)
    out["truncated"] = sum(sample["truncated"] for sample in samples) / n
    out["tokens"] = sum(sample["tokens"] for sample in samples) / n
    return out


def given_answer(verifier: str, text: str) -> str | None:
    """The answer of a response, for the vote; None if it gives none or if such answers cannot be
    voted on.

    >>> given_answer("math", r"So \\boxed{ 1/2 }."), given_answer("choice", "<answer>B</answer>")
    ('1/2', 'B')
    """
    text = final_part(text, RESTARTS)
    if verifier in ("choice", "gym"):
        return last_block(text, "<answer>", "</answer>")
    if verifier not in ("math", "chain"):
        return None
    answer = final_answer(text)
    if not answer:
        return None
    return "".join(answer.strip("$").split())


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n samples, drawn without replacement, include one of the c right ones.

    >>> pass_at_k(4, 2, 1), pass_at_k(4, 1, 4), pass_at_k(4, 0, 4)
    (0.5, 1.0, 0.0)
    """
    return 1 - comb(n - c, k) / comb(n, k)


def majority(answers: list[str | None], rewards: list[float]) -> float:
    """The mean reward of the answers that were given most often; 0 if none was given.

    >>> majority(["5", "6", "5", None], [1, 0, 1, 0]), majority(["5", "6"], [1, 0])
    (1.0, 0.5)
    >>> majority([None, None], [0, 0])
    0.0
    """
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    shares = []
    for winner in votes:
        if votes[winner] == most:
            paid = [reward for answer, reward in zip(answers, rewards) if answer == winner]
            shares.append(sum(paid) / most)
    return sum(shares) / len(shares)


def interval(values: np.ndarray, resamplings: int = 10_000) -> dict[str, float]:
    """Mean, and 2.5 and 97.5 percentiles of the means of resampled questions; values [Q]."""
    rng = np.random.default_rng(0)
    n = len(values)
    counts = rng.multinomial(n, np.full(n, 1 / n), size=resamplings)  # draws, [resamplings, n]
    low, high = np.percentile(counts @ values / n, [2.5, 97.5])
    ends = {"mean": values.mean(), "low": low, "high": high}
    return {name: round(float(value), 4) for name, value in ends.items()}


def table(args: Args, summary: dict) -> str:
    lines = [
        f"{args.model} on {args.task} ({args.split}): {summary['questions']} questions × "
        f"{args.samples} samples, T {args.temperature:g}, top-p {args.top_p:g}, "
        f"at most {args.max_tokens} tokens",
        "",
        "| metric | mean | 95 % interval |",
        "|---|---|---|",
    ]
    for name, of in summary["metrics"].items():
        digits = 1 if name == "tokens" else 3
        mean, low, high = (f"{of[end]:.{digits}f}" for end in ("mean", "low", "high"))
        lines.append(f"| {name} | {mean} | {low} … {high} |")
    return "\n".join(lines) + "\n"


def machine() -> dict:
    """What produced the numbers: commit, hardware, versions."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    device = f"{cpu()}, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    return {
        "commit": commit,
        "device": device,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    name = text.partition("model name\t: ")[2].partition("\n")[0]
    return name or platform.machine()


if __name__ == "__main__":
    typed = tyro.cli(Args)
    defaults = Args(typed.model, typed.task, **PROTOCOLS.get(typed.protocol, {}))
    main(tyro.cli(Args, default=defaults))
