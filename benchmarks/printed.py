"""HSD as printed: does the paper's objective hold, and at which learning rate and β?

    python benchmarks/printed.py --jobs 2  # the embedded model, 20 runs of 100 steps: an hour
                                           # and one of 300

The paper's teacher is live, its KL is forward, and every objective has Ω = β KL(π_θ‖π_0) with β =
0.001 (Sec. 2.2). How Ω is summed over a response is not said: 0.001 per token, or 0.001 of the
whole sequence's KL, which is 0.036 here if a response's 36 tokens are averaged. So the scan is
learning rate × β × teacher, each run with the same rollouts, at top-p 1 on both sides. Every run is
a plain command of hsd.py; one that is already under --out is not repeated.

The last checkpoint of each run is then probed, and the start, each as its own (live) teacher: how
often are the student and the teacher right, and how much of the KL between them could a student
remove? It does not see the peer, so the best that it can learn is the mean of the teachers over the
peers; what is left is the mutual information of token and peer (leakage.py). Writes
results/printed/: runs.json, table.md, figure.png (pass@1 against steps) and paths.png (pass@1
against the KL).
"""
from __future__ import annotations

import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import tyro
from torch import Tensor
from transformers import AutoModelForCausalLM

import hsd
from benchmarks.compare import execute, rows_of
from benchmarks.evaluate import machine
from benchmarks.leakage import log_mean, log_probs, mean_kl
from common.chat import as_text, chat_ids, load_tokenizer
from common.sampler import HFSampler
from common.tasks import Problem, load_task
from common.tasks.chain import judge

ROOT = Path(__file__).resolve().parent.parent
KEPT = (
    "heldout/pass@1", "entropy", "teacher/entropy", "kl", "kl_ref", "length/mean", "frac_truncated",
)
PROBED = (  # mean: the mean of the teachers over the peers; kl/left: what no student can remove
    "student/right", "teacher/right", "student/entropy", "teacher/entropy", "mean/entropy", "kl",
    "kl/left",
)
START = "assets/chain"
QUESTIONS, GROUP = 64, 8  # of the probe: held-out questions, responses to each


@dataclass
class Args:
    rates: tuple[float, ...] = (1e-5, 3e-5, 1e-4, 3e-4)  # learning rates
    live: tuple[float, ...] = (0.001, 0.036, 0.1, 1.0)  # β of Ω with the live teacher
    frozen: tuple[float, ...] = (0.001,)  # the same with the frozen teacher
    steps: int = 100  # of 128 rollouts each
    long: int = 300  # steps of one more run: the first rate, live, the first β
    seed: int = 0
    out: str = "runs/printed"  # folder of the runs
    jobs: int = 1  # runs at the same time


class Setting(NamedTuple):
    """One run."""

    teacher: str
    beta: float
    lr: float
    steps: int


def main(args: Args) -> None:
    settings = settings_of(args)
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        jobs = []
        for setting in settings:
            command, folder = command_of(setting, args.seed), folder_of(setting, args)
            jobs.append(pool.submit(execute, command, folder, threads))
        for job, setting in zip(jobs, settings):
            job.result()
            print(f"{folder_of(setting, args).name}: done", flush=True)
    runs = []
    for setting in settings:
        folder = folder_of(setting, args)
        last = max((folder / "checkpoints").iterdir())
        runs.append(setting._asdict() | curves(rows_of(folder)) | {"probe": probe(last)})
    out = ROOT / "results" / "printed"
    out.mkdir(parents=True, exist_ok=True)
    command = "python benchmarks/printed.py " + " ".join(sys.argv[1:])
    result = {"command": command.strip(), "start": probe(START), "runs": runs, **machine()}
    (out / "runs.json").write_text(json.dumps(result) + "\n")
    (out / "table.md").write_text(table(runs))
    draw([run for run in runs if run["steps"] == args.steps], out / "figure.png")
    draw_paths(runs, out / "paths.png")
    print(table(runs))


def settings_of(args: Args) -> list[Setting]:
    rows = [("live", beta) for beta in args.live] + [("frozen", beta) for beta in args.frozen]
    settings = [Setting(*row, rate, args.steps) for row in rows for rate in args.rates]
    if args.long:
        settings.append(settings[0]._replace(steps=args.long))
    return settings


def command_of(setting: Setting, seed: int) -> list[str]:
    return [
        "hsd.py", "--demo", "--top_p", "1", "--teacher", setting.teacher,
        "--beta", f"{setting.beta:g}", "--lr", f"{setting.lr:g}", "--steps", str(setting.steps),
        "--eval_every", "10", "--seed", str(seed),
    ]


def folder_of(setting: Setting, args: Args) -> Path:
    name = f"{setting.teacher}-beta{setting.beta:g}-lr{setting.lr:g}-s{args.seed}"
    if setting.steps != args.steps:
        name += f"-{setting.steps}"
    return Path(args.out) / name


def curves(rows: list[dict]) -> dict[str, list]:
    """Each metric as [step, value] pairs: the evaluations, of the others the last ten steps' mean
    at every tenth step."""
    out = {}
    for name in KEPT:
        found = [(row["step"], row[name]) for row in rows if name in row]
        if name != "heldout/pass@1":
            parts = [found[i : i + 10] for i in range(0, len(found), 10)]
            found = [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]
        if found:
            out[name] = [[step, round(value, 5)] for step, value in found]
    return out


def probe(path: str | Path) -> dict[str, float]:
    """A model and itself as its own teacher with a peer; entropies and KLs in nats per token.

    One response per held-out question is read behind each of the question's other successful peers,
    if there are two or more; the teacher answers behind the first.
    """
    tokenizer = load_tokenizer(START)
    lm = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    sampler = HFSampler(str(path), tokenizer, torch.device("cpu"))
    problems = load_task("chain", heldout=QUESTIONS).heldout
    chats = [chat_ids(tokenizer, problem.messages) for problem in problems]
    groups = sampler.sample(chats, GROUP, seed=(0,), keys=range(QUESTIONS), max_tokens=64)
    found: dict[str, list] = {name: [] for name in PROBED}
    asked, hinted = [], []
    for problem, group in zip(problems, groups):
        verdicts = [judge(problem, rollout.text).reward == 1 for rollout in group]
        found["student/right"] += verdicts
        first = group[0]
        peers = [rollout for rollout, right in zip(group[1:], verdicts[1:]) if right]
        if len(peers) < 2:
            continue
        prompts = [teacher_prompt(problem, rollout.text, tokenizer) for rollout in peers]
        student = log_probs(lm, first.prompt_ids, first.response_ids)
        teachers = [log_probs(lm, prompt, first.response_ids) for prompt in prompts]
        mean = log_mean(teachers)
        found["student/entropy"].append(entropy(student))
        found["teacher/entropy"] += [entropy(teacher) for teacher in teachers]
        found["mean/entropy"].append(entropy(mean))
        found["kl"].append(mean_kl(teachers, student))
        found["kl/left"].append(mean_kl(teachers, mean))
        asked.append(problem)
        hinted.append(prompts[0])
    answers = sampler.sample(hinted, GROUP, seed=(1,), keys=range(len(hinted)), max_tokens=64)
    for problem, group in zip(asked, answers):
        found["teacher/right"] += [judge(problem, rollout.text).reward == 1 for rollout in group]
    return {name: sum(values) / len(values) for name, values in found.items() if values}


def teacher_prompt(problem: Problem, peer: str, tokenizer) -> list[int]:
    return chat_ids(tokenizer, hsd.teacher_chat(problem, as_text(tokenizer, peer), hsd.Args()))


def entropy(logp: Tensor) -> float:
    """Of log-probabilities [T, V], the mean over tokens."""
    return -(logp.exp() * logp).sum(-1).mean().item()


def table(runs: list[dict]) -> str:
    """One line per run. Entropies and KLs: the first and the last ten steps' mean, nats per token;
    "its own teacher" is the probe of the last checkpoint, also if the run's teacher was frozen."""
    lines = [
        "| teacher | β | learning rate | steps | pass@1: start | best (step) | end "
        "| entropy: start | end | teacher's: start | end | KL: start | end "
        "| its own teacher: KL in the peer alone | right | KL to π_0 | tokens | cut off |",
        "|" + "---|" * 18,
    ]
    for run in runs:
        scores, probed = run["heldout/pass@1"], run["probe"]
        step, best = max(scores, key=lambda pair: pair[1])
        cells = [run["teacher"], f"{run['beta']:g}", f"{run['lr']:g}", str(run["steps"])]
        cells.append(f"{scores[0][1]:.2f}")
        cells += [f"{best:.2f} ({step})", f"{scores[-1][1]:.2f}"]
        for name in ("entropy", "teacher/entropy", "kl"):
            cells += [f"{run[name][0][1]:.3f}", f"{run[name][-1][1]:.3f}"]
        for name, digits in (("kl/left", 3), ("teacher/right", 2)):
            cells.append(f"{probed[name]:.{digits}f}" if name in probed else "")
        cells.append(f"{run['kl_ref'][-1][1]:.3f}" if "kl_ref" in run else "")
        cells += [f"{run['length/mean'][-1][1]:.0f}", f"{run['frac_truncated'][-1][1]:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw_paths(runs: list[dict], path: Path) -> None:
    """A panel per teacher: held-out pass@1 against the KL of the ten steps before, a line per run,
    with a large dot at its end."""
    teachers = list(dict.fromkeys(run["teacher"] for run in runs))
    rates = list(dict.fromkeys(run["lr"] for run in runs))
    figure, axes = plt.subplots(
        1, len(teachers), figsize=(4.2 * len(teachers), 3.6), sharey=True, squeeze=False,
        layout="constrained",
    )
    for run in runs:
        axis = axes[0][teachers.index(run["teacher"])]
        kl = [value for _, value in run["kl"]]
        scores = [value for step, value in run["heldout/pass@1"] if step > 0]
        color = f"C{rates.index(run['lr'])}"
        axis.plot(kl, scores, ".-", color=color, alpha=0.6, label=f"lr {run['lr']:g}")
        axis.plot(kl[-1], scores[-1], "o", color=color)
        axis.set(title=f"{run['teacher']} teacher", xlabel="KL(teacher‖student), nats per token")
    for axis in axes[0]:
        lines = {line.get_label(): line for line in axis.get_lines()[::2]}
        axis.legend(lines.values(), lines, fontsize=7)
        axis.grid(alpha=0.3)
    axes[0][0].set(ylim=(0, 1), ylabel="held-out pass@1")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw(runs: list[dict], path: Path) -> None:
    """A panel per teacher and β: held-out pass@1 against steps, one line per learning rate."""
    teachers = list(dict.fromkeys(run["teacher"] for run in runs))
    betas = list(dict.fromkeys(run["beta"] for run in runs))
    figure, axes = plt.subplots(
        len(teachers), len(betas), figsize=(2.6 * len(betas), 2.6 * len(teachers)), sharex=True,
        sharey=True, squeeze=False, layout="constrained",
    )
    drawn = {(run["teacher"], run["beta"]) for run in runs}
    for teacher, row in zip(teachers, axes):
        for beta, axis in zip(betas, row):
            axis.set_visible((teacher, beta) in drawn)
    for column in zip(*axes):
        lowest = [axis for axis in column if axis.get_visible()][-1]
        lowest.set_xlabel("step")
        lowest.tick_params(labelbottom=True)
    for row in axes:
        row[0].set(ylim=(0, 1), ylabel="held-out pass@1")
    for run in runs:
        axis = axes[teachers.index(run["teacher"])][betas.index(run["beta"])]
        steps, scores = zip(*run["heldout/pass@1"])
        axis.plot(steps, scores, label=f"lr {run['lr']:g}")
        axis.set_title(f"{run['teacher']} teacher, β {run['beta']:g}", fontsize=9)
        axis.grid(alpha=0.3)
    axes[0][-1].legend(fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main(tyro.cli(Args))
