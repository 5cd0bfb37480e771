"""What a run takes of a GPU's memory: counted before it starts, not measured.

`count` adds up what an update and the sampling keep alive. Activations and their gradients are counted by running the model
once, forward and backward, on tensors without data; the rest is arithmetic. docs/memory.md says what is left out.
"""
from __future__ import annotations

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
    rows: int = 0  # rollouts that --sampler hf decodes at once; 0: vLLM, which has memory of its own
    sampled: int = 0  # tokens of the longest prompt and response
    width: int = 2  # bytes of a number that is computed with: bf16 on CUDA


class Count(NamedTuple):
    """Bytes of one process."""

    weights: int  # this process's share of weights, gradient and AdamW's moments
    copies: int  # its share of the other models
    sampler: int  # the weights of --sampler hf
    head: int  # more at the end of a forward pass, while the loss is computed
    backward: int  # more in the backward pass
    root: int  # more while the gradient of embeddings and head is shared out
    decoding: int  # more while --sampler hf samples, less the gradient, which is not there yet

    @property
    def update(self) -> int:
        return self.standing + max(self.head, self.backward, self.root)

    @property
    def sampling(self) -> int:
        return self.standing + self.decoding

    @property
    def standing(self) -> int:
        return self.weights + self.copies + self.sampler


def count(lm: PreTrainedModel, load: Load) -> Count:
    """What `lm`, whose weights are on the meta device, takes. With LoRA it has its adapters already.

    Changes `lm` to the dtype that is computed with. Raises RuntimeError or NotImplementedError if
    the model cannot run without data.
    """
    w, shards = load.width, load.shards
    units = [sizes(module) for module in lm.modules() if type(module).__name__ in lm._no_split_modules]
    whole = sizes(lm)
    unit = Sizes(max(u.all for u in units), max(u.trained for u in units))
    root = Sizes(whole.all - sum(u.all for u in units), whole.trained - sum(u.trained for u in units))
    gradient = 4 * whole.trained // shards
    frozen = whole.all - whole.trained
    weights = (12 * whole.trained + (w if whole.trained < whole.all else 4) * frozen) // shards
    copied = whole.trained if frozen else whole.all  # of a LoRA policy the adapters
    after, most = activations(lm, load)
    vocabulary, D = lm.get_output_embeddings().weight.shape
    trained_head = lm.get_output_embeddings().weight.requires_grad
    seen = w * load.tokens * D * load.teacher * max(1, load.copies)
    gathered = w * root.all * (1 + (load.teacher and load.copies > 0 and not frozen))
    # two layers are whole, the second gathered ahead; one's gradient in bf16, the last two in fp32
    layers = 2 * w * unit.all + (w + 4) * unit.trained
    d_head = w * vocabulary * D * trained_head + w * load.tokens * D
    return Count(
        weights=weights + gradient,
        copies=4 * load.copies * copied // shards,
        sampler=w * whole.all * (load.rows > 0),
        head=gathered + after + seen + head_bytes(load, vocabulary, D, trained_head),
        backward=gathered + most + seen + d_head + layers,
        root=gathered + (w + 4) * root.trained,
        decoding=decoding_bytes(lm, load, vocabulary) - gradient,
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
    T = load.tokens
    device = "cuda" if load.width == 2 else "cpu"
    logits = min(CHUNK_BYTES[device], 4 * T * vocabulary)
    inputs = load.width * T * D  # the hidden states that predict a response's tokens
    gradients = 4 * (T * D + vocabulary * D * trained)  # in fp32
    group = min(GROUP * logits, 4 * T * vocabulary) // 2 * (device == "cuda")  # dz in bf16
    cast = gradients // 2 * (device == "cuda")  # the gradients once more, in bf16
    return logits * (1 + load.teacher) + inputs + gradients + max(group, cast)


def decoding_bytes(lm: PreTrainedModel, load: Load, vocabulary: int) -> int:
    """What --sampler hf allocates: its cache with spare room, one layer's keys and values repeated
    for all heads, and several arrays of [rows, V] in fp32."""
    if load.rows == 0:
        return 0
    config = lm.config.get_text_config()
    per_token = load.width * key_value_size(lm)  # of a layer
    repeats = config.num_attention_heads // (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    cache = load.rows * load.sampled * per_token
    return int(1.5 * cache) * config.num_hidden_layers + cache * repeats + 10 * 4 * load.rows * vocabulary


# --------------------------------------------------------------------------------------------------
# a forward and a backward pass without data
# --------------------------------------------------------------------------------------------------
def activations(lm: PreTrainedModel, load: Load) -> tuple[int, int]:
    """Bytes that the layers' activations hold after a forward pass, and at most until the end of
    the backward pass, with gradients of activations but not of weights."""
    dtype = torch.bfloat16 if load.width == 2 else torch.float32
    lm.to(dtype)
    if load.checkpointing:
        enable_checkpointing(lm)
    rows = -(-load.tokens // load.longest)
    ids = torch.zeros(rows, load.tokens // rows, dtype=torch.long, device="meta")
    hooks = []
    for p in lm.parameters():
        if p.requires_grad:
            hooks.append(p.register_post_accumulate_grad_hook(forget))
    with Ledger("meta") as ledger, flash_attention():
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
            if isinstance(x, Tensor) and x.device.type == self.device:
                self.add(x.untyped_storage())
        return out

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
