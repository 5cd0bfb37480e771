"""From the text of an answer to tokens: one notation for the many that people and models write.

`plain` brings Unicode and LaTeX to one form, `tokens` cuts it into numbers, letters, names, words
and signs. Both are pure functions and know nothing about the right answer.
"""
from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

from common.verifiers.units import LETTERS, MULTIPLES, NUMBERS, SHORT, UNITS

MAX_EXPONENT = 10_000  # of 1e5: a larger one is not read
MAX_TOKENS = 1_000


class Unreadable(ValueError):
    """A text that is no expression of the notation that is known here."""


class Token(NamedTuple):
    kind: str  # "number" | "letter" | "name" | "word" | "sign"
    text: str
    spaced: bool = False  # a space stands before it
    value: Fraction | None = None  # of a number
    places: int = 0  # of a decimal that ends: digits after the point


# --------------------------------------------------------------------------------------------------
# one form for the characters
# --------------------------------------------------------------------------------------------------
LOOKS_LIKE = {  # what a character becomes → the characters
    "-": "−﹣－‐‑",
    "*": "×·⋅∙∗",
    "/": "÷∕⁄",
    ":": "∶",
    ",": "、",
    "'": "’′",
    "°": "º˚",
    " \\emdash ": "—―",
    "\\le ": "≤⩽",
    "\\ge ": "≥⩾",
    "\\ne ": "≠",
    "\\approx ": "≈",
    "\\pm ": "±",
    "\\mp ": "∓",
    "\\infty ": "∞",
    "\\cup ": "∪",
    "\\in ": "∈",
    "\\emptyset ": "∅ø",
    "\\langle ": "⟨",
    "\\rangle ": "⟩",
    "\\lfloor ": "⌊",
    "\\rfloor ": "⌋",
    "\\lceil ": "⌈",
    "\\rceil ": "⌉",
    "\\sqrt[3]": "∛",
    "...": "…",
    "": "\u200b\u2060\ufeff\u00ad\u200e\ufe0f\u20e3✅✓✔🎉🎯😊😀😃😄🙂👍💯✨🚀",
}
GREEK = dict(zip("αβγδεθλμπρστφω", (
    "alpha beta gamma delta epsilon theta lambda mu pi rho sigma tau phi omega").split()))
CHARACTERS = {character: new for new, characters in LOOKS_LIKE.items() for character in characters}
CHARACTERS |= {letter: f"\\{name} " for letter, name in GREEK.items()}
UNICODE = str.maketrans(CHARACTERS)
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")

REALS = r"\\mathbb\s*\{?\s*R\s*\}?|ℝ|(?:\\text\s*\{)?\s*(?:[Aa]ll )?real numbers\s*\}?"
REPLACEMENTS = [  # (pattern, what it becomes), in this order
    (r"\{\s*:\s*\}", ":"),  # 2{:}45
    (r"<<.*?>>", ""),  # GSM8K's calculator notes
    (rf"^\s*\$?\s*(?:[a-z]\s*\\in\s*)?(?:{REALS})\s*\$?\.?\s*$", r"(-\\infty, \\infty)"),
    (r"o'clock", "oclock"),
    (r"\\(?:checkmark|blacksquare|qed)\b", ""),
    (r"(?<=\d)\s*–\s*(?=\$?\d)", " to "),  # 3–5 is a range
    (r"–", "-"),
    (r"√\s*(\d+(?:\.\d+)?)", r"\\sqrt{\1}"),  # √12 is the root of 12; \sqrt12 is not clear
    (r"√", r"\\sqrt "),
    (r"\\(?:[dtcs]|nice)frac(?![A-Za-z])", r"\\frac"),
    (r"\{([^{}]*)\\over(?![A-Za-z])([^{}]*)\}", r"\\frac{\1}{\2}"),
    (r"\{([^{}]*)\\choose(?![A-Za-z])([^{}]*)\}", r"\\binom{\1}{\2}"),
    (r"(?<=\d)\s*\^\s*(?:o(?!\w)|\{\s*o\s*\})", "°"),
    (r"\\[dt]binom(?![A-Za-z])", r"\\binom"),
    (r"\\(?:left|right)\s*\.", ""),
    (r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|limits)(?![A-Za-z])", ""),
    (r"\\(?:boldsymbol|mathbf|bm|ensuremath|boxed|fbox|underline|mathit)\s*(?=\{)", ""),
    (r"\\(?:text)?color\s*\{\w+\}", ""),
    (r"\\(?:bf|rm|it|tiny|small|large|Large|LARGE|huge|Huge|normalsize)(?![A-Za-z])", ""),
    (r"(?<!\\)\\!\s*", ""),
    (r"(?<!\\)\\(?:[,;: ]|q?quad(?![A-Za-z])|hspace\{[^{}]*\})|~", " "),
    (r"(?<=\d)\s*\{\s*,\s*\}\s*(?=\d{3}(?!\d))", ","),  # 1{,}234
    (r"(?<=\d)\s*\{\s*,\s*\}\s*(?=\d)", "."),  # 3{,}5, a decimal comma
    (r"\^\s*(?:\\circ(?![A-Za-z])|\{\s*\\circ\s*\})|\\degree(?![A-Za-z])", "°"),
    (r"\\\\\s*\[[^\[\]]*\]", r"\\\\ "),  # the space between rows: \\\\[2pt]
    (r"(?<!\\)\\[()\[\]]", " "),  # the borders of formulas
    (r"\\\$", " ¤"),
    (r"(?<!\\)\$", " "),
    (r"\\%", "%"),
    (r"\*\*", "^"),
    (r"(?<=\d)\s*[xX]\s*(?=10\s*\^)", "*"),  # 2 x 10^3
    (r"\b([ap])\.\s?m\b\.?", r"\1m"),
    (r"\\text\s*\{\s*(?:in )?base\s*(\d*)\s*\}", r" base \1"),
    (r"(?<=\d)\s*_?\s*\{?\s*\(?(?:in )?base[ -]*(\d+)\)?\}?", r"_{\1}"),
    (r"_\{\((\d+)\)\}", r"_{\1}"),
    (r"[\u00a0\u2000-\u200a\u202f\u3000]", " "),
    (r",?\s*\\text\s*\{\s*,?\s*for (?:all|every|any)(?: real)?\s*\}\s*[a-z]\.?\s*$", ""),
    (r",?\s+for (?:all|every|any)(?: real)? [a-z]\.?\s*$", ""),
]
TABLE = [(re.compile(pattern, re.DOTALL), new) for pattern, new in REPLACEMENTS]


def plain(text: str) -> str:
    """The text with one form for each sign, and without styling and the borders of formulas.

    >>> plain("− 1{,}000"), plain(r"\\left(2½,\\, x²\\right)"), plain("√12 – x°")
    ('- 1,000', '(2\\\\frac{1}{2},  x^{2})', '\\\\sqrt{12} - x°')
    """
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", raised, text)
    text = re.sub("[₀₁₂₃₄₅₆₇₈₉]+", lowered, text)
    text = re.sub("[¼½¾⅐-⅞]", vulgar, text)
    if text.count("$") == text.count("\\$") + 1:
        text = text.replace("$", "\\$").replace("\\\\$", "\\$")  # no formula has one border
    text = unicodedata.normalize("NFKC", text.translate(UNICODE)).translate(UNICODE)
    for pattern, new in TABLE:
        text = pattern.sub(new, text)
    return text.strip()


def raised(match: re.Match) -> str:
    return "^{" + match[0].translate(SUPERSCRIPTS) + "}"


def lowered(match: re.Match) -> str:
    return "_{" + match[0].translate(SUBSCRIPTS) + "}"


def vulgar(match: re.Match) -> str:
    """
    >>> vulgar(re.match(".", "¾"))
    '\\\\frac{3}{4}'
    """
    over, _, under = unicodedata.normalize("NFKC", match[0]).partition("⁄")
    return f"\\frac{{{over}}}{{{under}}}"


STYLED = r"\\(?:text\w*|math\w+|mbox|operatorname)\s*\{[^{}]*\}|\\[A-Za-z]+"
RUN = re.compile(rf"{STYLED}|(?P<under>/ *)?(?<![A-Za-z])(?P<run>[A-Za-z]{{2,3}})(?![A-Za-z])")


def spelled(text: str) -> str:
    """The text with runs of two or three letters as products of variables: RC, mg, kT. Behind a
    "/" the whole run divides; with a power or a factor after it that would be unclear.

    >>> spelled("e^{-t/RC} mod 2"), spelled("kT/ab^2"), spelled(r"GMm \\mathrm{kg}")
    ('e^{-t/(R C)} mod 2', 'k T/ab^2', 'G M m \\\\mathrm{kg}')
    """
    kept = SHORT | FUNCTIONS | SYMBOLS | set(NUMBERS) | {"mod"}

    def apart(match: re.Match) -> str:
        run = match["run"]
        if not run or {run, run.lower()} & kept:
            return match[0]
        if not match["under"]:
            return " ".join(run)
        unclear = re.match(r"\s*[\w^(\\]", text[match.end() :])
        return match[0] if unclear else f"/({' '.join(run)})"

    return RUN.sub(apart, text)


# --------------------------------------------------------------------------------------------------
# tokens
# --------------------------------------------------------------------------------------------------
FUNCTIONS = set(
    "sqrt sin cos tan cot sec csc arcsin arccos arctan arccot arcsec arccsc sinh cosh tanh ln log "
    "lg exp min max gcd lcm binom frac abs floor ceil".split()
)
SYMBOLS = set(
    "pi infty alpha beta gamma delta epsilon zeta eta theta kappa lambda mu nu xi rho sigma tau "
    "phi chi psi omega varphi varepsilon Gamma Delta Theta Lambda Sigma Phi Psi Omega ell".split()
)
ALIASES = {  # the name here → its other names
    "le": "leq leqslant",
    "ge": "geq geqslant",
    "ne": "neq",
    "<": "lt",
    ">": "gt",
    "=": "iff",
    "*": "times cdot ast",
    "/": "div",
    ":": "colon",
    "[": "lbrack",
    "]": "rbrack",
    "{": "lbrace",
    "}": "rbrace",
    "|": "lvert rvert vert mid",
    "...": "dots ldots cdots",
    "approx": "approxeq simeq sim",
    "and": "land wedge",
    "or": "lor vee",
    "emptyset": "varnothing",
    "infty": "infinity inf oo",
    "arcsin": "asin",
    "arccos": "acos",
    "arctan": "atan",
    "csc": "cosec",
    "i": "imath",
}
SAME_NAME = {other: name for name, others in ALIASES.items() for other in others.split()}
TEXTS = set(  # commands that set text or letters upright
    "text textbf textit textrm textsf texttt textnormal mathrm mathsf mathbb mathcal mbox emph "
    "operatorname Pr".split()
)

GROUPED = r"\d{1,3}(?:,\d{3})+(?!\d)|\d{1,2}(?:,\d{2})+,\d{3}(?!\d)"  # 1,234 | 1,00,000
MIXED = r"\d+ [1-9]\d\d\s*/\s*\d"  # 2 201/500 is 2 and 201/500
THIN = r"[1-9]\d{0,2}(?: \d{3})+(?!\d)"  # 1 000 000
SPACED = rf"(?!{MIXED}){THIN}|\d{{1,3}}(?:'\d{{3}})+(?!\d)"  # or 1'000
BARRED = r"\\(?:overline|bar)\s*(?:\{\d+\}|\d)"  # 0.1\overline{6}
DOTTED = r"\\dot\s*[\d{}]+(?:\\dot\s*[\d{}]+)?"  # 0.\dot{1}4285\dot{7}
BLOCK = rf"{BARRED}|{DOTTED}|\(\d+\)"  # 0.1(6)
ELLIPSIS = r"\s?(?:\.{3}|\\[lc]?dots(?![A-Za-z]))"  # 0.333...
DECIMALS = rf"\.(?P<digits>\d*)(?:(?P<block>{BLOCK})|(?P<ellipsis>{ELLIPSIS}))?"
EXPONENT = r"[eE](?P<exponent>[+-]?\d+)(?![\d.])"
TAIL = rf"(?:{DECIMALS})?(?:{EXPONENT})?"
NUMBER = re.compile(rf"(?P<whole>{GROUPED}|{SPACED}|\d+|(?=\.\d|\.\\(?:overline|bar|dot))){TAIL}")
LISTED = re.compile(rf"(?P<whole>{SPACED}|\d+|(?=\.\d)){TAIL}")  # (1,200) is a pair
NAMED_BASE = r"\{?(?:\\text)?\s*\{?(\d+|[a-z]{3,8})\}*"
BASED = re.compile(rf"\(?([0-9A-F]+)\)?\s*_\s*{NAMED_BASE}")  # 52_8
OTHER = re.compile(r"\\\\|\\[A-Za-z]+|\\.|[A-Za-z]+|<=|>=|!=|\S", re.DOTALL)


def tokens(text: str) -> list[Token]:
    """The tokens of an expression. Raises Unreadable if there are too many.

    >>> [t.text for t in tokens(r"2x^2 \\text{ apples}, 1,000 cm")]
    ['2', 'x', '^', '2', 'apples', ',', '1,000', 'cm']
    """
    out: list[Token] = []
    scan(plain(text), out, upright=False)
    return out


def scan(text: str, out: list[Token], upright: bool) -> None:
    """Append the tokens of `text`. upright: it stands in \\text{}, so letters are words."""
    here = depth = 0
    while here < len(text):
        start = here + len(text[here:]) - len(text[here:].lstrip())
        spaced, here = start > here, start
        if len(out) > MAX_TOKENS:
            raise Unreadable("too long")
        listed = depth > 0 and ", " not in text
        based = BASED.match(text, here)
        number = (LISTED if listed else NUMBER).match(text, here)
        match = OTHER.match(text, here)
        if match is None:
            return
        found, end = match[0], match.end()
        if based and base_of(based):
            out.append(Token("based", f"{based[1]}_{base_of(based)}", spaced))
            here = based.end()
        elif number:
            out.append(as_number(number, spaced))
            here = number.end()
        elif found[0] == "\\":
            here = command(found[1:], text, end, out, spaced)
        else:
            letters(found, out, spaced, upright, text[end:])
            here = end
        depth += (found in ("(", "[", "\\{")) - (found in (")", "]", "\\}"))


def base_of(match: re.Match) -> int:
    """The base of a number such as 52_8, or 0 if its subscript is none.

    >>> [base_of(BASED.match(x)) for x in ("52_8", "1A_{16}", "29_8", r"101_{\\text{two}}")]
    [8, 16, 0, 2]
    """
    digits, name = match.groups()
    base = NUMBERS.get(name, 0)
    if name.isdigit() and len(name) <= 2:
        base = int(name)
    numeral = digits[0].isdigit() or (len(digits) > 1 and base == 16)
    if numeral and 2 <= base <= 36 and max(int(digit, 36) for digit in digits) < base:
        return base
    return 0


def as_number(match: re.Match, spaced: bool) -> Token:
    """The token of a number, with its exact value. Raises Unreadable if it is far too large.

    >>> [str(as_number(NUMBER.match(x), False).value) for x in ("0.1(6)", "0.333...", "2.5e-1")]
    ['1/6', '1/3', '1/4']
    """
    whole = re.sub(r"\D", "", match["whole"] or "0")
    digits, block = match["digits"] or "", re.sub(r"\D", "", match["block"] or "")
    value = Fraction(int(whole + digits), 10 ** len(digits))
    if match["ellipsis"]:
        block = recurring(digits)
        if not block:
            raise Unreadable("a decimal that is cut off")
    if block:
        value += Fraction(int(block), (10 ** len(block) - 1) * 10 ** len(digits))
    exponent = match["exponent"] or "0"
    if len(exponent) > 6 or abs(int(exponent)) > MAX_EXPONENT:
        raise Unreadable("an exponent that is too large")
    value *= Fraction(10) ** int(exponent)
    places = 0 if block else len(digits)
    return Token("number", match[0], spaced, value, places)


def recurring(digits: str) -> str:
    """The block that the digits before "..." repeat, or "".

    >>> [recurring(x) for x in ("333", "166", "1212", "1415", "0588235588235")]
    ['3', '6', '12', '', '588235']
    """
    best, longest = "", 0
    for size in range(1, len(digits) // 2 + 1):
        same = 0  # digits at the end that equal the one a block before them
        while same + size < len(digits) and digits[-1 - same] == digits[-1 - same - size]:
            same += 1
        if same >= size and same + size > longest:
            best, longest = digits[-size:], same + size
    return best


def command(name: str, text: str, here: int, out: list[Token], spaced: bool) -> int:
    """Append the tokens of a LaTeX command that ends at `here`; → where the next token begins."""
    if name in TEXTS and not re.compile(r"\s*\{").match(text, here):
        return here  # it styles the next letter
    if name in TEXTS:
        inside, here = group(text, here)
        word = inside.strip().replace("\\", "")
        if word in FUNCTIONS or word in SAME_NAME:
            command(word, "", 0, out, spaced)
        elif word in ("e", "i"):
            out.append(Token("letter", word, spaced))
        else:
            scan(inside, out, upright=True)
        return here
    name = SAME_NAME.get(name, name)
    kind = "sign"
    if name in FUNCTIONS or name in SYMBOLS:
        kind = "name"
    if name in ("and", "or"):
        kind = "word"
    if len(name) == 1 and name.isalpha():
        kind = "letter"
    if kind == "sign" and (name.isalpha() or name in ("{", "}")):
        name = f"\\{name}"
    out.append(Token(kind, name, spaced))
    return here


def group(text: str, here: int) -> tuple[str, int]:
    """What the braces that open at `here` hold, and where the text goes on.

    >>> group(r"{a{b}} c", 0)
    ('a{b}', 6)
    """
    opened = re.compile(r"\s*\{").match(text, here)
    if not opened:
        raise Unreadable("a command without its braces")
    depth = 1
    for end in range(opened.end(), len(text)):
        depth += (text[end] == "{") - (text[end] == "}")
        if depth == 0:
            return text[opened.end() : end], end + 1
    raise Unreadable("braces that do not close")


JOINING = ("and", "or", "to", "is", "are", "equals")
GLUED = re.compile(r"(sin|cos|tan|ln|pi)([a-z])")  # sinx, pir
AT_END = re.compile(r"\s*(?:$|[,;.)}/^]|per\b|\\)")  # what may follow a unit


def letters(run: str, out: list[Token], spaced: bool, upright: bool, rest: str) -> None:
    """Append a sign, or a run of letters as a word, a name or a product of variables."""
    if not run[0].isalpha():
        out.append(Token("sign", run, spaced))
        return
    before = out[-1] if out else Token("sign", "")
    counted = before.kind in ("number", "word", "based") and before.text not in JOINING
    counted = counted or before.text in ("/", "°", "¤")
    counted = counted or (upright and before.text in ("}", ")"))
    kind = kind_of(run, counted, spaced, upright, rest)
    if kind != "product":
        out.append(Token(kind, SAME_NAME.get(run, run), spaced))
        return
    glued = GLUED.fullmatch(run)
    if glued:
        out += [Token("name", glued[1], spaced), Token("letter", glued[2])]
        return
    for i, letter in enumerate(run):
        out.append(Token("letter", letter, spaced and i == 0))


def kind_of(run: str, counted: bool, spaced: bool, upright: bool, rest: str) -> str:
    """What a run of letters is: "word" | "letter" | "name" | "product". counted: it follows a
    number, so a unit may stand here; rest: the text behind it."""
    name = SAME_NAME.get(run, run)
    if len(run) == 1:
        unit = run in LETTERS and counted and (upright or (spaced and AT_END.match(rest)))
        return "word" if unit else "letter"
    if run in UNITS and counted:
        return "word"
    if name in FUNCTIONS or name in SYMBOLS:
        return "name"
    if GLUED.fullmatch(run) and run not in SHORT and not (counted and spaced):
        return "product"
    return "word" if upright or is_word(run) else "product"


def is_word(run: str) -> bool:
    """Whether a run of two letters or more is a word rather than a product of variables.

    >>> [is_word(run) for run in ("apples", "xy", "abc", "AB", "Amy", "men", "no")]
    [True, False, False, True, True, True, True]
    """
    known = any(run in table for table in (SHORT, UNITS, NUMBERS, MULTIPLES))
    return len(run) >= 4 or known or run != run.lower()
