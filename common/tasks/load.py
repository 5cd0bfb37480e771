"""From --task to problems, and the order in which a run sees them.

A task is two lists of `Problem` that share no question, `train` and `heldout`:

    chain           embedded: sums of three to five two-digit numbers (`chain:10`: of ten)
    jsonl:PATH      one JSON object per line, or one JSON list: a question, its answer, perhaps a
                    worked solution
    parquet:PATH    the same in a table (the content of a file says what it is, not its name)
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
import os
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from common import require
from common.tasks import chain, gym, maths
from common.tasks.fields import check_fields
from common.tasks.kinds import as_problem
from common.tasks.lazy import Lazy, at_hand, picked, without
from common.tasks.mixtures import blend, mixture, overlap, question
from common.tasks.problem import Problem
from common.tasks.records import BadRecord, Records, read_hub, read_records
from common.tasks.sets import BOTH, SETS, read_set

FILES = ("jsonl", "json", "parquet", "hf")  # sources whose records may be of any kind


@dataclass(frozen=True)
class Task:
    train: Sequence[Problem]
    heldout: Sequence[Problem]
    notes: tuple[str, ...] = ()  # what was left out, and the overlap with evaluation, for the log
    summary: tuple[str, ...] = ()  # what was read: counts, kinds and examples

    @property
    def at_hand(self) -> list[Problem]:
        """The problems that are there; those that are made as they are needed are not."""
        return [*at_hand(self.heldout), *at_hand(self.train)]

    def without(self, bad: list[tuple[Problem, str]]) -> Task:
        """The task without problems that cannot be judged, each of which comes with the reason.

        Raises SystemExit if one of them is from a source whose bad records are not left out.
        """
        places = {problem.place for problem, _ in bad}
        for problem, reason in bad:
            skip = problem.meta.get("skip", False)
            require(skip, f"{len(places)} problems cannot be judged, the first is {problem.place}: "
                    f"{reason}; mend or remove them, or leave them out with --bad_records skip")
        if not bad:
            return self
        errors = [BadRecord(problem.place, reason) for problem, reason in bad]
        notes = left_out("the check before the run", len(self.at_hand), errors)
        task = Task(
            without(self.train, places), without(self.heldout, places),
            (*self.notes, *notes), self.summary,
        )
        require(task.train and task.heldout, f"{len(places)} problems cannot be judged, and "
                f"nothing is left to train on or to evaluate on; the first is {errors[0].where}: "
                f"{errors[0].reason}")
        return task


class Options(NamedTuple):
    """How the records of a task are read; see load_task."""

    fields: str = ""
    kind: str = ""
    instruction: str | None = None
    data_dir: str = ""
    bad_records: str = ""
    gym_reward: str = "full"


class Part(NamedTuple):
    """One part of a mixture."""

    train: Sequence[Problem]
    heldout: Sequence[Problem]
    notes: list[str]


def load_task(spec: str, *, heldout: int, against: str = "", **options) -> Task:
    """Load `spec` and set `heldout` problems aside for evaluation: from the set's own test split if
    it has one (all of the split if it has fewer).

    against: more evaluation sets, joined by commas. Training questions that are in an evaluation
    set are removed; `notes` tells how many share 13 words in a row with one.
    options:
        fields: "question=prompt,answer=reward_model.ground_truth,…" maps the names used here
        (question, answer, solution, system) to the data's.
        kind: what the records of files and of the hub are; "" leaves that to the records (kinds.py)
        instruction: text that is added to every question of maths or reasoning-gym; None takes
        maths.INSTRUCTION or gym.INSTRUCTION.
        data_dir: the folder that the named sets are read from; "" reads them from the hub.
        bad_records: "error" ends the run at a record that cannot be used, "skip" leaves it out and
        says so; "" is "skip" for records of the hub and "error" for others.
        gym_reward: "full" or "score", see gym.judge.
    Raises SystemExit with one line that names the file, the line and the field if a record is
    malformed, and if no part of the task reads an option that is given.
    """
    how = Options(**options)
    check_fields(how.fields)
    mixed = mixture(spec)
    weights = [weight for weight, _ in mixed]
    for weight, name in mixed:
        require(weight > 0, f"--task {spec}: the weight of {name} is 0; leave it out or raise it")
    parts, notes, summary = [], [], []
    for weight, name in mixed:
        part = divide(name, round(heldout * weight / sum(weights)), how)
        parts.append(part)
        notes += part.notes
        summary += summarise(name, part)
    check_options(spec, parts, [name for _, name in mixed], how)

    tests = joined([part.heldout for part in parts])
    evaluation = {"the held-out problems": at_hand(tests)}
    for name in filter(None, against.split(",")):
        evaluation[name] = read_problems(name, "test", Options(data_dir=how.data_dir)).problems
    require(tests or not heldout, f"--task {spec}: no problem is held out; raise --heldout")
    kept = []
    for (_, name), part in zip(mixed, parts):
        train = not_evaluated(part.train, evaluation)
        kept.append(train)
        require(train, f"--task {name}: no training question is left, for all are in an evaluation "
                "set; give more data, or take that set out of --against")
    lists = [train for train in kept if not isinstance(train, Lazy)]
    notes += overlaps([problem for train in lists for problem in train], evaluation)
    removed = sum(len(part.train) for part in parts) - sum(map(len, kept))
    if removed:
        notes.append(f"{removed} training questions were removed, for they are in an evaluation "
                     "set")
    places = [[(k, i) for i in range(len(train))] for k, train in enumerate(kept)]
    return Task(picked(kept, blend(weights, places)), tests, tuple(notes), tuple(summary))


def check_options(spec: str, parts: list[Part], names: list[str], how: Options) -> None:
    """End the run if an option is given that no part of the task reads."""
    read = set()
    for name, part in zip(names, parts):
        source = name.partition(":")[0]
        if source == "gym":
            read |= {"gym_reward", "instruction"}
            continue
        if source in FILES:
            read |= {"fields", "kind", "bad_records"}
        elif source != "chain":  # a named set
            read |= {"fields", "bad_records"}
        if any(problem.kind == "math" for problem in [*part.train, *part.heldout]):
            read.add("instruction")
    for option in ("fields", "kind", "instruction", "bad_records", "gym_reward"):
        value = getattr(how, option)
        given = value and value != Options._field_defaults[option]
        require(option in read or not given,
                f"--task {spec}: --{option} changes nothing here; leave it out")


def joined(parts: list[Sequence[Problem]]) -> Sequence[Problem]:
    places = []
    for k, part in enumerate(parts):
        places += [(k, i) for i in range(len(part))]
    return picked(parts, places)


def not_evaluated(train: Sequence[Problem],
                  evaluation: dict[str, list[Problem]]) -> Sequence[Problem]:
    """The training problems whose question is in no evaluation set. A lazy list sees to that
    itself, as far as its own held-out problems go."""
    if isinstance(train, Lazy):
        return train
    asked = set()
    for problems in evaluation.values():
        asked |= set(map(question, problems))
    return [problem for problem in train if question(problem) not in asked]


def overlaps(train: list[Problem], evaluation: dict[str, list[Problem]]) -> list[str]:
    """How many training problems share 13 words in a row with each evaluation set."""
    notes = []
    for name, problems in evaluation.items():
        shared = len(overlap(train, problems))
        if shared:
            notes.append(f"{shared} of {len(train)} training questions share 13 words in a row "
                         f"with {name}")
    return notes


def divide(name: str, count: int, how: Options) -> Part:
    """One part of a mixture, with `count` problems for evaluation."""
    source, _, rest = name.partition(":")
    if source == "gym":
        return Part(*gym.divide(rest, count, how.gym_reward, how.instruction))
    read = read_problems(name, "train", how, count)
    train, notes = in_hash_order(read.problems), list(read.notes)
    if source in FILES and not how.kind:
        counts = Counter(problem.kind for problem in train)
        kinds = ", ".join(f"{n} {kind}" for kind, n in counts.items())
        notes.append(f"{name}: read as {kinds}; --kind states another kind")
    named = name.partition("/")[0]
    if named in SETS and SETS[named].splits == BOTH:
        read = read_problems(name, "test", how)
        test = in_hash_order(read.problems)
        notes += read.notes
    else:
        test = train[:count]
        require(len(train) > count, f"--task {name}: {len(train)} different problems, but {count} "
                "are to be held out; lower --heldout or give more data")
        train = train[count:]
    notes += maths.notes([problem for problem in [*train, *test] if problem.kind == "math"])
    if len(test) < count:
        notes.append(f"{name}: its test split has {len(test)} problems, not {count}")
    return Part(train, test[:count], notes)


# --------------------------------------------------------------------------------------------------
# one source
# --------------------------------------------------------------------------------------------------
class Reading(NamedTuple):
    problems: list[Problem]
    notes: list[str]  # what was left out


def load_problems(spec: str, split: str = "test", *, heldout: int = 0, **options) -> list[Problem]:
    """All different problems of one source; prints what it left out. A question that is asked twice
    is one problem.

    split: "train" or "test", of a named set. options: see load_task.
    """
    read = read_problems(spec, split, Options(**options), heldout)
    for note in read.notes:
        if os.environ.get("RANK", "0") == "0":
            print(f"note: {note}", flush=True)
    return read.problems


def read_problems(spec: str, split: str, how: Options, heldout: int = 0) -> Reading:
    source, _, name = spec.partition(":")
    named = source.partition("/")[0]
    if source == "chain":
        return Reading(chain.load(spec, name, heldout), [])
    if source == "gym":
        _, tests, notes = gym.divide(name, heldout or gym.SIZE, how.gym_reward,
                                     how.instruction)
        return Reading(list(tests), notes)
    kind = how.kind
    from_hub = source == "hf"
    if named in SETS and not name:
        records = read_set(source, split, how.data_dir)
        kind = SETS[named].kind
        from_hub = not how.data_dir
    else:
        records = read_source(spec)
    skip = how.bad_records == "skip" or (how.bad_records == "" and from_hub)
    return read_all(spec, records, how._replace(kind=kind), skip)


def read_source(spec: str) -> Records:
    """Records of a file or of the hub."""
    source, _, name = spec.partition(":")
    require(source in FILES, f"--task {spec}: unknown source {source!r}; use chain, jsonl:PATH, "
            f"parquet:PATH, hf:NAME, gym:NAME or one of {', '.join(SETS)}")
    if source == "hf":
        return read_hub(name)
    return read_records(name)


def read_all(spec: str, records: Records, how: Options, skip: bool) -> Reading:
    """The different problems of the records. skip: leave out those that cannot be used."""
    different: dict[tuple, tuple[Problem, str]] = {}  # question → (problem, where)
    bad: list[BadRecord] = []
    contradicted: set[tuple] = set()
    read = 0
    for data, where in records:
        read += 1
        try:
            problem = as_problem(data, where, how.fields, how.instruction, how.kind)
            asked = tuple(m["content"] for m in problem.messages if m["role"] != "system")
            before, place = different.get(asked, (problem, where))
            if asked in contradicted or before.answer != problem.answer:
                contradicted.add(asked)
                raise BadRecord(where, f"field 'answer' has {problem.answer!r:.60}, but the same "
                                f"question has {before.answer!r:.60} in {place}")
            problem.meta["skip"] = skip
            different[asked] = (problem, where)
        except BadRecord as error:
            if not skip:
                raise
            bad.append(error)
    for asked in contradicted:  # nobody knows which answer is right
        _, where = different.pop(asked)
        bad.append(BadRecord(where, "the same question has another answer in another record"))
    if bad and not different:
        raise SystemExit(f"error: --task {spec}: none of its {read} records can be used, the first "
                         f"is {bad[0].where}: {bad[0].reason}")
    return Reading([problem for problem, _ in different.values()], left_out(spec, read, bad))


def left_out(spec: str, read: int, bad: list[BadRecord]) -> list[str]:
    """How many records were left out, and for each reason how many and which."""
    if not bad:
        return []
    reasons: dict[str, list[BadRecord]] = {}
    for error in bad:
        alike = re.sub(r"\d+|'[^']*'|\(.*", "", error.reason)
        reasons.setdefault(alike, []).append(error)
    notes = [f"{spec}: {len(bad)} of {read} records were left out; --bad_records error ends the "
             "run at the first"]
    for errors in sorted(reasons.values(), key=len, reverse=True):
        places = [error.where.rpartition(", ")[2] for error in errors[:5]]
        if len(errors) > 5:
            places.append("…")
        notes.append(f"  {len(errors)} × {errors[0].reason[:200]}: {', '.join(places)}")
    return notes


def summarise(name: str, part: Part) -> list[str]:
    """What was read: the number of problems of each kind, and three examples."""
    problems = [*at_hand(part.heldout), *at_hand(part.train)]
    counts = Counter(problem.kind for problem in problems)
    kinds = ", ".join(f"{n:,} {kind}" for kind, n in counts.items())
    solved = sum(problem.solution is not None for problem in problems)
    lines = [f"{name}: {len(part.train):,} problems to train on, {len(part.heldout):,} held out; "
             f"{kinds}; {solved:,} with a worked solution"]
    if isinstance(part.train, Lazy):
        lines = [f"{name}: {len(part.train):,} problems to train on, {len(part.heldout):,} held "
                 "out, made as they are needed"]
    for problem in [*at_hand(part.train)[:3], *at_hand(part.heldout)[:3]][:3]:
        answer = f"{len(problem.meta.get('tests', ()))} tests"
        if problem.answer is not None:
            answer = f"answer {short(problem.answer)}"
        hint = "no worked solution"
        if problem.solution is not None:
            hint = f"worked solution {short(problem.solution)}"
        lines.append(f"  {short(problem.meta.get('question') or problem.messages[-1]['content'])}: "
                     f"{answer}, {hint}")
    return lines


def short(text: str) -> str:
    """The text in one line of at most 80 characters, in quotes."""
    line = " ".join(text.split())
    if len(line) > 80:
        line = line[:79] + "…"
    return f"“{line}”"


# --------------------------------------------------------------------------------------------------
# order
# --------------------------------------------------------------------------------------------------
def in_hash_order(problems: list[Problem]) -> list[Problem]:
    """The problems in an order that depends on their ids alone."""

    def digest(problem: Problem) -> bytes:
        return hashlib.sha1(problem.id.encode()).digest()

    return sorted(problems, key=digest)


def first_different(problems: Sequence[Problem], count: int) -> list[Problem]:
    """The first `count` different problems, or all if there are fewer: a small part of a mixture
    repeats."""
    different = {}
    for problem in problems:
        if len(different) == count:
            break
        different[problem.id] = problem
    return list(different.values())


def take(problems: Sequence[Problem], seed: int, start: int, count: int) -> list[Problem]:
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
