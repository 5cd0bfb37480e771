"""Tool calls: names and inputs, compared as JSON."""
from __future__ import annotations

import json
import re

from common.tasks.fields import Record
from common.tasks.problem import Problem
from common.verifiers import BadProblem, Verdict


def from_record(record: Record) -> Problem:
    answer = record.answer
    if not isinstance(answer, str):
        answer = json.dumps(answer)
    return record.problem("tool", record.question, answer.strip(), record.solution)


def judge(problem: Problem, text: str) -> Verdict:
    """The calls are the reference's, in any order: each action with its own input.

    (SDPO merges all inputs into one dictionary and so accepts two calls that have each other's
    input.) Raises BadProblem if the reference is not a list of calls.
    """
    right = reference_calls(problem.answer)
    calls = []
    for match in re.finditer(r"^Action:(.*)\n\s{,9}Action Input:\s{,9}", text, re.MULTILINE):
        name = match[1].strip()
        try:
            given, _ = json.JSONDecoder().raw_decode(text, match.end())
            calls.append(as_call(name, given))
        except (ValueError, RecursionError):
            return Verdict(0.0, f"The Action Input of {name[:100]} is not JSON.")
    if not calls or len(calls) < len(re.findall(r"^Action:", text, re.MULTILINE)):
        return Verdict(0.0, "There is no Action, or one without its Action Input.")
    if sorted(calls) == sorted(right):
        return Verdict(1.0)
    return Verdict(0.0, f"Wrong calls: {'; '.join(calls)[:500]}")


def reference_calls(answer: str) -> list[str]:
    try:
        calls = json.loads(answer)
        return [as_call(call["Action"], json.loads(call["Action_Input"])) for call in calls]
    except (ValueError, KeyError, TypeError) as error:
        raise BadProblem(
            f"the reference {answer!r:.200} is not a list of calls ({error!r})"
        ) from None


def as_call(name: str, arguments: object) -> str:
    return f"{name}({json.dumps(arguments, sort_keys=True)})"
