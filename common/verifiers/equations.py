"""Equations and inequalities as answers: what they give a name to, and when two are the same."""
from __future__ import annotations

from common.verifiers.grammar import Node, number
from common.verifiers.values import NoValue, equal, evaluate, points, rounded, symbols

ZERO = number(0)
CONSTANTS = {"e", "i", "pi"}
NAMING = {"=", "~", "in"}  # the signs between a name and its value
FAILURES = (NoValue, KeyError, ValueError, OverflowError)
MIRRORED = str.maketrans("<>", "><")


def measured(node: Node) -> tuple[Node, list[str]]:
    """A node without its unit, and the unit."""
    if node.op != "unit":
        return node, []
    inner, unit = measured(node.args[0])
    return inner, [*node.args[1], *unit]


# --------------------------------------------------------------------------------------------------
# x = 5 against 5
# --------------------------------------------------------------------------------------------------
def without_names(gold: Node, answer: Node) -> tuple[Node, Node]:
    """The name goes if only one side has it, or if both have the same."""
    first, second = name_of(gold), name_of(answer)
    both = first is not None and second is not None
    if both and first != second:
        return gold, answer
    if first is not None and (both or answer.op != "rel"):
        gold = value_of(gold)
    if second is not None and (both or gold.op != "rel"):
        answer = value_of(answer)
    return gold, answer


def name_of(node: Node) -> str | None:
    """The name that the first member of an equation gives to the others. A chain of equal numbers,
    such as 4 + 24 = 28, gives the name ""; None stands for no name."""
    if node.op == "list":
        single = all(part.op != "rel" for part in node.args[1:])
        return name_of(node.args[0]) if single else None
    if node.op != "rel" or set(node.args[0]) - NAMING:
        return None
    joins, first, *rest = node.args
    if is_variable(first):
        return first.args[0]
    if consistent(joins, [first, *rest]):
        return ""
    return None


def is_variable(node: Node) -> bool:
    return node.op == "sym" and node.args[0] not in CONSTANTS


def value_of(node: Node) -> Node:
    """The value of an equation that gives a name to it: of a chain, the last exact member."""
    if node.op == "list":
        return Node("list", (value_of(node.args[0]), *node.args[1:]))
    joins, *members = node.args
    if is_variable(members[0]):
        joins, members = joins[1:], members[1:]
        if not consistent(joins, members):
            return Node("rel", (("?",), *members))  # contradicts itself
    last = len(members) - 1
    while last > 0 and joins[last - 1] == "~":
        last -= 1
    return members[last]


def consistent(joins: tuple[str, ...], members: list[Node]) -> bool:
    """Whether the members of a chain are equal, or nearly so at ≈."""
    for join, first, second in zip(joins, members, members[1:]):
        left, right = measured(first)[0], measured(second)[0]
        near = join == "~" and (rounded(right, left) or close(left, right))
        if not near and not equal(left, right):
            return False
    return True


def close(first: Node, second: Node) -> bool:
    """Within one hundredth of each other."""
    try:
        (a, b), _ = evaluate([first, second], {}, allow_complex=False)
    except FAILURES:
        return False
    return abs(a - b) * 100 <= abs(a)


def assigned(node: Node) -> dict[str, Node] | None:
    """What x = 1, y = 2 says of each of several variables; None for anything else."""
    if node.op not in ("list", "set") or len(node.args) < 2:
        return None
    found: dict[str, Node] = {}
    for part in node.args:
        if part.op != "rel" or part.args[0] != ("=",):
            return None
        _, name, value = part.args
        if name.op != "sym" or name.args[0] in found:
            return None
        found[name.args[0]] = value
    return found


# --------------------------------------------------------------------------------------------------
# one equation against another
# --------------------------------------------------------------------------------------------------
def same_relations(gold: Node, answer: Node) -> bool:
    """Two equations, or two inequalities, are the same if one is a multiple of the other."""
    if gold.op != answer.op or len(gold.args) != 3 or len(answer.args) != 3:
        return False
    [sign], [other] = gold.args[0], answer.args[0]
    multiple = sign_of_multiple(difference(gold), difference(answer))
    if multiple < 0:
        other = other.translate(MIRRORED)
    return multiple != 0 and sign == other and sign not in ("?", "in")


def difference(node: Node) -> Node:
    _, left, right = node.args
    return Node("add", (left, Node("neg", (right,))))


def sign_of_multiple(first: Node, second: Node) -> int:
    """The sign of the constant that makes the second tree of the first, or 0 if none does.

    >>> from common.verifiers.grammar import read
    >>> [sign_of_multiple(read("x - 5"), read(x)) for x in ("10 - 2x", "3x - 15", "x^2")]
    [-1, 1, 0]
    """
    names = sorted(symbols(first) - CONSTANTS)
    if not names or symbols(first) != symbols(second):
        return 0
    for point in points(names):
        left, right = insert(first, point), insert(second, point)
        if equal(left, ZERO) or equal(right, ZERO):
            continue
        if not equal(Node("mul", (first, right)), Node("mul", (second, left))):
            return 0
        try:
            (a, b), _ = evaluate([left, right], {}, allow_complex=False)
        except FAILURES:
            continue
        return 1 if a * b > 0 else -1
    return 0


def insert(node: Node, point: dict) -> Node:
    """The tree with values in place of variables."""
    if node.op == "sym" and node.args[0] in point:
        return number(point[node.args[0]])
    args = []
    for arg in node.args:
        new = insert(arg, point) if isinstance(arg, Node) else arg
        args.append(new)
    return Node(node.op, tuple(args))
