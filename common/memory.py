"""What a run takes of a GPU's memory: counted before it starts, not measured.

`plan` adds up what an update and the sampling keep alive. Activations and their gradients are
counted by running the model once, forward and backward, on tensors without data; the rest is
arithmetic. docs/memory.md says what is left out.
"""
from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from common.architecture import enable_checkpointing, key_value_size
from common.policy import Policy, add_adapters
from kernels.head import CHUNK_BYTES, GROUP

GIB = 2**30
ROOM = 0.9  # share of a GPU's memory that is planned with: what is not counted takes the rest


class Load(NamedTuple):
    """What a run asks of each process."""

    tokens: int  # padded tokens of a micro-batch
    longest: int  # tokens of the longest row that is trained
    shards: int  # processes that share the weights
    copies: int  # whole models beside the policy: teacher, reference
    teacher: bool  # whether the loss needs a teacher's logits
    checkpointing: bool
    rows: int = 0  # rollouts that --sampler hf decodes at once; 0: none
    sampled: int = 0  # tokens of the longest prompt and response
    vllm: int = 0  # bytes that vLLM holds while it samples
    tensor_parallel: int = 1  # processes that share vLLM's weights and cache
    device: str = "cuda"
    world: int = 1  # processes, on all machines

    @property
    def width(self) -> int:
        """Bytes of a number that is computed with: bf16 on CUDA, fp32 on a CPU."""
        return {"cuda": 2, "cpu": 4}[self.device]


class Count(NamedTuple):
    """Bytes of one process."""

    weights: int  # its share of weights, gradient and AdamW's moments
    copies: int  # its share of the other models
    sampler: int  # the weights of --sampler hf
    head: int  # more at the end of a forward pass, while the loss is computed
    backward: int  # more in the backward pass
    root: int  # more while the gradient of embeddings and head is shared out
    sampling: int  # more while it samples; the gradient is not there then

    @property
    def update(self) -> int:
        return max(self.head, self.backward, self.root)

    @property
    def peak(self) -> int:
        return self.weights + self.copies + self.sampler + max(self.update, self.sampling)


def plan(args, lm: PreTrainedModel, rollouts, world: int, copies: int) -> str:
    """For --dry_run: what a run with `args` takes of each process, and whether that fits.

    lm: without weights. copies: whole models beside the policy. Without a GPU, and without
    --gpu_memory, it is a run on a CPU that is counted.
    """
    setup, device, gpu = args.setup, "cpu", int(args.setup.gpu_memory * GIB)
    if torch.cuda.is_available() and not gpu:
        gpu = torch.cuda.get_device_properties(0).total_memory
    if gpu:
        device = "cuda"
    if setup.lora_rank > 0:
        add_adapters(Policy(lm), setup.lora_rank, setup.lora_alpha)
    shards = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if setup.shard == "all":
        shards = world
    mine = args.batch_size * getattr(args, "group_size", 1) // world  # rollouts
    rows, vllm = setup.sampler_rows, 0  # an evaluation can fill them if a step does not
    if setup.sampler == "vllm":
        rows, vllm = 0, int(setup.vllm_memory * gpu)
    longest = int(rollouts.longest)
    load = Load(
        tokens=min(max(setup.token_budget, longest), mine * longest), longest=longest,
        shards=shards, copies=copies, teacher=hasattr(args, "kl"),
        checkpointing=setup.checkpointing, rows=rows, sampled=int(rollouts.sampled), vllm=vllm,
        tensor_parallel=setup.tensor_parallel, device=device, world=world,
    )
    return report(lm, load, gpu)


def report(lm: PreTrainedModel, load: Load, gpu: int) -> str:
    """The sum in words, for --dry_run. gpu: bytes of its memory, 0 if there is none to plan for."""
    try:
        c = count(lm, load, activations(lm, load))
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        return f"memory  not counted: {type(lm).__name__} does not run without data ({reason})"
    parameters = sizes(lm).all
    kept = "activations recomputed layer by layer"
    if not load.checkpointing:
        kept = "all activations kept"
    lines = [
        (c.weights, f"weights, gradient, AdamW: {parameters:,} parameters / {load.shards}"),
        (c.copies, f"{load.copies} more model(s)"),
        (c.sampler, "the sampler's weights"),
        (c.update, f"on top in an update: {load.tokens:,} tokens, {kept}"),
        (c.sampling, "on top while sampling, less the gradient"),
        (c.peak, "at most"),
    ]
    table = "\n".join(f"{size / GIB:10.3f}  {words}" for size, words in lines)
    said = f"memory  per process, GiB, counted, not measured (docs/memory.md)\n{table}"
    if not gpu:
        return f"{said}\nfor a GPU: add --gpu_memory and its GiB"
    return f"{said}\n{verdict(lm, load, c, gpu)}"


def verdict(lm: PreTrainedModel, load: Load, c: Count, gpu: int) -> str:
    """Whether it fits, and what to lower if it does not."""
    fits = f"fits {gpu / GIB:.3g} GiB"
    if load.vllm:
        cache = load.vllm - load.width * sizes(lm).all // load.tensor_parallel
        row = load.sampled * token_bytes(lm, load) // load.tensor_parallel
        rows = cache // max(1, row)
        if rows < 1:
            return f"{fits}: no, vLLM has no room for {load.sampled:,} tokens: raise --vllm_memory"
        fits = f"vLLM has room for {rows:,} rows of {load.sampled:,} tokens\n{fits}"
    if c.peak <= ROOM * gpu:
        return f"{fits}: yes"
    if c.sampling > c.update:
        return f"{fits}: no: lower --sampler_rows, or --vllm_memory with --sampler vllm"
    return f"{fits}: no: lower --token_budget, then take --lora_rank 32, then more GPUs"


# --------------------------------------------------------------------------------------------------
# the sum
# --------------------------------------------------------------------------------------------------
def count(lm: PreTrainedModel, load: Load, kept: tuple[int, int]) -> Count:
    """What `lm` takes, whose weights may be on the meta device and which has its adapters already.

    kept: its `activations`.
    """
    w, shards = load.width, load.shards
    head = lm.get_output_embeddings().weight
    units = []
    for module in lm.modules():
        if type(module).__name__ in lm._no_split_modules:
            units.append(sizes(module))
    whole, unit = sizes(lm), max(units)
    root = Sizes(
        whole.all - sum(u.all for u in units), whole.trained - sum(u.trained for u in units)
    )
    frozen = whole.all - whole.trained
    adapters = frozen > 0
    width = w if adapters else 4  # of a frozen weight
    copied = whole.trained if adapters else whole.all  # of a LoRA policy's teacher the adapters
    own = load.teacher and load.copies > 0 and not adapters  # the teacher has embeddings of its own
    gathers = True
    owned = whole.all  # by the sampler
    if load.device == "cpu" and load.world == 1:  # policy.stays_whole
        gathers = False
        owned = adapters * sum(u.all - u.trained for u in units)  # merged; the rest is shared
    # embeddings and head stay whole; so do two layers, the second gathered ahead, from a buffer of
    # its size. A layer's gradient is there in bf16, and in fp32 while the ranks share it out.
    whole_root = gathers * w * root.all * (1 + own)
    layers = gathers * (3 * w * unit.all + (w + 4) * unit.trained)
    hidden = w * load.tokens * head.shape[1]
    seen = hidden * load.teacher * max(1, load.copies)
    after, most = kept
    gradient = 4 * whole.trained // shards
    d_head = w * head.numel() * head.requires_grad
    return Count(
        weights=(12 * whole.trained + width * frozen) // shards + gradient,
        copies=4 * load.copies * copied // shards,
        sampler=w * owned * (load.rows > 0),
        head=whole_root + after + seen + head_bytes(load, *head.shape, head.requires_grad),
        # the hidden states that predict a response, their gradient, and that of all places
        backward=whole_root + most + seen + 3 * hidden + d_head + layers,
        root=whole_root + gathers * (w + 4) * root.trained,
        sampling=load.vllm + decoding_bytes(lm, load, len(head)) - gradient,
    )


class Sizes(NamedTuple):
    all: int
    trained: int


def sizes(module: nn.Module) -> Sizes:
    """Parameters of a module, all and those that are trained."""
    return Sizes(
        sum(p.numel() for p in module.parameters()),
        sum(p.numel() for p in module.parameters() if p.requires_grad),
    )


def head_bytes(load: Load, vocabulary: int, D: int, trained: bool) -> int:
    """What kernels/head.py allocates for hidden states [T, D] and a head [V, D]."""
    T, device = load.tokens, load.device
    logits = min(CHUNK_BYTES[device], 4 * T * vocabulary)
    inputs = load.width * T * D  # the hidden states that predict a response's tokens
    gradients = 4 * (T * D + vocabulary * D * trained)  # in fp32
    group = min(GROUP * logits, 4 * T * vocabulary) // 2 * (device == "cuda")  # dz in bf16
    cast = gradients // 2 * (device == "cuda")  # the gradients once more, in bf16
    return logits * (1 + load.teacher) + inputs + gradients + max(group, cast)


def decoding_bytes(lm: PreTrainedModel, load: Load, vocabulary: int) -> int:
    """What --sampler hf allocates: its cache with spare room, one layer's keys and values repeated
    for all heads, and about ten arrays [rows, V] in fp32."""
    config = lm.config.get_text_config()
    tokens = load.rows * load.sampled
    heads = getattr(config, "num_attention_heads", None) or 1
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    cache = int(1.5 * tokens * token_bytes(lm, load))
    repeated = 2 * load.width * tokens * heads * width
    return cache + repeated + 40 * load.rows * vocabulary


def token_bytes(lm: PreTrainedModel, load: Load) -> int:
    """Keys and values of a token in all layers."""
    return load.width * key_value_size(lm) * lm.config.get_text_config().num_hidden_layers


# --------------------------------------------------------------------------------------------------
# a forward and a backward pass without data
# --------------------------------------------------------------------------------------------------
def activations(lm: PreTrainedModel, load: Load) -> tuple[int, int]:
    """Bytes that the layers' activations hold after a forward pass, and at most until the end of
    the backward pass, with gradients of activations but not of weights.

    Changes `lm`, whose weights are on the meta device, to the dtype that is computed with. Raises
    RuntimeError or NotImplementedError if the model does not run without data.
    """
    dtype = torch.bfloat16 if load.width == 2 else torch.float32
    lm.eval().to(dtype)
    if load.checkpointing:
        enable_checkpointing(lm)
    rows = -(-load.tokens // load.longest)
    ids = torch.zeros(rows, load.tokens // rows, dtype=torch.long, device="meta")
    hooks = []
    for p in lm.parameters():
        if p.requires_grad:
            hooks.append(p.register_post_accumulate_grad_hook(forget))
    ledger = Ledger("meta")
    for x in (*lm.parameters(), *lm.buffers()):
        ledger.sizes[x.untyped_storage()._cdata] = 0  # views of weights are no activations
    with ledger, flash_attention():
        hidden = lm.base_model(input_ids=ids, use_cache=False).last_hidden_state
        after = ledger.live
        hidden.backward(torch.empty_like(hidden))
    for hook in hooks:
        hook.remove()
    return after, ledger.peak


def forget(p: nn.Parameter) -> None:
    p.grad = None


class Ledger(TorchDispatchMode):
    """Adds up the bytes of tensors on a device that are made and still alive."""

    def __init__(self, device: str):
        super().__init__()
        self.device = device
        self.live = self.peak = 0
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Callable, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return torch.ones((), dtype=args[0].dtype).item()  # a mask's "are all of them …?"
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and self.holds(x):
                self.add(x.untyped_storage())
        return out

    def holds(self, x: Tensor) -> bool:
        return x.device.type == self.device

    def add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.sizes:
            weakref.finalize(storage, self.resize, key, 0)
            self.resize(key, storage.nbytes())

    def resize(self, key: int, size: int) -> None:
        size = -(-size // 512) * 512  # CUDA's allocator rounds up
        self.live += size - self.sizes.pop(key, 0)
        if size:
            self.sizes[key] = size
        self.peak = max(self.peak, self.live)


@contextmanager
def flash_attention() -> Iterator[None]:
    """Attention keeps what the CUDA kernels keep: no scores of [L, L]."""
    real = nn.functional.scaled_dot_product_attention
    nn.functional.scaled_dot_product_attention = lambda q, k, v, **_: Attention.apply(q, k, v)
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = real


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # each [B, heads, L, width]
        batch, heads, length, _ = q.shape
        out = q.new_empty(batch, length, heads, v.shape[-1]).transpose(1, 2)
        log_sums = q.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, log_sums)
        return out

    @staticmethod
    def backward(ctx, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])
