"""Maths: a final answer that is compared by value."""
from __future__ import annotations

import contextlib
import json
import re

from common.tasks.fields import Record, as_text, empty
from common.tasks.problem import Problem
from common.verifiers import Verdict
from common.verifiers.boxes import last_boxed
from common.verifiers.equality import compare, reading
from common.verifiers.golds import normal_gold

INSTRUCTION = "Work step by step and finish with the final answer in \\boxed{}."
MAX_REFERENCE = 40  # characters; a longer answer with a box in it is a solution
ASKS = r"boxed|####|<answer>|(?i:answer:)"  # what a prompt has that says where the answer belongs


def from_record(record: Record, instruction: str | None) -> Problem:
    """An answer that ends in "#### N", as GSM8K's do, or a long one with a box is a solution and
    its answer. Without an answer, as in MATH, it is that of the solution.

    instruction: text that is added to the question; None takes INSTRUCTION, unless the question is
    a chat that says itself how to answer.
    """
    solution = record.solution
    answer = reference(record)
    if "####" in answer:
        solution = solution or answer.strip()  # whole: it must end in the answer
        answer = answer.rpartition("####")[2].strip().partition("\n")[0]
    elif len(answer) > MAX_REFERENCE and last_boxed(answer):
        solution, answer = solution or answer, last_boxed(answer)
    if instruction is None:
        instruction = INSTRUCTION
        if record.chat is not None and re.search(ASKS, record.question):
            instruction = ""
    user = record.question
    if instruction:
        user = f"{user.strip()}\n\n{instruction}"
    return record.problem("math", user, normal_gold(answer), solution)


def notes(problems: list[Problem]) -> list[str]:
    """What a user should know of the reference answers, for the log: those that no rule of
    mathematics reads, so that only the same text is right."""
    texts = [problem for problem in problems if reading(problem.answer or "") == "text"]
    if not texts:
        return []
    return [f"{len(texts)} of {len(problems)} reference answers are compared as text, the first in "
            f"problem {texts[0].id}: {texts[0].answer!r:.80}"]


def reference(record: Record) -> str:
    """The reference as text. A list of one is its element, one of several a set."""
    answer = record.answer
    if empty(answer) and record.solution:
        answer = last_boxed(record.solution) or ""
        if not answer and "####" in record.solution:
            answer = record.solution
    if isinstance(answer, str) and re.fullmatch(r'\s*\[\s*".*"\s*\]\s*', answer, re.DOTALL):
        with contextlib.suppress(ValueError):
            answer = json.loads(answer)  # a list that a table holds as text
    if empty(answer):
        raise record.missing("answer")
    parts = answer
    if not isinstance(answer, list):
        parts = [answer]
    if not all(isinstance(part, (str, int, float)) and str(part).strip() for part in parts):
        raise record.bad("field 'answer' must be a text, a number or a list of these, not "
                         f"{answer!r:.100}")
    return ", ".join(map(as_text, parts))


def judge(problem: Problem, text: str) -> Verdict:
    """Mathematical equality of the final answer with the reference. Raises BadProblem if the
    reference cannot be read."""
    found, right = compare(problem.answer, text)
    if not found:
        return Verdict(0.0, "No final answer was found; it belongs in \\boxed{}.")
    if right:
        return Verdict(1.0)
    return Verdict(0.0, f"The final answer {found} is wrong.")
