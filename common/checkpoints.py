"""Checkpoints: a Hugging Face folder with the trainer's state beside the weights.

    step_000100/  config.json, model.safetensors, tokenizer … opened by from_pretrained
                  state/                                      fp32 weights, AdamW, teacher (DCP)
                  trainer.json  manifest.json                 settings; sha256 of every file

A checkpoint is written under a temporary name and renamed when complete, so a kill at any moment
leaves the previous one in place.
"""
from __future__ import annotations

import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from common.policy import Policy, save_model
from common.settings import refused_change

KEPT = 2  # checkpoints that a run keeps


def save(folder: Path, policy: Policy, optimizer: torch.optim.Optimizer, teacher, tokenizer,
         trainer: dict, device: torch.device) -> None:
    """Write a checkpoint to `folder` and remove old ones. A collective."""
    part, rank = folder.with_name(f"tmp-{folder.name}"), dist.get_rank()
    dcp.save(training_state(policy, optimizer, teacher), checkpoint_id=part / "state")
    sums: list = [None] * dist.get_world_size()
    dist.all_gather_object(sums, checksums(part, f"state/__{rank}_*"))  # what each rank wrote
    save_model(policy, part, device)
    if rank > 0:
        return
    tokenizer.save_pretrained(part)
    (part / "trainer.json").write_text(json.dumps(trainer, indent=1))
    manifest = checksums(part, "*") | checksums(part, "state/.metadata")
    for some in sums:
        manifest |= some
    (part / "manifest.json").write_text(json.dumps(manifest, indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)
    for old in sorted(folder.parent.glob("step_??????"))[:-KEPT]:
        shutil.rmtree(old)


def load(folder: Path, policy: Policy, optimizer: torch.optim.Optimizer, teacher) -> dict:
    """Load the trainer's state from `folder`; → trainer.json. A collective."""
    state = training_state(policy, optimizer, teacher)
    dcp.load(state, checkpoint_id=folder / "state")
    set_state_dict(
        policy, optimizer, model_state_dict=state["policy"], optim_state_dict=state["optimizer"],
        options=StateDictOptions(strict=False),  # a frozen base is not in it
    )
    if teacher is not None:
        teacher.load_state_dict(state["teacher"])
    return json.loads((folder / "trainer.json").read_text())


def training_state(policy: Policy, optimizer: torch.optim.Optimizer, teacher) -> dict:
    """The trained fp32 weights (adapters alone with LoRA), the moments, and the teacher."""
    fresh = not optimizer.state
    weights, moments = get_state_dict(policy, optimizer)
    if fresh:  # torch made moments by an update with lr 0, which must not count
        for state in optimizer.state.values():
            state["step"].zero_()
    for name, p in policy.named_parameters(remove_duplicate=False):
        if not p.requires_grad:
            weights.pop(name, None)
    state = {"policy": weights, "optimizer": moments}
    if teacher is not None:
        state["teacher"] = teacher.state_dict()
    return state


def checksums(folder: Path, pattern: str) -> dict[str, str]:
    """The sha256 of the files in `folder` that match, by their names there."""
    files = [file for file in sorted(folder.glob(pattern)) if file.is_file()]
    with ThreadPoolExecutor(8) as pool:
        sums = list(pool.map(checksum, files))
    return {str(file.relative_to(folder)): found for file, found in zip(files, sums)}


def checksum(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def last(run_folder: Path) -> Path | None:
    """The newest checkpoint of a run, if any."""
    return max((run_folder / "checkpoints").glob("step_??????"), default=None)


def choose(run_folder: Path, resume: str, method: str, settings: dict,
           fixed: tuple[str, ...] = ()) -> tuple[Path | None, str]:
    """The checkpoint that --resume names (None: none yet), and what is wrong with it ("": nothing).

    fixed: settings of the method that must not differ, beside settings.FIXED.
    """
    newest = last(run_folder)
    folder = newest
    if resume != "auto":
        folder = Path(resume)
    if not resume or folder is None:
        return None, ""
    manifest = folder / "manifest.json"
    if not manifest.exists():
        return folder, (
            f"--resume {folder}: no manifest.json, so not a checkpoint; name a folder such as "
            "runs/NAME/checkpoints/step_000100, or auto"
        )
    damaged = damaged_file(folder, manifest)
    if damaged:
        return folder, f"checkpoint {folder} is damaged: {damaged}; remove that folder"
    if newest is not None and newest.name > folder.name:
        return folder, f"{newest} is later than {folder}: move it away, or give another --name"
    return folder, other_run(folder, method, settings, fixed)


def damaged_file(folder: Path, manifest: Path) -> str:
    """The first file of a checkpoint that is missing or changed; "" if all are whole."""
    try:
        sums = json.loads(manifest.read_text())
    except ValueError:
        return f"{manifest.name} is not JSON"
    found = checksums(folder, "**/*")
    for name, expected in sums.items():
        if found.get(name) != expected:
            return f"{name} is missing or changed"
    return ""


def other_run(folder: Path, method: str, settings: dict, fixed: tuple[str, ...]) -> str:
    """Why the checkpoint in `folder` belongs to another run than this one; "" if it does not."""
    trainer = json.loads((folder / "trainer.json").read_text())
    anew = f"or begin a new run with its weights: --model {folder} and another --name"
    if "edition" not in trainer:
        return (
            f"checkpoint {folder} is of the first edition, whose state this one cannot read: "
            f"{anew.removeprefix('or ')}"
        )
    if trainer["method"] != method:
        return (
            f"checkpoint {folder} was trained by {trainer['method']}, not by {method}: go on with "
            f"{trainer['method']}, {anew}"
        )
    change = refused_change(trainer["args"], settings, fixed)
    if change:
        return f"checkpoint {folder} was trained with {change}: give the old value, {anew}"
    steps = settings.get("steps", trainer["step"])
    if trainer["step"] > steps:
        return (
            f"checkpoint {folder} has {trainer['step']} steps, more than --steps {steps}: raise "
            "--steps"
        )
    return ""


def size_in_bytes(policy: Policy, teacher, device: torch.device) -> int:
    """About the bytes that a checkpoint takes on the disk."""
    weights = sum(p.numel() for p in policy.parameters())
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    copies = 0
    if teacher is not None:
        copies = sum(p.numel() for p in teacher.parameters())
    width = 2 if device.type == "cuda" else 4
    return 12 * trained + 4 * copies + width * weights  # fp32 weights and two moments
