"""Every command of the method files that the README, the pages and the docstrings print is in order: its flags parse, and
a dry run in as many processes as it names finds its values consistent.

The model and the problems of a command are replaced by the embedded ones (with a context of 40,960 tokens, as Qwen3 has),
for the rest of a machine is not here; names of tasks are checked against those that exist.
"""
import ast
import dataclasses
import importlib
import json
import re
import shlex
import shutil
from functools import cache

import pytest
import torch
from conftest import CHAIN, ROOT
from test_house import ALGORITHMS

from common import chat, memory, rollouts, run, tasks
from common import settings as common_settings
from common.settings import parse
from common.tasks import chain
from common.tasks.mixtures import mixture
from common.tasks.sets import SETS

FILES = "|".join(ALGORITHMS)
COMMAND = re.compile(rf"^\s*((?:python |torchrun .*?)(?:{FILES})\.py(?:.*\\\n)*.*)$", re.MULTILINE)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *(ROOT / f"{name}.py" for name in ALGORITHMS)]


def commands(page) -> list[str]:
    """Each command on one line, without its comment. In prose and tables: code that begins with a file's name."""
    text = page.read_text() if page.suffix == ".md" else ast.get_docstring(ast.parse(page.read_text()))
    found = [line for block in ([text] if page.suffix == ".py" else re.findall(r"```.*?\n(.*?)```", text, re.DOTALL))
             for line in COMMAND.findall(block)]
    found += re.findall(rf"`((?:python )?(?:{FILES})\.py --[^`]+)`", text)
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
def problems(heldout: int, train: int) -> tasks.Task:
    """Problems of the embedded task."""
    size, chain.SIZE = chain.SIZE, train
    try:
        return tasks.load_task("chain", heldout=heldout)
    finally:
        chain.SIZE = size


@cache
def ids_of(tokens, thinking: bool, *messages: tuple[str, str]) -> list[int]:
    return chat.chat_ids(tokens, [dict(role=role, content=content) for role, content in messages], thinking)


@pytest.fixture(scope="module")
def measured_once(model):
    """Commands measure the same thousands of prompts: each is tokenized once."""
    tokens = chat.load_tokenizer(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollouts, "chat_ids", lambda _, messages, thinking=False: ids_of(
            tokens, thinking, *((m["role"], m["content"]) for m in messages)))
        yield


def processes(command: str) -> tuple[int, int]:
    """→ (all, those of one machine)"""
    count = lambda flag: int((re.search(rf"--{flag}[= ](\d+)", command.partition(".py")[0]) or [0, 1])[1])
    return count("nnodes") * count("nproc_per_node"), count("nproc_per_node")


def vllm(monkeypatch, there: bool) -> None:
    """As if vLLM were installed, or not."""
    monkeypatch.setattr(common_settings, "installed", lambda package: there)


def many(monkeypatch, world: int, local: int) -> None:
    """As if this were the first of `world` processes, `local` of them on this machine."""
    real = run.dist.init_process_group
    monkeypatch.setattr(run, "rendezvous", lambda: (None, 0, world))
    monkeypatch.setattr(run.dist, "init_process_group", lambda *_, **__: real(
        "gloo", store=run.dist.HashStore(), rank=0, world_size=1))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))


@pytest.mark.parametrize("page, command", EVERY, ids=[f"{page}-{i}" for i, (page, _) in enumerate(EVERY)])
def test_every_printed_command_dry_runs(page, command, model, measured_once, tmp_path, monkeypatch, capsys):
    name = re.search(rf"({FILES})\.py", command)[1]
    module = importlib.import_module(name)
    args = parse(module.Args, module.presets, shlex.split(command.partition(".py")[2]))
    for _, part in mixture(args.task):
        source = part.partition(":")[0].partition("/")[0]
        assert source in {"chain", "jsonl", "json", "hf", "gym", *SETS}, f"no such task: {part}"
    world, local = processes(command)
    train = 64
    if name == "sdzero":  # its phases must not share a question
        train = args.srt_questions + args.sd_questions
        if args.traces:  # another run's
            args.traces = f"{model}/config.json"
    monkeypatch.setattr(rollouts, "load_task", lambda spec, heldout, **_: problems(heldout, train))
    vllm(monkeypatch, there=True)
    many(monkeypatch, world, local)
    monkeypatch.setattr(memory, "activations", lambda lm, load: (0, 0))  # tests/test_memory.py has them
    setup = dataclasses.replace(args.setup, dry_run=True, out=str(tmp_path))
    try:
        module.main(dataclasses.replace(args, model=model, task="chain", setup=setup))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    plan = capsys.readouterr().out
    assert f"{args.batch_size:,} questions" in plan and f"; {world} process(es)" in plan
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


@pytest.mark.parametrize("local", [1, 8])
def test_a_dry_run_counts_what_a_run_would_do(local, tmp_path, monkeypatch, capsys):
    many(monkeypatch, 8, local)
    dry("hsd", "--beta", "0.1", "--batch_size", "32", "--group_size", "4", "--max_tokens", "50", "--steps", "64",
        "--out", str(tmp_path / "runs"))
    plan = capsys.readouterr().out
    count = sum(p.numel() for p in module_parameters())
    state, copies = 4 * count + 4 * count + 8 * count, 2 * 4 * count  # weights, gradients, AdamW; teacher and reference
    for words in ("--group_size 4", "32 questions, 128 responses of at most 50 tokens, 1 update(s); 8 process(es)",
                  f"{count:,} parameters, context 1,024 tokens",
                  f"{state / local / 2**30:.3f}  weights, gradient, AdamW: {count:,} parameters / {local}",
                  f"{copies / local / 2**30:.3f}  2 more model(s)",
                  f"{4 * count / 2**30:.3f}  the sampler's weights"):
        assert words in plan, words
    assert not (tmp_path / "runs").exists()


def module_parameters():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(CHAIN).parameters()


@pytest.mark.parametrize("name, flags, words", [
    ("grpo", ["--loss", "dapo", "--tensor_parallel", "2", "--sampler", "vllm"], "take --dynamic_sampling 0 or --tensor_parallel 1"),
    ("grpo", ["--share_prompts", "--checkpointing"], "add --no-checkpointing"),
    ("rlsd", ["--dual_clip", "0.5"], "--dual_clip 0.5 must be above 1"),
    ("sdpo", ["--adv_clip", "5", "--granularity", "sampled"], "with --granularity logit or token"),
    ("sdpo", ["--kl", "jsd", "--granularity", "sequence"], "--granularity sequence needs the reverse KL: add --kl reverse"),
    ("sdpo", ["--granularity", "token", "--top_k", "20"], "--granularity token compares no 20 entries: leave out --top_k"),
    ("sdpo", ["--max_tokens", "600"], "2 × --max_tokens 600 can exceed"),
    ("hsd", ["--entry_clip", "0.1", "--kl", "jsd"], "--entry_clip bounds the entries of --kl forward"),
    ("hsd", ["--max_tokens", "984"], "--max_tokens 984 can exceed the model's context of 1024 (with the teacher's context)"),
])
def test_settings_that_cannot_work_are_refused_in_one_line(name, flags, words, monkeypatch):
    vllm(monkeypatch, there=True)
    many(monkeypatch, 2, 2)
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


def test_more_processes_than_gpus_end_with_the_number_to_give(tmp_path, monkeypatch):
    many(monkeypatch, world=4, local=4)
    monkeypatch.setattr(run.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    grpo = importlib.import_module("grpo")
    args = parse(grpo.Args, grpo.presets, ["--demo", "--out", str(tmp_path)])
    try:
        with pytest.raises(SystemExit, match="give torchrun --nproc_per_node=2"):
            run.Run(args, "grpo")
    finally:
        torch.distributed.destroy_process_group()
