"""Whether two answers are the same: the law of each kind of answer.

Two texts that are written alike are the same answer. Else both are read as a whole (grammar.py) and
compared by what they are: values, sets, ordered lists, intervals, equations, words. What only one
side can be read as is not the same.
"""
from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from common.verifiers import BadProblem
from common.verifiers.answers import MAX_ANSWER, final_answer
from common.verifiers.grammar import Node, read
from common.verifiers.notation import Unreadable, plain
from common.verifiers.units import agree
from common.verifiers.values import equal, evaluate, exact, signs, symbols
from common.verifiers.values import NoValue, points

MAX_MEMBERS = 60  # of a set that is compared by value
ZERO = Node("num", (Fraction(0), 0))


def compare(gold: str, text: str) -> tuple[str, bool]:
    """→ (the answer found in `text`, whether it equals `gold`); ("", False) if there is none.

    Raises BadProblem if there is no gold.
    """
    if not written(gold) or len(gold) > MAX_ANSWER:
        raise BadProblem(f"the reference answer {gold[:80]!r} is empty or too long")
    answer = final_answer(text)
    if not answer or len(answer) > MAX_ANSWER:
        return "", False
    return answer[:100], same(gold, answer)


def same(gold: str, answer: str) -> bool:
    """Whether an answer is the gold, both as texts.

    >>> same("1/2", "0.5"), same(r"15\\mbox{ cm}^2", "15 in²"), same("(3, 4)", "3, 4")
    (True, False, False)
    """
    if written(gold) == written(answer):
        return True
    expected, found = tree(gold), tree(answer)
    if expected is None or found is None:
        return by_library(gold, answer)
    return alike(expected, found)


@lru_cache(maxsize=2048)
def tree(text: str) -> Node | None:
    """The tree of an answer, or None if it cannot be read."""
    try:
        return read(text)
    except (Unreadable, RecursionError):
        return None


def written(text: str) -> str:
    """The text without spaces, borders and styling: texts that agree in it are written alike.

    >>> written(r"\\text{All real } x."), written("$ x $")
    ('Allrealx', 'x')
    """
    bare = re.sub(r"\\(?:text|mathrm|mbox|textbf)\s*\{([^{}]*)\}", r"\1", plain(text))
    return re.sub(r"\s+(?!\d)|(?<!\d)\s+", "", re.sub(r"(?<!\.)\.\s*$", "", bare))


def reading(gold: str) -> str:
    """How a gold is compared: "value", "words", or "text" if only the same text is right.

    >>> reading("2x+1"), reading("even"), reading(r"\\forall x")
    ('value', 'words', 'text')
    """
    node = tree(gold)
    if node is None:
        return "text"
    if node.op == "words":
        return "words"
    return "value"


# --------------------------------------------------------------------------------------------------
# kinds
# --------------------------------------------------------------------------------------------------
def alike(gold: Node, answer: Node) -> bool:
    """The law of the kind of answer that the gold is."""
    if "label" in (gold.op, answer.op):
        return labels(gold, answer)
    gold, answer = without_names(gold, answer)
    regions = region(gold), region(answer)
    if None not in regions and (is_region(gold) or is_region(answer)):
        return same_regions(*regions)
    if gold.op == "rel" or answer.op == "rel":
        return relations(gold, answer)
    named = assigned(gold), assigned(answer)
    if None not in named:
        return same_assignments(*named)
    names = named[0] or named[1]
    if names and not numbered(names):
        if "set" in (gold.op, answer.op):
            return False
        if gold.op == answer.op:
            gold, answer = bare(gold, named[0]), bare(answer, named[1])
            return same_order(list(gold.args), list(answer.args))
    ordered = in_order(gold, named[0]), in_order(answer, named[1])
    if None not in ordered:
        return same_order(*ordered)
    members = members_of(gold), members_of(answer)
    if len(members[0]) != 1 or len(members[1]) != 1:
        return same_members(*members)
    return one_value(members[0][0], members[1][0])


def one_value(gold: Node, answer: Node) -> bool:
    """Two single answers: words, a number with its base, a ratio, a matrix, a value."""
    several = {"list", "set", "rel", "tuple", "union", "both", "label"}
    if gold.op in several or answer.op in several:
        return False  # of different kinds
    (gold, unit), (answer, other) = measured(gold), measured(answer)
    if gold.op in several or answer.op in several:
        return agree(unit, other) and alike(gold, answer)
    if gold.op == "words" or answer.op == "words":
        return gold == answer
    if gold.op == "based" or answer.op == "based":
        return based(gold, answer)
    if {gold.op, answer.op} & {"ratio", "span"}:
        return ratios(gold, answer) and agree(unit, other)
    if gold.op == "matrix" or answer.op == "matrix":
        return matrices(gold, answer)
    if gold.op == "inf" or answer.op == "inf" or minus_infinity(gold) or minus_infinity(answer):
        return gold == answer
    if "%" in unit or "%" in other:
        return percents(gold, unit, answer, other)
    if "°" in unit + other and unit != other and "pi" in symbols(gold) | symbols(answer):
        return equal(in_radians(gold, unit), in_radians(answer, other))
    return agree(unit, other) and (equal(gold, answer) or rounded(gold, answer))


def minus_infinity(node: Node) -> bool:
    return node == Node("neg", (Node("inf"),))


def measured(node: Node) -> tuple[Node, list[str]]:
    """A node and its unit."""
    if node.op == "unit":
        inner, unit = measured(node.args[0])
        return inner, [*node.args[1], *unit]
    return node, []


def percents(gold: Node, unit: list[str], answer: Node, other: list[str]) -> bool:
    """40% is 40 where both are percentages, 0.4 where the other is none; a plain 40 is 40% too.

    A plain gold below 1 is a share: 0.5% is not 0.5.
    """
    hundredth = Node("num", (Fraction(1, 100), 0))
    if "%" in unit and "%" in other:
        return equal(gold, answer)
    if "%" in unit:
        return equal(gold, answer) or equal(Node("mul", (gold, hundredth)), answer)
    value = exact(gold)
    share = value is not None and abs(value) < 1
    if equal(gold, answer):
        return not share
    return equal(gold, Node("mul", (answer, hundredth)))


def in_radians(node: Node, unit: list[str]) -> Node:
    return Node("mul", (node, Node("deg"))) if "°" in unit else node


def rounded(gold: Node, answer: Node) -> bool:
    """A gold of three decimals or more may be rounded: an answer that no decimal can write, such as
    1/3 or a root, is right if it rounds to the gold. A decimal answer must be the gold exactly."""
    sign, number = 1, gold
    if gold.op == "neg":
        sign, number = -1, gold.args[0]
    if number.op != "num" or number.args[1] < 3 or symbols(answer) - {"pi", "e"}:
        return False
    value, step = sign * number.args[0], Fraction(1, 10 ** number.args[1])
    rational = exact(answer)
    if rational is not None:
        return not is_decimal(rational) and abs(rational - value) <= step / 2
    try:
        [found], _ = evaluate([answer], {}, allow_complex=False)
    except (NoValue, ValueError, OverflowError):
        return False
    distance = abs(found * value.denominator - value.numerator) / value.denominator
    return distance * 2 * step.denominator <= 1


def is_decimal(value: Fraction) -> bool:
    """Whether a number of finitely many decimals is equal to it.

    >>> is_decimal(Fraction(1, 40)), is_decimal(Fraction(1, 3))
    (True, False)
    """
    under = value.denominator
    for prime in (2, 5):
        while under % prime == 0:
            under //= prime
    return under == 1


def based(gold: Node, answer: Node) -> bool:
    """52_8 is 52_8 and, when the answer leaves the base out, 52; it is neither 52_9 nor 42."""
    if gold.op == answer.op:
        return gold.args == answer.args
    if gold.op == "based":
        value = exact(answer)
        return value is not None and gold.args[0] == str(value)
    digits, base = answer.args
    value = exact(gold)
    return base == 10 and value is not None and str(value) == digits


def ratios(gold: Node, answer: Node) -> bool:
    """3:4 is 3:4, 3 to 4 or the fraction 3/4, term by term: 3:30 may be a time."""
    if answer.op == "span" and gold.op not in ("ratio", "span"):
        return False
    if gold.op != answer.op and answer.op != "span":
        gold, answer = as_ratio(gold), as_ratio(answer)
    terms, others = gold.args, answer.args
    return len(terms) == len(others) and all(map(one_value, terms, others)) and bool(terms)


def as_ratio(node: Node) -> Node:
    if node.op == "div":
        return Node("ratio", node.args)
    return node if node.op == "ratio" else Node("ratio")


def matrices(gold: Node, answer: Node) -> bool:
    """Entry by entry."""
    if gold.op != answer.op or len(gold.args) != len(answer.args):
        return False
    same_width = len(gold.args[0]) == len(answer.args[0])
    return same_width and all(
        equal(a, b) for row, other in zip(gold.args, answer.args) for a, b in zip(row, other)
    )


def labels(gold: Node, answer: Node) -> bool:
    """(B) 12 answers "B" and "12"; against another option with its content, by the letter."""
    if gold.op == answer.op:
        return gold.args[0] == answer.args[0]
    whole, other = (gold, answer) if gold.op == "label" else (answer, gold)
    letter, content = whole.args
    if other == Node("sym", (letter,)):
        return True
    return content is not None and alike(content, other)


# --------------------------------------------------------------------------------------------------
# several values
# --------------------------------------------------------------------------------------------------
def members_of(node: Node) -> list[Node]:
    """The values of a set, of a list, or of ±, each once in the order in which they stand."""
    node, unit = measured(node)
    if node.op in ("list", "set"):
        found = [member for part in node.args for member in members_of(plain_member(part))]
    else:
        found = signs(node)
    if unit:
        found = [Node("unit", (member, tuple(unit))) for member in found]
    different: list[Node] = []
    for member in found[:MAX_MEMBERS]:
        if member not in different:
            different.append(member)
    return different + found[MAX_MEMBERS:]


def plain_member(node: Node) -> Node:
    """The value of x = 5 in a list of solutions."""
    if node.op == "rel" and node.args[0] == ("=",) and node.args[1].op == "sym":
        return node.args[2]
    return node


def numbered(named: dict[str, Node]) -> bool:
    """Whether the names are those of one variable, x_1 and x_2, so that the order is open."""
    return len({name.partition("_")[0] for name in named}) == 1


def bare(node: Node, named: dict[str, Node] | None) -> Node:
    """The list of values of x = 1, y = 2."""
    return Node("list", tuple(named.values())) if named else node


def same_members(gold: list[Node], answer: list[Node]) -> bool:
    """Whether each value of one set is in the other."""
    if max(len(gold), len(answer)) > MAX_MEMBERS or not gold or not answer:
        return gold == answer
    there = all(any(alike(a, b) for b in answer) for a in gold)
    return there and all(any(alike(a, b) for a in gold) for b in answer)


def in_order(node: Node, named: dict | None) -> list[Node] | None:
    """The entries of an ordered list: a tuple, a vector, a column; or the values of x = 1, y = 2."""
    if node.op == "tuple" and (node.args[0] in ("()", "ee") or len(node.args) > 3):
        return list(node.args[1:])
    if node.op == "matrix" and len(node.args[0]) == 1 and len(node.args) > 1:
        return [row[0] for row in node.args]
    if named is not None and len(named) > 1:
        return list(named.values())
    return None


def same_order(gold: list[Node], answer: list[Node]) -> bool:
    return len(gold) == len(answer) and all(map(alike, gold, answer))


# --------------------------------------------------------------------------------------------------
# equations
# --------------------------------------------------------------------------------------------------
def without_names(gold: Node, answer: Node) -> tuple[Node, Node]:
    """x = 5 against 5: the name goes if only one side has it, or if both have the same."""
    names = name_of(gold), name_of(answer)
    if names[0] is not None and names[1] is not None and names[0] != names[1]:
        return gold, answer
    if names[0] is not None and (names[1] is not None or answer.op != "rel"):
        gold = value_of(gold)
    if names[1] is not None and (names[0] is not None or gold.op != "rel"):
        answer = value_of(answer)
    return gold, answer


def name_of(node: Node) -> str | None:
    """The name that the first member of an equation gives to the others; a chain of equal numbers,
    as 4 + 24 = 28, gives none."""
    if node.op == "list":
        first = node.args[0]
        several = all(part.op != "rel" for part in node.args[1:])
        return name_of(first) if several else None
    if node.op != "rel" or set(node.args[0]) - {"=", "~", "in"}:
        return None
    first = node.args[1]
    if first.op == "sym" and first.args[0] not in ("e", "i", "pi"):
        return first.args[0]
    if consistent(node.args[0], node.args[1:]):
        return ""
    return None


def value_of(node: Node) -> Node:
    """The value of an equation that gives a name to it: of a chain, the last exact member."""
    if node.op == "list":
        return Node("list", (value_of(node.args[0]), *node.args[1:]))
    relation_signs, *members = node.args
    named = members[0].op == "sym" and members[0].args[0] not in ("e", "i", "pi")
    values, joins = members[named:], relation_signs[named:]
    if len(values) > 1 and not consistent(joins, values):
        return Node("rel", (("?",), *values))  # contradicts itself, so it is no value
    last = len(values) - 1
    while last > 0 and joins[last - 1] == "~":
        last -= 1
    return values[last]


def consistent(joins: tuple[str, ...], members: tuple[Node, ...]) -> bool:
    """Whether the members of a chain are equal, or nearly so at ≈."""
    for sign, first, second in zip(joins, members, members[1:]):
        near = sign == "~" and not symbols(first) - {"pi", "e"} and (
            rounded(second, first) or close(first, second))
        if not near and not equal(measured(first)[0], measured(second)[0]):
            return False
    return True


def close(first: Node, second: Node) -> bool:
    """Within one hundredth of each other."""
    try:
        (a, b), _ = evaluate([measured(first)[0], measured(second)[0]], {}, allow_complex=False)
    except (NoValue, KeyError, ValueError, OverflowError):
        return False
    return abs(a - b) * 100 <= abs(a)


def assigned(node: Node) -> dict[str, Node] | None:
    """What x = 1, y = 2 says of each of several variables; None for anything else."""
    if node.op not in ("list", "set"):
        return None
    found: dict[str, Node] = {}
    for part in node.args:
        named = part.op == "rel" and part.args[0] == ("=",) and part.args[1].op == "sym"
        if not named or part.args[1].args[0] in found:
            return None
        found[part.args[1].args[0]] = part.args[2]
    return found if len(found) > 1 else None


def same_assignments(gold: dict[str, Node], answer: dict[str, Node]) -> bool:
    return set(gold) == set(answer) and all(alike(gold[name], answer[name]) for name in gold)


def relations(gold: Node, answer: Node) -> bool:
    """Two equations, or two inequalities, are the same if one is a multiple of the other."""
    if gold.op != answer.op or len(gold.args[0]) != 1 or len(answer.args[0]) != 1:
        return False
    [sign], [other] = gold.args[0], answer.args[0]
    if sign in ("=", "!="):
        return sign == other and factor(difference(gold), difference(answer)) != 0
    sides = factor(difference(gold), difference(answer))
    if sides < 0:
        other = other.translate(str.maketrans("<>", "><"))
    return sides != 0 and sign == other


def difference(node: Node) -> Node:
    _, left, right = node.args
    return Node("add", (left, Node("neg", (right,))))


def factor(first: Node, second: Node) -> int:
    """The sign of the constant that makes the first tree of the second, or 0 if none does.

    >>> factor(read("x - 5"), read("10 - 2x")), factor(read("x"), read("x^2"))
    (-1, 0)
    """
    names = sorted((symbols(first) | symbols(second)) - {"e", "i", "pi"})
    if not names or symbols(first) != symbols(second):
        return 0
    for point in points(names):
        at = {name: Node("num", (value, 0)) for name, value in point.items()}
        left, right = insert(first, at), insert(second, at)
        if equal(left, ZERO) or equal(right, ZERO):
            continue
        if not equal(Node("mul", (first, right)), Node("mul", (second, left))):
            return 0
        (a, b), _ = evaluate([left, right], {}, allow_complex=False)
        return 1 if a * b > 0 else -1
    return 0


def insert(node: Node, values: dict[str, Node]) -> Node:
    """The tree with values in place of variables."""
    if node.op == "sym":
        return values.get(node.args[0], node)
    args = tuple(insert(arg, values) if isinstance(arg, Node) else arg for arg in node.args)
    return Node(node.op, args)


# --------------------------------------------------------------------------------------------------
# intervals and inequalities
# --------------------------------------------------------------------------------------------------
class Interval(NamedTuple):
    low: Node
    high: Node
    closed: tuple[bool, bool]


INFINITY = Node("inf")
BELOW = Node("neg", (INFINITY,))


def is_region(node: Node) -> bool:
    """Whether a node is a set of numbers for certain: (2, 4) may also be a point."""
    if node.op == "rel":
        return True
    if node.op in ("union", "both"):
        return True
    if node.op != "tuple":
        return False
    closed = "[" in node.args[0] or "]" in node.args[0]
    if len(node.args) != 3:
        return False
    return closed or INFINITY in node.args or BELOW in node.args or PLUS in node.args


PLUS = Node("add", (INFINITY,))


def region(node: Node) -> tuple[str, list[Interval]] | None:
    """The variable and the intervals of an inequality, an interval or a union; None for others."""
    if node.op == "tuple" and len(node.args) == 3:
        brackets, low, high = node.args
        if set(brackets) <= set("()[]"):
            return "", [Interval(low, high, (brackets[0] == "[", brackets[1] == "]"))]
        return None
    if node.op == "rel":
        return inequality(node)
    if node.op == "both":
        return intersection([region(part) for part in node.args])
    if node.op in ("union", "list") and node.args:
        parts = [region(part) for part in node.args]
        if None in parts or (node.op == "list" and not all(p.op == "rel" for p in node.args)):
            return None
        names = {name for name, _ in parts if name}
        if len(names) > 1:
            return None
        intervals = [interval for _, found in parts for interval in found]
        return next(iter(names), ""), intervals
    return None


def intersection(parts: list) -> tuple[str, list[Interval]] | None:
    """One inequality that bounds a variable below and one that bounds it above."""
    if len(parts) != 2 or None in parts or parts[0][0] != parts[1][0]:
        return None
    intervals = [interval for _, found in parts for interval in found]
    below = [interval for interval in intervals if interval.low == BELOW]
    above = [interval for interval in intervals if interval.high == INFINITY]
    if len(intervals) != 2 or len(below) != 1 or len(above) != 1:
        return None
    closed = (above[0].closed[0], below[0].closed[1])
    return parts[0][0], [Interval(above[0].low, below[0].high, closed)]


def inequality(node: Node) -> tuple[str, list[Interval]] | None:
    """x > 3, 1 < x <= 2, x != 3, x in (1, 2)."""
    joins, *members = node.args
    if len(members) == 2 and members[0].op == "fn" and members[0].args[0] == "abs":
        return around(joins[0], members[0].args[1], members[1])
    variables = [i for i, member in enumerate(members) if member.op == "sym"]
    if joins == ("in",) and variables and variables[0] == 0:
        inside = region(members[1])
        return (members[0].args[0], inside[1]) if inside else None
    if len(variables) != 1 or set(joins) & {"=", "in", "~", "?"}:
        return None
    place = variables[0]
    name = members[place].args[0]
    if any(name in symbols(m) for i, m in enumerate(members) if i != place):
        return None
    if joins == ("!=",):
        [hole] = [member for i, member in enumerate(members) if i != place]
        return name, [Interval(BELOW, hole, (False, False)),
                      Interval(hole, INFINITY, (False, False))]
    low, high, closed, sides = BELOW, INFINITY, [False, False], set()
    for i, sign in enumerate(joins):
        if i not in (place - 1, place) or sign == "!=":
            return None
        other = members[i + 1] if i == place else members[i]
        above = sign.startswith(">") == (i == place)  # the variable is above the other member
        sides.add(above)
        if above:
            low, closed[0] = other, sign.endswith("=")
        else:
            high, closed[1] = other, sign.endswith("=")
    if len(sides) != len(joins):
        return None
    return name, [Interval(low, high, tuple(closed))]


def around(sign: str, inside: Node, bound: Node) -> tuple[str, list[Interval]] | None:
    """|x| < 3 is -3 < x < 3, and |x| > 3 is x < -3 or x > 3."""
    if inside.op != "sym" or sign not in ("<", "<=", ">", ">=") or symbols(bound):
        return None
    closed, minus = sign.endswith("="), Node("neg", (bound,))
    if sign.startswith("<"):
        return inside.args[0], [Interval(minus, bound, (closed, closed))]
    return inside.args[0], [Interval(BELOW, minus, (False, closed)),
                            Interval(bound, INFINITY, (closed, False))]


def same_regions(gold: tuple[str, list[Interval]], answer: tuple[str, list[Interval]]) -> bool:
    """The same intervals, of the same variable if both name it."""
    if gold[0] and answer[0] and gold[0] != answer[0]:
        return False
    if len(gold[1]) != len(answer[1]):
        return False
    return all(any(same_interval(a, b) for b in answer[1]) for a in gold[1])


def same_interval(a: Interval, b: Interval) -> bool:
    ends = one_value(a.low, b.low) and one_value(a.high, b.high)
    return ends and a.closed == b.closed


# --------------------------------------------------------------------------------------------------
# sums and integrals
# --------------------------------------------------------------------------------------------------
CALCULUS = re.compile(r"\\(?:sum|prod|int|iint|lim)(?![A-Za-z])")


def by_library(gold: str, answer: str) -> bool:
    """What the grammar does not know, and math-verify reads well: sums, products, integrals and
    limits. They are equal if sympy brings their difference to 0."""
    if not CALCULUS.search(gold) and not CALCULUS.search(answer):
        return False
    if re.search(r"\d{4}|\^\s*\{?\s*\d+\s*\}?\s*\^|!", gold + answer):
        return False  # sympy would compute it
    from math_verify import LatexExtractionConfig, parse
    from sympy import Expr, Float, simplify

    values = [parse(f"${text.strip(' $')}$", [LatexExtractionConfig()], fallback_mode="no_fallback",
                    parsing_timeout=None) for text in (gold, answer)]
    expressions = [found[0] for found in values if found and isinstance(found[0], Expr)]
    if len(expressions) < 2 or any(x.has(Float) for x in expressions):
        return False
    left, right = (expression.doit() for expression in expressions)
    return simplify(left - right) == 0
