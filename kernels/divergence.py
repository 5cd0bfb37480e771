"""The divergences between student p and teacher q: sums over the vocabulary, and their slopes.

    D = Σ_j value_j
    slope_j = p_j·∂D/∂p_j, up to a multiple of p_j that is the same for all j

A divergence defines these two and nothing else. With z the student's logits and p = softmax(z/τ),
any function of p has

    τ·∂D/∂z_j = slope_j − p_j·Σ_i slope_i

so the same two loops over the vocabulary compute values and gradients of every divergence
(rows_torch.py, rows_triton.py). To add a divergence, write its function here and name it in
FUNCTIONS, or pass the function to Divergence; docs/kernels.md adds one in ten lines.

When p ≈ q, a divergence is a small difference of large numbers. Two rules keep its digits:
- gap = q − p is computed as p·expm1(x) with x = log q − log p, never as a subtraction;
- a multiple of `gap`, which sums to 0, is added so that each value_j is of second order in x, as
  the divergence is. An error in log p or log q then nearly cancels.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor


class Pair(NamedTuple):
    """Two distributions over the same entries, each [C, V]. A divergence may overwrite x and gap,
    but not p and q."""

    p: Tensor  # student
    q: Tensor  # teacher
    x: Tensor  # log q − log p in nats; about ±1e30 if p or q gives an entry no mass
    gap: Tensor  # q − p, without cancellation


class Divergence(NamedTuple):
    """Which divergence TokenStats.kl is. The default is KL(p‖q) over the whole vocabulary.

    kind: "reverse_kl" KL(p‖q); "forward_kl" KL(q‖p); "mixed_kl" β·KL(p‖q) + (1−β)·KL(q‖p);
        "jsd" β·KL(q‖m) + (1−β)·KL(p‖m) with m = β·q + (1−β)·p;
        or a function (Pair, Divergence) → (value, slope) like those below.
    beta: β. As in GKD, TRL and SDPO, "jsd" with β = 0 is KL(q‖p) and with β = 1 KL(p‖q), though its
        limits there are 0.
    clip: upper bound in nats on each entry's summand q_j·(log q_j − log p_j) of "forward_kl"
        (OPSD, arXiv 2601.18734). The summand of an entry at the bound has no gradient.
    top_k: compare only the K entries that `support` finds most likely (0: all entries).
    support: the model whose K most likely entries count.
    tail: with top_k, all other entries count together as one more entry. If False, p and q are
        renormalised over the K entries.
    """

    kind: Literal["reverse_kl", "forward_kl", "jsd", "mixed_kl"] | Callable = "reverse_kl"
    beta: float = 0.5
    clip: float | None = None
    top_k: int = 0
    support: Literal["student", "teacher"] = "student"
    tail: bool = True

    def check(self) -> None:
        """Raise ValueError if the settings do not define a divergence."""
        custom = callable(self.kind)
        if not custom and self.kind not in FUNCTIONS:
            known = ", ".join(FUNCTIONS)
            raise ValueError(f"divergence {self.kind!r} is unknown; use one of {known}, or a "
                             "function")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta must be in [0, 1], not {self.beta}")
        may_clip = custom or self.kind == "forward_kl"
        if self.clip is not None and not (self.clip > 0 and may_clip):
            raise ValueError(f"clip={self.clip} with {self.kind}: clip must be positive, and works "
                             "with forward_kl only")
        if self.top_k < 0 or self.support not in ("student", "teacher"):
            raise ValueError(f"top_k must be ≥ 0 and support student or teacher, not {self.top_k} "
                             f"and {self.support!r}")

    def terms(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """(value, slope), each [C, V]."""
        function = self.kind
        if not callable(function):
            function = FUNCTIONS[function]
        return function(pair, self)


def reverse_kl(at: Pair, _) -> tuple[Tensor, Tensor]:
    """Σ p·(−x): ∂/∂p_j = −x_j + 1. The 1 is the same for all j and is left out."""
    slope = at.x.mul_(at.p).neg_()
    return at.gap.add_(slope), slope


def forward_kl(at: Pair, d: Divergence) -> tuple[Tensor, Tensor]:
    """Σ q·x: p_j·∂/∂p_j = −q_j, to which p_j is added. The derivative of a bounded summand is 0,
    so its slope is p_j alone."""
    qx = at.x.mul_(at.q)
    if d.clip is None:
        value = qx.sub_(at.gap)
        return value, at.gap.neg_()
    value = qx.clamp(max=d.clip).sub_(at.gap)
    slope = at.gap.neg_()
    bounded = qx > d.clip
    return value, torch.where(bounded, at.p, slope)


def mixed_kl(at: Pair, d: Divergence) -> tuple[Tensor, Tensor]:
    """β·KL(p‖q) + (1−β)·KL(q‖p), from the summands of both."""
    px = at.p * at.x
    qx = at.x.mul_(at.q)
    reverse = at.gap - px
    forward = qx.sub_(at.gap)
    value = d.beta * reverse + (1 - d.beta) * forward
    slope = -d.beta * px - (1 - d.beta) * at.gap
    return value, slope


def jsd(at: Pair, d: Divergence) -> tuple[Tensor, Tensor]:
    """Σ (1−β)·p·log(p/m) + β·q·log(q/m): p_j·∂/∂p_j = (1−β)·p_j·log(p_j/m_j).

    m/p = 1 + β·expm1(x) and m/q = 1 + (1−β)·expm1(−x). Only the one with the negative exponent is
    computed, as log_ratio; the logarithm of the other differs from it by x.
    """
    if d.beta == 0:
        return forward_kl(at, d)
    if d.beta == 1:
        return reverse_kl(at, d)
    teacher_higher = (at.x > 0).to(at.x.dtype)
    weight = teacher_higher.mul_(1 - 2 * d.beta).add_(d.beta)  # 1−β if x > 0, else β
    fall = at.x.abs().neg_().expm1_()
    log_ratio = fall.mul_(weight).log1p_()
    rise = torch.clamp(at.x, min=0, out=weight)
    log_m_over_p = rise.add_(log_ratio)
    log_q_over_m = at.x.clamp_(max=0).sub_(log_ratio)
    p_part = log_m_over_p.mul_(at.p).mul_(d.beta - 1)
    q_part = log_q_over_m.mul_(at.q).mul_(d.beta)
    return q_part.add_(p_part), p_part


FUNCTIONS = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "jsd": jsd,
    "mixed_kl": mixed_kl,
}
