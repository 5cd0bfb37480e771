"""Problems: where they come from, and in which order a run sees them.

A task is two lists of `Problem` that share no question: `train` and `heldout`. `load_task` makes one from a flag:

    chain           embedded: sums of three to five two-digit numbers, worked left to right (`chain:10` = ten numbers)
    jsonl:PATH      one JSON object a line (or one JSON list): a question, its answer, perhaps a worked solution
    hf:NAME[:CONF]  the same from a dataset on the Hugging Face hub, by the `datasets` library; `@SPLIT` ends it
    gym:NAME        any generated dataset of reasoning-gym, scored by its own `score_answer`
    gsm8k …         a named set (SETS below), from the hub or from --data_dir
    4*gsm8k+1*mbpp  a mixture: each part has its share of the training stream and of the held-out problems

What kind of problem a record is (maths, multiple choice, tool calls, code) shows in its fields: see `as_problem`.
The order of training is a pure function of (seed, position), so a resumed run needs no iterator state.
"""
from __future__ import annotations

import ast
import base64
import hashlib
import json
import pickletools
import random
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

from common import check_hub, require


@dataclass(frozen=True)
class Problem:
    """One question. `messages` is what the student sees, in chat form; `answer` and `solution` are privileged."""

    id: str
    messages: list[dict[str, str]]
    answer: str | None = None  # the final answer, as text; None for code
    solution: str | None = None  # a worked solution that ends in the answer
    verifier: str = "math"  # which verifier judges a response: "chain" | "math" | "choice" | "tool" | "code" | "gym"
    meta: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    train: list[Problem]
    heldout: list[Problem]
    notes: tuple[str, ...] = ()  # overlap between training and evaluation, for the log


def load_task(spec: str, *, heldout: int, fields: str = "", instruction: str | None = None, data_dir: str = "",
              against: str = "") -> Task:
    """Load `spec` and set `heldout` problems aside for evaluation, out of the set's own test split where it has one (or
    all of it, where it has fewer).

    fields: "question=prompt,answer=gold,…" maps the names used here (question, answer, solution, system) to the data's.
    instruction: text that is added to every maths question; None takes INSTRUCTION.
    data_dir: the folder that the named sets are read from; "" reads them from the hub.
    against: more evaluation sets, joined by commas. Training questions that stand in an evaluation set are removed;
    how many share 13 words in a row with one is told in `notes`.
    Raises: SystemExit with one line that names the file, the line and the field, where a record is malformed.
    """
    for pair in filter(None, fields.split(",")):
        name, _, field = pair.partition("=")
        require(field and name in NAMES, f"--fields {pair}: must be NAME=FIELD, with a NAME of "
                f"{', '.join(NAMES)}")
    parts, options = mixture(spec), dict(fields=fields, instruction=instruction, data_dir=data_dir)
    for weight, name in parts:
        require(weight > 0, f"--task {spec}: the weight of {name} is 0; leave it out or raise it")
    trains, tests, notes = [], [], []
    for weight, name in parts:
        count = round(heldout * weight / sum(w for w, _ in parts))
        train = in_hash_order(load_problems(name, "train", heldout=count, **options))
        own = "train" in SETS.get(name.partition("/")[0], ("", "", ""))[2]  # it has a test split beside
        test = in_hash_order(load_problems(name, "test", **options)) if own else train
        require(own or len(test) > count, f"--task {name}: {len(test)} different problems, but {count} are to be held "
                "out; lower --heldout or give more data")
        notes += [f"{name}: its test split has {len(test)} problems, not {count}"] if len(test) < count else []
        tests += test[:count]
        trains.append(train if own else train[count:])
    evaluation = {"the held-out problems": tests}
    evaluation |= {name: load_problems(name, "test", data_dir=data_dir) for name in filter(None, against.split(","))}
    asked = {question(p) for problems in evaluation.values() for p in problems}
    kept = [[p for p in train if question(p) not in asked] for train in trains]
    for (_, name), train in zip(parts, kept):
        require(train, f"--task {name}: no training question is left, for all stand in an "
                "evaluation set; give more data, or take that set out of --against")
    require(tests or not heldout, f"--task {spec}: no problem is held out; raise --heldout")
    everything = [p for train in kept for p in train]
    notes += [f"{len(shared)} of {len(everything)} training questions share 13 words in a row with {name}"
              for name, problems in evaluation.items() if (shared := overlap(everything, problems))]
    if removed := sum(map(len, trains)) - len(everything):
        notes.append(f"{removed} training questions were removed, for they stand in an evaluation set")
    return Task(blend([weight for weight, _ in parts], kept), tests, tuple(notes))


def load_problems(spec: str, split: str = "test", *, heldout: int = 0, fields: str = "", instruction: str | None = None,
                  data_dir: str = "") -> list[Problem]:
    """All different problems of one source. split: "train" or "test", for named sets that have both."""
    source, _, name = spec.partition(":")
    if source == "chain":
        terms, count = chain_terms(spec, name), CHAIN_SIZE + heldout
        require(terms is None or 90**terms > 2 * count, f"--task {spec}: there are no {count} "
                "different sums of so few numbers; take more numbers or lower --heldout")
        problems = chain_problems(count, terms)
    elif source == "gym":
        problems = gym_problems(name, GYM_SIZE + heldout)
    elif source in ("jsonl", "json", "hf") or (source.partition("/")[0] in SETS and not name):
        records = (read_hub(name) if source == "hf" else read_records(name) if source in ("jsonl", "json") else
                   read_set(source, split, data_dir))
        problems = [as_problem(record, where, fields, instruction) for record, where in records]
    else:
        raise SystemExit(f"error: --task {spec}: unknown source {source!r}; use chain, jsonl:PATH, hf:NAME, gym:NAME "
                         f"or one of {', '.join(SETS)}")
    return list({p.messages[-1]["content"]: p for p in problems}.values())  # a question asked twice is one problem


def chain_terms(spec: str, text: str) -> int | None:
    """The numbers of each sum: `chain:10` has ten, `chain` three to five."""
    known = text == "" or (text.isdecimal() and 1 <= int(text) <= 1000)
    require(known, f"--task {spec}: after the colon stands how many numbers to add, e.g. chain:10")
    return int(text) if text else None


def in_hash_order(problems: list[Problem]) -> list[Problem]:
    return sorted(problems, key=lambda p: hashlib.sha1(p.id.encode()).digest())


def take(problems: list[Problem], seed: int, start: int, count: int) -> list[Problem]:
    """Problems `start` … `start + count` of an endless stream: one seeded permutation after the other.

    >>> p = [Problem(str(i), []) for i in range(3)]
    >>> [q.id for q in take(p, seed=0, start=0, count=6)] == [q.id for q in take(p, 0, 0, 2) + take(p, 0, 2, 4)]
    True
    """
    out: list[Problem] = []
    while len(out) < count:
        epoch, offset = divmod(start + len(out), len(problems))
        order = random.Random(f"{seed}/{epoch}").sample(range(len(problems)), len(problems))
        out += [problems[i] for i in order[offset : offset + count - len(out)]]
    return out


# ---------------------------------------------------------------------------------------------------------------------
# chain: the embedded task
# ---------------------------------------------------------------------------------------------------------------------
CHAIN_SIZE = 4096  # training problems


def chain_problems(count: int, terms: int | None = None) -> list[Problem]:
    """`count` different sums of `terms` two-digit numbers (3 to 5 when None).

    >>> p = chain_problems(1, terms=3)[0]
    >>> sum(p.meta["terms"]) == int(p.answer) and p.solution.endswith(f"#### {p.answer}")
    True
    """
    rng = random.Random(f"chain/{terms}")
    seen: dict[tuple[int, ...], None] = {}
    while len(seen) < count:
        seen[tuple(rng.randint(10, 99) for _ in range(terms or rng.randint(3, 5)))] = None
    return [chain_problem(numbers) for numbers in seen]


def chain_problem(numbers: tuple[int, ...]) -> Problem:
    text, totals = "+".join(map(str, numbers)), list(accumulate(numbers))
    steps = [f"{before}+{n}={after}" for before, n, after in zip(totals, numbers[1:], totals[1:])]
    return Problem(id=f"chain/{text}", messages=[{"role": "user", "content": f"Compute {text}."}],
                   answer=str(totals[-1]), solution="; ".join([*steps, f"#### {totals[-1]}"]), verifier="chain",
                   meta={"terms": numbers})


# ---------------------------------------------------------------------------------------------------------------------
# mixtures and overlap
# ---------------------------------------------------------------------------------------------------------------------
def mixture(spec: str) -> list[tuple[float, str]]:
    """The weighted parts of a task.

    >>> mixture("4*gsm8k + 1*mbpp"), mixture("jsonl:a+b.jsonl")
    ([(4.0, 'gsm8k'), (1.0, 'mbpp')], [(1.0, 'jsonl:a+b.jsonl')])
    """
    number = r"\d+(?:\.\d+)?\*"
    if not re.match(number, spec):
        return [(1.0, spec)]
    parts = [part.partition("*") for part in re.split(rf"\s*\+\s*(?={number})", spec)]
    return [(float(weight), name.strip()) for weight, _, name in parts]


def blend(weights: list[float], lists: list[list]) -> list:
    """The lists in proportion to their weights, none cut: a small list with a large weight comes several times.

    >>> "".join(blend([3, 1], ["ab", "xy"]))
    'abababxy'
    """
    size = max(len(problems) / weight for weight, problems in zip(weights, lists))
    total = round(sum(weights) * size)
    require(total < 10**7, f"--task: with these weights a pass over all problems has {total:,} "
            "questions; bring the weights nearer to the sizes of the sets")
    return [part[i % len(part)] for weight, part in zip(weights, lists) for i in range(round(weight * size))]


def question(problem: Problem) -> str:
    """The question without the instruction that all questions of a set share, in small letters and single spaces."""
    text = problem.meta.get("question") or problem.messages[-1]["content"]
    return " ".join(text.lower().split())


def overlap(train: Iterable[Problem], evaluation: Iterable[Problem], n: int = 13) -> list[Problem]:
    """The training problems that share n words in a row with an evaluation problem, the usual test of contamination."""

    def grams(problem: Problem) -> set[str]:
        words = re.findall(r"\w+", question(problem))
        return {" ".join(words[i : i + n]) for i in range(len(words) - n + 1)}

    seen = set().union(*map(grams, evaluation))
    return [p for p in train if not seen.isdisjoint(grams(p))]


# ---------------------------------------------------------------------------------------------------------------------
# where records come from
# ---------------------------------------------------------------------------------------------------------------------
BOTH, TEST = ("train", "test"), ("test",)
SETS = {  # name → its place on the hub, its file under --data_dir, its splits
    "gsm8k": ("openai/gsm8k:main", "gsm8k/{split}.jsonl", BOTH),
    "math500": ("HuggingFaceH4/MATH-500", "math/math500.json", TEST),
    "aime24": ("HuggingFaceH4/aime_2024@train", "aime24/{split}.jsonl", TEST),
    "aime25": ("math-ai/aime25", "aime25/{split}.jsonl", TEST),
    # sciknoweval/chemistry and so on. The files are SDPO's split; the hub has one pool, of which a tenth is the test
    "sciknoweval": ("hicai-zju/SciKnowEval:v2@test", "sciknoweval/{part}/{split}.json", BOTH),
    "toolalpaca": ("Ahren09/ToolAlpaca", "toolalpaca/{split}.json", BOTH),
    "mbpp": ("google-research-datasets/mbpp:sanitized", "mbpp/sanitized-mbpp.json", BOTH),
    "humaneval": ("openai/openai_humaneval", "humaneval/HumanEval.jsonl", TEST),
    # livecodebench/2025-02-01..2025-05-01 has the contests from the first day to before the second
    "livecodebench": ("lighteval/code_generation_lite:release_v6", "livecodebench/{split}.jsonl", TEST),
}


def read_set(spec: str, split: str, data_dir: str) -> Iterator[tuple[dict, str]]:
    """Records of one split of a named set; a set with one split has it for both."""
    name, _, part = spec.partition("/")
    hub, file, splits = SETS[name]
    require(part or name != "sciknoweval", f"{name}: name the subject too, e.g. {name}/chemistry")
    split = split if split in splits else splits[0]
    file = str(Path(data_dir) / file.format(part=part, split=split))
    records = read_records(file) if data_dir else read_hub(hub if "@" in hub else f"{hub}@{split}")
    return ((record, where) for record, where in records if belongs(record, name, part, split))


def belongs(record: dict, name: str, part: str, split: str) -> bool:
    """Whether a record is of this part and split of the set, where its source mixes them."""
    if name == "mbpp":  # the authors' split by number
        first, last = (601, 974) if split == "train" else (11, 510)
        return first <= record["task_id"] <= last
    if name == "livecodebench" and part:
        first, _, last = part.partition("..")
        return first <= record["contest_date"] < last
    if name == "sciknoweval" and "domain" in record:  # the hub; SDPO takes the multiple-choice questions of level 3
        tenth = hashlib.sha1(record["question"].encode()).digest()[0] % 10 == 0
        return (record["domain"].lower().startswith(part) and record["details"]["level"] == "L3"
                and record["type"] in ("mcq-4-choices", "mcq-2-choices") and tenth == (split == "test"))
    return True


def read_records(path: str) -> Iterator[tuple[dict, str]]:
    """Records of a .jsonl file or of a .json list, each with the words that say where it stands."""
    file = Path(path).expanduser()
    require(file.is_file(), f"--task: no such file: {path}")
    text = file.read_text(encoding="utf-8")
    line = 1  # where the JSON text begins that is being read
    try:
        if text.lstrip().startswith("["):
            yield from ((record, f"{path}, record {i}") for i, record in enumerate(json.loads(text), 1))
            return
        for line, part in enumerate(text.split("\n"), 1):  # not splitlines: JSON may hold U+2028 as it is
            if part.strip():
                yield json.loads(part), f"{path}, line {line}"
    except json.JSONDecodeError as error:
        raise SystemExit(f"error: {path}, line {line + error.lineno - 1}: not JSON ({error.msg})") from None


def read_hub(name: str) -> Iterator[tuple[dict, str]]:
    """Records of a hub dataset, NAME[:CONFIG][@SPLIT]; the split is train where it is not named."""
    import datasets

    path, _, split = name.partition("@")
    path, _, config = path.partition(":")
    if not Path(path).exists():
        cached = Path(datasets.config.HF_DATASETS_CACHE, path.replace("/", "___"))
        check_hub("--task", path, "dataset", cached)
    try:
        data = datasets.load_dataset(path, config or None, split=split or "train")
    except (OSError, ValueError) as error:  # not there, no network, no such config or split
        raise SystemExit(f"error: --task hf:{name}: {str(error).splitlines()[0]}; without the hub, give --data_dir or "
                         "jsonl:PATH") from None
    yield from ((record, f"hf:{name}, record {i}") for i, record in enumerate(data, 1))


# ---------------------------------------------------------------------------------------------------------------------
# what records mean
# ---------------------------------------------------------------------------------------------------------------------
INSTRUCTION = "Work step by step and finish with the final answer in \\boxed{}."
CHOICE_INSTRUCTION = "Reason step by step, then give only the letter of the answer between <answer> and </answer>."
CODE_INSTRUCTION = "Put the whole program in one ```python block. Only the standard library is there."
NAMES = {  # what a field may be called where --fields does not say
    "question": ("question", "problem", "prompt", "question_content"), "system": ("system",),
    "answer": ("answer", "final_answer", "golden_answer", "answerKey"), "solution": ("solution", "rationale"),
}


def as_problem(record: dict, where: str, fields: str, instruction: str | None) -> Problem:
    """One record as a problem. Its fields tell its kind: those in CODE_FORMS make it code; kind "mcq" or answerKey
    (SciKnowEval) multiple choice; kind "tooluse" or golden_answer (ToolAlpaca) tool calls; any other is maths, where an
    answer that ends in "#### N", as GSM8K's do, is a solution and its answer."""
    require(isinstance(record, dict), f"{where}: a record must be a JSON object, not {type(record).__name__}")
    renamed = dict(pair.split("=", 1) for pair in fields.split(",") if "=" in pair)
    found = {name: record[key] for name, keys in NAMES.items()
             for key in ([renamed[name]] if name in renamed else keys)[::-1] if key in record}
    code = next((form for key, form in CODE_FORMS.items() if key in record), None)
    kind = ("code" if code else "choice" if record.get("kind") == "mcq" or "answerKey" in record else
            "tool" if record.get("kind") == "tooluse" or "golden_answer" in record else "math")
    if isinstance(found.get("answer"), list):
        found["answer"] = json.dumps(found["answer"])
    for name in ("question",) if code else ("question", "answer"):
        there = isinstance(found.get(name), (str, int, float)) and str(found[name]).strip()
        require(there, f"{where}: field {renamed.get(name, name)!r} is missing or empty; it has {', '.join(record)}; "
                f"name the fields with --fields, e.g. {name}=FIELD")
    user = text = str(found["question"])
    answer, solution, meta = str(found.get("answer", "")).strip() or None, found.get("solution"), {}
    if code:
        try:
            user, solution, meta = code(record, text)
        except (LookupError, AttributeError, StopIteration, ValueError, TypeError, SyntaxError, zlib.error) as error:
            raise SystemExit(f"error: {where}: its tests cannot be read ({type(error).__name__}: {error})") from None
        user, answer = f"{user}\n\n{CODE_INSTRUCTION}", None
    elif kind == "math":
        if "####" in answer:
            worked, _, answer = answer.rpartition("####")
            solution = solution or worked.strip()
        suffix = INSTRUCTION if instruction is None else instruction
        user = f"{text.strip()}\n\n{suffix}" if suffix else text
    elif "choices" in record:  # as SciKnowEval stands on the hub
        options = [f"{label}: {option}" for label, option in zip(record["choices"]["label"], record["choices"]["text"])]
        user = "\n".join([text, "", *options, "", CHOICE_INSTRUCTION])
    if isinstance(solution, list):  # several ways to the answer: the first
        solution = solution[0] if solution else None
    name = renamed.get("solution", "solution")
    require(solution is None or isinstance(solution, str), f"{where}: field {name!r} must be a "
            "text or a list of texts; name another field with --fields solution=FIELD")
    system = [{"role": "system", "content": found["system"]}] if found.get("system") else []
    return Problem(hashlib.sha1(text.encode()).hexdigest()[:16], [*system, {"role": "user", "content": user}],
                   answer and answer.strip(), solution, kind, {"question": text, **meta})


# A code form gives the question, a solution or None, and how a program is judged: by `tests`, Python source that calls
# the program's functions `names`; `setup` runs before the tests, `prelude` before the program (sandbox.run_functions).
def mbpp_form(record: dict, text: str) -> tuple[str, str | None, dict]:
    tree, tests = ast.parse(record["code"]), record["test_list"]
    imports = [ast.unparse(node) for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    used = {node.id for node in ast.walk(ast.parse("\n".join(tests))) if isinstance(node, ast.Name)}
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in used]
    if not names:
        raise ValueError("no test calls a function of the solution")
    prelude = "\n".join(record.get("test_imports", []))
    return (f"{text}\n\nIt must pass this test and others like it:\n{fenced(tests[0])}", fenced(record["code"]),
            dict(names=names, tests=tests, prelude=prelude, setup="\n".join([prelude, *imports])))


def humaneval_form(record: dict, text: str) -> tuple[str, str | None, dict]:
    name, stub = record["entry_point"], f"{text}    pass\n"  # the helpers that the prompt defines are there for both
    return (f"Complete this function:\n{fenced(text)}", fenced(text + record["canonical_solution"]),
            dict(names=[name], tests=[f"{record['test']}\ncheck({name})"], prelude=stub, setup=stub))


def contest_form(record: dict, text: str) -> tuple[str, str | None, dict]:
    """APPS and LiveCodeBench: scripts, or functions whose arguments and results are JSON."""
    if apps := "input_output" in record:
        data = json.loads(record["input_output"])
        name, inputs, outputs = data.get("fn_name"), data["inputs"], data["outputs"]
    else:
        private = record["private_test_cases"]
        if not private.startswith("["):  # a JSON text, pickled and compressed; its opcodes are read, not run
            opcodes = pickletools.genops(zlib.decompress(base64.b64decode(private)))
            private = next(text for _, text, _ in opcodes if isinstance(text, str))
        cases = [*json.loads(record["public_test_cases"]), *json.loads(private)]
        name = json.loads(record["metadata"]).get("func_name")
        inputs, outputs = [case["input"] for case in cases], [case["output"] for case in cases]
        if name:
            inputs = [[json.loads(line) for line in given.split("\n")] for given in inputs]
            outputs = [json.loads(expected) for expected in outputs]
    if not inputs or len(inputs) != len(outputs):
        raise ValueError(f"{len(inputs)} inputs, {len(outputs)} outputs")
    solution = next(map(fenced, json.loads(record.get("solutions") or "[]")), None)
    starter = record.get("starter_code")
    user = text + (f"\n\nStart from this code:\n{fenced(starter)}" if starter else
                   "\n\nThe program reads standard input and writes standard output.")
    if not name:
        inputs, outputs = (["\n".join(x) if isinstance(x, list) else x for x in side] for side in (inputs, outputs))
        tests = [f"assert words(script({x!r})) == words({y!r})" for x, y in zip(inputs, outputs)]
        return user, solution, dict(script=True, names=["script"], tests=tests, prelude="", setup=SCRIPT_SETUP)
    # APPS has some of its expected results in a list of one
    right = [[y, y[0]] if apps and isinstance(y, list) and len(y) == 1 else [y] for y in outputs]
    tests = [f"assert as_lists({name}(*{x!r})) in {y!r}" for x, y in zip(inputs, right)]
    return user, solution, dict(names=[name], tests=tests, prelude="from typing import *", setup=FUNCTION_SETUP)


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
    return [[Decimal(w) if number.fullmatch(w) else w for w in line.split()] for line in text.strip().splitlines()]
"""
CODE_FORMS = {"test_list": mbpp_form, "entry_point": humaneval_form, "input_output": contest_form,
              "public_test_cases": contest_form}


def fenced(code: str) -> str:
    return f"```python\n{code}\n```"


# ---------------------------------------------------------------------------------------------------------------------
# reasoning-gym
# ---------------------------------------------------------------------------------------------------------------------
GYM_SIZE = 10_000  # training problems
GYM_INSTRUCTION = "Think step by step, then give only the final answer between <answer> and </answer>."


def gym_problems(name: str, count: int) -> list[Problem]:
    """`count` problems of a reasoning-gym dataset with its default settings."""
    import reasoning_gym

    try:
        made = reasoning_gym.create_dataset(name, size=count, seed=0)
    except ValueError as error:  # an unknown name
        raise SystemExit(f"error: --task gym:{name}: {error}") from None
    return [Problem(f"gym/{name}/{i}", [{"role": "user", "content": f"{entry['question']}\n\n{GYM_INSTRUCTION}"}],
                    str(entry["answer"]), None, "gym", {"gym": name, "entry": entry}) for i, entry in enumerate(made)]
