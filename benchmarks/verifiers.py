"""How far the verifiers agree with the sets' own answers, and how fast and clean the sandbox is.

    python benchmarks/verifiers.py --data_dir data             # every set found there; writes results/verifiers/

Rates: a gold judged against itself and against its worked solution should pass; against another problem's gold, or
altered, it should fail. Sandbox: programs per second, in turns with starts of a bare interpreter (on a busy machine
only the ratio counts), and what 5,000 runs leave behind.
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


def passed(verifier: Verifier, problems: list[Problem], texts: list[str]) -> dict:
    start = time.perf_counter()
    verdicts = verifier(problems, texts)
    seconds = time.perf_counter() - start
    failures = [dict(id=p.id, gold=p.answer, feedback=v.feedback[:200])
                for p, v in zip(problems, verdicts) if v.reward < 1]
    return dict(passed=len(problems) - len(failures), of=len(problems), per_second=round(len(problems) / seconds),
                failures=failures[:10])


def wrong(verifier: Verifier, problems: list[Problem], texts: list[str]) -> dict:
    """How many of these wrong responses pass, and which."""
    judged = zip(problems, texts, verifier(problems, texts))
    fooled = [dict(id=p.id, gold=p.answer, text=t[-120:]) for p, t, v in judged if v.reward > 0]
    return dict(passed=len(fooled), of=len(problems), which=fooled[:20])


def maths(verifier: Verifier, problems: list[Problem], worked: list[str] | None = None) -> dict:
    boxed = [f"The answer is \\boxed{{{p.answer}}}." for p in problems]
    out = dict(gold_itself=passed(verifier, problems, boxed))
    if worked:
        out["worked_solution"] = passed(verifier, problems, worked)
    pairs = [(p, text) for p, q, text in zip(problems, problems[1:], boxed[1:]) if p.answer != q.answer]
    out["next_problems_gold"] = wrong(verifier, *map(list, zip(*pairs)))
    out["gold_plus_one"] = wrong(verifier, problems, [f"The answer is \\boxed{{{p.answer}+1}}." for p in problems])
    return out


def rates(verifier: Verifier, args: Args) -> dict:
    data, out = args.data_dir, {}
    math500, aime = load_problems("math500", data_dir=data), load_problems("aime24", data_dir=data)
    out["math500"] = maths(verifier, math500, [p.solution for p in math500])
    out["aime24"] = maths(verifier, aime, [p.solution for p in aime])
    out["aime24"]["plain_integer"] = passed(verifier, aime, [f"\\boxed{{{int(p.answer)}}}" for p in aime])
    for split in ("train", "test"):
        gsm8k = load_problems("gsm8k", split, data_dir=data)
        out[f"gsm8k_{split}"] = maths(verifier, gsm8k, [f"{p.solution}\n#### {p.answer}" for p in gsm8k])
        out[f"gsm8k_{split}"] |= dict(
            announced_in_prose=passed(verifier, gsm8k, [f"**The answer is {p.answer}.**" for p in gsm8k]),
            **{f"near_miss {name}": wrong(verifier, gsm8k, [form.format(p.answer) for p in gsm8k]) for name, form in {
                "question quoted": 'The answer to "Is {0} or 1{0} larger?" is 1{0}.', "a choice": "The answer is {0} or 1{0}.",
                "in words": "The answer is the smaller of {0} and 1{0}.", "cut off": "So she has {0}"}.items()})
    for subject in ("biology", "chemistry", "material", "physics"):
        mcq = [p for split in ("train", "test") for p in load_problems(f"sciknoweval/{subject}", split, data_dir=data)]
        out[f"sciknoweval_{subject}"] = dict(
            gold=passed(verifier, mcq, [f"<answer>\n{p.answer}\n</answer>" for p in mcq]),
            **{f"near_miss {name}": wrong(verifier, mcq, [form(p.answer) for p in mcq]) for name, form in {
                "another letter": lambda a: f"<answer>{'ABCD'['ABCD'.index(a) - 1]}</answer>",
                "letter and text": lambda a: f"<answer>{a}: it</answer>", "no block": lambda a: a}.items()})
    tools = load_problems("toolalpaca", data_dir=data)
    golds = [[(c["Action"], c["Action_Input"]) for c in json.loads(p.answer)] for p in tools]
    text = lambda calls: "\n".join(f"Thought: so\nAction: {a}\nAction Input: {i}" for a, i in calls)
    out["toolalpaca"] = dict(gold=passed(verifier, tools, [text(g) for g in golds]),
                             one_call_more=wrong(verifier, tools, [text([*g, g[0]]) for g in golds]),
                             one_call_less=wrong(verifier, tools, [text(g[:-1]) for g in golds]),
                             other_input=wrong(verifier, tools, [text([(g[0][0], '{"x": 1}'), *g[1:]]) for g in golds]),
                             other_name=wrong(verifier, tools, [text([("other", g[0][1]), *g[1:]]) for g in golds]))
    out["mbpp_sanitized"] = code(verifier, load_problems(f"json:{data}/mbpp/sanitized-mbpp.json"))
    if args.humaneval:
        with gzip.open(args.humaneval, "rt") as f:
            out["humaneval"] = code(verifier, [as_problem(json.loads(line), args.humaneval, kind="code") for line in f])
    return out


def code(verifier: Verifier, problems: list[Problem]) -> dict:
    wrapped = ["".join(f"{name} = _wrap({name})\n" for name in p.meta["names"]) for p in problems]
    altered = [f"{p.solution.removesuffix('```')}{ALTER}{w}```" for p, w in zip(problems, wrapped)]
    return dict(gold=passed(verifier, problems, [p.solution for p in problems]),
                altered_results=wrong(verifier, problems, altered))


# ---------------------------------------------------------------------------------------------------------------------
# the sandbox
# ---------------------------------------------------------------------------------------------------------------------
SHORT = Problem("short", [], kind="code", meta=dict(prelude="", setup="", names=["f"], tests=[
    f"assert f({i}) == {i + 1}" for i in range(3)]))
PROGRAMS = {"no import": "def f(x): return x + 1",
            "re, math, collections": "import collections, math, re\ndef f(x): return x + 1",
            "typing": "from typing import List\ndef f(x): return x + 1"}


def state() -> dict[str, int]:
    """What could leak: this process's descriptors and descendants, and entries of the temporary folder."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    count, level = 0, {os.getpid()}
    while level := {pid for pid, parent in parents.items() if parent in level}:
        count += len(level)
    return dict(descriptors=len(os.listdir("/proc/self/fd")), processes=count,
                temporary_files=len(os.listdir(tempfile.gettempdir())))


def throughput(verifier: Verifier, workers: int, rounds: int = 5, count: int = 60) -> dict:
    """Programs per second, each with three tests, and starts of `python -I -S -c pass` per second, in turns."""
    bare = [os.path.realpath(sys.executable), "-I", "-S", "-c", "pass"]
    rates: dict[str, list[float]] = {"bare interpreter": [], **{name: [] for name in PROGRAMS}}

    def start(_) -> None:
        subprocess.run(bare, env={}, check=True)

    with ThreadPoolExecutor(workers) as pool:
        for _ in range(rounds):
            for name in rates:
                texts = [f"```python\n{PROGRAMS.get(name)}\n```"] * count
                began = time.perf_counter()
                if name in PROGRAMS:
                    assert all(v.reward == 1 for v in verifier([SHORT] * count, texts))
                else:
                    list(pool.map(start, range(count)))
                rates[name].append(count / (time.perf_counter() - began))
    median = {name: statistics.median(r) for name, r in rates.items()}
    return {name: dict(per_second=round(median[name], 1), each_round=[round(r, 1) for r in rates[name]],
                       of_bare_interpreter=round(median[name] / median["bare interpreter"], 3)) for name in rates}


def start_up(count: int = 30) -> dict:
    """Milliseconds, one at a time: a bare interpreter, bubblewrap alone, both, a sandbox of ours."""
    python, wrapped = os.path.realpath(sys.executable), bubblewrap()

    def each(action) -> float:
        times = []
        for _ in range(count):
            start = time.perf_counter()
            action()
            times.append(time.perf_counter() - start)
        return round(statistics.median(times) * 1000, 1)

    def run(*command: str) -> None:
        subprocess.run(command, env={}, check=True)

    return dict(python=each(lambda: run(python, "-I", "-S", "-c", "pass")),
                bwrap=each(lambda: run(*wrapped, "/bin/true")),
                both=each(lambda: run(*wrapped, python, "-I", "-S", "-c", "pass")),
                sandbox=each(lambda: confined("serve").close()))


def leaks(verifier: Verifier, runs: int) -> dict:
    kinds = ["def f(x): return x + 1", "def f(x): return 0", "import os\ndef f(x): os._exit(1)", "def f(x): 1 / 0",
             "import os\ndef f(x):\n    if os.fork() == 0: os._exit(0)\n    return x + 1"]
    before, start = state(), time.perf_counter()
    verdicts = verifier([SHORT] * runs, [f"```\n{kinds[i % len(kinds)]}\n```" for i in range(runs)])
    seconds = time.perf_counter() - start
    return dict(runs=runs, right=sum(v.reward for v in verdicts), expected=runs * 2 // len(kinds),
                seconds=round(seconds, 1), before=before, after=state())


def main(args: Args) -> None:
    verifier = Verifier(args.workers)
    verifier([SHORT] * 8, [f"```\n{PROGRAMS['no import']}\n```"] * 8)
    result = dict(start_up_ms=start_up(), throughput=throughput(verifier, args.workers), leaks=leaks(verifier, args.runs),
                  rates=rates(verifier, args))
    verifier.close()
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    cpu = Path("/proc/cpuinfo").read_text().partition("model name\t: ")[2].partition("\n")[0]
    result |= dict(command="python benchmarks/verifiers.py " + " ".join(sys.argv[1:]), commit=commit, cpu=cpu,
                   processors=os.cpu_count(), python=platform.python_version(),
                   bwrap=subprocess.run(["bwrap", "--version"], capture_output=True, text=True).stdout.strip())
    Path(args.out).mkdir(parents=True, exist_ok=True)
    (Path(args.out) / "rates.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Args))
