"""reasoning-gym: generated problems, scored by their own scorers."""
from __future__ import annotations

from common.tasks.problem import Problem
from common.verifiers import Verdict
from common.verifiers.answers import last_block

SIZE = 10_000  # training problems
INSTRUCTION = (
    "Think step by step, then give only the final answer between <answer> and </answer>."
)
EVALUATED = {  # their scorers run the answer as Python
    "binary_matrix", "countdown", "intermediate_integration", "n_queens",
    "polynomial_multiplication", "puzzle24", "simple_integration", "spiral_matrix",
    "string_insertion",
}


def problems(name: str, count: int) -> list[Problem]:
    """`count` problems of a reasoning-gym dataset with its default settings."""
    import reasoning_gym

    try:
        made = reasoning_gym.create_dataset(name, size=count, seed=0)
    except ValueError as error:  # an unknown name
        raise SystemExit(f"error: --task gym:{name}: {error}") from None
    out = []
    for i, entry in enumerate(made):
        user = f"{entry['question']}\n\n{INSTRUCTION}"
        out.append(Problem(
            id=f"gym/{name}/{i}",
            messages=[{"role": "user", "content": user}],
            answer=str(entry["answer"]),
            kind="gym",
            meta={"gym": name, "entry": entry},
        ))
    return out


def judge(problem: Problem, text: str) -> Verdict:
    """The score of the dataset's own scorer for what is in the last <answer> block."""
    import reasoning_gym

    found = last_block(text, "<answer>", "</answer>")
    if found is None:
        return Verdict(
            0.0, "No final answer was found; it belongs between <answer> and </answer>."
        )
    scorer = reasoning_gym.get_score_answer_fn(problem.meta["gym"])
    score = float(scorer(found, problem.meta["entry"]))
    if score == 1:
        return Verdict(score)
    return Verdict(score, f"The final answer {found[:100]} is wrong.")
