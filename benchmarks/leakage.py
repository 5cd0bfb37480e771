"""Leakage of privileged information: RLSD's Theorem 1 and Fig. 1 in small.

    python benchmarks/leakage.py              # the probe and the runs; an hour on two CPU cores
    python benchmarks/leakage.py --steps 0    # the probe alone, a minute

The probe. A teacher that sees a reference r pulls the student towards P(· | x, r). The student does
not see r, so it can at best match the average over r. Theorem 1: the part of the forward-KL loss
that no student can remove is the mutual information I(Y_t; R | X, Y_<t).

For each question the probe takes the right answer and K − 1 wrong ones, which other responses to it
gave. It reads one response of the student behind each and reports, per token: the KL to the student
with the right reference and with a shuffled one (another question's), and I as the mean KL of the K
teachers to their mean. The mean KL of the same K teachers to the student exceeds I by the KL of
their mean to the student. What the right and the shuffled reference have in common is format, not
information.

The runs. GRPO, RLSD and OPSD (forward KL to the answer-conditioned teacher: live and frozen) from
the same start with the same rollouts per step, for --steps steps and --seeds seeds: held-out
pass@1, response length, entropy, and the rate of responses that mention a reference they cannot
see. A run that is already under --out is not repeated.

Writes results/leakage/{leakage.json, leakage.png, leakage.md}. With --steps 0 the runs in
leakage.json are kept.
"""
from __future__ import annotations

import json
import math
import os
import platform
import random
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import tyro
from torch import Tensor
from transformers import AutoModelForCausalLM

import rlsd
from common.chat import as_text, chat_ids, load_tokenizer
from common.sampler import HFSampler, Rollout
from common.tasks import Problem, load_task

ROOT = Path(__file__).resolve().parent.parent
OPSD = ["hsd.py", "--demo", "--context", "answer", "--beta", "0", "--lr", "1e-4"]
RUNS = {
    "GRPO": ["rlsd.py", "--demo", "--lam", "0"],
    "RLSD": ["rlsd.py", "--demo"],
    "OPSD live": [*OPSD, "--teacher", "live"],
    "OPSD frozen": [*OPSD, "--teacher", "frozen"],
}
KEPT = ("step", "heldout/pass@1", "heldout/length", "entropy", "reward/mean", "leak/dumped")
PANELS = {
    "heldout/pass@1": "held-out pass@1",
    "heldout/length": "held-out response length (tokens)",
    "entropy": "entropy (nats)",
}
RESPONSES = 16  # of the probe, per question: the first is read, all of them give wrong answers


@dataclass
class Args:
    steps: int = 200  # steps per run (the paper: 200); 0: the probe alone
    seeds: int = 2  # seeds per run
    out: str = "runs/leakage"  # folder of the runs
    questions: int = 128  # of the probe
    references: int = 4  # K: the right answer and K − 1 others
    model: str = "assets/chain"  # of the probe


def main(args: Args) -> None:
    folder = ROOT / "results" / "leakage"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "leakage.json"
    about = provenance(args)
    result = {"probe": {**about, "rows": probe(args)}}
    if args.steps:
        commands = {name: " ".join(command) for name, command in RUNS.items()}
        result["long"] = {**about, "commands": commands, "runs": train(args)}
    elif path.exists():
        before = json.loads(path.read_text())
        if "long" in before:
            result["long"] = before["long"]
    path.write_text(json.dumps(result))
    if "long" in result:
        draw(result["long"]["runs"], folder / "leakage.png")
    (folder / "leakage.md").write_text(table(result))
    print(table(result))


def provenance(args: Args) -> dict:
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {
        "command": "python benchmarks/leakage.py " + " ".join(sys.argv[1:]),
        "commit": commit,
        "args": asdict(args),
        "hardware": f"{os.cpu_count()} CPU cores ({platform.machine()})",
    }


# --------------------------------------------------------------------------------------------------
# the probe
# --------------------------------------------------------------------------------------------------
def probe(args: Args) -> dict[str, dict]:
    """Per-token KLs in nats, over the student's own responses: mean, standard error, questions."""
    tokenizer = load_tokenizer(args.model)
    lm = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    problems = load_task("chain", heldout=args.questions).heldout
    groups = sample(problems, tokenizer, args)
    rng = random.Random(0)

    to_student = {"right": [], "shuffled": [], "unknown": []}  # the KL, by reference
    of_teachers, information = [], []
    for problem, group in zip(problems, groups):
        rollout = group[0]
        student = log_probs(lm, rollout.prompt_ids, rollout.response_ids)
        shuffled = rng.choice([p.answer for p in problems if p.answer != problem.answer])
        shown = {"right": problem.answer, "shuffled": shuffled, "unknown": "unknown"}
        for name, reference in shown.items():
            teacher = teacher_log_probs(lm, tokenizer, problem, reference, rollout)
            to_student[name].append(kl(teacher, student))
        wrong = wrong_answers(problem, group)
        if len(wrong) < args.references - 1:
            continue
        references = [problem.answer, *rng.sample(wrong, args.references - 1)]
        teachers = [teacher_log_probs(lm, tokenizer, problem, r, rollout) for r in references]
        of_teachers.append(mean_kl(teachers, student))
        information.append(mean_kl(teachers, log_mean(teachers)))

    rows = {f"KL to the student, {name} reference": values for name, values in to_student.items()}
    rows["mean KL of the K teachers, same questions"] = of_teachers
    rows["I(Y; R | X), K references"] = information
    return {name: summary(values) for name, values in rows.items()}


def sample(problems: list[Problem], tokenizer, args: Args) -> list[list[Rollout]]:
    sampler = HFSampler(args.model, tokenizer, torch.device("cpu"))
    chats = [chat_ids(tokenizer, problem.messages) for problem in problems]
    return sampler.sample(chats, RESPONSES, seed=(0,), keys=range(len(chats)), max_tokens=64)


def wrong_answers(problem: Problem, group: list[Rollout]) -> list[str]:
    """The different wrong answers of a question's responses."""
    given = {o.text.rpartition("#### ")[2].strip() for o in group if "#### " in o.text}
    return sorted(given - {problem.answer})


def teacher_log_probs(lm, tokenizer, problem: Problem, reference: str, rollout: Rollout) -> Tensor:
    """log P_T(· | x, r, y_<t) of the response, [T, V]: RLSD's prompt with this reference."""
    shown = Problem(problem.id, problem.messages, as_text(tokenizer, reference))
    prompt = chat_ids(tokenizer, rlsd.teacher_chat(shown, rlsd.Args()))
    return log_probs(lm, prompt, rollout.response_ids)


@torch.no_grad()
def log_probs(lm, prompt: list[int], response: list[int]) -> Tensor:
    """Of the whole vocabulary at every token of the response, [T, V], float64."""
    logits = lm(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(-1)


def kl(p: Tensor, q: Tensor) -> float:
    """KL(p‖q) of log-probabilities [T, V], the mean over tokens."""
    return (p.exp() * (p - q)).sum(-1).mean().item()


def mean_kl(teachers: list[Tensor], q: Tensor) -> float:
    return sum(kl(teacher, q) for teacher in teachers) / len(teachers)


def log_mean(teachers: list[Tensor]) -> Tensor:
    """The log of the teachers' mean probability, [T, V]."""
    return torch.stack(teachers).logsumexp(0) - math.log(len(teachers))


def summary(values: list[float]) -> dict[str, float]:
    x = torch.tensor(values, dtype=torch.float64)
    stderr = x.std() / len(x) ** 0.5
    return {"mean": x.mean().item(), "stderr": stderr.item(), "questions": len(x)}


# --------------------------------------------------------------------------------------------------
# the runs
# --------------------------------------------------------------------------------------------------
def train(args: Args) -> dict[str, list[list[dict]]]:
    """Metrics of every run, by method and seed."""
    found: dict[str, list[list[dict]]] = {name: [] for name in RUNS}
    for seed in range(args.seeds):
        for name, command in RUNS.items():
            folder = Path(args.out) / f"{name.replace(' ', '-')}-s{seed}"
            if not (folder / "curves.png").exists():
                execute(command, seed, folder, args)
            found[name].append(metrics_of(folder))
    return found


def execute(command: list[str], seed: int, folder: Path, args: Args) -> None:
    line = [
        sys.executable, *command, "--steps", str(args.steps), "--seed", str(seed),
        "--out", args.out, "--name", folder.name, "--eval_every", "10", "--eval_samples", "2",
        "--save_every", "1000000", "--resume", "auto",
    ]
    print(" ".join(line[1:]), flush=True)
    subprocess.run(line, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def metrics_of(folder: Path) -> list[dict]:
    """What leakage.json keeps of each step; leak/dumped is one rate for the whole run."""
    responses = lines_of(folder / "rollouts.jsonl")
    leaks = sum(rlsd.refers_to_a_reference(row["response"]) for row in responses)
    kept = []
    for row in lines_of(folder / "metrics.jsonl"):
        row["leak/dumped"] = leaks / len(responses)
        kept.append({key: row[key] for key in KEPT if key in row})
    return kept


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --------------------------------------------------------------------------------------------------
# writing
# --------------------------------------------------------------------------------------------------
def table(result: dict) -> str:
    lines = [origin(result["probe"]), "", *table_of_probe(result["probe"]["rows"])]
    if "long" in result:
        lines += ["", origin(result["long"]), "", *table_of_runs(result["long"]["runs"])]
    return "\n".join(lines) + "\n"


def origin(part: dict) -> str:
    return f"`{part['command'].strip()}`, commit {part['commit']}, {part['hardware']}."


def table_of_probe(rows: dict[str, dict]) -> list[str]:
    lines = ["| probe, nats a token | mean | standard error | questions |", "|---|---|---|---|"]
    for name, row in rows.items():
        cells = [name.replace("|", "\\|"), f"{row['mean']:.4f}", f"{row['stderr']:.4f}"]
        cells.append(str(row["questions"]))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def table_of_runs(runs: dict[str, list[list[dict]]]) -> list[str]:
    lines = [
        "| method | best held-out pass@1 (step) | at the end (step) | entropy at the end "
        "| leaks (logged responses) |",
        "|---|---|---|---|---|",
    ]
    for name, seeds in runs.items():
        scores, steps = mean_curve(seeds, "heldout/pass@1")
        entropy, _ = mean_curve(seeds, "entropy")
        best = scores.index(max(scores))
        leaks = sum(rows[0]["leak/dumped"] for rows in seeds) / len(seeds)
        lines.append(
            f"| {name} | {scores[best]:.3f} ({steps[best]}) | {scores[-1]:.3f} ({steps[-1]}) "
            f"| {entropy[-1]:.4f} | {leaks:.4f} |"
        )
    return lines


def curve(rows: list[dict], key: str) -> dict[int, float]:
    """step → value of a run, at the steps that have it."""
    return {row["step"]: row[key] for row in rows if key in row}


def mean_curve(seeds: list[list[dict]], key: str) -> tuple[list[float], list[int]]:
    """The mean over seeds at the steps that all of them have; and these steps."""
    curves = [curve(rows, key) for rows in seeds]
    steps = sorted(set.intersection(*map(set, curves)))
    means = [sum(values[step] for values in curves) / len(curves) for step in steps]
    return means, steps


def draw(runs: dict[str, list[list[dict]]], path: Path) -> None:
    figure, axes = plt.subplots(1, len(PANELS), figsize=(11, 4), layout="constrained")
    for axis, (key, title) in zip(axes, PANELS.items()):
        draw_panel(axis, runs, key)
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes[0].set_ylim(-0.02, 1.02)
    names = axes[0].get_legend_handles_labels()
    figure.legend(*names, loc="outside lower center", ncol=len(runs), frameon=False)
    count = max(map(len, runs.values()))
    seeds = "one seed" if count == 1 else f"thick: mean of {count} seeds, thin: each of them"
    figure.suptitle(
        f"the same weights at the start, the same number of rollouts per step; {seeds}\n"
        "OPSD (hsd.py) is sampled at top-p 0.95, GRPO and RLSD at 1, held-out problems too; "
        "a curve ends with its run",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_panel(axis, runs: dict[str, list[list[dict]]], key: str) -> None:
    for i, (name, seeds) in enumerate(runs.items()):
        color = f"C{i}"
        dashes = "-" if i % 2 == 0 else "--"
        means, steps = mean_curve(seeds, key)
        axis.plot(steps, means, label=name, color=color, linestyle=dashes, linewidth=2.2 - 0.2 * i)
        if len(seeds) == 1:
            continue
        for rows in seeds:
            values = curve(rows, key)
            axis.plot(list(values), list(values.values()), color=color, alpha=0.3, linewidth=0.8)


if __name__ == "__main__":
    main(tyro.cli(Args))
