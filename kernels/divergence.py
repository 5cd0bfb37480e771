"""The divergences between student p and teacher q: sums over the vocabulary, and their slopes.

    D = Σ_j value_j
    slope_j = p_j·∂D/∂p_j, up to a multiple of p_j that is the same for all j

That is all a divergence has to say. With z the student's logits and p = softmax(z/τ), any function
of p has

    τ·∂D/∂z_j = slope_j − p_j·Σ_i slope_i

so values and gradients of every divergence come out of the same two loops over the vocabulary
(rows_torch.py, rows_triton.py). To add one, write its function here and name it in FUNCTIONS, or
hand the function to Divergence as it is; docs/kernels.md adds one in ten lines.

When p ≈ q, a divergence is a small difference of large numbers. Two habits keep its digits:
- gap = q − p is never a subtraction but p·expm1(x), with x = log q − log p;
- a multiple of `gap`, which sums to 0, is added so that each value_j is of second order in x by
  itself, as the divergence is. An error in log p or log q then all but cancels.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor


class Pair(NamedTuple):
    """Two distributions over the same entries, each [C, V]. A divergence may overwrite x and gap,
    not p and q."""

    p: Tensor  # student
    q: Tensor  # teacher
    x: Tensor  # log q − log p in nats; ±1e30 or so where one of them gives an entry no mass
    gap: Tensor  # q − p, without cancellation


class Divergence(NamedTuple):
    """Which divergence `kl` is. The default is KL(p‖q) over the whole vocabulary.

    kind: "reverse_kl" KL(p‖q); "forward_kl" KL(q‖p); "mixed_kl" β·KL(p‖q) + (1−β)·KL(q‖p);
        "jsd" β·KL(q‖m) + (1−β)·KL(p‖m) with m = β·q + (1−β)·p;
        or a function (Pair, Divergence) → (value, slope) like those below.
    beta: β. As in GKD, TRL and SDPO, "jsd" with β = 0 is KL(q‖p) and with β = 1 KL(p‖q), though its
        limits there are 0.
    clip: bound on each vocabulary entry's summand q_j·(log q_j − log p_j) of "forward_kl" (OPSD); a
        bounded entry has no gradient of its own.
    top_k: over the K entries that are the most likely to `support` (0: over all).
    tail: with top_k, the other entries together count as one more; without, both are renormalised
        over the K.
    """

    kind: Literal["reverse_kl", "forward_kl", "jsd", "mixed_kl"] | Callable = "reverse_kl"
    beta: float = 0.5
    clip: float | None = None
    top_k: int = 0
    support: Literal["student", "teacher"] = "student"
    tail: bool = True

    def check(self) -> None:
        """Raises ValueError when the settings make no divergence."""
        custom = callable(self.kind)
        if not custom and self.kind not in FUNCTIONS:
            raise ValueError(f"divergence {self.kind!r} is unknown; take one of "
                             f"{', '.join(FUNCTIONS)}, or a function")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta must be in [0, 1], not {self.beta}")
        may_clip = custom or self.kind == "forward_kl"
        if self.clip is not None and not (self.clip > 0 and may_clip):
            raise ValueError(f"clip={self.clip} with {self.kind}: clip is a positive bound, and on "
                             "forward_kl only")
        if self.top_k < 0 or self.support not in ("student", "teacher"):
            raise ValueError(f"top_k must be ≥ 0 and support student or teacher, not {self.top_k} "
                             f"and {self.support!r}")

    def terms(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """→ (value, slope), each of the pair's shape."""
        return (FUNCTIONS.get(self.kind) or self.kind)(pair, self)


def reverse_kl(at: Pair, _) -> tuple[Tensor, Tensor]:
    """Σ p·(−x): ∂/∂p_j = −x_j + 1, and the 1 is the same for all j."""
    slope = at.x.mul_(at.p).neg_()
    return at.gap.add_(slope), slope


def forward_kl(at: Pair, d: Divergence) -> tuple[Tensor, Tensor]:
    """Σ q·x: p_j·∂/∂p_j = −q_j, to which p_j is added. A bounded entry's own derivative is 0, so
    p_j alone is left."""
    qx = at.x.mul_(at.q)
    if d.clip is None:
        return qx.sub_(at.gap), at.gap.neg_()
    value = qx.clamp(max=d.clip).sub_(at.gap)
    return value, torch.where(qx > d.clip, at.p, at.gap.neg_())


def mixed_kl(at: Pair, d: Divergence) -> tuple[Tensor, Tensor]:
    px, qx = at.p * at.x, at.x.mul_(at.q)
    value = d.beta * (at.gap - px) + (1 - d.beta) * qx.sub_(at.gap)
    return value, -d.beta * px - (1 - d.beta) * at.gap


def jsd(at: Pair, d: Divergence) -> tuple[Tensor, Tensor]:
    """Σ (1−β)·p·log(p/m) + β·q·log(q/m): p_j·∂/∂p_j = (1−β)·p_j·log(p_j/m_j).

    m/p = 1 + β·expm1(x) and m/q = 1 + (1−β)·expm1(−x): the one whose exponent is negative is taken,
    and the other logarithm is x away.
    """
    if d.beta in (0, 1):
        return reverse_kl(at, d) if d.beta else forward_kl(at, d)
    above = (at.x > 0).to(at.x.dtype)
    weight = above.mul_(1 - 2 * d.beta).add_(d.beta)
    fall = at.x.abs().neg_().expm1_()
    log_ratio = fall.mul_(weight).log1p_()
    rise = torch.clamp(at.x, min=0, out=weight)
    p_part = rise.add_(log_ratio).mul_(at.p).mul_(d.beta - 1)
    q_part = at.x.clamp_(max=0).sub_(log_ratio).mul_(at.q).mul_(d.beta)
    return q_part.add_(p_part), p_part


FUNCTIONS = {"reverse_kl": reverse_kl, "forward_kl": forward_kl, "jsd": jsd, "mixed_kl": mixed_kl}
