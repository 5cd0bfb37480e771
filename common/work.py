"""What this process computes: model FLOPs and padding, counted at every forward pass.

Model FLOPs are those that the mathematics needs: 2 per token and weight of the layers, 4 per layer,
head width and pair of a token with one that it sees, 2 per response token and weight of the head; a
backward pass takes twice its forward, or once if the weights are frozen (LoRA). Padding, recomputed
activations, norms, softmax and the optimizer do not count.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from common.microbatches import Micro

REPORTED = ("score", "update")  # phases in which the policy and its teachers read
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
    """Sums of the phase that is going on, and of REPORTED phases since the last report."""

    def __init__(self):
        self.flops: dict[str, float] = {}  # by phase
        self.read_tokens = self.read_padded = 0  # without and with padding
        self.begin()

    def begin(self) -> None:
        """A phase begins."""
        self.since = 0.0  # FLOPs
        self.tokens = self.padded = 0

    def read(self, micro: Micro, cost: Cost) -> None:
        """The layers read a micro-batch."""
        self.tokens += micro.tokens
        self.padded += micro.padded
        forward = micro.tokens * cost.token + micro.pairs * cost.pair
        self.since += forward * passes(cost)

    def head(self, micro: Micro, cost: Cost, teachers: int) -> None:
        """The head's products for a loss, and those of the teacher's models."""
        self.since += len(micro.targets) * cost.entry * (passes(cost) + teachers)

    def end(self, phase: str) -> None:
        """What was computed since the last call belongs to this phase."""
        if phase in REPORTED:
            self.flops[phase] = self.flops.get(phase, 0.0) + self.since
            self.read_tokens += self.tokens
            self.read_padded += self.padded
        self.begin()

    def report(self, seconds: dict[str, float], device: torch.device) -> dict[str, float]:
        """tflops/PHASE, mfu/update and padding/share of this process; the sums begin anew.

        seconds: of each phase.
        """
        row = {}
        for phase, flops in self.flops.items():
            if flops > 0:
                row[f"tflops/{phase}"] = flops / seconds[phase] / 1e12
        most = peak(device)
        if most and "tflops/update" in row:
            row["mfu/update"] = row["tflops/update"] / most
        if self.read_padded > 0:
            row["padding/share"] = 1 - self.read_tokens / self.read_padded
        self.__init__()
        return row


WORK = Work()


def passes(cost: Cost) -> float:
    """Forward passes that a pass takes, the backward one included if there will be one."""
    return 1 + cost.backward * torch.is_grad_enabled()


def cost_of(lm: PreTrainedModel) -> Cost:
    """The cost of a model whose weights are all trained. Of fused experts, [experts, …], those that
    a token goes through count."""
    config = lm.config.get_text_config()
    outside = {id(lm.get_input_embeddings().weight), id(lm.get_output_embeddings().weight)}
    weights = 0.0
    for p in lm.parameters():
        if id(p) in outside or p.ndim < 2:
            continue
        used = 1.0
        if p.ndim == 3:
            used = getattr(config, "num_experts_per_tok", len(p)) / len(p)
        weights += used * p.numel()
    heads = getattr(config, "num_attention_heads", 0)  # 0: it does not attend
    # not an attribute: if layers differ, asking for it is an error
    width = vars(config).get("head_dim") or config.hidden_size // max(heads, 1)
    return Cost(
        token=2 * weights,
        pair=4 * config.num_hidden_layers * heads * width,
        entry=2 * lm.get_output_embeddings().weight.numel(),
        backward=2.0,
    )


def peak(device: torch.device) -> float | None:
    """The device's TFLOP/s in bf16; None if they are not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for part, tera in PEAKS.items():
        if part in name:
            return tera
    return None
