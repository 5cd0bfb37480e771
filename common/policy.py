"""A causal language model as a policy: loaded, sharded, fed in micro-batches, and read token by token.

`Policy` goes from token ids to hidden states to whatever a head function makes of them, in one forward, so that FSDP2
gathers the body's and the head's weights itself. No [T, V] logits leave it. The training forward pads on the right
and needs no attention mask: under causal attention no real token sees the padding, and positions count from 0.
"""
from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, DynamicCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from common import check_hub, require
from common.architecture import (
    check_architecture,
    check_forward,
    enable_checkpointing,
    load_lm,
    mend_generation_config,
    saved_buffers,
)
from kernels.adamw import LeanAdamW
from kernels.head import TokenStats, token_stats
from kernels.pack import behind_prefix, pad_right


class Policy(nn.Module):
    """`policy(micro, head)` is head(hidden, weight): the hidden states [T, D] that predict the response tokens of a
    micro-batch, and the weight [V, D] of the language-model head."""

    def __init__(self, lm: PreTrainedModel):
        super().__init__()
        self.lm = lm

    def forward(self, micro: Micro, head: Callable):
        if micro.prefix is None:
            hidden = self.read(input_ids=micro.ids, use_cache=False)  # [B·L, D]
        else:
            hidden = self.behind_prompts(micro)  # [P·Lp + B·L, D]
        return head(hidden[micro.index], self.lm.get_output_embeddings().weight)

    def read(self, **inputs) -> Tensor:
        """The hidden states of all places, one row after the other."""
        return self.lm.base_model(**inputs).last_hidden_state.flatten(0, 1)

    def behind_prompts(self, micro: Micro) -> Tensor:
        """The hidden states of the different prompts, then those of the responses. A prompt is read
        once for all its responses; gradients reach it through its keys and values. It is padded on
        the left, so that its keys stand next to the response's: sliding windows count places."""
        cache = DynamicCache(config=self.lm.config)
        mask = micro.prefix_mask
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        before = self.read(input_ids=micro.prefix, attention_mask=mask, position_ids=positions,
                           past_key_values=cache, use_cache=True)
        cache.batch_select_indices(micro.prefix_of)
        mask = mask[micro.prefix_of]
        steps = torch.arange(micro.ids.shape[1], device=mask.device)
        after = self.read(input_ids=micro.ids, past_key_values=cache, use_cache=True,
                          attention_mask=torch.cat([mask, torch.ones_like(micro.ids)], 1),
                          position_ids=mask.sum(1, keepdim=True) + steps)
        return torch.cat([before, after])


def load_policy(path: str, device: torch.device, *, checkpointing: bool = False,
                lora_rank: int = 0, lora_alpha: float = 32.0,
                share_prompts: bool = False) -> Policy:
    """Load the causal LM at `path` in fp32 and shard it over all ranks (FSDP2; on CUDA it computes
    in bf16).

    lora_rank: above 0, freeze the model (in bf16 on CUDA) and train fp32 adapters of that rank on
    all linear layers but the head; they add alpha/rank·B·A to a weight, and B starts at 0.
    share_prompts: whether micro-batches will share prompts.
    Raises SystemExit if there is no such model, or if training it would be wrong.
    """
    check_path(path)
    lm = load_lm(path)
    check_architecture(lm, path, checkpointing=checkpointing, share_prompts=share_prompts)
    check_forward(lm, path)
    mend_generation_config(lm, path)
    if checkpointing:
        enable_checkpointing(lm)
    policy = Policy(lm)
    if lora_rank > 0:
        add_adapters(policy, lora_rank, lora_alpha)
        for p in lm.parameters():
            if not p.requires_grad and device.type == "cuda":
                p.data = p.data.bfloat16()  # it is computed in bf16: only trained weights need more
    return shard(policy, device)


def adapted_layers(lm: PreTrainedModel) -> dict[str, nn.Module]:
    """The layers that LoRA adapts: all linear ones but the head."""
    head = lm.get_output_embeddings()
    return {name: module for name, module in lm.named_modules()
            if type(module) in (nn.Linear, Conv1D) and module is not head}


def add_adapters(policy: Policy, rank: int, alpha: float) -> None:
    """Freeze the model and put LoRA on its linear layers. Weights that are not a linear layer's,
    such as those of a mixture's experts and router, stay frozen."""
    from peft import LoraConfig, inject_adapter_in_model  # slow to import

    layers = adapted_layers(policy.lm)
    names = [f"lm.{name}" for name in layers]
    transposed = any(isinstance(layer, Conv1D) for layer in layers.values())
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, fan_in_fan_out=transposed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # every rank draws the same A
        # the policy, not its lm: of a transformers model peft would wrap fused experts, which
        # cannot be sharded so
        inject_adapter_in_model(config, policy)


def check_path(path: str) -> None:
    """A local path that does not exist would be taken for a hub id and fail a long way from here."""
    require(path.strip(), "--model is empty: give a folder or a hub id")
    require(not path.startswith("~"), f"--model {path}: the shell left ~ as it is; write it out")
    folder = Path(path)
    if folder.exists() or path.startswith((".", "/")) or path.count("/") > 1:
        require(folder.exists(), f"--model {path}: no such folder")
        require((folder / "config.json").exists(), f"--model {path}: no config.json, so not a Hugging Face checkpoint")
        return
    try:
        cached = try_to_load_from_cache(path, "config.json")
    except HFValidationError:
        cached = None
    check_hub("--model", path, "model", cached if isinstance(cached, str) else None)
    try:
        AutoConfig.from_pretrained(path)
    except OSError as error:
        raise SystemExit(f"error: --model {path}: no folder, nor on the hub: {str(error).splitlines()[0]}") from None


def shard(policy: Policy, device: torch.device) -> Policy:
    """FSDP2: each decoder layer is a unit, embeddings, norm and head another. fp32 weights; on CUDA bf16 compute.

    On several machines each holds the weights once, sharded over its ranks (HSDP): only gradients travel between them.
    The model stays in host memory until here: `fully_shard` moves a unit to the device as it shards it.
    """
    world = dist.get_world_size()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    places = (world // local, local) if local < world else (world,)
    mixed = dict(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if device.type == "cuda" else {}
    options = dict(mesh=dist.init_device_mesh(device.type, places, mesh_dim_names=("machine", "rank")[-len(places) :]),
                   mp_policy=MixedPrecisionPolicy(**mixed))
    for module in policy.lm.modules():
        if type(module).__name__ in policy.lm._no_split_modules:  # the decoder layers, as transformers names them
            fully_shard(module, **options)
    return fully_shard(policy, **options)


# ---------------------------------------------------------------------------------------------------------------------
# micro-batches: rows of several rollouts, padded on the right, packed to a token budget
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class Micro:
    """Some rollouts of a batch as tensors. T counts their response tokens, one rollout after the other."""

    rows: list[int]  # which rollouts of the batch, in the order of their tokens
    lengths: list[int]  # response tokens of each
    ids: Tensor  # [B, L] prompt and response, padded on the right; the response alone behind a shared prefix
    index: Tensor  # [T] the flattened position whose hidden state predicts each response token
    targets: Tensor  # [T] the response tokens, end token included
    prefix: Tensor | None = None  # [P, Lp] the different prompts, padded on the left, if shared
    prefix_mask: Tensor | None = None  # [P, Lp] 1 where there is a token
    prefix_of: Tensor | None = None  # [B] the prompt of each row

    @property
    def rollout(self) -> Tensor:
        """[T] which rollout of this micro-batch a token belongs to, 0 … R−1."""
        lengths = torch.tensor(self.lengths, dtype=torch.long, device=self.ids.device)
        return torch.arange(len(lengths), device=self.ids.device).repeat_interleave(lengths)

    def behind(self, prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> Micro:
        """The same rollouts, token for token, after other prompts: a student's view of a teacher's micro-batch."""
        return packed(pad_right, prompts, responses, self.rows, self.ids.device)

    def spread(self, values: Sequence[float] | Tensor) -> Tensor:
        """One value a rollout of the batch → one a token [T], in fp32.

        >>> m = Micro([2, 0], [1, 2], *[torch.zeros(3, dtype=torch.long)] * 3)
        >>> m.spread([0.5, 9.0, 7.0])
        tensor([7.0000, 0.5000, 0.5000])
        """
        return torch.tensor([float(values[r]) for r in self.rows], device=self.ids.device)[self.rollout]

    def gather(self, values: Sequence[Sequence[float] | Tensor]) -> Tensor:
        """One sequence a rollout of the batch → their concatenation [T] for the rollouts here, in fp32."""
        parts = [torch.as_tensor(values[r], dtype=torch.float32, device=self.ids.device) for r in self.rows]
        return torch.cat(parts) if parts else torch.empty(0, device=self.ids.device)


def micro_batches(prompts: Sequence[list[int]], responses: Sequence[list[int]], rows: Iterable[int], budget: int,
                  device: torch.device, share_prompts: bool = False) -> list[Micro]:
    """Sort the rollouts `rows` by length and cut them into micro-batches of at most `budget` padded tokens (one row at
    least), in which no row is shorter than three quarters of the longest: so little is computed on padding.

    Every rank gets the same number, so that FSDP's collectives match: a rank with fewer splits some or adds empty ones.
    share_prompts: read each different prompt of a micro-batch once.
    """
    sizes = [len(p) + len(r) for p, r in zip(prompts, responses)]
    bins: list[list[int]] = []
    for i in sorted(rows, key=lambda i: -sizes[i]):
        width = sizes[bins[-1][0]] if bins else 0
        if width * 0.75 <= sizes[i] and bins and (len(bins[-1]) + 1) * width <= budget:
            bins[-1].append(i)
        else:
            bins.append([i])
    count = torch.tensor(len(bins))
    dist.all_reduce(count, dist.ReduceOp.MAX)
    while len(bins) < count:
        full = max(bins, key=len, default=[])
        half = (len(full) + 1) // 2
        bins.append(full[half:])  # empty where nothing is left to split
        del full[half:]
    make = behind_prefix if share_prompts else pad_right
    return [packed(make, prompts, responses, part, device) for part in bins]


def packed(make: Callable, prompts: Sequence, responses: Sequence, rows: list[int], device: torch.device) -> Micro:
    mine = [responses[i] for i in rows]
    return Micro(rows, [len(r) for r in mine], *(x.to(device) for x in make([prompts[i] for i in rows], mine)))


@torch.no_grad()
def score(policy: Policy, prompts: Sequence[list[int]], responses: Sequence[list[int]], budget: int,
          temperature: float = 1.0) -> list[TokenStats]:
    """TokenStats of every response under `policy`, without gradient, in the order given."""
    out: list[TokenStats] = [None] * len(prompts)  # type: ignore[list-item]
    device = next(policy.parameters()).device
    for micro in micro_batches(prompts, responses, range(len(prompts)), budget, device):
        stats = policy(micro, lambda h, w: token_stats(h, w, micro.targets, temperature=temperature))
        for row, *parts in zip(micro.rows, *(x.split(micro.lengths) for x in stats)):
            out[row] = TokenStats(*parts)
    policy.reshard()  # a forward without a backward leaves the outermost unit gathered
    return out


# ---------------------------------------------------------------------------------------------------------------------
# weights
# ---------------------------------------------------------------------------------------------------------------------
class Adapters(nn.Module):
    """A teacher or reference beside a LoRA policy: adapters of its own, which the policy wears while this one reads. So
    the base is there once. Until they are blended they are the policy's of now: with B = 0 at the start, no change."""

    def __init__(self, policy: Policy):
        super().__init__()
        self.__dict__.update(policy=policy, lm=policy.lm)  # not submodules: their weights are not this model's
        self.own = nn.ParameterList(nn.Parameter(p.detach().clone(), requires_grad=False) for p in moved(policy))

    @torch.no_grad()
    def forward(self, micro: Micro, head: Callable):
        self.swap()
        try:
            return self.policy(micro, head)
        finally:
            self.swap()

    def swap(self) -> None:
        self.reshard()
        for mine, theirs in zip(self.own, moved(self.policy)):
            mine, theirs = mine.to_local(), theirs.to_local()
            held = mine.clone()
            mine.copy_(theirs)
            theirs.copy_(held)

    def reshard(self) -> None:
        self.policy.reshard()


def frozen_copy(policy: Policy, path: str, device: torch.device) -> Policy | Adapters:
    """The start of training as a teacher or reference. Called before anything moves `policy`, which was loaded from
    `path` as well."""
    lora = any(".lora_" in name for name, _ in policy.named_parameters())
    return Adapters(policy) if lora else load_policy(path, device).requires_grad_(False)


def moved(model: Policy | Adapters) -> list[nn.Parameter]:
    """What training moves: the adapters where there are some, else all weights."""
    return [p for name, p in model.named_parameters() if ".lora_" in name] or list(model.parameters())


def make_optimizer(policy: Policy, state: str, **settings) -> torch.optim.Optimizer:
    """AdamW with its moments as --optimizer_state says."""
    if state == "fp32":
        return torch.optim.AdamW(moved(policy), fused=True, **settings)
    return LeanAdamW(moved(policy), state, **settings)


@torch.no_grad()
def blend(teacher: Policy | Adapters, student: Policy | Adapters, rate: float) -> None:
    """θ' ← (1 − rate)·θ' + rate·θ, in fp32 and shard by shard. rate 1 is a copy, bit for bit.

    bf16 would round an update of rate 0.01 away; the weights of both are fp32 and only computed with in bf16.
    """
    teacher.reshard()
    for mine, theirs in zip(moved(teacher), moved(student)):
        mine.to_local().lerp_(theirs.to_local(), rate)


def full_weights(model: Policy | Adapters) -> Iterator[tuple[str, Tensor]]:
    """The whole state of the model: Hugging Face names and whole tensors of all parameters,
    gathered one at a time and with adapters merged in, then the buffers that a checkpoint holds. A
    collective: every rank must run through it."""
    model.reshard()  # a forward without a backward leaves the outermost unit gathered
    lm = model.lm
    names = [name for name, _ in lm.named_parameters() if ".lora_" in name]
    adapters = dict(zip(names, moved(model)))
    for name, p in lm.named_parameters():
        if ".lora_" in name:
            continue
        weight = whole(p)
        layer, adapted, _ = name.partition(".base_layer.weight")
        if adapted:
            A = whole(adapters.pop(f"{layer}.lora_A.default.weight"))  # [rank, in]
            B = whole(adapters.pop(f"{layer}.lora_B.default.weight"))  # [out, rank]
            weight = merged(weight, A, B, lm.get_submodule(layer))
        yield name.replace(".base_layer", ""), weight
    if adapters:
        raise ValueError(f"adapters that are not merged: {sorted(adapters)}")
    for name, buffer in saved_buffers(lm).items():
        yield name.replace(".base_layer", ""), whole(buffer)


def merged(weight: Tensor, A: Tensor, B: Tensor, layer: nn.Module) -> Tensor:
    """W + alpha/rank·B·A, in fp32."""
    scale = layer.scaling["default"]
    if isinstance(layer.get_base_layer(), Conv1D):  # keeps its weight as [in, out]
        return weight.float().addmm(A.T, B.T, alpha=scale)
    return weight.float().addmm(B, A, alpha=scale)


def whole(x: Tensor) -> Tensor:
    """The whole tensor of a shard. A collective."""
    if isinstance(x, DTensor):
        x = x.full_tensor()
    return x.detach()


def save_model(model: Policy, folder: Path, device: torch.device) -> None:
    """Write the model as a Hugging Face checkpoint, in bf16 on CUDA; buffers keep their precision.
    A collective; the first rank writes."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    buffers = saved_buffers(model.lm)
    first, state = dist.get_rank() == 0, {}
    for name, tensor in full_weights(model):
        if first:
            state[name] = tensor.to("cpu", tensor.dtype if name in buffers else dtype)
    if first:
        model.lm.save_pretrained(folder, state_dict=state)
        model.lm.config.dtype = dtype  # save_pretrained has written that of the model in memory
        model.lm.config.save_pretrained(folder)


def optimizer_step(policy: Policy, optimizer: torch.optim.Optimizer, lr: float, max_norm: float, metrics: dict) -> None:
    """Clip the gradient to `max_norm`, step with learning rate `lr`, clear. A gradient that is not
    finite, on any rank, makes no step. Neither does a gradient of 0: if nothing had a signal, old
    moments and weight decay do not move the weights. Into metrics go grad_norm, before clipping,
    and the skipped_updates and empty_updates of this training step so far."""
    norm = nn.utils.clip_grad_norm_(policy.parameters(), max_norm)
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    finite = math.isfinite(norm)
    if finite:
        metrics["grad_norm"] = norm
    if finite and norm > 0:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    metrics["skipped_updates"] = metrics.get("skipped_updates", 0) + (not finite)
    metrics["empty_updates"] = metrics.get("empty_updates", 0) + (norm == 0)
    optimizer.zero_grad(set_to_none=True)
