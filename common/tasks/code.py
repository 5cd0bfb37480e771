"""Code: a program that must pass tests.

A record's tests become Python source that calls the program's functions. A problem's `meta` has
what verifiers/sandbox.py runs: `tests`, the `names` of the functions, `setup` (runs before the
tests) and `prelude` (runs before the program). For a script, `script` is set.
"""
from __future__ import annotations

import ast
import base64
import json
import pickletools
import zlib
from typing import NamedTuple

from common.tasks.problem import Problem
from common.tasks.records import Record
from common.verifiers import BadProblem, Verdict
from common.verifiers.answers import last_program
from common.verifiers.sandbox import Child, run_functions

INSTRUCTION = (
    "Put the whole program in one ```python block. Only the standard library is there."
)
MAX_FAILURES = 2  # failing tests in feedback
MALFORMED = (  # what a record that is not of its form raises
    LookupError, AttributeError, StopIteration, ValueError, TypeError, SyntaxError, zlib.error,
)


class Form(NamedTuple):
    """What a record of code says: the question, a solution if there is one, and the tests."""

    user: str
    solution: str | None
    meta: dict


def from_record(record: Record) -> Problem:
    """The problem of a record of one of the four forms. Raises SystemExit if it is of none."""
    try:
        form = read_form(record.data, record.question)
    except MALFORMED as error:
        reason = f"{type(error).__name__}: {error}"
        raise SystemExit(f"error: {record.where}: its tests cannot be read ({reason})") from None
    user = f"{form.user}\n\n{INSTRUCTION}"
    return record.problem("code", user, None, form.solution, **form.meta)


def read_form(data: dict, question: str) -> Form:
    if "test_list" in data:
        return mbpp(data, question)
    if "entry_point" in data:
        return humaneval(data, question)
    if "input_output" in data:
        return apps(data, question)
    if "public_test_cases" in data:
        return livecodebench(data, question)
    raise ValueError("no field test_list, entry_point, input_output or public_test_cases")


def fenced(code: str) -> str:
    return f"```python\n{code}\n```"


# --------------------------------------------------------------------------------------------------
# assert tests
# --------------------------------------------------------------------------------------------------
def mbpp(data: dict, question: str) -> Form:
    """MBPP: assert statements, and a solution whose functions they call."""
    tree, tests = ast.parse(data["code"]), data["test_list"]
    imports, used, names = [], set(), []
    for node in ast.walk(ast.parse("\n".join(tests))):
        if isinstance(node, ast.Name):
            used.add(node.id)
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            imports.append(ast.unparse(node))
        if isinstance(node, ast.FunctionDef) and node.name in used:
            names.append(node.name)
    if not names:
        raise ValueError("no test calls a function of the solution")
    prelude = "\n".join(data.get("test_imports", []))
    setup = "\n".join([prelude, *imports])
    user = f"{question}\n\nIt must pass this test and others like it:\n{fenced(tests[0])}"
    meta = {"names": names, "tests": tests, "prelude": prelude, "setup": setup}
    return Form(user, fenced(data["code"]), meta)


def humaneval(data: dict, question: str) -> Form:
    """HumanEval: a function to complete, and a function `check` that tests it."""
    name = data["entry_point"]
    stub = f"{question}    pass\n"  # program and tests both use the prompt's helper functions
    tests = [f"{data['test']}\ncheck({name})"]
    meta = {"names": [name], "tests": tests, "prelude": stub, "setup": stub}
    solution = fenced(question + data["canonical_solution"])
    return Form(f"Complete this function:\n{fenced(question)}", solution, meta)


# --------------------------------------------------------------------------------------------------
# contests: scripts, or functions whose arguments and results are JSON
# --------------------------------------------------------------------------------------------------
FUNCTION_SETUP = """
inf, nan = float("inf"), float("nan")  # JSON may hold them, but has no tuples
def as_lists(x):
    return [as_lists(v) for v in x] if isinstance(x, (list, tuple)) else x
"""
SCRIPT_SETUP = """
import re
from decimal import Decimal
def words(text):  # line by line, numbers by value, as contests compare
    number = re.compile("-?[0-9]{1,40}([.][0-9]{1,40})?")
    as_value = lambda word: Decimal(word) if number.fullmatch(word) else word
    return [[as_value(word) for word in line.split()] for line in text.strip().splitlines()]
"""


def apps(data: dict, question: str) -> Form:
    """APPS. Some of its expected results are in a list of one."""
    cases = json.loads(data["input_output"])
    name, inputs, outputs = cases.get("fn_name"), cases["inputs"], cases["outputs"]
    check_cases(inputs, outputs)
    if not name:
        return contest(data, question, scripts(inputs, outputs))
    accepted = []
    for output in outputs:
        accepted.append([output])
        if isinstance(output, list) and len(output) == 1:
            accepted[-1].append(output[0])
    return contest(data, question, calls(name, inputs, accepted))


def livecodebench(data: dict, question: str) -> Form:
    """LiveCodeBench. Its private tests are JSON, perhaps pickled and compressed."""
    private = data["private_test_cases"]
    if not private.startswith("["):
        # the opcodes of the pickle are read, not run
        opcodes = pickletools.genops(zlib.decompress(base64.b64decode(private)))
        private = next(value for _, value, _ in opcodes if isinstance(value, str))
    cases = [*json.loads(data["public_test_cases"]), *json.loads(private)]
    name = json.loads(data["metadata"]).get("func_name")
    inputs = [case["input"] for case in cases]
    outputs = [case["output"] for case in cases]
    check_cases(inputs, outputs)
    if not name:
        return contest(data, question, scripts(inputs, outputs))
    arguments = [[json.loads(line) for line in text.split("\n")] for text in inputs]
    accepted = [[json.loads(text)] for text in outputs]
    return contest(data, question, calls(name, arguments, accepted))


def check_cases(inputs: list, outputs: list) -> None:
    if not inputs or len(inputs) != len(outputs):
        raise ValueError(f"{len(inputs)} inputs, {len(outputs)} outputs")


def contest(data: dict, question: str, meta: dict) -> Form:
    starter = data.get("starter_code")
    how = "The program reads standard input and writes standard output."
    if starter:
        how = f"Start from this code:\n{fenced(starter)}"
    solutions = json.loads(data.get("solutions") or "[]")
    solution = next(map(fenced, solutions), None)
    return Form(f"{question}\n\n{how}", solution, meta)


def scripts(inputs: list, outputs: list) -> dict:
    """Tests of what a script prints. A text may be a list of its lines."""
    tests = []
    for given, expected in zip(map(joined, inputs), map(joined, outputs)):
        tests.append(f"assert words(script({given!r})) == words({expected!r})")
    return {
        "script": True, "names": ["script"], "tests": tests, "prelude": "", "setup": SCRIPT_SETUP,
    }


def joined(text: str | list[str]) -> str:
    if isinstance(text, list):
        return "\n".join(text)
    return text


def calls(name: str, arguments: list[list], accepted: list[list]) -> dict:
    """Tests of what a function returns for each list of arguments."""
    tests = []
    for given, right in zip(arguments, accepted):
        tests.append(f"assert as_lists({name}(*{given!r})) in {right!r}")
    return {
        "names": [name], "tests": tests, "prelude": "from typing import *", "setup": FUNCTION_SETUP,
    }


# --------------------------------------------------------------------------------------------------
# the judge
# --------------------------------------------------------------------------------------------------
def judge(problem: Problem, text: str, driver: Child, *, limit: float, unsafe: bool,
          reveal: bool) -> Verdict:
    """1 if the last program passes every test. Feedback has the error, the timeout, or the first
    failing calls with arguments and result.

    driver: the process that runs the tests; limit: seconds for a call; unsafe: without bubblewrap;
    reveal: feedback has the failed tests too. Raises BadProblem if a test cannot be run.
    """
    program = last_program(text)
    if program is None:
        return Verdict(0.0, "There is no program; it belongs in a closed ```python block.")
    try:
        results = run_functions(driver, program, problem.meta, limit=limit, unsafe=unsafe)
    except ValueError as error:
        raise BadProblem(f"its tests cannot be run: {error}") from None
    failures = []
    for result, test in zip(results, problem.meta["tests"]):
        if result and reveal:
            result += f"\nThe test: {test[:2000]}"
        if result:
            failures.append(result)
    if failures:
        return Verdict(0.0, "\n".join(failures[:MAX_FAILURES]))
    return Verdict(1.0)
