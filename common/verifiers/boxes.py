"""Boxes in a response, and whether the last one holds the whole answer.

A box is no answer if it is a part of a term, a pair or a choice: $-\\boxed{5}$, \\boxed{5}x,
(\\boxed{5}, 6), \\boxed{5} or 6. In a formula, only signs such as = may stand before it and only a
unit behind it; in prose, the words around it are looked at.
"""
from __future__ import annotations

import re
from typing import NamedTuple

from common.verifiers.units import MULTIPLES


def one_of(words: str) -> str:
    """A pattern of whole words.

    >>> bool(re.search(one_of("so thus"), "and so on")), bool(re.search(one_of("so"), "sort"))
    (True, False)
    """
    return rf"\b(?:{'|'.join(words.split())})\b"


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


# What may stand between boxes that are one answer: \boxed{1}$ and $\boxed{2}, "and y =".
JOINT = re.compile(r"(?:\s|[$,;&{}]|\\[()\[\],;:! ]|\\q?quad|\*\*|\\text|\band\b|\bor\b)*")
NAMED = re.compile(r"[^.\n]{0,40}(?:[,;&]|\band\b|\bor\b)[^.\n]{0,40}")
TURNS = "so thus hence then therefore but no not wait actually instead which because since means"
TURN = re.compile(rf"(?i){one_of(TURNS + ' mean gives give now first')}|[⇒→]|\\to|\\R?implies")


# --------------------------------------------------------------------------------------------------
# a box in a formula
# --------------------------------------------------------------------------------------------------
WORDS = r"\\(?:text\w*|math(?:rm|bf|sf)|mbox)\s*\{[^{}]*\}"
STYLE = r"\\(?:(?:text)?color\s*\{\w+\}|(?:left|right|displaystyle|bf|mathbf|boldsymbol)\b)"
SPACE = rf"[\s{{}}*~]|\\[,;:! $]|{STYLE}"
ARROW = r"\\(?:[A-Za-z]*arrow|implies|therefore|to|iff)(?![A-Za-z])"
SIGN = rf"{ARROW}|\\(?:approx|equiv|in|q?quad)(?![A-Za-z])|\\\\|[=≈&,;]|(?<!\d)(?<!\d ):|{WORDS}"
SIGNS = re.compile(SIGN)
UNIT = rf"{WORDS}|\\?%|\^?\s*\{{?\\circ\}}?|°|(?<=\}})\s*\^\{{?\d\}}?"
MARKS = r"\\(?:q?quad|qed|blacksquare|square|checkmark|tag|end|approx)(?![A-Za-z])|\\pmod"
END = rf"[.,;&≈]|\\\\|{ARROW}|{MARKS}|\Z"
BEHIND = re.compile(rf"(?:{SPACE}|{UNIT}|\))*(?:{END})")
DOLLARS = re.compile(r"(?<!\\)\$\$?")
SENTENCE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,} [a-z]{2,}|[a-z]\. |\. [A-Z]")


def in_formula(before: str, rest: str) -> tuple[str, str] | None:
    """The formula that a box stands in: what it has before the box, and behind it; None if the box
    stands in none.

    >>> in_formula("It is $x = ", "$."), in_formula(r"\\[2", r"x\\]"), in_formula("$2 in all. ", "")
    (('x = ', ''), ('2', 'x'), None)
    """
    for opening, closing in (("\\[", "\\]"), ("\\(", "\\)")):
        start = before.replace("\\\\", "  ").rfind(opening)
        if start > before.rfind(closing) and closing in rest:
            return before[start + 2 :], rest[: rest.index(closing)]
    paragraph = before.rpartition("\n\n")[2]
    dollars = list(DOLLARS.finditer(paragraph))
    if len(dollars) % 2 == 0:
        return None
    formula, closing = paragraph[dollars[-1].end() :], dollars[-1][0]
    if closing not in rest or SENTENCE.search(re.sub(WORDS, "", formula)):
        return None  # an amount of money
    return formula, rest[: rest.index(closing)]


def stands_alone(before: str, behind: str) -> bool:
    """Whether the box is a whole side of its formula.

    >>> stands_alone("x = ", ""), stands_alone("10 - ", ""), stands_alone("", r"\\,\\text{cm}")
    (True, False, True)
    """
    last = re.sub(SPACE, "", SIGNS.split(before)[-1])
    whole = "(" in last[-1:] and behind.lstrip().startswith((")", "\\right)"))
    last = last.removesuffix("(" * whole)
    bare = re.sub(WORDS, "", before)
    opened = len(re.findall(r"[(\[]|\\\{", bare)) - len(re.findall(r"[)\]]|\\\}", bare)) - whole
    return not last and opened <= 0 and bool(BEHIND.match(behind))


# --------------------------------------------------------------------------------------------------
# what stands around a box
# --------------------------------------------------------------------------------------------------
# It is a part of a term: \boxed{5}\sqrt2, \boxed{5}^2, \boxed{5}x; 2\boxed{5}, $-\boxed{5}.
GOES_ON = re.compile(
    r"\s?(?:\^(?!\s*\{?\\circ)|/\s*[\d\\]|\\(?:sqrt|frac|pi|times|cdot|pm)(?![a-z])|[-+*]\s?[\d\\])"
    r"|[A-Za-z](?![A-Za-z])|(?:\\?%)?[.,]?\d| ?[-+*] ?[b-zC](?![A-Za-z])"
    r"| ?(?:[>≤≥≠]|<(?!/?[a-z]+>|\|)|: ?\d|\\(?:l|g|n)(?:eq?|t)(?![a-z]))| \$\\times"
)
CLOSERS = r"(?:[ $*)~]|\\[)\],; ]|\\text\w*\{ ?)*"
OF_IT = r"squared|cubed|factorial|(?:plus|minus|times|over|to) [$\d-]|divided by"
OF_IT += r"|or (?:more|less|so)|and an? (?:half|third|quarter)|halves|(?:third|quarter|tenth)s"
NUMERAL = r"[\s${(}]*(?:[a-z] ?= ?)?(?:-?\d|\\(?:frac|sqrt|pi))"
DOUBT = r"\?|,? ?\(?(?:or )?(?:maybe|perhaps|possibly|probably)\b"
DOUBT += rf"|\(or\b|,? ?\b(?:and|or)\b{NUMERAL}"
DOUBT += r"|\(?i(?: a|['’])m not sure|\(unsure"
CHANGED = re.compile(rf"(?i){CLOSERS}(?:(?:{OF_IT})\b|{DOUBT})")  # \boxed{5} squared
MULTIPLIED = re.compile(rf"{CLOSERS}({'|'.join(MULTIPLES)})\b")  # \boxed{5} million
OPEN_PAIR = re.compile(r"(?<!\\)[(\[]\s*\Z")  # (\boxed{5}, 6)
WITHIN = r"\\[dt]?(?:frac|sqrt)\s*\{|\}\{|\^\{?|\d\{?|\\sqrt\s*\{[^{}]*\}\s*|\\pi\s*"
SIGNED = r"[$=(\d]\s*[-+]|(?:^|\s)[-+−]|[\d)}]\s*(?:\\cdot|\\times|\*|/)\{?"
COMPARED = r"[\w)}]\s*(?:[<>≤≥≠]|\\(?:l|g|n)eq?(?:slant)?)\s*"  # x > \boxed{5}
DENIED = r"(?:\b(?:not|never|cannot be|except|than|neither)|n['’]t(?: be)?)[\s$*(\[\\]*"
OFFERED = r"\b(?:maybe|perhaps|possibly|probably|either\b.{1,30}\bor|between\b.{1,20}\band)[\s$*]*"
BEGUN = re.compile(rf"(?:{WITHIN}|{SIGNED}|{COMPARED}|{DENIED}|{OFFERED})\Z", re.IGNORECASE)
LETTER = re.compile(r"(?:\\text\w*\s*\{)?\s*\([A-J]\)\s*\}?")  # an option's, before its text
TAG = re.compile(r"(?:</?[a-z]+>|(?:^|\n)>+)\s*\Z", re.IGNORECASE)  # <b>, or > of a quotation


def boxed(text: str) -> tuple[str | None, str]:
    """→ (what the last box holds, with the boxes that are joined to it; the text behind it). The
    answer is None if the box is empty, not closed, or a part of something.

    >>> boxed(r"$x = \\boxed{5}$ or $x = \\boxed{6}$."), boxed(r"$2\\boxed{5}$")
    (('5, 6', '$.'), (None, '$'))
    >>> boxed(r"It is \\boxed{5} million")
    ('5 million', ' million')
    """
    found = boxes(text)
    if not found:
        return None, ""
    parts = [found[-1]]
    for box in reversed(found[:-1]):
        if not are_joined(text[box.end : parts[0].start]):
            break
        parts.insert(0, box)
    answers = [part.content.strip(" \n*`") for part in parts]
    before, rest = TAG.sub("", text[: parts[0].start]), text[parts[-1].end :]
    around = BEGUN.search(before[-60:]) or GOES_ON.match(rest) or CHANGED.match(rest)
    in_pair = OPEN_PAIR.search(before) and rest.lstrip().startswith(",")
    if around or in_pair or "" in answers:
        return None, rest
    formula = in_formula(before, rest)
    if formula and formula[1].lstrip().startswith("="):
        answers[-1] += formula[1]
    elif formula and not stands_alone(*formula) and not LETTER.fullmatch(answers[-1]):
        return None, rest
    multiplied = MULTIPLIED.match(rest)
    if multiplied:
        answers[-1] += f" {multiplied[1]}"
    return ", ".join(dict.fromkeys(answers)), rest


def are_joined(between: str) -> bool:
    """Whether the text between two boxes makes one answer of them.

    >>> [are_joined(x) for x in ("$ and $", " and $y = ", ", so it is ", ". Then ")]
    [True, True, False, False]
    """
    named = NAMED.fullmatch(between) and not TURN.search(between)
    return bool(JOINT.fullmatch(between) or named)
