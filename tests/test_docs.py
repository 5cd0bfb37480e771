"""What the pages say is so: metrics, links, lines, commands, flags, lengths, and the sixth method, built from its page. A page
that drifts from the code fails here. `python tests/test_docs.py` sets the numbers of all links to a line."""
import ast
import dataclasses
import importlib
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from conftest import GROUPS, ROOT, TASK
from test_house import ALGORITHMS, problems_of
from torch.distributed.run import get_args_parser

from common.settings import Setup, parse

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "results").rglob("README.md"))]
METHOD_PAGES = [ROOT / "docs" / f"{name}.md" for name in ALGORITHMS]
METRICS = ROOT / "docs" / "metrics.md"
SIXTH = ROOT / "docs" / "sixth.md"
FORKS = ROOT / "docs" / "forks.md"
by_name = lambda page: str(page.relative_to(ROOT))  # ids of parametrized pages


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def fenced(page: Path, *kinds: str) -> list[tuple[str, str]]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [(kind, body) for kind, body in blocks if kind in kinds]


def code_spans(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", text)


def rows(page: Path, heading: str) -> list[list[str]]:
    """Cells of every table whose header begins with `heading`."""
    found, inside = [], False
    for line in prose(page).splitlines():
        if not line.startswith("|"):
            inside = False
        elif line.startswith(f"| {heading} |"):
            inside = True
        elif inside and not line.startswith("|--"):
            found.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return found


# ---------------------------------------------------------------------------------------------------------------------
# metrics.md
# ---------------------------------------------------------------------------------------------------------------------
RUN = [*GROUPS, "--steps", "1"]
RUNS = {  # small, and with every part on that logs something of its own
    "grpo": [*RUN, "--beta", "0.01"], "rlsd": RUN, "sdpo": RUN, "hsd": [*RUN, "--beta", "0.01"],
    "sdzero": [*TASK, "--srt_max_tokens", "32", "--srt_questions", "8", "--kept_traces", "8", "--srt_batch", "8",
               "--srt_epochs", "1", "--sd_questions", "8", "--batch_size", "8"],
}


@pytest.fixture(scope="module")
def logged(tmp_path_factory) -> dict[str, set[str]]:
    """Each file's metrics in a run of a few steps."""
    out, found = tmp_path_factory.mktemp("metrics"), {}
    for name in ALGORITHMS:
        module = importlib.import_module(name)
        module.main(parse(module.Args, module.presets, [*RUNS[name], "--out", str(out), "--name", name]))
        lines = (out / name / "metrics.jsonl").read_text().splitlines()
        found[name] = {key for line in lines for key in json.loads(line)}
    return found


def documented() -> dict[str, set[str]]:
    """What metrics.md says that each file logs."""
    out: dict[str, set[str]] = {name: set() for name in ALGORITHMS}
    for names, files, *_ in rows(METRICS, "name"):
        for name in ALGORITHMS if files == "all" else files.split():
            out[name] |= set(code_spans(names))
    return out


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_logged_metric_is_explained(name, logged):
    assert logged[name] - documented()[name] == set()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_explained_metric_is_logged(name, logged):
    """By the run here, or by a literal of the source where it takes other flags or luck (a group of every difficulty)."""
    literals = []
    for path in (ROOT / f"{name}.py", *(ROOT / "common").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                literals.append(re.escape(node.value))
            elif isinstance(node, ast.JoinedStr):  # f"peak/{bin}"; not f"{a}/{b}", which would be everything
                parts = [re.escape(v.value) if isinstance(v, ast.Constant) else r"\w+" for v in node.values]
                literals += ["".join(parts)] if isinstance(node.values[0], ast.Constant) else []
    patterns = re.compile("|".join(literals))
    assert {m for m in documented()[name] - logged[name] if not patterns.fullmatch(m)} == set()


@pytest.mark.parametrize("page", METHOD_PAGES, ids=by_name)
def test_every_metric_that_a_page_names_is_logged_by_its_file(page):
    """In the prose of the page; a code span with a slash that is no file, no pattern and no task is a metric's name."""
    text = "".join(line for line in prose(page).splitlines(keepends=True) if not line.startswith("|"))
    spans = {s for s in code_spans(text) if re.fullmatch(r"[a-z_]+/[a-z_]+(@1)?|frac_\w+|\w+_frac|\w+_updates", s)}
    assert {s for s in spans if not (ROOT / s).exists()} <= documented()[page.stem] and len(spans) >= 3


def test_every_metric_says_what_it_catches_in_one_line():
    """A row with more letters wraps in the rendered page."""
    for cells in rows(METRICS, "name"):
        assert len(cells[2]) > 10 and len("".join(cells).replace("`", "")) <= 105, cells[0]


# ---------------------------------------------------------------------------------------------------------------------
# links and files
# ---------------------------------------------------------------------------------------------------------------------
def anchors(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


LINE_LINK = re.compile(r"\[`([^`]+)`\]\(([^)#\s]+\.py)#L(\d+)\)")


def line_of(path: Path, code: str) -> int:
    """The line, from 1, that a link with the text `code` means: a name's definition, else the one line that has it."""
    if re.fullmatch(r"\w+", code):
        defined, assigned = [], []
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == code:
                defined.append(node.lineno)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id == code:
                assigned.append(node.lineno)
        found = defined or assigned[:1]
    else:
        found = [n for n, line in enumerate(path.read_text().splitlines(), 1) if code in line]
    assert len(found) == 1, f"{path.name}: `{code}` stands in {len(found)} lines"
    return found[0]


def with_line_numbers(page: Path) -> str:
    def right(link: re.Match) -> str:
        return f"[`{link[1]}`]({link[2]}#L{line_of((page.parent / link[2]).resolve(), link[1])})"

    return LINE_LINK.sub(right, page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_a_link_to_a_line_shows_what_stands_there(page):
    assert page.read_text() == with_line_numbers(page), "run python tests/test_docs.py"
    assert page.read_text().count(".py#L") == len(LINE_LINK.findall(page.read_text())), "a link to a line shows its code"


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_every_link_leads_somewhere(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        target = re.sub(r"\.py#L\d+$", ".py", target)
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_every_result_that_is_named_exists(page):
    named = re.findall(r"results/[\w\-./]*[\w/]", page.read_text())
    missing = {n for n in named if not re.search(r"NAME|SUBJECT", n) and not (ROOT / n).exists()}
    assert not missing


def test_the_index_has_every_page():
    linked = set(re.findall(r"\]\((\w+\.md)\)", (ROOT / "docs" / "README.md").read_text()))
    assert linked == {p.name for p in PAGES if p.parent.name == "docs" and p.name != "README.md"}


# ---------------------------------------------------------------------------------------------------------------------
# commands and flags
# ---------------------------------------------------------------------------------------------------------------------
@cache
def settings_of(script: str):
    """The module of an algorithm file or benchmark that tyro reads; None where it is argparse or takes no flags."""
    path = ROOT / script
    if "class Args" not in path.read_text():
        return None
    if script in {f"{a}.py" for a in ALGORITHMS}:
        return importlib.import_module(path.stem)
    spec = importlib.util.spec_from_file_location(f"benchmarks_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def flags_of(script: str) -> set[str]:
    module = settings_of(script)
    if module is not None:
        fields = [f for f in dataclasses.fields(module.Args) if f.name != "setup"]
        if len(fields) < len(dataclasses.fields(module.Args)):
            fields += dataclasses.fields(Setup)
        return {f"--{f.name}" for f in fields} | {f"--no-{f.name}" for f in fields if f.type in ("bool", bool)}
    return set(re.findall(r"add_argument\(\"(--\w+)\"", (ROOT / script).read_text()))


def commands(page: Path) -> list[list[str]]:
    """The words of every command of a page: fenced bash, indented lines, code spans with a script."""
    text = "".join(body for _, body in fenced(page, "bash", "sh", "shell")).replace("\\\n", " ")
    lines = text.splitlines() + re.findall(r"^    ((?:python|torchrun) .+)$", prose(page), re.MULTILINE)
    lines += [s for s in code_spans(prose(page)) if re.match(r"(python |torchrun )?(benchmarks/)?\w+\.py --\w", s)]
    found = []
    for line in lines:
        for part in re.split(r"&&|\|\||[|;>]", line.split("#")[0]):
            if words := shlex.split(part):
                found.append([w for w in words if w not in ("…", "...")])
    return found


def test_commands_are_found():
    """The reader of commands sees those that are there."""
    assert len(commands(ROOT / "README.md")) >= 8 and all(len(commands(p)) >= 5 for p in METHOD_PAGES)


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_every_command_can_be_typed(page):
    """Its script or make target exists, and what follows is read without error: names, types and choices of flags."""
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    made = {words[2] for words in commands(page) if words[0] == "cp"}  # files that the page itself makes
    for words in commands(page):
        if words[0] == "make":
            assert set(words[1:]) <= set(targets), words
        for file in (w for w in words if re.fullmatch(r"[\w-]+(/[\w-]+)*\.(py|txt|sh)", w)):
            assert (ROOT / file).exists() or file in made, words
        scripts = [w for w in words if w.endswith(".py") and (ROOT / w).exists()]
        if not scripts or words[0] in ("cp", "diff"):
            continue
        argv = words[words.index(scripts[0]) + 1 :]
        if "--help" in argv:
            continue
        unknown = {w for w in argv if re.match(r"--[a-zA-Z]", w)} - flags_of(scripts[0])
        assert not unknown, f"{' '.join(words)}: {unknown}"
        module = settings_of(scripts[0])
        if module is not None and hasattr(module, "presets"):
            try:
                parse(module.Args, module.presets, argv)
            except SystemExit:
                pytest.fail(f"{' '.join(words)} is refused")


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_every_flag_in_the_prose_exists(page):
    scripts = [f"{a}.py" for a in ALGORITHMS] + [f"benchmarks/{p.name}" for p in (ROOT / "benchmarks").glob("*.py")]
    own = [f"{page.stem}.py"] if page in METHOD_PAGES else scripts
    known = set().union(*map(flags_of, own)) | {"--help", *get_args_parser()._option_string_actions}
    if page == SIXTH:
        known |= {"--confidence"}  # of the file that the page makes
    if page == FORKS:
        known |= {"--gate"}
    spans = [s for s in code_spans(prose(page)) if not re.search(r"\.py|torchrun|pip ", s)]
    assert {f for s in spans for f in re.findall(r"--[a-z][\w-]*", s)} - known == set()


@pytest.mark.parametrize("page", METHOD_PAGES, ids=by_name)
def test_a_page_mentions_every_setting_of_its_method(page):
    """Those that fewer than four of the files have; the common ones are explained by --help."""
    fields = {name: [f.name for f in dataclasses.fields(importlib.import_module(name).Args)] for name in ALGORITHMS}
    count = [f for names in fields.values() for f in names]
    own = {f for f in fields[page.stem] if count.count(f) < 4}
    text = " ".join([*code_spans(prose(page)), *(" ".join(c) for c in commands(page))])
    assert {f for f in own if not re.search(rf"--{f}\b", text)} == set()


# ---------------------------------------------------------------------------------------------------------------------
# the pages of the methods
# ---------------------------------------------------------------------------------------------------------------------
@cache
def names_in(path: Path) -> set[str]:
    """Every name that a Python file defines, at any depth: functions, classes, variables, arguments, fields."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.keyword):
            found.add(node.arg)
    return found


@pytest.mark.parametrize("page", METHOD_PAGES, ids=by_name)
def test_every_equation_is_linked_to_its_lines(page):
    """Nearly all in the page's own file; what has no line there names the file that holds it."""
    table = rows(page, "in the paper")
    assert len(table) >= 6
    own = 0
    for paper, ours in table:
        links = LINE_LINK.findall(ours)
        own += any(file == f"../{page.stem}.py" for _, file, _ in links)
        files = [s for s in code_spans(ours) if re.fullmatch(r"[\w/]+\.py", s)]
        assert links or (files and all((ROOT / f).exists() for f in files)), paper
    assert own >= len(table) - 2


PARTS = ["Run it", "From equation to line", "What you should see", "What goes wrong", None, "Change it"]


@pytest.mark.parametrize("page", METHOD_PAGES, ids=by_name)
def test_a_method_page_has_its_parts(page):
    parts = re.split(r"^## ", prose(page), flags=re.MULTILINE)[1:]
    titles = {part.splitlines()[0]: part for part in parts}
    differences = "Paper and here" if page.stem == "hsd" else "Paper, released code, here"  # its code is not public
    assert list(titles) == [title or differences for title in PARTS]
    assert "](../results/" in titles["What you should see"] and "![" in titles["What you should see"]
    assert 3 <= len(re.findall(r"^\d\. ", titles["What goes wrong"], re.MULTILINE)) <= 6
    assert titles[differences].count("\n|--") == 1
    exercises = re.split(r"^\d\. ", titles["Change it"], flags=re.MULTILINE)[1:]
    assert len(exercises) == 3
    functions = names_in(ROOT / f"{page.stem}.py")
    for text in exercises:  # each edits something that is there, runs something, and tests a claim
        spans = code_spans(text)
        assert any(s in functions for s in spans) and any(s.startswith("python ") for s in spans) and "Claim" in text


LONGEST = {"README.md": 150, "compare.md": 80} | {page.name: 90 for page in METHOD_PAGES}  # lines


@pytest.mark.parametrize("page", [p for p in PAGES if p.name in LONGEST and p.parent in (ROOT, ROOT / "docs")], ids=by_name)
def test_a_page_is_short_enough_to_be_read(page):
    """Lines, and their width where that is not a table's or a command's: packing would cheat the first."""
    if page == ROOT / "docs" / "README.md":
        return
    lines = page.read_text().splitlines()
    assert len(lines) <= LONGEST[page.name]
    assert [line for line in prose(page).splitlines() if len(line) > 132 and not line.startswith(("|", "!["))] == []


def test_the_code_in_the_readme_is_the_files():
    (_, body), = fenced(ROOT / "README.md", "python")
    assert body in (ROOT / "hsd.py").read_text() and body.startswith("def loss(")


# ---------------------------------------------------------------------------------------------------------------------
# the sixth method
# ---------------------------------------------------------------------------------------------------------------------
def edited(source: str, blocks: list[tuple[str, str]], page: Path) -> str:
    """The source after a page's blocks: a new docstring, or unified diffs without line numbers."""
    for kind, body in blocks:
        lines = body.splitlines()
        if kind == "docstring":
            source = body + source[source.index('"""\n', 3) + 4 :]
            continue
        old = "".join(line[1:] + "\n" for line in lines if line[:1] != "+")
        new = "".join(line[1:] + "\n" for line in lines if line[:1] != "-")
        assert source.count(old) == 1, f"{page.name} changes what is not there once:\n{old}"
        source = source.replace(old, new)
    return source


def load(name: str, source: str, folder: Path):
    """The module of a file that a page makes."""
    path = folder / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def changed_lines(blocks: list[tuple[str, str]]) -> int:
    """Added lines that are not removed ones with another indentation, as `git diff -w` counts."""
    added, removed = [], []
    for _, body in blocks:
        added += [line[1:].strip() for line in body.splitlines() if line[:1] == "+"]
        removed += [line[1:].strip() for line in body.splitlines() if line[:1] == "-"]
    return sum((Counter(added) - Counter(removed)).values())


@pytest.fixture(scope="module")
def sixth(tmp_path_factory):
    """srpo.py as its page makes it: (path, module)."""
    source = edited((ROOT / "sdpo.py").read_text(), fenced(SIXTH, "docstring", "diff"), SIXTH)
    folder = tmp_path_factory.mktemp("sixth")
    module = load("srpo", source, folder)
    yield folder / "srpo.py", module
    del sys.modules["srpo"]


def test_the_sixth_method_takes_at_most_eight_edits():
    assert len(fenced(SIXTH, "docstring", "diff", "delete")) <= 8


FORK_COSTS = {  # file of forks.md → its parent, blocks and changed lines at most, and flags for a run of a few steps
    "gated": ("sdpo", 6, 20, ["--gate", "0.5"]),
    "dapo_hsd": ("hsd", 6, 40, ["--minibatches", "2", "--dynamic_sampling", "1"]),
}


@pytest.mark.parametrize("name", FORK_COSTS)
def test_a_fork_costs_what_the_page_says_and_trains(name, tmp_path):
    parent, most_blocks, most_lines, flags = FORK_COSTS[name]
    section = next(part for part in FORKS.read_text().split("\n## ") if f"{parent}.py {name}.py" in part)
    blocks = [("diff", body) for body in re.findall(r"^```diff\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)]
    assert 0 < len(blocks) <= most_blocks and 0 < changed_lines(blocks) <= most_lines
    module = load(name, edited((ROOT / f"{parent}.py").read_text(), blocks, FORKS), tmp_path)
    module.main(parse(module.Args, module.presets, [*GROUPS, "--steps", "2", *flags, "--out", str(tmp_path), "--name", "run"]))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["grad_norm"] > 0 for row in rows[:2])
    del sys.modules[name]


def test_the_sixth_method_keeps_the_rules_of_the_house(sixth):
    path, module = sixth
    assert [p for p in problems_of(path) if "longest" not in p] == []  # its main is 3 lines more
    ruff = [sys.executable, "-m", "ruff", "check", "--ignore", "I001", "--config", str(ROOT / "ruff.toml"), str(path)]
    done = subprocess.run(ruff, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    names = {f.name for f in dataclasses.fields(module.Args)}
    left = {name for name in names if f"args.{name}" not in path.read_text()}
    shared = "".join(p.read_text() for p in (ROOT / "common").rglob("*.py"))
    assert {f for f in left if not re.search(rf"args\.{f}\b", shared)} == set(), "settings without effect"


def test_the_sixth_methods_own_test_passes(sixth, one_process):
    (_, body), = fenced(SIXTH, "python")
    namespace: dict = {}
    exec(compile(body, "docs/sixth.md", "exec"), namespace)
    tests = [value for name, value in namespace.items() if name.startswith("test_")]
    assert len(tests) == 2
    for test in tests:
        test(one_process)


@pytest.mark.parametrize("function, wrong", [
    ("routed", lambda rewards, hinted: hinted), ("entropy_weights", lambda entropy, z, beta: [(-beta * h).exp() for h in entropy])])
def test_the_sixth_methods_own_test_can_fail(function, wrong, sixth, one_process, monkeypatch):
    monkeypatch.setattr(sixth[1], function, wrong)
    (_, body), = fenced(SIXTH, "python")
    namespace: dict = {}
    exec(compile(body, "docs/sixth.md", "exec"), namespace)
    with pytest.raises(AssertionError):
        namespace["test_loss_and_gradient_equal_brute_force"](one_process)


def test_the_sixth_methods_examples_hold(sixth):
    import doctest

    assert doctest.testmod(sixth[1]).failed == 0


def test_the_sixth_method_trains(sixth, tmp_path):
    module = sixth[1]
    module.main(parse(module.Args, module.presets, [*GROUPS, "--steps", "2", "--out", str(tmp_path), "--name", "srpo", "--minibatches", "2"]))
    found = [json.loads(line) for line in (tmp_path / "srpo" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < row["frac_distilled"] < 1 and row["grad_norm"] > 0 for row in found[:2])
    assert any(row.get("heldout/pass@1") is not None for row in found)
    module.main(parse(module.Args, module.presets, [*GROUPS, "--out", str(tmp_path), "--name", "dry", "--dry_run"]))


if __name__ == "__main__":
    for file in PAGES:
        file.write_text(with_line_numbers(file))
