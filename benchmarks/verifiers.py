"""How far the verifiers agree with the sets' own answers, and how fast and clean the sandbox is.

    python benchmarks/verifiers.py --data_dir data    # the sets found there

Rates: a gold judged against itself and against its worked solution should pass; against another
problem's gold, or altered, it should fail. Sandbox: programs per second, in turns with starts of a
bare interpreter (on a busy machine only the ratio counts), and what 5,000 runs leave behind. Writes
results/verifiers/rates.json.
"""
from __future__ import annotations

import contextlib
import gzip
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tyro

from common.tasks import Problem, load_problems
from common.tasks.kinds import as_problem
from common.verifiers.pool import Verifier
from common.verifiers.sandbox import bubblewrap, confined


@dataclass
class Args:
    data_dir: str  # folder with the public sets (SETS in common/tasks/sets.py)
    humaneval: str = ""  # HumanEval.jsonl.gz, if it is not in data_dir
    runs: int = 5000  # sandboxed programs in the leak test
    workers: int = 4  # verdicts at the same time
    out: str = "results/verifiers"  # folder of the result file


def main(args: Args) -> None:
    verifier = Verifier(args.workers)
    verifier([SHORT] * 8, [f"```\n{PROGRAMS['no import']}\n```"] * 8)  # start the workers
    result = {
        "start_up_ms": start_up(),
        "throughput": throughput(verifier, args.workers),
        "leaks": leaks(verifier, args.runs),
        "rates": rates(verifier, args),
    }
    verifier.close()
    text = json.dumps(result | provenance(), indent=1)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "rates.json").write_text(text + "\n")
    print(text)


def provenance() -> dict:
    folder = str(Path(__file__).parent)
    cpu = Path("/proc/cpuinfo").read_text().partition("model name\t: ")[2].partition("\n")[0]
    return {
        "command": "python benchmarks/verifiers.py " + " ".join(sys.argv[1:]),
        "commit": output_of("git", "-C", folder, "rev-parse", "--short", "HEAD"),
        "cpu": cpu,
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        "bwrap": output_of("bwrap", "--version"),
    }


def output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


# --------------------------------------------------------------------------------------------------
# rates
# --------------------------------------------------------------------------------------------------
GSM8K_NEAR_MISSES = {  # {0}: the gold
    "question quoted": 'The answer to "Is {0} or 1{0} larger?" is 1{0}.',
    "a choice": "The answer is {0} or 1{0}.",
    "in words": "The answer is the smaller of {0} and 1{0}.",
    "cut off": "So she has {0}",
}
ALTER = """
def _alter(x):
    if isinstance(x, bool) or x is None:
        return not x
    if isinstance(x, (int, float, complex)):
        return 2 * x + 1
    if isinstance(x, str):
        return x + "~"
    if isinstance(x, (list, tuple)):
        return type(x)([*x, 987654])
    if isinstance(x, set):
        return x | {987654}
    return {**x, 987654: 0} if isinstance(x, dict) else None
def _wrap(f):
    return lambda *a, **k: _alter(f(*a, **k))
"""


def rates(verifier: Verifier, args: Args) -> dict[str, dict]:
    data = args.data_dir
    out = {"math500": math500(verifier, data), "aime24": aime24(verifier, data)}
    for split in ("train", "test"):
        out[f"gsm8k_{split}"] = gsm8k(verifier, split, data)
    for subject in ("biology", "chemistry", "material", "physics"):
        out[f"sciknoweval_{subject}"] = choice(verifier, subject, data)
    out["toolalpaca"] = tools(verifier, data)
    mbpp = load_problems(f"json:{data}/mbpp/sanitized-mbpp.json")
    out["mbpp_sanitized"] = code(verifier, mbpp)
    if args.humaneval:
        with gzip.open(args.humaneval, "rt") as file:
            records = [json.loads(line) for line in file]
        problems = [as_problem(record, args.humaneval, kind="code") for record in records]
        out["humaneval"] = code(verifier, problems)
    return out


def passed(verifier: Verifier, problems: list[Problem], texts: list[str]) -> dict:
    """How many of these right responses pass, and which fail."""
    start = time.perf_counter()
    verdicts = verifier(problems, texts)
    seconds = time.perf_counter() - start
    failures = []
    for problem, verdict in zip(problems, verdicts):
        if verdict.reward < 1:
            feedback = verdict.feedback[:200]
            failures.append({"id": problem.id, "gold": problem.answer, "feedback": feedback})
    return {
        "passed": len(problems) - len(failures),
        "of": len(problems),
        "per_second": round(len(problems) / seconds),
        "failures": failures[:10],
    }


def wrong(verifier: Verifier, problems: list[Problem], texts: list[str]) -> dict:
    """How many of these wrong responses pass, and which."""
    fooled = []
    for problem, text, verdict in zip(problems, texts, verifier(problems, texts)):
        if verdict.reward > 0:
            fooled.append({"id": problem.id, "gold": problem.answer, "text": text[-120:]})
    return {"passed": len(fooled), "of": len(problems), "which": fooled[:20]}


def math500(verifier: Verifier, data: str) -> dict:
    problems = load_problems("math500", data_dir=data)
    return maths(verifier, problems, [problem.solution for problem in problems])


def aime24(verifier: Verifier, data: str) -> dict:
    problems = load_problems("aime24", data_dir=data)
    out = maths(verifier, problems, [problem.solution for problem in problems])
    plain = [boxed(int(problem.answer)) for problem in problems]  # 25 for 025
    return out | {"plain_integer": passed(verifier, problems, plain)}


def gsm8k(verifier: Verifier, split: str, data: str) -> dict:
    problems = load_problems("gsm8k", split, data_dir=data)
    out = maths(verifier, problems, [problem.solution for problem in problems])
    announced = [f"**The answer is {problem.answer}.**" for problem in problems]
    out["announced_in_prose"] = passed(verifier, problems, announced)
    for name, form in GSM8K_NEAR_MISSES.items():
        texts = [form.format(problem.answer) for problem in problems]
        out[f"near_miss {name}"] = wrong(verifier, problems, texts)
    return out


def maths(verifier: Verifier, problems: list[Problem], worked: list[str]) -> dict:
    golds = [problem.answer for problem in problems]
    itself = [f"The answer is {boxed(gold)}." for gold in golds]
    plus_one = [f"The answer is {boxed(gold + '+1')}." for gold in golds]
    others, next_gold = [], []
    for i in range(len(problems) - 1):
        if golds[i] != golds[i + 1]:
            others.append(problems[i])
            next_gold.append(itself[i + 1])
    return {
        "gold_itself": passed(verifier, problems, itself),
        "worked_solution": passed(verifier, problems, worked),
        "next_problems_gold": wrong(verifier, others, next_gold),
        "gold_plus_one": wrong(verifier, problems, plus_one),
    }


def boxed(answer: object) -> str:
    return f"\\boxed{{{answer}}}"


def choice(verifier: Verifier, subject: str, data: str) -> dict:
    problems = []
    for split in ("train", "test"):
        problems += load_problems(f"sciknoweval/{subject}", split, data_dir=data)
    letters = [problem.answer for problem in problems]
    another = ["ABCD"["ABCD".index(letter) - 1] for letter in letters]
    near_misses = {
        "another letter": [f"<answer>{letter}</answer>" for letter in another],
        "letter and text": [f"<answer>{letter}: it</answer>" for letter in letters],
        "no block": letters,
    }
    gold = [f"<answer>\n{letter}\n</answer>" for letter in letters]
    out = {"gold": passed(verifier, problems, gold)}
    for name, texts in near_misses.items():
        out[f"near_miss {name}"] = wrong(verifier, problems, texts)
    return out


def tools(verifier: Verifier, data: str) -> dict:
    problems = load_problems("toolalpaca", data_dir=data)
    golds = [calls_of(problem) for problem in problems]
    changed = {
        "one_call_more": [[*calls, calls[0]] for calls in golds],
        "one_call_less": [calls[:-1] for calls in golds],
        "other_input": [[(calls[0][0], '{"x": 1}'), *calls[1:]] for calls in golds],
        "other_name": [[("other", calls[0][1]), *calls[1:]] for calls in golds],
    }
    out = {"gold": passed(verifier, problems, [as_response(calls) for calls in golds])}
    for name, answers in changed.items():
        out[name] = wrong(verifier, problems, [as_response(calls) for calls in answers])
    return out


def calls_of(problem: Problem) -> list[tuple[str, str]]:
    """The gold's calls: names and inputs."""
    return [(call["Action"], call["Action_Input"]) for call in json.loads(problem.answer)]


def as_response(calls: list[tuple[str, str]]) -> str:
    steps = [f"Thought: so\nAction: {name}\nAction Input: {given}" for name, given in calls]
    return "\n".join(steps)


def code(verifier: Verifier, problems: list[Problem]) -> dict:
    """The sets' own solutions, as they are and with altered results."""
    altered = []
    for problem in problems:
        wrapped = [f"{name} = _wrap({name})\n" for name in problem.meta["names"]]
        program = problem.solution.removesuffix("```")
        altered.append(f"{program}{ALTER}{''.join(wrapped)}```")
    solutions = [problem.solution for problem in problems]
    return {
        "gold": passed(verifier, problems, solutions),
        "altered_results": wrong(verifier, problems, altered),
    }


# --------------------------------------------------------------------------------------------------
# the sandbox
# --------------------------------------------------------------------------------------------------
TESTS = [f"assert f({i}) == {i + 1}" for i in range(3)]
SHORT = Problem(
    "short", [], kind="code", meta={"prelude": "", "setup": "", "names": ["f"], "tests": TESTS}
)
PROGRAMS = {
    "no import": "def f(x): return x + 1",
    "re, math, collections": "import collections, math, re\ndef f(x): return x + 1",
    "typing": "from typing import List\ndef f(x): return x + 1",
}
MISBEHAVING = [  # the first and the last are right
    "def f(x): return x + 1",
    "def f(x): return 0",
    "import os\ndef f(x): os._exit(1)",
    "def f(x): 1 / 0",
    "import os\ndef f(x):\n    if os.fork() == 0: os._exit(0)\n    return x + 1",
]
PYTHON = os.path.realpath(sys.executable)
BARE = [PYTHON, "-I", "-S", "-c", "pass"]  # an interpreter that does nothing


def block(program: str) -> str:
    return f"```python\n{program}\n```"


def start_up() -> dict[str, float]:
    """Milliseconds, one at a time: a bare interpreter, bubblewrap, both, a sandbox of ours."""
    wrapped = bubblewrap()
    return {
        "python": milliseconds(lambda: run(*BARE)),
        "bwrap": milliseconds(lambda: run(*wrapped, "/bin/true")),
        "both": milliseconds(lambda: run(*wrapped, *BARE)),
        "sandbox": milliseconds(lambda: confined("serve").close()),
    }


def milliseconds(action: Callable, count: int = 30) -> float:
    times = []
    for _ in range(count):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return round(statistics.median(times) * 1000, 1)


def run(*command: str) -> None:
    subprocess.run(command, env={}, check=True)


def throughput(verifier: Verifier, workers: int, rounds: int = 5, count: int = 60) -> dict:
    """Programs per second, each with three tests, and starts of a bare interpreter per second, in
    turns."""
    rates: dict[str, list[float]] = {"bare interpreter": [], **{name: [] for name in PROGRAMS}}
    with ThreadPoolExecutor(workers) as pool:
        for _ in range(rounds):
            for name in rates:
                start = time.perf_counter()
                if name in PROGRAMS:
                    verdicts = verifier([SHORT] * count, [block(PROGRAMS[name])] * count)
                    assert all(verdict.reward == 1 for verdict in verdicts)
                else:
                    list(pool.map(lambda _: run(*BARE), range(count)))
                rates[name].append(count / (time.perf_counter() - start))
    bare = statistics.median(rates["bare interpreter"])
    out = {}
    for name, values in rates.items():
        median = statistics.median(values)
        out[name] = {
            "per_second": round(median, 1),
            "each_round": [round(value, 1) for value in values],
            "of_bare_interpreter": round(median / bare, 3),
        }
    return out


def leaks(verifier: Verifier, runs: int) -> dict:
    """What is left behind by programs that fail, exit and fork."""
    texts = []
    for i in range(runs):
        program = MISBEHAVING[i % len(MISBEHAVING)]
        texts.append(f"```\n{program}\n```")
    before = state()
    start = time.perf_counter()
    verdicts = verifier([SHORT] * runs, texts)
    seconds = time.perf_counter() - start
    return {
        "runs": runs,
        "right": sum(verdict.reward for verdict in verdicts),
        "expected": runs * 2 // len(MISBEHAVING),
        "seconds": round(seconds, 1),
        "before": before,
        "after": state(),
    }


def state() -> dict[str, int]:
    """What could leak: this process's descriptors and descendants, and entries of the temporary
    folder."""
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "processes": descendants(os.getpid()),
        "temporary_files": len(os.listdir(tempfile.gettempdir())),
    }


def descendants(ancestor: int) -> int:
    """How many processes descend from this one."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # a process that has ended
            after_name = path.read_text().rpartition(")")[2]
            parents[int(path.parent.name)] = int(after_name.split()[1])
    count = 0
    level = {ancestor}
    while level:
        level = {pid for pid, parent in parents.items() if parent in level}
        count += len(level)
    return count


if __name__ == "__main__":
    main(tyro.cli(Args))
