"""Assert tests as MBPP and HumanEval have them, as tests that the sandbox can run.

A test calls functions of the program. The sandbox passes such a call on to the program's process as
plain data. If a call has more than that in it (objects of the program's classes, functions), the
whole call is moved there as source: it becomes a function `case_0` behind the program, and the test
compares what that returns. The expected result stays where it was.
"""
from __future__ import annotations

import ast
import builtins
import re
import textwrap
from typing import NamedTuple

from common.tasks.programs import defined

PLAIN = {  # built-in functions that make plain data of plain data
    "abs", "bool", "bytes", "chr", "complex", "dict", "float", "frozenset", "int", "len", "list",
    "max", "min", "ord", "pow", "range", "repr", "round", "set", "sorted", "str", "sum", "tuple",
}
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
ASSIGNMENTS = (ast.Assign, ast.AnnAssign, ast.If, ast.Try)
NUMPY = '''
import sys
def _close(a, b, rtol=1e-05, atol=1e-08):
    if isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_close(x, y, rtol, atol) for x, y in zip(a, b))
    return a == b or abs(a - b) <= atol + rtol * abs(b)
sys.modules["numpy"] = numpy = type(sys)("numpy")
numpy.allclose = numpy.isclose = _close
numpy.ndarray = type("ndarray", (), {})
numpy.float32 = numpy.float64 = float
numpy.inf, numpy.nan, numpy.pi = float("inf"), float("nan"), 3.141592653589793
'''  # the part of it that EvalPlus's tests use; the sandbox has the standard library alone


class Tests(NamedTuple):
    """What the sandbox needs to test a program."""

    names: list[str]  # the functions that the tests call, in the program's process
    wanted: list[str]  # what the program must define
    tests: list[str]  # Python source
    setup: str  # runs before the tests
    prelude: str  # runs before the program
    epilogue: str = ""  # runs behind the program
    calls: dict[str, str] = {}  # a function of the epilogue → the call that it stands for
    given: str = ""  # classes in the prelude that the tests make objects of


def assert_tests(solution: str, tests: list[str], imports: list[str], setup: str) -> Tests:
    """The tests of a record. They use functions, classes or variables of its solution; without one
    what they call and Python does not have is the program's.

    imports, setup: source that runs before the tests; `setup` may use the solution's names.
    Raises ValueError if no test uses the solution, SyntaxError if a part is no Python.
    """
    check_texts(tests)
    source = "\n".join([setup, *tests])
    own: dict[str, None] = {}  # names, in the order of the solution
    imports, classes = list(imports), {}
    prelude = "\n".join(imports)
    for node in ast.parse(solution).body:
        own |= dict.fromkeys(used_definitions(node, source))
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            imports.append(ast.unparse(node))
        if isinstance(node, ast.ClassDef):
            classes[node.name] = ast.unparse(node)
    if not solution:
        own = dict.fromkeys(called_names(source))
    if not own:
        raise ValueError("no test calls a function of the solution")
    ready = with_numpy("\n".join(imports), tests)
    plain = not setup.strip() and not own.keys() & classes.keys()
    if plain and not any(has_more_than_data(test, own) for test in tests):
        return Tests(list(own), list(own), tests, ready, prelude)

    given = ""  # the program may have classes of these names, too
    if own.keys() - classes.keys():
        given = "\n\n".join(classes.values())
    moved = Moved({*own, *defined(ast.parse(setup))})
    new = [moved.test(test) for test in tests]
    epilogue = "\n".join([setup, *moved.functions])
    prelude = "\n".join([*imports, given])
    return Tests(
        list(moved.calls), list(own), new, ready, prelude, epilogue, moved.calls, given
    )


def check_texts(tests: list) -> None:
    for test in tests or [""]:
        if not isinstance(test, str) or not test.strip():
            raise ValueError("its tests must be a list of statements")


def check_tests(stub: str, name: str, test: str) -> Tests:
    """The tests of HumanEval: a function `check` that is given the program's function. Program and
    tests both use the helper functions of the stub."""
    if not re.search(r"^def check\(", test, re.MULTILINE):
        raise ValueError("field 'test' has no function check(candidate)")
    ast.parse(test)
    tests = [f"{test}\ncheck({name})"]
    return Tests([name], [name], tests, with_numpy(stub, tests), stub)


def pytest_tests(test: str) -> Tests:
    """The tests of KodCode: functions test_… that import the program's from a module `solution`."""
    tree = ast.parse(test)
    names, body = [], []
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module == "solution":
            names += [alias.name for alias in node.names]
        else:
            body.append(node)
    functions = [node.name for node in body if isinstance(node, ast.FunctionDef)]
    tested = [name for name in functions if name.startswith("test")]
    if not names or not tested:
        raise ValueError("field 'test' tests nothing of a module `solution`")
    source = ast.unparse(ast.Module(body, []))
    tests = [f"{source}\n{name}()" for name in tested]
    setup = with_numpy("", tests)
    return Tests(names, names, tests, setup, prelude="")


def with_numpy(setup: str, tests: list[str]) -> str:
    for test in tests:
        if "numpy" in test:
            return f"{NUMPY}\n{setup}"
    return setup


# --------------------------------------------------------------------------------------------------
# what a test uses
# --------------------------------------------------------------------------------------------------
def used_names(source: str) -> set[str]:
    return {node.id for node in nodes(source, ast.Name)}


def nodes(source: str, kind: type) -> list[ast.AST]:
    everything = ast.walk(ast.parse(source))
    return [node for node in everything if isinstance(node, kind)]


def called_names(tests: str) -> list[str]:
    """What the tests call and neither define themselves nor find in Python.

    >>> called_names("from math import pi, cos\\nassert abs(f(cos(pi))) == g(1).x")
    ['f', 'g']
    """
    known = {"", *dir(builtins), *defined(ast.parse(tests))}
    calls = nodes(tests, ast.Call)
    return sorted(set(map(root, calls)) - known)


def used_definitions(node: ast.stmt, tests: str) -> list[str]:
    """The names that a statement of a module defines and tests use: functions, classes, and
    variables that are called, as `f = lambda x: x` is.

    >>> [used_definitions(ast.parse(x).body[0], "f(x)") for x in ("f = abs", "x = 1", "class x: 0")]
    [['f'], [], ['x']]
    """
    if isinstance(node, DEFINITIONS):
        return sorted({node.name} & used_names(tests))
    if not isinstance(node, ASSIGNMENTS):
        return []
    calls = nodes(tests, ast.Call)
    return sorted(defined(node) & set(map(root, calls)))


def has_more_than_data(test: str, own: dict[str, None]) -> bool:
    """Whether a call of an own function may get more than plain data.

    >>> own = {"f": None, "g": None}
    >>> [has_more_than_data(x, own) for x in ("f([1], g(2))", "f(lambda x: x)", "f(g)", "f(P(1))")]
    [False, True, True, True]
    """
    for node in nodes(test, ast.Call):
        if root(node) not in own:
            continue
        if not isinstance(node.func, ast.Name):  # a method of what a function returns
            return True
        named = [keyword.value for keyword in node.keywords]
        if not all(is_data(argument, own) for argument in [*node.args, *named]):
            return True
    return False


def is_data(node: ast.AST, own: dict[str, None]) -> bool:
    """Whether an argument can be plain data, as far as its source tells."""
    if isinstance(node, (ast.Lambda, ast.GeneratorExp)):
        return False
    if isinstance(node, ast.Name):
        return node.id not in own and node.id not in PLAIN
    parts = list(ast.iter_child_nodes(node))
    if isinstance(node, ast.Call):
        function = parts.pop(0)
        known = isinstance(function, ast.Name) and function.id in PLAIN.union(own)
        if not (known or is_method_of_constant(function)):
            return False
    return all(is_data(part, own) for part in parts)


def is_method_of_constant(function: ast.AST) -> bool:
    return isinstance(function, ast.Attribute) and isinstance(function.value, ast.Constant)


def root(node: ast.AST) -> str:
    """The name that f(1), f(1).x and f[0](2) begin with; "" if there is none."""
    while isinstance(node, (ast.Call, ast.Attribute, ast.Subscript)):
        if isinstance(node, ast.Call):
            node = node.func
        else:
            node = node.value
    if isinstance(node, ast.Name):
        return node.id
    return ""


# --------------------------------------------------------------------------------------------------
# calls that move to the program's process
# --------------------------------------------------------------------------------------------------
class Moved(ast.NodeTransformer):
    """Tests in which every expression that begins with an own name is a call of a new function."""

    def __init__(self, own: set[str]):
        self.own = own
        self.bound: set[str] = set()  # names that the test gives values of its own
        self.functions: list[str] = []  # source
        self.calls: dict[str, str] = {}

    def test(self, source: str) -> str:
        """One test.

        >>> moved = Moved({"f", "P"})
        >>> moved.test("assert f(P(1)) == 3"), moved.functions
        ('assert _case_0() == 3', ['def _case_0():\\n    return f(P(1))'])
        """
        tree = ast.parse(source)
        self.bound = defined(tree) - self.own
        body = []
        for node in tree.body:
            uses = not self.own.isdisjoint(used_names(ast.unparse(node)))
            if not uses or not isinstance(node, (ast.Assign, ast.AugAssign, ast.Expr)):
                body.append(self.visit(node))
                continue
            names = defined(node)
            self.own |= names  # it holds an object of the program
            self.bound -= names
            call = self.move(node, names)
            body.append(ast.Expr(call))
        module = ast.Module(body, [])
        return ast.unparse(ast.fix_missing_locations(module))

    def visit(self, node: ast.AST) -> ast.AST:
        if isinstance(node, ast.expr) and root(node) in self.own:
            return self.move(ast.Return(node), set())
        return self.generic_visit(node)

    def move(self, node: ast.stmt, names: set[str]) -> ast.Call:
        """The call of a new function that runs the statement, which sets the global `names`."""
        name = f"_case_{len(self.functions)}"
        source = ast.unparse(node)
        bound = used_names(source) & self.bound
        given = ", ".join(sorted(bound))
        scope = ""
        if names:
            scope = f"    global {', '.join(sorted(names))}\n"
        body = textwrap.indent(source, "    ")
        self.functions.append(f"def {name}({given}):\n{scope}{body}")
        self.calls[name] = source.removeprefix("return ")
        return ast.parse(f"{name}({given})", mode="eval").body
