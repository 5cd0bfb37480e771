"""`Verifier` judges many responses at once, each with the judge of its problem's kind.

A judge that can hang or crash (sympy on a model's LaTeX, a generated task's scorer) runs in worker
processes, which are killed at a wall-clock limit and replaced. A timeout is a verdict of its own,
never a silent "wrong". A model's programs run in sandbox.py.
"""
from __future__ import annotations

import contextlib
import json
import pickle
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

from common.tasks import Problem, chain, choice, code, gym, maths, tool
from common.verifiers import BadProblem, Verdict
from common.verifiers.sandbox import Child, Ended, confined, held
from common.verifiers.thoughts import final_part

ROOT = Path(__file__).resolve().parents[2]
JUDGES = {  # code is missing: its judge needs a sandbox
    "chain": chain.judge, "math": maths.judge, "choice": choice.judge, "tool": tool.judge,
    "gym": gym.judge,
}
LIBRARIES = {"math": "math_verify", "gym": "reasoning_gym"}  # kinds that need a worker
MAX_FEEDBACK = 2**13  # characters
BEAT = 0.5  # seconds after which Ctrl-C is noticed at the latest
IN_PROCESS = ("chain", "choice", "tool")  # cannot hang: one pass over the text, small integers


def own_answer(problem: Problem) -> str | None:
    """The response that must be right, if the problem is to be tried before a run: None for tests
    of contests, whose form is known to fit, and for what cannot be wrong."""
    if problem.kind == "math":
        return f"\\boxed{{{problem.answer}}}"
    if problem.kind == "tool":
        return ""
    if problem.kind == "code" and problem.meta.get("asserts"):
        return problem.solution
    return None


def judge(problem: Problem, text: str) -> Verdict:
    """The verdict on a response, here and without a limit. Not for code."""
    return JUDGES[problem.kind](problem, final_part(text))


class Verifier:
    """verifier(problems, texts) → verdicts, in order. A process starts when a problem needs one.

    workers: verdicts at a time. limit: wall-clock seconds for one verdict, or for one call of a
    program's function. allow_unsafe_exec: run programs without bubblewrap. reveal: feedback ends in
    the right answer or the failed test. restarts: phrases with which a response begins another
    attempt; the last attempt is judged. Raises SystemExit if a reference answer or a test cannot be
    used, or if code cannot be run safely.
    """

    def __init__(self, workers: int = 4, limit: float = 10.0, *, allow_unsafe_exec: bool = False,
                 reveal: bool = False, restarts: Sequence[str] = ()):
        self.limit, self.unsafe, self.reveal = limit, allow_unsafe_exec, reveal
        self.restarts = tuple(restarts)
        self.spare: dict[str, list[Child]] = {"math": [], "gym": [], "code": []}
        self.pool = ThreadPoolExecutor(workers)

    def __call__(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Verdict]:
        return self.at_once(self.one, problems, texts)

    def at_once(self, function: Callable, *columns: Sequence) -> list:
        """function(*row) for each row of the columns, some at a time. Ctrl-C ends all of them, and
        this verifier with them."""
        jobs: list[Future] = []
        try:
            for row in zip(*columns):
                jobs.append(self.pool.submit(function, *row))
            for job in jobs:
                while not job.done():  # Ctrl-C may reach a thread that does not wake this one
                    wait([job], BEAT)
            return [job.result() for job in jobs]
        except KeyboardInterrupt:
            self.pool.shutdown(wait=False, cancel_futures=True)
            while not all(job.done() for job in jobs):  # one may just be starting a process
                for child in list(Child.alive):
                    child.kill()
                time.sleep(0.01)
            raise
        finally:
            for job in jobs:  # after an error
                job.cancel()

    def check(self, problems: Sequence[Problem]) -> None:
        """Raise SystemExit now if it would be raised later: there is no sandbox for code, or a
        problem cannot be judged."""
        bad = self.unusable(problems)
        if bad:
            raise SystemExit(f"error: {len(bad)} of {len(problems)} problems cannot be judged, the "
                             f"first is problem {bad[0][0].id}: {bad[0][1]}; mend or remove them")

    def unusable(self, problems: Sequence[Problem]) -> list[tuple[Problem, str]]:
        """The problems that cannot be judged, each with the reason: a reference that cannot be
        read or is not right itself, tests that cannot be run or that the solution does not pass.

        Raises SystemExit if there is no sandbox for code.
        """
        if not self.unsafe:
            if any(problem.kind == "code" for problem in problems):
                driver = self.borrow("code")
                held(driver.first)
                self.spare["code"].append(driver)
            names = {problem.meta["gym"] for problem in problems if problem.kind == "gym"}
            risky = gym.EVALUATED.intersection(names)
            if risky:
                raise SystemExit(f"error: reasoning-gym's scorer of {min(risky)} runs answers as "
                                 "Python, with your rights; --allow_unsafe_exec if you accept that")
        reasons = self.at_once(self.reason_against, problems)
        return [(problem, reason) for problem, reason in zip(problems, reasons) if reason]

    def reason_against(self, problem: Problem) -> str:
        """Why a problem cannot be judged, or ""."""
        text = own_answer(problem)
        if text is None:
            return ""
        try:
            verdict = self.judge(problem, text)
        except BadProblem as error:
            return str(error)
        if verdict.reward == 1 or problem.kind == "tool":
            return ""
        if problem.kind == "code":
            slow = "took longer" in verdict.feedback  # perhaps the machine's fault
            return "" if slow else f"its own solution fails: {verdict.feedback[:300]}"
        return f"the answer {problem.answer!r:.100} is not right by its own check"

    def one(self, problem: Problem, text: str) -> Verdict:
        try:
            return self.judge(problem, text)
        except BadProblem as error:
            raise SystemExit(f"error: problem {problem.id}: {error}") from None

    def judge(self, problem: Problem, text: str) -> Verdict:
        """One verdict. Raises BadProblem if the problem cannot be judged."""
        kind, child = problem.kind, None
        part = final_part(text, self.restarts)
        try:
            if kind in IN_PROCESS:
                verdict = JUDGES[kind](problem, part)
            else:
                child = self.borrow(kind)
                verdict = self.ask(child, problem, part)
                self.spare[kind].append(child)
                child = None
        except Ended as error:
            verdict = Verdict(0.0, f"The check {error}.")
        finally:
            if child:  # it may still be busy
                child.close()
        verdict = replace(verdict, feedback=verdict.feedback[:MAX_FEEDBACK])
        if self.reveal and verdict.reward < 1 and problem.answer is not None:
            feedback = f"{verdict.feedback} The right answer is {problem.answer}."
            verdict = replace(verdict, feedback=feedback)
        return verdict

    def borrow(self, kind: str) -> Child:
        """A process for this kind: one that is idle, or else a new one."""
        with contextlib.suppress(IndexError):
            child = self.spare[kind].pop()
            while child.process.poll() is not None:  # it died while it was idle
                child.close()
                child = self.spare[kind].pop()
            return child
        if kind == "code":
            return confined("drive", unsafe=self.unsafe)
        worker = Child([sys.executable, "-m", "common.verifiers.worker", kind], cwd=ROOT)
        try:
            worker.ask(limit=120)
        except Ended as error:
            worker.close()
            raise SystemExit(f"error: the verifier's process {error}; does "
                             f"`import {LIBRARIES[kind]}` work?") from None
        return worker

    def ask(self, child: Child, problem: Problem, part: str) -> Verdict:
        if problem.kind == "code":
            return code.judge(
                problem, part, child, limit=self.limit, unsafe=self.unsafe, reveal=self.reveal
            )
        kind, answer = child.ask(b"q", pickle.dumps((problem, part)), limit=self.limit)
        answer = json.loads(answer)
        if kind == b"b":
            raise BadProblem(answer)
        return Verdict(**answer)

    def close(self) -> None:
        self.pool.shutdown()
        for children in self.spare.values():
            for child in children:
                child.close()
