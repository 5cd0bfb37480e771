"""Where the answer is in a response: the last box, block of tags or marked answer."""
from __future__ import annotations

import re

from common.verifiers.boxes import BOX, boxed, one_of

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
    answer", or stands in the last <answer> tags. A last box that is not closed holds none. An
    answer that is taken back ("That is wrong. The answer is 3") counts no more.

    >>> final_answer(r"\\boxed{1}, no: \\boxed{2} and \\boxed{3}")
    '2, 3'
    >>> final_answer(r"<answer> \\boxed{4} </answer>"), final_answer("<answer>4 cm</answer>")
    ('4', '4 cm')
    >>> final_answer(r"\\boxed{1} \\boxed{2"), final_answer("So she has 18")
    (None, None)
    >>> final_answer("**Answer**: 18 eggs, as 9 * 2 = 18.")
    '18 eggs'
    """
    block, rest = last_block(text, "<answer>", "</answer>"), text.rpartition("</answer>")[2]
    if block is not None and not BOX.search(rest):
        first = clause(block) or None
        if BOX.search(block) or MARK.search(block):
            first = final_answer(block.replace("<answer>", " "))
        return later_answer(rest, first)
    if BOX.search(text):
        first, rest = boxed(text)
        return later_answer(rest, first)
    return marked_answer(text)


# "That is wrong", "which cannot be right", "I made a mistake" right behind an answer.
BREAKS = one_of("wait oh no hmm but actually oops sorry hold on however")
PAUSE = rf"[\W_]{{0,12}}(?:{BREAKS}[\W_]{{0,6}})*"
SUBJECT = r"(?:(?:that|this|it|which|the answer)\s*)?(?:is|was|seems|must be|['’]s)\s+(?:\w+ly )?"
FALSE = r"(?:wrong|incorrect|false|impossible|a mistake|not (?:right|correct|possible))\b"
CANNOT = r"(?:(?:that|this|it|which)\s+)?(?:cannot|can['’]t) be\b|isn['’]t (?:right|correct)"
ADMITTED = r"i (?:have )?made an? (?:\w+ )?(?:mistake|error)|correction\b|scratch that"
TAKEN_BACK = re.compile(rf"(?i){PAUSE}(?:{SUBJECT}{FALSE}|{CANNOT}|{ADMITTED})")
RECONSIDERED = one_of("wait actually mistake wrong incorrect correction oops sorry")
SECOND_THOUGHT = re.compile(f"(?i){RECONSIDERED}")


def later_answer(rest: str, first: str | None) -> str | None:
    """The answer of a response whose box says `first` and goes on with `rest`.

    >>> later_answer(". Wait, that is wrong.", "5"), later_answer(" is right. Wait, why?", "5")
    (None, '5')
    >>> later_answer(". Actually no, the answer is 6.", "5")
    '6'
    """
    if TAKEN_BACK.match(rest):
        return marked_answer(rest)
    if SECOND_THOUGHT.search(rest):
        return marked_answer(rest) or first
    return first


# --------------------------------------------------------------------------------------------------
# marked answers
# --------------------------------------------------------------------------------------------------
TASK = r"(?:\s+(?:to|for|of)\s+(?:the|this|your|our)\s+(?:\w+\s+)?(?:problem|question|exercise))?"
IS = r"(?:is|was|equals|would be|will be|must be|should be|comes out to|comes to)\b"
# "The answer, then, is", "the answer that we get is".
ASIDE = r"(?:,\s\w+,|,?\s(?:therefore|thus|then)|\s(?:that )?(?:i|we|you)\s\w+)?"
MARK = re.compile(
    r"(?P<hashes>^\s*####|(?<=[\s.])####)"
    rf"|(?<![a-z])answer{TASK}{ASIDE}\s*[*_]*\s*(?:{IS}|:|=|≈)"
    r"|(?<![a-z])answer(?P<quote>[\"'])\s*:"
    r"|\bans(?:\.|:|=)"
    r"|^\W*answer\s*(?=\$|\\[\[(])"
    r"|^[#*_\s>]*(?:my |the )?final answer[\s*_:.]*$"
    r"|^(?:#+\s*|\*\*\s*)answer[\s*_:.]*$",
    re.MULTILINE | re.IGNORECASE,
)
OTHERS = "wrong incorrect first initial previous earlier other naive common tempting whether if"
OTHERS += " that intermediate partial rough"
# "If the answer is 5", "I don't think that the answer is 5", "a mistake is to say the answer is 5".
SUPPOSED = one_of("if whether suppose supposing assume assuming imagine unless")
DENIAL = r"(?:n['’]t|\b(?:not|never|hardly|doubt|unlikely|deny))(?:\s\w+){0,3}"
MISTAKE = rf"{one_of('mistake mistaken wrong incorrect tempting error myth')}(?:\s\w+){{0,5}}"
GUESS = rf"{one_of('might may could some many people students')}\s(?:\w+\s)?(?:think|say|guess)s?"
BOUND = r"\b(?:bound|estimate|approximation)\s(?:for|on|of|to)"
PRETEXT = rf"(?:{SUPPOSED}|{DENIAL}|{MISTAKE}|{GUESS}|{BOUND})\s+"
PRETEXT += r"(?:that\s+)?(?:the|my|our)\s+(?:\w+\s+)?"
NO_MARK = re.compile(rf"(?i)(?:{one_of(OTHERS)}\s+(?:final )?|{PRETEXT})$")
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
        before = text[: mark.start()][-80:]
        rest = text[mark.end() :]
        if mark["quote"]:
            rest = json_value(rest)
        if mark["hashes"] and HEADING.match(rest):
            continue
        if NO_MARK.search(before) or REMARK.match(rest) or not rest.strip(" \n\t*_:.$"):
            continue
        return clause(rest) or None
    return None


def json_value(rest: str) -> str:
    r"""The value that follows a name in JSON.

    >>> json_value(' "\\\\\\\\frac{1}{2}", "a": 3}'), json_value(" 42}")
    ('\\\\frac{1}{2}', '42')
    """
    quoted, bare = re.match(r'\s*(?:"([^"\n]*)"|([^,}\n]*))', rest).groups()
    return (quoted or bare or "").replace("\\\\", "\\")


STOPS = "is that thus therefore now actually indeed simply exactly only just definitely certainly"
FILLER = re.compile(
    rf"(?:[\s:=>}}]|\*\*|__|(?<![\w*])\*(?=\s)|{one_of(STOPS)}|\b(?:equal to|given by|as follows)\b"
    r"|\bthe (?:number|value|integer|option|choice)(?: of)?\b)*",
    re.IGNORECASE,
)
OWNER = r"(?:the|there|our|its|his|her|each)\s[^.?\n]{0,150}?(?<!answer)"
VERB = "has have makes make needs need earns spends pays gets"
DOES = rf"(?:(?!no|none|some|any)[A-Za-z]+\s){{1,2}}{one_of(VERB)}\s"  # Janet makes
SENTENCE = re.compile(rf"(?i)(?:{OWNER}\s(?:is|are|equals)\s|{DOES})?\s*")  # The area is
FORMULA = re.compile(
    r"\\\[(.*?)\\\]|\$\$(.*?)\$\$|\\\((.*?)\\\)|(?<!\\)\$([^$\n]*[^$\n\\])\$(?!\d)", re.DOTALL
)
END = re.compile(r"(?<!\\)(?<!Rs)[.!](?=[\s*_\"”)]*(?:\s|$))|\n|\\n(?![a-z])|—|<\|")
OPEN_END = re.compile(r"\.\.|—\s*\d")  # 5... or 5—6
DOUBTS = "no wait maybe perhaps or but sorry unsure probably possibly might could either otherwise"
HEDGE = re.compile(
    rf"(?i){one_of(DOUBTS + ' unless depending respectively if')}|\bnot sure\b|\?"
    r"|\A[,;]?\s*then\b|\band\s+\$?-?[\d\0]|\b(?:for|when)\b.*[,;]\s*\$?-?[\d\0].*\b(?:for|when)\b"
)
REASONS = "because since as where which for when so after making giving assuming given using rather"
NEXT_CLAUSE = re.compile(
    r"\s-\s(?!(?:log|ln|sin|cos|tan|sqrt|pi)\b)(?=[A-Za-z]{2})"
    r"|[,;]\s+(?!(?:and|or|sqrt|pi)\b)(?=[A-Za-z]{2}|i\.e)"
    r"|\s\((?!mod|base)(?=[A-Za-z]{3,}\s+(?:of\s+)?\S*[\d=$])"
    r"|\s\((?=(?:see|since|as|because|from|by|which)\b)"
    rf"|[,;]?\s+{one_of(REASONS)}|\s+to\s+{one_of('choose arrange make do get pick form be')}"
    rf"|\s+(?:and|but)\s+{one_of('the it he she they we this that so')}"
)
STARS = r"\*\*(?!\w)|(?<![\w)])\*\*|(?<![\w*])\*(?=\w)|(?<=\w)\*(?![\w*\s(])"  # bold, not 2**3
MORE_LINES = re.compile(r"\n\s*(?=or\b)|(?<=[\d}])\n\s*(?=[a-z] ?= ?[-\d\\])")  # x = 5, y = 6
MARKUP = re.compile(rf"<<.*?>>|{STARS}|__|[`\"“”«»]")
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
    text = MORE_LINES.sub(", ", text[SENTENCE.match(text).end() :])
    end = END.search(text)
    if end and OPEN_END.match(text, end.start()):
        return ""
    sentence = text[: end.start()] if end else text
    cut = NEXT_CLAUSE.search(sentence)
    first, remainder = sentence, ""
    if cut:
        first, remainder = sentence[: cut.start()], sentence[cut.start() :]
    taken_back = TAKEN_BACK.match(text, len(first))
    repeated = re.search(r"\b(?:per|each|every)\b", first) and re.match(r"\s*for \d", remainder)
    if HEDGE.search(remainder) or "?" in sentence or taken_back or repeated:
        return ""
    for i, formula in enumerate(formulas):
        first = first.replace(f"\0{i}\0", formula)
    return SUM.sub("", first.strip()).strip(" ,;:'")
