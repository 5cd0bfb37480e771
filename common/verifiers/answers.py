"""Where the answer is in a response: the last box, block of tags or announcement."""
from __future__ import annotations

import re
from collections.abc import Iterator

MAX_ANSWER = 2000  # characters in which a mathematical answer is looked for: sympy takes its time


def last_block(text: str, opening: str, closing: str) -> str | None:
    """What is in the last closed pair of tags."""
    before, closed, _ = text.rpartition(closing)
    _, opened, block = before.rpartition(opening)
    if closed and opened:
        return block.strip()
    return None


def last_boxed(text: str) -> str | None:
    """What is in the last complete \\boxed{}.

    >>> last_boxed(r"\\boxed{1}, no, \\boxed{\\frac{1}{2}} and \\boxed{3")
    '\\\\frac{1}{2}'
    """
    found = None
    starts = []  # of the open braces; None for those that are not a box's
    for token in re.finditer(r"\\boxed\s*\{|\\.|[{}]", text, re.DOTALL):
        if token[0] == "{":
            starts.append(None)
        if token[0].startswith("\\boxed"):
            starts.append(token.end())
        if token[0] == "}" and starts:
            start = starts.pop()
            if start is not None:
                found = text[start : token.start()]
    return found


def after_hashes(text: str) -> str | None:
    """The line after the last ####, unless that is a heading; None if there is none.

    >>> after_hashes("so\\n#### 72"), after_hashes("#### Step 5\\nAdd.")
    ('72', None)
    """
    _, marked, rest = text.rpartition("####")
    if not marked or re.match(r"\s*[A-Za-z]|.*[A-Za-z]{3}.*\n\s*\S", rest):
        return None
    return rest.strip().partition("\n")[0]


def announcements(text: str) -> Iterator[str]:
    """What follows each "answer is", "answer:" or "answer =" and is an answer, the last first."""
    parts = re.split(r"(?i)\banswer\s*(?:is\b|:|=)", text[-MAX_ANSWER:])
    for part in reversed(parts[1:]):
        answer = announced(part)
        if answer:
            yield answer


FILLER = (
    r"(?:[\s:=,]|\b(?:is|the number|that|thus|therefore|now|actually|indeed|simply|exactly|only|"
    r"just|equal to)\b)*"
)
MARKUP = r"<<.*?>>|\*\*(?!\w)|(?<!\w)\*\*|[`\"“”]|\\(?=\$)"  # calculator notes, bold, quotes, \$
SUM = r"^[\d\s.,+*/×÷()-]+=(?=\s*\$?-?\d)"  # 4+24= before 28
CHOICE = r"\W*[\d.,/]+\W*(?:[\d.,/]+\W+)*(?:or|to)\b\W*\d"  # 5, 6 or 7
WORD = r"(?!sqrt|pi\b|log|ln\b|sin|cos|tan|exp)[A-Za-z]{2}"


def announced(part: str) -> str:
    """What follows "answer is" if it begins with an expression and is no choice of several;
    else "".

    >>> [announced(x) for x in (" **28**, which", " the sum of 5", " 5, 6 or 7", ": 4+24=28.")]
    ['28, which', '', '', '28.']
    """
    part = re.sub(MARKUP, "", part.replace("−", "-"))
    part = part[re.match(FILLER, part, re.I).end() :]
    part = re.sub(SUM, "", part).strip()
    if re.match(CHOICE, part) or re.match(WORD, part):
        return ""
    return part
