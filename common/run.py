"""A run: its processes, its folder, its log, its checkpoints.

    runs/NAME/args.json  metrics.jsonl  rollouts.jsonl  curves.png  checkpoints/step_000100/

A checkpoint is a Hugging Face folder (`from_pretrained` opens it) with the trainer's state beside the weights. It is
written under a temporary name and renamed when whole, so a kill at any moment leaves the previous one in place.
"""
from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import resource
import shutil
import signal
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
from common.policy import Policy, adapted_layers, save_model
from common.sampler import chat_ids


def parse(args_class: type, presets: Callable, argv: list[str] | None = None):
    """Parse the command line into `args_class`. presets(args) gives defaults that depend on flags (--demo, a variant);
    what is typed wins over them."""
    first = tyro.cli(args_class, args=argv)
    return tyro.cli(args_class, args=argv, default=args_class(**presets(first)))


def within(args, **ranges: tuple[float, float]) -> None:
    """Each named setting must lie in its closed range."""
    for name, (low, high) in ranges.items():
        value = getattr(args, name)
        require(low <= value <= high, f"--{name} {value}: must lie between {low:g} and {high:g}")


RANGES = dict(  # of the settings that the algorithm files share
    batch_size=(1, 1e6), max_tokens=(1, 1e6), heldout=(1, 1e6), temperature=(0.01, 9), top_p=(0.01, 1), lr=(0, 1),
    steps=(1, 1e9), warmup=(0, 1e9), weight_decay=(0, 1), max_norm=(1e-9, 1e9), workers=(1, 1e3), eval_every=(1, 1e9),
    eval_samples=(1, 1e4), save_every=(1, 1e9), keep=(1, 1e9), token_budget=(1, 1e9), sampler_rows=(1, 1e6),
    tensor_parallel=(1, 1024), vllm_memory=(0.01, 1), lora_rank=(0, 4096), lora_alpha=(1e-3, 1e6),
)


def meeting_place() -> tuple[dist.Store, int, int]:
    """The store in which ranks find each other, this rank, and how many there are.

    torchrun keeps one store for all its attempts, so after a restart a rank could find where the last attempt's ranks
    were, and wait for them (pytorch issue 135712). On one machine attempts are told apart by their number. On several,
    each torchrun counts for itself; then every attempt must have a store of its own.
    """
    env = os.environ
    if "WORLD_SIZE" not in env:  # no torchrun
        return dist.HashStore(), 0, 1
    one, shared = env.get("GROUP_WORLD_SIZE", "1") == "1", env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    require(one or not shared or env.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0", "--max-restarts on several "
            "machines: export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 and give torchrun --rdzv_backend=c10d")
    store, rank, world = next(dist.rendezvous("env://"))
    return dist.PrefixStore(env.get("TORCHELASTIC_RESTART_COUNT", "0") if one else "", store), rank, world


PATIENCE = 5  # steps in a row without an update, until the run gives up


class Run:
    """Process group, device, folder, log and checkpoints of one training run; the same for one process and for many."""

    def __init__(self, args, algorithm: str):
        within(args, **{name: bounds for name, bounds in RANGES.items() if hasattr(args, name)})
        self.args = args
        cuda, (store, rank, world) = torch.cuda.is_available(), meeting_place()
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank, world_size=world,
                                timeout=timedelta(hours=2))  # a rank may sample or verify longer than another
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.device = torch.device("cuda", dist.get_node_local_rank(0)) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        transformers.logging.disable_progress_bar()
        task = re.sub(r"\W+", "-", args.task.partition(":")[0])
        self.folder = Path(args.out) / self.claim(args.name or f"{algorithm}-{task}-s{args.seed}")
        if self.rank == 0 and not args.dry_run:
            (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            for stale in (self.folder / "checkpoints").glob("tmp-*"):
                shutil.rmtree(stale)
        dist.barrier()
        self.times: dict[str, float] = {}
        self.timing = False
        self.history: list[dict] = []
        self.asked = self.stopping = False  # SIGTERM came to this process; all ranks know that it came to one of them
        self.barren = 0  # steps in a row without an update, for no gradient was finite
        self.bar: tqdm | None = None
        self.tracker = make_tracker(args, self.folder) if args.track and self.rank == 0 and not args.dry_run else None

    def claim(self, name: str) -> str:
        """The folder's name: `name`, or with --resume off the first of name, name-2, name-3 … that is free."""
        taken = lambda n: not self.args.resume and (Path(self.args.out) / n).exists()
        names = [next(n for n in (name, *(f"{name}-{i}" for i in range(2, 10_000))) if not taken(n))]
        dist.broadcast_object_list(names)  # as the first rank finds it
        return names[0]

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
                trainer = {"step": step, "args": vars(self.args)}
                (part / "trainer.json").write_text(json.dumps(trainer, indent=1))
                files = {str(f.relative_to(part)): checksum(f) for f in sorted(part.rglob("*")) if f.is_file()}
                (part / "manifest.json").write_text(json.dumps(files, indent=1))
                shutil.rmtree(final, ignore_errors=True)
                os.replace(part, final)
                for old in sorted(final.parent.glob("step_*"))[: -self.args.keep]:
                    shutil.rmtree(old)

    def resume(self, policy: Policy, optimizer: torch.optim.Optimizer, **extra: Policy) -> int:
        """Load what --resume names ("auto": this run's last checkpoint, if any). → the number of finished steps."""
        if not self.args.resume:
            return 0
        found = list(self.chosen() if self.rank == 0 else (None, ""))
        dist.broadcast_object_list(found)  # a disk that machines share may not show all of them the same folders
        require(not found[1], found[1])
        if (folder := found[0]) is None:
            return self.rewind(0)
        trainer = json.loads((folder / "trainer.json").read_text())
        rank = trainer["args"].get("lora_rank", 0)
        require(rank == self.args.lora_rank, f"checkpoint {folder} was trained with --lora_rank {rank}: say so too, or "
                "start anew from it as --model")
        state = training_state(policy, optimizer, extra)
        dcp.load(state, checkpoint_id=folder / "state")
        set_state_dict(policy, optimizer, model_state_dict=state["policy"], optim_state_dict=state["optimizer"],
                       options=StateDictOptions(strict=False))  # a frozen base is not in it
        for name, model in extra.items():
            model.load_state_dict(state[name])
        self.say(f"resumed from {folder} after {trainer['step']} steps")
        return self.rewind(trainer["step"])

    def chosen(self) -> tuple[Path | None, str]:
        """The checkpoint that --resume names (None: there is none yet), and what speaks against it."""
        last = self.last()
        folder = last if self.args.resume == "auto" else Path(self.args.resume)
        if folder is None or not (folder / "manifest.json").exists():
            return folder, f"--resume {folder}: no manifest.json, so not a checkpoint" * (folder is not None)
        files = json.loads((folder / "manifest.json").read_text()).items()
        bad = [name for name, old in files if not (folder / name).exists() or checksum(folder / name) != old]
        if bad:
            return folder, f"checkpoint {folder} is damaged: {bad[0]} is missing or changed; remove that folder"
        later = last is not None and last.name > folder.name
        return folder, f"{last} is later than {folder}: move it away, or give another --name" * later

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

    def plan(self, task, tokenizer, verifier, *, steps: int, group: int = 1, updates: int = 1, copies: int = 0,
             reads: int = 1, taught: int = 1) -> None:
        """--dry_run: a step's arithmetic, the memory it takes, and whether model, data and engine are in order.

        updates: of the optimizer a step; copies: of the weights, beside the policy; reads: responses in a sampled
        sequence; taught: responses in a sequence that a teacher reads.
        """
        args, count = self.args, self.args.batch_size * group
        require(args.sampler == "hf" or importlib.util.find_spec("vllm") is not None,
                "--sampler vllm: vLLM is not installed; pip install -r requirements-vllm.txt, or take --sampler hf")
        lm = empty_lm(args.model)
        check_architecture(lm, args.model, sampler=args.sampler, checkpointing=args.checkpointing,
                           share_prompts=getattr(args, "share_prompts", False))
        N, shape = sum(p.numel() for p in lm.parameters()), lm.config.get_text_config()
        prompt = max(len(chat_ids(tokenizer, p.messages, args.thinking)) for p in task.heldout)
        length, limit = prompt + reads * args.max_tokens, context_length(lm)
        most = max(reads, taught)
        require(prompt + most * args.max_tokens <= limit, f"a prompt of {prompt} tokens and {most} × --max_tokens "
                f"{args.max_tokens} can exceed the model's context of {limit}; lower --max_tokens")
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

    def begin(self, *notes: str) -> None:
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


def make_tracker(args, folder: Path) -> Callable[[dict], None]:
    """A function that sends a row of metrics to TensorBoard, W&B or trackio, each imported only when asked for."""
    try:
        if args.track == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(folder / "tensorboard"))
            return lambda row: [writer.add_scalar(k, v, int(row["step"])) for k, v in row.items() if k != "step"]
        module = importlib.import_module(args.track)
    except ImportError:
        raise SystemExit(f"error: --track {args.track}: the package is not installed; pip install "
                         f"{args.track}") from None
    module.init(project="self-distillation", name=folder.name, config=dict(vars(args)))
    return lambda row: module.log({k: v for k, v in row.items() if k != "step"}, step=int(row["step"]))


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
