"""A run: its processes, its folder, its log, its checkpoints.

    runs/NAME/args.json  metrics.jsonl  rollouts.jsonl  curves.png  checkpoints/step_000100/

A checkpoint is a Hugging Face folder (`from_pretrained` opens it) with the trainer's state beside the weights. It is
written under a temporary name and renamed when whole, so a kill at any moment leaves the previous one in place.
"""
from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import re
import resource
import secrets
import shutil
import signal
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
import tyro
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from tqdm import tqdm

from common import require
from common.architecture import check_architecture, context_length, empty_lm, key_value_size
from common.chat import chat_ids
from common.policy import Policy, adapted_layers, save_model


def parse(args_class: type, presets: Callable, argv: list[str] | None = None):
    """Parse the command line into `args_class`. presets(args) gives defaults that depend on flags (--demo, a variant);
    what is typed wins over them."""
    first = tyro.cli(args_class, args=argv)
    return tyro.cli(args_class, args=argv, default=args_class(**presets(first)))


def sensible(args) -> None:
    """Numbers are finite and not negative. An integer whose default is positive is not 0, but for a
    warm-up."""
    for field in dataclasses.fields(args):
        name, value, default = field.name, getattr(args, field.name), field.default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        require(0 <= value < math.inf, f"--{name} {value}: must not be negative or infinite")
        counts = type(default) is int and default > 0 and name != "warmup"
        require(value > 0 or not counts, f"--{name} 0: must be at least 1")


def within(args, **ranges: tuple[float, float]) -> None:
    """Each named setting must lie in its closed range."""
    for name, (low, high) in ranges.items():
        value = getattr(args, name)
        require(low <= value <= high, f"--{name} {value}: must lie between {low:g} and {high:g}")


RANGES = dict(  # of shared settings, beside what `sensible` asks of all numbers
    temperature=(0.01, 9), top_p=(0.01, 1), lr=(0, 0.1), weight_decay=(0, 1), max_norm=(1e-9, 1e9),
    vllm_memory=(0.01, 1), lora_rank=(0, 4096), lora_alpha=(1e-3, 1e6),
)


def meeting_place() -> tuple[dist.Store, int, int]:
    """The store in which ranks find each other, this rank, and how many there are.

    torchrun keeps one store for all its attempts, so after a restart a rank could find where the last attempt's ranks
    were, and wait for them (pytorch issue 135712). On one machine attempts are told apart by their number. On several,
    each torchrun counts for itself; then every attempt must have a store of its own.
    """
    env = os.environ
    if "WORLD_SIZE" not in env:  # no torchrun
        tasks = launched_tasks()
        require(tasks == 1, f"{tasks} processes were started without torchrun, so each would be a "
                "run of its own in the same folder; start torchrun, once per machine, e.g. srun "
                "--ntasks-per-node=1 torchrun --nproc_per_node=8 … (docs/scale.md)")
        return dist.HashStore(), 0, 1
    one, shared = env.get("GROUP_WORLD_SIZE", "1") == "1", env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    require(one or not shared or env.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0", "--max-restarts on several "
            "machines: export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 and give torchrun --rdzv_backend=c10d")
    store, rank, world = next(dist.rendezvous("env://"))
    return dist.PrefixStore(env.get("TORCHELASTIC_RESTART_COUNT", "0") if one else "", store), rank, world


def launched_tasks() -> int:
    """How many processes srun or mpirun started, this one included; 1 if neither did."""
    names = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"]
    if "SLURM_PROCID" in os.environ:  # not in an allocation's shell, which knows the tasks too
        names += ["SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"]
    return max(int(os.environ.get(name, 1)) for name in names)


def check_settings(args) -> None:
    """What is wrong with the settings that all methods share, before anything is loaded."""
    sensible(args)
    within(args, **{name: bounds for name, bounds in RANGES.items() if hasattr(args, name)})
    require(not args.out.startswith("~"), f"--out {args.out}: the shell left ~ as it is; write the "
            "path out")
    plain = Path(args.name).name == args.name and args.name != ".."
    require(plain, f"--name {args.name}: must be the name of one folder, without slashes; --out "
            "says where the folder goes")
    shared = args.tensor_parallel > 1
    require(args.sampler == "vllm" or not shared, f"--tensor_parallel {args.tensor_parallel}: "
            "processes share an engine with --sampler vllm alone; add it, or take 1")
    require(args.sampler == "hf" or installed("vllm"), "--sampler vllm: vLLM is not installed; "
            "pip install -r requirements-vllm.txt, or take --sampler hf")
    require(not args.track or installed(args.track), f"--track {args.track}: the package is not "
            f"installed; pip install {args.track}")


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def unwritable(folder: Path) -> str:
    """Why a folder, or the nearest one above it that exists, cannot be written to; "" if it can."""
    place = folder.absolute()
    while not os.path.exists(place):
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            return ""
    except OSError as error:
        return f"nothing can be written to {place} ({error.strerror}); give another --out"


# With another value of one of these a run is another run: of another model, on other data, or with
# other random numbers. A resume refuses a change.
FIXED = ("model", "lora_rank", "lora_alpha", "optimizer_state", "task", "heldout", "against",
         "fields", "instruction", "thinking", "seed")
# The machine, the log and the length of a run: a resume takes a change without a word. It prints a
# change of any other setting.
FREE = ("name", "out", "resume", "token_budget", "sampler_rows", "tensor_parallel", "vllm_memory",
        "share_prompts", "checkpointing", "workers", "allow_unsafe_exec", "steps", "eval_every",
        "eval_only", "dry_run", "save_every", "keep", "track", "demo")


def same(name: str, a: object, b: object) -> bool:
    """Whether two values of a setting mean the same. A model's folder has several spellings."""
    if name == "model":
        a, b = (os.path.realpath(os.path.expanduser(path)) for path in (a, b))
    return a == b


def changes(old: dict, new: dict) -> str:
    """The settings that are not what they were, except those that FREE names."""
    found = []
    for name, value in new.items():
        if name not in FREE and name in old and not same(name, old[name], value):
            found.append(f"--{name} {old[name]!r} → {value!r}")
    return "  ".join(found)


PATIENCE = 5  # steps in a row without an update, until the run gives up


class Run:
    """Process group, device, folder, log and checkpoints of one training run; the same for one process and for many."""

    def __init__(self, args, method: str, *, fixed: tuple[str, ...] = (), saves: bool = True):
        """method: what trains; fixed: the method's own settings that a resume may not change;
        saves: whether there will be checkpoints."""
        check_settings(args)
        self.args, self.method, self.fixed = args, method, (*FIXED, *fixed)
        self.saves = saves and not args.eval_only
        cuda, (store, rank, world) = torch.cuda.is_available(), meeting_place()
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank, world_size=world,
                                timeout=timedelta(hours=2))  # a rank may sample or verify longer than another
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.device = torch.device("cuda", dist.get_node_local_rank(0)) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        transformers.logging.disable_progress_bar()
        require(self.world % args.tensor_parallel == 0, f"--tensor_parallel "
                f"{args.tensor_parallel} does not divide {self.world} process(es)")
        task = re.sub(r"\W+", "-", args.task.partition(":")[0])
        out = Path(args.out)
        wrong = self.first(unwritable, out)
        require(not wrong, wrong)
        self.folder = out / self.first(self.claim, args.name or f"{method}-{task}-s{args.seed}")
        if not args.dry_run:
            wrong = self.first(self.make_folder)
            require(not wrong, wrong)
        self.checkpoint, wrong = self.first(self.chosen)
        require(not wrong, wrong)
        self.longest = 0  # tokens of the longest sequence that check_lengths measured
        self.times: dict[str, float] = {}
        self.timing = False
        self.history: list[dict] = []
        self.asked = self.stopping = False  # SIGTERM came to this process; all ranks know that it came to one of them
        self.barren = 0  # steps in a row without an update, for no gradient was finite
        self.bar: tqdm | None = None
        self.tracker: Callable[[dict], None] | None = None

    def first(self, find: Callable, *args):
        """find(*args) on the first rank, for all: machines may not see a shared disk alike. A
        collective."""
        found = [None]
        if self.rank == 0:
            found = [find(*args)]
        dist.broadcast_object_list(found)
        return found[0]

    def claim(self, name: str) -> str:
        """The folder's name: with --resume `name`, else the first free one of name, name-2 …"""
        if self.args.resume:
            return name
        free, number = name, 1
        while os.path.lexists(Path(self.args.out) / free):
            number += 1
            free = f"{name}-{number}"
        return free

    def make_folder(self) -> str:
        """Make the run's folder and clear what a kill left half written. → what is wrong, or ""."""
        checkpoints = self.folder / "checkpoints"
        try:
            checkpoints.mkdir(parents=True, exist_ok=True)
            for stale in checkpoints.glob("tmp-*"):
                shutil.rmtree(stale)
        except OSError as error:
            return f"{self.folder} cannot be made ({error}); give another --out or --name"
        return unwritable(checkpoints)

    # ------------------------------------------------------------------------------------------------ time and log
    def seed(self, *place: int) -> None:
        """Seed python, numpy and torch from (run seed, place, rank): a resumed run needs no generator state."""
        transformers.set_seed(zlib.crc32(repr((self.args.seed, *place, self.rank)).encode()))

    @contextmanager
    def timer(self, phase: str) -> Iterator[None]:
        """Seconds spent inside count for `phase`; inside another phase they count for that one."""
        inside, self.timing, start = self.timing, True, time.perf_counter()
        try:
            yield
        finally:
            self.timing = inside
        if inside:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.times[phase] = self.times.get(phase, 0.0) + time.perf_counter() - start

    def steps(self, first: int, last: int) -> Iterator[int]:
        """first … last − 1, under a progress bar on a terminal. SIGTERM waits for `due`."""
        require(first <= last, f"{first} steps are done, and the settings ask for {last}: ask for "
                "more, or evaluate the checkpoint as --model with --eval_only")
        main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "asked", True)) if main else None
        hidden = self.rank > 0 or None  # None: shown only on a terminal
        try:
            with tqdm(total=last, initial=first, unit="step", disable=hidden, dynamic_ncols=True) as self.bar:
                for step in range(first, last):
                    self.seed(step)
                    yield step
                    self.bar.update()
        finally:
            if main:
                signal.signal(signal.SIGTERM, before)

    def due(self, done: int, *ends: int) -> bool:
        """Whether a checkpoint is due after `done` steps: every --save_every, at the `ends`, and where SIGTERM came to
        any rank: then all are `stopping`. A collective. Ends a run whose steps make no update any more."""
        require(self.barren < PATIENCE, f"{PATIENCE} steps in a row without an update, for no gradient was finite; the "
                f"last good checkpoint is {self.last() or 'none'}: lower --lr and go on with --resume auto")
        self.stopping = self.reduce({"max": [self.asked]})["max"] > 0
        return self.stopping or done in ends or (done % self.args.save_every == 0 and not self.barren)

    def say(self, text: str) -> None:
        if self.rank == 0:
            tqdm.write(text)

    def reduce(self, metrics: dict) -> dict[str, float]:
        """Numbers stay; tensors and lists become their mean over all ranks (their maximum where the name has `max`)."""
        out = {}
        for name, value in metrics.items():
            if isinstance(value, (int, float)):
                out[name] = float(value)
                continue
            value = torch.as_tensor(value, dtype=torch.float64).flatten().cpu()
            if "max" in name:
                top = value.max() if len(value) else torch.tensor(-torch.inf, dtype=torch.float64)
                dist.all_reduce(top, dist.ReduceOp.MAX)
                out[name] = top.item()
            else:
                pair = torch.stack([value.sum(), torch.tensor(float(len(value)), dtype=torch.float64)])
                dist.all_reduce(pair)
                if pair[1] > 0:
                    out[name] = (pair[0] / pair[1]).item()
        return out

    def log(self, step: int, metrics: dict, rollouts: list[dict] = ()) -> None:
        """Write one line of metrics (reduced over ranks) with the seconds of each phase, and some rollouts."""
        row = {"step": step, **self.reduce(metrics), **{f"time/{k}": v for k, v in self.times.items()}}
        row["time/step"] = sum(self.times.values())
        cuda = self.device.type == "cuda"
        row["peak_gib"] = (torch.cuda.max_memory_allocated() / 2**10 if cuda else
                           resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 2**20
        self.times = {}
        self.barren = self.barren + 1 if row.get("skipped_updates") and "grad_norm" not in row else 0
        with self.writing(self.folder / "metrics.jsonl"):
            lines = {"metrics": [row], "rollouts": [{"step": step, **r} for r in rollouts]}
            for name, rows in lines.items() if self.rank == 0 else ():
                with open(self.folder / f"{name}.jsonl", "a") as f:
                    f.writelines(json.dumps(r) + "\n" for r in rows)
        if self.rank:
            return
        self.history.append(row)
        if self.tracker:
            self.tracker(row)
        heldout = [r["heldout/pass@1"] for r in self.history if "heldout/pass@1" in r]
        shown = {"reward": row.get("reward/mean"), "heldout": heldout[-1] if heldout else None,
                 "tokens": row.get("length/mean"), "entropy": row.get("entropy")}
        text = "  ".join(f"{k} {v:.3g}" for k, v in shown.items() if v is not None)
        if self.bar is not None and not self.bar.disable:
            self.bar.set_postfix_str(text)
        elif step % 10 == 0 or "heldout/pass@1" in row:
            print(f"step {step}  {text}  {row['time/step']:.2f} s", flush=True)

    def show(self, tokenizer, prompt_ids: list[int], response_ids: list[int], note: str = "") -> None:
        """Print one example as the model sees it: the prompt, then in brackets the tokens that the loss is on."""
        self.say(f"{'─' * 30} first example {'─' * 30}\n{tokenizer.decode(prompt_ids)}\n"
                 f"[loss: {len(response_ids)} tokens] ⟦{tokenizer.decode(response_ids)}⟧\n{note}\n{'─' * 75}")

    # ------------------------------------------------------------------------------------------------ checkpoints
    @contextmanager
    def writing(self, what: Path) -> Iterator[None]:
        """What cannot be written ends the run on all ranks, in words. A collective."""
        failed = [""]
        try:
            yield
        except (Exception, dcp.CheckpointException) as error:  # each library has its own for a full disk
            free = shutil.disk_usage(self.folder).free / 2**30
            failed = [f"{(str(error).strip() or repr(error)).splitlines()[-1]}; {free:.3f} GiB are free there"]
        dist.broadcast_object_list(failed)
        require(not failed[0], f"{what} could not be written ({failed[0]}); the last checkpoint that stands is "
                f"{self.last() or 'none'}: make room and go on with --resume auto")

    def last(self) -> Path | None:
        return max((self.folder / "checkpoints").glob("step_*"), default=None)

    def save(self, step: int, policy: Policy, optimizer: torch.optim.Optimizer, tokenizer, **extra: Policy) -> None:
        """Write the checkpoint of `step` finished steps: weights for Hugging Face, and all that a resume needs."""
        final = self.folder / "checkpoints" / f"step_{step:06d}"
        part = final.with_name(f"tmp-{final.name}")
        with self.writing(final):
            dcp.save(training_state(policy, optimizer, extra), checkpoint_id=part / "state")
            save_model(policy, part, self.device)
            if self.rank == 0:
                tokenizer.save_pretrained(part)
                trainer = {"step": step, "method": self.method, "args": vars(self.args)}
                (part / "trainer.json").write_text(json.dumps(trainer, indent=1))
                files = {str(f.relative_to(part)): checksum(f) for f in sorted(part.rglob("*")) if f.is_file()}
                (part / "manifest.json").write_text(json.dumps(files, indent=1))
                shutil.rmtree(final, ignore_errors=True)
                os.replace(part, final)
                for old in sorted(final.parent.glob("step_*"))[: -self.args.keep]:
                    shutil.rmtree(old)

    def resume(self, policy: Policy, optimizer: torch.optim.Optimizer, **extra: Policy) -> int:
        """Load the checkpoint that --resume names and start the tracker. → the finished steps."""
        self.check_room(policy, extra)
        step = 0
        if self.checkpoint:
            trainer = json.loads((self.checkpoint / "trainer.json").read_text())
            state = training_state(policy, optimizer, extra)
            dcp.load(state, checkpoint_id=self.checkpoint / "state")
            set_state_dict(policy, optimizer, model_state_dict=state["policy"],
                           optim_state_dict=state["optimizer"],
                           options=StateDictOptions(strict=False))  # a frozen base is not in it
            for name, model in extra.items():
                model.load_state_dict(state[name])
            step = trainer["step"]
            self.say(f"resumed from {self.checkpoint} after {step} steps")
            changed = changes(trainer["args"], vars(self.args))
            if changed:
                self.say(f"changed since that checkpoint: {changed}")
        if self.args.resume:
            self.rewind(step)
        if self.args.track and self.rank == 0:
            self.tracker = make_tracker(self.args, self.folder, step)
        return step

    def chosen(self) -> tuple[Path | None, str]:
        """The checkpoint that --resume names, or None, and what is wrong with it."""
        last = self.last()
        folder = last if self.args.resume == "auto" else Path(self.args.resume)
        if not self.args.resume or folder is None:
            return None, ""
        manifest = folder / "manifest.json"
        if not manifest.exists():
            return folder, f"--resume {folder}: no manifest.json, so not a checkpoint; name one " \
                           "such as runs/NAME/checkpoints/step_000100, or auto"
        try:
            sums = json.loads(manifest.read_text())
        except ValueError:
            sums = {manifest.name: "not JSON"}
        for name, old in sums.items():
            if not (folder / name).exists() or checksum(folder / name) != old:
                return folder, f"checkpoint {folder} is damaged: {name} is missing or changed; " \
                               "remove that folder"
        if last is not None and last.name > folder.name:
            return folder, f"{last} is later than {folder}: move it away, or give another --name"
        return folder, self.other_run(folder)

    def other_run(self, folder: Path) -> str:
        """Why the checkpoint in `folder` is of another run than this one; "" if it is not."""
        trainer = json.loads((folder / "trainer.json").read_text())
        old, method, step = trainer["args"], trainer.get("method", self.method), trainer["step"]
        anew = f"or begin a new run with its weights: --model {folder} and another --name"
        if method != self.method:
            return f"checkpoint {folder} was trained by {method}, not by {self.method}: go on " \
                   f"with {method}, {anew}"
        for name in self.fixed:
            value, was = getattr(self.args, name, None), old.get(name)
            unused = name == "lora_alpha" and self.args.lora_rank == 0
            if name in old and not unused and not same(name, was, value):
                return f"checkpoint {folder} was trained with --{name} {was!r}, not " \
                       f"{value!r}: give the old value, {anew}"
        if step > getattr(self.args, "steps", step):
            return f"checkpoint {folder} has {step} steps, more than --steps {self.args.steps}: " \
                   "raise --steps"
        return ""

    def check_room(self, policy: Policy, extra: dict[str, Policy]) -> None:
        """The first checkpoint must fit the disk: if it does not, all steps before it are lost."""
        if not self.saves:
            return
        weights = sum(p.numel() for p in policy.parameters())
        trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
        copies = sum(p.numel() for model in extra.values() for p in model.parameters())
        adam = 4 if self.args.optimizer_state == "bf16" else 8  # bytes per trained weight
        width = 2 if self.device.type == "cuda" else 4
        size = (4 + adam) * trained + 4 * copies + width * weights
        free = self.first(free_bytes, self.folder)
        told = f"a checkpoint takes about {size / 2**30:.2f} GiB, and {self.folder} has " \
               f"{free / 2**30:.2f} GiB free"
        require(free >= size, f"{told}: make room, or give another --out")
        more = self.args.keep + 1 - len(list((self.folder / "checkpoints").glob("step_*")))
        if free < more * size:  # an old one goes when the new one is whole
            self.say(f"{told}: it will be full before --keep {self.args.keep} of them are there")

    def rewind(self, step: int) -> int:
        """Drop what was logged after `step` steps, or cut short by a kill: it will come again. → step."""
        for name in ("rollouts.jsonl", "metrics.jsonl") if self.rank == 0 else ():  # the metrics last: the history
            path, part = self.folder / name, self.folder / f"tmp-{name}"
            rows = path.read_text().splitlines(keepends=True) if path.exists() else []
            kept = [row for row in rows if row.endswith("\n") and json.loads(row)["step"] < step]
            part.write_text("".join(kept))
            os.replace(part, path)  # a kill here must not cost the history
            self.history = [json.loads(row) for row in kept]
        return step

    def check_lengths(self, tokenizer, problems: list, chat: Callable | None = None, *,
                      reads: int = 1, more: int = 0, flag: str = "max_tokens",
                      why: str = "") -> None:
        """Each problem's prompt, `more` tokens and `reads` responses must fit the model's context.

        chat(problem): the messages of the prompt, or None; without `chat` the student's. flag: the
        limit of a response; why: the reason that it counts more than once. Each rank measures its
        share of the problems.
        """
        args = self.args
        config = transformers.AutoConfig.from_pretrained(args.model).get_text_config()
        limit = getattr(config, "max_position_embeddings", None) or math.inf
        room = limit - more - reads * getattr(args, flag)  # tokens of a prompt at most
        chats = []
        for problem in {id(p): p for p in problems}.values():  # a mixture repeats some
            messages = problem.messages if chat is None else chat(problem)
            if messages is not None:
                size = sum(len(m["content"].encode(errors="replace")) for m in messages)
                chats.append((size, len(chats), messages, problem))
        chats.sort(reverse=True)
        longest, worst, over = 0, None, 0
        for size, _, messages, problem in chats[self.rank :: self.world]:
            if worst is None:  # what a template adds is about the shortest prompt
                frame = 64 + len(chat_ids(tokenizer, chats[-1][2], args.thinking))
            elif size + frame <= max(room, longest):  # a token has a byte at least
                break
            length = len(chat_ids(tokenizer, messages, args.thinking))
            over += length > room
            if length > longest:
                longest, worst = length, problem
        self.longest = max(self.longest, longest + more + reads * getattr(args, flag))
        if over == 0:
            return
        words = " ".join(worst.messages[-1]["content"].split())[:40]
        most = (limit - more - longest) // reads
        lower = f"lower --{flag} to {most}{why}, or " if most > 0 else ""
        said = f"a prompt of {longest + more} tokens and {reads} × --{flag} {getattr(args, flag)}"
        raise SystemExit(f"error: problem {worst.id} ({words} …): {said} can exceed the model's "
                         f"context of {limit}; {lower}take such problems out of the data ({over} here)")

    def plan(self, task, tokenizer, verifier, *, steps: int, group: int = 1, updates: int = 1, copies: int = 0,
             reads: int = 1) -> None:
        """--dry_run: a step's arithmetic, the memory it takes, and whether model, data and engine are in order.

        updates: of the optimizer a step; copies: of the weights, beside the policy; reads: responses in a sampled
        sequence.
        """
        args, count = self.args, self.args.batch_size * group
        lm = empty_lm(args.model)
        check_architecture(lm, args.model, sampler=args.sampler, checkpointing=args.checkpointing,
                           share_prompts=getattr(args, "share_prompts", False))
        N, shape = sum(p.numel() for p in lm.parameters()), lm.config.get_text_config()
        prompt = max(len(chat_ids(tokenizer, p.messages, args.thinking)) for p in task.heldout)
        length, limit = prompt + reads * args.max_tokens, context_length(lm)
        S, width = int(os.environ.get("LOCAL_WORLD_SIZE", self.world)), 2 if self.device.type == "cuda" else 4
        rows = min(max(args.sampler_rows, group), count // self.world)
        kv = width * key_value_size(lm)  # bytes per token and layer
        sides = [sum(layer.weight.shape) for layer in adapted_layers(lm).values()]
        n = args.lora_rank * sum(sides) if args.lora_rank else N
        adam, base = {"fp32": 8, "bf16": 4, "offload": 0}[args.optimizer_state], width if args.lora_rank else 0
        trained, cache = ((8 + adam + 4 * copies) * n + base * N) / S, rows * length * kv * shape.num_hidden_layers
        self.say("  ".join(f"--{name} {value!r}" for name, value in vars(args).items()) + f"""
data    {len(task.train):,} problems to train on, {len(task.heldout):,} held out
a step  {args.batch_size:,} questions × {group} responses = {count:,} rollouts, {count // self.world:,} a process;
        {count * args.max_tokens:,} tokens at most; {updates} update(s) of {count // updates:,} rollouts
steps   {steps:,}: {steps * updates:,} updates, {steps * args.batch_size / len(task.train):.2f} passes over the problems
model   {type(lm).__name__}, N = {N:,} parameters, context {limit:,} tokens
memory  of each of {self.world} process(es), GiB; the activations of --token_budget tokens come on top
{trained / 2**30:10.3f}  {"N" if n == N else n}/{S} × (weights, grads 8 + AdamW {adam} + {copies} more model(s), 4 each)
            + of a frozen base N/{S} × {base} bytes
{width * N / 2**30:10.3f}  the sampler's copy: N × {width} bytes
{cache / 2**30:10.3f}  its KV cache: {rows} rows × {length} tokens × {shape.num_hidden_layers} layers × {kv} bytes
{(trained + width * N + cache) / 2**30:10.3f}  together""")
        self.finish(verifier)

    def begin(self, *notes: str, context: int) -> None:
        """Say what begins. context: tokens that the sampler has room for (vLLM may have less than
        the model)."""
        require(self.longest <= context, f"a sequence of {self.longest} tokens can exceed the "
                f"model's context of {context} tokens in the sampler; lower --max_tokens, or raise "
                "--vllm_memory")
        if self.rank == 0:
            (self.folder / "args.json").write_text(json.dumps(vars(self.args), indent=1))
        self.say("\n".join([f"{self.folder}: {self.world} process(es) on {self.device.type}", *notes]))

    def finish(self, *closing) -> None:
        """Draw the curves, close what is given, end the process group."""
        if self.rank == 0 and self.history:
            draw_curves(self.history, self.folder / "curves.png", title=self.folder.name)
        how = "dry run" if self.args.dry_run else "stopped; --resume auto goes on" if self.stopping else "done"
        self.say(f"{how}: {self.folder}")
        dist.barrier()
        for thing in closing:
            thing.close()
        if dist.is_initialized():  # a vLLM engine ends it itself
            dist.destroy_process_group()


def training_state(policy: Policy, optimizer: torch.optim.Optimizer, extra: dict[str, Policy]) -> dict:
    """What is not in --model: of a LoRA policy the adapters alone."""
    weights, moments = get_state_dict(policy, optimizer)
    frozen = {name for name, p in policy.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {"policy": {name: w for name, w in weights.items() if name not in frozen}, "optimizer": moments,
            **{name: model.state_dict() for name, model in extra.items()}}


def checksum(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def make_tracker(args, folder: Path, step: int) -> Callable[[dict], None]:
    """A function that sends a row of metrics to TensorBoard, W&B or trackio. A run that goes on
    from `step` goes on in the record that it had, whose identifier stays in the run's folder."""
    if args.track == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step)  # what comes again

        def write(row: dict) -> None:
            for name in row.keys() - {"step"}:
                writer.add_scalar(name, row[name], int(row["step"]))
            writer.flush()  # a resume does not bring back rows before its checkpoint

        return write
    module, file = importlib.import_module(args.track), folder / f"{args.track}.id"
    if not file.exists():
        file.write_text(secrets.token_hex(4))
    key, config = file.read_text(), dict(vars(args))
    if args.track == "wandb":  # its settings may change: --resume itself does
        module.init(project=PROJECT, name=folder.name, id=key, resume="allow", config=config,
                    allow_val_change=True)
    else:  # trackio knows a run by its name
        module.init(project=PROJECT, name=f"{folder.name}-{key}", resume="allow", config=config)

    def send(row: dict) -> None:
        module.log({k: v for k, v in row.items() if k != "step"}, step=int(row["step"]))

    return send


PROJECT = "self-distillation"  # in W&B and trackio


def draw_curves(history: list[dict], path: Path, title: str) -> None:
    """One panel for each metric that a reader looks at first."""
    from matplotlib.figure import Figure  # not pyplot: it would look for a screen

    panels = {"heldout/pass@1": "held-out pass@1", "reward/mean": "training reward", "entropy": "entropy (nats)",
              "length/mean": "response length (tokens)", "grad_norm": "gradient norm", "time/update": "seconds a step"}
    phases = ("sample", "verify", "score", "update", "sync")
    figure = Figure(figsize=(12, 6), layout="constrained")
    for axis, (key, label) in zip(figure.subplots(2, 3).flat, panels.items()):
        rows = [r for r in history if key in r]
        steps = [r["step"] for r in rows]
        if not rows:
            axis.set_axis_off()
        elif key == "time/update":
            axis.stackplot(steps, [[r.get(f"time/{k}", 0.0) for r in rows] for k in phases], labels=phases)
            axis.legend(fontsize=8, loc="upper right")
        else:
            axis.plot(steps, [r[key] for r in rows], marker="o" if len(rows) < 30 else None)
        axis.set(title=label, xlabel="step")
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylim(0, 1)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
