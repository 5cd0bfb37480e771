"""A causal language model as a policy: loaded, sharded (FSDP2), trained and saved.

`policy(micro, loss, inputs, …)` goes from token ids to the loss in one forward, so that FSDP2
gathers the weights of the body and of the head by itself. No [T, V] logits leave it.
"""
from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import DynamicCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from common import TIMEOUT
from common.architecture import (
    enable_checkpointing,
    read_by_first_rank,
    saved_buffers,
    without_weights,
)
from common.microbatches import Ids, Micro, micro_batches
from common.settings import Setup
from common.work import WORK, cost_of
from kernels.divergence import Divergence
from kernels.head import TokenStats, head_loss, token_stats

Seen = tuple[Tensor, Tensor]  # a teacher's hidden states [T, D] and its head [V, D]


class Policy(nn.Module):
    """A language model that returns a loss, or what a teacher saw, but never logits."""

    def __init__(self, lm: PreTrainedModel):
        super().__init__()
        self.lm = lm
        self.cost = cost_of(lm)

    def forward(self, micro: Micro, loss: Callable | None = None, inputs: NamedTuple | None = None,
                seen: Sequence[Seen] = (), *, divergence: Divergence = Divergence(),
                teacher_mix: Sequence[float] = (1.0,), temperature: float = 1.0,
                per_response: bool = False) -> tuple[Tensor, TokenStats] | Seen:
        """Σ_t loss(stats, inputs)_t of a micro-batch, and its TokenStats without gradient.

        inputs: a NamedTuple of [T] tensors or Nones, which reach the loss in fp32.
        seen: what each model of the teacher saw at the same tokens (`read`); its logits are
            Σ teacher_mix·(logits of a model).
        per_response: the loss takes means over whole responses, so it must see all tokens at once;
            otherwise it is called chunk by chunk (kernels/head.py) and treats each token by itself.
        Without a loss: the hidden states [T, D] that predict the response tokens, and the head.
        """
        hidden = self.hidden_states(micro)[micro.index]
        head = self.lm.get_output_embeddings().weight
        if loss is None:
            return hidden, head
        WORK.head(micro, self.cost, len(seen))
        student = (hidden, head, micro.targets)
        teacher = (None, None)
        if seen:
            teacher = ([h for h, _ in seen], [w for _, w in seen])
        settings = {
            "teacher_mix": teacher_mix, "divergence": divergence, "temperature": temperature,
        }
        if not per_response:
            return head_loss(loss, *student, inputs, *teacher, **settings)
        stats = token_stats(*student, *teacher, **settings)
        return loss(stats, inputs).sum(), TokenStats(*(x.detach() for x in stats))

    @torch.no_grad()
    def read(self, micro: Micro) -> Seen:
        """The hidden states and the head as a teacher, without gradient."""
        return self(micro)

    @torch.no_grad()
    def stats(self, micro: Micro, temperature: float) -> TokenStats:
        """TokenStats of the response tokens, without gradient."""
        hidden, head = self(micro)
        WORK.head(micro, self.cost, 0)
        return token_stats(hidden, head, micro.targets, temperature=temperature)

    def hidden_states(self, micro: Micro) -> Tensor:
        """The hidden states of all places, one row after the other."""
        WORK.read(micro, self.cost)
        if micro.prefix is None:
            return self.body(input_ids=micro.ids, use_cache=False)  # [B·L, D]
        # A prompt is read once for all its responses. Gradients reach it through its keys and
        # values. It is padded on the left: sliding windows count places, so its keys must be next
        # to the response's.
        cache = DynamicCache(config=self.lm.config)
        mask = micro.prefix_mask
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        prompts = self.body(
            input_ids=micro.prefix, attention_mask=mask, position_ids=positions,
            past_key_values=cache, use_cache=True,
        )
        cache.batch_select_indices(micro.prefix_of)
        mask = mask[micro.prefix_of]
        places = torch.arange(micro.ids.shape[1], device=mask.device)
        responses = self.body(
            input_ids=micro.ids, past_key_values=cache, use_cache=True,
            attention_mask=torch.cat([mask, torch.ones_like(micro.ids)], 1),
            position_ids=mask.sum(1, keepdim=True) + places,
        )
        return torch.cat([prompts, responses])  # [P·Lp + B·L, D]

    def body(self, **inputs) -> Tensor:
        return self.lm.base_model(**inputs).last_hidden_state.flatten(0, 1)

    def reshard(self) -> None:
        """Free the gathered weights; FSDP overrides this if it shards the policy."""


@torch.no_grad()
def score(model: Policy | Adapters | None, prompts: Ids, responses: Ids, setup: Setup,
          temperature: float = 1.0, field: str = "logp") -> list[Tensor] | None:
    """A field of TokenStats for every response under `model`, [|o|] each; None if it is None."""
    if model is None:
        return None
    device = next(model.parameters()).device
    out: list[Tensor] = [torch.empty(0)] * len(prompts)
    for micro in micro_batches(prompts, responses, None, setup, device):
        values = getattr(model.stats(micro, temperature), field)
        for row, part in zip(micro.rows, values.split(micro.lengths)):
            out[row] = part
    model.reshard()  # a forward without a backward leaves the outermost unit gathered
    return out


# --------------------------------------------------------------------------------------------------
# loading and sharding
# --------------------------------------------------------------------------------------------------
def load_policy(path: str, device: torch.device, setup: Setup) -> Policy:
    """Load the causal LM at `path` in fp32 and shard it over the ranks; CUDA computes in bf16.

    Only the first rank reads the weights. The other ranks start with a model without weights and
    get their shards from it, one layer at a time, so the host holds the model once.
    setup: `checkpointing`, `share_prompts`, `shard`, `lora_rank` and `lora_alpha`. With LoRA the
    base is frozen (in bf16 on CUDA) and fp32 adapters are trained on all linear layers but the
    head; they add alpha/rank·B·A to a weight, and B starts at 0.
    Raises SystemExit if there is no such model, or if training it would be wrong.
    """
    lm = read_by_first_rank(path, setup.checkpointing, setup.share_prompts)
    if setup.checkpointing:
        enable_checkpointing(lm)
    policy = Policy(lm)
    if setup.lora_rank > 0:
        add_adapters(policy, setup.lora_rank, setup.lora_alpha)
        policy.cost = policy.cost._replace(backward=1.0)  # none for frozen weights
        for p in lm.parameters():
            if not p.requires_grad and device.type == "cuda":
                p.data = p.data.bfloat16()  # as it is computed: only trained weights need more
    return shard(policy, device, make_mesh(device, setup.shard), from_first_rank)


def add_adapters(policy: Policy, rank: int, alpha: float) -> None:
    """Freeze the model and put LoRA on all its linear layers but the head.

    Weights that are not a linear layer's, such as those of experts and their router, stay frozen.
    """
    from peft import LoraConfig, inject_adapter_in_model  # slow to import

    head = policy.lm.get_output_embeddings()
    names, transposed = [], False
    for name, module in policy.named_modules():
        if type(module) in (nn.Linear, Conv1D) and module is not head:
            names.append(name)
            transposed |= type(module) is Conv1D
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, fan_in_fan_out=transposed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # every run begins with the same A
        # into the policy, not its lm: in a transformers model peft would wrap fused experts, which
        # FSDP2 cannot shard
        inject_adapter_in_model(config, policy)


def make_mesh(device: torch.device, over: str) -> DeviceMesh:
    """The ranks that share the weights. over: "machine" or "all".

    On several machines each holds the weights once, sharded over its ranks (HSDP): only gradients
    travel between machines. A model that is too large for one machine is sharded over all ranks.
    """
    world = dist.get_world_size()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if over == "all" or local == world:
        return dist.init_device_mesh(device.type, (world,), mesh_dim_names=("rank",))
    ranks = torch.arange(world).view(-1, local)
    groups = []
    for lists in (ranks.T.tolist(), ranks.tolist()):
        groups.append(dist.new_subgroups_by_enumeration(lists, timeout=TIMEOUT)[0])
    return DeviceMesh.from_group(
        groups, device.type, ranks, mesh_dim_names=("machine", "rank")
    )


def shard(policy: Policy, device: torch.device, mesh: DeviceMesh, whole_of: Callable) -> Policy:
    """FSDP2: each decoder layer is a unit; embeddings, norm and head are another.

    whole_of(name, tensor, device): the whole parameter or buffer, on the device. A unit is there
    as a whole on every rank until it is sharded.
    """
    policy.mesh = mesh
    unsharded = stays_whole(mesh, device)
    precision = MixedPrecisionPolicy(cast_forward_inputs=False)  # the loss's inputs stay in fp32
    if device.type == "cuda":
        precision = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    for prefix, unit in reversed(list(policy.named_modules())):  # the policy itself comes last
        is_layer = type(unit).__name__ in policy.lm._no_split_modules
        if unit is not policy and (unsharded or not is_layer):
            continue
        for name, p in unit.named_parameters(prefix):
            if not isinstance(p, DTensor):
                found = nn.Parameter(whole_of(name, p, mesh.device_type), p.requires_grad)
                torch.utils.swap_tensors(p, found)  # tied weights stay tied
        if unsharded:
            continue
        fully_shard(unit, mesh=mesh, mp_policy=precision)
        # losses are normalised over all ranks: add gradients up
        unit.set_force_sum_reduction_for_comms(True)
        unit.set_gradient_divide_factor(1.0)
    for name, buffer in policy.named_buffers():
        found = whole_of(name, buffer, mesh.device_type)
        torch.utils.swap_tensors(buffer, found.detach())  # a collective may still hold `found`
    return policy


def stays_whole(mesh: DeviceMesh, device: torch.device) -> bool:
    """True for a single process on a CPU, which has nothing to shard or to cast. FSDP would copy
    its weights before each forward and backward."""
    return mesh.size() == 1 and device.type == "cpu"


@torch.no_grad()
def from_first_rank(name: str, tensor: Tensor, device: str) -> Tensor:
    """The first rank's tensor, on all ranks. A collective."""
    found = torch.empty_like(tensor, device=device)
    if not tensor.is_meta:
        found.copy_(tensor)
    dist.broadcast(found, 0)
    return found


# --------------------------------------------------------------------------------------------------
# teachers and references
# --------------------------------------------------------------------------------------------------
class Adapters(nn.Module):
    """A teacher or reference for a LoRA policy.

    It owns a second set of adapters and swaps them into the policy for its forward pass, so the
    base weights exist only once. It starts as a copy of the policy's adapters.
    """

    def __init__(self, policy: Policy):
        super().__init__()
        # not as submodules: their weights are not this model's
        object.__setattr__(self, "policy", policy)
        object.__setattr__(self, "lm", policy.lm)
        copies = [p.detach().clone() for p in trained_parameters(policy)]
        self.own = nn.ParameterList(nn.Parameter(p, requires_grad=False) for p in copies)

    def read(self, micro: Micro) -> Seen:
        """As Policy.read. The head is the policy's own, whole again in the student's forward."""
        with self.swapped_in():
            return self.policy.read(micro)

    def stats(self, micro: Micro, temperature: float) -> TokenStats:
        with self.swapped_in():
            return self.policy.stats(micro, temperature)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        self.reshard()
        for mine, theirs in zip(self.own, trained_parameters(self.policy)):
            mine, theirs = local(mine), local(theirs)
            held = mine.clone()
            mine.copy_(theirs)
            theirs.copy_(held)

    def reshard(self) -> None:
        self.policy.reshard()


def frozen_copy(policy: Policy, device: torch.device) -> Policy | Adapters:
    """A copy of the policy as a teacher or reference, made from its shards.

    Call it before the first update: it is then the start of training, on a resume too.
    """
    if any(".lora_" in name for name, _ in policy.named_parameters()):
        return Adapters(policy)
    policy.reshard()
    tensors = dict(policy.named_parameters()) | dict(policy.named_buffers())
    copy = Policy(without_weights(policy.lm.config))
    shard(copy, device, policy.mesh, lambda name, *_: whole(tensors[name]).clone())
    return copy.requires_grad_(False)


@torch.no_grad()
def ema_update(teacher: Policy | Adapters, student: Policy | Adapters, rate: float) -> None:
    """θ' ← (1 − rate)·θ' + rate·θ in fp32, shard by shard; rate 1 is a copy, bit for bit.

    In bf16 an update of rate 0.01 would round away.
    """
    teacher.reshard()
    for mine, theirs in zip(trained_parameters(teacher), trained_parameters(student)):
        local(mine).lerp_(local(theirs), rate)


def trained_parameters(model: Policy | Adapters) -> list[nn.Parameter]:
    """The LoRA adapters if there are any, otherwise all weights."""
    if isinstance(model, Adapters):
        return list(model.own)
    adapters = [p for name, p in model.named_parameters() if ".lora_" in name]
    return adapters or list(model.parameters())


# --------------------------------------------------------------------------------------------------
# updates
# --------------------------------------------------------------------------------------------------
def make_optimizer(policy: Policy, args, betas: tuple[float, float] = (0.9, 0.999),
                   weight_decay: float | None = None) -> torch.optim.AdamW:
    """AdamW on the trained parameters with --lr and --weight_decay."""
    if weight_decay is None:
        weight_decay = args.weight_decay
    return torch.optim.AdamW(
        trained_parameters(policy), lr=args.lr, betas=betas, weight_decay=weight_decay, fused=True
    )


def optimizer_step(policy: Policy, optimizer: torch.optim.Optimizer, lr: float,
                   max_norm: float) -> dict[str, list[float]]:
    """Clip the gradient to `max_norm`, step with learning rate `lr`, clear; → metrics.

    A gradient that is not finite, on any rank, makes no step. Nor does a gradient of 0: if nothing
    had a signal, old moments and weight decay do not change the weights.
    """
    norm = whole(nn.utils.clip_grad_norm_(policy.parameters(), max_norm)).item()
    finite = math.isfinite(norm)
    if finite and norm > 0:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    metrics = {
        "lr": [lr], "skipped_updates": [float(not finite)], "empty_updates": [float(norm == 0)],
    }
    if finite:
        metrics["grad_norm"] = [norm]  # before clipping
    return metrics


def warm_up(step: int, steps: int) -> float:
    """The factor of a linear warm-up over `steps` steps.

    >>> [warm_up(step, 4) for step in (0, 1, 3, 9)], warm_up(0, 0)
    ([0.25, 0.5, 1.0, 1.0], 1.0)
    """
    return min(1.0, (step + 1) / max(1, steps))


# --------------------------------------------------------------------------------------------------
# per-token helpers of the losses
# --------------------------------------------------------------------------------------------------
BOUND = 20.0  # nats; up to here a log ratio is exponentiated as it is


def bounded_exp(x: Tensor) -> Tensor:
    """exp(x), continued beyond BOUND by its tangent there.

    The value still rises and the slope stays at exp(BOUND), so the gradient of one token can
    neither overflow nor vanish.
    """
    inside = x.clamp(max=BOUND).exp()
    return torch.where(x > BOUND, inside * (1 + x - BOUND), inside)


def bounded_expm1(x: Tensor) -> Tensor:
    """bounded_exp(x) − 1, with all digits of a small x."""
    return torch.where(x > BOUND, bounded_exp(x) - 1, x.clamp(max=BOUND).expm1())


def rollout_mean(x: Tensor, rollout: Tensor) -> Tensor:
    """Replace each token's value by the mean over its rollout; x, rollout [T].

    >>> rollout_mean(torch.tensor([1.0, 3.0, 7.0]), torch.tensor([0, 0, 1]))
    tensor([2., 2., 7.])
    """
    lengths = torch.bincount(rollout)
    sums = x.new_zeros(len(lengths)).index_add(0, rollout, x)
    return (sums / lengths)[rollout]


def mismatch(logp: Tensor, sampler_logp: Tensor, tis: float = 0.0) -> dict[str, Tensor]:
    """How far trainer and sampler are apart at the sampled tokens, [T]; 0 when the two agree.

    tis: bound of the truncated importance weights, to log them too.
    """
    gap = logp - sampler_logp  # log π_old/π_sampler, nats
    near = gap.clamp(max=BOUND)
    out = {"mismatch/kl": near.expm1() - near, "mismatch/max_abs_dlogp": gap.abs()}
    if tis > 0:
        out["mismatch/tis"] = near.exp().clamp(max=tis)
    return out


# --------------------------------------------------------------------------------------------------
# whole weights
# --------------------------------------------------------------------------------------------------
def full_weights(model: Policy | Adapters) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face names and whole tensors of all parameters, then of the saved buffers.

    Gathered one at a time, with adapters merged in. A collective: every rank must run through it.
    """
    model.reshard()  # a forward without a backward leaves the outermost unit gathered
    lm = model.lm
    names = [name for name, _ in lm.named_parameters() if ".lora_" in name]
    adapters = dict(zip(names, trained_parameters(model)))
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


def local(x: Tensor) -> Tensor:
    """This rank's shard."""
    return x.to_local() if isinstance(x, DTensor) else x


def save_model(model: Policy, folder: Path, device: torch.device) -> None:
    """Write a Hugging Face checkpoint, in bf16 on CUDA; buffers keep their precision.

    A collective; the first rank writes.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    buffers = saved_buffers(model.lm)
    first = dist.get_rank() == 0
    state = {}
    for name, tensor in full_weights(model):
        if not first:
            continue
        if name not in buffers:
            tensor = tensor.to(dtype)
        state[name] = tensor.cpu()
    if first:
        model.lm.save_pretrained(folder, state_dict=state)
        model.lm.config.dtype = dtype  # save_pretrained writes the dtype of the model in memory
        model.lm.config.save_pretrained(folder)
