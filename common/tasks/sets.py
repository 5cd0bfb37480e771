"""The named sets: the kind of each, and where it is."""
from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from common import require
from common.tasks.records import BadRecord, Records, read_hub, read_records

BOTH, TEST = ("train", "test"), ("test",)


class NamedSet(NamedTuple):
    kind: str  # of every record
    hub: str  # NAME[:CONFIG][@SPLIT]
    file: str  # under --data_dir
    splits: tuple[str, ...]


SETS = {
    "gsm8k": NamedSet("math", "openai/gsm8k:main", "gsm8k/{split}.jsonl", BOTH),
    "math500": NamedSet("math", "HuggingFaceH4/MATH-500", "math/math500.json", TEST),
    "aime24": NamedSet("math", "HuggingFaceH4/aime_2024@train", "aime24/{split}.jsonl", TEST),
    "aime25": NamedSet("math", "math-ai/aime25", "aime25/{split}.jsonl", TEST),
    # sciknoweval/chemistry and so on. The files are SDPO's split; the hub has one pool, and a tenth
    # of it is the test split here
    "sciknoweval": NamedSet(
        "choice", "hicai-zju/SciKnowEval:v2@test", "sciknoweval/{part}/{split}.json", BOTH
    ),
    "toolalpaca": NamedSet("tool", "Ahren09/ToolAlpaca", "toolalpaca/{split}.json", BOTH),
    "mbpp": NamedSet(
        "code", "google-research-datasets/mbpp:sanitized", "mbpp/sanitized-mbpp.json", BOTH
    ),
    "humaneval": NamedSet("code", "openai/openai_humaneval", "humaneval/HumanEval.jsonl", TEST),
    # livecodebench/2025-02-01..2025-05-01: contests from the first day to before the second
    "livecodebench": NamedSet(
        "code", "lighteval/code_generation_lite:release_v6", "livecodebench/{split}.jsonl", TEST
    ),
}


def read_set(spec: str, split: str, data_dir: str) -> Records:
    """Records of one split of a named set. A set with one split has it for both."""
    name, _, part = spec.partition("/")
    source = SETS[name]
    require(part or name != "sciknoweval", f"{name}: name the subject too, e.g. {name}/chemistry")
    if split not in source.splits:
        split = source.splits[0]
    if data_dir:
        file = source.file.format(part=part, split=split)
        records = read_records(str(Path(data_dir) / file))
    elif "@" in source.hub:
        records = read_hub(source.hub)
    else:
        records = read_hub(f"{source.hub}@{split}")
    for data, where in records:
        if not isinstance(data, dict):  # as_problem says what is wrong with it
            yield data, where
            continue
        try:
            mine = belongs(data, name, part, split)
        except (LookupError, TypeError, AttributeError) as error:
            yield BadRecord(where, f"not a record of {name} ({error!r})"), where
            continue
        if mine:
            yield data, where


def belongs(data: dict, name: str, part: str, split: str) -> bool:
    """Whether a record is of this part and split of the set, if its source mixes them."""
    if name == "mbpp":  # the authors' split by number
        first, last = (601, 974) if split == "train" else (11, 510)
        return first <= data["task_id"] <= last
    if name == "livecodebench" and part:
        first, _, last = part.partition("..")
        return first <= str(data["contest_date"]) < last
    if name == "sciknoweval" and "domain" in data:  # the hub's pool
        if not data["domain"].lower().startswith(part) or data["details"]["level"] != "L3":
            return False
        if data["type"] not in ("mcq-4-choices", "mcq-2-choices"):  # SDPO takes no others
            return False
        tenth = hashlib.sha1(data["question"].encode()).digest()[0] % 10 == 0
        return tenth == (split == "test")
    return True
