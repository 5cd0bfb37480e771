"""Programs and their tests: which block of a response is the program, and what of each layout is judged right."""
import re

import pytest
from test_sandbox import bubblewrap_works

from common.tasks import Problem, code
from common.tasks.contests import SCRIPT_SETUP
from common.tasks.kinds import as_problem
from common.tasks.programs import last_program
from common.verifiers.pool import Verifier

F = "def f():\n    return 1\n"


@pytest.fixture(scope="module")
def verifier():
    v = Verifier(workers=2, limit=5, allow_unsafe_exec=not bubblewrap_works())
    yield v
    v.close()


def judged(verifier, problem: Problem, *programs: str):
    return verifier([problem] * len(programs), [code.fenced(program) for program in programs])


def rewards(verifier, problem: Problem, *programs: str) -> list[float]:
    return [v.reward for v in judged(verifier, problem, *programs)]


# ---------------------------------------------------------------------------------------------------------------------
# which block is the program
# ---------------------------------------------------------------------------------------------------------------------
DOC = 'def f():\n{0}"""\n{0}```\n{0}f()\n{0}```\n{0}"""\n{0}return 1\n'


@pytest.mark.parametrize("text, program", [
    (f"```python\n{F}```", F), (f"~~~py\n{F}~~~", F), (f"````\n{F}````", F), (f"```python\n{F}``````  ", F),
    ("```python\r\ndef f():\r\n    return 1\r\n```\r\n", F), (f"<answer>\n```python\n{F}```\n</answer>", F),
    ("1. So:\n   ```python\n   def f():\n       return 1\n   ```\n2. Done.", F), ("> ```\n> def f():\n>     return 1\n> ```", F),
    ("- So:\n\n    ```python\n    def f():\n        return 1\n    ```\n", F),
    ("1. So:\n   ```python\ndef f():\n    return 1\n   ```\n", F),  # less indented than its fence
    (f"So: ```python\n{F}```", F), ("```python\ndef f():\n    return 1```", F),
    (f"```python\n{F}```\nOutput:\n```\n1\n```", F), (f"```python\n{F}```\nUse:\n```python\nprint(f())\n```", F),
    (f"```python\n{F}```\nRun\n```bash\npython f.py\n```", F), (f"```python\n{F}```\nand\n```python\ndef f(): retu", F),
    (f"```python\ndef f(): pass\n```\nBetter:\n```python\n{F}```", F),
    (f"```python\ndef f(:\n```\nBetter:\n```python\n{F}```", F), (f"```python\n{F}```\nbroken:\n```python\ndef f(:\n```", F),
    *((f"```python\n{DOC.format(' ' * n)}```\nDone.", DOC.format(" " * n)) for n in (1, 2, 4)),
    ("```python\nf = lambda: 1\n```\n```\n1\n```", "f = lambda: 1\n"),
    ("```python\nclass Solution:\n    def f(self): return 1\n```\n```\n1\n```", "class Solution:\n    def f(self): return 1\n"),
    ("```python\nimport math\n```", "import math\n"), ("```python\ndef f(:\n```", "def f(:\n"),  # the sandbox says what is wrong
    (F, None), (f"```python\n{F}", None), (f"    ```python\n    {F}", None), ("`f = 1`", None),
])
def test_the_last_block_that_is_a_program_is_taken(text, program):
    assert last_program(text, ["f"]) == program


@pytest.mark.parametrize("output", ["5", "Hello, world", "1 2 3", "[1, 2]", "x = 5", "True", "", "a: 1"])
def test_what_a_script_prints_is_no_program(output):
    script = "print(int(input()) + 1)\n"
    assert last_program(f"```python\n{script}```\nIt prints\n```\n{output}\n```") == script
    assert last_program(f"```python\n{script}```\nIt prints\n```text\n{output}\n```") == script


# ---------------------------------------------------------------------------------------------------------------------
# assert tests
# ---------------------------------------------------------------------------------------------------------------------
PAIR = "class Pair:\n    def __init__(self, a, b):\n        self.a, self.b = a, b\n"
MBPP = {  # as in the full set: the question is `text`
    "task_id": 601, "text": "Find the longest chain.", "challenge_test_list": [], "test_setup_code": "",
    "code": PAIR + "def width(pairs, n):\n    return max(p.b - p.a for p in pairs[:n])\n",
    "test_list": ["assert width([Pair(5, 24), Pair(15, 25)], 2) == 19", "assert (width([Pair(1, 2)], 1)) == 1"],
}
TREE = {
    **MBPP, "test_setup_code": "root = Node(1)\nroot.left = Node(2)\nroot.left.left = Node(7)",
    "code": "class Node:\n    def __init__(self, x):\n        self.x, self.left = x, None\n"
            "def height(node):\n    return 1 + height(node.left) if node else 0\n",
    "test_list": ["assert (height(root)) == 3", "assert height(root.left) == 2"],
}
STACK = {
    **MBPP, "code": "class Stack:\n    def __init__(self):\n        self.items = []\n    def push(self, x):\n"
                    "        self.items.append(x)\n    def pop(self):\n        return self.items.pop()\n",
    "test_list": ["s = Stack()\ns.push(3)\ns.push(4)\nassert s.pop() == 4\nassert s.pop() == 3", "assert Stack().items == []"],
}
LAMBDA = {**MBPP, "code": "twice = lambda x: 2 * x", "test_list": ["assert twice(3) == 6"]}
HIGHER = {**MBPP, "code": "def apply(f, x):\n    return f(x)",
          "test_list": ["assert apply(lambda x: x + 1, 3) == 4", "assert all(apply(abs, -i) == i for i in range(3))"]}
PLUS = {
    "task_id": 2, "prompt": "Scale.", "code": "def scale(xs):\n    return tuple(x / 3 for x in xs)", "test_imports": [],
    "source_file": "x", "test_list": ["assert scale((3, 6)) == (1.0, 2.0)"],
    "test": "import numpy as np\nfrom math import inf\n\ndef is_floats(x):\n    if isinstance(x, float):\n        return True\n"
            "    if isinstance(x, (list, tuple)):\n        return all(isinstance(i, float) for i in x)\n"
            "    if isinstance(x, np.ndarray):\n        return x.dtype == np.float64 or x.dtype == np.float32\n    return False\n\n"
            "def assertion(out, exp, atol):\n    exact_match = out == exp\n    if atol == 0 and is_floats(exp):\n"
            "        atol = 1e-6\n    if not exact_match and atol != 0:\n        assert np.allclose(out, exp, rtol=1e-07, atol=atol)\n"
            "    else:\n        assert exact_match, f'out: {out}, exp: {exp}'\n\n"
            "inputs = [[[1, 2]], [[]]]\nresults = [(0.33333333, 0.66666667), ()]\n"
            "for i, (inp, exp) in enumerate(zip(inputs, results)):\n    assertion(scale(*inp), exp, 0)\n",
}
HUMANEVAL_PLUS = {
    "task_id": "HumanEval/0", "prompt": "def half(x: float) -> float:\n    '''Half of x.'''\n", "entry_point": "half",
    "canonical_solution": "    return x / 2\n",
    "test": "import numpy as np\n\ndef check(candidate):\n    for inp, exp in zip([[3], [0.2]], [1.5, 0.1]):\n"
            "        out = candidate(*inp)\n        assert out == exp or np.allclose(out, exp, rtol=1e-07, atol=1e-6)\n",
}
KODCODE = {"question": "Add.", "solution": "def add(a, b):\n    return a + b", "test_info": [{"function_name": "add"}],
           "test": "from solution import add\n\ndef test_small():\n    assert add(1, 2) == 3\n\ndef test_negative():\n    assert add(-1, -2) == -3\n"}
ACECODE = {"id": "x", "question": "Add.", "test_cases": ["assert add(1, 2) == 3", "assert add(-1, -2) == -3"], "inferences": []}
ASSERTS = {"classes": MBPP, "set-up code": TREE, "a class": STACK, "a lambda": LAMBDA, "functions": HIGHER, "MBPP+": PLUS,
           "HumanEval+": HUMANEVAL_PLUS, "KodCode": KODCODE}
WRONG = """
def _wrong(f):
    def g(*a):
        x = f(*a)
        return (*x, 7) if isinstance(x, tuple) else x + 7
    return g
{0} = _wrong({0})
"""


@pytest.mark.parametrize("layout", ASSERTS)
def test_the_solution_passes_its_tests_and_an_altered_one_fails(verifier, layout):
    problem = as_problem(ASSERTS[layout], "here")
    solution = problem.solution.removeprefix("```python\n").removesuffix("\n```")
    name = problem.meta["wanted"][-1]
    altered = solution + WRONG.format(name)
    if layout == "a class":
        altered = solution.replace(".pop()", ".pop(0)")
    assert problem.kind == "code" and rewards(verifier, problem, solution, altered, "x = 1") == [1, 0, 0]


def test_without_a_solution_the_program_has_what_the_tests_call(verifier):
    problem = as_problem(ACECODE, "here")
    assert problem.solution is None and problem.meta["names"] == ["add"]
    assert rewards(verifier, problem, "def add(a, b): return a + b", "def add(a, b): return a - b") == [1, 0]


def test_feedback_is_bounded(verifier):
    problem = as_problem(ACECODE, "here")
    programs = ["def add(a, b): return 'x' * 10**6", "def add(a, b): raise ValueError('x' * 10**6)",
                "def add(a, b): print('x' * 10**6)", f"raise {'V' * 10**5}"]
    assert all(0 < len(v.feedback) < 3000 for v in judged(verifier, problem, *programs))


def test_classes_of_the_solution_are_there_and_a_program_may_have_its_own(verifier):
    problem = as_problem(MBPP, "here")
    assert "These classes are there:" in problem.messages[-1]["content"] and "class Pair" in problem.messages[-1]["content"]
    right = "def width(pairs, n):\n    return max(p.{1} - p.{0} for p in pairs[:n])\n"
    own = "class Pair:\n    def __init__(self, first, last):\n        self.first, self.last = first, last\n"
    assert rewards(verifier, problem, right.format("a", "b"), own + right.format("first", "last"),
                   "def width(pairs, n): return 1") == [1, 1, 0]
    shown = as_problem(STACK, "here").messages[-1]["content"]
    assert "These classes" not in shown  # the class is what is asked for


def test_the_feedback_on_a_moved_call_shows_the_call_and_no_expected_result(verifier):
    [verdict] = judged(verifier, as_problem(MBPP, "here"), "def width(pairs, n):\n    return 1")
    assert verdict.feedback.startswith("width([Pair(5, 24), Pair(15, 25)], 2) returned 1")
    assert not re.search(r"\b19\b", verdict.feedback)


def test_what_moves_with_a_call_is_no_expected_result():
    """The program's process sees arguments alone, whatever stands on the other side."""
    meta = as_problem(MBPP, "here").meta
    assert "19" not in meta["epilogue"] and "19" not in meta["prelude"] and meta["tests"][0] == "assert _case_0() == 19"


# ---------------------------------------------------------------------------------------------------------------------
# contests
# ---------------------------------------------------------------------------------------------------------------------
LCB = {"question_content": "?", "starter_code": "class Solution:\n    def search(self, a): ...", "metadata": '{"func_name": "search"}',
       "public_test_cases": '[{"input": "[3, 1]", "output": "1"}]', "private_test_cases": "[]"}
STDIN = {"question_content": "?", "starter_code": "", "metadata": "{}", "private_test_cases": "[]",
         "public_test_cases": '[{"input": "3 1", "output": "1"}]'}
METHOD = "class Solution:\n    def search(self, a: List[int]) -> int:\n        heapify(a)\n        return a[0]\n"
SCRIPT = "a = list(map(int, sys.stdin.read().split()))\nheapify(a)\nprint(a[0])\n"


def test_livecodebenchs_programs_have_what_its_harness_imports(verifier):
    """A function, a method whose name the harness imports too (re.search), a script; nobody else's programs have it."""
    assert rewards(verifier, as_problem(LCB, "here"), METHOD, METHOD.replace("a[0]", "a[1]")) == [1, 0]
    assert rewards(verifier, as_problem(STDIN, "here"), SCRIPT, "import sys\nfrom heapq import heapify\n" + SCRIPT) == [1, 1]
    apps = {"question": "?", "starter_code": "", "solutions": "", "input_output": '{"inputs": ["3 1"], "outputs": ["1"]}'}
    [verdict] = judged(verifier, as_problem(apps, "here"), SCRIPT)
    assert verdict.reward == 0 and "NameError" in verdict.feedback


def test_what_a_script_prints_is_compared_by_value_if_it_is_a_number_and_else_as_text():
    """Also as Python prints small and large floats. Digits after a leading zero are a text, such as a code of bits."""
    space: dict = {}
    exec(SCRIPT_SETUP, space)
    words = space["words"]
    for expected, *printed in (["2.50", "2.5"], ["3", "3.0"], ["0", "-0.0"], ["0.0000001", "1e-07"], ["1" + 21 * "0", "1e+21"]):
        assert all(words(text) == words(expected) for text in printed)
    for expected, printed in (("0110", "110"), ("07", "7"), ("-01", "-1"), ("100000", "1e5"), ("1 2", "12"), ("YES", "yes")):
        assert words(printed) != words(expected)


def test_an_integer_of_five_thousand_digits_is_a_test(verifier):
    huge = "9" * 5000
    record = {"question": "?", "starter_code": "", "solutions": "",
              "input_output": f'{{"fn_name": "f", "inputs": [[{huge}]], "outputs": [{huge[:-1]}8]}}'}
    assert rewards(verifier, as_problem(record, "here"), "def f(x): return x - 1", "def f(x): return x") == [1, 0]
