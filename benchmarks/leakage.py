"""Leakage of privileged information: RLSD's Theorem 1 and Fig. 1 in small.

    python benchmarks/leakage.py                    # the probe and the long runs; an hour on two CPU cores
    python benchmarks/leakage.py --steps 0          # the probe alone, a minute; runs in leakage.json are kept

The probe. A teacher that sees a reference r pulls the student towards P(· | x, r). The student does not see r, so it
can at best match the average over r. Theorem 1: the part of the forward-KL loss that no student can remove is the
mutual information I(Y_t; R | X, Y_<t). For each question the probe takes the right answer and K − 1 wrong ones (those
of other responses to it), reads the student's responses behind each, and reports, per token: the KL to the student
with the right reference and with a shuffled one (another question's), and I as the mean KL of the K teachers to their
mean. It is a part of the mean KL of the same K teachers to the student, which exceeds it by the KL of their mean to the
student. What the right and the shuffled reference have in common is format, not information.

The runs. GRPO, RLSD and OPSD (forward KL to the answer-conditioned teacher: live and frozen) from the same start
with the same rollouts per step, for --steps steps and --seeds seeds: held-out pass@1, response length, entropy, and the
rate of responses that mention a reference they cannot see. Writes results/leakage/{leakage.json, leakage.png,
leakage.md}. A run that is already under --out is not repeated.
"""
from __future__ import annotations

import json
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
from transformers import AutoModelForCausalLM

import rlsd
from common.chat import as_text, chat_ids, load_tokenizer
from common.sampler import HFSampler
from common.tasks import load_task

ROOT = Path(__file__).resolve().parent.parent
OPSD = ["hsd.py", "--demo", "--context", "answer", "--beta", "0", "--lr", "1e-4"]
RUNS = {
    "GRPO": ["rlsd.py", "--demo", "--lam", "0"],
    "RLSD": ["rlsd.py", "--demo"],
    "OPSD live": [*OPSD, "--teacher", "live"],
    "OPSD frozen": [*OPSD, "--teacher", "frozen"],
}


@dataclass
class Args:
    steps: int = 200  # steps per run (the paper: 200); 0: the probe alone
    seeds: int = 2  # seeds per run
    out: str = "runs/leakage"  # folder of the runs
    questions: int = 128  # of the probe
    references: int = 4  # K: the right answer and K − 1 others
    model: str = "assets/chain"  # of the probe


def probe(args: Args) -> dict:
    """Per-token KLs in nats, over the student's own responses."""
    tokenizer = load_tokenizer(args.model)
    lm = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    problems = load_task("chain", heldout=args.questions).heldout
    sampler = HFSampler(args.model, tokenizer, torch.device("cpu"))
    chats = [chat_ids(tokenizer, p.messages) for p in problems]
    groups = sampler.sample(chats, 16, seed=(0,), keys=range(len(chats)), max_tokens=64)
    rng, settings = random.Random(0), rlsd.Args()

    def logp(problem, answer: str, ids: list[int]) -> torch.Tensor:  # [|y|, V]
        shown = rlsd.Problem(problem.id, problem.messages, as_text(tokenizer, answer))
        before = chat_ids(tokenizer, rlsd.teacher_chat(shown, settings))
        with torch.no_grad():
            return lm(torch.tensor([before + ids])).logits[0, len(before) - 1 : -1].double().log_softmax(-1)

    rows = {"KL to the student, right reference": [], "KL to the student, shuffled reference": [],
            "KL to the student, unknown reference": [], "mean KL of the K teachers, same questions": [],
            "I(Y; R | X), K references": []}
    for problem, group in zip(problems, groups):
        others = sorted({o.text.rpartition("#### ")[2].strip() for o in group if "#### " in o.text} - {problem.answer})
        ids = group[0].response_ids
        with torch.no_grad():
            student = lm(torch.tensor([group[0].prompt_ids + ids])).logits[0, len(group[0].prompt_ids) - 1 : -1]
        student = student.double().log_softmax(-1)
        shuffled = rng.choice([p.answer for p in problems if p.answer != problem.answer])
        kl = lambda a, b: (a.exp() * (a - b)).sum(-1).mean().item()
        right = logp(problem, problem.answer, ids)
        for name, answer in (("right", problem.answer), ("shuffled", shuffled), ("unknown", "unknown")):
            rows[f"KL to the student, {name} reference"].append(kl(logp(problem, answer, ids), student))
        if len(others) >= args.references - 1:
            teachers = [right, *(logp(problem, a, ids) for a in rng.sample(others, args.references - 1))]
            mean = torch.stack(teachers).logsumexp(0) - torch.tensor(float(args.references)).log()
            rows["mean KL of the K teachers, same questions"].append(sum(kl(t, student) for t in teachers) / len(teachers))
            rows["I(Y; R | X), K references"].append(sum(kl(t, mean) for t in teachers) / len(teachers))
    tensors = {name: torch.tensor(values, dtype=torch.float64) for name, values in rows.items()}
    return {name: {"mean": x.mean().item(), "stderr": (x.std() / len(x) ** 0.5).item(), "questions": len(x)}
            for name, x in tensors.items()}


def train(args: Args) -> dict[str, list[list[dict]]]:
    """Metrics of every run, by method and seed."""
    found: dict[str, list[list[dict]]] = {name: [] for name in RUNS}
    for seed in range(args.seeds):
        for name, command in RUNS.items():
            folder = Path(args.out) / f"{name.replace(' ', '-')}-s{seed}"
            if not (folder / "curves.png").exists():
                line = [sys.executable, *command, "--steps", str(args.steps), "--seed", str(seed), "--out", args.out, "--name",
                        folder.name, "--eval_every", "10", "--eval_samples", "2", "--save_every", "1000000", "--resume", "auto"]
                print(" ".join(line[1:]), flush=True)
                subprocess.run(line, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            rows = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
            responses = [json.loads(text) for text in (folder / "rollouts.jsonl").read_text().splitlines()]
            leaks = sum(rlsd.refers_to_a_reference(r["response"]) for r in responses) / len(responses)
            found[name].append([{**row, "leak/dumped": leaks} for row in rows])
    return found


def main(args: Args) -> None:
    folder = ROOT / "results" / "leakage"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "leakage.json"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    about = {"command": "python benchmarks/leakage.py " + " ".join(sys.argv[1:]), "commit": commit, "args": asdict(args),
             "hardware": f"{os.cpu_count()} CPU cores ({platform.machine()})"}
    result = {"probe": {**about, "rows": probe(args)}}
    if args.steps:
        keep = ("step", "heldout/pass@1", "heldout/length", "entropy", "reward/mean", "leak/dumped")
        slim = {name: [[{k: row[k] for k in keep if k in row} for row in rows] for rows in seeds]
                for name, seeds in train(args).items()}
        result["long"] = {**about, "commands": {name: " ".join(command) for name, command in RUNS.items()}, "runs": slim}
    elif path.exists():
        result |= {k: v for k, v in json.loads(path.read_text()).items() if k == "long"}
    path.write_text(json.dumps(result))
    if "long" in result:
        draw(result["long"]["runs"], folder / "leakage.png")
    (folder / "leakage.md").write_text(table(result))
    print(table(result))


def table(result: dict) -> str:
    origin = lambda part: f"`{part['command'].strip()}`, commit {part['commit']}, {part['hardware']}."
    lines = [origin(result["probe"]), "", "| probe, nats a token | mean | standard error | questions |", "|---|---|---|---|"]
    lines += ["| {} | {mean:.4f} | {stderr:.4f} | {questions} |".format(name.replace("|", "\\|"), **row)
              for name, row in result["probe"]["rows"].items()]
    if "long" in result:
        lines += ["", origin(result["long"]), "", "| method | best held-out pass@1 (step) | at the end (step) | entropy at the "
                  "end | leaks (logged responses) |", "|---|---|---|---|---|"]
        for name, seeds in result["long"]["runs"].items():
            curve, steps = mean_curve(seeds, "heldout/pass@1")
            entropy, _ = mean_curve(seeds, "entropy")
            best = max(range(len(curve)), key=lambda i: curve[i])
            lines.append(f"| {name} | {curve[best]:.3f} ({steps[best]}) | {curve[-1]:.3f} ({steps[-1]}) | {entropy[-1]:.4f} | "
                         f"{sum(s[0]['leak/dumped'] for s in seeds) / len(seeds):.4f} |")
    return "\n".join(lines) + "\n"


def mean_curve(seeds: list[list[dict]], key: str) -> tuple[list[float], list[int]]:
    steps = sorted(set.intersection(*({r["step"] for r in rows if key in r} for rows in seeds)))
    at = [{r["step"]: r[key] for r in rows if key in r} for rows in seeds]
    return [sum(a[s] for a in at) / len(at) for s in steps], steps


def draw(runs: dict[str, list[list[dict]]], path: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(11, 4), layout="constrained")
    for i, (name, seeds) in enumerate(runs.items()):
        for axis, key in zip(axes, ("heldout/pass@1", "heldout/length", "entropy")):
            curve, steps = mean_curve(seeds, key)
            axis.plot(steps, curve, label=name, color=f"C{i}", linestyle="-" if i % 2 == 0 else "--", linewidth=2.2 - 0.2 * i)
            for rows in seeds if len(seeds) > 1 else ():
                axis.plot(*zip(*((r["step"], r[key]) for r in rows if key in r)), color=f"C{i}", alpha=0.3, linewidth=0.8)
    for axis, label in zip(axes, ("held-out pass@1", "held-out response length (tokens)", "entropy (nats)")):
        axis.set_title(label, fontsize=11)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes[0].set_ylim(-0.02, 1.02)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncol=len(runs), frameon=False)
    count = max(map(len, runs.values()))
    seeds = "one seed" if count == 1 else f"thick: mean of {count} seeds, thin: each of them"
    figure.suptitle(f"the same weights at the start, the same number of rollouts a step; {seeds}\n"
                    "OPSD (hsd.py) is sampled at top-p 0.95, GRPO and RLSD at 1, held-out problems too; a curve ends with its run", fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main(tyro.cli(Args))
