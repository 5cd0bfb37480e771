"""What a tree is worth: an exact rational, or a number to as many digits as telling apart needs.

Everything is bounded before it is computed: a power or a factorial of more than MAX_BITS bits is
refused, so 9**9**9 costs nothing.
"""
from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from math import comb, factorial, gcd, isqrt, lcm

import mpmath

from common.verifiers.grammar import Node

MAX_BITS = 20_000  # of a rational number
MAX_RANGE = 6_000  # |log2| of a number that is computed
DOUBT = 256  # bits that two numbers must share, beyond the range of all that went into them


class NoValue(ArithmeticError):
    """Undefined (1/0, a real root of -1), or too large to compute."""


# --------------------------------------------------------------------------------------------------
# exact
# --------------------------------------------------------------------------------------------------
def exact(node: Node) -> Fraction | None:
    """The rational value of a tree; None if it has none or is none.

    >>> from common.verifiers.grammar import read
    >>> [str(exact(read(x))) for x in ("2 1/2", "2^{-3}", r"\\binom{5}{2}", "x", "9^{9^9}")]
    ['5/2', '1/8', '10', 'None', 'None']
    """
    op, args = node
    if op == "num":
        return args[0]
    if op in ("sym", "inf", "deg", "pm", "mp") or op not in EXACT:
        return None
    if op == "fn":
        name, args = args[0], args[1:]
        op = name if name in EXACT_FUNCTIONS else ""
    values = [exact(arg) for arg in args]
    if not op or None in values:
        return None
    try:
        return {**EXACT, **EXACT_FUNCTIONS}[op](*values)
    except (NoValue, ZeroDivisionError, ValueError):
        return None


def total(*values: Fraction) -> Fraction:
    return sum(values, Fraction(0))


def times(*values: Fraction) -> Fraction:
    result = Fraction(1)
    for value in values:
        result *= value
    return result


def raise_to(base: Fraction, power: Fraction) -> Fraction:
    """A rational power, if it is rational. Raises NoValue if it is not, or is too large."""
    if power.denominator == 2:
        return raise_to(root(base), power * 2)
    if power.denominator != 1:
        raise NoValue
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(power) * bits > MAX_BITS:
        raise NoValue
    return base ** int(power)


def root(value: Fraction) -> Fraction:
    """The square root of a square. Raises NoValue for any other number."""
    if value < 0:
        raise NoValue
    found = Fraction(isqrt(value.numerator), isqrt(value.denominator))
    if found * found != value:
        raise NoValue
    return found


def whole(value: Fraction) -> int:
    """A natural number up to 2,100. Raises NoValue for any other."""
    if value.denominator != 1 or not 0 <= value <= 2100:
        raise NoValue
    return int(value)


def whole_factorial(value: Fraction) -> Fraction:
    return Fraction(factorial(whole(value)))


def whole_binomial(n: Fraction, k: Fraction) -> Fraction:
    return Fraction(comb(whole(n), whole(k)))


def integers(values: tuple[Fraction, ...]) -> list[int]:
    if any(value.denominator != 1 for value in values):
        raise NoValue
    return [int(value) for value in values]


def whole_gcd(*values: Fraction) -> Fraction:
    return Fraction(gcd(*integers(values)))


def whole_lcm(*values: Fraction) -> Fraction:
    return Fraction(lcm(*integers(values)))


EXACT = {
    "num": None, "fn": None, "add": total, "mul": times, "neg": lambda x: -x,
    "div": lambda x, y: x / y, "pow": raise_to, "fact": whole_factorial,
}
EXACT_FUNCTIONS = {
    "abs": abs, "sqrt": root, "binom": whole_binomial, "floor": lambda x: Fraction(x // 1),
    "ceil": lambda x: Fraction(-(-x // 1)), "max": max, "min": min, "gcd": whole_gcd,
    "lcm": whole_lcm,
}


# --------------------------------------------------------------------------------------------------
# to many digits
# --------------------------------------------------------------------------------------------------
FUNCTIONS = {
    "sqrt": mpmath.sqrt, "sin": mpmath.sin, "cos": mpmath.cos, "tan": mpmath.tan,
    "cot": mpmath.cot, "sec": mpmath.sec, "csc": mpmath.csc, "arcsin": mpmath.asin,
    "arccos": mpmath.acos, "arctan": mpmath.atan, "arccot": mpmath.acot, "arcsec": mpmath.asec,
    "arccsc": mpmath.acsc, "sinh": mpmath.sinh, "cosh": mpmath.cosh, "tanh": mpmath.tanh,
    "ln": mpmath.log, "log": mpmath.log10, "lg": mpmath.log10, "exp": mpmath.exp, "abs": abs,
    "floor": mpmath.floor, "ceil": mpmath.ceil, "max": max, "min": min, "binom": mpmath.binomial,
}
CONSTANTS = {"pi": mpmath.pi, "e": mpmath.e}


class Evaluation:
    """One computation of a tree at the current precision.

    point: the value of each variable. allow_complex: roots of negative numbers have a value.
    range: the largest |log2| of all numbers that came up, which says how many bits are at stake.
    """

    def __init__(self, point: dict[str, Fraction], allow_complex: bool):
        self.point, self.complex, self.range = point, allow_complex, 0

    def __call__(self, node: Node):
        value = self.compute(node)
        if isinstance(value, mpmath.mpc) and value.imag == 0:
            value = value.real
        if isinstance(value, mpmath.mpc) and not self.complex:
            raise NoValue("it is not real")
        size = abs(value)
        if not mpmath.isfinite(size):
            raise NoValue("it is not finite")
        if size:
            self.range = max(self.range, abs(mpmath.mag(size)))
        if self.range > MAX_RANGE:
            raise NoValue("it is too large")
        return value

    def compute(self, node: Node):
        op, args = node
        if op == "num":
            return mpmath.mpf(args[0].numerator) / args[0].denominator
        if op == "sym":
            return self.symbol(args[0])
        if op == "deg":
            return mpmath.pi / 180
        if op == "fn":
            return self.function(args[0], [self(arg) for arg in args[1:]])
        if op not in ("add", "mul", "neg", "div", "pow", "fact"):
            raise NoValue(op)
        values = [self(arg) for arg in args]
        if op == "add":
            return mpmath.fsum(values)
        if op == "mul":
            return mpmath.fprod(values)
        if op == "neg":
            return -values[0]
        if op == "div":
            return self.divide(*values)
        if op == "fact":
            return self.function("fact", values)
        return self.power(*values)

    def symbol(self, name: str):
        if name in CONSTANTS:
            return +CONSTANTS[name]
        if name == "i":
            return mpmath.mpc(0, 1)
        value = self.point[name]
        return mpmath.mpf(value.numerator) / value.denominator

    def divide(self, over, under):
        if abs(under) < mpmath.mpf(2) ** (8 - mpmath.mp.prec // 2):
            raise NoValue("a division by 0, or too close to one")
        return over / under

    def power(self, base, power):
        if not base:
            if isinstance(power, mpmath.mpc) or power <= 0:
                raise NoValue("a power of 0")
            return base
        if isinstance(power, mpmath.mpf) and abs(power) * abs(mpmath.mag(base)) > MAX_RANGE:
            raise NoValue("it is too large")
        negative = isinstance(base, mpmath.mpf) and base < 0 and not self.complex
        if negative and isinstance(power, mpmath.mpf) and not mpmath.isint(power):
            return odd_root(base, power)
        return mpmath.power(base, power)

    def function(self, name: str, values: list):
        if name == "fact":
            [value] = values
            if isinstance(value, mpmath.mpc) or not -50 < value <= 2100:
                raise NoValue("it is too large")
            return mpmath.gamma(value + 1)
        if name not in FUNCTIONS:
            raise NoValue(name)
        if name in ("exp", "sinh", "cosh", "binom", "floor", "ceil", "max", "min"):
            for value in values:
                if isinstance(value, mpmath.mpc) or abs(value) > MAX_RANGE:
                    raise NoValue("it is too large")
        if name in ("ln", "log", "lg") and not values[0]:
            raise NoValue("the logarithm of 0")
        return FUNCTIONS[name](*values)


def odd_root(base, power):
    """The real power of a negative number if the exponent is a fraction over an odd number."""
    for under in (3, 5, 7, 9, 11):
        over = round(power * under)
        if mpmath.almosteq(power * under, over):
            size = mpmath.power(-base, power)
            return -size if over % 2 else size
    raise NoValue("it is not real")


def evaluate(nodes: list[Node], point: dict, allow_complex: bool) -> tuple[list, int]:
    """The values of the trees, precise enough to be told apart; and the bits after the point that
    they share if they are equal. Raises NoValue if one has none."""
    with mpmath.workprec(DOUBT):
        rough = Evaluation(point, allow_complex)
        for node in nodes:
            rough(node)
    with mpmath.workprec(2 * DOUBT + 4 * rough.range):
        fine = Evaluation(point, allow_complex)
        values = [fine(node) for node in nodes]
    return values, DOUBT + 2 * rough.range


# --------------------------------------------------------------------------------------------------
# equality
# --------------------------------------------------------------------------------------------------
def symbols(node: Node) -> set[str]:
    """The names in a tree that stand for numbers, e and i among them."""
    if node.op == "sym":
        return {node.args[0]}
    found: set[str] = set()
    for arg in node.args:
        if isinstance(arg, Node):
            found |= symbols(arg)
    return found


# the points at which trees are compared: fractions and whole numbers of both signs
NUMERATORS = (3, -5, 7, -11, 13, 2, 5, 19, -2, 23, 4, 29)
DENOMINATORS = (7, 3, 2, 4, 11, 1, 1, 5, 1, 9, 1, 6)


def points(names: list[str]) -> Iterator[dict[str, Fraction]]:
    """Twelve values for each variable: fractions and whole numbers of both signs."""
    for i in range(len(NUMERATORS)):
        point = {}
        for j, name in enumerate(names):
            k = (i + 5 * j) % len(NUMERATORS)
            point[name] = Fraction(NUMERATORS[k] + (j // 12), DENOMINATORS[k])
        yield point


def equal(first: Node, second: Node) -> bool:
    """Whether two trees have the same value, wherever both have one.

    Rational numbers are compared as such. Others are computed to more bits than their terms differ
    in size, at least 256, so that 1 + 10^{-200} is not 1; with variables, at twelve points.

    >>> from common.verifiers.grammar import read
    >>> equal(read(r"\\sqrt{8}"), read(r"2\\sqrt2")), equal(read("1/2^{99}"), read("1/2^{98}"))
    (True, False)
    >>> equal(read("(x+1)^2"), read("x^2+2x+1")), equal(read(r"\\sqrt{x^2}"), read("x"))
    (True, False)
    """
    exacts = exact(first), exact(second)
    if None not in exacts:
        return exacts[0] == exacts[1]
    names = symbols(first) | symbols(second)
    variables = sorted(names - {"i", *CONSTANTS})
    if len(variables) > 26:
        return False
    needed = 3 if variables else 1
    for allow_complex in (False, True):
        if not allow_complex and "i" in names:
            continue
        agreed = 0
        for point in points(variables):
            try:
                (a, b), bits = evaluate([first, second], point, allow_complex)
            except (NoValue, ValueError, OverflowError, ZeroDivisionError, mpmath.mp.NoConvergence):
                if not variables:
                    break
                continue
            if abs(a - b) * mpmath.mpf(2) ** bits > 1:
                return False
            agreed += 1
            if not variables:
                break
        if agreed >= needed:
            return True
    return False


def signs(node: Node) -> list[Node]:
    """The trees that a tree with ± stands for; ∓ takes the other sign.

    >>> from common.verifiers.grammar import read
    >>> [str(exact(x)) for x in signs(read(r"1 \\pm 2"))]
    ['3', '-1']
    """
    if not has_signs(node):
        return [node]
    return [signed(node, 1), signed(node, -1)]


def has_signs(node: Node) -> bool:
    inner = [arg for arg in node.args if isinstance(arg, Node)]
    return node.op in ("pm", "mp") or any(map(has_signs, inner))


def signed(node: Node, sign: int) -> Node:
    """The tree with one sign for each ±."""
    args = tuple(signed(arg, sign) if isinstance(arg, Node) else arg for arg in node.args)
    if node.op not in ("pm", "mp"):
        return Node(node.op, args)
    minus = (sign < 0) == (node.op == "pm")
    return Node("neg", args) if minus else args[0]


# --------------------------------------------------------------------------------------------------
# rounded golds
# --------------------------------------------------------------------------------------------------
def rounded(gold: Node, answer: Node) -> bool:
    """A gold of three decimals or more may be rounded: an answer that no decimal can write, such as
    1/3 or a root, is right if it rounds to the gold. A decimal answer must be the gold exactly.

    >>> from common.verifiers.grammar import read
    >>> [rounded(read("0.333"), read(x)) for x in ("1/3", "0.3333", "1/4")]
    [True, False, False]
    """
    sign = 1
    if gold.op == "neg":
        sign, [gold] = -1, gold.args
    if gold.op != "num" or gold.args[1] < 3 or symbols(answer) - {*CONSTANTS}:
        return False
    value, places = sign * gold.args[0], gold.args[1]
    rational = exact(answer)
    if rational is not None:
        near = abs(rational - value) * 2 * 10**places <= 1
        return near and not is_decimal(rational)
    try:
        [found], _ = evaluate([answer], {}, allow_complex=False)
    except (NoValue, ValueError, OverflowError):
        return False
    distance = abs(found * value.denominator - value.numerator) / value.denominator
    return distance * 2 * 10**places <= 1


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
