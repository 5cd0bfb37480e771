"""runs/NAME/report.html: a run on one page that opens offline, made from the files of its folder.

    example.jsonl    the first example and its trained tokens
    heldout.jsonl    one line per evaluation: responses to the first held-out problems
"""
from __future__ import annotations

import base64
import json
import math
from pathlib import Path

from common.settings import flat

HERE = Path(__file__).parent
KEPT = 32  # held-out problems whose responses are kept at every evaluation
MOST = 2000  # characters that are kept of a question or response
RECENT = 10  # rows of the log over which a number of HEALTH is a mean

# metric, or the difference of two; the least and the most that is healthy; what else it may be, or
# what to do. docs/metrics.md has the reasons.
HEALTH = (
    ("reward/mean", 0.01, 0.99, "near 0: read the feedback in rollouts.jsonl; near 1: too easy"),
    ("fall of heldout/pass@1", 0.0, 0.1, "lower --lr, or slow the teacher down"),
    ("entropy", 0.01, 5.0, "near 0: collapse, lower --lr; high: noise, lower --lr"),
    ("grad_norm", 1e-8, 1e3, "0: nothing has a signal; large: read the rollouts of that step"),
    ("skipped_updates", 0.0, 0.1, "gradients are not finite: lower --lr"),
    ("frac_truncated", 0.0, 0.1, "raise --max_tokens; does the chat template end the turn?"),
    ("frac_zero_std", 0.0, 0.9, "too hard, too easy, or --group_size is too small"),
    ("mismatch/kl", 0.0, 0.01, "sampler and trainer differ: template, temperature or model"),
    ("clip_frac", 0.0, 0.2, "fewer --epochs or --minibatches, or a lower --lr"),
    ("kl", 1e-5, 1e9, "0: the teacher sees what the student sees"),
    ("kl/wrong − kl/right", 0.0, 1e9, "the teacher disagrees about style, not mistakes"),
    ("context/none", 0.0, 0.9, "the teacher has nothing to see: take easier problems"),
    ("teacher/lead", 0.0, 1.0, "the context does not help: docs/teacher.md"),
    ("credit/at_tau − credit/before_tau", 0.0, 1e9, "the teacher does not read its peer"),
    ("delta/right − delta/wrong", 0.0, 1e9, "the teacher ignores the reference"),
    ("leak/rate", 0.0, 0.02, "leakage: lower --lam or --lam_steps, read rollouts.jsonl"),
    ("revise/pass@1 − heldout/pass@1", 0.0, 1.0, "phase 1 taught no revision"),
)


def first_example(run, batch, teacher_prompts: list | None) -> None:
    """Print and keep the step's best response as the model sees it; the loss is on ⟦…⟧."""
    best, decode = int(batch.rewards.flatten().argmax()), run.tokenizer.decode
    trained = batch.responses[best]
    row = {"prompt": decode(batch.prompts[best]), "trained": [decode([t]) for t in trained]}
    run.say(f"{'─' * 30} first example {'─' * 30}\n{row['prompt']}")
    run.say(f"[loss: {len(trained)} tokens] ⟦{decode(trained)}⟧")
    if teacher_prompts is not None:
        row["teacher"] = decode(teacher_prompts[best])
        run.say(f"teacher's prompt:\n{row['teacher']}")
    run.say("─" * 75)
    run.append("example", [{"step": run.step, **row}])


def heldout_row(step: int, groups: list) -> dict:
    """What heldout.jsonl keeps of an evaluation: the first response to each of some problems."""
    answers = {}
    for problem, rollouts, verdicts in groups[:KEPT]:
        question = problem.messages[-1]["content"]
        answers[problem.id] = [question[:MOST], rollouts[0].text[:MOST], verdicts[0].reward]
    return {"step": step, "answers": answers}


def write_report(run) -> None:
    """Write report.html beside curves.png; a run is complete without it."""
    try:
        data = report_data(run.folder, run.history) | {"settings": flat(run.args)}
        html = page(HERE / "report.html", data)
        (run.folder / "report.html").write_text(html, encoding="utf-8")
    except Exception as error:
        run.say(f"report.html could not be written: {error!r}")


def report_data(folder: Path, history: list[dict]) -> dict:
    """What report.html draws; history: the rows of metrics.jsonl."""
    scores = [row["heldout/pass@1"] for row in history if "heldout/pass@1" in row]
    fall = [{"fall of heldout/pass@1": max(scores) - score} for score in scores[-1:]]
    return {
        "name": folder.name,
        "steps": history[-1]["step"],
        "scores": scores,
        "health": health(history + fall),
        "curves": base64.b64encode((folder / "curves.png").read_bytes()).decode(),
        "example": read(folder / "example.jsonl"),
        "heldout": read(folder / "heldout.jsonl"),
    }


def page(template: Path, data: dict) -> str:
    """A page of the template with the style sheet and the data in it.

    Only a "<" could end the script element that holds the data, or begin another element.
    """
    text = json.dumps(data).replace("<", "\\u003c")
    style = (HERE / "page.css").read_text()
    html = template.read_text(encoding="utf-8").replace("{{style}}", style)
    return html.replace("{{data}}", text)


def read(path: Path) -> list[dict]:
    """The first and the last row of a file of the run."""
    rows = path.read_text().splitlines() if path.exists() else []
    return [json.loads(row) for row in rows[:1] + rows[-1:]]


def health(history: list[dict]) -> list[list]:
    """Of each row of HEALTH that the run has: name, value, bounds, whether it is healthy, words."""
    rows = []
    for name, least, most, words in HEALTH:
        metric, _, other = name.partition(" − ")
        values = []
        for row in history:
            row = {"": 0.0, **row}
            if metric in row and other in row:
                values.append(row[metric] - row[other])
        if values:
            del values[:-RECENT]
            value = sum(values) / len(values)
            shown = value if math.isfinite(value) else None  # JSON has neither NaN nor infinity
            rows.append([name, shown, least, most, least <= value <= most, words])
    return rows
