"""Which kind of problem a record is, and the problem that it makes.

A named set states the kind of its records (sets.py). Elsewhere --kind states it, or the record does
in a field "kind"; only without either is a record recognised by its fields.
"""
from __future__ import annotations

from common import require
from common.tasks import choice, code, maths, tool
from common.tasks.problem import Problem
from common.tasks.records import read_fields

STATED = {  # a record's field "kind" → the kind
    "math": "math",
    "choice": "choice",
    "mcq": "choice",  # SDPO's files
    "tool": "tool",
    "tooluse": "tool",  # SDPO's files
    "code": "code",
}
RECOGNISED = {  # a field that only records of one kind have → the kind; without one it is maths
    "test_list": "code",  # MBPP
    "entry_point": "code",  # HumanEval
    "input_output": "code",  # APPS
    "public_test_cases": "code",  # LiveCodeBench
    "answerKey": "choice",  # SciKnowEval on the hub
    "golden_answer": "tool",  # ToolAlpaca on the hub
}


def kind_of(data: dict) -> str:
    """The kind that a record states, or else the one that its fields show.

    >>> kind_of({"kind": "mcq"}), kind_of({"prompt": "?", "test_list": []}), kind_of({"answer": 2})
    ('choice', 'code', 'math')
    """
    for name, kind in STATED.items():
        if data.get("kind") == name:
            return kind
    for field, kind in RECOGNISED.items():
        if field in data:
            return kind
    return "math"


def as_problem(data: dict, where: str, fields: str = "", instruction: str | None = None,
               kind: str = "") -> Problem:
    """One record as a problem. kind: "math" | "choice" | "tool" | "code"; "" asks the record.

    where: the words of an error that say where the record is. fields, instruction: see load_task.
    Raises SystemExit if the record is malformed.
    """
    name = type(data).__name__
    require(isinstance(data, dict), f"{where}: a record must be a JSON object, not {name}")
    kind = kind or kind_of(data)
    record = read_fields(data, where, fields, code=kind == "code")
    if kind == "code":
        return code.from_record(record)
    if kind == "choice":
        return choice.from_record(record)
    if kind == "tool":
        return tool.from_record(record)
    return maths.from_record(record, instruction)
