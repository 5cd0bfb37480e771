"""Where the answer is in a response: the last box, block of tags, program or marked answer."""
from __future__ import annotations

import re
from typing import NamedTuple

MAX_ANSWER = 2000  # characters of a mathematical answer; a longer one is not read


def last_block(text: str, opening: str, closing: str) -> str | None:
    """What is in the last closed pair of tags."""
    before, closed, _ = text.rpartition(closing)
    _, opened, block = before.rpartition(opening)
    if closed and opened:
        return block.strip()
    return None


def last_program(text: str) -> str | None:
    """What is in the last closed block of code.

    >>> last_program("```python\\nprint(1)\\n``` and ```")
    'print(1)\\n'
    """
    blocks = text.split("```")[1:-1:2]
    if not blocks:
        return None
    return re.sub(r"\A[\w+-]*[ \t]*\n", "", blocks[-1])  # without the language


# --------------------------------------------------------------------------------------------------
# mathematics
# --------------------------------------------------------------------------------------------------
def final_answer(text: str) -> str | None:
    """The mathematical answer of a response, as text; None if it gives none.

    It is what the last box holds, together with the boxes that "and" or a comma joins to it; without
    a box, what follows the last mark: ####, "answer is", "Answer:", a heading "Final answer". A last
    box that is not closed holds none.

    >>> final_answer(r"\\boxed{1}, no: \\boxed{2} and \\boxed{3}"), final_answer(r"\\boxed{1} \\boxed{2")
    ('2, 3', None)
    >>> final_answer("**Answer**: 18 eggs, as 9 * 2 = 18."), final_answer("So she has 18")
    ('18 eggs', None)
    """
    if BOX.search(text):
        return boxed_answer(text)
    return marked_answer(text)


def last_boxed(text: str) -> str | None:
    """What is in the last box; None if there is none or it is not closed.

    >>> last_boxed(r"\\boxed{1}, no, \\boxed{\\frac{1}{2}}"), last_boxed(r"\\boxed{1} \\boxed{3")
    ('\\\\frac{1}{2}', None)
    """
    found = boxes(text)
    return found[-1].content if found else None


class Box(NamedTuple):
    start: int  # where \\boxed begins
    end: int  # behind the closing brace
    content: str


BOX = re.compile(r"(?<!\\)(?:\\\\)*\\(?:boxed|fbox)(?![A-Za-z])\s*(?=(\{)|(-?[\d.,]+|[A-Z])(?![\w^{\\]))")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def boxes(text: str) -> list[Box]:
    """The boxes that stand in no other box, in order; [] if the last one is not closed.

    >>> [box.content for box in boxes(r"\\boxed{\\boxed{3}} \\boxed{\\{1\\}} \\boxed 5.")]
    ['\\\\boxed{3}', '\\\\{1\\\\}', '5']
    """
    found: list[Box] = []
    for opening in BOX.finditer(text):
        if found and opening.start() < found[-1].end:
            continue
        start, end = opening.end(), -1
        if opening[2]:
            bare = opening[2].rstrip(".,")
            found.append(Box(opening.start(), start + len(bare), bare))
            continue
        depth = 0
        for brace in BRACE.finditer(text, start):
            depth += (brace[0] == "{") - (brace[0] == "}")
            if depth == 0:
                end = brace.end()
                break
        if end < 0:
            return []
        found.append(Box(opening.start(), end, text[start + 1 : end - 1]))
    return found


JOINT = re.compile(r"(?:\s|[$,;&]|\\[()\[\],;:! ]|\\q?quad|\*\*|\band\b|\bor\b|\\text|[{}])*")
NAMED = re.compile(r"[^.\n]{0,40}(?:,|;|&|\band\b|\bor\b)[^.\n]{0,40}")  # "and y ="
TURN = re.compile(r"(?i)\b(?:so|thus|hence|then|therefore|but|no|not|wait|actually|instead|which|"
                  r"because|since|means?|gives?|now|first|simplif\w*|rewrit\w*)\b|[⇒→]|\\to|\\R?implies")


def boxed_answer(text: str) -> str | None:
    """The last box with those that are joined to it; None if the formula goes on beside it."""
    found = boxes(text)
    if not found:
        return None
    parts = [found[-1]]
    for box in reversed(found[:-1]):
        between = text[box.end : parts[0].start]
        named = NAMED.fullmatch(between) and not TURN.search(between)
        if not JOINT.fullmatch(between) and not named:
            break
        parts.insert(0, box)
    if len(parts) > 1 and len({part.content for part in parts}) == 1:
        parts = parts[:1]
    goes_on = GOES_ON.match(text, found[-1].end) or BEGUN.search(text[: parts[0].start])
    if goes_on or any(not part.content.strip() for part in parts):
        return None
    answers = [part.content.strip() for part in parts]
    choice = CHOICE.match(text, found[-1].end)
    if choice:
        answers.append(clause(text[choice.end() :]) or "?")
    return ", ".join(answers)


AFTER = r"\s?(?:\^|/\s*[\d\\]|\\(?:sqrt|frac|pi|times|cdot|pm)(?![a-z])|[-+*]\s?[\d\\])|[A-Za-z](?![A-Za-z])"
GOES_ON = re.compile(AFTER)
WITHIN = r"\\[dt]?(?:frac|sqrt)\s*\{|\}\{|\^\{?|(?<=[$= ])\d\{?"  # the box is a part of a term
BEFORE = r"[$=(\d]\s*[-+]|[\d)}]\s*(?:\\cdot|\\times|\*|/)\{?|[\w)}]\s*(?:[<>≤≥≠]|\\(?:l|g|n)eq?(?:slant)?)\s*"
BEGUN = re.compile(rf"(?:{WITHIN}|{BEFORE})\Z")
CHOICE = re.compile(r"(?:\s|[$*]|\\[)\]])*\bor\b(?=\s*(?:[\d$\\-]))")


# --------------------------------------------------------------------------------------------------
# marked answers
# --------------------------------------------------------------------------------------------------
BOLD = r"(?:[*_]{1,3})?"
TO_WHAT = r"(?:\s+(?:to|for|of)\s+(?:the|this|your|our)\s+(?:\w+\s+)?(?:problem|question|exercise))?"
IS = r"(?:is|was|equals|would be|will be|must be|should be|comes out to|comes to)"
MARK = re.compile(
    rf"(?i)(?P<hashes>^\s*####|(?<=[\s.])####)|"
    rf"(?<![A-Za-z])answer{TO_WHAT}\s*{BOLD}\s*(?:{IS}\b|:|=|≈)|\bans(?:\.|:|=)|"
    rf"^\W*answer\s*(?=\$|\\[\[(])|^[#*_\s>]*(?:my |the )?final answer[\s*_:.]*$|^(?:#+\s*|\*\*\s*)answer[\s*_:.]*$",
    re.MULTILINE,
)
NO_MARK = re.compile(r"(?i)\b(?:wrong|incorrect|first|initial|previous|earlier|other|naive|common|tempting|"
                     r"whether|if|that an?|intermediate|partial|rough)\s+(?:final )?$")
REMARK = re.compile(r"(?i)[\s*_]*(?:also |indeed |now |thus )?(?:correct|right|reasonable|plausible|helpful|verified|confirmed|"
                    r"consistent|valid|clear|complete|checked|above|below|boxed|found|in (?:the )?(?:dollars|units))\b")

HEADING = re.compile(r"[ \t]*[A-Za-z]{2}.*\n\s*\S")  # #### Step 5, and its text


def marked_answer(text: str) -> str | None:
    """What follows the last mark that anything follows.

    >>> marked_answer("The answer is 5.\\n\\nFinal answer:\\n\\n$6$"), marked_answer("#### Step 5\\n3 + 4")
    ('6', None)
    """
    for mark in reversed(list(MARK.finditer(text))):
        before, rest = text[max(0, mark.start() - 40) : mark.start()], text[mark.end() :]
        if mark["hashes"] and HEADING.match(rest):
            continue
        if NO_MARK.search(before) or REMARK.match(rest) or not rest.strip(" \n\t*_:.$"):
            continue
        return clause(rest) or None
    return None


FILLER = re.compile(
    r"(?i)(?:[\s:=>]|\*\*|__|\}|(?<![\w*])\*(?=\s)|\b(?:is|that|thus|therefore|now|actually|indeed|simply|exactly|"
    r"only|just|equal to|given by|as follows|the (?:number|value|integer|option|choice)(?: of)?)\b)*"
)
SENTENCE = re.compile(r"(?i)(?:(?:the|there|our|its|his|her|each)\s[^.?\n]{0,150}?(?<!answer)\s(?:is|are|equals)\s)?\s*")
FORMULA = re.compile(r"\\\[(.*?)\\\]|\$\$(.*?)\$\$|\\\((.*?)\\\)|(?<!\\)\$([^$\n]*[^$\n\\])\$(?!\d)", re.DOTALL)
END = re.compile(r"(?<!\\)[.!](?=[\s*_\"”)]*(?:\s|$))|\n|\\n(?![a-z])|—|<\|")
HEDGE = re.compile(r"(?i)\b(?:no|wait|maybe|perhaps|or|but|sorry|unsure|probably|possibly|might|could|not sure|either|"
                   r"otherwise|unless|depending|respectively|if)\b|\?|\band\s+\$?-?[\d\0]|"
                   r"\b(?:for|when)\b.*[,;]\s*\$?-?[\d\0].*\b(?:for|when)\b")
NEXT_CLAUSE = re.compile(
    r"\s-\s(?!(?:log|ln|sin|cos|tan|sqrt|pi)\b)(?=[A-Za-z]{2})|[,;]\s+(?!(?:and|or)\b|sqrt|pi\b)(?=[A-Za-z]{2})|\s\((?!mod)(?=[A-Za-z]{3,}\s+\S*[\d=$])|[,;]?\s+(?:because|since|as|where|which|for|"
    r"when|so|after|making|giving|assuming|given|using|by)\b|\s+(?:and|but)\s+(?:the|it|he|she|they|we|this|that|so)\b"
)
MARKUP = re.compile(r"<<.*?>>|\*\*(?!\w)|(?<![\w)])\*\*|__|(?<![\w*])\*(?=\w)|(?<=\w)\*(?![\w*\s(])|[`\"“”]")
SUM = re.compile(r"^[\d\s.,+*/×÷()$-]+=(?=\s*\$?-?\d)")  # 4+24= before 28


def clause(rest: str) -> str:
    """The expression that stands at the beginning of a text, up to its end: "" if it is in doubt.

    >>> [clause(x) for x in (" **28**, which", " 5, 6 or 7.", " 28, or 29?", ": 4√2\\nSo", " 5?")]
    ['28', '5, 6 or 7', '', '4√2', '']
    """
    formulas: list[str] = []

    def keep(match: re.Match) -> str:
        inside = next(part for part in match.groups() if part is not None)
        formulas.append(" ".join(inside.split()))
        return f" \0{len(formulas) - 1}\0 "

    text = FORMULA.sub(keep, MARKUP.sub("", rest[:MAX_ANSWER]))
    filler = FILLER.match(text)
    text = text[filler.end() :]
    if "\n" in filler[0] and re.match(r"[-−–*+•]\s", text):
        return ""  # an item of a list, or a sign
    text = text[SENTENCE.match(text).end() :]
    end = END.search(text)
    sentence = text[: end.start()] if end else text
    if end and re.match(r"\.\.|—\s*\d", text[end.start() :]):
        return ""
    cut = NEXT_CLAUSE.search(sentence)
    first, remainder = sentence, ""
    if cut:
        first, remainder = sentence[: cut.start()], sentence[cut.start() :]
    if HEDGE.search(remainder) or "?" in sentence:
        return ""
    for i, formula in enumerate(formulas):
        first = first.replace(f"\0{i}\0", formula)
    return SUM.sub("", first.strip()).strip(" ,;:'")
