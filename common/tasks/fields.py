"""What the fields of a record are called, and the record by the names used here."""
from __future__ import annotations

import hashlib
import json
import re
from decimal import Decimal
from typing import Any, NamedTuple

from common import require
from common.tasks.problem import Problem
from common.tasks.records import BadRecord

# The usual names of a field, the first that is there and not empty; capitals do not matter. A dot
# leads into an object. --fields gives another name.
NAMES = {
    "question": (
        "question", "problem", "prompt", "question_content", "text", "query", "question_stem",
        "problem_text", "ctx", "goal", "sentence", "turns", "messages", "conversations",
        "description", "instruction", "input",
    ),
    "system": ("system",),
    "answer": (
        "answer", "final_answer", "golden_answer", "answerKey", "reward_model.ground_truth",
        "ground_truth", "verification_info.ground_truth", "expected_answer", "correct_answer",
        "answer_number", "gold", "target",
    ),
    "solution": (
        "solution", "rationale", "worked_solution", "generated_solution", "response", "explanation",
    ),
}
BEFORE = ("context", "passage", "article", "premise", "body")  # what stands before the question
IMAGE = re.compile(r"(image|picture|figure)s?(_\d+)?")


def check_fields(fields: str) -> None:
    """Raise SystemExit if --fields is not a list of NAME=FIELD."""
    for pair in filter(None, fields.split(",")):
        name, _, field = pair.partition("=")
        known = field and name in NAMES
        require(known, f"--fields {pair}: must be NAME=FIELD, with a NAME of {', '.join(NAMES)}")


class Record(NamedTuple):
    """A record by the names used here, whatever its source calls them."""

    question: str
    answer: Any  # as in the source: a text, a number or a list; "" for code
    solution: str | None
    system: str
    data: dict  # the whole record, as it is in the source
    where: str
    chat: tuple[dict, ...] | None  # the messages before the question, if it is a chat's
    renamed: dict[str, str]  # name used here → the field that --fields gives

    def bad(self, reason: str) -> BadRecord:
        return BadRecord(self.where, reason)

    def missing(self, name: str) -> BadRecord:
        return missing(self.where, self.data, name, self.renamed.get(name, name))

    def problem(self, kind: str, user: str, answer: str | None, solution: str | None,
                **meta) -> Problem:
        """The problem of this record that asks `user`."""
        messages = [*(self.chat or ()), {"role": "user", "content": user}]
        if self.system:
            messages.insert(0, {"role": "system", "content": self.system})
        shown = "".join(message["content"] for message in messages)
        for name, text in (("question", shown), ("answer", answer), ("solution", solution)):
            if text and not is_unicode(text):
                raise self.bad(f"field {name!r} has half a character (a lone surrogate)")
        asked = [*(message["content"] for message in self.chat or ()), self.question]
        name = hashlib.sha1("\n".join(asked).encode()).hexdigest()[:16]
        meta = {"question": self.question, "where": self.where, **meta}
        return Problem(name, messages, answer, solution, kind, meta)


def is_unicode(text: str) -> bool:
    return not re.search("[\ud800-\udfff]", text)


def read_fields(data: dict, where: str, fields: str, needs: tuple[str, ...]) -> Record:
    """The record by the names used here.

    needs: the names that must not be empty. Raises BadRecord if a field is missing, empty or of
    another type.
    """
    pairs = filter(None, fields.split(","))
    renamed = dict(pair.split("=", 1) for pair in pairs)
    data = {str(key): value for key, value in data.items()}
    found = {}
    any_case = {key.lower(): value for key, value in data.items()} | data
    for name, usual in NAMES.items():
        keys = usual
        if name in renamed:
            keys = (renamed[name],)
        found[name] = first(any_case, keys)
    for name in needs:
        if empty(found[name]):
            raise missing(where, data, name, renamed.get(name, name))
    for key, value in data.items():
        if IMAGE.fullmatch(key.lower()) and value:
            raise BadRecord(where, f"field {key!r} has an image, and models here read text alone")

    name = renamed.get("question", "question")
    chat, question, after = as_chat(found["question"], where, name)
    if "question" not in renamed and chat is None:
        before = [any_case.get(name) for name in BEFORE]
        texts = [text.strip() for text in before if isinstance(text, str)]
        question = "\n\n".join([*filter(None, texts), question])
    name = renamed.get("solution", "solution")
    solution = as_solution(found["solution"], where, name) or after
    answer, system = found["answer"], found["system"] or ""
    if answer is None:
        answer = ""
    if not isinstance(system, str):
        raise BadRecord(where, "field 'system' must be a text")
    return Record(question, answer, solution, system, data, where, chat, renamed)


def missing(where: str, data: dict, name: str, field: str) -> BadRecord:
    return BadRecord(where, f"field {field!r} is missing or empty; it has "
                     f"{', '.join(data)}; name the fields with --fields, e.g. {name}=FIELD")


def first(data: dict, keys: tuple[str, ...]) -> Any:
    """The value of the first key that is there and not empty; else None."""
    for key in keys:
        value = lookup(data, key)
        if not empty(value):
            return value
    return None


def lookup(data: dict, key: str) -> Any:
    """The value of a key; a dot leads into an object, or into its JSON.

    >>> lookup({"a": {"b": 1}}, "a.b"), lookup({"a": '{"b": 1}'}, "a.b"), lookup({}, "a.b")
    (1, 1, None)
    """
    if key in data or key.lower() in data:
        return data.get(key, data.get(key.lower()))
    head, dot, rest = key.partition(".")
    inner = data.get(head)
    if isinstance(inner, str) and dot:
        try:
            inner = json.loads(inner)
        except (ValueError, RecursionError):
            return None
    if dot and isinstance(inner, dict):
        return lookup(inner, rest)
    return None


def empty(value: Any) -> bool:
    if isinstance(value, str):
        return not value.strip()
    return value is None or value == [] or value == {}


def as_chat(value: Any, where: str, name: str) -> tuple[tuple | None, str, str | None]:
    """A question that may be a chat: → (the messages before it, its text, what answers it), with
    None for the messages if it is a text.

    The question is the last message of the user. A message after it is a solution.
    """
    if isinstance(value, str):
        return None, value, None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return None, str(value), None
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        return None, value[0], None
    messages = []
    for message in value if isinstance(value, list) else ():
        if not isinstance(message, dict):
            break
        role = message.get("role", message.get("from"))
        text = message.get("content", message.get("value"))
        if not isinstance(text, str) or not text.strip():
            break
        messages.append({"role": ROLES.get(role, role), "content": text})
    roles = [message["role"] for message in messages]
    if "user" not in roles or len(messages) < len(value):
        raise BadRecord(where, f"field {name!r} must be a text, or a list of messages of which one "
                        "is the user's")
    last = len(roles) - 1 - roles[::-1].index("user")
    after = None
    if last + 1 < len(messages):
        after = messages[last + 1]["content"]
    return tuple(messages[:last]), messages[last]["content"], after


ROLES = {"human": "user", "gpt": "assistant"}  # of ShareGPT


def as_solution(value: Any, where: str, name: str) -> str | None:
    """A worked solution; of several the first."""
    if isinstance(value, list):
        value = next(iter(value), None)
    if value is not None and not isinstance(value, str):
        raise BadRecord(where, f"field {name!r} must be a text or a list of texts; name another "
                        "field with --fields solution=FIELD")
    return value


def as_text(value: Any) -> str:
    """A value of JSON as a person writes it: numbers without an exponent.

    >>> as_text(1e-07), as_text(27.0), as_text(" 3 "), as_text(True)
    ('0.0000001', '27.0', '3', 'True')
    """
    if isinstance(value, float):
        return format(Decimal(repr(value)), "f")
    return str(value).strip()
