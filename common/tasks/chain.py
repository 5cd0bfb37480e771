"""The embedded task: sums of two-digit numbers, worked from left to right."""
from __future__ import annotations

import random
import re
from itertools import accumulate

from common import require
from common.tasks.problem import Problem
from common.verifiers import Verdict

SIZE = 4096  # training problems


def load(spec: str, terms: str, heldout: int) -> list[Problem]:
    """The problems of --task chain:TERMS, `heldout` more than SIZE."""
    known = terms == "" or (terms.isdecimal() and 1 <= int(terms) <= 1000)
    require(known, f"--task {spec}: after the colon comes how many numbers to add, e.g. chain:10")
    count = SIZE + heldout
    if not terms:
        return chain_problems(count)
    require(90 ** int(terms) > 2 * count, f"--task {spec}: there are no {count} different sums of "
            "so few numbers; take more numbers or lower --heldout")
    return chain_problems(count, int(terms))


def chain_problems(count: int, terms: int | None = None) -> list[Problem]:
    """`count` different sums of `terms` two-digit numbers (3 to 5 when None).

    >>> p = chain_problems(1, terms=3)[0]
    >>> sum(p.meta["terms"]) == int(p.answer) and p.solution.endswith(f"#### {p.answer}")
    True
    """
    rng = random.Random(f"chain/{terms}")
    seen: dict[tuple[int, ...], None] = {}
    while len(seen) < count:
        length = terms or rng.randint(3, 5)
        seen[tuple(rng.randint(10, 99) for _ in range(length))] = None
    return [chain_problem(numbers) for numbers in seen]


def chain_problem(numbers: tuple[int, ...]) -> Problem:
    text = "+".join(map(str, numbers))
    totals = list(accumulate(numbers))
    steps = []
    for before, number, after in zip(totals, numbers[1:], totals[1:]):
        steps.append(f"{before}+{number}={after}")
    return Problem(
        id=f"chain/{text}",
        messages=[{"role": "user", "content": f"Compute {text}."}],
        answer=str(totals[-1]),
        solution="; ".join([*steps, f"#### {totals[-1]}"]),
        kind="chain",
        meta={"terms": numbers},
    )


def judge(problem: Problem, text: str) -> Verdict:
    """The number after the last #### against the answer. Feedback names the first wrong step, never
    the right one.

    >>> judge(chain_problem((23, 45, 17)), "23+45=68; 68+17=84; #### 84")
    Verdict(reward=0.0, feedback='The step 68+17=84 is wrong.')
    """
    found = re.findall(r"####\s*(\d{1,9})(?!\d)", text)
    if not found:
        return Verdict(0.0, "There is no number after ####.")
    if int(found[-1]) == int(problem.answer):
        return Verdict(1.0)
    terms = problem.meta["terms"]
    total = terms[0]
    steps = re.findall(r"(\d{1,9})\+(\d{1,9})=(\d{1,9})(?!\d)", text)
    for (a, b, c), term in zip(steps, terms[1:]):
        if (int(a), int(b), int(a) + int(b)) != (total, term, int(c)):
            return Verdict(0.0, f"The step {a}+{b}={c} is wrong.")
        total = int(c)
    return Verdict(0.0, "The number after #### is wrong.")
