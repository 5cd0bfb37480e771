"""Every command of the method files that the README, the pages and the docstrings print is in order: its flags parse, and
a dry run in as many processes as it names finds its values consistent.

The model and the problems of a command are replaced by the embedded ones (with a context of 40,960 tokens, as Qwen3 has),
for the rest of a machine is not here; names of tasks are checked against those that exist.
"""
import ast
import dataclasses
import importlib
import importlib.util
import json
import re
import shlex
import shutil
from functools import cache

import pytest
import torch
from conftest import CHAIN, ROOT
from test_house import ALGORITHMS

from common import run, tasks
from common.run import parse

FILES = "|".join(ALGORITHMS)
COMMAND = re.compile(rf"^\s*((?:python |torchrun .*?)(?:{FILES})\.py(?:.*\\\n)*.*)$", re.MULTILINE)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *(ROOT / f"{name}.py" for name in ALGORITHMS)]


def commands(page) -> list[str]:
    """Each command on one line, without its comment. In prose and tables: code that begins with a file's name."""
    text = page.read_text() if page.suffix == ".md" else ast.get_docstring(ast.parse(page.read_text()))
    found = [line for block in ([text] if page.suffix == ".py" else re.findall(r"```.*?\n(.*?)```", text, re.DOTALL))
             for line in COMMAND.findall(block)]
    found += re.findall(rf"`((?:{FILES})\.py --[^`]+)`", text)
    return [" ".join(shlex.split(line.replace("\\\n", " "), comments=True)) for line in found]


EVERY = list(dict.fromkeys((page.name, command) for page in PAGES for command in commands(page)
                           if "--help" not in command))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model") / "chain"
    shutil.copytree(CHAIN, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 40960}))
    return str(folder)


@cache
def problems(heldout: int) -> tasks.Task:
    """As many of the embedded task as the largest recipe asks for."""
    size, tasks.CHAIN_SIZE = tasks.CHAIN_SIZE, 20_000
    try:
        return tasks.load_task("chain", heldout=heldout)
    finally:
        tasks.CHAIN_SIZE = size


def processes(command: str) -> tuple[int, int]:
    """→ (all, those of one machine)"""
    count = lambda flag: int((re.search(rf"--{flag}[= ](\d+)", command.partition(".py")[0]) or [0, 1])[1])
    return count("nnodes") * count("nproc_per_node"), count("nproc_per_node")


def vllm(monkeypatch, there: bool, find=importlib.util.find_spec) -> None:
    """As if vLLM were installed, or not."""
    monkeypatch.setattr(run.importlib.util, "find_spec",
                        lambda name, *rest: (name if there else None) if name == "vllm" else find(name, *rest))


@pytest.mark.parametrize("page, command", EVERY, ids=[f"{page}-{i}" for i, (page, _) in enumerate(EVERY)])
def test_every_printed_command_dry_runs(page, command, model, tmp_path, monkeypatch, capsys):
    name = re.search(rf"({FILES})\.py", command)[1]
    module = importlib.import_module(name)
    args = parse(module.Args, module.presets, shlex.split(command.partition(".py")[2]))
    for _, part in tasks.mixture(args.task):
        source = part.partition(":")[0].partition("/")[0]
        assert source in {"chain", "jsonl", "json", "hf", "gym", *tasks.SETS}, f"no such task: {part}"
    world, local = processes(command)
    monkeypatch.setattr(module, "load_task", lambda spec, heldout, **_: problems(heldout))
    monkeypatch.setattr(run.dist, "get_world_size", lambda: world)
    vllm(monkeypatch, there=True)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    try:
        module.main(dataclasses.replace(args, model=model, task="chain", dry_run=True, out=str(tmp_path)))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    plan = capsys.readouterr().out
    assert f"of each of {world} process(es)" in plan and f"N/{local} ×" in plan
    assert not list(tmp_path.iterdir())  # a dry run leaves nothing


def test_commands_are_found():
    assert {page for page, _ in EVERY} >= {f"{name}.{kind}" for name in ALGORITHMS for kind in ("md", "py")}
    assert len(EVERY) > 40


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_page_has_a_recipe_for_8_gpus(name):
    assert any(processes(c)[0] == 8 and f"{name}.py" in c for c in commands(ROOT / "docs" / f"{name}.md"))


def dry(name: str, *flags: str) -> None:
    module = importlib.import_module(name)
    try:
        module.main(parse(module.Args, module.presets, ["--demo", "--model", CHAIN, "--dry_run", *flags]))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def test_a_dry_run_counts_what_a_run_would_do(tmp_path, capsys):
    dry("hsd", "--beta", "0.1", "--batch_size", "32", "--group_size", "4", "--max_tokens", "50", "--steps", "64",
        "--sampler_rows", "100", "--out", str(tmp_path / "runs"))
    plan = capsys.readouterr().out
    count = sum(p.numel() for p in module_parameters())
    kv = 2 * 2 * 32 * 4  # keys and values × heads × their width × bytes
    for words in ("--group_size 4", "32 questions × 4 responses = 128 rollouts, 128 a process", "6,400 tokens at most",
                  "64: 64 updates, 0.50 passes", f"N = {count:,} parameters, context 1,024", "2 more model(s)",
                  f"100 rows × 75 tokens × 4 layers × {kv} bytes", f"{24 * count / 2**30:10.3f}  N/1"):
        assert words in plan, words
    assert not (tmp_path / "runs").exists()


def module_parameters():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(CHAIN).parameters()


@pytest.mark.parametrize("name, flags, words", [
    ("grpo", ["--overlong", "shape", "--overlong_cache", "64"], "--overlong_cache 64 must be below --max_tokens 64"),
    ("grpo", ["--dynamic_sampling", "1", "--tensor_parallel", "2"], "cannot sample different numbers of rounds"),
    ("rlsd", ["--dual_clip", "0.5"], "--dual_clip 0.5 must be above 1"),
    ("sdpo", ["--adv_clip", "5", "--granularity", "sampled"], "with --granularity logit or token"),
    ("sdpo", ["--is_clip", "0"], "--is_clip 0.0: must lie between 1"),
    ("sdpo", ["--test_time", "--budget", "2"], "a --budget of at least --group_size"),
    ("sdpo", ["--max_tokens", "600"], "2 × --max_tokens 600 can exceed"),
    ("hsd", ["--max_tokens", "600"], "2 × --max_tokens 600 can exceed"),
])
def test_settings_that_cannot_work_are_refused_in_one_line(name, flags, words, monkeypatch):
    vllm(monkeypatch, there=True)
    with pytest.raises(SystemExit) as error:
        dry(name, *flags)
    assert words in str(error.value) and str(error.value).startswith("error: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("flags, words", [
    (["--model", "no-such/model"], "no folder, nor on the hub"),
    (["--task", "jsonl:/nowhere.jsonl"], "no such file"),
    (["--sampler", "vllm"], "vLLM is not installed"),
    (["--max_tokens", "1000"], "exceed the model's context of 1024; lower --max_tokens"),
], ids=["model", "data", "engine", "context"])
def test_a_dry_run_finds_what_is_missing_in_one_line(flags, words, monkeypatch):
    vllm(monkeypatch, there=False)
    with pytest.raises(SystemExit) as error:
        dry("grpo", *flags)
    assert words in str(error.value) and str(error.value).startswith("error: ") and "\n" not in str(error.value)
