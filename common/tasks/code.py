"""Code: a program that must pass tests.

A record's tests become Python source that calls the program's functions. A problem's `meta` has
what verifiers/sandbox.py runs: `tests`, the `names` of the functions, `setup` (runs before the
tests) and `prelude` (runs before the program). For a script, `script` is set. asserts.py and
contests.py make them; programs.py finds the program in a response.
"""
from __future__ import annotations

import json
import zlib
from typing import NamedTuple

from common.tasks import contests
from common.tasks.asserts import assert_tests, check_tests, pytest_tests
from common.tasks.fields import Record
from common.tasks.problem import Problem
from common.tasks.programs import last_program
from common.verifiers import BadProblem, Verdict
from common.verifiers.sandbox import Child, run_functions

INSTRUCTION = (
    "Put the whole program in one ```python block. Only the standard library is there."
)
MAX_FAILURES = 2  # failing tests in feedback
MAX_FAILURE = 1000  # characters of what a failing test says
MALFORMED = (  # what a record that is not of its form raises
    LookupError, AttributeError, StopIteration, ValueError, TypeError, SyntaxError, RecursionError,
    MemoryError, zlib.error,
)


class Form(NamedTuple):
    """What a record of code says: the question, a solution if there is one, and the tests."""

    user: str
    solution: str | None
    meta: dict


def has_tests(data: dict) -> bool:
    """Whether a record is one of code."""
    if asserts(data) is not None or "entry_point" in data or is_kodcode(data):
        return True
    return contests.has_tests(data)


def asserts(data: dict) -> list | None:
    """The field with assert tests: MBPP's, or another list of such texts."""
    if "test_list" in data:
        return data["test_list"]
    for name in ("test_cases", "tests"):  # AceCode
        tests = data.get(name)
        if isinstance(tests, list) and tests and str(tests[0]).lstrip().startswith("assert"):
            return tests
    return None


def is_kodcode(data: dict) -> bool:
    return isinstance(data.get("test"), str) and "from solution import" in data["test"]


def from_record(record: Record) -> Problem:
    """The problem of a record of one of the forms. Raises BadRecord if it is of none."""
    try:
        form = read_form(record.data, record.question)
    except MALFORMED as error:
        reason = f"{type(error).__name__}: {error}"
        raise record.bad(f"its tests cannot be read ({reason:.300})") from None
    user = f"{form.user}\n\n{INSTRUCTION}"
    return record.problem("code", user, None, form.solution, **form.meta)


def read_form(data: dict, question: str) -> Form:
    if asserts(data) is not None:
        return mbpp(data, question)
    if "entry_point" in data:
        return humaneval(data, question)
    if is_kodcode(data):
        tests = pytest_tests(data["test"])
        how = f"The program defines {', '.join(tests.names)}."
        solution = fenced(data["solution"])
        return Form(f"{question}\n\n{how}", solution, meta_of(tests._asdict()))
    if contests.has_tests(data):
        return contest(data, question)
    raise ValueError("no field test_list, entry_point, input_output or public_test_cases")


def fenced(code: str) -> str:
    return f"```python\n{code}\n```"


def mbpp(data: dict, question: str) -> Form:
    """MBPP: assert statements, and perhaps a solution whose functions they call. MBPP+ has more
    tests in `test`."""
    code, shown = data.get("code") or "", asserts(data)
    more = [data[name] for name in ("test",) if data.get(name)]
    imports, setup = data.get("test_imports") or [], data.get("test_setup_code") or ""
    tests = assert_tests(code, [*shown, *more], imports, setup)
    user = f"{question}\n\nIt must pass this test and others like it:\n{fenced(shown[0])}"
    if setup.strip():
        user += f"\n\nBefore the tests, this runs:\n{fenced(setup)}"
    if tests.given:
        user += f"\n\nThese classes are there:\n{fenced(tests.given)}"
    solution = fenced(code) if code else None
    return Form(user, solution, meta_of(tests._asdict()))


def humaneval(data: dict, question: str) -> Form:
    """HumanEval: a function to complete, and a function `check` that tests it."""
    tests = check_tests(f"{question}    pass\n", data["entry_point"], data["test"])
    solution = fenced(question + data["canonical_solution"])
    return Form(f"Complete this function:\n{fenced(question)}", solution, meta_of(tests._asdict()))


def meta_of(tests: dict) -> dict:
    """What a problem keeps of its tests."""
    tests.pop("given")
    if not tests["epilogue"]:
        del tests["epilogue"], tests["calls"]
    return {**tests, "asserts": True}


def contest(data: dict, question: str) -> Form:
    """APPS, TACO, LiveCodeBench and others: what a script prints, or a function returns."""
    starter = data.get("starter_code")
    how = "The program reads standard input and writes standard output."
    meta = contests.tests(data)
    if starter:
        how = f"Start from this code:\n{fenced(starter)}"
    elif not meta.get("script"):
        how = f"The program defines the function {meta['names'][0]}."
    solutions = data.get("solutions") or "[]"
    if isinstance(solutions, str):
        solutions = json.loads(solutions)
    solution = next((fenced(text) for text in solutions if isinstance(text, str)), None)
    return Form(f"{question}\n\n{how}", solution, meta)


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
    meta = problem.meta
    program = last_program(text, meta.get("wanted", ()))
    if program is None:
        return Verdict(0.0, "There is no program; it belongs in a closed ```python block.")
    if "epilogue" in meta:
        program += "\n\n" + meta["epilogue"]
    try:
        results = run_functions(driver, program, meta, limit=limit, unsafe=unsafe)
    except ValueError as error:
        raise BadProblem(f"its tests cannot be run: {error}") from None
    failures = []
    for result, test in zip(results, meta["tests"]):
        for name, call in meta.get("calls", {}).items():
            result = result.replace(f"{name}()", call)
        result = result[:MAX_FAILURE]
        if result and reveal:
            result += f"\nThe test: {test[:2000]}"
        if result:
            failures.append(result)
    if failures:
        return Verdict(0.0, "\n".join(failures[:MAX_FAILURES]))
    return Verdict(1.0)
