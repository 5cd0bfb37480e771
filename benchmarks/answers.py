"""How often mathematical answers are judged as they should be, and how fast.

    python benchmarks/answers.py --data_dir data                # writes results/verifiers/maths.json
    python benchmarks/answers.py adversary results/verifiers/adversary.json  # judges its cases again
    pip download --no-deps --no-binary :all: math-verify==0.9.0 # and unpack it, for --math_verify

Golds are judged against themselves in six written forms, and against every other gold of their set: a pair that
passes must have one value. Math-Verify's own tests (Apache-2.0, Hugging Face) are read from its source package; every
row that is judged differently here is listed. Speed: the same 10,000 responses through a pool of two workers.
"""
from __future__ import annotations

import ast
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import combinations, islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tyro

from common.tasks import load_problems
from common.tasks.kinds import as_problem
from common.verifiers.answers import final_answer
from common.verifiers.equality import compare, reading, same
from common.verifiers.pool import Verifier, judge

FORMS = {"boxed": "So \\boxed{%s}.", "hashes": "#### %s", "formula": "The answer is $%s$.", "prose": "The answer is %s.",
         "bold": "**Answer:** %s", "heading": "### Final Answer\n\n\\[%s\\]"}
PAIRS = 60_000  # of golds of one set, at most


@dataclass
class Args:
    data_dir: str  # folder with the public sets (SETS in common/tasks/sets.py)
    math_verify: str = ""  # folder of Math-Verify's source package, with its tests
    speed: bool = True  # time 10,000 responses
    out: str = "results/verifiers/maths.json"  # the result file


def golds_of(args: Args) -> dict[str, list[str]]:
    sets = {name: load_problems(name, data_dir=args.data_dir) for name in ("math500", "aime24")}
    sets["gsm8k"] = [p for split in ("train", "test") for p in load_problems("gsm8k", split, data_dir=args.data_dir)]
    amc = Path(args.data_dir) / "amc23" / "test.jsonl"
    if amc.exists():
        sets["amc23"] = load_problems(f"jsonl:{amc}")
    return {name: [p.answer for p in problems] for name, problems in sets.items()}


def themselves(golds: list[str]) -> dict:
    """Golds in each written form."""
    failed = {name: [g for g in golds if not compare(g, form % g)[1]] for name, form in FORMS.items()}
    texts = sorted({g for g in golds if reading(g) == "text"})
    return dict(golds=len(golds), passed={name: len(golds) - len(bad) for name, bad in failed.items()},
                failed={name: bad for name, bad in failed.items() if bad}, read_as_text_only=texts)


def each_other(golds: list[str]) -> dict:
    """Pairs of different golds of which one passes for the other."""
    different = sorted(set(golds))
    pairs = list(islice(combinations(different, 2), PAIRS))
    passed = [pair for pair in pairs if same(*pair) or same(*pair[::-1])]
    return dict(pairs=len(pairs), passed=len(passed), which=passed)


def rows_of(path: Path):
    """(gold, response, expected) of the parametrised tests in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or len(node.args) != 2 or not isinstance(node.args[0], ast.Constant):
            continue
        names = str(node.args[0].value).replace(" ", "").split(",")
        try:
            rows = ast.literal_eval(node.args[1])
        except ValueError:
            continue
        if not isinstance(rows, list):
            continue
        for row in (dict(zip(names, row)) for row in rows if isinstance(row, tuple)):
            if "gold" in row and "pred" in row:
                yield row["gold"], row["pred"], bool(row.get("expected", row.get("result")))


def suite(folder: Path) -> dict:
    """Math-Verify's tests. A response that marks no answer is put in a box."""
    count, differs = 0, []
    for path in sorted((folder / "tests").glob("test_*.py")):
        for gold, text, expected in rows_of(path):
            count += 1
            reference = (final_answer(gold) if "boxed" in gold else None) or gold.strip().strip("$").strip()
            marked = "boxed" in text or "nswer" in text
            response = text if marked else f"\\boxed{{{text.strip().strip('$')}}}"
            if compare(reference, response)[1] != expected:
                differs.append(dict(gold=gold[-100:], response=text[-100:], expected=expected, file=path.name))
    wrong = [row for row in differs if not row["expected"]]
    return dict(licence="Apache-2.0, Hugging Face", rows=count, agree=count - len(differs),
                paid_here_only=wrong, paid_there_only=[row for row in differs if row["expected"]])


def speed(args: Args) -> dict:
    """Verdicts a second of two workers, half right and half wrong."""
    found = {}
    for name in ("gsm8k", "math500"):
        problems = load_problems(name, "test", data_dir=args.data_dir)
        problems = (problems * (10_000 // len(problems) + 1))[:10_000]
        answers = [p.answer if i % 2 else problems[i - 1].answer for i, p in enumerate(problems)]
        texts = [f"{p.solution}\n\nThe answer is \\boxed{{{a}}}." for p, a in zip(problems, answers)]
        verifier = Verifier(2)
        verifier(problems[:4], texts[:4])
        load, start = os.getloadavg()[0], time.perf_counter()
        verdicts = verifier(problems, texts)
        seconds = time.perf_counter() - start
        verifier.close()
        found[name] = dict(verdicts=len(verdicts), right=sum(v.reward for v in verdicts), seconds=round(seconds, 2),
                           per_second=round(len(verdicts) / seconds), load=round(load, 1))
    return found


def main(args: Args) -> None:
    golds = golds_of(args)
    result = dict(themselves={name: themselves(g) for name, g in golds.items()},
                  each_other={name: each_other(g) for name, g in golds.items()})
    if args.math_verify:
        result["math_verify_tests"] = suite(Path(args.math_verify))
    if args.speed:
        result["speed"] = speed(args)
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    result |= dict(command="python benchmarks/answers.py " + " ".join(sys.argv[1:]), processors=os.cpu_count(),
                   commit=subprocess.run(git, capture_output=True, text=True).stdout.strip(), python=platform.python_version())
    Path(args.out).write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(result.get("speed"), indent=1))


def adversary(path: Path) -> None:
    """Judge the cases of a file again and write the verdicts into it. A case has the reference, the response, what a
    careful person says, the verdict before the rounds, the verdict now and, for a disagreement that stands, why."""
    found = json.loads(path.read_text())
    counts = {entry["name"]: [0, 0, 0] for entry in found["rounds"]}  # cases, agree, wrong ones that are paid
    for case in found["cases"]:
        problem = as_problem(dict(question="?", answer=case["gold"]), "adversary")
        case["now"] = int(judge(problem, case["text"]).reward)
        same = case["now"] == case["careful"]
        count = counts[case["round"]]
        count[0], count[1], count[2] = count[0] + 1, count[1] + same, count[2] + (case["now"] > case["careful"])
        if not same:
            print(case)
    for entry in found["rounds"]:
        entry["cases"], entry["agree_now"], entry["paid_wrong_now"] = counts[entry["name"]]
        print(entry)
    lines = [json.dumps(case, ensure_ascii=False) for case in found["cases"]]
    rounds = [json.dumps(entry) for entry in found["rounds"]]
    head = json.dumps({name: value for name, value in found.items() if name not in ("rounds", "cases")}, indent=1)[:-2]
    path.write_text(head + ',\n "rounds": [\n' + ",\n".join(rounds) + '\n ],\n "cases": [\n' + ",\n".join(lines) + "\n ]\n}\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["adversary"]:
        adversary(Path(sys.argv[2]))
    else:
        main(tyro.cli(Args))
