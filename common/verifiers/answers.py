"""Where the answer is in a response: the last box, block of tags or marked answer."""
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


# --------------------------------------------------------------------------------------------------
# mathematics
# --------------------------------------------------------------------------------------------------
def final_answer(text: str) -> str | None:
    """The mathematical answer of a response, as text; None if it gives none.

    It is what the last box holds, together with the boxes that "and" or a comma joins to it; if
    there is no box, what follows the last mark: ####, "answer is", "Answer:", a heading "Final
    answer". A last box that is not closed holds none.

    >>> final_answer(r"\\boxed{1}, no: \\boxed{2} and \\boxed{3}")
    '2, 3'
    >>> final_answer(r"\\boxed{1} \\boxed{2"), final_answer("So she has 18")
    (None, None)
    >>> final_answer("**Answer**: 18 eggs, as 9 * 2 = 18.")
    '18 eggs'
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


COMMAND = r"(?<!\\)(?:\\\\)*\\(?:boxed|fbox)(?![A-Za-z])\s*"
BOX = re.compile(COMMAND + r"(?=(\{)|(-?[\d.,]+|[A-Z])(?![\w^{\\]))")  # \boxed{5} or \boxed 5
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def boxes(text: str) -> list[Box]:
    """The boxes that stand in no other box, in order; [] if the last one is not closed.

    >>> [box.content for box in boxes(r"\\boxed{\\boxed{3}} \\boxed{{1}} \\boxed 5.")]
    ['\\\\boxed{3}', '{1}', '5']
    """
    found: list[Box] = []
    for opening in BOX.finditer(text):
        start = opening.end()
        if found and start < found[-1].end:
            continue
        if opening[2]:
            bare = opening[2].rstrip(".,")
            found.append(Box(opening.start(), start + len(bare), bare))
            continue
        end = closing_brace(text, start)
        if end < 0:
            return []
        found.append(Box(opening.start(), end, text[start + 1 : end - 1]))
    return found


def closing_brace(text: str, start: int) -> int:
    """The place behind the brace that closes the one at `start`, or -1.

    >>> closing_brace("{a{b}}c", 0), closing_brace(r"{a\\}", 0)
    (6, -1)
    """
    depth = 0
    for brace in BRACE.finditer(text, start):
        depth += (brace[0] == "{") - (brace[0] == "}")
        if depth == 0:
            return brace.end()
    return -1


def one_of(words: str) -> str:
    """A pattern of whole words.

    >>> bool(re.search(one_of("so thus"), "and so on")), bool(re.search(one_of("so"), "sort"))
    (True, False)
    """
    return rf"\b(?:{'|'.join(words.split())})\b"


# What may stand between boxes that are one answer: \boxed{1}$ and $\boxed{2}, "and y =".
JOINT = re.compile(r"(?:\s|[$,;&{}]|\\[()\[\],;:! ]|\\q?quad|\*\*|\\text|\band\b|\bor\b)*")
NAMED = re.compile(r"[^.\n]{0,40}(?:[,;&]|\band\b|\bor\b)[^.\n]{0,40}")
TURNS = "so thus hence then therefore but no not wait actually instead which because since means"
TURN = re.compile(rf"(?i){one_of(TURNS + ' mean gives give now first')}|[⇒→]|\\to|\\R?implies")

# The box is a part of a term: \boxed{5}\sqrt2, \boxed{5}^2, \boxed{5}x; 2\boxed{5}, $-\boxed{5}.
GOES_ON = re.compile(
    r"\s?(?:\^|/\s*[\d\\]|\\(?:sqrt|frac|pi|times|cdot|pm)(?![a-z])|[-+*]\s?[\d\\])"
    r"|[A-Za-z](?![A-Za-z])"
)
WITHIN = r"\\[dt]?(?:frac|sqrt)\s*\{|\}\{|\^\{?|(?<=[$= ])\d\{?"
SIGNED = r"[$=(\d]\s*[-+]|[\d)}]\s*(?:\\cdot|\\times|\*|/)\{?"
COMPARED = r"[\w)}]\s*(?:[<>≤≥≠]|\\(?:l|g|n)eq?(?:slant)?)\s*"  # x > \boxed{5}
BEGUN = re.compile(rf"(?:{WITHIN}|{SIGNED}|{COMPARED})\Z")
CHOICE = re.compile(r"(?:\s|[$*]|\\[)\]])*\bor\b(?=\s*[\d$\\-])")  # \boxed{5} or 6


def boxed_answer(text: str) -> str | None:
    """The last box with those that are joined to it; None if it is a part of a term."""
    found = boxes(text)
    if not found:
        return None
    parts = [found[-1]]
    for box in reversed(found[:-1]):
        if not are_joined(text[box.end : parts[0].start]):
            break
        parts.insert(0, box)
    answers = [part.content.strip() for part in parts]
    goes_on = GOES_ON.match(text, parts[-1].end)
    if goes_on or BEGUN.search(text[: parts[0].start]) or "" in answers:
        return None
    choice = CHOICE.match(text, parts[-1].end)
    if choice:
        answers.append(clause(text[choice.end() :]) or "?")
    return ", ".join(dict.fromkeys(answers))


def are_joined(between: str) -> bool:
    """Whether the text between two boxes makes one answer of them.

    >>> [are_joined(x) for x in ("$ and $", " and $y = ", ", so it is ", ". Then ")]
    [True, True, False, False]
    """
    named = NAMED.fullmatch(between) and not TURN.search(between)
    return bool(JOINT.fullmatch(between) or named)


# --------------------------------------------------------------------------------------------------
# marked answers
# --------------------------------------------------------------------------------------------------
TASK = r"(?:\s+(?:to|for|of)\s+(?:the|this|your|our)\s+(?:\w+\s+)?(?:problem|question|exercise))?"
IS = r"(?:is|was|equals|would be|will be|must be|should be|comes out to|comes to)\b"
MARK = re.compile(
    r"(?P<hashes>^\s*####|(?<=[\s.])####)"
    rf"|(?<![a-z])answer{TASK}\s*[*_]*\s*(?:{IS}|:|=|≈)"
    r"|\bans(?:\.|:|=)"
    r"|^\W*answer\s*(?=\$|\\[\[(])"
    r"|^[#*_\s>]*(?:my |the )?final answer[\s*_:.]*$"
    r"|^(?:#+\s*|\*\*\s*)answer[\s*_:.]*$",
    re.MULTILINE | re.IGNORECASE,
)
OTHERS = "wrong incorrect first initial previous earlier other naive common tempting whether if"
OTHERS += " that intermediate partial rough"
NO_MARK = re.compile(rf"(?i){one_of(OTHERS)}\s+(?:final )?$")
REMARKS = "correct right reasonable plausible helpful verified confirmed consistent valid clear"
REMARKS += " complete checked above below boxed"
REMARK = re.compile(rf"(?i)[\s*_]*(?:\w+ )?{one_of(REMARKS)}")
HEADING = re.compile(r"[ \t]*[A-Za-z]{2}.*\n\s*\S")  # #### Step 5, and its text


def marked_answer(text: str) -> str | None:
    """What follows the last mark that anything follows.

    >>> marked_answer("The answer is 5.\\n\\nFinal answer:\\n\\n$6$")
    '6'
    >>> marked_answer("#### Step 5\\n3 + 4"), marked_answer("A wrong answer is 5")
    (None, None)
    """
    for mark in reversed(list(MARK.finditer(text))):
        before = text[: mark.start()][-40:]
        rest = text[mark.end() :]
        if mark["hashes"] and HEADING.match(rest):
            continue
        if NO_MARK.search(before) or REMARK.match(rest) or not rest.strip(" \n\t*_:.$"):
            continue
        return clause(rest) or None
    return None


STOPS = "is that thus therefore now actually indeed simply exactly only just"
FILLER = re.compile(
    rf"(?:[\s:=>}}]|\*\*|__|(?<![\w*])\*(?=\s)|{one_of(STOPS)}|\b(?:equal to|given by|as follows)\b"
    r"|\bthe (?:number|value|integer|option|choice)(?: of)?\b)*",
    re.IGNORECASE,
)
OWNER = r"(?:the|there|our|its|his|her|each)\s[^.?\n]{0,150}?(?<!answer)"
SENTENCE = re.compile(rf"(?i)(?:{OWNER}\s(?:is|are|equals)\s)?\s*")  # The area is
FORMULA = re.compile(
    r"\\\[(.*?)\\\]|\$\$(.*?)\$\$|\\\((.*?)\\\)|(?<!\\)\$([^$\n]*[^$\n\\])\$(?!\d)", re.DOTALL
)
END = re.compile(r"(?<!\\)[.!](?=[\s*_\"”)]*(?:\s|$))|\n|\\n(?![a-z])|—|<\|")
OPEN_END = re.compile(r"\.\.|—\s*\d")  # 5... or 5—6
DOUBTS = "no wait maybe perhaps or but sorry unsure probably possibly might could either otherwise"
HEDGE = re.compile(
    rf"(?i){one_of(DOUBTS + ' unless depending respectively if')}|\bnot sure\b|\?"
    r"|\band\s+\$?-?[\d\0]|\b(?:for|when)\b.*[,;]\s*\$?-?[\d\0].*\b(?:for|when)\b"
)
REASONS = "because since as where which for when so after making giving assuming given using"
NEXT_CLAUSE = re.compile(
    r"\s-\s(?!(?:log|ln|sin|cos|tan|sqrt|pi)\b)(?=[A-Za-z]{2})"
    r"|[,;]\s+(?!(?:and|or|sqrt|pi)\b)(?=[A-Za-z]{2})"
    r"|\s\((?!mod|base)(?=[A-Za-z]{3,}\s+\S*[\d=$]|(?:see|since|as|because|from|by|which)\b)"
    rf"|[,;]?\s+{one_of(REASONS)}"
    rf"|\s+(?:and|but)\s+{one_of('the it he she they we this that so')}"
)
STARS = r"\*\*(?!\w)|(?<![\w)])\*\*|(?<![\w*])\*(?=\w)|(?<=\w)\*(?![\w*\s(])"  # bold, not 2**3
MARKUP = re.compile(rf"<<.*?>>|{STARS}|__|[`\"“”]")
SUM = re.compile(r"^[\d\s.,+*/×÷()$-]+=(?=\s*\$?-?\d)")  # 4+24= before 28


def clause(rest: str) -> str:
    """The expression that stands at the beginning of a text, up to its end: "" if it is in doubt.

    >>> [clause(x) for x in (" **28**, which", " 5, 6 or 7.", ": 4√2\\nSo", " 5?", " 5, or not")]
    ['28', '5, 6 or 7', '4√2', '', '5, or not']
    """
    formulas: list[str] = []

    def keep(match: re.Match) -> str:
        inside = next(part for part in match.groups() if part is not None)
        formulas.append(" ".join(inside.split()))
        return f" \0{len(formulas) - 1}\0 "

    text = FORMULA.sub(keep, MARKUP.sub("", rest[:MAX_ANSWER]))
    filler = FILLER.match(text)[0]
    text = text[len(filler) :]
    if "\n" in filler and re.match(r"[-−–*+•]\s", text):
        return ""  # an item of a list, or a sign
    text = text[SENTENCE.match(text).end() :]
    end = END.search(text)
    if end and OPEN_END.match(text, end.start()):
        return ""
    sentence = text[: end.start()] if end else text
    cut = NEXT_CLAUSE.search(sentence)
    first, remainder = sentence, ""
    if cut:
        first, remainder = sentence[: cut.start()], sentence[cut.start() :]
    if HEDGE.search(remainder) or "?" in sentence:
        return ""
    for i, formula in enumerate(formulas):
        first = first.replace(f"\0{i}\0", formula)
    return SUM.sub("", first.strip()).strip(" ,;:'")
