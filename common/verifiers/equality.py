"""Whether two answers are the same: the law of each kind of answer.

Two texts that are written alike are the same answer. Else both are read as a whole (grammar.py) and
compared by what they are: values, sets, ordered lists, intervals, equations, words. What only one
side can be read as is not the same.
"""
from __future__ import annotations

import contextlib
import re
from fractions import Fraction
from functools import lru_cache

from common.verifiers import BadProblem
from common.verifiers.answers import MAX_ANSWER, final_answer
from common.verifiers.equations import assigned, measured, same_relations, without_names
from common.verifiers.grammar import Node, number, read
from common.verifiers.notation import Unreadable, plain, spelled
from common.verifiers.regions import is_region, region, same_regions
from common.verifiers.units import agree
from common.verifiers.values import equal, exact, rounded, signs, symbols

MAX_MEMBERS = 60  # of a set
HUNDREDTH = number(Fraction(1, 100))
SEVERAL = {"list", "set", "rel", "tuple", "union", "both", "label"}  # no single value


def compare(gold: str, text: str) -> tuple[str, bool]:
    """→ (the answer found in `text`, whether it equals `gold`); ("", False) if there is none.

    Raises BadProblem if there is no gold.
    """
    if not written(gold).strip("{} ") or len(gold) > MAX_ANSWER:
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
    """The tree of an answer, or None if it cannot be read. What is unreadable with words in it may
    be a product of variables."""
    for form in (text, spelled(text)):
        with contextlib.suppress(Unreadable, RecursionError):
            return read(form)
    return None


def written(text: str) -> str:
    """The text without spaces, borders, styling and a full stop: texts that agree in it are written
    alike.

    >>> written(r"\\text{All real } x."), written("$ x $"), written("4 2")
    ('Allrealx', 'x', '4 2')
    """
    bare = re.sub(r"\\(?:text|mathrm|mbox|textbf)\s*\{([^{}]*)\}", r"\1", plain(text))
    bare = re.sub(r"(?<!\.)\.\s*$", "", bare)
    bare = re.sub(r"\{\s*(\w)\s*\}", r"\1 ", bare)
    return re.sub(r"\s+(?!\d)|(?<!\d)\s+", "", bare)


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
        return same_labels(gold, answer)
    gold, answer = without_names(gold, answer)
    regions = region(gold), region(answer)
    if None not in regions and (is_region(gold) or is_region(answer)):
        return same_regions(*regions)
    if "rel" in (gold.op, answer.op):
        return same_relations(gold, answer)
    named = assigned(gold), assigned(answer)
    if None not in named:
        return same_assignments(*named)
    names = named[0] or named[1]
    if names and not numbered(names) and {gold.op, answer.op} <= {"set", "list"}:
        return same_names(gold, answer, named)
    ordered = in_order(gold, named[0]), in_order(answer, named[1])
    if None not in ordered:
        return same_order(*ordered)
    members = members_of(gold), members_of(answer)
    if len(members[0]) != 1 or len(members[1]) != 1:
        return same_members(*members)
    return one_value(members[0][0], members[1][0])


def one_value(gold: Node, answer: Node) -> bool:
    """Two single answers: words, a number with its base, a ratio, a matrix, a value."""
    if gold.op in SEVERAL or answer.op in SEVERAL:
        return False  # of different kinds
    (gold, unit), (answer, other) = measured(gold), measured(answer)
    ops = {gold.op, answer.op}
    if ops & SEVERAL:
        return agree(unit, other) and alike(gold, answer)
    if "words" in ops or infinite(gold) or infinite(answer):
        return gold == answer
    if "based" in ops:
        return same_bases(gold, answer)
    if ops & {"ratio", "span"}:
        return agree(unit, other) and same_ratios(gold, answer)
    if "matrix" in ops:
        return same_matrices(gold, answer)
    if "%" in unit or "%" in other:
        if unit and other and ("%" in unit) != ("%" in other):
            return False
        return same_percents(gold, "%" in unit, answer, "%" in other)
    if ("°" in unit) != ("°" in other) and "pi" in symbols(gold) | symbols(answer):
        return equal(in_radians(gold, unit), in_radians(answer, other))
    return agree(unit, other) and (equal(gold, answer) or rounded(gold, answer))


def infinite(node: Node) -> bool:
    return node.op == "inf" or (node.op == "neg" and infinite(node.args[0]))


def in_radians(node: Node, unit: list[str]) -> Node:
    return Node("mul", (node, Node("deg"))) if "°" in unit else node


def same_percents(gold: Node, gold_percent: bool, answer: Node, answer_percent: bool) -> bool:
    """40% is 40 when both are percentages, and 0.4 when the other is none. A plain 40 is 40% too,
    but a plain gold below 1 is a share: 0.5% is not 0.5."""
    alone = equal(gold, answer)
    if gold_percent and answer_percent:
        return alone
    if gold_percent:
        return alone or equal(Node("mul", (gold, HUNDREDTH)), answer)
    value = exact(gold)
    if alone and (value is None or abs(value) >= 1):
        return True
    return equal(gold, Node("mul", (answer, HUNDREDTH)))


def same_bases(gold: Node, answer: Node) -> bool:
    """52_8 is 52_8 and, when the answer leaves the base out, 52; it is neither 52_9 nor 42."""
    if gold.op == answer.op:
        return gold.args == answer.args
    based, other = gold, answer
    if answer.op == "based":
        based, other = answer, gold
    digits, base = based.args
    value = exact(other)
    comparable = based is gold or base == 10
    return comparable and value is not None and digits == str(value)


def same_ratios(gold: Node, answer: Node) -> bool:
    """3:4 is 3:4, 3 to 4 or the fraction 3/4, term by term: 3:30 may be a time."""
    kinds = {gold.op, answer.op}
    known = kinds <= {"ratio", "span"} or kinds == {"ratio", "div"}
    return known and same_order(list(gold.args), list(answer.args))


def same_matrices(gold: Node, answer: Node) -> bool:
    """Entry by entry."""
    if gold.op != answer.op or len(gold.args) != len(answer.args):
        return False
    rows = zip(gold.args, answer.args)
    return all(same_order(list(row), list(other)) for row, other in rows)


def same_labels(gold: Node, answer: Node) -> bool:
    """(B) 12 answers "B" and "12"; against another option with its content, by the letter."""
    if gold.op == answer.op:
        return gold.args[0] == answer.args[0]
    whole, other = gold, answer
    if answer.op == "label":
        whole, other = answer, gold
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
    if node.op not in ("list", "set"):
        found = signs(node)
    else:
        found = []
        for part in map(without_name, node.args):
            found += [part] if part.op == "set" else members_of(part)
    if unit:
        found = [Node("unit", (member, tuple(unit))) for member in found]
    return list(dict.fromkeys(found))


def without_name(node: Node) -> Node:
    """The value of x = 5 in a list of solutions."""
    if node.op == "rel" and node.args[0] == ("=",) and node.args[1].op == "sym":
        return node.args[2]
    return node


def same_members(gold: list[Node], answer: list[Node]) -> bool:
    """Whether each value of one set is in the other."""
    if not gold or not answer:
        return gold == answer
    if max(len(gold), len(answer)) > MAX_MEMBERS:
        return False
    for member in gold:
        if not any(alike(member, other) for other in answer):
            return False
    return all(any(alike(member, other) for member in gold) for other in answer)


def in_order(node: Node, named: dict[str, Node] | None) -> list[Node] | None:
    """The entries of an ordered list: a tuple, a column; or the values of x = 1, y = 2."""
    if node.op == "tuple":
        point = node.args[0] in ("()", "ee") or len(node.args) > 3
        return list(node.args[1:]) if point else None
    if node.op == "matrix" and len(node.args[0]) == 1 < len(node.args):
        return [row[0] for row in node.args]
    if named is not None:
        return list(named.values())
    return None


def same_order(gold: list[Node], answer: list[Node]) -> bool:
    return len(gold) == len(answer) and all(map(alike, gold, answer))


def same_assignments(gold: dict[str, Node], answer: dict[str, Node]) -> bool:
    """x = 1, y = 2 in any order."""
    if set(gold) != set(answer):
        return False
    return all(alike(gold[name], answer[name]) for name in gold)


def same_names(gold: Node, answer: Node, named: tuple) -> bool:
    """x = 1, y = 2 against the list 1, 2, in this order. A set has no order, so it is neither."""
    values = []
    for node, names in zip((gold, answer), named):
        if node.op == "set":
            return False
        found = names.values() if names else node.args
        values.append(list(found))
    return same_order(*values)


def numbered(named: dict[str, Node]) -> bool:
    """Whether the names are those of one variable, x_1 and x_2, so that the order is open."""
    return len({name.partition("_")[0] for name in named}) == 1


# --------------------------------------------------------------------------------------------------
# sums and integrals
# --------------------------------------------------------------------------------------------------
CALCULUS = re.compile(r"\\(?:sum|prod|i?int|lim)(?![A-Za-z])")
LARGE = re.compile(r"\d{4}|\^\s*\{?\s*\d+\s*\}?\s*\^|!|\^\s*\{?\s*\d\d")  # sympy would compute it


def by_library(gold: str, answer: str) -> bool:
    """What the grammar does not know, and math-verify reads well: sums, products, integrals and
    limits. They are equal if sympy brings their difference to 0.

    >>> by_library(r"\\sum_{k=1}^{n} k", r"\\sum_{k=1}^{n} k^2"), by_library("x", r"\\forall x")
    (False, False)
    """
    both = f"{gold} {answer}"
    if not CALCULUS.search(both) or LARGE.search(both):
        return False
    from sympy import Float, simplify

    left, right = read_by_library(gold), read_by_library(answer)
    if left is None or right is None or left.has(Float) or right.has(Float):
        return False
    return simplify(left.doit() - right.doit()) == 0


def read_by_library(text: str):
    """The text as an expression of sympy, or None."""
    from math_verify import LatexExtractionConfig, parse
    from sympy import Expr

    formula = f"${text.strip(' $')}$"
    options = {"fallback_mode": "no_fallback", "parsing_timeout": None}
    found = parse(formula, [LatexExtractionConfig()], **options)
    if found and isinstance(found[0], Expr):
        return found[0]
    return None
