"""Lists of problems that are made when they are asked for."""
from __future__ import annotations

from collections.abc import Callable, Sequence

from common.tasks.problem import Problem


class Lazy(Sequence):
    """`size` problems. make(i) makes the i-th, once.

    parts, places: the lists that `make` takes its problems from, and from where, if it makes none
    itself.

    >>> lazy = Lazy(3, lambda i: Problem(str(i), []))
    >>> lazy[-1].id, [p.id for p in lazy[:2]], len(at_hand(lazy))
    ('2', ['0', '1'], 3)
    """

    def __init__(self, size: int, make: Callable[[int], Problem],
                 parts: Sequence[Sequence[Problem]] = (),
                 places: list[tuple[int, int]] | None = None):
        self.size, self.make = size, make
        self.parts, self.places = parts, places
        self.made: dict[int, Problem] = {}

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, place):
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(self.size))]
        i = range(self.size)[place]  # what a list does with negative and other numbers
        if i not in self.made:
            self.made[i] = self.make(i)
        return self.made[i]


def at_hand(problems: Sequence[Problem]) -> list[Problem]:
    """The problems of the list that need not be made first."""
    if not isinstance(problems, Lazy):
        return list(problems)
    if problems.parts:
        return [problem for part in problems.parts for problem in at_hand(part)]
    return list(problems.made.values())


def picked(parts: Sequence[Sequence[Problem]],
           places: list[tuple[int, int]]) -> Sequence[Problem]:
    """parts[k][i] for each place (k, i); lazy if a part is."""

    def make(j: int) -> Problem:
        k, i = places[j]
        return parts[k][i]

    lazy = Lazy(len(places), make, parts, places)
    if any(isinstance(part, Lazy) for part in parts):
        return lazy
    return list(lazy)


def without(problems: Sequence[Problem], bad: set[str]) -> Sequence[Problem]:
    """The list without the problems of these places that are at hand."""
    if not isinstance(problems, Lazy):
        return [problem for problem in problems if problem.place not in bad]
    if problems.places is None:
        return problems
    kept = []
    for k, i in problems.places:
        part = problems.parts[k]
        if isinstance(part, Lazy) or part[i].place not in bad:
            kept.append((k, i))
    return picked(problems.parts, kept)
