"""Whether two mathematical expressions are equal, by math-verify."""
from __future__ import annotations

from common.verifiers import BadProblem
from common.verifiers.answers import MAX_ANSWER, after_hashes, announcements, last_boxed


def compare(gold: str, text: str) -> tuple[str, bool]:
    """→ (the answer found in `text`, whether it equals `gold`); ("", False) if there is none.

    Raises BadProblem if the gold cannot be read.
    """
    from math_verify import verify

    expected = read(f"${last_boxed(gold) or gold.strip(' $')}$", anywhere=True)
    if not expected:
        raise BadProblem(f"the reference answer {gold!r} is not mathematics that math-verify can "
                         "read")
    found = find_answer(text)
    if not found:
        return "", False
    # the gold goes first: verify is not symmetric
    return str(found[-1])[:100], verify(expected, found, timeout_seconds=None)


def find_answer(text: str) -> list:
    """The answer as math-verify reads it; [] if there is none.

    It is the last \\boxed{}, or else what follows the last ####, or else what comes right after the
    last "answer is". The last number of a text that announces no answer is none: cut-off responses
    would be right by chance. So is the first number after "answer", math-verify's rule: in 'the
    answer to "Is 58 or 28 more?" is 28' that reads 58.
    """
    boxed, marked = last_boxed(text), after_hashes(text)
    if boxed is not None:
        return read(f"${boxed}$", anywhere=True)
    if marked is not None:
        return read(marked, anywhere=True)
    for part in announcements(text):
        found = read(f"answer is {part}", anywhere=False)
        if found:
            return found
    return []


def read(text: str, anywhere: bool) -> list:
    """The expressions in a text; with `anywhere`, also such as are not announced."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    if len(text) > MAX_ANSWER:
        return []
    forms = [
        LatexExtractionConfig(try_extract_without_anchor=anywhere),
        ExprExtractionConfig(try_extract_without_anchor=anywhere),
    ]
    return parse(text, forms, parsing_timeout=None)
