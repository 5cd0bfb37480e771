"""The process that makes reasoning-gym's problems: python -m common.tasks.gym_maker

Some sets walk over Python sets of texts or draw from the global random numbers. Their problems
would differ in each process; here both are fixed: gym.py starts it with PYTHONHASHSEED=0.

    parent → here   make (name, size, seed, index), score (name, answer, entry)
    here → parent   the entry, the score, or the error's text                   all as pickles
"""
from __future__ import annotations

import contextlib
import functools
import io
import pickle
import random

from common.verifiers.sandbox_child import receive, send, take_over

MAKE, SCORE, DONE, FAILED = b"m", b"s", b"d", b"f"


@functools.cache
def dataset(name: str, size: int, seed: int):
    """A reasoning-gym dataset with its default settings."""
    import reasoning_gym

    return reasoning_gym.create_dataset(name, size=size, seed=seed)


@functools.cache
def scorer(name: str):
    import reasoning_gym

    return reasoning_gym.get_score_answer_fn(name)


def make(name: str, size: int, seed: int, index: int) -> dict:
    import numpy

    source = dataset(name, size, seed)
    random.seed(f"{name}/{seed}/{index}")
    numpy.random.seed((seed + index) % 2**32)
    return source[index]


def score(name: str, answer: str, entry: dict) -> float:
    return float(scorer(name)(answer, entry))


def main() -> None:
    take_over()
    tasks = {MAKE: make, SCORE: score}
    while True:
        kind, request = receive()
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # some sets print
                result = tasks[kind](*pickle.loads(request))
            send(DONE, pickle.dumps(result))
        except Exception as error:  # the library's own trouble; the parent says so
            lines = str(error).splitlines() or [repr(error)]
            send(FAILED, pickle.dumps(lines[0]))


if __name__ == "__main__":
    main()
