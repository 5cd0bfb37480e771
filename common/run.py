"""A run: its processes, its folder, its log, its checkpoints.

    runs/NAME/args.json  metrics.jsonl  rollouts.jsonl  checkpoints/step_000100/
              curves.png  report.html  and what it is made of: example.jsonl  heldout.jsonl

One process and many run the same lines.
"""
from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from torch import Tensor
from tqdm import tqdm

from common import TIMEOUT, checkpoints, memory, require
from common.log import draw_curves, make_tracker, reduce_over_ranks
from common.report import first_example, write_report
from common.settings import changes, check_settings, flat
from common.work import WORK

PATIENCE = 5  # steps in a row without a finite gradient, until the run gives up
EDITION = 2  # of the checkpoints' state
RECORDS = ("example.jsonl", "heldout.jsonl", "rollouts.jsonl", "metrics.jsonl")  # rows of steps


def rendezvous() -> tuple[dist.Store, int, int]:
    """The store through which the ranks find each other, this rank, and the number of ranks.

    torchrun keeps one store for all its attempts, so after a restart a rank could find the last
    attempt's ranks and wait for them (pytorch issue 135712). On one machine the attempt's number
    tells attempts apart. On several machines each torchrun counts for itself, so every attempt
    needs a store of its own.
    """
    env = os.environ
    if "WORLD_SIZE" not in env:  # not started by torchrun
        tasks = launched_tasks()
        require(
            tasks == 1,
            f"{tasks} processes were started without torchrun, so each would be a run of its own "
            "in the same folder; start torchrun, once per machine, e.g. srun --ntasks-per-node=1 "
            "torchrun --nproc_per_node=8 … (docs/scale.md)",
        )
        return dist.HashStore(), 0, 1
    one_machine = env.get("GROUP_WORLD_SIZE", "1") == "1"
    shared = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    restarts = env.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    require(
        one_machine or not (shared and restarts),
        "--max-restarts on several machines: export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 and give "
        "torchrun --rdzv_backend=c10d",
    )
    attempt = ""
    if one_machine:
        attempt = env.get("TORCHELASTIC_RESTART_COUNT", "0")
    store, rank, world = next(dist.rendezvous("env://"))
    return dist.PrefixStore(attempt, store), rank, world


def launched_tasks() -> int:
    """How many processes srun or mpirun started, this one included; 1 if neither did."""
    names = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"]
    if "SLURM_PROCID" in os.environ:  # absent in the shell of an allocation
        names += ["SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"]
    return max(int(os.environ.get(name, 1)) for name in names)


class Run:
    """Process group, device, folder, log and checkpoints of one training run."""

    def __init__(self, args, method: str, updates: int = 1, fixed: tuple[str, ...] = ()):
        """method: the name of what trains, or its __file__; updates: optimizer updates per step;
        fixed: the method's own settings that a resume must not change."""
        check_settings(args)
        self.method = Path(method).stem
        self.args, self.setup, self.updates = args, args.setup, updates
        store, self.rank, self.world = rendezvous()
        gpus = torch.cuda.device_count()
        backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
        dist.init_process_group(
            backend, store=store, rank=self.rank, world_size=self.world, timeout=TIMEOUT
        )
        self.device = torch.device("cpu")
        if gpus:
            local = dist.get_node_local_rank(0)
            require(
                local < gpus,
                f"more processes than GPUs on this machine: give torchrun --nproc_per_node={gpus}",
            )
            self.device = torch.device("cuda", local)
            torch.cuda.set_device(self.device)
            # its backward has NaNs at some lengths (pytorch/pytorch#196678)
            torch.backends.cuda.enable_cudnn_sdp(False)
        transformers.logging.disable_progress_bar()
        self.check_division()
        self.open_folder()
        self.checkpoint, wrong = self.as_first_rank(
            checkpoints.choose, self.folder, self.setup.resume, self.method, flat(args), fixed
        )
        require(not wrong, wrong)
        self.first_step = self.step = 0  # steps done before this process, and by now
        self.times: dict[str, float] = {}  # phase → seconds of this step
        self.current, self.since = "start", time.perf_counter()
        self.used = 0.0  # GiB of the GPU, at most so far
        self.collected: dict[str, list] = {}
        self.history: list[dict] = []
        self.asked = False  # SIGTERM came to this process
        self.stopping = False  # SIGTERM came to some rank, and all ranks know
        self.without_update = 0  # steps in a row whose gradient was not finite
        self.bar: tqdm | None = None
        self.tracker: Callable[[dict], None] | None = None
        self.shown = False  # the first example
        sys.excepthook = partial(last_words, self)

    def check_division(self) -> None:
        parallel, questions = self.setup.tensor_parallel, self.args.batch_size
        require(
            self.world % parallel == 0,
            f"--tensor_parallel {parallel} does not divide {self.world} process(es)",
        )
        minibatches = getattr(self.args, "minibatches", 1)
        require(
            questions % (self.world * minibatches) == 0,
            f"--batch_size {questions} questions do not divide into {self.world} process(es) × "
            f"{minibatches} minibatch(es)",
        )

    def as_first_rank(self, find: Callable, *args):
        """find(*args) on the first rank, for all: machines may see a shared disk differently."""
        found = [None]
        if self.rank == 0:
            found = [find(*args)]
        dist.broadcast_object_list(found)
        return found[0]

    # ------------------------------------------------------------------------------- the folder
    def open_folder(self) -> None:
        setup = self.setup
        task = re.sub(r"\W+", "-", self.args.task.partition(":")[0])
        name = setup.name or f"{self.method}-{task}-s{setup.seed}"
        wrong = self.as_first_rank(unwritable, Path(setup.out))
        require(not wrong, wrong)
        self.folder = Path(setup.out) / self.as_first_rank(self.free_name, name)
        if not setup.dry_run:
            wrong = self.as_first_rank(self.make_folder)
            require(not wrong, wrong)

    def free_name(self, name: str) -> str:
        """With --resume `name`; otherwise the first of name, name-2, name-3 … that is free."""
        if self.setup.resume:
            return name
        free, number = name, 1
        while os.path.lexists(Path(self.setup.out) / free):
            number += 1
            free = f"{name}-{number}"
        return free

    def make_folder(self) -> str:
        """Make the run's folder and clear what a kill left incomplete; → what is wrong, or ""."""
        place = self.folder / "checkpoints"
        try:
            place.mkdir(parents=True, exist_ok=True)
            for stale in place.glob("tmp-*"):
                shutil.rmtree(stale)
        except OSError as error:
            return f"{self.folder} cannot be made ({error}); give another --out or --name"
        return unwritable(place)

    # ------------------------------------------------------------------------------------- steps
    def steps(self, first: int, last: int | None = None) -> Iterator[int]:
        """steps(last): 0 … last − 1; steps(first, last): first … last − 1, under a progress bar.

        Steps that are already done are skipped. Between steps it saves checkpoints; after SIGTERM
        it saves one and ends.
        """
        if last is None:
            first, last = 0, first
        first = max(first, self.first_step)
        if self.stopping or self.setup.eval_only:
            return
        with sigterm_sets(self), self.progress(first, last) as self.bar:
            for step in range(first, last):
                self.seed(step)
                self.step = step
                yield step
                self.step = step + 1
                self.bar.update()
                self.give_up_without_updates()
                self.stopping = self.any_rank(self.asked)
                due = self.step % self.setup.save_every == 0 and self.without_update == 0
                if due or self.stopping or self.step == last:
                    self.save()
                if self.stopping:
                    return

    def progress(self, first: int, last: int) -> tqdm:
        hidden = self.rank > 0 or None  # None: shown only on a terminal
        return tqdm(total=last, initial=first, unit="step", disable=hidden, dynamic_ncols=True)

    def seed(self, step: int) -> None:
        """Seed python, numpy and torch from (seed, step, rank): a resume needs no state."""
        place = f"({self.setup.seed}, {step}, {self.rank})"
        transformers.set_seed(zlib.crc32(place.encode()))

    def any_rank(self, value: bool) -> bool:
        flag = torch.tensor(float(value))
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def give_up_without_updates(self) -> None:
        require(
            self.without_update < PATIENCE,
            f"{PATIENCE} steps in a row without an update, because no gradient was finite; the "
            f"last good checkpoint is {checkpoints.last(self.folder) or 'none'}: lower --lr "
            "(in phase 1 of sdzero.py --srt_lr) and go on with --resume auto",
        )

    # ------------------------------------------------------------------------------------ the log
    def phase(self, name: str) -> None:
        """Log the time from now on under `name`."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            self.peak_gib()
        now = time.perf_counter()
        self.times[self.current] = self.times.get(self.current, 0.0) + now - self.since
        self.current, self.since = name, now
        WORK.phase = name

    def collect(self, metrics: dict[str, Tensor | list]) -> None:
        """Keep values for the next log, which averages over all of them."""
        for name, values in metrics.items():
            self.collected.setdefault(name, []).append(values)

    def log(self, batch=None, teacher_prompts: list | None = None) -> None:
        """Write what was collected, the batch's metrics and the seconds of each phase.

        The first time, print an example; teacher_prompts: the teacher's prompt of each rollout.
        """
        self.phase("other")
        if batch is not None:
            self.collect(batch.metrics())
        row = {"step": self.step, **reduce_over_ranks(self.collected)}
        row |= {f"time/{phase}": seconds for phase, seconds in self.times.items()}
        row["time/step"] = sum(self.times.values())
        row["peak_gib"] = self.peak_gib()
        row |= WORK.report(self.times, self.device)
        self.collected, self.times = {}, {}
        no_update = "skipped_updates" in row and "grad_norm" not in row
        self.without_update = self.without_update + 1 if no_update else 0
        with self.writing(self.folder / "metrics.jsonl"):
            self.append("metrics", [row])
            if batch is not None:
                if not self.shown:
                    first_example(self, batch, teacher_prompts)
                self.shown = True
                self.append("rollouts", [{"step": self.step, **r} for r in batch.examples()])
        if self.rank == 0:
            self.history.append(row)
            self.print_progress(row)
            if self.tracker:
                self.tracker(row)

    def append(self, name: str, rows: list[dict]) -> None:
        if self.rank == 0:
            with open(self.folder / f"{name}.jsonl", "a") as f:
                f.writelines(json.dumps(row) + "\n" for row in rows)

    def peak_gib(self) -> float:
        """The most memory in use so far, on a GPU at the end of a phase.

        torch's own count would go on with the memory of a vLLM engine that sleeps.
        """
        if self.device.type != "cuda":
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        free, total = torch.cuda.mem_get_info()
        self.used = max(self.used, (total - free) / 2**30)
        return self.used

    def print_progress(self, row: dict) -> None:
        scores = [r["heldout/pass@1"] for r in self.history if "heldout/pass@1" in r]
        shown = {"reward": row.get("reward/mean"), "tokens": row.get("length/mean"),
                 "entropy": row.get("entropy")}
        if scores:
            shown["heldout"] = scores[-1]
        text = "  ".join(f"{k} {v:.3g}" for k, v in shown.items() if v is not None)
        if self.bar is not None and not self.bar.disable:
            self.bar.set_postfix_str(text)
        elif self.step % 10 == 0 or "heldout/pass@1" in row:
            print(f"step {self.step}  {text}  {row['time/step']:.2f} s", flush=True)

    def say(self, text: str) -> None:
        if self.rank == 0:
            tqdm.write(text)

    @contextmanager
    def writing(self, what: Path) -> Iterator[None]:
        """End the run on all ranks with one line if something cannot be written. A collective."""
        failed = ""
        try:
            yield
        except (Exception, dcp.CheckpointException) as error:  # libraries differ on a full disk
            if out_of_memory(error):
                raise
            reason = str(error).strip() or repr(error)
            failed = f"{reason.splitlines()[-1]}; {free_bytes(self.folder) / 2**30:.3f} GiB free"
        failed = self.as_first_rank(lambda: failed)
        require(
            not failed,
            f"{what} could not be written ({failed}); the last complete checkpoint is "
            f"{checkpoints.last(self.folder) or 'none'}: make room and go on with --resume auto",
        )

    # -------------------------------------------------------------------------------- checkpoints
    def resume(self, policy, optimizer: torch.optim.Optimizer, rollouts, teacher=None,
               moving: bool = True) -> None:
        """Load --resume's checkpoint, give the sampler its weights, and begin the log.

        teacher: saved and loaded with the policy if training changes it (`moving`).
        """
        self.policy, self.optimizer = policy, optimizer
        self.teacher = teacher if moving else None
        self.tokenizer = rollouts.tokenizer
        self.check_room()
        if self.checkpoint:
            trainer = checkpoints.load(self.checkpoint, policy, optimizer, self.teacher)
            self.first_step = self.step = trainer["step"]
            self.say(f"resumed from {self.checkpoint} after {self.step} steps")
            changed = changes(trainer["args"], flat(self.args))
            if changed:
                self.say(f"changed since that checkpoint: {changed}")
        if self.setup.resume and self.rank == 0:
            self.rewind()
        rollouts.sync(policy)  # on a resume the first rollouts must be the resumed policy's
        policy.lm.generation_config.eos_token_id = rollouts.ends  # for `generate` as well
        if self.rank == 0:
            settings = flat(self.args)
            (self.folder / "args.json").write_text(json.dumps(settings, indent=1))
            if self.setup.track:
                self.tracker = make_tracker(self.setup.track, self.folder, self.step, settings)
        self.say(f"{self.folder}: {self.world} process(es) on {self.device.type}")
        for line in (*rollouts.task.summary, *rollouts.task.notes):
            self.say(line)

    def save(self) -> None:
        self.phase("save")
        folder = self.folder / "checkpoints" / f"step_{self.step:06d}"
        trainer = {
            "edition": EDITION, "step": self.step, "method": self.method, "args": flat(self.args),
        }
        with self.writing(folder):
            checkpoints.save(
                folder, self.policy, self.optimizer, self.teacher, self.tokenizer, trainer,
                self.device,
            )

    def rewind(self) -> None:
        """Drop what was logged after the resumed step, or cut short by a kill."""
        for name in RECORDS:  # the metrics last: they are the history
            path, part = self.folder / name, self.folder / f"tmp-{name}"
            path.touch()
            kept = []
            for row in path.read_text().splitlines(keepends=True):
                if row.endswith("\n") and json.loads(row)["step"] < self.step:
                    kept.append(row)
            part.write_text("".join(kept))
            os.replace(part, path)  # a kill here must not cost the history
            self.history = [json.loads(row) for row in kept]

    def check_room(self) -> None:
        """The first checkpoint must fit the disk: otherwise all steps before it are lost."""
        if self.setup.eval_only:
            return
        size = checkpoints.size_in_bytes(self.policy, self.teacher, self.device)
        free = self.as_first_rank(free_bytes, self.folder)
        told = (
            f"a checkpoint takes about {size / 2**30:.2f} GiB, and {self.folder} has "
            f"{free / 2**30:.2f} GiB free"
        )
        require(free >= size, f"{told}: make room, or give another --out")
        kept = len(list((self.folder / "checkpoints").glob("step_??????")))
        if free < (checkpoints.KEPT + 1 - kept) * size:  # an old one goes when the new is complete
            self.say(f"{told}: it will be full before {checkpoints.KEPT} of them are there")

    # ---------------------------------------------------------------------------------- the end
    def finish(self, rollouts) -> None:
        """Evaluate once more, draw the curves, end engine, verifier and process group."""
        if not self.stopping and not self.setup.dry_run:
            if "heldout/pass@1" not in self.collected:  # sdzero.py evaluates in its own way
                self.collect(rollouts.evaluate())
            self.log()
        if self.rank == 0 and self.history:
            draw_curves(self.history, self.folder / "curves.png", title=self.folder.name)
            write_report(self)
        sys.excepthook = sys.__excepthook__
        how = "done"
        if self.setup.dry_run:
            how = "dry run"
        if self.stopping:
            how = "stopped; --resume auto goes on"
        self.say(f"{how}: {self.folder}")
        dist.barrier()
        rollouts.close()
        if dist.is_initialized():  # a vLLM engine ends it itself
            dist.destroy_process_group()

    def dry_run(self, rollouts, copies: int) -> None:
        """--dry_run: what a step is made of, and how much memory it takes.

        copies: whole models beside the policy (teacher, reference).
        """
        args, task = self.args, rollouts.task
        lm = rollouts.check_model()
        count = sum(p.numel() for p in lm.parameters())
        responses = args.batch_size * getattr(args, "group_size", 1)
        settings = "  ".join(f"--{name} {value!r}" for name, value in flat(args).items())
        self.say(
            f"{settings}\n"
            f"data    {len(task.train):,} problems to train on, {len(task.heldout):,} held out\n"
            f"step    {args.batch_size:,} questions, {responses:,} responses of at most "
            f"{args.max_tokens:,} tokens, {self.updates} update(s); {self.world} process(es)\n"
            f"model   {type(lm).__name__}, {count:,} parameters, context "
            f"{rollouts.context_length:,} tokens\n"
            f"{memory.plan(args, lm, rollouts, self.world, copies)}"
        )
        for line in (*task.summary, *task.notes):
            self.say(line)
        self.finish(rollouts)


def last_words(run: Run, kind: type, error: BaseException, trace) -> None:
    """sys.excepthook: memory that runs out ends a run in one line, anything else as usual."""
    if not out_of_memory(error):
        return sys.__excepthook__(kind, error, trace)
    print(
        f"error: out of memory in step {run.step}, phase {run.current}, on rank {run.rank}, with "
        f"up to {run.peak_gib():.1f} GiB in use: {', then '.join(remedies(run))}; the last "
        "complete checkpoint is "
        f"{checkpoints.last(run.folder) or 'none'}: go on with --resume auto",
        file=sys.stderr,
    )


def out_of_memory(error: BaseException) -> bool:
    """True if memory ran out: for torch, for an engine, or for some rank at a checkpoint."""
    if isinstance(error, dcp.CheckpointException):
        return any(out_of_memory(failure) for failure, _ in error.failures.values())
    return isinstance(error, RuntimeError) and "out of memory" in str(error)


def remedies(run: Run) -> list[str]:
    """What needs less memory in the present phase, the cheapest first."""
    setup, phase, found = run.setup, run.current, []
    if phase in ("score", "update"):
        found.append("lower --token_budget")
    elif setup.sampler == "vllm":
        found.append("lower --vllm_memory")
    if phase in ("collect", "sample", "evaluate"):
        limit = "--srt_max_tokens" if phase == "collect" else "--max_tokens"
        found += ["lower --sampler_rows", f"lower {limit}"]
    if phase == "update" and not setup.checkpointing:
        found.append("add --checkpointing --no-share_prompts")
    if setup.shard == "machine" and os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        found.append("add --shard all")
    if setup.lora_rank == 0:
        found.append("begin anew with --lora_rank 32")
    return found or ["take a smaller --model"]


@contextmanager
def sigterm_sets(run: Run) -> Iterator[None]:
    """In the main thread SIGTERM sets run.asked instead of ending the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(*_) -> None:
        run.asked = True

    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def unwritable(folder: Path) -> str:
    """Why a folder, or the nearest existing one above it, cannot be written to; "" if it can."""
    place = folder.absolute()
    while not os.path.exists(place):
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            return ""
    except OSError as error:
        return f"nothing can be written to {place} ({error.strerror}); give another --out"
