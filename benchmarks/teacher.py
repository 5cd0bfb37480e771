"""Is the teacher better than the student? Ask before training: minutes, no update.

    python benchmarks/teacher.py --file sdpo --model MODEL --task gsm8k --max_tokens 512
    python benchmarks/teacher.py --file hsd --model MODEL --task chain \\
        --wording benchmarks/wordings.json

Self-distillation has something to teach only if the model with the hint is right more often than
the model without. This samples groups from the student, builds the teacher's prompts with the
method file's own `teacher_prompts`, lets the teacher answer from each, and reads the student's
responses with both, as the loss does.

Rows of the table: the student, then the teacher by what is shown. Columns: the share of rollouts
that have such a context; pass@1 with its 95 % interval over questions; the lead over the student on
the same questions; the share of answers that are cut off at --max_tokens; mean length in tokens;
the divergence of the method file in nats per token; the share of the divergence on the first token,
on format tokens (no letter and no digit) and elsewhere; the share of the divergence that falls on
the student's right responses.

--wording: a JSON object, name → constants of the method file (LAYOUT, SOLUTION, CLOSING, …) to
replace. All wordings see the same student responses. Writes results/teacher/NAME: summary.json,
table.md, figure.png, examples.md and responses.jsonl. The same command goes on where it stopped.
"""
from __future__ import annotations

import importlib
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.distributed as dist
import tyro
from tqdm import tqdm

from benchmarks.evaluate import interval, machine
from common import require
from common.microbatches import micro_batches
from common.policy import load_policy
from common.rollouts import Batch, Group, Rollouts
from common.sampler import Rollout
from common.settings import Setup
from common.tasks import take
from common.teacher import kl_by_place
from common.verifiers import Verdict
from kernels.head import Divergence, token_stats

ROOT = Path(__file__).resolve().parent.parent
SHOWN = {  # method file → what its teacher can be shown: name → flags of the file
    "hsd": {
        "answer and peer": {"context": "peer"},
        "answer": {"context": "answer"},
        "worked solution": {"context": "solution"},
    },
    "sdpo": {
        "sibling": {"context": "solution"},
        "feedback": {"context": "feedback"},
        "sibling and feedback": {"context": "both"},
    },
    "rlsd": {"answer": {"hint": "answer"}, "worked solution": {"hint": "solution"}},
    "sdzero": {"own attempt and verdict": {}},
}
STUDENT, TEACHER = 20, 21  # random streams under the seed


@dataclass
class Args:
    model: str  # folder or hub id
    task: str  # problems, as the method files take them
    file: Literal["hsd", "sdpo", "rlsd", "sdzero"] = "sdpo"  # whose teacher
    shown: tuple[str, ...] = ()  # rows of SHOWN to measure; none: all that the data allow
    wording: str = ""  # JSON file of wordings; empty: the method file's own
    budget: int = 1024  # responses to sample in all, the student's included
    group_size: int = 8  # G, student responses per question
    max_tokens: int = 512  # most tokens per response
    temperature: float = 1.0  # of sampling and of both sides of the divergence
    instruction: str | None = None  # text added to a maths or gym question; None: the default
    data_dir: str = ""  # folder of the named data sets
    fields: str = ""  # the data's field names if they differ
    thinking: bool = False  # switch on the chat template's thinking mode
    sampler: Literal["hf", "vllm"] = "hf"  # engine
    sampler_rows: int = 32  # responses decoded at once
    read: int = 256  # student responses to read for the divergence, at most; 0: none
    token_budget: int = 8192  # padded tokens per forward pass
    chunk: int = 16  # questions between two writes to disk
    allow_unsafe_exec: bool = False  # run a model's programs without bubblewrap
    seed: int = 0  # of questions and samples
    name: str = ""  # folder under results/teacher; empty: made of file, model and task


def main(args: Args) -> dict:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    method = importlib.import_module(args.file)
    wordings = read_wordings(args.wording, method)
    folder = open_folder(args, wordings)
    settings = method_settings(args, method, {})
    rollouts = Rollouts(settings, quiet_run())
    shown = what_can_be_shown(args, rollouts.task.heldout)
    cells = len(shown) * len(wordings)
    questions = max(1, args.budget // (args.group_size * (1 + cells)))
    problems = take(rollouts.task.train, args.seed, 0, min(questions, len(rollouts.task.train)))
    policy = load_policy(args.model, rollouts.run.device, settings.setup)
    rollouts.sync(policy)

    store = Store(folder / "responses.jsonl")
    batch = student_batch(rollouts, problems, store, args)
    rows = [student_row(batch)]
    examples = []
    for wording, constants in wordings.items():
        for name, flags in shown.items():
            with replaced(method, constants):
                cell_settings = method_settings(args, method, flags)
                prompts, has_context = prompts_of(method, batch, rollouts, cell_settings, name)
            cell = f"{wording}/{name}"
            answers = teacher_answers(rollouts, batch, prompts, has_context, store, cell, args)
            row = {"wording": wording, "shown": name}
            row |= answer_metrics(answers, batch, name)
            read = first_of(has_context, args.read)
            row |= divergence_metrics(policy, method, cell_settings, batch, prompts, read, rollouts)
            rows.append(row)
            examples += example(rollouts, batch, prompts, answers, row)
            write(folder, args, rows, examples, batch)
    rollouts.close()
    dist.destroy_process_group()
    print((folder / "table.md").read_text())
    return json.loads((folder / "summary.json").read_text())


# --------------------------------------------------------------------------------------------------
# settings
# --------------------------------------------------------------------------------------------------
def method_settings(args: Args, method: ModuleType, flags: dict):
    """The method file's Args for this measurement."""
    names = ("model", "task", "max_tokens", "temperature", "thinking")
    same = {name: getattr(args, name) for name in names}
    setup = Setup(
        heldout=1, data_dir=args.data_dir, fields=args.fields, instruction=args.instruction,
        sampler=args.sampler, sampler_rows=args.sampler_rows, token_budget=args.token_budget,
        seed=args.seed, checkpointing=False, allow_unsafe_exec=args.allow_unsafe_exec,
    )
    if hasattr(method.Args, "group_size"):
        same["group_size"] = args.group_size
    return method.Args(**same, **flags, setup=setup)


def quiet_run():
    """What Rollouts needs of a run: one process that keeps no times."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ignore = lambda *_: None
    return SimpleNamespace(rank=0, world=1, device=device, phase=ignore, collect=ignore)


def read_wordings(path: str, method: ModuleType) -> dict[str, dict]:
    """Name → constants of the method file; without a file, its own wording alone."""
    if not path:
        return {"default": {}}
    wordings = json.loads(Path(path).read_text()).get(method.__name__)
    require(wordings, f"--wording {path}: it has no wordings of {method.__name__}")
    for name, constants in wordings.items():
        unknown = [key for key in constants if not hasattr(method, key)]
        require(not unknown, f"--wording {path}: {name}: {method.__name__}.py has no {unknown}")
    return wordings


class replaced:
    """Within the block the module's constants have other values."""

    def __init__(self, module: ModuleType, constants: dict):
        self.module, self.constants = module, constants

    def __enter__(self):
        self.before = {name: getattr(self.module, name) for name in self.constants}
        for name, value in self.constants.items():
            setattr(self.module, name, value)

    def __exit__(self, *_):
        for name, value in self.before.items():
            setattr(self.module, name, value)


def what_can_be_shown(args: Args, problems: list) -> dict[str, dict]:
    """The rows of SHOWN that are asked for, or all for which the data have what they need."""
    possible = dict(SHOWN[args.file])
    if args.shown:
        unknown = [name for name in args.shown if name not in possible]
        require(not unknown, f"--shown {unknown}: --file {args.file} has {', '.join(possible)}")
        return {name: possible[name] for name in args.shown}
    if any(problem.answer is None for problem in problems):
        possible.pop("answer", None)
    if any(problem.solution is None for problem in problems):
        possible.pop("worked solution", None)
    return possible


# --------------------------------------------------------------------------------------------------
# responses
# --------------------------------------------------------------------------------------------------
class Store:
    """Judged responses on disk, one per line: a stopped run's are not sampled again."""

    def __init__(self, path: Path):
        self.path, self.rows = path, {}
        if path.exists():
            for line in path.read_text(encoding="utf-8").split("\n"):
                if line.endswith("}"):  # a line that a kill cut short is sampled again
                    row = json.loads(line)
                    self.rows[row["cell"], row["index"]] = row

    def add(self, cell: str, index: int, rollout: Rollout, verdict: Verdict) -> None:
        row = {"cell": cell, "index": index, **asdict(rollout), **asdict(verdict)}
        self.rows[cell, index] = row
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")

    def get(self, cell: str, index: int) -> tuple[Rollout, Verdict] | None:
        row = self.rows.get((cell, index))
        if row is None:
            return None
        rollout = Rollout(*(row[name] for name in Rollout.__dataclass_fields__))
        return rollout, Verdict(row["reward"], row["feedback"])


def student_batch(rollouts: Rollouts, problems: list, store: Store, args: Args) -> Batch:
    """G judged responses to each problem; rollout r of question q has index q·G + r."""
    G = args.group_size
    missing = [q for q in range(len(problems)) if store.get("student", q * G + G - 1) is None]
    parts = [missing[i : i + args.chunk] for i in range(0, len(missing), args.chunk)]
    for part in tqdm(parts, desc="student", disable=None):
        asked = [problems[q] for q in part]
        for q, group in zip(part, rollouts.answer(asked, G, STUDENT, part)):
            for r, (rollout, verdict) in enumerate(zip(group.rollouts, group.verdicts)):
                store.add("student", q * G + r, rollout, verdict)
    groups = []
    for q, problem in enumerate(problems):
        found = [store.get("student", q * G + r) for r in range(G)]
        groups.append(Group(problem, [o for o, _ in found], [v for _, v in found]))
    return Batch(groups)


def prompts_of(method: ModuleType, batch: Batch, rollouts: Rollouts, settings, name: str) -> tuple:
    """The teacher's prompt of each rollout, and whether it shows what the row names, [Q·G]."""
    count = len(batch.rollouts)
    if method.__name__ == "rlsd":
        return method.teacher_prompts(batch, rollouts, settings), [True] * count
    if method.__name__ == "sdzero":
        return method.teacher_prompts(batch, rollouts), [True] * count
    prompts, has_context, shown = method.teacher_prompts(batch, rollouts, 0, settings)
    has_context = has_context.flatten().tolist()
    if name == "answer and peer":  # without a peer the answer alone is shown
        has_context = [peer is not None for peer in shown]
    if name == "sibling and feedback":
        has_context = [has and kind == "solution" for has, kind in zip(has_context, shown)]
    return prompts, has_context


def teacher_answers(rollouts: Rollouts, batch: Batch, prompts: list, has_context: list,
                    store: Store, cell: str, args: Args) -> dict[int, tuple[Rollout, Verdict]]:
    """Rollout → one judged answer of the teacher from that rollout's prompt.

    Prompts that leave no room for a response in the model's context are not asked.
    """
    problems = [group.problem for group in batch.groups for _ in group.rollouts]
    room = rollouts.context_length - args.max_tokens
    asked = [i for i, has in enumerate(has_context) if has and len(prompts[i]) <= room]
    missing = [i for i in asked if store.get(cell, i) is None]
    size = args.chunk * args.group_size
    parts = [missing[i : i + size] for i in range(0, len(missing), size)]
    for part in tqdm(parts, desc=cell, disable=None):
        groups = rollouts.answer(
            [problems[i] for i in part], 1, TEACHER, part, prompts=[prompts[i] for i in part]
        )
        for i, group in zip(part, groups):
            store.add(cell, i, group.rollouts[0], group.verdicts[0])
    return {i: store.get(cell, i) for i in asked}


# --------------------------------------------------------------------------------------------------
# numbers
# --------------------------------------------------------------------------------------------------
def student_row(batch: Batch) -> dict:
    right = (batch.rewards == 1).float()
    return {
        "wording": "", "shown": "student", "share": 1.0, "answers": right.numel(),
        "right": interval(right.mean(1).numpy()),
        "cut_off": batch.truncated.float().mean().item(), "tokens": batch.lengths.mean().item(),
        "groups_with_success": right.amax(1).mean().item(),
        "groups_mixed": np.mean([group.mixed for group in batch.groups]).item(),
    }


def answer_metrics(answers: dict, batch: Batch, shown: str) -> dict:
    """pass@1, truncation and length of a teacher's answers; the interval is over questions.

    The student beside them must not be chosen by its own verdicts. A sibling's hint needs a success
    among the other rollouts, so that the group's mean would be too high, by up to 1/G: the
    rollout's own verdict counts. Feedback needs a rollout that failed: its group's mean counts.
    """
    count = len(batch.rollouts)
    out = {"share": len(answers) / count, "answers": len(answers)}
    if not answers:
        return out
    G = batch.rewards.shape[1]
    right = (batch.rewards == 1).float()
    by_question: dict[int, list[float]] = {}
    student: dict[int, list[float]] = {}  # on the same questions
    by_verdict = {"right": [0, 0], "wrong": [0, 0]}  # the rollout's → right answers, all answers
    for i, (_, verdict) in answers.items():
        own = right.flatten()[i]
        counts = by_verdict["right" if own == 1 else "wrong"]
        counts[0] += int(verdict.reward == 1)
        counts[1] += 1
        if shown == "feedback":
            own = right[i // G].mean()
        by_question.setdefault(i // G, []).append(float(verdict.reward == 1))
        student.setdefault(i // G, []).append(own.item())
    taught = np.array([np.mean(values) for values in by_question.values()])
    alone = np.array([np.mean(values) for values in student.values()])
    return out | {
        "right": interval(taught),
        "lead": interval(taught - alone),  # over the student on the same questions
        "right_by_rollout": by_verdict,
        "cut_off": np.mean([rollout.truncated for rollout, _ in answers.values()]).item(),
        "tokens": np.mean([len(rollout.response_ids) for rollout, _ in answers.values()]).item(),
    }


def first_of(has_context: list[bool], count: int) -> list[bool]:
    """has_context, of which only the first `count` stay True.

    >>> first_of([False, True, True, True], 2)
    [False, True, True, False]
    """
    seen = np.cumsum(has_context)
    return [has and bool(number <= count) for has, number in zip(has_context, seen)]


@torch.no_grad()
def divergence_metrics(policy, method: ModuleType, settings, batch: Batch, prompts: list,
                       read: list, rollouts: Rollouts) -> dict:
    """The divergence of the student's responses between both prompts, and where it lies."""
    divergence = Divergence("forward_kl")
    if hasattr(method, "divergence"):
        divergence = method.divergence(settings)
    kept = torch.tensor(read)
    if not kept.any():
        return {}
    total = {"first": 0.0, "format": 0.0, "elsewhere": 0.0}
    by_verdict = {True: 0.0, False: 0.0}
    tokens = 0
    for micro in micro_batches(prompts, batch.responses, kept, settings.setup, rollouts.run.device):
        teacher = policy.read(micro)
        student = policy.read(micro.with_prompts(batch.prompts, batch.responses))
        stats = token_stats(
            *student, micro.targets, *teacher, divergence=divergence,
            temperature=settings.temperature,
        )
        for place, values in kl_by_place(stats.kl, micro, rollouts.tokenizer).items():
            total[place.removeprefix("kl/")] += values.sum().item()
        for row, kl in micro.split(stats.kl).items():
            right = batch.rewards.flatten()[row].item() == 1
            by_verdict[right] += kl.sum().item()
            tokens += len(kl)
    whole = sum(total.values())
    share = {f"kl_on_{place}": value / whole for place, value in total.items()}
    return {"kl": whole / tokens, **share, "kl_on_right": by_verdict[True] / whole}


def verdict(teacher: dict, student: dict) -> str:
    """What a teacher's row means beside the student's, in words.

    >>> from textwrap import fill
    >>> def show(right, low, lead, high, cut=0.0):
    ...     lead = {"low": low, "mean": lead, "high": high}
    ...     teacher = {"right": {"mean": right}, "lead": lead, "cut_off": cut}
    ...     print(fill(verdict(teacher, {"cut_off": 0.1}), 80))
    >>> show(0.56, 0.35, 0.43, 0.5)
    the teacher is right 0.56 of the time, the student on the same questions 0.13:
    there is something to learn
    >>> show(0.56, 0.35, 0.43, 0.5, cut=0.4)
    the teacher is right 0.56 of the time, the student on the same questions 0.13:
    there is something to learn, but the teacher is cut off in 0.40 of its answers,
    the student in 0.10: raise --max_tokens, or ask for a short answer
    >>> show(0.03, -0.2, -0.1, 0.02, cut=0.9)
    the teacher is right 0.03 of the time, the student on the same questions 0.13:
    the teacher is cut off in 0.90 of its answers, the student in 0.10: raise
    --max_tokens, or ask for a short answer
    """
    if "right" not in teacher:
        return "no rollout had this context"
    right, lead = teacher["right"]["mean"], teacher["lead"]
    numbers = (
        f"the teacher is right {right:.2f} of the time, the student on the same questions "
        f"{right - lead['mean']:.2f}: "
    )
    too_long = (
        f"the teacher is cut off in {teacher['cut_off']:.2f} of its answers, the student in "
        f"{student['cut_off']:.2f}: raise --max_tokens, or ask for a short answer"
    )
    talks = teacher["cut_off"] > student["cut_off"] + 0.2  # whoever copies it learns to talk
    if lead["low"] > 0:
        return numbers + "there is something to learn" + (f", but {too_long}" if talks else "")
    if talks:
        return numbers + too_long
    if lead["high"] < 0:
        return numbers + "the hint harms; change the wording or show something else"
    return numbers + "no difference that so few answers can show; raise --budget"


# --------------------------------------------------------------------------------------------------
# files
# --------------------------------------------------------------------------------------------------
def open_folder(args: Args, wordings: dict) -> Path:
    """The result folder. Raises SystemExit if it holds a measurement with other settings."""
    parts = [args.file, Path(args.model).name, args.task.replace("/", "-").replace(":", "-")]
    folder = ROOT / "results" / "teacher" / (args.name or "-".join(parts))
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / "settings.json"
    fixed = {**asdict(args), "wordings": wordings}
    fixed["model"], fixed["data_dir"] = hide_paths([args.model, args.data_dir])
    for free in ("chunk", "token_budget", "sampler_rows", "name"):
        del fixed[free]
    fixed = json.loads(json.dumps(fixed))
    if note.exists():
        same = json.loads(note.read_text()) == fixed
        require(same, f"{folder} holds a measurement with other settings; give another --name")
    note.write_text(json.dumps(fixed, indent=1) + "\n")
    return folder


def example(rollouts: Rollouts, batch: Batch, prompts: list, answers: dict, row: dict) -> list[str]:
    """The first answer of a cell beside the student's response to the same question."""
    if not answers:
        return []
    i = min(answers)
    rollout, judged = answers[i]
    student = batch.rollouts[i]
    reward = batch.rewards.flatten()[i].item()
    quote = lambda text: "\n".join("    " + line for line in text.strip().splitlines())
    return [
        f"## {row['wording']}: {row['shown']}", "",
        "The teacher's prompt:", "", quote(rollouts.tokenizer.decode(prompts[i])), "",
        f"The teacher (reward {judged.reward:g}):", "", quote(rollout.text), "",
        f"The student (reward {reward:g}):", "", quote(student.text), "",
    ]


def write(folder: Path, args: Args, rows: list[dict], examples: list[str], batch: Batch) -> None:
    """summary.json, table.md, examples.md and figure.png of the rows so far."""
    command = "python benchmarks/teacher.py " + " ".join(hide_paths(sys.argv[1:]))
    for row in rows[1:]:
        row["verdict"] = verdict(row, rows[0])
    summary = {"command": command, "questions": len(batch.groups), "rows": rows, **machine()}
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    (folder / "table.md").write_text(table(args, rows))
    (folder / "examples.md").write_text("\n".join(examples))
    draw(rows, folder / "figure.png")


def hide_paths(words: list[str]) -> list[str]:
    """The command without this machine's folders."""
    return [Path(word).name if word.startswith("/") else word for word in words]


def table(args: Args, rows: list[dict]) -> str:
    student = rows[0]
    lines = [
        f"{Path(args.model).name} on {args.task}, {args.file}.py, "
        f"at most {args.max_tokens} tokens, T {args.temperature:g}. "
        f"{student['groups_with_success']:.2f} of the groups of "
        f"{args.group_size} have a success, {student['groups_mixed']:.2f} are mixed.", "",
        "| wording | shown | of rollouts | right | lead | cut off | tokens | nats per token "
        "| first / format / elsewhere | on right responses |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["wording"], row["shown"], f"{row['share']:.2f}"]
        if "right" in row:
            right = row["right"]
            cells.append(f"{right['mean']:.2f} ({right['low']:.2f} … {right['high']:.2f})")
            cells.append(f"{row['lead']['mean']:+.2f}" if "lead" in row else "")
            cells += [f"{row['cut_off']:.2f}", f"{row['tokens']:.0f}"]
        if "kl" in row:
            cells.append(f"{row['kl']:.3f}")
            shares = [row[f"kl_on_{place}"] for place in ("first", "format", "elsewhere")]
            cells.append(" / ".join(f"{share:.2f}" for share in shares))
            cells.append(f"{row['kl_on_right']:.2f}")
        lines.append("| " + " | ".join(cells + [""] * (10 - len(cells))) + " |")
    lines += [""] + [f"- {row['wording']}, {row['shown']}: {row['verdict']}." for row in rows[1:]]
    return "\n".join(lines) + "\n"


def draw(rows: list[dict], path: Path) -> None:
    rows = [row for row in rows if "right" in row]
    figure, axis = plt.subplots(figsize=(7, 0.8 + 0.35 * len(rows)), layout="constrained")
    for place, row in enumerate(reversed(rows)):
        right = row["right"]
        color = "tab:gray" if row["shown"] == "student" else "tab:blue"
        axis.plot([right["low"], right["high"]], [place, place], color=color)
        axis.plot(right["mean"], place, "o", color=color)
    student = rows[0]["right"]
    axis.axvline(student["mean"], color="tab:gray", linewidth=0.8, linestyle=":")
    names = [f"{row['wording']}: {row['shown']}".strip(": ") for row in reversed(rows)]
    axis.set_yticks(range(len(rows)), names)
    axis.set_xlim(-0.02, 1.02)
    figure.supxlabel("pass@1, 95 % interval over questions", fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main(tyro.cli(Args))
