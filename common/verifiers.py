"""Verdicts on responses: a reward in [0, 1] and, where something is wrong, feedback that a model can read.

`Verifier` judges many responses at once. What can hang or crash (sympy on a model's LaTeX, a generated task's scorer)
runs in worker processes that are killed at a wall-clock limit and replaced; a timeout is a verdict of its own, never
a silent "wrong". A worker is this file run as a program: it imports no torch. A model's programs run in sandbox.py.
"""
from __future__ import annotations

import contextlib
import importlib
import json
import pickle
import re
import resource
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from common.sandbox import Child, Ended, bubblewrap, confined, run_functions
from common.sandbox_child import receive, send, take_over
from common.tasks import Problem


@dataclass(frozen=True)
class Verdict:
    reward: float  # 1.0 where the response is right
    feedback: str = ""  # what is wrong, without the answer


class BadProblem(ValueError):
    """A reference answer or a test that cannot be used: an error in the data, not in a response."""


# ---------------------------------------------------------------------------------------------------------------------
# which part of a response counts
# ---------------------------------------------------------------------------------------------------------------------
REVISIONS = (  # what starts another attempt within a response: SD-Zero's control phrases
    "Let me rephrase the above solution.", "Wait, this response is not correct, let me start over.",
    "Wait, this is wrong. Let me start over.", "Wait, this response is wrong. Let me correct it.",
    "Wrong. I need to redo all.",
)


THOUGHTS = (  # what opens and what closes a thought
    ("<think>", "</think>"),  # DeepSeek-R1, Qwen3 and most others
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),  # EXAONE Deep
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("◁think▷", "◁/think▷"),  # Kimi
    ("<mm:think>", "</mm:think>"),  # MiniMax-M3
    ("<think:opensource>", "</think:opensource>"),  # Hy3
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
    ("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    ("<|channel>", "<channel|>"),  # Gemma 4
    ("<|think|>", "<|content|>"),  # Solar Open
    ("<|channel|>", "<|channel|>final<|message|>"),  # gpt-oss: every channel but the final one
)


def open_thought(text: str) -> str:
    """The tag of a thought that the text opens and does not close, or "".

    >>> open_thought("<think>5</think>6"), open_thought("[THINK]5[/THINK]6 [THINK]7")
    ('', '[THINK]')
    """
    for opening, closing in THOUGHTS:
        if opening in text.rpartition(closing)[2]:
            return opening
    return ""


def after_thoughts(text: str) -> str:
    """What follows the last thought; nothing when a thought is still open."""
    if open_thought(text):
        return ""
    for _, closing in THOUGHTS:
        _, closed, rest = text.rpartition(closing)
        if closed:
            text = rest.lstrip("\n")
    return text


def final_part(text: str) -> str:
    """What follows the last thought, and of that the last attempt.

    >>> final_part("<think>5</think>It is 6. Wait, this is wrong. Let me start over. 7"), final_part("<think>So 5")
    (' 7', '')
    """
    text = after_thoughts(text)
    return text[max(text.rfind(phrase) + len(phrase) if phrase in text else 0 for phrase in REVISIONS) :]


def last_block(text: str, opening: str, closing: str) -> str | None:
    """What stands in the last closed pair of tags."""
    before, closed, _ = text.rpartition(closing)
    _, opened, block = before.rpartition(opening)
    return block.strip() if closed and opened else None


def last_boxed(text: str) -> str | None:
    """What stands in the last complete \\boxed{}.

    >>> last_boxed(r"\\boxed{1}, no, \\boxed{\\frac{1}{2}} and \\boxed{3")
    '\\\\frac{1}{2}'
    """
    found, starts = None, []  # of the braces that are open; None for those that are not a box's
    for token in re.finditer(r"\\boxed\s*\{|\\.|[{}]", text, re.DOTALL):
        if token[0] == "}":
            start = starts.pop() if starts else None
            found = found if start is None else text[start : token.start()]
        elif token[0] == "{" or token[0].startswith("\\boxed"):
            starts.append(None if token[0] == "{" else token.end())
    return found


def last_program(text: str) -> str | None:
    """What stands in the last closed block of code.

    >>> last_program("```python\\nprint(1)\\n``` and ```")
    'print(1)\\n'
    """
    blocks = text.split("```")[1:-1:2]
    return re.sub(r"\A[\w+-]*[ \t]*\n", "", blocks[-1]) if blocks else None


# ---------------------------------------------------------------------------------------------------------------------
# the judges
# ---------------------------------------------------------------------------------------------------------------------
def judge(problem: Problem, text: str) -> Verdict:
    """The verdict of the verifier that the problem names; not for code, which takes a sandbox."""
    return JUDGES[problem.verifier](problem, final_part(text))


def judge_chain(problem: Problem, text: str) -> Verdict:
    """The number after the last #### against the answer; feedback names the first wrong step, never the right one.

    >>> from common.tasks import chain_problem
    >>> judge_chain(chain_problem((23, 45, 17)), "23+45=68; 68+17=84; #### 84")
    Verdict(reward=0.0, feedback='The step 68+17=84 is wrong.')
    """
    found = re.findall(r"####\s*(\d{1,9})(?!\d)", text)
    if not found:
        return Verdict(0.0, "There is no number after ####.")
    if int(found[-1]) == int(problem.answer):
        return Verdict(1.0)
    total = problem.meta["terms"][0]
    steps = re.findall(r"(\d{1,9})\+(\d{1,9})=(\d{1,9})(?!\d)", text)
    for (a, b, c), term in zip(steps, problem.meta["terms"][1:]):
        if (int(a), int(b), int(a) + int(b)) != (total, term, int(c)):
            return Verdict(0.0, f"The step {a}+{b}={c} is wrong.")
        total = int(c)
    return Verdict(0.0, "The number after #### is wrong.")


def judge_math(problem: Problem, text: str) -> Verdict:
    """Mathematical equality of the final answer with the reference, by math-verify."""
    found, right = compare_math(problem.answer, text)
    if not found:
        return Verdict(0.0, "No final answer was found; it belongs in \\boxed{}.")
    return Verdict(1.0) if right else Verdict(0.0, f"The final answer {found} is wrong.")


def compare_math(gold: str, text: str) -> tuple[str, bool]:
    """→ (the answer found in `text`, whether it equals `gold`). Raises BadProblem where the gold cannot be read.

    The answer is the last \\boxed{}, or else what follows the last ####, or else what stands right after the last
    "answer is". The last number of a text that announces no answer is none: cut-off responses would be right by chance.
    So is the first number after "answer", math-verify's rule: in 'the answer to "Is 58 or 28 more?" is 28' it reads 58.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    def read(text: str, announced: bool) -> list:
        forms = [form(try_extract_without_anchor=announced) for form in (LatexExtractionConfig, ExprExtractionConfig)]
        return parse(text, forms, parsing_timeout=None) if len(text) <= MAX_ANSWER else []

    expected = read(f"${last_boxed(gold) or gold.strip(' $')}$", True)
    if not expected:
        raise BadProblem(f"the reference answer {gold!r} is not mathematics that math-verify can read")
    boxed, (_, marked, rest) = last_boxed(text), text.rpartition("####")
    line, heading = rest.strip().partition("\n")[0], re.match(r"\s*[A-Za-z]|.*[A-Za-z]{3}.*\n\s*\S", rest)
    answer = f"${boxed}$" if boxed is not None else line if marked and not heading else None
    said = map(announced, re.split(r"(?i)\banswer\s*(?:is\b|:|=)", text[-MAX_ANSWER:])[:0:-1])  # the last first
    tries = [read(answer, True)] if answer is not None else (read(f"answer is {part}", False) for part in said if part)
    found = next(filter(None, tries), [])
    if not found:
        return "", False
    return str(found[-1])[:100], verify(expected, found, timeout_seconds=None)  # the gold goes first: not symmetric


FILLER = r"(?:[\s:=,]|\b(?:is|the number|that|thus|therefore|now|actually|indeed|simply|exactly|only|just|equal to)\b)*"


def announced(part: str) -> str:
    """What follows "answer is", where an expression stands at its beginning and is no choice of several; else "".

    >>> [announced(x) for x in (" **28**, which", " the sum of 5 and 3, that is 8", " 5, 6 or 7", ": 4+24=28.")]
    ['28, which', '', '', '28.']
    """
    part = re.sub(r"<<.*?>>|\*\*(?!\w)|(?<!\w)\*\*|[`\"“”]|\\(?=\$)", "", part.replace("−", "-"))
    part = re.sub(r"^[\d\s.,+*/×÷()-]+=(?=\s*\$?-?\d)", "", part[re.match(FILLER, part, re.I).end() :]).strip()
    choice = re.match(r"\W*[\d.,/]+\W*(?:[\d.,/]+\W+)*(?:or|to)\b\W*\d", part)
    return "" if choice or re.match(r"(?!sqrt|pi\b|log|ln\b|sin|cos|tan|exp)[A-Za-z]{2}", part) else part


def judge_choice(problem: Problem, text: str) -> Verdict:
    """SDPO's rule for SciKnowEval: the last <answer> block is the right letter and nothing else."""
    found = last_block(text, "<answer>", "</answer>")
    if found is None:
        return Verdict(0.0, "There is no <answer> block; it holds the letter alone.")
    return Verdict(1.0) if found == problem.answer else Verdict(0.0, f"The answer {found[:100]} is wrong.")


def judge_tool(problem: Problem, text: str) -> Verdict:
    """The calls are the reference's, in any order: each action with its own input, compared as JSON. (SDPO merges all
    inputs into one dictionary and so accepts two calls that have each other's input.)"""
    try:
        right = [tool_call(c["Action"], json.loads(c["Action_Input"])) for c in json.loads(problem.answer)]
    except (ValueError, KeyError, TypeError) as error:
        raise BadProblem(f"the reference {problem.answer!r:.200} is not a list of calls ({error!r})") from None
    calls = []
    for match in re.finditer(r"^Action:(.*)\n\s{,9}Action Input:\s{,9}", text, re.MULTILINE):
        try:
            calls.append(tool_call(match[1].strip(), json.JSONDecoder().raw_decode(text, match.end())[0]))
        except (ValueError, RecursionError):
            return Verdict(0.0, f"The Action Input of {match[1].strip()[:100]} is not JSON.")
    if not calls or len(calls) < len(re.findall(r"^Action:", text, re.MULTILINE)):
        return Verdict(0.0, "There is no Action, or one without its Action Input.")
    return Verdict(1.0) if sorted(calls) == sorted(right) else Verdict(0.0, f"Wrong calls: {'; '.join(calls)[:500]}")


def tool_call(name: str, arguments: object) -> str:
    return f"{name}({json.dumps(arguments, sort_keys=True)})"


def judge_gym(problem: Problem, text: str) -> Verdict:
    """The score of reasoning-gym's own scorer for what stands in the last <answer> block."""
    import reasoning_gym

    found = last_block(text, "<answer>", "</answer>")
    if found is None:
        return Verdict(0.0, "No final answer was found; it belongs between <answer> and </answer>.")
    score = float(reasoning_gym.get_score_answer_fn(problem.meta["gym"])(found, problem.meta["entry"]))
    return Verdict(score, "" if score == 1 else f"The final answer {found[:100]} is wrong.")


def judge_code(problem: Problem, text: str, driver: Child, *, limit: float, unsafe: bool, reveal: bool) -> Verdict:
    """1 where the last program passes every test. Feedback has the error, the timeout, or the first failing calls with
    arguments and result. limit: seconds for a call."""
    program = last_program(final_part(text))
    if program is None:
        return Verdict(0.0, "There is no program; it belongs in a closed ```python block.")
    try:
        results = run_functions(driver, program, problem.meta, limit=limit, unsafe=unsafe)
    except ValueError as error:
        raise BadProblem(f"its tests cannot be run: {error}") from None
    failures = [r + f"\nThe test: {test[:2000]}" * reveal for r, test in zip(results, problem.meta["tests"]) if r]
    return Verdict(0.0, "\n".join(failures[:MAX_FAILURES])) if failures else Verdict(1.0)


MAX_ANSWER = 2000  # characters in which an answer to a maths problem is looked for: sympy takes its time
MAX_FAILURES = 2  # failing cases in feedback
JUDGES = {"chain": judge_chain, "math": judge_math, "choice": judge_choice, "tool": judge_tool, "gym": judge_gym}
IN_PROCESS = {"chain", "choice", "tool"}  # cannot hang: one pass over the text, and integers of nine digits
EVALUATED = {"binary_matrix", "countdown", "intermediate_integration", "n_queens", "polynomial_multiplication",
             "puzzle24", "simple_integration", "spiral_matrix", "string_insertion"}  # as Python, by their scorers
LIBRARIES = {"math": "math_verify", "gym": "reasoning_gym"}


# ---------------------------------------------------------------------------------------------------------------------
# the pool
# ---------------------------------------------------------------------------------------------------------------------
class Verifier:
    """verifier(problems, texts) → verdicts, in order. Processes start with the first problem that needs one.

    workers: verdicts at a time; limit: wall-clock seconds for one, or for one call of a program's function. Raises
    SystemExit where a reference answer or a test cannot be used, or where code cannot be run safely.
    allow_unsafe_exec: run programs without bubblewrap. reveal: feedback ends in the right answer or the failed test.
    """

    def __init__(self, workers: int = 4, limit: float = 10.0, *, allow_unsafe_exec: bool = False, reveal: bool = False):
        self.limit, self.unsafe, self.reveal = limit, allow_unsafe_exec, reveal
        self.spare: dict[str, list[Child]] = {"math": [], "gym": [], "code": []}
        self.pool = ThreadPoolExecutor(workers)

    def __call__(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Verdict]:
        return list(self.pool.map(self.one, problems, texts))

    def check(self, problems: Sequence[Problem]) -> None:
        """Raise SystemExit now where it would be raised later: no sandbox for code, a reference that cannot be read."""
        if not self.unsafe and any(p.verifier == "code" for p in problems):
            bubblewrap()
        risky = EVALUATED.intersection(p.meta["gym"] for p in problems if p.verifier == "gym" and not self.unsafe)
        if risky:
            raise SystemExit(f"error: reasoning-gym's scorer of {min(risky)} runs answers as Python, with your rights; "
                             "--allow_unsafe_exec if you accept that")
        calls = [p for p in problems if p.verifier == "tool"]
        self(calls, [""] * len(calls))
        golds = [p for p in problems if p.verifier == "math"]
        bad = [p for p, v in zip(golds, self(golds, [f"\\boxed{{{p.answer}}}" for p in golds])) if v.reward < 1]
        if bad:
            raise SystemExit(f"error: {len(bad)} of {len(golds)} reference answers do not pass their own check, the "
                             f"first in problem {bad[0].id}: {bad[0].answer!r}; mend or remove these records")

    def one(self, problem: Problem, text: str) -> Verdict:
        kind, child = problem.verifier, None
        try:
            if kind in IN_PROCESS:
                verdict = judge(problem, text)
            else:
                child = self.borrow(kind)
                verdict = self.ask(child, problem, text)
                self.spare[kind].append(child)
                child = None
        except Ended as error:
            verdict = Verdict(0.0, f"The check {error}.")
        except BadProblem as error:
            raise SystemExit(f"error: problem {problem.id}: {error}") from None
        finally:
            if child:  # it may still be busy
                child.close()
        if self.reveal and verdict.reward < 1 and problem.answer is not None:
            verdict = replace(verdict, feedback=f"{verdict.feedback} The right answer is {problem.answer}.")
        return verdict

    def borrow(self, kind: str) -> Child:
        with contextlib.suppress(IndexError):
            while (child := self.spare[kind].pop()).process.poll() is not None:  # it died while it had nothing to do
                child.close()
            return child
        if kind == "code":
            return confined("drive", unsafe=self.unsafe)
        worker = Child([sys.executable, "-m", "common.verifiers", kind], cwd=Path(__file__).resolve().parent.parent)
        try:
            worker.ask(limit=120)
        except Ended as error:
            worker.close()
            raise SystemExit(f"error: the verifier's process {error}; does `import {LIBRARIES[kind]}` work?") from None
        return worker

    def ask(self, child: Child, problem: Problem, text: str) -> Verdict:
        if problem.verifier == "code":
            return judge_code(problem, text, child, limit=self.limit, unsafe=self.unsafe, reveal=self.reveal)
        kind, answer = child.ask(b"q", pickle.dumps((problem, text)), limit=self.limit)
        answer = json.loads(answer)
        if kind == b"b":
            raise BadProblem(answer)
        return Verdict(**answer)

    def close(self) -> None:
        self.pool.shutdown()
        for child in [c for spare in self.spare.values() for c in spare]:
            child.close()


def work(kind: str) -> None:
    """The worker: questions come, verdicts go."""
    take_over()
    resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))  # 9**9**9 is to fail here, not to fill the machine
    importlib.import_module(LIBRARIES[kind])
    if kind == "math":
        compare_math("1", "1")  # the first parse builds tables
    kind, answer = b"r", ""
    while True:
        send(kind, json.dumps(answer).encode())
        problem, text = pickle.loads(receive()[1])
        try:
            kind, answer = b"v", asdict(judge(problem, text))
        except BadProblem as error:
            kind, answer = b"b", str(error)
        except Exception as error:  # sympy's own trouble with what a model wrote
            kind, answer = b"v", asdict(Verdict(0.0, f"The check failed ({type(error).__name__})."))


if __name__ == "__main__":
    work(sys.argv[1])
