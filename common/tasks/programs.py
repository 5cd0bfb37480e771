"""Which program a response gives: the last of its fenced blocks that is one."""
from __future__ import annotations

import ast
import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from markdown_it import MarkdownIt

MAX_TEXT = 300_000  # characters of a response in which programs are looked for, from its end
MAX_PROGRAM = 100_000  # characters of a block that is read to see whether it is a program
MAX_PIECES = 40  # pairs of marks that are tried if no block is a program
PYTHON = ("python", "python3", "py")  # what a fence says

# Fences as CommonMark has them, also in lists and quotes. HTML is no block here, for models write
# <answer> right before a fence.
FENCES = MarkdownIt("zero").enable(["fence", "list", "blockquote", "code"])
FENCES.core.ruler.enableOnly(["normalize", "block"])


class Block(NamedTuple):
    """A fenced block that is closed."""

    language: str
    text: str


def last_program(text: str, names: Sequence[str] = ()) -> str | None:
    """The last closed block that is a program; one that defines one of `names`, if any block does;
    without names one that says that it is Python, if any does.

    Without a program it is the last closed block, and None without one.

    >>> last_program("1. Do:\\n   ```python\\n   print(1)\\n   ```\\nIt prints\\n```\\n1\\n```")
    'print(1)\\n'
    """
    text = text[-MAX_TEXT:].replace("\r\n", "\n")
    blocks = closed_blocks(text)
    programs = [block for block in blocks if is_program(block.text)]
    if names:
        preferred = [block for block in programs if defines(block.text, names)]
    else:
        preferred = [block for block in programs if block.language in PYTHON]
    if not preferred and (names or not programs):
        for piece in islice(pieces(text), MAX_PIECES):
            if is_program(piece) and defines(piece, names):
                return piece
    for found in (preferred, programs, blocks):
        if found:
            return found[-1].text
    return None


def closed_blocks(text: str) -> list[Block]:
    """The fenced blocks, without one that the text leaves open: that is unfinished."""
    lines = text.split("\n")
    blocks = []
    zero = "\ue000"  # CommonMark would put U+FFFD for a zero, and the program would run
    for token in FENCES.parse(text.replace("\0", zero)):
        if token.type != "fence":
            continue
        first, end = token.map
        last = lines[end - 1].strip(" \t>")  # a quote's marks precede the fence's
        if end - first > 1 and last.startswith(token.markup) and not last.strip(token.markup[0]):
            language = token.info.strip().lower().partition(" ")[0]
            content = token.content
            if "\0" in text:
                content = content.replace(zero, "\0")
            blocks.append(Block(language, content))
    return blocks


def pieces(text: str) -> Iterator[str]:
    """What is between two fences, the last first, whatever CommonMark makes of them.

    It finds a program with a fence of its own in a docstring, one that is less indented than its
    fence, and one whose fence follows words on the same line.
    """
    text = re.sub(r"(?m)(?<=[^\s`~])[ \t]*(```[\w+-]*[ \t]*)$", r"\n\1", text)
    lines = text.split("\n")
    marks = [i for i, line in enumerate(lines) if re.match(r"[\s>]*(```|~~~)", line)]
    for i in range(len(marks) - 2, -1, -1):
        for end in marks[i + 1 :]:
            yield textwrap.dedent("\n".join(lines[marks[i] + 1 : end])) + "\n"


def is_program(block: str) -> bool:
    """Whether the text is Python that does something: no output, no bare values.

    >>> is_program("print(1)"), is_program("1\\n2"), is_program("a, b"), is_program("1 2")
    (True, False, False, False)
    """
    tree = read(block)
    if tree is None:
        return False
    return any(not isinstance(node, VALUES) for part in tree.body for node in ast.walk(part))


VALUES = (  # of what a program prints
    ast.Expr, ast.Constant, ast.Name, ast.expr_context, ast.List, ast.Tuple, ast.Dict, ast.Set,
    ast.UnaryOp, ast.unaryop, ast.BinOp, ast.operator, ast.Compare, ast.cmpop, ast.BoolOp,
    ast.boolop, ast.Attribute, ast.AnnAssign, ast.Subscript, ast.Slice,
)


def defines(block: str, names: Sequence[str]) -> bool:
    """Whether the program defines a function, class or variable of one of the names, or there are
    no names."""
    tree = read(block)
    return tree is not None and (not names or bool(defined(tree).intersection(names)))


def defined(tree: ast.AST) -> set[str]:
    """Every name that the code gives a value, at any depth; methods too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.alias):
            found.add(node.asname or node.name)
    return found


def read(block: str) -> ast.Module | None:
    if len(block) > MAX_PROGRAM:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in a model's strings
            return ast.parse(block)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
