"""Mixtures of tasks, and the overlap between training and evaluation."""
from __future__ import annotations

import re
from collections.abc import Iterable

from common import require
from common.tasks.problem import Problem


def mixture(spec: str) -> list[tuple[float, str]]:
    """The weighted parts of a task.

    >>> mixture("4*gsm8k + 1*mbpp"), mixture("jsonl:a+b.jsonl")
    ([(4.0, 'gsm8k'), (1.0, 'mbpp')], [(1.0, 'jsonl:a+b.jsonl')])
    """
    number = r"\d+(?:\.\d+)?\*"
    if not re.match(number, spec):
        return [(1.0, spec)]
    parts = []
    for part in re.split(rf"\s*\+\s*(?={number})", spec):
        weight, _, name = part.partition("*")
        parts.append((float(weight), name.strip()))
    return parts


def blend(weights: list[float], lists: list[list]) -> list:
    """The lists in proportion to their weights, none cut: a small list repeats if its weight is
    large. They are interleaved, so every beginning of the result has these proportions too.

    >>> "".join(blend([3, 1], ["ab", "xy"]))
    'abxabayb'
    """
    sizes = [len(part) / weight for weight, part in zip(weights, lists)]
    size = max(sizes)
    total = round(sum(weights) * size)
    require(total < 10**7, f"--task: with these weights a pass over all problems has {total:,} "
            "questions; bring the weights nearer to the sizes of the sets")
    rows = []
    for k, (weight, part) in enumerate(zip(weights, lists)):
        count = round(weight * size)
        for i in range(count):
            rows.append(((i + 0.5) / count, k, part[i % len(part)]))
    rows.sort(key=lambda row: row[:2])
    return [item for _, _, item in rows]


def question(problem: Problem) -> str:
    """The question in small letters and single spaces, without the instruction that all questions
    of a set share."""
    text = problem.meta.get("question")
    if not text:
        text = problem.messages[-1]["content"]
    return " ".join(text.lower().split())


def overlap(train: Iterable[Problem], evaluation: Iterable[Problem], n: int = 13) -> list[Problem]:
    """The training problems that share n words in a row with an evaluation problem, the usual test
    of contamination."""
    seen = set()
    for problem in evaluation:
        seen |= grams(problem, n)
    shared = []
    for problem in train:
        if not seen.isdisjoint(grams(problem, n)):
            shared.append(problem)
    return shared


def grams(problem: Problem, n: int) -> set[str]:
    """Every n words in a row of the question."""
    words = re.findall(r"\w+", question(problem))
    starts = range(len(words) - n + 1)
    return {" ".join(words[i : i + n]) for i in starts}
