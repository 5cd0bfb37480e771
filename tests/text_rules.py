"""How dense a file reads: python tests/text_rules.py [FILE.py …] prints what test_house holds.

Counted without comments and docstrings; tokens per line also without imports and flags.
"""
import ast
import io
import statistics
import sys
import tokenize
from pathlib import Path
from typing import NamedTuple

QUIET = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
    tokenize.ENDMARKER, tokenize.ENCODING,
}
BLOCKS = (ast.For, ast.While, ast.If, ast.With, ast.Try, ast.FunctionDef, ast.ClassDef)


class Reading(NamedTuple):
    tokens: int  # in the file
    mean: float  # tokens per code line
    p90: int
    most: int
    columns: int  # of the widest line
    longest: int  # lines of the longest function
    nested: int  # functions defined inside a main
    depth: int  # of nested blocks
    conditionals: int  # conditional expressions inside a call's argument


def read(path: Path) -> Reading:
    text = path.read_text()
    tree = ast.parse(text)
    docstrings, apart = docstring_lines(tree), import_and_flag_lines(tree)
    per_line: dict[int, int] = {}
    tokens = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        line = token.start[0]
        if token.type in QUIET or line in docstrings:
            continue
        tokens += 1
        if line not in apart:
            per_line[line] = per_line.get(line, 0) + 1
    counts = sorted(per_line.values()) or [0]
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return Reading(
        tokens=tokens,
        mean=statistics.mean(counts),
        p90=counts[int(0.9 * (len(counts) - 1))],
        most=counts[-1],
        columns=max((len(line) for line in text.splitlines()), default=0),
        longest=max((f.end_lineno - f.lineno + 1 for f in functions), default=0),
        nested=sum(functions_inside(f) for f in functions if f.name == "main"),
        depth=depth(tree),
        conditionals=conditional_arguments(tree),
    )


def docstring_lines(tree: ast.AST) -> set[int]:
    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            if isinstance(node.value.value, str):
                lines |= set(range(node.lineno, node.end_lineno + 1))
    return lines


def import_and_flag_lines(tree: ast.AST) -> set[int]:
    lines = set()
    for node in ast.walk(tree):
        parts = []
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            parts = [node]
        if isinstance(node, ast.ClassDef):
            parts = [item for item in node.body if isinstance(item, ast.AnnAssign)]
        for part in parts:
            lines |= set(range(part.lineno, part.end_lineno + 1))
    return lines


def functions_inside(function: ast.FunctionDef) -> int:
    return sum(isinstance(n, ast.FunctionDef) and n is not function for n in ast.walk(function))


def depth(node: ast.AST, level: int = 0) -> int:
    deepest = level
    for child in ast.iter_child_nodes(node):
        deepest = max(deepest, depth(child, level + isinstance(child, BLOCKS)))
    return deepest


def conditional_arguments(tree: ast.AST) -> int:
    count = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
            count += sum(isinstance(argument, ast.IfExp) for argument in arguments)
    return count


if __name__ == "__main__":
    print(f"{'file':32s}" + "".join(f"{name:>13s}" for name in Reading._fields))
    for name in sys.argv[1:] or sorted(map(str, Path().glob("*.py"))):
        print(f"{name:32s}" + "".join(f"{value:13.4g}" for value in read(Path(name))))
