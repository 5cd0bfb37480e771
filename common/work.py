"""What this process computes: model FLOPs and padding, counted at every forward pass.

Model FLOPs are those that the mathematics needs: 2 per token and weight of the layers, 4 per layer,
head width and pair of a token with one that it sees, 2 per response token and weight of the head; a
backward pass takes twice its forward, or once if the weights are frozen (LoRA). Padding, recomputed
activations, norms, softmax and the optimizer do not count.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from common.microbatches import Micro

REPORTED = ("score", "update")  # phases in which the policy and its teachers read
EXPERTS = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k")  # families' names
PEAKS = {  # in a GPU's name → TFLOP/s of its dense bf16 products, by the data sheet
    "B200": 2250, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312,
    "L40S": 362, "L4": 121, "RTX 4090": 165, "RTX 3090": 71,
}


class Cost(NamedTuple):
    """FLOPs of a model."""

    token: float  # per token that its layers read
    pair: float  # per pair of a token with one that it sees
    entry: float  # per response token, at the head
    backward: float  # a backward pass, in forward passes


class Work:
    """Sums over the REPORTED phases since the last report."""

    def __init__(self):
        self.phase = ""  # the one that is going on
        self.reset()

    def reset(self) -> None:
        self.flops: dict[str, float] = {}  # by phase
        self.tokens = self.padded = 0  # that were read, without and with padding

    def read(self, micro: Micro, cost: Cost) -> None:
        """The layers read a micro-batch."""
        if self.phase in REPORTED:
            self.tokens += micro.tokens
            self.padded += micro.padded
        forward = micro.tokens * cost.token + micro.pairs * cost.pair
        self.add(forward * passes(cost))

    def head(self, micro: Micro, cost: Cost, teachers: int) -> None:
        """The head's products for a loss, and those of the teacher's models."""
        self.add(len(micro.targets) * cost.entry * (passes(cost) + teachers))

    def add(self, flops: float) -> None:
        if self.phase in REPORTED:
            self.flops[self.phase] = self.flops.get(self.phase, 0.0) + flops

    def report(self, seconds: dict[str, float], device: torch.device) -> dict[str, float]:
        """tflops/PHASE, mfu/update and padding/share of this process; the sums begin anew.

        seconds: of each phase.
        """
        row = {}
        for phase, flops in self.flops.items():
            row[f"tflops/{phase}"] = flops / seconds[phase] / 1e12
        most = peak(device)
        if most and "tflops/update" in row:
            row["mfu/update"] = row["tflops/update"] / most
        if self.padded > 0:
            row["padding/share"] = 1 - self.tokens / self.padded
        self.reset()
        return row


WORK = Work()


def passes(cost: Cost) -> float:
    """Forward passes that a pass takes, the backward one included if there will be one."""
    return 1 + cost.backward * torch.is_grad_enabled()


def cost_of(lm: PreTrainedModel) -> Cost:
    """The cost of a model whose weights are all trained.

    Of fused experts, [experts, …], those that a token goes through count; attention counts if the
    configuration gives one width for all layers.
    """
    config = lm.config.get_text_config()
    outside = {id(lm.get_input_embeddings().weight), id(lm.get_output_embeddings().weight)}
    weights = 0.0
    for p in lm.parameters():
        if id(p) in outside or p.ndim < 2:
            continue
        used = 1.0
        if p.ndim == 3:
            used = experts_per_token(config, len(p)) / len(p)
        weights += used * p.numel()
    heads = setting(config, "num_attention_heads", 0)
    width = setting(config, "head_dim", 0) or setting(config, "hidden_size", 0) // max(heads, 1)
    return Cost(
        token=2 * weights,
        pair=4 * setting(config, "num_hidden_layers", 0) * heads * width,
        entry=2 * lm.get_output_embeddings().weight.numel(),
        backward=2.0,
    )


def setting(config: PreTrainedConfig, name: str, default: int) -> int:
    """A number of the configuration by its common name; the default if it is none.

    Not config.name: if the layers differ in it, that is an error, and a metric must end no run.
    """
    value = vars(config).get(config.attribute_map.get(name, name))
    return value if isinstance(value, int) else default


def experts_per_token(config: PreTrainedConfig, experts: int) -> int:
    """How many of a layer's experts a token goes through; all of them if no setting says so."""
    counts = [setting(config, name, 0) for name in EXPERTS]
    return max(counts) or experts


def peak(device: torch.device) -> float | None:
    """The device's TFLOP/s in bf16; None if they are not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for part, tera in PEAKS.items():
        if part in name:
            return tera
    return None
