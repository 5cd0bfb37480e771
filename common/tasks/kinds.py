"""Which kind of problem a record is, and the problem that it makes.

A named set states the kind of its records (sets.py). Elsewhere --kind states it, or the record does
in a field "kind"; only without either is a record recognised by its fields.
"""
from __future__ import annotations

from typing import Any

from common.tasks import choice, code, maths, tool
from common.tasks.fields import read_fields
from common.tasks.problem import Problem
from common.tasks.records import BadRecord

STATED = {  # a record's field "kind" → the kind
    "math": "math",
    "choice": "choice",
    "mcq": "choice",  # SDPO's files
    "tool": "tool",
    "tooluse": "tool",  # SDPO's files
    "code": "code",
}
RECOGNISED = {  # a field that only records of one kind have → the kind; without one it is maths
    "answerKey": "choice",  # SciKnowEval on the hub
    "golden_answer": "tool",  # ToolAlpaca on the hub
}
NEEDS = {  # kind → the fields that must not be empty; its module looks for the answer
    "math": ("question",), "choice": ("question",), "code": ("question",),
    "tool": ("question", "answer"),
}


def kind_of(data: dict) -> str:
    """The kind that a record states, or else the one that its fields show.

    >>> kind_of({"kind": "mcq"}), kind_of({"prompt": "?", "test_list": []}), kind_of({"answer": 2})
    ('choice', 'code', 'math')
    >>> kind_of({"choices": ["x", "y"], "answer": 0})
    'choice'
    """
    for name, kind in STATED.items():
        if data.get("kind") == name:
            return kind
    if code.has_tests(data):
        return "code"
    for field, kind in RECOGNISED.items():
        if field in data:
            return kind
    if choice.has_options(data) or choice.is_yes_or_no(data):
        return "choice"
    return "math"


def as_problem(data: Any, where: str, fields: str = "", instruction: str | None = None,
               kind: str = "") -> Problem:
    """One record as a problem. kind: "math" | "choice" | "tool" | "code"; "" asks the record.

    where: the words of an error that say where the record is. fields, instruction: see load_task.
    Raises BadRecord, which is a SystemExit, if the record is malformed.
    """
    if isinstance(data, BadRecord):
        raise data
    if not isinstance(data, dict):
        raise BadRecord(where, f"a record must be a JSON object, not {type(data).__name__}")
    kind = kind or kind_of(data)
    record = read_fields(data, where, fields, NEEDS[kind])
    if kind == "code":
        return code.from_record(record)
    if kind == "choice":
        return choice.from_record(record)
    if kind == "tool":
        return tool.from_record(record)
    return maths.from_record(record, instruction)
