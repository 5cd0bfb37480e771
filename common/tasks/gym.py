"""reasoning-gym: generated problems, scored by their own scorers.

A problem is made when it is asked for, as some sets take seconds for one. Which one it is depends
on the set, its place in the stream and the held-out problems alone, so it is the same on every rank
and after a resume.
"""
from __future__ import annotations

import functools
import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import replace

from common import require
from common.tasks.lazy import Lazy
from common.tasks.problem import Problem
from common.verifiers import Verdict
from common.verifiers.answers import last_block

SIZE = 10_000  # training problems
STRIDE = 10**9  # between seeds: a set's problem i has the random seed `seed + i`
TRIES = 100  # problems that are made in place of one that is held out
PROBED = 3  # problems with which a scorer is tried
NONSENSE = ("", "zzz", "0")  # what no scorer should pay
SLOW = 0.1  # seconds for a problem from which on the log tells
SOON = 10.0  # seconds that the held-out problems may take at the start of a run
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
@functools.cache
def dataset(name: str, size: int, seed: int):
    """A reasoning-gym dataset with its default settings."""
    import reasoning_gym

    try:
        return reasoning_gym.create_dataset(name, size=size, seed=seed)
    except (ValueError, AssertionError, TypeError) as error:  # unknown, or it needs settings
        reason = str(error) or repr(error)
        raise SystemExit(f"error: --task gym:{name}: {reason.splitlines()[0]}") from None


def problem(name: str, index: int, size: int, seed: int = 0, **meta) -> Problem:
    """Problem `index` of a dataset of `size` problems."""
    entry = dataset(name, size, seed)[index]
    user = f"{entry['question']}\n\n{INSTRUCTION}"
    answer = entry["answer"]
    if answer is not None:
        answer = str(answer)
    again = f"/{seed}" if seed else ""
    return Problem(
        id=f"gym/{name}/{index}{again}",
        messages=[{"role": "user", "content": user}],
        answer=answer,
        kind="gym",
        meta={"gym": name, "entry": entry, **meta},
    )


def problems(name: str, count: int) -> list[Problem]:
    """The first `count` problems of a dataset."""
    return [problem(name, i, count) for i in range(count)]


def divide(name: str, heldout: int, reward: str) -> tuple[Lazy, Lazy, list[str]]:
    """→ (SIZE training problems, `heldout` others, notes). No question is in both.

    reward: "full" or "score". Raises SystemExit if the scorer pays nonsense in full.
    """
    size = SIZE + heldout
    order = sorted(range(size), key=lambda i: hashlib.sha1(f"gym/{name}/{i}".encode()).digest())
    begin = time.perf_counter()
    first = [problem(name, i, size) for i in order[:PROBED]]
    seconds = (time.perf_counter() - begin) / len(first)
    meta, notes = probe(name, first, reward)
    if seconds > SLOW and heldout:
        notes.append(f"gym:{name}: a problem takes {seconds:.1f} s to make, and the {heldout} that "
                     "are held out are made before the first step; --heldout makes them fewer")
    tests = Lazy(heldout, lambda k: problem(name, order[k], size, **meta))

    @functools.cache
    def asked() -> set[str]:
        return {test.messages[0]["content"] for test in tests}

    def train(k: int) -> Problem:
        for seed in range(TRIES):
            made = problem(name, order[heldout + k], size, seed * STRIDE, **meta)
            if made.messages[0]["content"] not in asked():
                return made
        raise SystemExit(f"error: --task gym:{name}: it has too few different questions, for "
                         f"{TRIES} in a row are held out; lower --heldout")

    trains = Lazy(SIZE, train)
    for k, p in enumerate(first[:heldout]):
        tests.made[k] = replace(p, meta={**p.meta, **meta})
    if seconds * heldout < SOON:
        trains[0]  # ends the run now if nearly all questions are held out
    return trains, tests, notes


# --------------------------------------------------------------------------------------------------
# scores
# --------------------------------------------------------------------------------------------------
@functools.cache
def scorer(name: str):
    import reasoning_gym

    return reasoning_gym.get_score_answer_fn(name)


def score(name: str, answer: str, entry: dict) -> float:
    """What the dataset's own scorer pays, from 0 to 1."""
    paid = float(scorer(name)(answer, entry))
    if math.isnan(paid):
        return 0.0
    return min(max(paid, 0.0), 1.0)


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
    notes = []
    if floor > 0 and reward == "score":
        notes.append(f"gym:{name}: its scorer pays up to {floor:g} for an empty or senseless "
                     "answer, so scores up to that count as 0")
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
    try:
        return score(name, text, problem.meta["entry"])
    except Exception:  # a scorer that cannot read a text pays nothing for it
        return 0.0


def judge(problem: Problem, text: str) -> Verdict:
    """The dataset's own score of what is in the last <answer> block: in full or not at all, or with
    meta["reward"] "score" what is above meta["floor"]."""
    found = last_block(text, "<answer>", "</answer>")
    if found is None:
        return Verdict(
            0.0, "No final answer was found; it belongs between <answer> and </answer>."
        )
    paid = score(problem.meta["gym"], found, problem.meta["entry"])
    if paid == 1:
        return Verdict(1.0)
    if problem.meta.get("reward") != "score" or paid <= problem.meta["floor"]:
        paid = 0.0
    return Verdict(paid, f"The final answer {found[:100]} is wrong.")
