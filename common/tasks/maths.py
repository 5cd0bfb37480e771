"""Maths: a final answer that is compared by value."""
from __future__ import annotations

from common.tasks.problem import Problem
from common.tasks.records import Record
from common.verifiers import Verdict
from common.verifiers.equality import compare, reading
from common.verifiers.golds import normal_gold

INSTRUCTION = "Work step by step and finish with the final answer in \\boxed{}."


def from_record(record: Record, instruction: str | None) -> Problem:
    """An answer that ends in "#### N", as GSM8K's do, is a solution and its answer.

    instruction: text that is added to the question; None takes INSTRUCTION.
    """
    answer, solution = record.answer, record.solution
    if "####" in answer:
        worked, _, answer = answer.rpartition("####")
        solution = solution or worked.strip()
    if instruction is None:
        instruction = INSTRUCTION
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


def judge(problem: Problem, text: str) -> Verdict:
    """Mathematical equality of the final answer with the reference. Raises BadProblem if the
    reference cannot be read."""
    found, right = compare(problem.answer, text)
    if not found:
        return Verdict(0.0, "No final answer was found; it belongs in \\boxed{}.")
    if right:
        return Verdict(1.0)
    return Verdict(0.0, f"The final answer {found} is wrong.")
