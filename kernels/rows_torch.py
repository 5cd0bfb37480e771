"""Rows of logits → per-token statistics and their gradient, in PyTorch: the reference, and CPUs.

Notation: z, zt [C, V] raw logits of C tokens under student and teacher, y [C] the tokens,
s = 1/temperature, p = softmax(s·z), q = softmax(s·zt). Differences of logits are scaled, never the
operands (docs/kernels.md). A few rows are worked on at a time, while they are in the caches, and
what the gradient needs takes the logits' place.
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

# Stands for −inf, a column without mass: its exp() is 0, and the difference of two is finite.
FLOOR = -1e30
TILE_BYTES = {"cpu": 2 * 2**20, "cuda": 64 * 2**20}  # logits that a thread works on at a time
BLOCK = 128  # columns of a block in `modes`


class Rows(NamedTuple):
    """What a row leaves behind, each [C]; NaN when there is no teacher or no divergence."""

    logp: Tensor  # log p_y
    entropy: Tensor  # H(p) = −Σ_j p_j·log p_j
    teacher_logp: Tensor  # log q_y
    teacher_entropy: Tensor
    teacher_greedy: Tensor  # 1 when nothing is more likely than y to the teacher, else 0
    kl: Tensor  # Σ_j value_j
    slope: Tensor  # Σ_j slope_j, when a multiple of p_j makes the slope of the student's mode 0
    mode: Tensor  # the student's most likely entry
    top: Tensor  # its logit
    log_sum: Tensor  # log Σ_j exp(s·(z_j − top)); −log_sum is the log-probability of the mode
    state: Tensor | None = None  # what else this backend's gradient needs of a row


class Upstream(NamedTuple):
    """∂L/∂(what a row was reduced to), each [C]; None counts as 0."""

    logp: Tensor
    entropy: Tensor | None
    kl: Tensor | None
    drag: Tensor  # dz_j loses drag·p_j: ∂L/∂kl times Σ_j slope_j, or times a tail's part of it


class Softmax(NamedTuple):
    """What the softmax of a row leaves behind: the first three [C, 1], the others [C]."""

    mode: Tensor
    top: Tensor
    log_sum: Tensor
    logp: Tensor
    entropy: Tensor
    greedy: Tensor


def statistics(z: Tensor, zt: Tensor | None, y: Tensor, s: float,
               divergence: Divergence | None) -> Rows:
    """Statistics of every row. Overwrites z with p and, given a divergence, zt with slope_j."""

    def work(tiles: list[slice]) -> list[Rows]:
        rows = tiles[0].stop - tiles[0].start
        room = z.new_empty(3, rows, z.shape[1])  # made once: fresh memory is slow to touch
        found = []
        for r in tiles:
            teacher = None if zt is None else zt[r]
            x, e, w = room[:, : len(z[r])]
            found.append(tile(z[r], teacher, y[r], s, divergence, x, e, w))
        return found

    *fields, _ = zip(*spread(work, z))  # without `state`
    return Rows(*map(torch.cat, fields))


def tile(z: Tensor, zt: Tensor | None, y: Tensor, s: float, divergence: Divergence | None,
         x: Tensor, e: Tensor, w: Tensor) -> Rows:
    """`statistics` of a few rows. x, e, w: room of z's shape."""
    z.clamp_(min=FLOOR)
    nan = z.new_full(y.shape, torch.nan)
    if zt is not None:
        torch.sub(zt.clamp_(min=FLOOR), z, out=x)
    student = softmax_(z, y, s, e)
    mode, top, log_sum = student[:3]
    rows = Rows(student.logp, student.entropy, nan, nan, nan, nan, nan,
                mode[:, 0], top[:, 0], log_sum[:, 0])
    if zt is None:
        return rows
    teacher = softmax_(zt, y, s, e)
    rows = rows._replace(teacher_logp=teacher.logp, teacher_entropy=teacher.entropy,
                         teacher_greedy=teacher.greedy)
    if divergence is None:
        return rows
    p, q = z, zt
    # log q − log p
    scale_(x, s).sub_((teacher.top - top).mul_(s).add_(teacher.log_sum - log_sum))
    # q − p = p·expm1(x) up to x = 1; beyond, where that might overflow, q − e·p loses nothing and
    # is added to p·(e − 1)
    gap = torch.clamp(x, max=1, out=e).expm1_().mul_(p)
    gap.add_(torch.sub(q, p, alpha=math.e, out=w).clamp_(min=0))
    value, slope = divergence.terms(Pair(p, q, x, gap))
    # A multiple of p_j is free. With the slope of the mode at 0, the gradient of a mode that has
    # nearly all mass is made of the other entries' slopes and not of 1 − p_mode.
    at_mode = slope.gather(-1, mode) / p.gather(-1, mode)
    slope = torch.addcmul(slope, p, at_mode, value=-1, out=zt).scatter_(-1, mode, 0)
    return rows._replace(kl=value.sum(-1), slope=slope.sum(-1))


def softmax_(z: Tensor, y: Tensor, s: float, e: Tensor) -> Softmax:
    """z becomes softmax(s·z). e: room of z's shape."""
    mode = modes(z)
    top = z.gather(-1, mode)
    x = scale_(z.sub_(top), s)
    at_y = x.gather(-1, y[:, None])[:, 0]
    # The mode's exp() is 1. It is left out of the sum, which would round a thin rest away.
    torch.exp(x, out=e).scatter_(-1, mode, 0)
    rest = e.sum(-1, keepdim=True)
    log_sum = rest.log1p()
    total = rest + 1
    entropy = (log_sum - x.mul_(e).sum(-1, keepdim=True) / total)[:, 0]
    torch.div(e.scatter_(-1, mode, 1), total, out=z)
    return Softmax(mode, top, log_sum, at_y - log_sum[:, 0], entropy, (at_y == 0).to(z.dtype))


def modes(z: Tensor) -> Tensor:
    """The column of the largest logit of every row, [C, 1]. argmax over a whole row of a CPU takes
    as long as exp, the largest of each block next to nothing."""
    blocks = z.shape[1] // BLOCK
    columns = torch.arange(blocks * BLOCK, z.shape[1], device=z.device).expand(len(z), -1)
    if blocks:
        largest = z[:, : blocks * BLOCK].unflatten(1, (blocks, BLOCK)).amax(-1)
        first = largest.argmax(-1, keepdim=True) * BLOCK
        inside = first + torch.arange(BLOCK, device=z.device)
        columns = torch.cat([inside, columns], -1)
    return columns.gather(-1, z.gather(-1, columns).argmax(-1, keepdim=True))


def scale_(x: Tensor, s: float) -> Tensor:
    return x if s == 1 else x.mul_(s)


def gradient(z: Tensor, zt: Tensor | None, y: Tensor, s: float, divergence: Divergence | None,
             row: Rows, d: Upstream, out: Tensor) -> None:
    """∂L/∂z_j, into out [C, V]: s times

        d.logp·(1[j=y] − p_j) − d.entropy·p_j·(log p_j + H) + d.kl·slope_j − d.drag·p_j

    z and zt are as `statistics` left them; out may be z. A row whose d is all 0 gets exact zeros,
    even if z has NaNs.
    """
    idle = (d.logp == 0) & (d.drag == 0)
    on_p = d.logp + d.drag
    if d.entropy is not None:
        idle &= d.entropy == 0
        on_p = on_p + d.entropy * row.entropy
    if d.kl is not None:
        idle &= d.kl == 0
    # The target and the mode are made by themselves: log p keeps the digits that p near 1 lacks.
    some = torch.stack([y, row.mode], -1)
    log_p = torch.stack([row.logp, -row.log_sum], -1)
    pull = -d.drag[:, None] * log_p.exp()
    if d.kl is not None:
        pull = pull + d.kl[:, None] * zt.gather(-1, some)
    at_some = s * entries(some, log_p, pull, y, row, d)

    def work(tiles: list[slice]) -> list:
        for r in tiles:
            p_log_p = None if d.entropy is None else torch.xlogy(z[r], z[r])
            dz = z[r].mul_((-s * on_p)[r, None])
            if d.entropy is not None:
                dz.addcmul_(p_log_p, d.entropy[r, None], value=-s)
            if d.kl is not None:
                dz.addcmul_(zt[r], d.kl[r, None], value=s)
            dz.scatter_(-1, some[r], at_some[r])
            if out is not z:
                out[r] = dz
        return []

    spread(work, z)
    if idle.any():
        out[idle] = 0


def entries(index: Tensor, log_p: Tensor, pull: Tensor, y: Tensor, row: Rows,
            d: Upstream) -> Tensor:
    """∂L/∂z_j/s of the entries at `index` [C, n], each with all of its terms at once.

    log_p: their log-probabilities. pull: what the divergence adds to each.
    """
    minus_p = -log_p.exp()
    one_minus_p = -log_p.expm1()  # not a subtraction: p may be 1 − 1e-9
    of_logp = torch.where(index == y[:, None], one_minus_p, minus_p)
    out = d.logp[:, None] * of_logp + pull
    if d.entropy is not None:
        out += d.entropy[:, None] * minus_p * (log_p + row.entropy[:, None])
    return out


def log_sum(z: Tensor, s: float, origin: Tensor) -> Tensor:
    """(1/s)·log Σ_j exp(s·z_j) − origin, [C]: the logit that all entries have together."""
    top = z.amax(-1)

    def work(tiles: list[slice]) -> list[Tensor]:
        sums = []
        for r in tiles:
            x = (z[r] - top[r, None]).mul_(s)
            sums.append(x.exp_().sum(-1))
        return sums

    parts = spread(work, z)
    return (top - origin) + torch.cat(parts).log() / s


# -------------------------------------------------------------------------------------------------
# a few rows at a time, on every core
# -------------------------------------------------------------------------------------------------
def spread(work: Callable[[list[slice]], list], z: Tensor) -> list:
    """work(slices of z's rows), TILE_BYTES each, in the `workers`; → its results in order."""
    row_bytes = z.shape[1] * z.element_size()
    size = max(1, TILE_BYTES.get(z.device.type, 2**20) // row_bytes)
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

    PyTorch would split every operation over the cores and have them wait for each other after it.
    With thirty small operations per row that costs time, and many times the work itself when
    another program holds a core.
    """
    started = threading.Barrier(threads)

    def alone() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()

    pool = ThreadPoolExecutor(threads, initializer=alone)
    list(pool.map(lambda _: started.wait(), range(threads)))
    torch.set_num_threads(threads)  # for threads that are started from now on
    return pool


os.register_at_fork(after_in_child=workers.cache_clear)  # a forked process has none of the threads
