"""Rows of logits → per-token statistics and their gradient, in plain PyTorch: the reference, and what runs on a CPU.

Notation: z, zt [C, V] raw logits of C tokens under student and teacher, y [C] the tokens, s = 1/temperature,
p = softmax(s·z), q = softmax(s·zt). Differences of logits are scaled, never the operands (docs/kernels.md).
A few rows are worked on at a time, while they are in the caches, and what the gradient needs takes the logits' place.
"""
from __future__ import annotations

import functools
import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.divergence import Divergence, Pair

FLOOR = -1e30  # stands for −inf, a column without mass: its exp() is 0, and the difference of two such logits is finite
TILE_BYTES = {"cpu": 2 * 2**20, "cuda": 64 * 2**20}  # of the [rows, V] logits that a thread works on at a time


class Rows(NamedTuple):
    """What a row leaves behind, each [C]; NaN where there is no teacher or no divergence."""

    logp: Tensor  # log p_y
    entropy: Tensor  # −Σ_j p_j·log p_j
    teacher_logp: Tensor  # log q_y
    teacher_entropy: Tensor
    teacher_greedy: Tensor  # 1 where nothing is more likely than y to the teacher, else 0
    kl: Tensor  # Σ_j value_j
    slope: Tensor  # Σ_j slope_j
    state: Tensor | None = None  # what else this backend's gradient needs of a row


class Upstream(NamedTuple):
    """∂L/∂(what a row was reduced to), each [C]; None counts as 0."""

    logp: Tensor
    entropy: Tensor | None
    kl: Tensor | None
    drag: Tensor  # what p_j is multiplied with and taken from dz_j: Σ_j slope_j times ∂L/∂kl, or a tail's part of it


def statistics(z: Tensor, zt: Tensor | None, y: Tensor, s: float, divergence: Divergence | None) -> Rows:
    """Statistics of every row. Overwrites z with p and, where there is a divergence, zt with slope_j."""

    def work(tiles: list[slice]) -> list[tuple[Tensor, ...]]:
        room = z.new_empty(3, tiles[0].stop - tiles[0].start, z.shape[1])  # made once: fresh memory is slow to touch
        return [tile(z[r], None if zt is None else zt[r], y[r], s, divergence, *room[:, : len(z[r])]) for r in tiles]

    return Rows(*(torch.cat(field) for field in zip(*spread(work, z))))


def tile(z: Tensor, zt: Tensor | None, y: Tensor, s: float, divergence: Divergence | None, x: Tensor, e: Tensor,
         w: Tensor) -> tuple[Tensor, ...]:
    """`statistics` of a few rows. x, e, w: room of z's shape."""
    z.clamp_(min=FLOOR)
    nan = z.new_full(y.shape, torch.nan)
    if zt is None:
        _, _, logp, entropy, _ = softmax_(z, y, s, e)
        return logp, entropy, nan, nan, nan, nan, nan
    torch.sub(zt.clamp_(min=FLOOR), z, out=x)
    top, log_sum, logp, entropy, _ = softmax_(z, y, s, e)
    teacher_top, teacher_log_sum, *teacher = softmax_(zt, y, s, e)
    if divergence is None:
        return logp, entropy, *teacher, nan, nan
    p, q = z, zt
    scale_(x, s).sub_((teacher_top - top).mul_(s).add_(teacher_log_sum - log_sum))  # log q − log p
    # q − p = p·expm1(x) up to x = 1; beyond, where that might overflow, q − e·p loses nothing and is added to p·(e − 1)
    gap = torch.clamp(x, max=1, out=e).expm1_().mul_(p)
    gap.add_(torch.sub(q, p, alpha=math.e, out=w).clamp_(min=0))
    value, slope = divergence.terms(Pair(p, q, x, gap))
    zt.copy_(slope)
    return logp, entropy, *teacher, value.sum(-1), zt.sum(-1)


def softmax_(z: Tensor, y: Tensor, s: float, e: Tensor) -> tuple[Tensor, ...]:
    """z becomes softmax(s·z). → max z and log Σ_j exp(s·(z_j − max z)), [C, 1]; log p_y, H(p), is y the mode, [C]."""
    top = z.amax(-1, keepdim=True)
    x = scale_(z.sub_(top), s)
    at_y = x.gather(-1, y[:, None])[:, 0]
    total = torch.exp(x, out=e).sum(-1, keepdim=True)
    log_sum = total.log()
    entropy = log_sum[:, 0] - x.mul_(e).sum(-1) / total[:, 0]
    torch.div(e, total, out=z)
    return top, log_sum, at_y - log_sum[:, 0], entropy, (at_y == 0).to(z.dtype)


def scale_(x: Tensor, s: float) -> Tensor:
    return x if s == 1 else x.mul_(s)


def gradient(z: Tensor, zt: Tensor | None, y: Tensor, s: float, divergence: Divergence | None, row: Rows, d: Upstream,
             out: Tensor) -> None:
    """∂L/∂z_j = s·(d.logp·(1[j=y] − p_j) − d.entropy·p_j·(log p_j + H) + d.kl·slope_j − d.drag·p_j), into out [C, V].

    z and zt are as `statistics` left them; out may be z. A row whose d is all 0 gets exact zeros, even if z has NaNs.
    """
    idle = (d.logp == 0) & (d.drag == 0)
    on_p = d.logp + d.drag
    if d.entropy is not None:
        idle &= d.entropy == 0
        on_p = on_p + d.entropy * row.entropy
    if d.kl is not None:
        idle &= d.kl == 0

    def work(tiles: list[slice]) -> list:
        for r in tiles:
            p_log_p = None if d.entropy is None else torch.xlogy(z[r], z[r])
            dz = z[r].mul_((-s * on_p)[r, None])
            if d.entropy is not None:
                dz.addcmul_(p_log_p, d.entropy[r, None], value=-s)
            if d.kl is not None:
                dz.addcmul_(zt[r], d.kl[r, None], value=s)
            dz.scatter_add_(-1, y[r, None], s * d.logp[r, None])
            if out is not z:
                out[r] = dz
        return []

    spread(work, z)
    if idle.any():
        out[idle] = 0


def log_sum(z: Tensor, s: float, origin: Tensor) -> Tensor:
    """(1/s)·log Σ_j exp(s·z_j) − origin, [C]: the logit that all entries have together."""
    top = z.amax(-1)
    parts = spread(lambda tiles: [(z[r] - top[r, None]).mul_(s).exp_().sum(-1) for r in tiles], z)
    return (top - origin) + torch.cat(parts).log() / s


# ---------------------------------------------------------------------------------------------------------------------
# a few rows at a time, on every core
# ---------------------------------------------------------------------------------------------------------------------
def spread(work: Callable[[list[slice]], list], z: Tensor) -> list:
    """work(slices of z's rows), TILE_BYTES each, in the `workers`; → its results, in the rows' order."""
    size = max(1, TILE_BYTES.get(z.device.type, 2**20) // (z.shape[1] * z.element_size()))
    tiles = [slice(i, i + size) for i in range(0, z.shape[0], size)]
    threads = torch.get_num_threads()
    if z.device.type != "cpu" or min(threads, len(tiles)) == 1:
        return work(tiles)
    inference = torch.is_inference_mode_enabled()

    def guarded(some: list[slice]) -> list:
        with torch.inference_mode(inference):
            return work(some)

    share = -(-len(tiles) // threads)
    shares = [tiles[i : i + share] for i in range(0, len(tiles), share)]
    return [result for part in workers(threads).map(guarded, shares) for result in part]


@functools.cache
def workers(threads: int) -> ThreadPoolExecutor:
    """Threads each of which runs its operations by itself.

    PyTorch would split every operation over the cores and have them wait for each other after it. With thirty small
    operations a row that costs time, and many times the work itself when another program holds a core.
    """
    started = threading.Barrier(threads)
    pool = ThreadPoolExecutor(threads, initializer=lambda: (torch.set_num_threads(1), torch.get_num_threads()))
    list(pool.map(lambda _: started.wait(), range(threads)))
    torch.set_num_threads(threads)  # for threads that are started from now on
    return pool


os.register_at_fork(after_in_child=workers.cache_clear)  # a forked process has none of the threads
