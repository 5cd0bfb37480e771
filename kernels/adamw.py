"""AdamW whose two moments rest in bf16, or in the CPU's memory, between steps.

A step is computed in fp32 where the weights are, a piece at a time, so that what it needs on top is small. In bf16 the
moments take 4 bytes a weight instead of 8; offloaded they take none of the GPU's, and each step moves 16 bytes a
weight over the bus.

bf16 has 8 significant bits: rounding to the nearest would lose every change of less than 2^-9 of the value. With
β2 = 0.999 the second moment decays by 2^-10 a step, so it would never fall. It is therefore rounded up or down at
random, with the exact value as the mean (and so is the first moment). The random numbers are a function of the step and
the parameter's place: a resumed run draws the same ones without any state of a generator.
"""
from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

PIECE = 2**22  # weights computed at a time


class LeanAdamW(torch.optim.Optimizer):
    """torch.optim.AdamW with moments kept as `keep` says. Weights are fp32, DTensors included."""

    def __init__(self, params: Iterable[Tensor], keep: Literal["bf16", "offload"], lr: float = 1e-3,
                 betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.01):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.keep = keep

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for place, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    home = {"bf16": {"dtype": torch.bfloat16}, "offload": {"device": "cpu", "pin_memory": p.is_cuda}}
                    moments = {name: torch.zeros_like(p, **home[self.keep]) for name in ("exp_avg", "exp_avg_sq")}
                    state.update(step=torch.zeros(()), **moments)
                state["step"] += 1
                step = int(state["step"])
                noise = torch.Generator(p.device).manual_seed(step * 2**20 + place)
                for piece in zip(*map(pieces, (p, p.grad, state["exp_avg"], state["exp_avg_sq"]))):
                    update(*piece, step, noise, **group)

    def load_state_dict(self, state_dict: dict) -> None:
        """Moments stay as they were saved: torch's own method would give them the weights' dtype and device."""
        super().load_state_dict({**state_dict, "state": {}})
        for mine, saved in zip(self.param_groups, state_dict["param_groups"]):
            for p, name in zip(mine["params"], saved["params"]):
                if name in state_dict["state"]:
                    self.state[p] = dict(state_dict["state"][name])


def update(weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: int, noise: torch.Generator, *,
           lr: float, betas: tuple[float, float], eps: float, weight_decay: float, **_) -> None:
    """One step of AdamW on weights [n], in place."""
    m, v = (x.to(weight.device, torch.float32) for x in (exp_avg, exp_avg_sq))
    m = m.lerp(grad, 1 - betas[0])
    v = (betas[1] * v).addcmul_(grad, grad, value=1 - betas[1])
    scale = v.sqrt().div_((1 - betas[1] ** step) ** 0.5).add_(eps)
    weight.mul_(1 - lr * weight_decay).addcdiv_(m, scale, value=-lr / (1 - betas[0] ** step))
    for kept, new in ((exp_avg, m), (exp_avg_sq, v)):
        kept.copy_(new if kept.dtype == torch.float32 else rounded(new, noise))


def rounded(x: Tensor, noise: torch.Generator) -> Tensor:
    """fp32 x in bf16, up or down at random with mean x: bf16 is the upper half of fp32's bits, so a random number below
    2^16 is added to the lower half before it is cut off."""
    up = torch.randint(2**16, x.shape, dtype=torch.int32, device=x.device, generator=noise)
    return ((x.view(torch.int32) + up) & -(2**16)).view(torch.float32).bfloat16()


def pieces(x: Tensor) -> tuple[Tensor, ...]:
    return (x.to_local() if isinstance(x, DTensor) else x).view(-1).split(PIECE)
