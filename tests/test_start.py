"""What ends a run before its first step: settings, launches, folders, hub ids, lengths; and a resume of another run."""
import dataclasses
import importlib
import json
import math
import os
import re
import shutil
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import CHAIN
from test_house import ALGORITHMS

from common import check_hub, checkpoints, rollouts, run, tasks
from common.architecture import check_path
from common.chat import chat_ids, load_tokenizer
from common.log import make_tracker
from common.rollouts import Rollouts
from common.run import rendezvous, unwritable
from common.settings import FIXED, FREE, Setup, check_settings, flat, parse
from common.verifiers.pool import Verifier

SMALL = ["--batch_size", "2", "--group_size", "2", "--heldout", "4", "--max_tokens", "8", "--eval_samples", "1",
         "--eval_every", "9"]


def args_of(name: str, *flags: str):
    module = importlib.import_module(name)
    return parse(module.Args, module.presets, ["--demo", "--model", CHAIN, *flags])


def start(name: str, *flags: str) -> None:
    try:
        importlib.import_module(name).main(args_of(name, *flags))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def refusal(function, *args) -> str:
    """The one line that a call ends with."""
    with pytest.raises(SystemExit) as error:
        function(*args)
    text = str(error.value)
    assert text.startswith("error: ") and "\n" not in text
    return text


def fake_package(monkeypatch, name: str) -> list[dict]:
    """A tracker that keeps what it was given."""
    calls: list[dict] = []
    module = types.ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    module.init = lambda **given: calls.append(given)
    module.log = lambda row, step: calls.append({"row": row, "step": step})
    monkeypatch.setitem(sys.modules, name, module)
    return calls


# ---------------------------------------------------------------------------------------------------------------------
# settings
# ---------------------------------------------------------------------------------------------------------------------
def numbers(part) -> list[tuple[str, object]]:
    return [(f.name, f.default) for f in dataclasses.fields(part) if type(f.default) in (int, float)]


def changed(args, **values):
    """Settings with other values, wherever they are."""
    shared = {name: value for name, value in values.items() if name in vars(args.setup)}
    own = {name: value for name, value in values.items() if name not in shared}
    return dataclasses.replace(args, **own, setup=dataclasses.replace(args.setup, **shared))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_no_number_may_be_negative_or_infinite_and_no_count_may_be_0(name):
    args = args_of(name)
    for flag, default in [*numbers(type(args)), *numbers(Setup)]:
        kind = type(default)
        bad = [kind(-1)] if kind is int else [-1.0, math.inf, math.nan]
        if kind is int and default > 0 and flag != "warmup":
            bad.append(0)
        for value in bad:
            assert f"--{flag} {value}" in refusal(check_settings, changed(args, **{flag: value}))
    check_settings(args)


@pytest.mark.parametrize("flags, words", [
    (["--lr", "1"], "--lr 1.0: must be at most 0.1"), (["--seed", "-1"], "--seed -1: must not be negative"),
    (["--steps", "0"], "--steps 0: must be above 0"), (["--top_p", "1.5"], "--top_p 1.5: a share, at most 1"),
    (["--name", "a/b"], "--name a/b: must be a folder's name, without slashes"), (["--name", ".."], "--name ..: must be a folder's name"),
    (["--name", "/tmp"], "--name /tmp: must be a folder's name"), (["--name", "."], "--name .: must be a folder's name"),
    (["--out", "~/runs"], "--out ~/runs: write ~ out"),
    (["--tensor_parallel", "2"], "needs --sampler vllm, to share an engine"),
    (["--eval_only", "--resume", "auto"], "give the checkpoint as --model instead of --resume auto"),
    (["--lora_alpha", "0"], "--lora_alpha 0.0: must be above 0"),
    (["--track", "trackio"], "--track trackio: the package is not installed; pip install trackio"),
], ids=lambda x: "" if isinstance(x, str) else " ".join(x))
def test_settings_that_make_no_sense_are_refused(flags, words):
    assert words in refusal(check_settings, args_of("grpo", *flags))


def test_ranks_that_do_not_divide_into_engines_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("common.settings.installed", lambda package: True)
    said = refusal(start, "grpo", "--dry_run", "--sampler", "vllm", "--tensor_parallel", "2", "--out", str(tmp_path))
    assert "--tensor_parallel 2 does not divide 1 process(es)" in said


@pytest.mark.parametrize("name, flags", [("hsd", []), ("hsd", ["--context", "answer", "--grpo_mix", "0.5"]),
                                         ("sdpo", ["--context", "solution"]), ("sdpo", ["--lam", "0.9"])])
def test_a_group_of_one_has_no_peer(name, flags, tmp_path):
    said = refusal(start, name, "--dry_run", "--out", str(tmp_path), "--group_size", "1", *flags)
    assert "--group_size 1: a " in said and "raise it, or take --context" in said


# ---------------------------------------------------------------------------------------------------------------------
# launches
# ---------------------------------------------------------------------------------------------------------------------
LAUNCHERS = [dict(SLURM_PROCID="3", SLURM_NTASKS="8"), dict(SLURM_PROCID="0", SLURM_STEP_NUM_TASKS="8"),
             dict(OMPI_COMM_WORLD_SIZE="8"), dict(PMI_SIZE="8")]


@pytest.mark.parametrize("env", LAUNCHERS, ids=lambda env: "+".join(env))
def test_processes_without_torchrun_are_refused(env, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert "8 processes were started without torchrun" in refusal(rendezvous)


@pytest.mark.parametrize("env", [{}, dict(SLURM_PROCID="0", SLURM_NTASKS="1"), dict(SLURM_NTASKS="8"), dict(PMI_SIZE="1")])
def test_one_process_needs_no_torchrun(env, monkeypatch):
    """Nor does a shell inside an allocation of eight tasks."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert rendezvous()[1:] == (0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# folders
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dry", [["--dry_run"], []])
@pytest.mark.parametrize("out", ["a.txt", "a.txt/runs", "/proc/runs"])
def test_an_out_that_cannot_be_written_to_is_refused(out, dry, tmp_path):
    (tmp_path / "a.txt").write_text("a file")
    assert "give another --out" in refusal(start, "grpo", *dry, "--out", str(tmp_path / out))


def test_a_dry_run_leaves_nothing(tmp_path):
    assert unwritable(tmp_path / "a" / "b") == "" and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_dry_run_says_what_a_step_is_made_of_and_leaves_nothing(name, tmp_path, capsys):
    flags = ["--srt_questions", "20", "--sd_questions", "20"] if name == "sdzero" else []
    start(name, "--dry_run", "--out", str(tmp_path / "runs"), "--batch_size", "4", "--heldout", "4", *flags)
    said = capsys.readouterr().out
    responses = 4 if name == "sdzero" else 32
    assert f"4 questions, {responses} responses of at most" in said and "1 update(s); 1 process(es)" in said
    assert "Qwen3ForCausalLM" in said and "context 1,024 tokens" in said and "4 held out" in said
    assert re.search(r"memory  per process, GiB, counted(.*\n)+ +0\.\d{3}  at most", said) and "--eval_every " in said
    assert "dry run: " in said and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ALGORITHMS)
def test_what_a_run_was_given_is_on_disk_before_its_first_step(name, tmp_path, monkeypatch):
    """All settings by name, as on the command line."""
    def first_step(self, *bounds):
        raise SystemExit("error: the first step")

    monkeypatch.setattr(run.Run, "steps", first_step)
    flags = ["--batch_size", "2", "--heldout", "4", "--save_every", "7"]
    flags += ["--out", str(tmp_path), "--name", "r"]
    if name == "sdzero":
        flags += ["--phase", "sd", "--srt_questions", "20", "--sd_questions", "20"]
    assert "the first step" in refusal(start, name, *flags)
    given = json.loads((tmp_path / "r" / "args.json").read_text())
    assert given == flat(args_of(name, *flags)) and given["save_every"] == 7


def test_a_name_that_a_file_has_is_refused(tmp_path):
    (tmp_path / "r").write_text("a file")
    flags = ["--out", str(tmp_path), "--name", "r", "--resume", "auto"]
    assert "cannot be made" in refusal(start, "grpo", *flags)


def test_a_checkpoint_that_does_not_fit_the_disk_is_refused_before_the_first_step(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "free_bytes", lambda folder: 11 * 2**20)
    said = refusal(start, "grpo", *SMALL, "--steps", "1", "--out", str(tmp_path))
    assert "a checkpoint takes about 0.01 GiB" in said and "make room" in said
    assert not list(tmp_path.glob("*/metrics.jsonl"))
    monkeypatch.setattr(run, "free_bytes", lambda folder: 13 * 2**20)  # one fits, three do not
    start("grpo", *SMALL, "--steps", "1", "--out", str(tmp_path), "--name", "r")
    assert "it will be full before 2 of them are there" in capsys.readouterr().out
    written = sum(f.stat().st_size for f in (tmp_path / "r" / "checkpoints").rglob("*") if f.is_file())
    assert 11 * 2**20 < written < 13 * 2**20  # so the estimate is right


def test_an_evaluation_needs_no_room_for_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "free_bytes", lambda folder: 0)
    start("grpo", *SMALL, "--eval_only", "--out", str(tmp_path))


# ---------------------------------------------------------------------------------------------------------------------
# models, tasks
# ---------------------------------------------------------------------------------------------------------------------
def the_hub(monkeypatch, answer) -> None:
    """As if online, with a hub that gives this answer."""
    def repo_exists(name, repo_type):
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr(huggingface_hub, "repo_exists", repo_exists)


@pytest.mark.parametrize("answer, words", [
    (False, "no folder, nor on the hub; look for a typing error"),
    (RuntimeError("Name or service not known\nmore"), "the hub cannot be reached (Name or service not known)")])
def test_a_hub_id_that_is_not_there_costs_one_request(answer, words, monkeypatch):
    the_hub(monkeypatch, answer)
    monkeypatch.setattr("common.architecture.AutoConfig.from_pretrained", lambda path: pytest.fail("it tries six times"))
    assert words in refusal(check_path, "Qwen/Qwen3-0.6C")
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: pytest.fail("it tries six times"))
    assert words in refusal(tasks.load_problems, "hf:nobody/nothing")


def test_what_is_cached_is_not_asked_for(monkeypatch, tmp_path):
    the_hub(monkeypatch, RuntimeError("asked"))
    check_hub("--model", "a/b", "model", tmp_path)
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: True)
    check_hub("--model", "a/b", "model", None)


@pytest.mark.parametrize("path, words", [("", "--model is empty"), (" ", "--model is empty"),
                                         ("~/model", "the shell left ~"), ("a b", "no folder, nor on the hub"),
                                         ("./nothing", "no such folder"), ("a/b/c", "no such folder")])
def test_a_model_that_is_no_path_and_no_id_is_refused(path, words):
    assert words in refusal(check_path, path)


@pytest.mark.parametrize("spec, words", [
    ("chain:0", "after the colon"), ("chain:x", "after the colon"), ("chain:-1", "after the colon"),
    ("chain:1", "no 132 different sums"), ("0*chain+1*chain:4", "the weight of chain is 0"),
    ("1*nothing+1*chain", "unknown source 'nothing'"), ("", "unknown source ''"), ("gsm9k", "unknown source 'gsm9k'"),
    ("jsonl:EMPTY", "0 different problems"), ("jsonl:", "no such file"), ("1000000*chain+1*chain:4", "bring the weights nearer"),
])
def test_a_task_that_cannot_be_is_refused(spec, words, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    load = lambda: tasks.load_task(spec.replace("EMPTY", str(tmp_path / "empty.jsonl")), heldout=4)
    said = refusal(load)
    assert words in said and "--task" in said


@pytest.mark.parametrize("fields", ["question", "question=", "=q", "quest=q", "question=q, answer=a"])
def test_fields_that_name_nothing_are_refused(fields):
    assert "must be NAME=FIELD" in refusal(lambda: tasks.load_task("chain", heldout=4, fields=fields))


def test_a_task_of_evaluation_questions_alone_is_refused(tmp_path):
    lines = [json.dumps({"problem": f"What is {i}?", "answer": str(i)}) for i in range(9)]
    (tmp_path / "math").mkdir()
    (tmp_path / "math" / "math500.json").write_text("[" + ",".join(lines) + "]")
    load = lambda: tasks.load_task("math500", heldout=2, data_dir=str(tmp_path), against="math500")
    assert "no training question is left" in refusal(load)
    assert "no problem is held out" in refusal(lambda: tasks.load_task("1*chain+1*chain:4+1*chain:5", heldout=1))


# ---------------------------------------------------------------------------------------------------------------------
# lengths
# ---------------------------------------------------------------------------------------------------------------------
def long_question(folder: Path, words: int) -> str:
    """Thirty short questions and a long one that is not held out."""
    rows = [{"question": f"What is {i}+{i}?", "answer": str(2 * i)} for i in range(30)]
    rows.append({"question": "long " * words + "What is 2+1?", "answer": "3"})
    (folder / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = tasks.load_task(f"jsonl:{folder}/q.jsonl", heldout=4)
    assert max(len(p.messages[0]["content"]) for p in task.heldout) < 200
    return f"jsonl:{folder}/q.jsonl"


@pytest.fixture
def unchecked(monkeypatch):
    """References are not checked: that takes processes, and is a law of test_verifiers.py."""
    monkeypatch.setattr(Verifier, "check", lambda *_: None)


@pytest.mark.parametrize("dry", [["--dry_run"], []])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_one_training_question_too_long_for_the_context_is_named_at_start(name, dry, tmp_path, unchecked):
    spec = long_question(tmp_path, 1000)
    flags = ["--task", spec, "--heldout", "4", "--out", str(tmp_path), "--batch_size", "2"]
    if name == "sdzero":
        flags += ["--srt_questions", "20", "--sd_questions", "6"]
    said = refusal(start, name, *flags, *dry)
    assert "“long long long" in said and "exceed the model's context of 1024" in said
    assert "take such problems out of the data" in said


@pytest.mark.parametrize("template", [0, 300])
def test_a_prompt_of_few_bytes_and_many_tokens_is_found_though_few_are_measured(template, monkeypatch):
    """Also when the template is longer than what a token saves of the bytes."""
    tokenizer, measured = load_tokenizer(CHAIN), []

    def ids_of(*args) -> list[int]:
        measured.append(1)
        return [0] * template + chat_ids(*args)

    monkeypatch.setattr(rollouts, "chat_ids", ids_of)
    texts = ["What is 1+1? " * 60, "7 6 5 4 3 2 1 " * 40, *(f"Compute {i}." for i in range(300))]
    problems = [tasks.Problem(text[:9], [{"role": "user", "content": text}]) for text in texts]
    chats = [problem.messages for problem in problems]
    many, most = (len(ids_of(tokenizer, chat)) for chat in chats[:2])
    assert many < 500 + template < most
    measured.clear()
    here = object.__new__(Rollouts)
    here.args, here.tokenizer = args_of("grpo", "--max_tokens", str(1024 - most)), tokenizer
    here.run = types.SimpleNamespace(rank=0, world=1)
    here.context_length, here.longest = 1024, 0
    here.check_lengths(chats)
    assert here.longest == 1024 and len(measured) < 5
    here.args.max_tokens += 1
    said = refusal(lambda: here.check_lengths(chats * 2))
    assert "the problem “7 6 5 4 3" in said and f"a prompt of {most} tokens" in said


@pytest.mark.parametrize("name, flags, prompt", [
    ("sdpo", [], "reads a sibling's"), ("sdzero", [], "is read twice"),
    ("sdzero", ["--srt_max_tokens", "500", "--max_tokens", "64"], "is read twice")])
def test_a_start_checks_the_teachers_longest_prompt_as_a_dry_run_does(name, flags, prompt, tmp_path):
    """500 and 500 fit the context of 1024, but not beside a question and the teacher's wording."""
    if name == "sdzero":
        flags = [*flags, "--srt_questions", "20", "--sd_questions", "20", "--batch_size", "4"]
    said = [refusal(start, name, "--max_tokens", "500", *flags, "--out", str(tmp_path), *dry) for dry in ([], ["--dry_run"])]
    assert said[0] == said[1] and prompt in said[0] and "2 × --" in said[0]


def test_a_teachers_reference_that_is_longer_than_its_question_counts(tmp_path, unchecked):
    rows = [{"question": f"What is {i}+{i}?", "answer": str(2 * i), "solution": "so " * 1200} for i in range(30)]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["--dry_run", "--task", f"jsonl:{tmp_path}/q.jsonl", "--heldout", "4", "--out", str(tmp_path)]
    start("rlsd", *flags)
    for name, more in (("rlsd", ["--hint", "solution"]), ("hsd", ["--context", "solution"])):
        assert "exceed the model's context of 1024" in refusal(start, name, *flags, *more)


def test_a_sampler_with_less_room_than_the_model_ends_the_run_at_start(monkeypatch):
    engine = types.SimpleNamespace(context=512)
    monkeypatch.setattr(rollouts, "make_sampler", lambda *args: engine)
    monkeypatch.setattr(rollouts, "first_sync", lambda *args: None)
    here = object.__new__(Rollouts)
    here.args, here.sampler, here.tokenizer = args_of("grpo"), None, load_tokenizer(CHAIN)
    here.run = types.SimpleNamespace(phase=lambda name: None, device=None)
    here.task = types.SimpleNamespace(heldout=[tasks.Problem("1", [{"role": "user", "content": "1"}])])
    here.longest = 4000  # what a teacher reads may be longer than what is sampled
    here.sampled = 513
    assert "can exceed the 512 tokens that the sampler has room for" in refusal(here.sync, None)
    here.sampled, here.sampler = 512, None
    here.sync(None)


# ---------------------------------------------------------------------------------------------------------------------
# resume
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps with adapters."""
    out = tmp_path_factory.mktemp("trained")
    start("grpo", *SMALL, "--steps", "2", "--lora_rank", "4", "--out", str(out), "--name", "r")
    return out / "r" / "checkpoints" / "step_000002"


def resumed(trained, *flags: str) -> list[str]:
    return [*SMALL, "--lora_rank", "4", "--dry_run", "--out", str(trained.parent.parent.parent), "--name", "r",
            "--resume", "auto", "--steps", "2", *flags]


@pytest.mark.parametrize("flags, old, new", [
    (["--lora_rank", "8"], "4", "8"), (["--lora_alpha", "16"], "32.0", "16.0"), (["--seed", "1"], "0", "1"),
    (["--task", "chain:4"], "'chain'", "'chain:4'"), (["--weight_decay", "0.1"], "0.0", "0.1"),
    (["--heldout", "8"], "4", "8"), (["--instruction", "Answer."], "None", "'Answer.'"),
    (["--model", "COPY"], repr(CHAIN), "COPY")], ids=lambda x: x[0] if isinstance(x, list) else "")
def test_a_resume_with_a_setting_of_another_run_names_both_values(flags, old, new, trained, tmp_path):
    shutil.copytree(CHAIN, tmp_path / "copy")
    flags = [f.replace("COPY", str(tmp_path / "copy")) for f in flags]
    said = refusal(start, "grpo", *resumed(trained, *flags))
    new = new.replace("COPY", repr(str(tmp_path / "copy")))
    assert f"was trained with {flags[0]} {old}, not {new}: give the old value" in said and f"--model {trained}" in said


def test_a_resume_of_another_methods_checkpoint_is_refused(trained, tmp_path):
    said = refusal(start, "rlsd", *SMALL, "--lora_rank", "4", "--dry_run", "--out", str(tmp_path), "--resume", str(trained))
    assert "was trained by grpo, not by rlsd" in said


def test_a_resume_with_fewer_steps_than_are_done_is_refused(trained):
    assert "has 2 steps, more than --steps 1: raise --steps" in refusal(start, "grpo", *resumed(trained, "--steps", "1"))


def test_a_resume_of_a_folder_that_is_no_checkpoint_is_refused_in_a_dry_run(trained, tmp_path):
    for place in (tmp_path, tmp_path / "nothing", trained.parent, Path(CHAIN), trained / "trainer.json"):
        assert "so not a checkpoint" in refusal(start, "grpo", *resumed(trained, "--resume", str(place)))


def test_a_damaged_manifest_is_named(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "step_000002")
    (tmp_path / "step_000002" / "manifest.json").write_text('{"trainer.json": ')
    said = refusal(start, "grpo", *resumed(trained, "--resume", str(tmp_path / "step_000002")))
    assert "manifest.json is not JSON" in said


def test_a_resume_may_change_the_machine_and_says_what_else_changed(trained, capsys):
    """The same folder of a model under another spelling is the same model."""
    spelled = os.path.relpath(CHAIN, os.getcwd())
    flags = [f for f in resumed(trained) if f != "--dry_run"]
    start("grpo", *flags, "--model", spelled, "--token_budget", "999", "--save_every", "1", "--steps", "3",
          "--lr", "1e-5", "--max_tokens", "4")
    said = capsys.readouterr().out
    assert "resumed from" in said
    assert "changed since that checkpoint: --max_tokens 8 → 4  --lr 0.0001 → 1e-05\n" in said
    assert len((trained.parent.parent / "metrics.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize("name", ALGORITHMS)
def test_settings_that_a_resume_fixes_or_frees_are_settings(name):
    names = set(flat(args_of(name)))
    assert not set(FIXED) & set(FREE) and set(FIXED) <= names
    assert set(FREE) - names <= {"steps"}


@pytest.mark.parametrize("name, flags, words", [("hsd", ["--teacher", "ema"], "--teacher 'frozen', not 'ema'"),
                                                ("sdpo", ["--teacher", "live"], "--teacher 'ema', not 'live'"),
                                                ("rlsd", ["--lam", "0"], "--lam 0.5, not 0.0"),
                                                ("sdzero", ["--batch_size", "32"], "--batch_size 64, not 32")])
def test_a_resume_with_another_value_of_what_the_method_fixes_is_refused(name, flags, words, tmp_path):
    """A teacher that is not in the checkpoint; other questions in the same steps."""
    folder = written_checkpoint(tmp_path, name if name != "sdzero" else "sdzero-both", args_of(name))
    assert words in refusal(start, name, "--dry_run", "--out", str(tmp_path), "--resume", str(folder), *flags)


def test_sdzero_whose_settings_ask_for_fewer_steps_than_are_done_is_refused(tmp_path, monkeypatch):
    """Its steps come from the data: ten of phase 2 here."""
    flags = ["--phase", "sd", "--srt_questions", "20", "--sd_questions", "20", "--batch_size", "2"]
    flags += ["--heldout", "4", "--out", str(tmp_path)]
    folder = written_checkpoint(tmp_path, "sdzero-sd", args_of("sdzero", *flags))
    monkeypatch.setattr(checkpoints, "load", lambda *args: {"step": 11, "args": {}})
    said = refusal(start, "sdzero", *flags, "--resume", str(folder))
    assert "11 steps are done, and the settings ask for 10" in said


def written_checkpoint(out: Path, method: str, args) -> Path:
    """What is read of a checkpoint before its state."""
    folder = out / "step_000002"
    folder.mkdir()
    trainer = {"edition": 2, "step": 2, "method": method, "args": flat(args)}
    (folder / "trainer.json").write_text(json.dumps(trainer))
    digest = checkpoints.checksum(folder / "trainer.json")
    (folder / "manifest.json").write_text(json.dumps({"trainer.json": digest}))
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# trackers
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("package, key", [("wandb", "id"), ("trackio", "name")])
def test_a_run_that_goes_on_goes_on_in_its_own_record(package, key, tmp_path, monkeypatch):
    calls = fake_package(monkeypatch, package)
    common = [*SMALL, "--track", package, "--out", str(tmp_path)]
    start("grpo", *common, "--steps", "1", "--name", "r")
    start("grpo", *common, "--steps", "2", "--name", "r", "--resume", "auto")
    start("grpo", *common, "--steps", "1", "--name", "r")  # r-2
    inits = [c for c in calls if "project" in c]
    assert [c["resume"] for c in inits] == ["allow"] * 3
    assert inits[0][key] == inits[1][key] != inits[2][key]
    assert [c["step"] for c in calls if "row" in c] == [0, 1, 1, 2, 0, 1]


def test_tensorboard_shows_a_step_that_came_again_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = make_tracker("tensorboard", tmp_path, 0, {})
    for step in range(5):
        first({"step": step, "reward": 0.0})
    second = make_tracker("tensorboard", tmp_path, 3, {})  # a resume from the checkpoint of three steps
    for step in (3, 4, 5):
        second({"step": step, "reward": 1.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward")] == [
        (0, 0.0), (1, 0.0), (2, 0.0), (3, 1.0), (4, 1.0), (5, 1.0)]
