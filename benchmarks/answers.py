"""How often mathematical answers are judged as they should be, and how fast.

    python benchmarks/answers.py --data_dir data  # writes results/verifiers/maths.json
    python benchmarks/answers.py adversary results/verifiers/adversary.json  # judges it again
    pip download --no-deps --no-binary :all: math-verify==0.9.0  # unpack it, for --math_verify

Golds are judged against themselves in six written forms, and against every other gold of their set:
a pair that passes must have one value. Math-Verify's own tests (Apache-2.0, Hugging Face) are read
from its source package; every row that is judged differently here is listed. Speed: the same 10,000
responses through a pool of two workers.
"""
from __future__ import annotations

import ast
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tyro

from common.tasks import Problem, load_problems
from common.tasks.kinds import as_problem
from common.verifiers.answers import final_answer
from common.verifiers.equality import compare, reading, same
from common.verifiers.pool import Verifier, judge

FORMS = {  # %s: the gold
    "boxed": "So \\boxed{%s}.",
    "hashes": "#### %s",
    "formula": "The answer is $%s$.",
    "prose": "The answer is %s.",
    "bold": "**Answer:** %s",
    "heading": "### Final Answer\n\n\\[%s\\]",
}
PAIRS = 60_000  # of golds of one set, at most
TIMED = 10_000  # responses


@dataclass
class Args:
    data_dir: str  # folder with the public sets (SETS in common/tasks/sets.py)
    math_verify: str = ""  # folder of Math-Verify's source package, with its tests
    speed: bool = True  # time 10,000 responses
    out: str = "results/verifiers/maths.json"  # the result file


def main(args: Args) -> None:
    golds = golds_of(args.data_dir)
    result = {
        "themselves": {name: themselves(some) for name, some in golds.items()},
        "each_other": {name: each_other(some) for name, some in golds.items()},
    }
    if args.math_verify:
        result["math_verify_tests"] = suite(Path(args.math_verify))
    if args.speed:
        result["speed"] = {name: speed(name, args.data_dir) for name in ("gsm8k", "math500")}
    result |= provenance()
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(result.get("speed"), indent=1))


def provenance() -> dict:
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return {
        "command": "python benchmarks/answers.py " + " ".join(sys.argv[1:]),
        "processors": os.cpu_count(),
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
        "python": platform.python_version(),
    }


# --------------------------------------------------------------------------------------------------
# the sets' golds
# --------------------------------------------------------------------------------------------------
def golds_of(data: str) -> dict[str, list[str]]:
    train = load_problems("gsm8k", "train", data_dir=data)
    sets = {
        "math500": load_problems("math500", data_dir=data),
        "aime24": load_problems("aime24", data_dir=data),
        "gsm8k": [*train, *load_problems("gsm8k", "test", data_dir=data)],
    }
    amc = Path(data) / "amc23" / "test.jsonl"
    if amc.exists():
        sets["amc23"] = load_problems(f"jsonl:{amc}")
    return {name: [problem.answer for problem in problems] for name, problems in sets.items()}


def themselves(golds: list[str]) -> dict:
    """Golds in each written form."""
    passed, failed = {}, {}
    for name, form in FORMS.items():
        bad = [gold for gold in golds if not compare(gold, form % gold)[1]]
        passed[name] = len(golds) - len(bad)
        if bad:
            failed[name] = bad
    texts = sorted({gold for gold in golds if reading(gold) == "text"})
    return {"golds": len(golds), "passed": passed, "failed": failed, "read_as_text_only": texts}


def each_other(golds: list[str]) -> dict:
    """Pairs of different golds of which one passes for the other."""
    different = sorted(set(golds))
    pairs = list(islice(combinations(different, 2), PAIRS))
    passed = [(a, b) for a, b in pairs if same(a, b) or same(b, a)]
    return {"pairs": len(pairs), "passed": len(passed), "which": passed}


# --------------------------------------------------------------------------------------------------
# Math-Verify's tests
# --------------------------------------------------------------------------------------------------
def suite(folder: Path) -> dict:
    count = 0
    paid, refused = [], []  # rows that are judged differently here
    for path in sorted((folder / "tests").glob("test_*.py")):
        for gold, text, expected in rows_of(path):
            count += 1
            judged = compare(reference_of(gold), response_of(text))[1]
            if judged == expected:
                continue
            row = {"gold": gold[-100:], "response": text[-100:], "expected": expected}
            (refused if expected else paid).append({**row, "file": path.name})
    return {
        "licence": "Apache-2.0, Hugging Face",
        "rows": count,
        "agree": count - len(paid) - len(refused),
        "paid_here_only": paid,
        "paid_there_only": refused,
    }


def rows_of(path: Path) -> Iterator[tuple[str, str, bool]]:
    """(gold, response, expected) of the parametrised tests in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or len(node.args) != 2:
            continue
        names, table = node.args  # of pytest.mark.parametrize
        if not isinstance(names, ast.Constant):
            continue
        try:
            rows = ast.literal_eval(table)
        except ValueError:
            continue
        if not isinstance(rows, list):
            continue
        fields = str(names.value).replace(" ", "").split(",")
        for values in rows:
            row = dict(zip(fields, values)) if isinstance(values, tuple) else {}
            if "gold" in row and "pred" in row:
                yield row["gold"], row["pred"], bool(row.get("expected", row.get("result")))


def reference_of(gold: str) -> str:
    """The answer in a box, or else the whole text."""
    answer = final_answer(gold) if "boxed" in gold else None
    return answer or gold.strip().strip("$").strip()


def response_of(text: str) -> str:
    """A response that marks no answer is put in a box."""
    if "boxed" in text or "nswer" in text:
        return text
    return f"\\boxed{{{text.strip().strip('$')}}}"


# --------------------------------------------------------------------------------------------------
# speed
# --------------------------------------------------------------------------------------------------
def speed(name: str, data: str) -> dict:
    """Verdicts a second of two workers on a set's responses."""
    problems = load_problems(name, "test", data_dir=data)
    problems = (problems * (TIMED // len(problems) + 1))[:TIMED]
    texts = half_right(problems)
    verifier = Verifier(2)
    verifier(problems[:4], texts[:4])  # start the workers
    load = os.getloadavg()[0]
    start = time.perf_counter()
    verdicts = verifier(problems, texts)
    seconds = time.perf_counter() - start
    verifier.close()
    return {
        "verdicts": len(verdicts),
        "right": sum(verdict.reward for verdict in verdicts),
        "seconds": round(seconds, 2),
        "per_second": round(len(verdicts) / seconds),
        "load": round(load, 1),
    }


def half_right(problems: list[Problem]) -> list[str]:
    """A response to each problem; every second one has the answer of the problem before."""
    texts = []
    for i, problem in enumerate(problems):
        answer = problem.answer if i % 2 else problems[i - 1].answer
        texts.append(f"{problem.solution}\n\nThe answer is \\boxed{{{answer}}}.")
    return texts


# --------------------------------------------------------------------------------------------------
# cases written by an adversary
# --------------------------------------------------------------------------------------------------
def adversary(path: Path) -> None:
    """Judge the cases of a file again and write the verdicts into it.

    A case has the reference, the response, what a careful person says, the verdict before the
    rounds, the verdict now and, for a disagreement that stands, why.
    """
    found = json.loads(path.read_text())
    for case in found["cases"]:
        problem = as_problem({"question": "?", "answer": case["gold"]}, "adversary")
        case["now"] = int(judge(problem, case["text"]).reward)
        if case["now"] != case["careful"]:
            print(case)
    for entry in found["rounds"]:
        cases = [case for case in found["cases"] if case["round"] == entry["name"]]
        entry["cases"] = len(cases)
        entry["agree_now"] = sum(case["now"] == case["careful"] for case in cases)
        entry["paid_wrong_now"] = sum(case["now"] > case["careful"] for case in cases)
        print(entry)
    path.write_text(one_per_line(found))


def one_per_line(found: dict) -> str:
    """JSON with a line for each round and each case."""
    about = {name: value for name, value in found.items() if name not in ("rounds", "cases")}
    text = json.dumps(about, indent=1).removesuffix("\n}")
    rounds = ",\n".join(json.dumps(entry) for entry in found["rounds"])
    cases = ",\n".join(json.dumps(case, ensure_ascii=False) for case in found["cases"])
    return f'{text},\n "rounds": [\n{rounds}\n ],\n "cases": [\n{cases}\n ]\n}}\n'


if __name__ == "__main__":
    if sys.argv[1:2] == ["adversary"]:
        adversary(Path(sys.argv[2]))
    else:
        main(tyro.cli(Args))
