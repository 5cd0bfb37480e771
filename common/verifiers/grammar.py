"""From tokens to a tree: the grammar of final answers.

The whole text must fit; what is left over makes it unreadable. The levels, from the loosest:

    answer      items joined by "," ";" "and" "or", after a label such as (B)
    relation    x = 5, x > 3, 1 < x < 2, x in a set
    union       of sets
    quantity    a sum with its unit: 5 cm², $18, 40%, 18 dollars per day
    sum         + - ±
    product     * / and what stands side by side; 2 1/2 is a mixed number
    power       - ^ ! °
    atom        a number, a variable, a function, a fraction, a group, a set, a matrix
"""
from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

from common.verifiers.notation import FUNCTIONS, NUMBERS, Token, Unreadable, tokens
from common.verifiers.units import CHANGES, MULTIPLES, PARTS, UNITS, unit_of, value_in_words

LABELS = tuple("ABCDEFGHIJ")  # of options
MONEY_SIGNS = ("¤", "€", "£", "¥", "₹")
NAMING = ("=", "\\approx", "is", "are", "equals")
MAX_DEPTH = 40  # of brackets
MAX_WORDS = 12  # of counting
MAX_CHAIN = 9  # members of a = b = …


class Node(NamedTuple):
    """op and args: "num" (value, places) | "sym" (name,) | "add" "mul" (nodes …) | "div" "pow"
    "pm" "mp" "neg" "fact" (nodes …) | "fn" (name, nodes …) | "inf" () | "deg" () |
    "unit" (node, units) | "list" "set" "union" "ratio" (nodes …) |
    "tuple" (brackets, nodes …) | "rel" (signs, nodes …) | "matrix" (rows …) | "label" (letter,
    node) | "based" (digits, base) | "words" (words …)"""

    op: str
    args: tuple = ()


RELATIONS = {
    "=": "=", "is": "=", "are": "=", "equals": "=",
    "<": "<", "<=": "<=", "\\le": "<=",
    ">": ">", ">=": ">=", "\\ge": ">=",
    "!=": "!=", "\\ne": "!=",
    "\\approx": "~",
    "\\in": "in",
}
CLOSING = {
    "(": (")", "]"),
    "[": ("]", ")"),
    "{": ("}",),
    "\\{": ("\\}",),
    "\\langle": ("\\rangle",),
}
ENDS = set(", ; and or to ) ] } \\} | & \\ \\end \\rangle \\cup \\cap : ".split()) | set(RELATIONS)
FILLERS = ("option", "choice", "answer", "approximately", "approx", "exactly", "only", "just")
ANGLES = ("sin", "cos", "tan", "cot", "sec", "csc")  # sin A = 1/2 names the sine of A
OPERATORS = set("+ - * / ^ ! \\pm % \\begin".split())
OPENING = ("(", "|", "\\lfloor", "\\lceil", "\\infty")  # brackets that begin a factor
MATRICES = ("pmatrix", "bmatrix", "matrix", "Bmatrix", "smallmatrix", "array", "vmatrix")


def read(text: str) -> Node:
    """The tree of an answer. Raises Unreadable if the whole text is none.

    >>> [read(text).op for text in ("2 apples", "x = 5", "(1, 2)", "odd", r"\\frac12")]
    ['unit', 'rel', 'tuple', 'words', 'div']
    """
    found = tokens(text)
    if not found:
        raise Unreadable("nothing is there")
    if len(found) > 1 and found[-1].text == "." != found[-2].text:
        found.pop()
    words = as_words(found)
    if words:
        return words
    parser = Parser(found)
    node = parser.answer()
    if parser.now:
        raise Unreadable(f"{parser.now.text!r} is left over")
    return node


def as_words(found: list[Token]) -> Node | None:
    """A text of words alone; a number that is written in words is none."""
    kinds = {token.kind for token in found}
    words = tuple(token.text.lower() for token in found)
    if "word" not in kinds or not kinds <= {"word", "letter"}:
        return None
    if words[0] in NUMBERS or words[0] in FILLERS or "and" in words or "or" in words:
        return None
    return Node("words", tuple(word for word in words if word not in ("a", "an", "the")))


class Parser:
    """A recursive descent over tokens; each method reads one level and moves on."""

    def __init__(self, found: list[Token]):
        self.tokens, self.here, self.depth = found, 0, 0
        self.bars = 0  # absolute values that are open
        self.inside_function = 0

    @property
    def now(self) -> Token | None:
        """The token to be read."""
        return self.after(0)

    def after(self, count: int) -> Token | None:
        place = self.here + count
        return self.tokens[place] if place < len(self.tokens) else None

    def text(self, count: int = 0) -> str:
        """The text of the token to be read, or of one behind it; "" at the end."""
        token = self.after(count)
        return token.text if token else ""

    def at(self, *texts: str) -> bool:
        return self.now is not None and self.now.kind != "letter" and self.now.text in texts

    def take(self, *texts: str) -> Token:
        """Read one token, which must be one of `texts` if any are given."""
        token = self.now
        if token is None or (texts and not self.at(*texts)):
            raise Unreadable(f"{' or '.join(texts) or 'more'} is missing")
        self.here += 1
        return token

    # ---------------------------------------------------------------------------- lists, relations
    def answer(self) -> Node:
        while self.now and self.now.kind == "word" and self.now.text.lower() in FILLERS:
            self.take()
            if self.at(":"):
                self.take()
        end = self.here
        while end < len(self.tokens) and self.tokens[end].kind == "word":
            end += 1
        if end > self.here and end < len(self.tokens) - 1 and self.tokens[end].text == ":":
            self.here = end + 1  # Total cost: $5
        label = self.label()
        if label:
            rest = self.answer() if self.now else None
            return Node("label", (label, rest))
        return self.listed()

    def listed(self) -> Node:
        """Items; inequalities that "and" joins hold together."""
        start = self.here
        found = self.items()
        joints = {token.text for token in self.tokens[start : self.here]} & {"or", ",", ";"}
        together = len(found) > 1 and not joints and all(map(is_inequality, found))
        if together:
            return Node("both", tuple(found))
        return joined("list", found)

    def label(self) -> str:
        """The letter of an option before its content, as in (B) 12; "" if there is none."""
        first, second, third = map(self.text, range(3))
        rest = self.after(3)
        if first in LABELS and second in (")", ".") and self.now.kind == "letter":  # B) 12, B. 12
            self.here += 2
            return first
        ends = rest is None or rest.spaced or rest.kind == "number"
        if (first, third) == ("(", ")") and second in LABELS and ends:
            self.here += 3
            return second
        return ""

    def items(self) -> list[Node]:
        """Relations that commas or and/or join; the unit of the last one counts for all."""
        found = [self.relation()]
        while self.at(",", ";", "and", "or", "&"):
            while self.at(",", ";", "and", "or", "&"):
                self.take()
            if self.now is None and self.tokens[-1].text in (",", ";"):
                break
            found.append(self.relation())
        return found

    def relation(self) -> Node:
        first = self.name() or self.union()
        signs, members = [], [first]
        while self.now and self.now.text in RELATIONS:
            signs.append(RELATIONS[self.take().text])
            members.append(self.union())
        if not signs:
            return first
        if len(members) > MAX_CHAIN:
            raise Unreadable("too many equations")
        return Node("rel", (tuple(signs), *members))

    def name(self) -> Node | None:
        """What stands before "=" if it only names a quantity: Area, f(x), |AB|, the total cost."""
        end, depth = self.here, 0
        while end < len(self.tokens):
            text = self.tokens[end].text
            if depth == 0 and text in ENDS - {":", "|"}:
                break
            depth += (text in ("(", "{")) - (text in (")", "}"))
            end += 1
        part = self.tokens[self.here : end]
        named = end < len(self.tokens) and self.tokens[end].text in NAMING
        if not part or not named or not is_name(part):
            return None
        self.here = end
        return Node("sym", ("".join(token.text for token in part),))

    def union(self) -> Node:
        parts = [self.ratio()]
        while self.at("\\cup"):
            self.take()
            parts.append(self.ratio())
        return joined("union", parts)

    def ratio(self) -> Node:
        parts, op = [self.quantity()], "ratio"
        while self.at(":", "to"):
            op = {":": op, "to": "span"}[self.take().text]
            parts.append(self.quantity())
        return joined(op, parts)

    # ------------------------------------------------------------------------------------ numbers
    def quantity(self) -> Node:
        if self.at("\\approx"):
            self.take()
        negative = self.at("-") and self.text(1) in MONEY_SIGNS
        if negative:
            self.take()
        before = []
        while self.at(*MONEY_SIGNS, "USD", "Rs"):
            before.append(self.take().text)
            if self.at("."):
                self.take()
        node = self.sum()
        if negative:
            node = Node("neg", (node,))
        words = self.units()
        if not before and not words:
            return node
        return Node("unit", (node, tuple(unit_of([*before, *words]))))

    def units(self) -> list[str]:
        """The words of counting up to the end of the item."""
        words: list[str] = []
        while self.now and (self.text() not in ENDS or self.now.kind == "letter"):
            words += self.unit_words(self.take(), words)
        if len(words) > MAX_WORDS:
            raise Unreadable("too many words after a number")
        return words

    def unit_words(self, token: Token, words: list[str]) -> list[str]:
        """What a token after a number adds to the words that stand there already."""
        text = token.text
        if token.kind == "word" and text.lower() not in CHANGES | set(NUMBERS):
            return [text]
        if text in ("%", "°", "¢", *MONEY_SIGNS) and text not in words:
            return [text]
        if token.kind == "letter" and self.last(2) in ("°", "/"):
            return [text]
        if text == "(" and self.only_words():
            found = []
            while not self.at(")"):
                found.append(self.take().text)
            self.take(")")
            return found
        joins = words and self.now is not None and self.now.kind != "sign" and words[-1] != "%"
        if text == "^" and words:
            return [f"^{self.power_of_unit()}"]
        if text in ("/", "*", "-", ".", "'") and joins:
            return ["per"] if text == "/" else []
        raise Unreadable(f"{text!r} after a number")

    def last(self, count: int) -> str:
        place = self.here - count
        return self.tokens[place].text if place >= 0 else ""

    def only_words(self) -> bool:
        """Whether the brackets that have just opened hold words alone."""
        end = self.here
        while end < len(self.tokens) and self.tokens[end].kind in ("word", "letter"):
            end += 1
        inside = self.tokens[self.here : end]
        closed = end < len(self.tokens) and self.tokens[end].text == ")"
        known = [token.text in UNITS or token.kind == "word" for token in inside]
        changed = CHANGES.intersection(token.text.lower() for token in inside)
        return closed and bool(inside) and all(known) and not changed

    def power_of_unit(self) -> str:
        braced = self.at("{")
        if braced:
            self.take()
        sign = self.take().text if self.at("-") else ""
        power = self.take().text
        if braced:
            self.take("}")
        return sign + power

    def sum(self) -> Node:
        parts = [self.signed()]
        while self.at("+", "-", "\\pm", "\\mp"):
            sign = self.take().text
            part = self.product()
            if sign == "-":
                part = Node("neg", (part,))
            elif sign != "+":
                part = Node(sign[1:], (part,))
            parts.append(part)
        return joined("add", parts)

    def signed(self) -> Node:
        """A product after its sign."""
        if self.at("+"):
            self.take()
            return self.signed()
        if self.at("-", "minus", "negative", "Minus", "Negative"):
            self.take()
            return Node("neg", (self.signed(),))
        if self.at("\\pm", "\\mp"):
            return Node(self.take().text[1:], (self.product(),))
        return self.product()

    def product(self) -> Node:
        parts = [self.mixed() or self.power()]
        divided = False
        while self.now:
            if self.at("/") and not self.at_unit(1):
                self.take()
                parts = [Node("div", (joined("mul", parts), self.factor()))]
                divided = True
                continue
            part = self.another_factor(divided)
            if part is None:
                break
            parts.append(part)
        return joined("mul", parts)

    def another_factor(self, divided: bool) -> Node | None:
        """What a product is multiplied by next; None if it ends here. divided: behind a "/"."""
        if self.at("*"):
            self.take()
            return self.factor()
        if self.now.kind == "word" and self.text().lower() in MULTIPLES:
            return number(MULTIPLES[self.take().text.lower()])
        if not self.side_by_side():
            return None
        if divided and not self.now.spaced:
            raise Unreadable("1/2x is 1/(2x) or (1/2)x")
        return self.power()

    def factor(self) -> Node:
        if self.at("-"):
            self.take()
            return Node("neg", (self.factor(),))
        return self.mixed() or self.power()

    def at_unit(self, count: int) -> bool:
        """Whether a unit follows, as after 5 /s."""
        token = self.after(count)
        return token is not None and token.kind == "word" and token.text.lower() not in NUMBERS

    def side_by_side(self) -> bool:
        """Whether a factor follows that no sign joins."""
        token, before = self.now, self.tokens[self.here - 1]
        if token.kind == "number":
            return False  # 2 3, x2, (2)3
        if token.text == "{":
            return before.kind not in ("number", "sign")
        if token.kind in ("letter", "name"):
            return True
        return token.text in OPENING and self.opens()

    def opens(self) -> bool:
        """Whether the bracket is the beginning of a factor: not "|" that closes, not a note."""
        if self.at("|"):
            return self.bars == 0
        if self.at("(") and self.after(1) and self.after(1).kind == "word":
            return False
        return True

    def mixed(self) -> Node | None:
        """A whole number and a proper fraction side by side: 2 1/2 or 2\\frac{1}{2}."""
        whole, over, slash, under = map(self.after, range(4))
        if whole is None or whole.kind != "number" or not whole.text.isdigit() or over is None:
            return None
        if over.kind == "number" and over.spaced and slash is not None and slash.text == "/":
            if under is None or under.kind != "number":
                raise Unreadable("a number beside a number")
            self.here += 4
            return mixed_number(whole.value, over.value, under.value)
        if over.text == "frac":
            self.here += 1
            fraction = self.atom()
            top, bottom = fraction.args
            if top.op == bottom.op == "num":
                return mixed_number(whole.value, top.args[0], bottom.args[0])
            return Node("mul", (number(whole.value), fraction))
        return None

    # -------------------------------------------------------------------------------- powers, atoms
    def power(self) -> Node:
        base = self.atom()
        while self.at("!", "^") or self.at_degrees():
            sign = self.take().text
            if sign == "!":
                base = Node("fact", (base,))
            if sign == "^":
                base = Node("pow", (base, self.exponent()))
            if sign == "°" and self.inside_function:
                base = Node("mul", (base, Node("deg")))
        return base

    def at_degrees(self) -> bool:
        """Whether a ° belongs to the number: in sin 30°, and in a sum, whose last ° is its unit."""
        return self.at("°") and (self.inside_function > 0 or self.text(1) in ("+", "-"))

    def exponent(self) -> Node:
        if self.at("-"):
            self.take()
            return Node("neg", (self.exponent(),))
        if self.at("+"):
            self.take()
        base = self.atom()
        if self.at("^"):
            self.take()
            return Node("pow", (base, self.exponent()))
        return base

    def atom(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("too deep")
        node = self.one_atom()
        self.depth -= 1
        return node

    def one_atom(self) -> Node:
        token = self.take()
        if token.kind == "number":
            return Node("num", (token.value, token.places))
        if token.kind == "based":
            digits, _, base = token.text.partition("_")
            return Node("based", (digits.lstrip("0"), int(base)))
        if token.kind == "letter":
            return Node("sym", (token.text + self.subscript(),))
        if token.kind == "word":
            return self.number_in_words(token)
        if token.text == "infty":
            return Node("inf")
        if token.text in FUNCTIONS:
            return self.function(token)
        if token.kind == "name":
            return Node("sym", (token.text + self.subscript(),))
        return self.bracketed(token.text)

    def subscript(self) -> str:
        """The subscript and the primes of a variable, which are part of its name."""
        name = ""
        while self.at("'"):
            name += self.take().text
        if not self.at("_"):
            return name
        self.take()
        if not self.at("{"):
            return f"{name}_{self.take().text}"
        self.take("{")
        while not self.at("}"):
            name += self.take().text
        self.take("}")
        return f"_{name}"

    def number_in_words(self, token: Token) -> Node:
        """
        >>> [str(read(x).args[0]) for x in ("twenty-one", "two thousand one hundred", "two thirds")]
        ['21', '2100', '2/3']
        """
        if token.text.lower() not in NUMBERS:
            raise Unreadable(f"the word {token.text!r}")
        self.here -= 1
        following = [token.text.lower() for token in self.tokens[self.here :]]
        value, count = value_in_words(following)
        self.here += count
        dash = self.at("-")
        part = PARTS.get(self.text(dash).lower())
        if part is None:
            return number(value)
        self.here += 1 + dash
        return number(Fraction(value, part))

    def bracketed(self, opening: str) -> Node:
        if opening == "|":
            self.bars += 1
            node = self.sum()
            self.take("|")
            self.bars -= 1
            return Node("fn", ("abs", node))
        if opening in ("\\lfloor", "\\lceil"):
            node = self.sum()
            self.take(opening.replace("\\l", "\\r"))
            return Node("fn", (opening[2:], node))
        if opening == "\\emptyset":
            return Node("set")
        if opening == "\\begin":
            return self.matrix()
        if opening not in CLOSING:
            raise Unreadable(f"{opening!r} begins nothing")
        if opening == "\\{" and self.at("\\}"):
            self.take()
            return Node("set")
        if opening == "\\{" and self.text(1) in ("|", ":", "\\in"):
            return self.built_set()
        bars, self.bars = self.bars, 0
        inside = self.items()
        closing = self.take(*CLOSING[opening]).text
        self.bars = bars
        if opening == "\\{" or (opening == "{" and len(inside) > 1):
            return Node("set", tuple(inside))
        if len(inside) > 1:
            return Node("tuple", (opening[-1] + closing[-1], *inside))
        if closing not in (")", "]", "}") or (opening + closing) in ("(]", "[)"):
            raise Unreadable("brackets that do not fit")
        return inside[0]

    def built_set(self) -> Node:
        """{x | x > 3} and {x in R : x > 3} are their condition."""
        variable = self.take().text
        if self.at("\\in"):
            self.take()
            if self.take().text != "R":
                raise Unreadable("a set that is not of real numbers")
        self.take("|", ":")
        condition = self.listed()
        self.take("\\}")
        known = condition.op in ("rel", "both", "list")
        if not known or Node("sym", (variable,)) not in condition.args:
            raise Unreadable("a condition of another variable")
        return condition

    def matrix(self) -> Node:
        self.take("{")
        name = self.take().text
        self.take("}")
        if name == "cases":
            return self.cases()
        if name not in MATRICES:
            raise Unreadable(name)
        if name == "array":
            while not self.at("}"):
                self.take()
            self.take()
        rows, row = [], []
        while not self.at("\\end"):
            row.append(self.sum())
            if self.at("&"):
                self.take()
            elif self.at("\\"):
                self.take()
                rows.append(tuple(row))
                row = []
        if row:
            rows.append(tuple(row))
        for _ in range(4):
            self.take()
        if not rows or len(set(map(len, rows))) != 1 or name == "vmatrix":
            raise Unreadable("a table that is no matrix")
        return Node("matrix", tuple(rows))

    def cases(self) -> Node:
        """A system of equations, one a row."""
        rows = self.items()
        while self.at("\\"):
            self.take()
            if not self.at("\\end"):
                rows += self.items()
        for text in ("\\end", "{", "cases", "}"):
            self.take(text)
        if not all(row.op == "rel" for row in rows):
            raise Unreadable("cases that are no equations")
        return joined("list", rows)

    # ---------------------------------------------------------------------------------- functions
    def function(self, token: Token) -> Node:
        name = token.text
        if name in ("frac", "binom"):
            return self.two_arguments(name)
        root = base = power = None
        if name == "sqrt" and self.at("["):
            self.take()
            root = self.sum()
            self.take("]")
        if name == "log" and self.at("_"):
            self.take()
            base = self.atom()
        if self.at("^"):
            self.take()
            power = self.exponent()
        self.inside_function += 1
        arguments = self.arguments(name)
        self.inside_function -= 1
        if power == Node("neg", (number(1),)):
            name, power = f"arc{name}", None
            if name not in FUNCTIONS:
                raise Unreadable(name)
        node = Node("fn", (name, *arguments))
        if root is not None:
            inverse = Node("div", (number(1), root))
            node = Node("pow", (arguments[0], inverse))
        if base is not None:
            ln = Node("fn", ("ln", *arguments))
            node = Node("div", (ln, Node("fn", ("ln", base))))
        if power is not None:
            node = Node("pow", (node, power))
        return node

    def arguments(self, name: str) -> list[Node]:
        """What a function is applied to: a group, or the factors that follow it."""
        if self.at("(", "{", "["):
            group = self.atom()
            several = group.op == "tuple"
            if several != (name in ("max", "min", "gcd", "lcm", "binom")):
                raise Unreadable(f"the arguments of {name}")
            return list(group.args[1:]) if several else [group]
        token = self.now
        if name in ("max", "min", "gcd", "lcm", "exp") or token is None:
            raise Unreadable(f"{name} of nothing")
        if name == "sqrt":
            if token.kind == "number" and not token.spaced and len(token.text) > 1:
                raise Unreadable("\\sqrt12 is the root of 1 or of 12")
            return [self.atom()]
        parts = [self.factor()]
        while self.now and self.side_by_side() and self.now.text not in FUNCTIONS - {"sqrt"}:
            if self.at("("):
                break
            parts.append(self.power())
        return [joined("mul", parts)]

    def two_arguments(self, name: str) -> Node:
        """The arguments of \\frac, which may be digits without braces: \\frac12, \\frac9{19}."""
        token = self.now
        if token and token.kind == "number" and token.text.isdigit() and len(token.text) == 2:
            self.take()
            over, under = (number(int(digit)) for digit in token.text)
            if self.at("{"):
                raise Unreadable("\\frac12{3}")
        else:
            over, under = self.argument(), self.argument()
        if name == "frac":
            return Node("div", (over, under))
        return Node("fn", ("binom", over, under))

    def argument(self) -> Node:
        token = self.now
        if token and token.kind == "number" and len(token.text) > 1:
            raise Unreadable("several digits without braces")
        braced = self.at("{")
        node = self.atom()
        following = self.now
        if not braced and following and following.kind == "number" and not following.spaced:
            raise Unreadable("several digits without braces")
        return node


def is_inequality(node: Node) -> bool:
    return node.op == "rel" and "=" not in node.args[0]


def is_name(part: list[Token]) -> bool:
    """Whether tokens name a quantity: words, or one letter with what stands in brackets after it.

    >>> [is_name(tokens(x)) for x in ("Area", "f(x)", "x_1", "|AB|", "(x, y)", "2x", "x + z")]
    [True, True, True, True, True, False, False]
    """
    texts = [token.text for token in part]
    kinds = {token.kind for token in part}
    first, last = texts[0], texts[-1]
    if part[0].kind == "number" or OPERATORS.intersection(texts):
        return False
    if first in ANGLES:
        return kinds <= {"letter", "name"}
    if first in FUNCTIONS - {"frac"}:
        return False
    fraction = texts[:2] == ["frac", "{"] and part[2].kind != "number"
    called = len(part) > 3 and texts[1] == "(" and last == ")"
    pair = first == "(" and last == ")" and "," in texts
    bars = first == last == "|"
    subscript = "_" in texts[:2]
    single = len(part) == 1 and kinds <= {"letter", "name"}
    shape = fraction or called or pair or bars or subscript or single
    return shape or "word" in kinds or "\\angle" in texts or first == "\\overline"


def number(value: int | Fraction) -> Node:
    return Node("num", (Fraction(value), 0))


def mixed_number(whole: Fraction, over: Fraction, under: Fraction) -> Node:
    """Raises Unreadable if the fraction is not a proper one: 2\\frac{3}{2} may be a product."""
    if not 0 < over < under or over.denominator * under.denominator != 1:
        raise Unreadable("a number beside a fraction")
    return number(whole + over / under)


def joined(op: str, nodes: list[Node]) -> Node:
    """One node of several; a single one stays what it is."""
    return nodes[0] if len(nodes) == 1 else Node(op, tuple(nodes))
