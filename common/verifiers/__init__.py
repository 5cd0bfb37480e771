"""Verdicts on responses: a reward in [0, 1] and feedback that a model can read.

    pool.py       Verifier: judges many responses at once, each with the judge of its problem's kind
    worker.py     the process in which a judge runs that may hang or crash
    thoughts.py   which part of a response counts: what follows the last thought
    answers.py    where the answer is in that part
    equality.py   whether two mathematical expressions are equal
    sandbox.py    untrusted programs, contained; sandbox_child.py is the part that runs inside
    seccomp.py    the system calls that these programs do without

The judges themselves are in common/tasks/, one per kind of data.
"""
from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    reward: float  # 1.0 if the response is right
    feedback: str = ""  # what is wrong, without the answer


class BadProblem(ValueError):
    """A reference answer or a test that cannot be used: an error in the data, not in a response."""
