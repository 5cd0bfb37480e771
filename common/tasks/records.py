"""Records of files and of the hub, as they are in the source.

A record comes with the words that say where it is: "FILE, line 3". One that cannot be read comes as
the BadRecord that says why, so that the records behind it can still be read.
"""
from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import check_hub, require

Records = Iterator[tuple[Any, str]]  # (record, where it is)


class BadRecord(SystemExit):
    """A record that cannot be used. It ends the run in one line if nothing leaves the record out.

    >>> print(BadRecord("a.jsonl, line 3", "not JSON"))
    error: a.jsonl, line 3: not JSON
    """

    def __init__(self, where: str, reason: str):
        super().__init__(f"error: {where}: {reason}")
        self.where, self.reason = where, reason


# --------------------------------------------------------------------------------------------------
# files
# --------------------------------------------------------------------------------------------------
def read_records(path: str) -> Records:
    """Records of a file of JSON lines, of a JSON list, or of Parquet; perhaps compressed by gzip.

    The file's content says which. Raises SystemExit if it is none of these.
    """
    file = Path(path).expanduser()
    require(not (path and file.is_dir()), f"--task: {path} is a folder; name a file in it")
    require(file.is_file(), f"--task: no such file: {path}")
    data = file.read_bytes()
    if data.startswith(b"\x1f\x8b"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise SystemExit(f"error: {path}: damaged gzip ({error})") from None
    if data.startswith(b"PAR1"):
        return read_parquet(path, data)
    data = as_utf8(path, data)
    if data.lstrip().startswith(b"["):
        return json_list(path, data)
    return json_lines(path, data)


def as_utf8(path: str, data: bytes) -> bytes:
    """The text in UTF-8. A byte order mark says that it was in UTF-16 or UTF-32."""
    marks = {
        b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32",
        b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16",
    }
    for mark, encoding in marks.items():
        if data.startswith(mark):
            return data.decode(encoding, "surrogatepass").encode("utf-8", "surrogatepass")
    binary = b"\0" in data[:1000]
    require(not binary, f"{path}: neither JSON nor Parquet, for it has bytes of zero; if it is "
            "UTF-16, convert it: iconv -f UTF-16LE -t UTF-8")
    return data


def json_list(path: str, data: bytes) -> Records:
    rows = parse(data, path)
    if isinstance(rows, BadRecord):
        raise rows
    return ((row, f"{path}, record {i}") for i, row in enumerate(rows, 1))


def json_lines(path: str, data: bytes) -> Records:
    lines = data.split(b"\n")  # splitlines would split at U+2028 too
    first = next((line for line in lines if line.strip()), b"")
    if first.strip().startswith(b"{") and isinstance(parse(first, path), BadRecord):
        whole = parse(data, path)  # one object over many lines, which holds the list
        if isinstance(whole, dict):
            lists = [value for value in whole.values() if isinstance(value, list)]
            require(len(lists) == 1, f"{path}: one JSON object with {len(lists)} lists; give a "
                    "list of records, or one record per line")
            return ((row, f"{path}, record {i}") for i, row in enumerate(lists[0], 1))
    numbered = enumerate(lines, 1)
    return ((parse(line, f"{path}, line {i}"), f"{path}, line {i}") for i, line in numbered
            if line.strip())


def parse(data: bytes, where: str) -> Any:
    """What the JSON text says, or the BadRecord that says why it says nothing."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        return BadRecord(where, f"byte {data[error.start]:#04x} at {error.start} is not UTF-8; "
                         "convert the file, e.g. iconv -f LATIN1 -t UTF-8")
    try:
        return from_json(text)
    except json.JSONDecodeError as error:
        if error.lineno > 1:
            where += f", line {error.lineno}"
        return BadRecord(where, f"not JSON ({error.msg})")
    except RecursionError:
        return BadRecord(where, "its lists are nested too deeply")


class Digits(str):
    """An integer of more digits than Python converts; in Python source it is that integer."""

    __repr__ = str.__str__


def from_json(text: str) -> Any:
    """json.loads, but an integer of more than 4,300 digits becomes Digits."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError:
        return json.loads(text, parse_int=whole_number)


def whole_number(text: str) -> int | Digits:
    try:
        return int(text)
    except ValueError:
        return Digits(text)


def read_parquet(path: str, data: bytes) -> Records:
    import pyarrow
    from pyarrow import parquet

    try:
        rows = parquet.read_table(io.BytesIO(data)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise SystemExit(f"error: {path}: damaged Parquet ({reason})") from None
    return ((row, f"{path}, record {i}") for i, row in enumerate(rows, 1))


# --------------------------------------------------------------------------------------------------
# the hub
# --------------------------------------------------------------------------------------------------
def read_hub(name: str) -> Records:
    """Records of a hub dataset, NAME[:CONFIG][@SPLIT]; without a split, of its train split."""
    import datasets

    path, _, split = name.partition("@")
    path, _, config = path.partition(":")
    if not Path(path).exists():
        cached = Path(datasets.config.HF_DATASETS_CACHE, path.replace("/", "___"))
        check_hub("--task", path, "dataset", cached)
    try:
        rows = datasets.load_dataset(path, config or None, split=split or "train")
    except (OSError, ValueError, RuntimeError) as error:  # not there, no network, a script …
        reason = str(error).splitlines()[0]
        raise SystemExit(f"error: --task hf:{name}: {reason}; without the hub, give --data_dir or "
                         "jsonl:PATH") from None
    for i, data in enumerate(rows, 1):
        yield data, f"hf:{name}, record {i}"
