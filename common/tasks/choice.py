"""Multiple choice: the letter of an option."""
from __future__ import annotations

from common.tasks.problem import Problem
from common.tasks.records import Record
from common.verifiers import Verdict
from common.verifiers.answers import last_block

INSTRUCTION = (
    "Reason step by step, then give only the letter of the answer between <answer> and </answer>."
)


def from_record(record: Record) -> Problem:
    """The question of SDPO's files has its options and instruction; the hub's has its options
    apart."""
    user = record.question
    choices = record.data.get("choices")
    if choices is not None:  # SciKnowEval on the hub
        options = [f"{label}: {text}" for label, text in zip(choices["label"], choices["text"])]
        user = "\n".join([user, "", *options, "", INSTRUCTION])
    return record.problem("choice", user, record.answer, record.solution)


def judge(problem: Problem, text: str) -> Verdict:
    """SDPO's rule for SciKnowEval: the last <answer> block is the right letter, nothing else."""
    found = last_block(text, "<answer>", "</answer>")
    if found is None:
        return Verdict(0.0, "There is no <answer> block; it holds the letter alone.")
    if found == problem.answer:
        return Verdict(1.0)
    return Verdict(0.0, f"The answer {found[:100]} is wrong.")
