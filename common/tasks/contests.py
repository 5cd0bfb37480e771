"""Tests of contests: what a script prints, or what a function returns for arguments in JSON."""
from __future__ import annotations

import base64
import pickletools
import zlib
from typing import Any, NamedTuple

from common.tasks.fields import is_unicode, lookup
from common.tasks.records import from_json

FUNCTION_SETUP = """
inf, nan = float("inf"), float("nan")  # JSON may hold them, but has no tuples
def as_lists(x):
    return [as_lists(v) for v in x] if isinstance(x, (list, tuple)) else x
"""
SCRIPT_SETUP = """
import re
from decimal import Decimal
def words(text):  # line by line, numbers by value, as contests compare; 0110 is a text of digits
    number = re.compile("-?(0|[1-9][0-9]{0,39})([.][0-9]{1,40})?(e[+-][0-9]{2,3})?")
    as_value = lambda word: Decimal(word) if number.fullmatch(word) else word
    return [[as_value(word) for word in line.split()] for line in text.strip().splitlines()]
"""
HARNESS = """
from string import *
from re import *
from datetime import *
from collections import *
from heapq import *
from bisect import *
from copy import *
from math import *
from random import *
from statistics import *
from itertools import *
from functools import *
from operator import *
from io import *
from sys import *
from json import *
from builtins import *
from typing import *
import string, re, datetime, collections, heapq, bisect, copy, math, random, statistics
import itertools, functools, operator, io, sys, json
sys.setrecursionlimit(50000)
"""  # what LiveCodeBench's harness puts before a program (lcb_runner/evaluation/testing_util.py)
FIELDS = (  # fields that hold tests, beside LiveCodeBench's
    "input_output", "reward_model.ground_truth", "ground_truth", "tests", "test_cases",
    "verification_info", "official_tests",
)
CODE_CONTESTS = ("public_tests", "private_tests", "generated_tests")


class Cases(NamedTuple):
    """Inputs with their outputs, and the function that is called; "" for a script."""

    inputs: list
    outputs: list
    name: str = ""
    in_json: bool = False  # arguments, one per line, and results are texts in JSON


def has_tests(data: dict) -> bool:
    """Whether a record is a contest's: it has APPS's or LiveCodeBench's field of tests, or a field
    whose value looks like tests."""
    if {"input_output", "public_test_cases", CODE_CONTESTS[0]} & data.keys():
        return True
    if "inputs" in data and "outputs" in data:
        return True
    for field in FIELDS:
        try:
            read_cases(lookup(data, field))
        except (ValueError, LookupError, TypeError, RecursionError):
            continue
        return True
    return False


def tests(data: dict) -> dict:
    """The `meta` of a problem. Raises ValueError, LookupError or TypeError for what is no test."""
    if "public_test_cases" in data:
        return livecodebench(data)
    if CODE_CONTESTS[0] in data:
        parts = [read_cases(data[field]) for field in CODE_CONTESTS if data.get(field)]
        inputs = [text for part in parts for text in part.inputs]
        outputs = [text for part in parts for text in part.outputs]
        return of_cases(Cases(inputs, outputs))
    if "inputs" in data and "outputs" in data:
        return of_cases(read_cases(data))
    for field in FIELDS:
        value = lookup(data, field)
        if field in data and value in (None, "", [], {}):
            raise ValueError(f"field {field!r} is empty")
        if value is not None:
            return of_cases(read_cases(value))
    raise ValueError("no field with tests")


def read_cases(value: Any) -> Cases:
    """Tests in one of the usual layouts: an object of lists, or a list of objects; perhaps as text.

    >>> read_cases('{"inputs": ["1"], "outputs": ["2"]}')
    Cases(inputs=['1'], outputs=['2'], name='', in_json=False)
    >>> read_cases([{"input": "1", "output": "2", "metadata": {"func_name": "f"}}])
    Cases(inputs=['1'], outputs=['2'], name='f', in_json=True)
    """
    if isinstance(value, str):
        if value.lstrip()[:1] not in ("{", "["):
            raise ValueError("no tests in JSON")
        value = from_json(value)
    if isinstance(value, dict) and "test_cases" in value:
        value = value["test_cases"]
    if isinstance(value, dict):
        name = value.get("fn_name") or ""
        if "inputs" not in value and "input" in value:  # CodeContests
            return Cases(value["input"], value["output"], name)
        return Cases(as_list(value["inputs"]), as_list(value["outputs"]), name)
    inputs = [case["input"] for case in value]
    outputs = [case["output"] for case in value]
    name = ""
    for case in value[:1]:
        about = case.get("metadata") or {}
        name = case.get("fn_name") or about.get("func_name") or about.get("fn_name") or ""
    if not value:
        raise ValueError("its list of tests is empty")
    return Cases(inputs, outputs, name, in_json=True)


def as_list(value: Any) -> Any:
    """A list, perhaps as text in JSON."""
    if isinstance(value, str):
        return from_json(value)
    return value


def livecodebench(data: dict) -> dict:
    """LiveCodeBench. Its private tests are JSON, perhaps pickled and compressed."""
    private = data["private_test_cases"]
    if not private.startswith("["):
        # the opcodes of the pickle are read, not run
        opcodes = pickletools.genops(zlib.decompress(base64.b64decode(private)))
        private = next(value for _, value, _ in opcodes if isinstance(value, str))
    cases = [*from_json(data["public_test_cases"]), *from_json(private)]
    inputs = [case["input"] for case in cases]
    outputs = [case["output"] for case in cases]
    name = from_json(data.get("metadata") or "{}").get("func_name") or ""
    return {**of_cases(Cases(inputs, outputs, name, in_json=True)), "prelude": HARNESS}


def of_cases(cases: Cases) -> dict:
    inputs, outputs, name, in_json = cases
    listed = isinstance(inputs, list) and isinstance(outputs, list)
    if not listed or not inputs or len(inputs) != len(outputs):
        sizes = [len(part) if isinstance(part, list) else 0 for part in (inputs, outputs)]
        raise ValueError(f"{sizes[0]} inputs, {sizes[1]} outputs")
    if not isinstance(name, str):
        raise TypeError(f"{name!r} is no name of a function")
    if not name:
        return scripts(inputs, outputs)
    if not name.isidentifier():
        raise ValueError(f"{name!r} is no name of a function")
    given, right = inputs, [accepted(output) for output in outputs]
    if in_json:
        given = [arguments(text) for text in inputs]
        right = [[from_text(text)] for text in outputs]
    if not all(isinstance(values, list) for values in given):
        raise TypeError("the input of a function must be a list of arguments")
    return calls(name, given, right)


def arguments(given: Any) -> Any:
    """The arguments of one call, of which a text has one per line."""
    if isinstance(given, str):
        return [from_json(line) for line in given.split("\n")]
    return given


def from_text(result: Any) -> Any:
    return from_json(result) if isinstance(result, str) else result


def accepted(output: Any) -> list:
    """What a function may return. Some of APPS's results are in a list of one."""
    if isinstance(output, list) and len(output) == 1:
        return [output, output[0]]
    return [output]


def scripts(inputs: list, outputs: list) -> dict:
    """Tests of what a script prints."""
    tests = []
    for given, expected in zip(map(as_text, inputs), map(as_text, outputs)):
        tests.append(f"assert words(script({given!r})) == words({expected!r})")
    return {
        "script": True, "names": ["script"], "tests": tests, "prelude": "", "setup": SCRIPT_SETUP,
    }


def as_text(text: Any) -> str:
    """Text of standard input or output; it may be a list of its lines."""
    if isinstance(text, list):
        if any(isinstance(line, list) for line in text):
            raise TypeError("a list in a list where a text should be")
        return "\n".join(map(as_text, text))
    if isinstance(text, str) and not is_unicode(text):
        raise ValueError("half a character (a lone surrogate) in a text")
    if not isinstance(text, (str, int, float)):
        raise TypeError(f"{type(text).__name__} where a text should be")
    return str(text)


def calls(name: str, given: list[list], right: list[list]) -> dict:
    """Tests of what a function returns for each list of arguments."""
    tests = []
    for values, results in zip(given, right):
        tests.append(f"assert as_lists({name}(*{values!r})) in {results!r}")
    return {
        "names": [name], "wanted": [name], "tests": tests, "prelude": "from typing import *",
        "setup": FUNCTION_SETUP,
    }
