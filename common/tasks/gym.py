"""reasoning-gym: generated problems, scored by their own scorers.

A problem is made when it is asked for, as some sets take seconds for one. Which one it is depends
on the set, its place in the stream and the held-out problems alone, so it is the same on every rank
and after a resume.
"""
from __future__ import annotations

import functools
import hashlib
import math
import os
import pickle
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from common import require
from common.tasks import gym_maker
from common.tasks.gym_maker import DONE, MAKE, SCORE
from common.tasks.lazy import Lazy
from common.tasks.problem import Problem
from common.verifiers import Verdict
from common.verifiers.answers import last_block
from common.verifiers.sandbox import Child, Ended

ROOT = Path(__file__).resolve().parents[2]
SIZE = 10_000  # training problems
STRIDE = 10**9  # between seeds: a set's problem i has the random seed `seed + i`
TRIES = 100  # problems that are made in place of one that is held out
PROBED = 3  # problems with which a scorer is tried
NONSENSE = ("", "zzz", "0")  # what no scorer should pay
HALF = 0.5  # what another problem's answer must not get
SLOW = 0.1  # seconds for a problem from which on the log tells
MAKERS = 8  # processes that make the held-out problems of a slow set
LIMIT = 600.0  # seconds for one problem
INSTRUCTION = (
    "Think step by step, then give only the final answer between <answer> and </answer>."
)
EVALUATED = {  # their scorers run the answer as Python
    "binary_matrix", "countdown", "intermediate_integration", "n_queens",
    "polynomial_multiplication", "puzzle24", "simple_integration", "spiral_matrix",
    "string_insertion",
}


# --------------------------------------------------------------------------------------------------
# problems
# --------------------------------------------------------------------------------------------------
class Unmade(Exception):
    """The library's error, in one line."""


@functools.cache
def maker(number: int = 0) -> Child:
    """A process of gym_maker.py. It ends with this one."""
    env = {**os.environ, "PYTHONHASHSEED": "0"}
    return Child([sys.executable, "-m", "common.tasks.gym_maker"], cwd=ROOT, env=env)


def ask(kind: bytes, *request, number: int = 0):
    """What a maker answers. Raises Unmade with the library's error."""
    try:
        answer, payload = maker(number).ask(kind, pickle.dumps(request), limit=LIMIT)
    except Ended as error:
        raise Unmade(f"the process that makes problems {error}") from None
    result = pickle.loads(payload)
    if answer != DONE:
        raise Unmade(result)
    return result


def problem(name: str, index: int, size: int, seed: int = 0, *, number: int = 0,
            instruction: str | None = None, **meta) -> Problem:
    """Problem `index` of a dataset of `size` problems. number: of the maker. instruction: text that
    is added to the question; None takes INSTRUCTION."""
    try:
        entry = ask(MAKE, name, size, seed, index, number=number)
    except Unmade as error:  # an unknown set, or one that needs settings
        raise SystemExit(f"error: --task gym:{name}: {error}") from None
    user = entry["question"]
    if instruction is None:
        instruction = INSTRUCTION
    if instruction:
        user = f"{user}\n\n{instruction}"
    answer = entry["answer"]
    if answer is not None:
        answer = str(answer)
    again = f"/{seed}" if seed else ""
    return Problem(
        id=f"gym/{name}/{index}{again}",
        messages=[{"role": "user", "content": user}],
        answer=answer,
        kind="gym",
        meta={"question": entry["question"], "gym": name, "entry": entry, **meta},
    )


def problems(name: str, count: int) -> list[Problem]:
    """The first `count` problems of a dataset."""
    return [problem(name, i, count) for i in range(count)]


def divide(name: str, heldout: int, reward: str,
           instruction: str | None = None) -> tuple[Lazy, Lazy, list[str]]:
    """→ (SIZE training problems, `heldout` others, notes). No question is in both.

    reward: "full" or "score". instruction: see `problem`. Raises SystemExit if the scorer pays
    nonsense in full.
    """
    size = SIZE + heldout
    order = sorted(range(size), key=lambda i: hashlib.sha1(f"gym/{name}/{i}".encode()).digest())
    made = functools.partial(problem, name, size=size, instruction=instruction)
    first = [made(order[0])]  # it takes the library's start, too
    begin = time.perf_counter()
    first += [made(i) for i in order[1:PROBED]]
    seconds = (time.perf_counter() - begin) / (PROBED - 1)
    meta, notes = probe(name, first, reward)
    if seconds > SLOW and heldout:
        notes.append(f"gym:{name}: a problem takes {seconds:.1f} s to make, and the {heldout} that "
                     "are held out are made before the first step; --heldout makes them fewer")
    makers = 1
    if seconds > SLOW:
        makers = min(MAKERS, len(os.sched_getaffinity(0)))
    tests = Lazy(heldout, lambda k: made(order[k], number=k % makers, **meta))
    for k, p in enumerate(first[:heldout]):
        tests.made[k] = replace(p, meta={**p.meta, **meta})

    @functools.cache
    def asked() -> set[str]:
        with ThreadPoolExecutor(makers) as pool:  # each thread has a maker of its own
            shares = [range(m, heldout, makers) for m in range(makers)]
            list(pool.map(lambda share: [tests[k] for k in share], shares))
        return {test.messages[0]["content"] for test in tests}

    def train(k: int) -> Problem:
        for seed in range(TRIES):
            found = made(order[heldout + k], seed=seed * STRIDE, **meta)
            if found.messages[0]["content"] not in asked():
                return found
        raise SystemExit(f"error: --task gym:{name}: it has too few different questions, for "
                         f"{TRIES} in a row are held out; lower --heldout")

    trains = Lazy(SIZE, train)
    if seconds <= SLOW:
        trains[0]  # ends the run now if nearly all questions are held out
    return trains, tests, notes


# --------------------------------------------------------------------------------------------------
# scores
# --------------------------------------------------------------------------------------------------
def probe(name: str, problems: Sequence[Problem], reward: str) -> tuple[dict, list[str]]:
    """Try the scorer with right, wrong and empty answers.

    → (what a problem's `meta` needs: the `reward`, and the `floor` up to which a score counts as
    0; notes). Raises SystemExit if the scorer pays an answer in full that cannot be right, or does
    not pay the right one.
    """
    floor, known = 0.0, [p for p in problems if p.answer is not None]
    for p in problems:
        for text in NONSENSE:
            if not same_answer(text, p.answer):
                paid = try_score(name, text, p)
                right = text == "0" and paid == 1  # it may be another right answer
                require(right or paid < 1, f"--task gym:{name}: its scorer pays {text!r} in full, "
                        "whatever the problem is; take another set")
                if not right:
                    floor = max(floor, paid)
    others = []
    for p in known:
        paid = try_score(name, p.answer, p)
        require(paid == 1, f"--task gym:{name}: its scorer pays {paid:g} for the set's own answer "
                f"{p.answer[:100]!r}; take another set")
        others += [try_score(name, o.answer, p) for o in known if o.answer != p.answer]
    require(len(others) < 2 or min(others) < 1, f"--task gym:{name}: its scorer pays the answers "
            "of other problems in full; take another set")
    partial = max([paid for paid in others if paid < 1], default=0.0)
    if partial >= HALF:
        floor = max(floor, partial)
    notes = []
    if floor > 0 and reward == "score":
        notes.append(f"gym:{name}: its scorer pays up to {floor:g} for an empty or wrong answer, "
                     "so scores up to that count as 0")
    if partial > floor and reward == "score":
        notes.append(f"gym:{name}: its scorer pays up to {partial:g} for the answer of another "
                     "problem; --gym_reward full pays right answers alone")
    return {"reward": reward, "floor": floor}, notes


def same_answer(text: str, answer: str | None) -> bool:
    """Whether the text may be the right answer: equal, or an equal number."""
    if answer is None:
        return False
    try:
        return float(text) == float(answer)
    except ValueError:
        return text.strip().lower() == answer.strip().lower()


def try_score(name: str, text: str, problem: Problem) -> float:
    """What the scorer pays; nothing for a text that it cannot read."""
    try:
        return as_share(ask(SCORE, name, text, problem.meta["entry"]))
    except Unmade:
        return 0.0


def as_share(score: float) -> float:
    if math.isnan(score):
        return 0.0
    return min(max(score, 0.0), 1.0)


def judge(problem: Problem, text: str) -> Verdict:
    """The dataset's own score of what is in the last <answer> block: in full or not at all, or with
    meta["reward"] "score" what is above meta["floor"]."""
    found = last_block(text, "<answer>", "</answer>")
    if found is None:
        return Verdict(
            0.0, "No final answer was found; it belongs between <answer> and </answer>."
        )
    paid = as_share(gym_maker.score(problem.meta["gym"], found, problem.meta["entry"]))
    if paid == 1:
        return Verdict(1.0)
    if problem.meta.get("reward") != "score" or paid <= problem.meta["floor"]:
        paid = 0.0
    return Verdict(paid, f"The final answer {found[:100]} is wrong.")
