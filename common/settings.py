"""Settings: the flags that all methods share, and the command line.

A method's `Args` has its own flags and `setup: Flat[Setup]`. On the command line all are flat
(`--lr`, `--eval_every`); in --help the method's come first and these form a group of their own.
"""
from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from tyro.conf import OmitArgPrefixes as Flat  # noqa: F401

from common import require


@dataclass
class Setup:
    """Data, machine and log: the same for every method."""

    # data
    data_dir: str = ""  # folder of the named data sets; empty: read them from the hub
    against: str = ""  # more evaluation sets, comma-separated: not trained on either
    fields: str = ""  # the data's field names if they differ, e.g. question=prompt,answer=gold
    kind: Literal["", "math", "choice", "tool", "code"] = ""  # of records; empty: ask them
    bad_records: Literal["", "error", "skip"] = ""  # empty: skip those of the hub alone
    gym_reward: Literal["full", "score"] = "full"  # full: 1 or 0; score: the set's partial scores
    instruction: str | None = None  # added to maths and gym questions; None: each has its own
    heldout: int = 256  # problems set aside for evaluation, never trained on
    # machine
    token_budget: int = 16384  # padded tokens per forward pass of training
    share_prompts: bool = False  # read a prompt once for all its responses in a forward pass
    sampler: Literal["hf", "vllm"] = "hf"  # engine: the model's Hugging Face code, or vLLM
    sampler_rows: int = 32  # rollouts decoded at once: more is faster and needs more KV cache
    tensor_parallel: int = 1  # --sampler vllm: ranks that share an engine
    vllm_memory: float = 0.6  # --sampler vllm: share of the GPU's memory for weights and KV cache
    checkpointing: bool = True  # recompute activations: less memory, a third more time
    shard: Literal["machine", "all"] = "machine"  # ranks that the weights are split over
    lora_rank: int = 0  # train adapters of this rank (try 10 times the lr); 0: all weights
    lora_alpha: float = 32.0  # adapters add alpha/rank·B·A to a weight
    allow_unsafe_exec: bool = False  # run a model's programs without bubblewrap, with your rights
    # run and log
    seed: int = 0  # random seed of data order and sampling
    out: str = "runs"  # parent of the run folders
    name: str = ""  # folder under --out; empty: made of method, task and seed
    resume: str = ""  # "auto": this run's last checkpoint, if any; or a checkpoint folder
    eval_every: int = 20  # steps between evaluations on the held-out problems
    eval_samples: int = 1  # responses per held-out problem
    eval_only: bool = False  # evaluate --model and stop
    dry_run: bool = False  # check settings, model, data and engine, print a step's size, and stop
    gpu_memory: float = 0.0  # --dry_run: GiB of the GPU to plan for; 0: of the one that is here
    save_every: int = 100  # steps between checkpoints; the last step is always saved
    track: Literal["", "tensorboard", "wandb", "trackio"] = ""  # also send metrics there


def parse(args_class: type, presets: Callable, argv: list[str] | None = None):
    """Parse the command line. presets(args): defaults that depend on flags; what is typed wins."""
    typed = tyro.cli(args_class, args=argv)
    return tyro.cli(args_class, args=argv, default=args_class(**presets(typed)))


def flat(args) -> dict:
    """All settings by name, as on the command line."""
    settings = {k: v for k, v in vars(args).items() if k != "setup"}
    return settings | vars(args.setup)


# --------------------------------------------------------------------------------------------------
# checks before anything is loaded
# --------------------------------------------------------------------------------------------------
SHARES = (
    "top_p", "vllm_memory", "lam", "eps_w", "grpo_mix", "teacher_rate", "clip_low", "srt_top_p",
    "srt_warmup",
)
SMALL = {  # larger: a mistake
    "lr": 0.1, "srt_lr": 0.1, "temperature": 9.0, "srt_temperature": 9.0, "weight_decay": 1.0,
    "srt_weight_decay": 1.0,
}
POSITIVE = (
    "temperature", "srt_temperature", "top_p", "srt_top_p", "max_norm", "vllm_memory", "lora_alpha",
)


def check_settings(args) -> None:
    """Exit with one line if the settings that all methods share are wrong."""
    for field, value in numbers(args):
        name = field.name
        require(
            0 <= value < math.inf, f"--{name} {value}: must not be negative, and must be finite"
        )
        whole = isinstance(value, int) and isinstance(field.default, int)
        counts = whole and field.default > 0 and name != "warmup"
        require(value > 0 or not (counts or name in POSITIVE), f"--{name} {value}: must be above 0")
        require(value <= 1 or name not in SHARES, f"--{name} {value}: a share, at most 1")
        most = SMALL.get(name, math.inf)
        require(value <= most, f"--{name} {value}: must be at most {most:g}")
    setup = args.setup
    require(
        not (setup.eval_only and setup.resume),
        f"--eval_only evaluates --model: give the checkpoint as --model instead of --resume "
        f"{setup.resume}",
    )
    require(not setup.out.startswith("~"), f"--out {setup.out}: write ~ out, the shell did not")
    plain = Path(setup.name).name == setup.name and setup.name != ".."
    require(plain, f"--name {setup.name}: must be a folder's name, without slashes; see --out")
    require(
        setup.sampler == "vllm" or setup.tensor_parallel == 1,
        f"--tensor_parallel {setup.tensor_parallel}: needs --sampler vllm, to share an engine",
    )
    require(
        not (setup.share_prompts and setup.checkpointing),
        "--share_prompts keeps keys and values, which --checkpointing drops: add "
        "--no-checkpointing",
    )
    require(
        setup.sampler == "hf" or installed("vllm"),
        "--sampler vllm: vLLM is not installed; pip install -r requirements-vllm.txt, or take "
        "--sampler hf",
    )
    require(
        not setup.track or installed(setup.track),
        f"--track {setup.track}: the package is not installed; pip install {setup.track}",
    )


def numbers(args) -> Iterator[tuple[dataclasses.Field, float]]:
    """Every numeric setting with its field."""
    for part in (args, args.setup):
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                yield field, value


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


# --------------------------------------------------------------------------------------------------
# what a resume may change
# --------------------------------------------------------------------------------------------------
# With another value of one of these a run is another run: another model, other data, or other
# random numbers. A resume refuses a change. A method names more of them (Run's `fixed`).
FIXED = (
    "model", "lora_rank", "lora_alpha", "task", "heldout", "against", "fields", "kind",
    "bad_records", "gym_reward", "instruction", "thinking", "seed",
    "weight_decay",  # comes back with the optimizer's state
)
# The machine, the log and the length of a run: a resume takes a change without a word. It prints a
# change of any other setting.
FREE = (
    "name", "out", "resume", "token_budget", "sampler_rows", "tensor_parallel", "vllm_memory",
    "share_prompts", "checkpointing", "shard", "allow_unsafe_exec", "steps", "eval_every",
    "eval_only", "dry_run", "gpu_memory", "save_every", "track", "demo",
)


def same(name: str, a: object, b: object) -> bool:
    """True if two values of a setting mean the same; a model's folder has several spellings."""
    if name == "model":
        return os.path.realpath(str(a)) == os.path.realpath(str(b))
    return a == b


def refused_change(old: dict, new: dict, fixed: tuple[str, ...]) -> str:
    """The first setting of FIXED and `fixed` that differs, as "--name old, not new", or ""."""
    for name in (*FIXED, *fixed):
        unused = name == "lora_alpha" and new["lora_rank"] == 0
        if name in old and name in new and not unused and not same(name, old[name], new[name]):
            return f"--{name} {old[name]!r}, not {new[name]!r}"
    return ""


def changes(old: dict, new: dict) -> str:
    """The settings that differ, except those that FREE names, for the log."""
    found = []
    for name, value in new.items():
        if name not in FREE and name in old and not same(name, old[name], value):
            found.append(f"--{name} {old[name]!r} → {value!r}")
    return "  ".join(found)
