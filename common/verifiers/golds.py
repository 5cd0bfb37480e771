"""Reference answers in one form: what people see at start, and what the teacher is shown."""
from __future__ import annotations

import json
import re
from decimal import Decimal

from common.verifiers.answers import last_boxed

NUMBER = r"-?(?:\d[\d,]*)?\.?\d+"
WORDS = r"[A-Za-z][A-Za-z .'/%-]*"
WITH_UNIT = re.compile(rf"({NUMBER}(?:\s*/\s*\d+)?)\s*\({WORDS}\)")  # 61 (cookies)
SCIENTIFIC = re.compile(r"(-?\d+(?:\.\d+)?)[eE]([+-]?\d{1,4})")  # 2.75e11
SPACED = re.compile(r"-?\d{1,3}(?: \d{3})+")  # 1 000 000
MIXED = re.compile(r"(-?\d+) (\d+)/(\d+)")  # 2 1/2
SHORT = 9  # powers of ten up to which a number is written out


def normal_gold(text: str) -> str:
    r"""A reference answer without its box, the borders of a formula and a unit in brackets, with
    numbers as mathematics writes them. A list of one is its element, one of several a set.

    >>> [normal_gold(x) for x in ('["1", "2"]', "61 (cookies)", r"$\boxed{7}$", "27.0")]
    ['1, 2', '61', '7', '27']
    >>> [normal_gold(x) for x in ("2.75e11", "1e-07", "1 000 000", "2 1/2", "-13x+3")]
    ['2.75 \\times 10^{11}', '0.0000001', '1000000', '2\\frac{1}{2}', '-13x+3']
    """
    text = ", ".join(parts_of(text)).strip()
    formula = text.strip("$ ")
    if "$" not in formula and text.startswith("$") and text.endswith("$"):
        text = formula
    boxed = last_boxed(text)
    if boxed and re.fullmatch(r"\s*\\boxed\s*\{.*\}\s*\.?", text, re.DOTALL):
        text = boxed.strip()
    with_unit = WITH_UNIT.fullmatch(text)
    if with_unit:
        text = with_unit[1]
    scientific = SCIENTIFIC.fullmatch(text)
    if scientific:
        return written_out(scientific[1], int(scientific[2]))
    if SPACED.fullmatch(text):
        return text.replace(" ", "")
    if re.fullmatch(r"-?\d+\.0", text):
        return text[:-2]
    return MIXED.sub(r"\1\\frac{\2}{\3}", text) if MIXED.fullmatch(text) else text


def parts_of(text: str) -> list[str]:
    """The elements of a JSON list of texts; of any other text, the text itself."""
    if not re.fullmatch(r'\s*\[\s*".*"\s*\]\s*', text, re.DOTALL):
        return [text]
    try:
        found = json.loads(text)
    except ValueError:
        return [text]
    if not all(isinstance(part, str) for part in found):
        return [text]
    return found


def written_out(digits: str, power: int) -> str:
    """digits · 10^power, with its zeros if they are few.

    >>> written_out("1.5", 3), written_out("2.75", 11)
    ('1500', '2.75 \\\\times 10^{11}')
    """
    if abs(power) <= SHORT:
        return f"{Decimal(f'{digits}e{power}'):f}"
    return f"{digits} \\times 10^{{{power}}}"
