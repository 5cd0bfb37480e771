"""Verdicts: what is right scores 1, near misses score 0, and nothing that a model writes breaks a verifier."""
import base64
import inspect
import json
import os
import pickle
import re
import signal
import threading
import time
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_sandbox import bubblewrap_works

from common.tasks import Problem, gym, load_problems
from common.tasks.chain import chain_problem
from common.tasks.kinds import as_problem
from common.tasks.programs import last_program
from common.verifiers import Verdict
from common.verifiers.pool import Verifier
from common.verifiers.thoughts import final_part

DATA = os.environ.get("SDVR_DATA", "")
RESTARTS = ("Once more:", "Wait, this is wrong. Let me start over.", "Wait,")  # one begins another
needs_data = pytest.mark.skipif(not DATA, reason="SDVR_DATA does not name a folder with the public sets")


@pytest.fixture(scope="module")
def verifier():
    v = Verifier(workers=2, limit=5, allow_unsafe_exec=not bubblewrap_works(), restarts=RESTARTS)
    yield v
    v.close()


def record(**fields) -> Problem:
    return as_problem(fields, "fixture", "", None)


def rewards(verifier, problem: Problem, *texts: str) -> list[float]:
    return [v.reward for v in verifier([problem] * len(texts), texts)]


# ---------------------------------------------------------------------------------------------------------------------
# which part of a response counts
# ---------------------------------------------------------------------------------------------------------------------
def test_only_what_follows_the_thinking_counts(verifier):
    five = record(question="2 + 3?", answer="5")
    assert rewards(verifier, five, r"<think>\boxed{6}</think> \boxed{5}", r"<think>\boxed{5}</think> \boxed{6}",
                   r"<think>\boxed{5}</think> I do not know.", r"<think>so it is \boxed{5}") == [1, 0, 0, 0]


@pytest.mark.parametrize("phrase", RESTARTS)
def test_a_restarted_response_is_judged_by_its_last_attempt(verifier, phrase):
    five = record(question="2 + 3?", answer="5")
    first, second = r"I think \boxed{6}.", r"It is \boxed{5}."
    assert rewards(verifier, five, f"{first}\n\n{phrase}\n\n{second}", f"{second}\n\n{phrase}\n\n{first}",
                   f"{second}\n\n{phrase}\n\nI give up.") == [1, 0, 0]
    assert rewards(verifier, chain_problem((10, 20, 30)), f"10+20=31; #### 61\n\n{phrase}\n\n10+20=30; #### 60",
                   f"#### 60\n\n{phrase}\n\n#### 61") == [1, 0]


def test_the_last_closed_block_is_the_program():
    assert last_program("```python\na\n```\ntext\n```\nb\n```") == "b\n"
    assert last_program("```python\na\n```\nand then ```python\nunfinished") == "a\n"
    assert last_program("a = 1") is None and last_program("```python\na = 1") is None
    assert last_program("```py\nx = '''\n'''\n```") == "x = '''\n'''\n"


# ---------------------------------------------------------------------------------------------------------------------
# maths
# ---------------------------------------------------------------------------------------------------------------------
def test_a_gold_that_cannot_be_read_is_an_error_that_names_the_problem(verifier):
    bad = record(question="What is it?", answer=r"\boxed{}")
    with pytest.raises(SystemExit, match=f"problem {bad.id}: the reference answer"):
        verifier([bad], [r"\boxed{1}"])
    with pytest.raises(SystemExit, match=bad.id):
        verifier.check([record(question="?", answer="5"), bad])


SLOW = r"\boxed{\int_0^1 \frac{\ln(1+x+x^2+x^3)}{\sqrt{1+x^5}} dx}"  # takes sympy minutes


def test_a_check_that_hangs_or_dies_is_a_verdict_of_its_own_and_the_pool_survives():
    v = Verifier(workers=2, limit=1)
    try:
        five = record(question="2 + 3?", answer="5")
        assert v([five], [r"\boxed{5}"])[0].reward == 1
        start = time.monotonic()
        slow = v([record(question="?", answer="0")], [SLOW])[0]
        assert slow.reward == 0 and time.monotonic() - start < 5
        assert not v.spare["math"] and v([five], [r"\boxed{5}"])[0].reward == 1
        killed = v.spare["math"][0].process.pid
        threading.Timer(0.2, os.kill, (killed, signal.SIGKILL)).start()  # in the middle of a check
        lost = v([record(question="?", answer="0")], [SLOW])[0]
        assert lost.reward == 0 and lost.feedback == "The check ended before it answered."
        assert [x.reward for x in v([five] * 4, [r"\boxed{5}"] * 4)] == [1] * 4
    finally:
        v.close()


def test_processes_that_die_between_checks_are_replaced_and_cost_no_reward():
    v, five = Verifier(workers=2), record(question="2 + 3?", answer="5")
    try:
        assert v([five] * 4, [r"\boxed{5}"] * 4)[0].reward == 1
        old = {child.process.pid for child in v.spare["math"]}
        for pid in old:
            os.kill(pid, signal.SIGKILL)
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert [x.reward for x in v([five] * 4, [r"\boxed{5}"] * 4)] == [1] * 4
        new = {child.process.pid for child in v.spare["math"]}
        assert not new & old
        for pid in new:  # a scheduler stops all processes of a job; the step in progress still needs its verdicts
            os.kill(pid, signal.SIGTERM)
        assert [x.reward for x in v([five] * 4, [r"\boxed{5}"] * 4)] == [1] * 4
        assert {child.process.pid for child in v.spare["math"]} & new
    finally:
        v.close()


# ---------------------------------------------------------------------------------------------------------------------
# multiple choice, tool calls, generated tasks
# ---------------------------------------------------------------------------------------------------------------------
CHOICE = dict(kind="mcq", prompt="Which is a metal?\n\nA: sulphur\nB: iron\nC: neon", answer="B", system="Pick one.")


def test_multiple_choice_takes_the_letter_of_the_last_answer_block_alone(verifier):
    problem = record(**CHOICE)
    assert problem.messages[0] == {"role": "system", "content": "Pick one."} and problem.kind == "choice"
    right = ["<reasoning>iron</reasoning>\n<answer>\nB\n</answer>", "<answer>A</answer> no, <answer>B</answer>",
             "<reasoning>iron\n<answer>\nB\n</answer>"]
    wrong = ["<answer>A</answer>", "<answer>b</answer>", "<answer>B: iron</answer>", "<answer>(B)</answer>", "B",
             "<answer>B</answer><answer>C</answer>", "<answer>B", "<answer></answer>", "<answer>A B</answer>", ""]
    assert rewards(verifier, problem, *right) == [1] * 3 and rewards(verifier, problem, *wrong) == [0] * len(wrong)


TOOLS = dict(kind="tooluse", prompt="Show me a wild one and a white one.", answer=json.dumps([
    {"Action": "search", "Action_Input": '{"color": "wild", "page": 1}'},
    {"Action": "search", "Action_Input": '{"color": "white", "page": 2}'}]))


def calls(*pairs) -> str:
    return "\n".join(f"Thought: yes\nAction: {name}\nAction Input: {given}" for name, given in pairs)


def test_tool_calls_match_name_by_name_with_their_own_inputs(verifier):
    problem = record(**TOOLS)
    wild, white = ("search", '{"color": "wild", "page": 1}'), ("search", '{"page": 2, "color": "white"}')
    right = [calls(wild, white), calls(white, wild),
             calls(wild, ("search", '{"page": 2,\n "color": "white"}')) + "\nDone."]
    wrong = [calls(wild), calls(wild, white, white), calls(wild, wild), calls(("find", wild[1]), white),
             calls(("search", '{"color": "wild", "page": 2}'), ("search", '{"color": "white", "page": 1}')),  # swapped
             calls(wild, ("search", '{"page": "2", "color": "white"}')), calls(wild, ("search", "{page: 2}")),
             calls(wild, ("search", '{"page": 2, "color": "white", "size": ""}')), "Action: search", "", "[" * 10**5,
             "Action: rm\n" + calls(wild, white), calls(wild, white) + "\nAction: rm"]
    assert rewards(verifier, problem, *right) == [1] * 3 and rewards(verifier, problem, *wrong) == [0] * len(wrong)
    nested = record(kind="tooluse", prompt="?", answer='[{"Action": "a", "Action_Input": "{\\"x\\": {\\"y\\": {}}}"}]')
    assert rewards(verifier, nested, calls(("a", '{"x": {"y": {}}}')), calls(("a", '{"x": {}}'))) == [1, 0]
    with pytest.raises(SystemExit, match="not a list of calls"):
        verifier.check([record(kind="tooluse", prompt="?", answer="search")])


def test_a_generated_task_is_scored_by_its_own_scorer(verifier):
    problems = gym.problems("basic_arithmetic", 4)
    assert rewards(verifier, problems[0], f"<answer>{problems[0].answer}</answer>", problems[0].answer) == [1, 0]
    broken = Problem("broken", [], kind="gym", meta={"gym": "basic_arithmetic", "entry": None})
    assert verifier([broken], ["<answer>1</answer>"])[0].feedback.startswith("The check failed (")
    partial = [v.reward for p in problems for v in verifier([p], ["<answer>no number</answer>"])]
    assert all(0 <= r < 1 for r in partial)


def test_scorers_that_run_answers_as_python_need_consent():
    """The names are those of the installed library's scorers that hand an answer to eval or to sympy's parser."""
    from reasoning_gym.factory import DATASETS

    run = re.compile(r"\b(?:eval|exec|parse_expr)\((?!entry)[^)]*\banswer")
    found = {name for name, (kind, _) in DATASETS.items() if run.search(inspect.getsource(inspect.getmodule(kind.score_answer)))}
    assert found == gym.EVALUATED
    problem = Problem("p", [], kind="gym", meta={"gym": "countdown", "entry": {}})
    careful, trusting = Verifier(1), Verifier(1, allow_unsafe_exec=True)
    with pytest.raises(SystemExit, match=r"scorer of countdown runs answers as Python.*--allow_unsafe_exec"):
        careful.check([problem])
    trusting.check([problem])
    careful.close()
    trusting.close()


# ---------------------------------------------------------------------------------------------------------------------
# code
# ---------------------------------------------------------------------------------------------------------------------
MBPP = dict(task_id=700, prompt="Write a function that gives the length of the hypotenuse.",
            test_imports=["import math"], code="import sys\ndef hyp(a, b):\n    return (a * a + b * b) ** 0.5\n"
                                               "def is_big(x):\n    return x > 9",
            test_list=["assert math.isclose(hyp(3, 4), 5.0, rel_tol=0.001)", "assert is_big(12)",
                       "assert not is_big(2)", "assert {hyp(6, 8)} == {10.0} and sys.maxsize > 0"])
HUMANEVAL = dict(task_id="X/0", entry_point="twice", canonical_solution="    return helper(x) + x\n",
                 prompt='from typing import List\n\ndef helper(x: int) -> int:\n    return x\n\n'
                        'def twice(x: int) -> int:\n    """Twice x.\n    >>> twice(2)\n    4\n    """\n',
                 test="def check(candidate):\n    import random\n    for _ in range(20):\n"
                      "        n = random.randint(0, 99)\n        assert candidate(n) == helper(n) * 2, 'twice'\n"
                      "    assert abs(candidate(0.5) - 1) < 1e-6\n")
STDIN = dict(question_content="Add the numbers of each line.", starter_code="", metadata="{}", question_title="sum",
             public_test_cases=json.dumps([{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]),
             private_test_cases=base64.b64encode(zlib.compress(pickle.dumps(json.dumps(
                 [{"input": "5 6\n1 1\n", "output": "11\n2\n", "testtype": "stdin"}])))).decode())
SOLUTION = dict(question_content="Give the pairs.", starter_code="class Solution:\n    def pairs(self, n, s: str):",
                metadata=json.dumps({"func_name": "pairs"}),
                public_test_cases=json.dumps([{"input": "2\n\"a\"", "output": "[[0, \"a\"], [1, \"a\"]]"}]),
                private_test_cases=json.dumps([{"input": "0\n\"b\"", "output": "[]"}]))
APPS = dict(question="Double it.", starter_code="", solutions='["def f(x): return x * 2"]', input_output=json.dumps(
    {"fn_name": "f", "inputs": [[2], [[1]]], "outputs": [[4], [[1, 1]]]}))
APPS_STDIN = dict(question="Double it.", starter_code="", solutions="", input_output=json.dumps(
    {"inputs": ["2\n"], "outputs": ["4\n"]}))
CODE = {  # record, right programs, wrong programs
    "mbpp": (MBPP, [MBPP["code"]], ["def hyp(a, b): return 5.0\ndef is_big(x): return True", "hyp = 1"]),
    "humaneval": (HUMANEVAL, [HUMANEVAL["prompt"] + HUMANEVAL["canonical_solution"],
                              "def twice(x: List): return 2 * x"],
                  ["def twice(x): return 4", "def helper(x): return 0\ndef twice(x): return 0", "pass"]),
    "stdin": (STDIN, ["import sys\nfor line in sys.stdin: print(sum(map(int, line.split())))"],
              ["print(3)", "input()"]),
    "solution": (SOLUTION, ["class Solution:\n    def pairs(self, n: int, s: str) -> List[tuple]:\n"
                            "        return [(i, s) for i in range(n)]"],
                 ["class Solution:\n    def pairs(self, n, s): return []", "def other(): pass"]),
    "apps": (APPS, ["def f(x): return x * 2", "class Solution:\n    def f(self, x): return x + x"],
             ["def f(x): return x"]),
    "apps stdin": (APPS_STDIN, ["print(int(input()) * 2.0)"], ["print(2)"]),
}


@pytest.mark.parametrize("form", CODE)
def test_code_passes_all_tests_or_fails(verifier, form):
    fields, right, wrong = CODE[form]
    problem = record(**fields)
    assert problem.kind == "code" and problem.answer is None
    assert rewards(verifier, problem, *(f"```python\n{p}\n```" for p in right)) == [1] * len(right)
    assert rewards(verifier, problem, *(f"```python\n{p}\n```" for p in wrong)) == [0] * len(wrong)
    if problem.solution:
        assert rewards(verifier, problem, problem.solution) == [1]


def test_feedback_on_code_shows_calls_and_results_but_not_what_was_expected(verifier):
    tests = [f"assert f({i}) == {i + 1000}" for i in range(5)]
    problem = record(**{**MBPP, "code": "def f(x): pass", "test_list": tests})
    [verdict] = verifier([problem], ["```python\ndef f(x): return x\n```"])
    assert verdict.feedback == "f(0) returned 0\nf(1) returned 1"
    [verdict] = verifier([record(**STDIN)], ["```python\nprint(7)\n```"])
    assert verdict.feedback == "script('1 2\\n') returned '7\\n'\nscript('5 6\\n1 1\\n') returned '7\\n'"


def test_feedback_holds_the_right_answer_only_when_asked():
    v = Verifier(workers=1, limit=5, allow_unsafe_exec=not bubblewrap_works(), reveal=True)
    plain = Verifier(workers=1, limit=5, allow_unsafe_exec=not bubblewrap_works())
    cases = [(record(question="?", answer="7391"), r"\boxed{5}", "7391"), (record(**CHOICE), "<answer>A</answer>", "B"),
             (record(**TOOLS), calls(("search", "{}")), "white"), (chain_problem((70, 80, 23)), "#### 1", "173"),
             (record(**{**MBPP, "code": "def f(): pass", "test_list": ["assert f() == 7391"]}),
              "```\ndef f(): pass\n```", "7391")]
    try:
        for problem, text, secret in cases:
            assert secret in v([problem], [text])[0].feedback
            assert not re.search(rf"\b{secret}\b", plain([problem], [text])[0].feedback)
    finally:
        v.close()
        plain.close()


def test_a_pickle_among_the_tests_is_read_and_never_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    evil = base64.b64encode(zlib.compress(pickle.dumps(Evil()))).decode()
    with pytest.raises(SystemExit, match="fixture: its tests cannot be read"):
        record(**{**STDIN, "private_test_cases": evil})
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------------------------------------------------------------
# whatever a model writes
# ---------------------------------------------------------------------------------------------------------------------
MEGA = 10**6
NASTY = [
    "", "\0", "\0" * MEGA, "9" * MEGA, "(" * MEGA, "{" * MEGA, "\\boxed{" * (MEGA // 7), "$" * MEGA, "\n" * MEGA,
    "#" * MEGA, "#### " * (MEGA // 5), "####" + " " * MEGA, "<answer>" * (MEGA // 8), "</answer>" * (MEGA // 9),
    "```" * (MEGA // 3), "Action:" * (MEGA // 7), "Action: a\nAction Input: " * (MEGA // 24),
    "Action: a\nAction Input: " + "[" * MEGA, "Action: a" + "\n" * MEGA, "<think>" * (MEGA // 7),
    "1+1=2; " * (MEGA // 7), "\\boxed{" + "{" * 1000 + "}" * 1001,
    r"\boxed{9**9**9}", r"\boxed{9^{9^{9}}}", r"\boxed{10^{10^{10}}!}", r"\boxed{\frac{1}{0}}",
    r"\boxed{\int_0^\infty}",
    r"\boxed{" + "x+" * 900 + "}", r"\boxed{\sqrt[\sqrt[\sqrt[2]{3}]{4}]{5}", "\\" * MEGA, "\u202e\\boxed{5}\u202c",
    "\u0627\u0644\u062c\u0648\u0627\u0628 \\boxed{\u0665}", "\ud800", "\\boxed{\ud800}", "\U0001f600" * 1000,
    "<answer>9**9**9</answer>", "<answer>" + "9" * MEGA + "</answer>", "```python\n" + "(" * MEGA + "\n```",
    "```python\n\0\n```", "```python\n\ud800\n```", "```python\nhyp = lambda *a: 9 ** 9 ** 9\n```",
    "```python\n" + "-" * 10**5 + "1\n```", "```python\nx = " + "9" * MEGA + "\n```",
]
KINDS = {"chain": chain_problem((10, 20, 30)), "math": record(question="?", answer="5"), "choice": record(**CHOICE),
         "tool": record(**TOOLS), "gym": gym.problems("basic_arithmetic", 1)[0], "code": record(**MBPP),
         "script": record(**STDIN)}


def assert_verdict(verdict) -> None:
    assert type(verdict) is Verdict and isinstance(verdict.feedback, str) and len(verdict.feedback) < 5000
    assert type(verdict.reward) is float and 0 <= verdict.reward <= 1
    json.dumps([verdict.reward, verdict.feedback])


@pytest.mark.parametrize("kind", KINDS)
def test_nasty_text_gets_a_verdict_in_time(verifier, kind):
    start = time.monotonic()
    for verdict in verifier([KINDS[kind]] * len(NASTY), NASTY):
        assert_verdict(verdict)
    assert time.monotonic() - start < 60


pieces = st.sampled_from([
    "\\boxed{", "}", "{", "\\frac", "^", "_", "$", "\\[", "\\text{", "9", "-1", "x", "=", ",", "\\sqrt", "\\pi",
    "\\infty", "#### ", "<answer>", "</answer>", "<think>", "</think>", "Action: ", "\nAction Input: ", '{"a": 1}',
    "```python\n", "\n```\n", "def hyp(a, b):\n    return 5.0\n", "print(3)\n",
    "10+20=30; ", "%", "\\cup", "(1,2)", "[",
    "\u202e", "\0", RESTARTS[0], "!", "e", "i"])


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(st.characters(exclude_categories=[])) | st.lists(pieces, max_size=12).map("".join))
@example(text="\ud800")
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_text_gets_a_verdict(verifier, kind, text):
    [verdict] = verifier([KINDS[kind]], [text])
    assert_verdict(verdict)


@given(st.text(), st.text())
def test_what_counts_is_a_tail_of_the_response(a, b):
    assert (a + b).endswith(final_part(a + b, RESTARTS))


# ---------------------------------------------------------------------------------------------------------------------
# the public sets, where they are at hand
# ---------------------------------------------------------------------------------------------------------------------
ALTERED = """
def _alter(x):
    if isinstance(x, bool) or x is None:
        return not x
    if isinstance(x, (int, float, complex)):
        return 2 * x + 1
    if isinstance(x, str):
        return x + "~" if x else "~"
    if isinstance(x, (list, tuple)):
        return type(x)([*x, 987654])
    if isinstance(x, set):
        return x | {987654}
    if isinstance(x, dict):
        return {**x, 987654: 987654}
    return None
def _wrap(f):
    return lambda *a, **k: _alter(f(*a, **k))
"""


@needs_data
def test_every_mbpp_solution_passes_and_altered_it_fails(verifier):
    problems = load_problems(f"json:{DATA}/mbpp/sanitized-mbpp.json")
    assert len(problems) == 427
    verdicts = verifier(problems, [p.solution for p in problems])
    assert [p.meta["names"] for p, v in zip(problems, verdicts) if v.reward < 1] == []
    wrapped = ["".join(f"{name} = _wrap({name})\n" for name in p.meta["names"]) for p in problems]
    altered = [f"{p.solution.removesuffix('```')}{ALTERED}{w}```" for p, w in zip(problems, wrapped)]
    verdicts = verifier(problems, altered)
    assert [p.meta["names"] for p, v in zip(problems, verdicts) if v.reward > 0] == []


@needs_data
def test_every_math500_gold_equals_itself_and_its_worked_solution(verifier):
    problems = load_problems("math500", data_dir=DATA)
    assert len(problems) == 500
    verifier.check(problems)
    assert sum(rewards_of(verifier, problems, [p.solution for p in problems])) == 500


@needs_data
def test_gsm8k_and_aime_golds(verifier):
    gsm8k, aime = load_problems("gsm8k", data_dir=DATA), load_problems("aime24", data_dir=DATA)
    assert all(rewards_of(verifier, gsm8k, [p.solution for p in gsm8k]))
    problems = gsm8k[:200] + aime
    values = [int(p.answer.replace(",", "")) for p in problems]
    assert all(rewards_of(verifier, problems, [f"It is \\boxed{{{value}}}." for value in values]))
    assert not any(rewards_of(verifier, problems, [f"#### {value + 1}" for value in values]))


@needs_data
def test_sciknoweval_and_toolalpaca_golds(verifier):
    problems = [p for s in ("biology", "chemistry", "material", "physics")
                for p in load_problems(f"sciknoweval/{s}", data_dir=DATA)]
    assert len(problems) == 434 and {p.kind for p in problems} == {"choice"}
    assert all(rewards_of(verifier, problems, [f"<answer>\n{p.answer}\n</answer>" for p in problems]))
    others = [next(c for c in "ABCD" if c != p.answer) for p in problems]
    assert not any(rewards_of(verifier, problems, [f"<answer>{c}</answer>" for c in others]))
    tools = load_problems("toolalpaca", data_dir=DATA)
    golds = [[(c["Action"], c["Action_Input"]) for c in json.loads(p.answer)] for p in tools]
    assert len(tools) == 68 and all(rewards_of(verifier, tools, [calls(*g) for g in golds]))
    assert not any(rewards_of(verifier, tools, [calls(*g, g[0]) for g in golds]))
    assert not any(rewards_of(verifier, tools, [calls((f"{g[0][0]}s", g[0][1]), *g[1:]) for g in golds]))
    assert not any(rewards_of(verifier, tools, [calls((g[0][0], '{"other": 1}'), *g[1:]) for g in golds]))


def rewards_of(verifier, problems: list[Problem], texts: list[str]) -> list[float]:
    return [v.reward for v in verifier(problems, texts)]


@needs_data
def test_every_humaneval_solution_passes(verifier):
    if not (Path(DATA) / "humaneval").is_dir():
        pytest.skip("no humaneval folder under SDVR_DATA")
    problems = load_problems("humaneval", data_dir=DATA)
    assert len(problems) == 164 and all(rewards_of(verifier, problems, [p.solution for p in problems]))
