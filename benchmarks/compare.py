"""Methods side by side: one model, task, sampler and verifier, equal rollouts, several seeds.

    python benchmarks/compare.py chain --jobs 2  # the embedded model; hours on two CPU cores
    python benchmarks/compare.py sdpo --jobs 2   # a paper's claims; also hsd, grpo, sdzero, breaks
    python benchmarks/compare.py smollm2 --model PATH_OF_SMOLLM2_135M_INSTRUCT
    python benchmarks/compare.py qwen --model PATH_OF_QWEN2_5_CODER_0_5B_INSTRUCT

A grid (GRIDS below) declares methods, tuning and seeds. If it has several learning rates, each
method gets the same small tuning first: every rate on seeds that are not reported. The rate with
the best final held-out pass@1 wins. Then the reported seeds run.

Every run is a plain command of a method file. A run that is already under --out is not repeated, so
the same command resumes an interrupted comparison, and grids share their runs. Writes into
results/compare/NAME/: search.json and search.png (the tuning), runs.json, table.md, rollouts.png,
tokens.png. Methods that --only leaves out keep the results that are there, if their commands are
still the same.
"""
from __future__ import annotations

import json
import multiprocessing
import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from math import comb
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import transformers
import tyro

from common import checkpoints
from common.chat import chat_ids, load_tokenizer
from common.sampler import HFSampler
from common.tasks import load_task
from common.verifiers.pool import Verifier
from sdzero import RESTARTS

ROOT = Path(__file__).resolve().parent.parent
DEVICE = torch.device("cpu")
if torch.cuda.is_available():
    DEVICE = torch.device("cuda")


@dataclass
class Method:
    typed: str  # the command, without its rate and seed
    rate: str = "--lr"  # the flag that is tuned
    fixed: float = 0.0  # its value if the grid does not tune it; 0: the grid's value

    @property
    def command(self) -> list[str]:
        return shlex.split(self.typed)


# --------------------------------------------------------------------------------------------------
# methods on the embedded model: 5,120 rollouts each; settings not named are the demo's
# --------------------------------------------------------------------------------------------------
CHAIN = "--demo --steps 40 --eval_every 8"  # 40 steps of 16 × 8
GRPO = f"grpo.py {CHAIN}"
SDPO = f"sdpo.py {CHAIN} --kl reverse"
HSD = f"hsd.py {CHAIN} --beta 0"
FROZEN = f"{HSD} --teacher frozen"
SD_ZERO = "sdzero.py --demo --eval_every 10 --wrong_share 0.5"
BOTH = f"{SD_ZERO} --srt_questions 640 --batch_size 64"  # 640 + 3 × 640, then 40 × 64

METHODS = {
    "GRPO": Method(GRPO),
    "Dr. GRPO": Method(f"{GRPO} --loss dr_grpo"),
    "DAPO, no refill": Method(f"{GRPO} --loss dapo --dynamic_sampling 0"),
    "RLSD": Method(f"rlsd.py {CHAIN}"),
    "SDPO": Method(f"sdpo.py {CHAIN} --kl jsd"),
    "SDPO reverse KL": Method(SDPO),
    "HSD live": Method(f"{HSD} --teacher live"),
    "HSD frozen": Method(FROZEN),
    "HSD frozen, reverse KL": Method(f"{FROZEN} --kl reverse"),
    "OPSD answer": Method(f"{FROZEN} --context answer"),
    "OPSD solution": Method(f"{FROZEN} --context solution"),
    "SDFT": Method(f"{HSD} --teacher ema --teacher_rate 0.01 --context solution"),
    "GRPO+OPSD": Method(f"{HSD} --teacher live --context answer --grpo_mix 0.5"),
    "SD-Zero": Method(f"{BOTH} --sd_questions 2560 --rounds 1"),
    "SRT": Method(
        f"{SD_ZERO} --phase srt --srt_questions 1280 --sd_questions 64 --kept_traces 2000",
        rate="--srt_lr",
    ),
    "SD only": Method(
        f"{SD_ZERO} --phase sd --srt_questions 16 --sd_questions 2560 --rounds 2 --batch_size 64"
    ),
    "RFT": Method(f"{SD_ZERO} --phase srt --baseline rft --srt_questions 1280", rate="--srt_lr"),
}
FAMILIES = {  # panels of the figures
    "with a verifier's advantage": (
        "GRPO", "Dr. GRPO", "DAPO, no refill", "RLSD", "GRPO+OPSD",
    ),
    "learning from a peer or feedback": (
        "SDPO", "SDPO reverse KL", "HSD live", "HSD frozen", "HSD frozen, reverse KL",
    ),
    "learning from an answer, a solution, oneself": (
        "OPSD answer", "OPSD solution", "SDFT", "SD-Zero", "SRT", "SD only", "RFT",
    ),
}

# The papers' claims, each as changes to one method
METHODS |= {
    "SDPO, average (0.05)": Method(SDPO),
    "SDPO, trust region (0.05)": Method(f"{SDPO} --teacher trust_region"),
    "SDPO, start": Method(f"{SDPO} --teacher frozen"),
    "SDPO, live": Method(f"{SDPO} --teacher live"),
    "SDPO, likeliest token": Method(f"{SDPO} --granularity token"),
    "SDPO, sampled token": Method(f"{SDPO} --granularity sampled"),
    "SDPO, whole response": Method(f"{SDPO} --granularity sequence"),
    "HSD forward, start": Method(FROZEN),
    "HSD reverse, start": Method(f"{FROZEN} --kl reverse"),
    "HSD 64 × 2": Method(f"{FROZEN} --batch_size 64 --group_size 2"),
    "HSD 32 × 4": Method(f"{FROZEN} --batch_size 32 --group_size 4"),
    "HSD 8 × 16": Method(f"{FROZEN} --batch_size 8 --group_size 16"),
    "HSD shortest peer": Method(f"{FROZEN} --peer shortest"),
    "HSD top-p 0.95": Method(FROZEN),
    "HSD top-p 1": Method(f"{FROZEN} --top_p 1"),
    "GRPO, 3e-4": Method(GRPO),
    "GRPO, 1e-3": Method(GRPO, fixed=1e-3),
    "SDPO, 1e-3": Method(SDPO, fixed=1e-3),
    "SDPO, own success too": Method(SDPO.replace("sdpo.py", "benchmarks/own_hint.py")),
    "SD-Zero, one round": METHODS["SD-Zero"],
    "SD-Zero, two rounds": Method(f"{BOTH} --sd_questions 1280 --rounds 2"),
    "SD-Zero, phase 1": replace(METHODS["SRT"], fixed=1e-4),
    "SD-Zero, phase 2": METHODS["SD only"],
}
for name in ("GRPO", "DAPO", "GSPO", "CISPO"):
    METHODS[f"{name} × 4"] = Method(
        f"{GRPO} --loss {name.lower()} --dynamic_sampling 0 --minibatches 4", fixed=1e-4
    )
CLAIMS = {  # grid → panels of its figure
    "sdpo": {  # Table 4 and Fig. 10 of the SDPO paper
        "Whose weights teach": (
            "SDPO, average (0.05)", "SDPO, trust region (0.05)", "SDPO, start", "SDPO, live",
        ),
        "What a token is told": (
            "SDPO, average (0.05)", "SDPO, likeliest token", "SDPO, sampled token",
            "SDPO, whole response",
        ),
    },
    "hsd": {
        "Direction": ("HSD forward, start", "HSD reverse, start"),
        "Group size, 128 rollouts a step": (
            "HSD 64 × 2", "HSD 32 × 4", "HSD forward, start", "HSD 8 × 16",
        ),
        "Which peer": ("HSD forward, start", "HSD shortest peer"),
    },
    "top-p": {"Top-p of the rollouts": ("HSD top-p 0.95", "HSD top-p 1")},
    "breaks": {
        "The tuned rate, and three times": (
            "GRPO, 3e-4", "GRPO, 1e-3", "SDPO, average (0.05)", "SDPO, 1e-3",
        ),
        "Own success as the hint": ("SDPO, average (0.05)", "SDPO, own success too"),
    },
    "grpo": {"Four updates a step": ("GRPO × 4", "DAPO × 4", "GSPO × 4", "CISPO × 4")},
    "sdzero": {
        "Phases": (
            "SD-Zero, one round", "SD-Zero, two rounds", "SD-Zero, phase 1", "SD-Zero, phase 2",
        ),
    },
}

# --------------------------------------------------------------------------------------------------
# SmolLM2-135M-Instruct learns to say which of two numbers is larger: 384 rollouts each
# --------------------------------------------------------------------------------------------------
LARGER = (
    "--demo --task jsonl:benchmarks/larger.jsonl --instruction 'Begin with \"The answer is\".' "
    "--heldout 32 --temperature 0.7 --max_tokens 24 --lora_rank 16"
)
SMALL = f"{LARGER} --batch_size 4 --group_size 8 --steps 12 --eval_every 3"
SMALL_HSD = f"hsd.py {SMALL} --teacher frozen --beta 0 --top_p 1"
METHODS |= {
    "GRPO (135M)": Method(f"grpo.py {SMALL}"),
    "RLSD (135M)": Method(f"rlsd.py {SMALL}"),
    "SDPO (135M)": Method(f"sdpo.py {SMALL} --kl reverse"),
    "HSD (135M)": Method(SMALL_HSD),
    "HSD reverse KL (135M)": Method(f"{SMALL_HSD} --kl reverse"),
    "SD-Zero (135M)": Method(  # 48 × 4 + 192
        f"sdzero.py {LARGER} --srt_questions 48 --srt_max_tokens 32 --srt_temperature 0.7 "
        "--sd_questions 192 --batch_size 32 --eval_every 3"
    ),
    "SD only (135M)": Method(
        f"sdzero.py {LARGER} --phase sd --srt_questions 16 --sd_questions 384 --batch_size 32 "
        "--eval_every 3"
    ),
    "RFT (135M)": Method(  # 96 × 4
        f"sdzero.py {LARGER} --phase srt --baseline rft --srt_questions 96 --srt_max_tokens 24 "
        "--srt_temperature 0.7 --eval_every 3",
        rate="--srt_lr",
    ),
}

# --------------------------------------------------------------------------------------------------
# Qwen2.5-Coder-0.5B-Instruct learns to multiply two digits by one: 512 rollouts each
# --------------------------------------------------------------------------------------------------
PRODUCTS = (
    "--demo --task jsonl:benchmarks/products.jsonl "
    "--instruction 'Work briefly and finish with the final answer in \\boxed{}.' "
    "--heldout 48 --max_tokens 96 --lora_rank 16 --token_budget 2048"
)
EVALUATION = "--eval_every 4 --eval_samples 1"
MEDIUM = f"{PRODUCTS} --batch_size 8 --group_size 8 --steps 8 {EVALUATION}"
MEDIUM_HSD = f"hsd.py {MEDIUM} --teacher frozen --beta 0 --top_p 1"
METHODS |= {
    "GRPO (0.5B)": Method(f"grpo.py {MEDIUM}"),
    "RLSD (0.5B)": Method(f"rlsd.py {MEDIUM}"),
    "SDPO (0.5B)": Method(f"sdpo.py {MEDIUM} --kl reverse"),
    "HSD (0.5B)": Method(MEDIUM_HSD),
    "HSD reverse KL (0.5B)": Method(f"{MEDIUM_HSD} --kl reverse"),
    "SD-Zero (0.5B)": Method(  # 64 × 4 + 256
        f"sdzero.py {PRODUCTS} --srt_questions 64 --srt_max_tokens 96 --sd_questions 256 "
        f"--batch_size 64 {EVALUATION}"
    ),
    "SD only (0.5B)": Method(
        f"sdzero.py {PRODUCTS} --phase sd --srt_questions 16 --sd_questions 512 "
        f"--batch_size 64 {EVALUATION}"
    ),
    "RFT (0.5B)": Method(  # 128 × 4
        f"sdzero.py {PRODUCTS} --phase srt --baseline rft --srt_questions 128 "
        f"--srt_max_tokens 96 {EVALUATION}",
        rate="--srt_lr",
    ),
}


# --------------------------------------------------------------------------------------------------
# grids
# --------------------------------------------------------------------------------------------------
PHASES = ("collect", "sample", "verify", "score", "update", "sync")  # seconds that count
DASHES = (  # of the curves of a panel
    "-", (0, (5, 2)), (0, (2.5, 1.5)), (0, (7, 2, 2, 2)), (0, (5, 1.5, 1.5, 1.5, 1.5, 1.5)),
    (0, (9, 3)), "-",
)
WATCHED = (  # kept in runs.json, step by step
    "reward/mean", "frac_truncated", "teacher/accuracy", "teacher/frac_truncated", "revise/pass@1",
    "clip_frac",
)


@dataclass
class Grid:
    panels: dict[str, tuple[str, ...]]  # of the figures; all names are run
    seeds: tuple[int, ...]
    rates: tuple[float, ...]  # of the tuning; one: no tuning
    tuning_seeds: tuple[int, ...] = ()
    runs: str = "chain"  # the folder of its runs: grids on the same model and task share them
    samples: int = 8  # a held-out problem, at the end


def named(model: str) -> tuple[str, ...]:
    """The methods whose name has `model` in it."""
    return tuple(name for name in METHODS if model in name)


GRIDS = {
    "chain": Grid(FAMILIES, (0, 1, 2, 3, 4), (1e-4, 3e-4), (100,)),
    **{name: Grid(panels, (0, 1), (3e-4,)) for name, panels in CLAIMS.items()},
    "smollm2": Grid(
        {"SmolLM2-135M-Instruct: the larger of two numbers": named("135M")},
        (0, 1), (3e-4, 1e-3), (100,), runs="smollm2",
    ),
    "qwen": Grid(  # one seed: a run takes an hour on a core
        {"Qwen2.5-Coder-0.5B-Instruct: two digits times one": named("0.5B")},
        (0,), (1e-4, 3e-4), (100,), runs="qwen",
    ),
}


@dataclass
class Args:
    grid: tyro.conf.Positional[str]  # one of GRIDS
    model: str = ""  # folder of the model, if the grid needs one
    out: str = "runs/compare"  # folder of the runs
    jobs: int = 1  # runs at the same time; each gets its share of the CPU's threads
    only: str = ""  # methods, joined by semicolons; empty: all


@dataclass
class Job:
    """One run: a method, its rate and its seed."""

    method: str
    rate: float
    seed: int


# --------------------------------------------------------------------------------------------------
# running
# --------------------------------------------------------------------------------------------------
def main(args: Args) -> None:
    grid = GRIDS[args.grid]
    names = dict.fromkeys(name for members in grid.panels.values() for name in members)
    chosen = [m for m in names if not args.only or m in args.only.split(";")]
    rates, search = tuned(chosen, grid, args)  # search: method → rate → runs
    run_all([Job(m, rates[m], seed) for seed in grid.seeds for m in chosen], grid.samples, args)

    runs: dict[str, list[dict]] = {m: [] for m in chosen}
    stopped = []
    for m in chosen:
        for seed in grid.seeds:
            folder = folder_of(Job(m, rates[m], seed), args)
            if (folder / "error.txt").exists():
                stopped.append(f"{m}, seed {seed}, stopped: {(folder / 'error.txt').read_text()}")
            else:
                runs[m].append({"seed": seed, **result_of(folder, grid.samples)})
    write(runs, rates, search, stopped, grid, args)


def tuned(methods: list[str], grid: Grid, args: Args) -> tuple[dict[str, float], dict]:
    """Each method's rate with the best final pass@1, the mean over the tuning seeds; and all of
    these runs. With one rate there is nothing to run."""
    if len(grid.rates) == 1:
        return {m: METHODS[m].fixed or grid.rates[0] for m in methods}, {}
    jobs = {(m, rate): [Job(m, rate, seed) for seed in grid.tuning_seeds]
            for m in methods for rate in grid.rates}
    run_all([job for some in jobs.values() for job in some], 0, args)
    search: dict[str, dict[str, list[dict]]] = {m: {} for m in methods}
    for (m, rate), some in jobs.items():
        search[m][f"{rate:g}"] = [curves_of(folder_of(job, args)) for job in some]
    best = {m: max(found, key=lambda rate: final(found[rate])) for m, found in search.items()}
    return {m: float(rate) for m, rate in best.items()}, search


def final(runs: list[dict]) -> float:
    """Held-out pass@1 at the last evaluation, the mean over runs."""
    return float(np.mean([run["pass"][-1] for run in runs]))


def folder_of(job: Job, args: Args) -> Path:
    base = Path(args.out) / GRIDS[args.grid].runs
    return base / folder_name(job.method) / f"lr{job.rate:g}-s{job.seed}"


def folder_name(method: str) -> str:
    """One command has one folder, whatever a grid calls it: the first name in METHODS."""
    typed = METHODS[method].typed
    first = next(name for name, other in METHODS.items() if other.typed == typed)
    return "".join(c if c.isalnum() else "-" for c in first)


def command_of(job: Job, args: Args) -> list[str]:
    method = METHODS[job.method]
    model = ["--model", args.model] if args.model else []
    return [*method.command, *model, method.rate, f"{job.rate:g}", "--seed", str(job.seed)]


def run_all(jobs: list[Job], samples: int, args: Args) -> None:
    """Every job that is not finished, `--jobs` at a time, each in processes of its own."""
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        waiting = []
        for job in jobs:
            command, folder = command_of(job, args), folder_of(job, args)
            waiting.append(pool.submit(run_one, command, folder, threads, samples))
        for one in waiting:
            one.result()


def run_one(command: list[str], folder: Path, threads: int, samples: int) -> None:
    """A run and its final evaluation."""
    torch.set_num_threads(threads)
    transformers.logging.disable_progress_bar()
    execute(command, folder, threads)
    said = f"{folder.parent.name}/{folder.name}"
    if (folder / "error.txt").exists():
        print(f"{said}: {(folder / 'error.txt').read_text()}", flush=True)
        return
    if samples:
        pass_at(folder, samples)
    settings = json.loads((folder / "args.json").read_text())
    phase_2 = command[0] == "sdzero.py" and settings["phase"] != "srt"
    if phase_2 and settings["lora_rank"] == 0:  # adapters of a teacher are not read there
        revision = [sys.executable, "benchmarks/revision.py", str(folder)]
        subprocess.run(revision, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    print(f"{said}: {rows_of(folder)[-1]['heldout/pass@1']:.3f}", flush=True)


def execute(command: list[str], folder: Path, threads: int) -> None:
    """Run a command of a method file into `folder`, unless a finished run is there. If the file
    itself refuses or stops the run with a line that begins with "error: ", that line is written to
    error.txt: it is a result."""
    if (folder / "error.txt").exists():
        return
    if (folder / "curves.png").exists():
        if not (folder / "ran.json").exists():
            raise SystemExit(f"error: {folder} does not say which commit ran it (no ran.json); "
                             "remove it to run it again")
        return
    line = [sys.executable, *command, "--out", str(folder.parent), "--name", folder.name,
            "--resume", "auto", "--save_every", "1000000"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=environment)
    said = [row for row in done.stderr.splitlines() if row.startswith("error: ")]
    if done.returncode and said:
        (folder / "error.txt").write_text(said[-1])
    elif done.returncode:
        raise RuntimeError(f"{' '.join(line)}\n{done.stderr[-2000:]}")
    else:
        (folder / "ran.json").write_text(json.dumps(here()))


# --------------------------------------------------------------------------------------------------
# reading a run
# --------------------------------------------------------------------------------------------------
def result_of(folder: Path, samples: int) -> dict:
    """What runs.json keeps of a finished run."""
    found = curves_of(folder) | pass_at(folder, samples)
    if (folder / "self_localisation.json").exists():
        found["self_localisation"] = localised(folder)
    return found


def curves_of(folder: Path) -> dict:
    """What a finished run logged, and the commit and machine that it ran on."""
    rows = rows_of(folder)
    last = next(row for row in reversed(rows) if "entropy" in row or "srt/loss" in row)
    found = json.loads((folder / "ran.json").read_text()) | {
        "lead": lead_of(rows), **progress(folder),
        "entropy": last.get("entropy"), "peak_gib": max(row["peak_gib"] for row in rows),
    }
    for name in WATCHED:
        values = [row[name] for row in rows if name in row]
        if values:
            found[name] = values
    return found


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def progress(folder: Path) -> dict[str, list[float]]:
    """Held-out pass@1 against rollouts, sampled tokens and seconds (evaluation left out)."""
    args = json.loads((folder / "args.json").read_text())
    spent = {"rollouts": 0.0, "tokens": 0.0, "seconds": 0.0}
    for batch in collected(folder):
        spent["rollouts"] += batch["generations"]
        spent["tokens"] += batch["sampled_tokens"]
    found: dict[str, list[float]] = {**{key: [] for key in spent}, "pass": []}
    for i, row in enumerate(rows_of(folder)):
        if "heldout/pass@1" in row:
            for key, value in spent.items():
                found[key].append(value if i > 0 else 0)  # the start costs nothing
            found["pass"].append(row["heldout/pass@1"])
        if "lr" in row:  # a step, also one whose update was skipped
            group = args["batch_size"] * args.get("group_size", 1) if "reward/mean" in row else 0
            new = row.get("budget/generations", group)
            spent["rollouts"] += new
            spent["tokens"] += row.get("budget/sampled_tokens", new * row.get("length/mean", 0))
            spent["seconds"] += sum(row.get(f"time/{phase}", 0) for phase in PHASES)
    return found


def collected(folder: Path) -> list[dict]:
    """What SD-Zero's phase 1 sampled, batch by batch; of another method nothing."""
    traces = folder / "traces.jsonl"
    lines = traces.read_text().splitlines() if traces.exists() else []
    return [json.loads(line) for line in lines if '"batch"' in line]


def lead_of(rows: list[dict]) -> float | None:
    """How much more often the teacher was right than the student, on the same questions, in step 0:
    of SD-Zero its revisions against the first attempts, in training's first evaluation. None: the
    run has no teacher.

    >>> lead_of([{"revise/pass@1": 0.75, "heldout/pass@1": 0.5}, {"kl": 0.1}])
    0.25
    >>> lead_of([{"teacher/lead": 0.5, "kl": 0.1}]), lead_of([{"revise/pass@1": 0.75}])
    (0.5, None)
    """
    if "teacher/lead" in rows[0]:
        return rows[0]["teacher/lead"]
    if any("kl" in row for row in rows):  # sdzero.py with its phase 2
        return rows[0]["revise/pass@1"] - rows[0]["heldout/pass@1"]
    return None


def first_to(run: dict[str, list[float]], level: float) -> float | None:
    """Rollouts at the first evaluation that reaches `level`; None if none does."""
    return next((r for r, p in zip(run["rollouts"], run["pass"]) if p >= level), None)


def pass_at(folder: Path, n: int) -> dict[str, float]:
    """pass@1 and pass@8 of a run's last checkpoint on the held-out problems, from n samples
    (unbiased estimator), and the mean length of a response. Kept in pass_at.json."""
    cache = folder / "pass_at.json"
    if cache.exists():
        return json.loads(cache.read_text())
    args = json.loads((folder / "args.json").read_text())
    path = str(checkpoints.last(folder))
    tokenizer = load_tokenizer(path)
    task = load_task(args["task"], heldout=args["heldout"], data_dir=args["data_dir"],
                     instruction=args["instruction"])
    problems = task.heldout
    prompts = [chat_ids(tokenizer, problem.messages) for problem in problems]
    sampler = HFSampler(path, tokenizer, DEVICE)
    groups = sampler.sample(prompts, n, seed=(999,), keys=range(len(problems)),
                            max_tokens=args["max_tokens"], temperature=args["temperature"])
    rollouts = [rollout for group in groups for rollout in group]
    verifier = Verifier(restarts=RESTARTS)
    asked = [problem for problem in problems for _ in range(n)]
    verdicts = verifier(asked, [rollout.text for rollout in rollouts])
    verifier.close()
    right = [sum(v.reward == 1 for v in verdicts[i * n : i * n + n]) for i in range(len(problems))]
    among_8 = [1 - comb(n - c, 8) / comb(n, 8) for c in right]
    found = {"pass@1": sum(right) / len(rollouts), "pass@8": float(np.mean(among_8)),
             "length": float(np.mean([len(rollout.response_ids) for rollout in rollouts]))}
    cache.write_text(json.dumps(found))
    return found


def localised(folder: Path) -> dict[str, list[float]]:
    """SD-Zero's Fig. 4 in two numbers, of its wrong ("0") and right ("1") responses: the mean
    KL(student‖teacher) of a token in nats, and the share of a response's KL that lies in the
    twentieth of its tokens with the largest."""
    curves = json.loads((folder / "self_localisation.json").read_text())
    found = {}
    for reward, rows in curves.items():
        if rows:
            share = [row[0] / max(sum(row), 1e-12) for row in rows]
            found[reward] = [float(np.mean(rows)), float(np.mean(share))]
    return found


# --------------------------------------------------------------------------------------------------
# writing
# --------------------------------------------------------------------------------------------------
def write(runs: dict[str, list[dict]], rates: dict[str, float], search: dict, stopped: list[str],
          grid: Grid, args: Args) -> None:
    out = ROOT / "results" / "compare" / args.grid
    out.mkdir(parents=True, exist_ok=True)

    def hide(text: str) -> str:  # the reader's paths are others
        return text.replace(args.model or "\0", "MODEL").replace(args.out, "RUNS")

    about = {"command": hide("python benchmarks/compare.py " + shlex.join(sys.argv[1:])), **here()}

    def typed(m: str, rate: float) -> str:
        words = command_of(Job(m, rate, 0), args)
        return hide(shlex.join(words[:-2]))  # without the seed

    commands = {m: typed(m, rates[m]) for m in runs}
    ran = {m: origin(results, about) for m, results in runs.items()}
    chosen = list(runs)
    before = read_results(out / "runs.json", grid)
    for m, command in before["commands"].items():
        if m not in runs and m in METHODS and command == typed(m, float(command.split()[-1])):
            runs[m], commands[m], ran[m] = before["runs"][m], command, before["ran"][m]
            stopped += [line for line in before["stopped"] if line.startswith(f"{m}, seed ")]
    if search:
        scores = {m: {rate: final(some) for rate, some in found.items()}
                  for m, found in search.items()}
        if (out / "search.json").exists():
            found = json.loads((out / "search.json").read_text())
            kept = found["final held-out pass@1"]
            scores = {m: kept[m] for m in runs if m in kept} | scores
            kept = found.get("runs", {})
            search = {m: kept[m] for m in runs if m in kept} | search
        found = {
            "command": about["command"], "seeds": grid.tuning_seeds,
            "final held-out pass@1": scores, "runs": search,  # each has its commit and machine
        }
        (out / "search.json").write_text(json.dumps(found))
        draw_search(search, out / "search.png")
    result = {
        **about, "seeds": grid.seeds, "commands": commands, "ran": ran, "runs": runs,
        "stopped": stopped,
    }
    (out / "runs.json").write_text(json.dumps(result))
    text = table(about, runs, commands, ran, grid, stopped)
    (out / "table.md").write_text(text)
    for axis in ("rollouts", "tokens"):
        draw(grid.panels, runs, commands, axis, out / f"{axis}.png")
    for m in chosen:
        figure = folder_of(Job(m, rates[m], grid.seeds[0]), args) / "self_localisation.png"
        if figure.exists():
            shutil.copy(figure, out / f"self-localisation-{folder_name(m)}.png")
    print(text)


def read_results(path: Path, grid: Grid) -> dict:
    """The earlier runs.json at `path`. Empty if there is none, or if its seeds are others."""
    empty = {"commands": {}, "ran": {}, "runs": {}, "stopped": []}
    if not path.exists():
        return empty
    before = json.loads(path.read_text())
    if tuple(before["seeds"]) != grid.seeds:
        return empty
    before.setdefault("ran", {m: origin([], before) for m in before["runs"]})
    return before


def here() -> dict[str, str]:
    """This commit and this machine."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True,
                            text=True)
    hardware = f"{os.cpu_count()} CPU cores ({platform.machine()})"
    if DEVICE.type == "cuda":
        hardware = f"{torch.cuda.get_device_name()}, {hardware}"
    return {"commit": commit.stdout.strip(), "hardware": hardware}


def origin(results: list[dict], about: dict) -> str:
    """Where a method's runs come from, in words; of none, here."""
    places = [f"commit {run['commit']}, {run['hardware']}" for run in results or [about]]
    return "; ".join(dict.fromkeys(places))


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half width of the 95 % interval over seeds (Student's t)."""
    t = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 8: 2.365, 10: 2.262}[len(values)]
    return float(np.mean(values)), float(t * np.std(values, ddof=1) / len(values) ** 0.5)


def table(about: dict, runs: dict[str, list[dict]], commands: dict[str, str],
          ran: dict[str, str], grid: Grid, stopped: list[str]) -> str:
    spread = f"Means over {len(grid.seeds)} seeds, ± half the 95 % interval"
    if len(grid.seeds) <= 2:
        spread = ("One seed", "Each of the two seeds")[len(grid.seeds) - 1]
    lines = [
        f"`{about['command']}`, commit {about['commit']}, {about['hardware']}. {spread}; pass@k at "
        f"the end, of {grid.samples} samples a held-out problem; best: the highest evaluation of a "
        "run.",
        "",
        "| method | learning rate | pass@1 | pass@8 | best | rollouts to 60 % | to 80 % | rollouts "
        "| sampled tokens | seconds | entropy | length | peak GiB |",
        "|" + "---|" * 13,
    ]
    finished = [m for m in runs if runs[m]]
    best_first = sorted(finished, key=lambda m: -mean_of(runs[m], "pass@1"))
    for m in best_first:
        rate = commands[m].split()[-1]
        lines.append(row_of(m, runs[m], rate, len(grid.seeds)))
    lines += table_of_localisation(runs)
    for row in stopped:
        lines += ["", row]
    lines += ["", "Commands:", ""]
    for m, command in commands.items():
        lines.append(f"- {m} ({ran[m]}): `python {command}`")
    return "\n".join(lines) + "\n"


def mean_of(results: list[dict], name: str) -> float:
    """Over the runs; of a curve its last value."""
    values = [r[name][-1] if isinstance(r[name], list) else r[name] for r in results]
    return float(np.mean(values))


def row_of(method: str, results: list[dict], rate: str, seeds: int) -> str:
    final = [r["pass@1"] for r in results]
    shown = " ".join(f"{x:.3f}" for x in final)
    if len(final) > 2:
        shown = "{:.3f} ± {:.3f}".format(*interval(final))
    best = float(np.mean([max(r["pass"]) for r in results]))
    entropy = "–"
    if all(r["entropy"] is not None for r in results):
        entropy = f"{mean_of(results, 'entropy'):.3g}"
    cells = [
        method, rate, shown, f"{mean_of(results, 'pass@8'):.3f}", f"{best:.3f}",
        reached(results, 0.6, seeds), reached(results, 0.8, seeds),
        f"{mean_of(results, 'rollouts'):,.0f}", f"{mean_of(results, 'tokens'):,.0f}",
        f"{mean_of(results, 'seconds'):.0f}", entropy, f"{mean_of(results, 'length'):.1f}",
        f"{mean_of(results, 'peak_gib'):.2f}",
    ]
    return "| " + " | ".join(cells) + " |"


def reached(results: list[dict], level: float, seeds: int) -> str:
    """Mean rollouts to the first evaluation at `level`, of the seeds that reach it."""
    hits = [n for n in (first_to(r, level) for r in results) if n is not None]
    if not hits:
        return "never"
    of_seeds = f" ({len(hits)} of {seeds})" if len(hits) < seeds else ""
    return f"{np.mean(hits):,.0f}{of_seeds}"


def table_of_localisation(runs: dict[str, list[dict]]) -> list[str]:
    lines = []
    for m, results in runs.items():
        found = [r["self_localisation"] for r in results if "self_localisation" in r]
        if found:
            cells = []
            for i in (0, 1):
                for reward in "01":
                    cells.append(f"{np.mean([x[reward][i] for x in found if reward in x]):.3f}")
            lines.append(f"| {m} | " + " | ".join(cells) + " |")
    if not lines:
        return []
    heading = ("| self-localisation | KL of a wrong token | of a right one | "
               "share of the top twentieth, wrong | right |")
    return ["", heading, "|" + "---|" * 5, *lines]


def evaluations(results: list[dict], axis: str) -> tuple[np.ndarray, np.ndarray]:
    """(x [evaluations], the mean over seeds; pass@1 [seeds, evaluations]).

    Of several evaluations at the same number of rollouts, as when traces are all sampled before the
    first update, the last counts. If a seed has none at a number of rollouts at which another has,
    its value is on the line between its neighbours.
    """
    last = [{n: (x, p) for n, x, p in zip(r["rollouts"], r[axis], r["pass"])} for r in results]
    at = sorted(n for n in set().union(*last) if n <= min(map(max, last)))
    xs, ys = [], []
    for seed in last:
        points = list(seed.values())
        xs.append(np.interp(at, list(seed), [x for x, _ in points]))
        ys.append(np.interp(at, list(seed), [p for _, p in points]))
    return np.mean(xs, 0), np.stack(ys)


def draw(panels: dict[str, tuple[str, ...]], runs: dict[str, list[dict]], commands: dict[str, str],
         axis: str, path: Path) -> None:
    """Held-out pass@1 at each evaluation against rollouts or tokens: mean over seeds, and a band
    from the lowest to the highest seed."""
    width = 10 if len(panels) > 1 else 7
    figure, axes = plt.subplots(1, len(panels), figsize=(width, 5.2), layout="constrained",
                                sharey=True, squeeze=False)
    seeds = max(map(len, runs.values()))
    notes = ["markers: an evaluation of one seed"]
    if seeds > 1:
        notes = [f"markers: mean of {seeds} seeds at an evaluation; band: lowest to highest seed"]
    for panel, (title, members) in zip(axes[0], panels.items()):
        for i, m in enumerate([m for m in members if runs.get(m)]):
            notes += draw_method(panel, i, m, runs[m], commands[m], axis, seeds)
        panel.set_title(title, fontsize=9.5)
        panel.set(xlabel="sampled tokens, thousands" if axis == "tokens" else axis,
                  ylim=(-0.02, 1.02))
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8.5, loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False,
                     handlelength=3.5)
    axes[0][0].set_ylabel("held-out pass@1")
    figure.suptitle("\n".join(dict.fromkeys(notes)), fontsize=9)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def draw_search(search: dict[str, dict[str, list[dict]]], path: Path) -> None:
    """The tuning's curves: one panel per rate, one line per method."""
    panels: dict[str, list[str]] = {}
    runs = {}
    for m, found in search.items():
        for rate, some in found.items():
            name = f"{m}, {rate}"
            panels.setdefault(f"learning rate {rate}", []).append(name)
            runs[name] = some
    draw(panels, runs, {name: METHODS[name.rpartition(", ")[0]].typed for name in runs},
         "rollouts", path)


def draw_method(panel, i: int, method: str, results: list[dict], command: str, axis: str,
                seeds: int) -> list[str]:
    """The curve of the i-th method of a panel; → what the figure's title must say of it."""
    xs, ys = evaluations(results, axis)
    if axis == "tokens":
        xs = xs / 1000
    mean, low, high = ys.mean(0), ys.min(0), ys.max(0)
    notes, label, first = [], method, 0
    if "sdzero.py" in command and "--phase sd " not in command:
        first = 1
        notes.append("dotted: all was sampled before the first update; nothing is known in between")
    if "hsd.py" in command and "--top_p 1" not in command:
        label += " (top-p 0.95)"
        notes.append("(top-p 0.95): sampled at that, in these evaluations too; unmarked: at 1")
    if len(ys) < seeds:
        label += f" ({len(ys)} of {seeds} seeds)"
    style = {"color": f"C{i}", "marker": "osD^vPX"[i % 7], "markersize": 6.5 - 0.4 * i,
             "fillstyle": "none"}
    line = {"linestyle": DASHES[i % 7], "linewidth": 2.2 - 0.15 * i}
    if len(xs) - first == 1:
        line = {"linestyle": ":"}
    panel.plot(xs[first:], mean[first:], label=label, **style, **line)
    band = {"color": f"C{i}", "alpha": 0.13, "linewidth": 0}
    panel.fill_between(xs[first:], low[first:], high[first:], **band)
    if first:
        panel.plot(xs[:2], mean[:2], linestyle=":", linewidth=1.3, **style)
        panel.vlines(xs[:2], low[:2], high[:2], color=f"C{i}", alpha=0.5)
    return notes


if __name__ == "__main__":
    main(tyro.cli(Args))
