"""Memory that runs out ends the run in one line: where, with how much in use, what to lower; the checkpoint stands."""
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import CHAIN, ROOT
from ranks import run_file, run_grpo
from torch.distributed.checkpoint import CheckpointException, FileSystemWriter
from torch.distributed.tensor import DTensor

import grpo
from common import checkpoints, policy
from common.rollouts import Rollouts
from common.run import last_words, out_of_memory, remedies
from common.sampler import HFSampler, VLLMSampler
from common.settings import Setup

TINY = ["--demo", "--model", CHAIN, "--batch_size", "2", "--group_size", "4", "--heldout", "2", "--max_tokens", "16",
        "--eval_every", "9", "--eval_samples", "1", "--steps", "3", "--save_every", "1", "--beta", "0.04", "--name", "r"]
TOLD = r"CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB"


def planted(function, folder: Path):
    """`function`, which finds no memory any more once the first checkpoint is complete."""
    def call(*args, **kwargs):
        if (folder / "checkpoints" / "step_000001").exists():
            raise torch.OutOfMemoryError(TOLD)
        return function(*args, **kwargs)
    return call


PLACES = {  # phase → where, and what is to be lowered, in order
    "sample": (HFSampler, "sample", "lower --sampler_rows, then lower --max_tokens, then begin anew with --lora_rank 32"),
    "score": (grpo, "score", "lower --token_budget, then begin anew with --lora_rank 32"),
    "update": (grpo, "loss", "lower --token_budget, then add --checkpointing --no-share_prompts, then begin anew with --lora_rank 32"),
    "sync": (HFSampler, "load", "begin anew with --lora_rank 32"),
    "save": (checkpoints, "save_model", "begin anew with --lora_rank 32"),
    "save, inside the library": (FileSystemWriter, "write_data", "begin anew with --lora_rank 32"),
}


@pytest.mark.parametrize("phase", ["start", "collect", "sample", "evaluate", "score", "update", "sync", "save", "verify"])
def test_there_is_always_something_to_lower(phase):
    """With adapters too; and never a flag that the others forbid."""
    setup = Setup(lora_rank=8, share_prompts=True, checkpointing=False)
    told = remedies(SimpleNamespace(setup=setup, current=phase))
    assert told and not any(word.endswith("--checkpointing") for word in told)
    assert ("lower --srt_max_tokens" in told) == (phase == "collect")


@pytest.mark.parametrize("phase", PLACES)
def test_each_phase_says_what_to_lower_and_the_last_checkpoint_stands(phase, tmp_path, monkeypatch, capsys):
    owner, name, remedies = PLACES[phase]
    monkeypatch.setattr(owner, name, planted(getattr(owner, name), tmp_path / "r"))
    with pytest.raises((torch.OutOfMemoryError, CheckpointException)) as error:
        run_grpo([*TINY, "--out", str(tmp_path)])
    dist.destroy_process_group()
    capsys.readouterr()
    sys.excepthook(error.type, error.value, error.tb)
    word = phase.partition(",")[0]
    step = {"save": 2}.get(word, 1)
    assert re.fullmatch(rf"error: out of memory in step {step}, phase {word}, on rank 0, with up to \d+\.\d GiB in use: "
                        rf"{remedies}; the last complete checkpoint is \S*/r/checkpoints/step_000001: go on with "
                        r"--resume auto\n", capsys.readouterr().err)
    if phase == "save, inside the library":  # half a checkpoint is there
        monkeypatch.undo()
        run_grpo([*TINY, "--out", str(tmp_path), "--resume", "auto"])
        assert sorted(p.name for p in (tmp_path / "r" / "checkpoints").iterdir()) == ["step_000002", "step_000003"]


def test_a_run_that_ends_so_prints_no_traceback(tmp_path):
    program = ("import sys, torch, grpo; from ranks import run_grpo\n"
               "def loss(*_, **__): raise torch.OutOfMemoryError('CUDA out of memory.')\n"
               "grpo.loss = loss; run_grpo(sys.argv[1:])")
    done = subprocess.run([sys.executable, "-c", program, *TINY, "--out", str(tmp_path)], cwd=ROOT, capture_output=True,
                          text=True, env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests"})
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: out of memory in step 0, phase update, on rank 0")


@pytest.mark.parametrize("error, found", [
    (torch.OutOfMemoryError("CUDA out of memory."), True), (RuntimeError("CUDA Error: out of memory at cumem.cpp:62"), True),
    (CheckpointException("save", {1: (torch.OutOfMemoryError("HIP out of memory on another rank"), None)}), True),
    (RuntimeError("shapes do not match"), False), (ValueError("out of memory"), False),
    (CheckpointException("save", {1: (OSError("No space left on device"), None)}), False)])
def test_what_counts_as_memory_that_ran_out(error, found):
    assert out_of_memory(error) == found


def test_any_other_error_is_told_as_usual(capsys):
    last_words(None, ValueError, ValueError("another"), None)
    assert capsys.readouterr().err == "ValueError: another\n"


@pytest.mark.parametrize("told", ["Try increasing `gpu_memory_utilization`.", "less than desired GPU memory utilization"])
def test_vllm_without_room_names_the_flag_of_the_files(told):
    """Met on a GPU that other processes were filling: vLLM speaks of its own parameter."""
    engine = object.__new__(VLLMSampler)
    engine.path = "MODEL"
    said = engine.refusal("start with", ValueError(f"Value error, not enough\nGPU memory. {told} {'more ' * 99}"))
    assert "(not enough GPU memory." in said and "--vllm_memory" in said and "utilization" not in said
    assert said.endswith("); take --sampler hf") and len(said) < 330


@pytest.mark.parametrize("kind", [AssertionError, NotImplementedError, ValueError])
def test_a_vllm_that_cannot_start_ends_the_run_with_one_line(kind, monkeypatch):
    """Its memory profile asserts that no other process of the card gives memory back meanwhile."""
    def start(**_):
        raise kind("Error in memory profiling.")

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=start))
    with pytest.raises(SystemExit) as ended:
        VLLMSampler("MODEL", None, torch.device("cuda"))
    assert str(ended.value).endswith("cannot start with MODEL (Error in memory profiling.); take --sampler hf")


GATHERS = {"hsd": [], "sdpo": [], "sdzero": ["--phase", "sd", "--sd_questions", "4", "--srt_questions", "4"]}


@pytest.mark.parametrize("name", GATHERS)
def test_a_teacher_gives_back_what_it_gathered_before_the_next_rollouts(name, tmp_path, monkeypatch):
    """FSDP2 leaves embeddings and head whole after a forward without gradient: 2.3 GiB of an 8B."""
    monkeypatch.setattr(policy, "stays_whole", lambda *_: False)
    module, sync, made, seen = importlib.import_module(name), Rollouts.sync, [], []
    copy = module.frozen_copy

    def spy(self, student):
        seen.append([isinstance(p, DTensor) for p in made[0].parameters()])
        sync(self, student)

    monkeypatch.setattr(module, "frozen_copy", lambda *args: made.append(copy(*args)) or made[-1])
    monkeypatch.setattr(Rollouts, "sync", spy)
    flags = [f for f in TINY if f not in ("--beta", "0.04")]
    if name == "sdzero":
        flags = [*flags[:3], *flags[7:11], "--batch_size", "2", "--max_tokens", "16", "--name", "r"]
    else:
        flags = [*flags, "--steps", "2"]
    run_file(name, [*flags, *GATHERS[name], "--out", str(tmp_path)])
    assert len(seen) >= 3 and all(all(whole) for whole in seen)
