"""Intervals and inequalities as answers: x > 3 is (3, ∞)."""
from __future__ import annotations

from typing import NamedTuple

from common.verifiers.grammar import Node
from common.verifiers.values import equal, symbols

INFINITY = Node("inf")
BELOW = Node("neg", (INFINITY,))
ORDER = {"<", "<=", ">", ">="}


class Interval(NamedTuple):
    low: Node
    high: Node
    closed: tuple[bool, bool]  # at its ends


class Region(NamedTuple):
    variable: str  # "" if none is named
    parts: list[Interval]


def is_region(node: Node) -> bool:
    """Whether a node is a set of numbers for certain: (2, 4) may also be a point."""
    if node.op in ("rel", "union", "both"):
        return True
    if node.op != "tuple" or len(node.args) != 3:
        return False
    brackets, low, high = node.args
    return brackets != "()" or BELOW == low or INFINITY == high


def region(node: Node) -> Region | None:
    """The intervals of an inequality, of an interval, of several; None for anything else."""
    if node.op == "rel":
        return inequality(*node.args)
    if node.op == "tuple":
        return interval(*node.args)
    if node.op == "both":
        return intersection([region(part) for part in node.args])
    inequalities = node.op == "list" and all(part.op == "rel" for part in node.args)
    if node.op == "union" or inequalities:
        return union([region(part) for part in node.args])
    return None


def interval(brackets: str, *ends: Node) -> Region | None:
    if len(ends) != 2 or brackets == "ee":
        return None
    closed = brackets[0] == "[", brackets[1] == "]"
    return Region("", [Interval(*ends, closed)])


def union(parts: list[Region | None]) -> Region | None:
    """All intervals, if they are of one variable."""
    if None in parts or not parts:
        return None
    variables = {part.variable for part in parts} - {""}
    if len(variables) > 1:
        return None
    intervals: list[Interval] = []
    for part in parts:
        intervals += part.parts
    return Region("".join(variables), intervals)


def intersection(parts: list[Region | None]) -> Region | None:
    """One inequality that bounds a variable below, and one that bounds it above."""
    joined = union(parts)
    if joined is None or len(joined.parts) != 2:
        return None
    first, second = joined.parts
    if first.low == BELOW:
        first, second = second, first
    if first.high != INFINITY or second.low != BELOW or first.low == BELOW:
        return None
    closed = first.closed[0], second.closed[1]
    return Region(joined.variable, [Interval(first.low, second.high, closed)])


def inequality(joins: tuple[str, ...], *members: Node) -> Region | None:
    """x > 3, 1 < x <= 2, x != 3, |x| < 1, x in (1, 2)."""
    first, last = members[0], members[-1]
    if len(members) == 2 and first.op == "fn" and first.args[0] == "abs":
        return around(joins[0], first.args[1], last)
    places = [i for i, member in enumerate(members) if member.op == "sym"]
    if joins == ("in",):
        inside = region(last)
        if places != [0] or inside is None:
            return None
        return Region(first.args[0], inside.parts)
    if len(places) != 1:
        return None
    place = places[0]
    name = members[place].args[0]
    others = [member for i, member in enumerate(members) if i != place]
    if any(name in symbols(member) for member in others):
        return None
    if joins == ("!=",):
        return Region(name, outside(others[0], others[0], False))
    bounds = len(members) == 2 or (len(members) == 3 and place == 1)
    if not bounds or set(joins) - ORDER:
        return None
    return bounded(name, joins, place, others)


def bounded(name: str, joins: tuple, place: int, others: list[Node]) -> Region | None:
    """The interval of a variable that stands at `place` between one or two bounds."""
    low, high, closed = BELOW, INFINITY, [False, False]
    sides = []
    for i, (join, other) in enumerate(zip(joins, others)):
        above = join.startswith(">") == (i == place)  # the variable is above the other member
        sides.append(above)
        if above:
            low, closed[0] = other, join.endswith("=")
        else:
            high, closed[1] = other, join.endswith("=")
    if len(sides) != len(set(sides)):
        return None  # 1 < x > 0
    return Region(name, [Interval(low, high, tuple(closed))])


def around(join: str, inside: Node, bound: Node) -> Region | None:
    """|x| < 3 is -3 < x < 3, and |x| > 3 is x < -3 or x > 3."""
    if inside.op != "sym" or join not in ORDER or symbols(bound):
        return None
    name = inside.args[0]
    closed = join.endswith("=")
    minus = Node("neg", (bound,))
    if join.startswith("<"):
        return Region(name, [Interval(minus, bound, (closed, closed))])
    return Region(name, outside(minus, bound, closed))


def outside(low: Node, high: Node, closed: bool) -> list[Interval]:
    """What is below `low` and what is above `high`."""
    below = Interval(BELOW, low, (False, closed))
    above = Interval(high, INFINITY, (closed, False))
    return [below, above]


def same_regions(gold: Region, answer: Region) -> bool:
    """The same intervals, of the same variable if both name it."""
    if gold.variable and answer.variable and gold.variable != answer.variable:
        return False
    if len(gold.parts) != len(answer.parts):
        return False
    for part in gold.parts:
        if not any(same_interval(part, other) for other in answer.parts):
            return False
    return True


def same_interval(a: Interval, b: Interval) -> bool:
    if a.closed != b.closed:
        return False
    return same_end(a.low, b.low) and same_end(a.high, b.high)


def same_end(a: Node, b: Node) -> bool:
    return a == b or equal(a, b)
