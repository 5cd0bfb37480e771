"""Multiple choice: the letter of an option."""
from __future__ import annotations

import hashlib
import json
import re
import string
from typing import Any

from common.tasks.fields import Record, empty, first
from common.tasks.problem import Problem
from common.verifiers import Verdict
from common.verifiers.answers import last_block

INSTRUCTION = (
    "Reason step by step, then give only the letter of the answer between <answer> and </answer>."
)
OPTIONS = ("choices", "options", "endings", "answers", "mc1_targets")  # fields of options
SEPARATE = {  # fields of sets that have one for each option → the options' letters
    ("opa", "opb", "opc", "opd", "ope"): "ABCDE",  # MedMCQA
    ("A", "B", "C", "D", "E", "F"): "ABCDEF",  # CMMLU, C-Eval
    ("option_a", "option_b", "option_c", "option_d", "option_e"): "ABCDE",
    ("option1", "option2", "option3", "option4", "option5"): "12345",  # WinoGrande
    ("answerA", "answerB", "answerC"): "123",  # SocialIQA
    ("answer0", "answer1", "answer2", "answer3"): "ABCD",  # CosmosQA
    ("choice1", "choice2"): "AB",  # COPA
    ("sol1", "sol2"): "AB",  # PIQA
}
CORRECT = ("Correct Answer", "correct_answer")  # of sets that list the wrong options apart
WRONG = re.compile(r"(incorrect[ _]answer|distractor)[ _]?\d", re.IGNORECASE)  # GPQA, SciQ
RIGHT = (  # fields that say which option is right, before "answer"
    "answerKey", "answer_idx", "answer_index", "answer_letter", "correct_option", "correct", "cop",
    "label", "gold", "Correct Answer",
)


def from_record(record: Record) -> Problem:
    """The question with its options, unless the question itself shows them, as in SDPO's files."""
    user = record.question
    labels, texts = options(record)
    if texts:
        right = right_label(record, labels, texts)
        shown = [f"{label}: {text}" for label, text in zip(labels, texts)]
        user = "\n".join([user, "", *shown, "", INSTRUCTION])
    else:
        right = letter(record)
    solution = record.solution
    if solution and last_block(solution, "<answer>", "</answer>") != right:
        # a rationale; a solution must end in the answer
        solution = f"{solution.strip()}\n<answer>{right}</answer>"
    return record.problem("choice", user, right, solution)


def letter(record: Record) -> str:
    """The answer of a record without options."""
    answer = record.answer
    if empty(answer):
        answer = first(record.data, RIGHT)
    if empty(answer):
        raise record.missing("answer")
    if not isinstance(answer, (str, int)) or isinstance(answer, bool):
        raise record.bad("field 'answer' must be the letter of an option")
    return str(answer).strip()


# --------------------------------------------------------------------------------------------------
# options
# --------------------------------------------------------------------------------------------------
def has_options(data: dict) -> bool:
    """Whether a record lists options, as MMLU's and ARC's do.

    >>> has_options({"choices": ["x", "y"]}), has_options({"choices": []})
    (True, False)
    """
    sizes = [len(found(data, name)[1]) for name in OPTIONS]
    return max(*sizes, len(separate(data)[1])) > 1


def is_yes_or_no(data: dict) -> bool:
    """Whether the answer is true or false, as BoolQ's is."""
    return any(isinstance(data.get(name), bool) for name in ("answer", "Answer"))


def options(record: Record) -> tuple[list[str], list[str]]:
    """→ (the labels, the texts) of the options; empty if the record lists none."""
    for name in OPTIONS:
        labels, texts = found(record.data, name)
        if name == "mc1_targets":  # TruthfulQA: the right one is always the first
            texts = sorted(texts, key=digest)
        if texts:
            break
    else:
        labels, texts = separate(record.data)
        if apart(record.data)[1]:
            return labels, texts
    if isinstance(record.answer, bool) and not texts:
        return ["A", "B"], ["yes", "no"]
    if not texts:
        return [], []
    different = len(texts) == len(set(labels)) <= 26
    if not (different and all(map(plain, texts))):
        raise record.bad("its options are not 2 to 26 texts, each with its own letter")
    return labels, [without_label(str(text), label) for label, text in zip(labels, texts)]


def found(data: dict, name: str) -> tuple[list[str], list]:
    """The labels and texts of one field: a list, or an object of labels and texts."""
    value = data.get(name)
    if isinstance(value, str) and LETTERED.match(value):
        parts = LETTERED.split(value)[1:]
        labels = [label.upper() for label in parts[::2]]
        return labels, [text.strip(" ,") for text in parts[1::2]]
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return [], []
    if isinstance(value, dict):
        texts = value.get("text", value.get("choices"))
        if isinstance(texts, list):  # ARC, TruthfulQA
            labels = value.get("label") or string.ascii_uppercase[: len(texts)]
            return list(map(str, labels)), texts
        return list(map(str, value)), list(value.values())  # MedQA: {"A": …}
    if not isinstance(value, list) or (name == "answers" and "label" not in data):
        return [], []
    if value and all(isinstance(option, dict) for option in value):
        labels = [first(option, ("label", "key", "id", "letter")) for option in value]
        texts = [first(option, ("text", "value", "content", "option")) for option in value]
        return list(map(str, labels)), texts
    return list(string.ascii_uppercase[: len(value)]), value


LETTERED = re.compile(r"\b([a-f]) \) ")  # MathQA: "a ) 38 , b ) 27"


def separate(data: dict) -> tuple[list[str], list]:
    """The labels and texts of options that have a field each. If the right one has a field of its
    own, their order is that of a hash."""
    correct, wrong = apart(data)
    if wrong:
        labels = string.ascii_uppercase[: len(wrong) + 1]
        return list(labels), sorted([correct, *wrong], key=digest)
    for names, letters in SEPARATE.items():
        texts = [data[name] for name in names if plain(data.get(name))]
        if len(texts) > 1:
            return list(letters[: len(texts)]), texts
    return [], []


def apart(data: dict) -> tuple[str, list[str]]:
    """The right option and the wrong ones, if they have fields of their own; else nothing."""
    correct = [str(data[name]) for name in CORRECT if plain(data.get(name))]
    names = filter(WRONG.fullmatch, map(str, data))
    wrong = [str(data[name]) for name in names if plain(data.get(name))]
    if correct and wrong:
        return correct[0], wrong
    return "", []


def digest(text: Any) -> bytes:
    return hashlib.sha1(str(text).encode(errors="replace")).digest()


def plain(value: Any) -> bool:
    return isinstance(value, (str, int, float)) and str(value).strip() != ""


def without_label(text: str, label: str) -> str:
    """The text without a label that it repeats.

    >>> without_label("A) iron", "A"), without_label("A. iron", "A"), without_label("A iron", "A")
    ('iron', 'iron', 'A iron')
    """
    for mark in (f"({label})", f"{label})", f"{label}.", f"{label}:"):
        if text.startswith(mark) and text[len(mark) :].strip():
            return text[len(mark) :].strip()
    return text


# --------------------------------------------------------------------------------------------------
# the right one
# --------------------------------------------------------------------------------------------------
def right_label(record: Record, labels: list[str], texts: list[str]) -> str:
    """The label of the right option. The record names the label, its place from 0, or its text."""
    correct, wrong = apart(record.data)
    if wrong:
        return labels[texts.index(correct)]
    if isinstance(record.answer, bool):
        return labels[0] if record.answer else labels[1]  # yes, no
    scores = record.data.get("mc1_targets")
    if isinstance(scores, dict):  # 1 for the right one, else 0
        scored = zip(scores.get("choices", ()), scores.get("labels", ()))
        answers = [text for text, score in scored if score == 1]
    else:
        answers = [first(record.data, (name,)) for name in RIGHT]
        answers = [answer for answer in (record.answer, *answers) if not empty(answer)]
    for answer in answers:
        if isinstance(answer, list) and len(answer) == 1:
            answer = answer[0]
        label = label_of(answer, labels, texts)
        if label:
            return label
    if not answers:
        raise record.missing("answer")
    raise record.bad(f"field 'answer' {answers[0]!r:.100} is none of the options "
                     f"{', '.join(labels)}")


def label_of(answer: Any, labels: list[str], texts: list[str]) -> str:
    """The label that an answer means, or "".

    >>> [label_of(x, ["A", "B"], ["no", "1"]) for x in (1, "B", "(b)", "1", "no", "0", 2, "C")]
    ['B', 'B', 'B', 'B', 'A', 'A', '', '']
    """
    if isinstance(answer, bool) or not plain(answer):
        return ""
    if isinstance(answer, (int, float)):
        if str(answer) in labels:
            return str(answer)
        if answer in range(len(labels)):
            return labels[int(answer)]
        return ""
    text = answer.strip()
    if text in labels:
        return text
    if texts.count(text) == 1:
        return labels[texts.index(text)]
    label = text.strip("().: ").upper()
    if label in labels:
        return label
    label, _, rest = text.partition(".")
    if label in labels and rest.strip() in texts:
        return label
    if text.isdecimal() and int(text) < len(labels):
        return labels[int(text)]
    return ""


def judge(problem: Problem, text: str) -> Verdict:
    """SDPO's rule for SciKnowEval: the last <answer> block is the right letter, nothing else."""
    found = last_block(text, "<answer>", "</answer>")
    if found is None:
        return Verdict(0.0, "There is no <answer> block; it holds the letter alone.")
    if found == problem.answer:
        return Verdict(1.0)
    return Verdict(0.0, f"The answer {found[:100]} is wrong.")
