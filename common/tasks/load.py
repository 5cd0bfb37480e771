"""From --task to problems, and the order in which a run sees them.

A task is two lists of `Problem` that share no question, `train` and `heldout`:

    chain           embedded: sums of three to five two-digit numbers (`chain:10`: of ten)
    jsonl:PATH      one JSON object per line, or one JSON list: a question, its answer, perhaps a
                    worked solution
    hf:NAME[:CONF]  the same from a dataset on the Hugging Face hub; `@SPLIT` ends it
    gym:NAME        a generated dataset of reasoning-gym, scored by its own `score_answer`
    gsm8k …         a named set (sets.py), from the hub or from --data_dir
    4*gsm8k+1*mbpp  a mixture: each part has its share of the training stream and of the held-out
                    problems

The order of training is a pure function of (seed, position), so a resumed run needs no iterator
state.
"""
from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from common import require
from common.tasks import chain, gym
from common.tasks.kinds import as_problem
from common.tasks.mixtures import blend, mixture, overlap, question
from common.tasks.problem import Problem
from common.tasks.records import check_fields, read_hub, read_records
from common.tasks.sets import BOTH, SETS, read_set


@dataclass(frozen=True)
class Task:
    train: list[Problem]
    heldout: list[Problem]
    notes: tuple[str, ...] = ()  # what was read and how it overlaps with evaluation, for the log


def load_task(spec: str, *, heldout: int, fields: str = "", kind: str = "",
              instruction: str | None = None, data_dir: str = "", against: str = "") -> Task:
    """Load `spec` and set `heldout` problems aside for evaluation: from the set's own test split if
    it has one (all of the split if it has fewer).

    fields: "question=prompt,answer=gold,…" maps the names used here (question, answer, solution,
    system) to the data's.
    kind: what the records of files and of the hub are; "" leaves that to the records (kinds.py).
    instruction: text that is added to every maths question; None takes maths.INSTRUCTION.
    data_dir: the folder that the named sets are read from; "" reads them from the hub.
    against: more evaluation sets, joined by commas. Training questions that are in an evaluation
    set are removed; `notes` tells how many share 13 words in a row with one.
    Raises: SystemExit with one line that names the file, the line and the field if a record is
    malformed.
    """
    check_fields(fields)
    parts = mixture(spec)
    weights = [weight for weight, _ in parts]
    for weight, name in parts:
        require(weight > 0, f"--task {spec}: the weight of {name} is 0; leave it out or raise it")
    options = {"fields": fields, "kind": kind, "instruction": instruction, "data_dir": data_dir}
    trains, tests, notes = [], [], []
    for weight, name in parts:
        count = round(heldout * weight / sum(weights))
        train, test, said = divide(name, count, options)
        trains.append(train)
        tests += test
        notes += said

    evaluation = {"the held-out problems": tests}
    for name in filter(None, against.split(",")):
        evaluation[name] = load_problems(name, "test", data_dir=data_dir)
    asked = set()
    for problems in evaluation.values():
        asked |= set(map(question, problems))
    kept = []
    for (_, name), train in zip(parts, trains):
        train = [problem for problem in train if question(problem) not in asked]
        kept.append(train)
        require(train, f"--task {name}: no training question is left, for all are in an evaluation "
                "set; give more data, or take that set out of --against")
    require(tests or not heldout, f"--task {spec}: no problem is held out; raise --heldout")
    everything = [problem for train in kept for problem in train]
    for name, problems in evaluation.items():
        shared = len(overlap(everything, problems))
        if shared:
            notes.append(f"{shared} of {len(everything)} training questions share 13 words in a "
                         f"row with {name}")
    removed = sum(map(len, trains)) - len(everything)
    if removed:
        notes.append(f"{removed} training questions were removed, for they are in an evaluation "
                     "set")
    return Task(blend(weights, kept), tests, tuple(notes))


def divide(name: str, count: int, options: dict) -> tuple[list[Problem], list[Problem], list[str]]:
    """One part of a mixture: → (its training problems, `count` for evaluation, notes)."""
    train = in_hash_order(load_problems(name, "train", heldout=count, **options))
    source = name.partition("/")[0]
    notes = []
    if name.partition(":")[0] in FILES and not options["kind"]:
        counts = Counter(problem.kind for problem in train)
        kinds = ", ".join(f"{n} {kind}" for kind, n in counts.items())
        notes.append(f"{name}: read as {kinds}; --kind states another kind")
    if source in SETS and SETS[source].splits == BOTH:
        test = in_hash_order(load_problems(name, "test", **options))
    else:
        test = train[:count]
        require(len(train) > count, f"--task {name}: {len(train)} different problems, but {count} "
                "are to be held out; lower --heldout or give more data")
        train = train[count:]
    if len(test) < count:
        notes.append(f"{name}: its test split has {len(test)} problems, not {count}")
    return train, test[:count], notes


FILES = ("jsonl", "json", "hf")  # sources whose records may be of any kind


def load_problems(spec: str, split: str = "test", *, heldout: int = 0, fields: str = "",
                  kind: str = "", instruction: str | None = None,
                  data_dir: str = "") -> list[Problem]:
    """All different problems of one source. split: "train" or "test", of a named set.

    A question that is asked twice is one problem.
    """
    source, _, name = spec.partition(":")
    named = source.partition("/")[0]
    if source == "chain":
        problems = chain.load(spec, name, heldout)
    elif source == "gym":
        problems = gym.problems(name, gym.SIZE + heldout)
    else:
        if named in SETS and not name:
            records = read_set(source, split, data_dir)
            kind = SETS[named].kind
        else:
            records = read_source(spec)
        problems = [as_problem(data, where, fields, instruction, kind) for data, where in records]
    different = {}
    for problem in problems:
        different[problem.messages[-1]["content"]] = problem
    return list(different.values())


def read_source(spec: str) -> Iterator[tuple[dict, str]]:
    """Records of a file or of the hub."""
    source, _, name = spec.partition(":")
    require(source in FILES, f"--task {spec}: unknown source {source!r}; use chain, jsonl:PATH, "
            f"hf:NAME, gym:NAME or one of {', '.join(SETS)}")
    if source == "hf":
        return read_hub(name)
    return read_records(name)


# --------------------------------------------------------------------------------------------------
# order
# --------------------------------------------------------------------------------------------------
def in_hash_order(problems: list[Problem]) -> list[Problem]:
    """The problems in an order that depends on their ids alone."""

    def digest(problem: Problem) -> bytes:
        return hashlib.sha1(problem.id.encode()).digest()

    return sorted(problems, key=digest)


def take(problems: list[Problem], seed: int, start: int, count: int) -> list[Problem]:
    """Problems `start` … `start + count` of an endless stream: one seeded permutation per epoch.

    >>> p = [Problem(str(i), []) for i in range(3)]
    >>> first, rest = take(p, seed=0, start=0, count=2), take(p, seed=0, start=2, count=4)
    >>> take(p, seed=0, start=0, count=6) == first + rest
    True
    """
    out: list[Problem] = []
    while len(out) < count:
        epoch, offset = divmod(start + len(out), len(problems))
        rng = random.Random(f"{seed}/{epoch}")
        order = rng.sample(range(len(problems)), len(problems))
        end = offset + count - len(out)
        out += [problems[i] for i in order[offset:end]]
    return out
