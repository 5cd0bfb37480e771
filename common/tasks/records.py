"""Records of files and of the hub, and what their fields are called.

A record comes with the words that say where it is: "FILE, line 3".
"""
from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from common import check_hub, require
from common.tasks.problem import Problem

# --------------------------------------------------------------------------------------------------
# where records come from
# --------------------------------------------------------------------------------------------------


def read_records(path: str) -> Iterator[tuple[dict, str]]:
    """Records of a .jsonl file or of a .json list."""
    file = Path(path).expanduser()
    require(file.is_file(), f"--task: no such file: {path}")
    text = file.read_text(encoding="utf-8")
    line = 1  # where the JSON text that is being read begins
    try:
        if text.lstrip().startswith("["):
            for i, data in enumerate(json.loads(text), 1):
                yield data, f"{path}, record {i}"
            return
        for line, part in enumerate(text.split("\n"), 1):  # splitlines would split at U+2028 too
            if part.strip():
                yield json.loads(part), f"{path}, line {line}"
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        raise SystemExit(f"error: {path}, line {line}: not JSON ({error.msg})") from None


def read_hub(name: str) -> Iterator[tuple[dict, str]]:
    """Records of a hub dataset, NAME[:CONFIG][@SPLIT]; without a split, of its train split."""
    import datasets

    path, _, split = name.partition("@")
    path, _, config = path.partition(":")
    if not Path(path).exists():
        cached = Path(datasets.config.HF_DATASETS_CACHE, path.replace("/", "___"))
        check_hub("--task", path, "dataset", cached)
    try:
        rows = datasets.load_dataset(path, config or None, split=split or "train")
    except (OSError, ValueError) as error:  # not there, no network, no such config or split
        reason = str(error).splitlines()[0]
        raise SystemExit(f"error: --task hf:{name}: {reason}; without the hub, give --data_dir or "
                         "jsonl:PATH") from None
    for i, data in enumerate(rows, 1):
        yield data, f"hf:{name}, record {i}"


# --------------------------------------------------------------------------------------------------
# what fields are called
# --------------------------------------------------------------------------------------------------
NAMES = {  # the usual names of a field; --fields gives another
    "question": ("question", "problem", "prompt", "question_content"),
    "system": ("system",),
    "answer": ("answer", "final_answer", "golden_answer", "answerKey"),
    "solution": ("solution", "rationale"),
}


def check_fields(fields: str) -> None:
    """Raise SystemExit if --fields is not a list of NAME=FIELD."""
    for pair in filter(None, fields.split(",")):
        name, _, field = pair.partition("=")
        known = field and name in NAMES
        require(known, f"--fields {pair}: must be NAME=FIELD, with a NAME of {', '.join(NAMES)}")


class Record(NamedTuple):
    """A record by the names used here, whatever its source calls them."""

    question: str
    answer: str  # "" for code
    solution: str | None
    system: str
    data: dict  # the whole record, as it is in the source
    where: str

    def problem(self, kind: str, user: str, answer: str | None, solution: str | None,
                **meta) -> Problem:
        """The problem of this record that asks `user`."""
        messages = [{"role": "user", "content": user}]
        if self.system:
            messages.insert(0, {"role": "system", "content": self.system})
        name = hashlib.sha1(self.question.encode()).hexdigest()[:16]
        meta = {"question": self.question, **meta}
        return Problem(name, messages, answer, solution, kind, meta)


def read_fields(data: dict, where: str, fields: str, code: bool) -> Record:
    """The record by the names used here. Code has tests in place of an answer and a solution.

    Raises SystemExit if a field is missing, empty or of another type.
    """
    renamed = dict(pair.split("=", 1) for pair in fields.split(",") if "=" in pair)
    found = {}
    for name, usual in NAMES.items():
        keys = usual
        if name in renamed:
            keys = (renamed[name],)
        found[name] = next((data[key] for key in keys if key in data), None)
    if isinstance(found["answer"], list):
        found["answer"] = json.dumps(found["answer"])
    needed = ["question"] if code else ["question", "answer"]
    for name in needed:
        there = isinstance(found[name], (str, int, float)) and str(found[name]).strip()
        require(there, f"{where}: field {renamed.get(name, name)!r} is missing or empty; it has "
                f"{', '.join(data)}; name the fields with --fields, e.g. {name}=FIELD")
    question, system = str(found["question"]), found["system"] or ""
    if code:
        return Record(question, "", None, system, data, where)
    solution = found["solution"]
    if isinstance(solution, list):  # several ways to the answer: the first
        solution = next(iter(solution), None)
    name = renamed.get("solution", "solution")
    require(solution is None or isinstance(solution, str), f"{where}: field {name!r} must be a "
            "text or a list of texts; name another field with --fields solution=FIELD")
    return Record(question, str(found["answer"]).strip(), solution, system, data, where)
