"""Rows of logits → per-token statistics and their gradient, in PyTorch: the CPU backend.

Notation: z, zt [C, V] raw logits of C tokens under student and teacher, y [C] the tokens,
s = 1/temperature, p = softmax(s·z), q = softmax(s·zt). Differences of logits are scaled, never the
operands (docs/kernels.md). A few rows are processed at a time so that they stay in the caches, and
the quantities that the gradient needs overwrite the logits. reference.py is easier to read.
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

# Replaces −inf, the logit of an entry without mass: its exp() is 0, and differences are finite.
FLOOR = -1e30
TILE_BYTES = {"cpu": 2 * 2**20, "cuda": 64 * 2**20}  # logits that a thread processes at a time
BLOCK = 128  # columns of a block in `modes`


class Rows(NamedTuple):
    """Statistics of each row, [C]; NaN if the teacher or the divergence they need is absent."""

    logp: Tensor  # log p_y
    entropy: Tensor  # H(p) = −Σ_j p_j·log p_j
    teacher_logp: Tensor  # log q_y
    teacher_entropy: Tensor  # H(q)
    teacher_greedy: Tensor  # 1 if no entry is more likely than y to the teacher, else 0
    kl: Tensor  # Σ_j value_j
    slope: Tensor  # Σ_j slope_j, shifted by a multiple of p_j so that the student's mode has 0
    mode: Tensor  # the student's most likely entry
    top: Tensor  # its logit
    log_sum: Tensor  # log Σ_j exp(s·(z_j − top)); −log_sum is the log-probability of the mode
    state: Tensor | None = None  # of rows_triton: its table `known`


class Upstream(NamedTuple):
    """∂L/∂(a row's statistics), each [C]; None counts as 0."""

    logp: Tensor
    entropy: Tensor | None
    kl: Tensor | None
    p_weight: Tensor  # −p_weight·p_j is a term of dz_j: ∂L/∂kl·Σ_j slope_j (top-K: the tail's part)


class Softmax(NamedTuple):
    """What is kept of the softmax of each row: the first three [C, 1], the others [C]."""

    mode: Tensor  # the most likely entry
    top: Tensor  # its logit
    log_sum: Tensor  # log Σ_j exp(s·(z_j − top))
    logp: Tensor  # log-probability of y
    entropy: Tensor
    greedy: Tensor  # 1 if no entry is more likely than y, else 0


def statistics(z: Tensor, zt: Tensor | None, y: Tensor, s: float,
               divergence: Divergence | None) -> Rows:
    """Statistics of every row. Overwrites z with p and, given a divergence, zt with slope_j."""

    def work(tiles: list[slice]) -> list[Rows]:
        most = tiles[0].stop - tiles[0].start
        scratch = z.new_empty(3, most, z.shape[1])  # allocated once: new memory is slow at first
        found = []
        for r in tiles:
            teacher = None if zt is None else zt[r]
            room = scratch[:, : len(z[r])]
            rows = statistics_of_tile(z[r], teacher, y[r], s, divergence, room)
            found.append(rows)
        return found

    *fields, _ = zip(*in_parallel(work, z))  # without `state`
    return Rows(*map(torch.cat, fields))


def statistics_of_tile(z: Tensor, zt: Tensor | None, y: Tensor, s: float,
                       divergence: Divergence | None, scratch: Tensor) -> Rows:
    """`statistics` of a few rows [R, V]. scratch: [3, R, V], overwritten."""
    x, e, w = scratch
    z.clamp_(min=FLOOR)
    if zt is not None:
        torch.sub(zt.clamp_(min=FLOOR), z, out=x)
    student = softmax_(z, y, s, e)
    mode, top, log_sum = student[:3]
    nan = z.new_full(y.shape, torch.nan)
    rows = Rows(
        student.logp,
        student.entropy,
        teacher_logp=nan,
        teacher_entropy=nan,
        teacher_greedy=nan,
        kl=nan,
        slope=nan,
        mode=mode[:, 0],
        top=top[:, 0],
        log_sum=log_sum[:, 0],
    )
    if zt is None:
        return rows
    teacher = softmax_(zt, y, s, e)
    rows = rows._replace(
        teacher_logp=teacher.logp,
        teacher_entropy=teacher.entropy,
        teacher_greedy=teacher.greedy,
    )
    if divergence is None:
        return rows
    p, q = z, zt
    shift = (teacher.top - top).mul_(s).add_(teacher.log_sum - log_sum)
    x = scale_(x, s).sub_(shift)  # log q − log p
    # q − p = p·expm1(x) up to x = 1. Beyond, where that might overflow, q − e·p loses no digits and
    # is added to p·(e − 1).
    gap = torch.clamp(x, max=1, out=e).expm1_().mul_(p)
    beyond = torch.sub(q, p, alpha=math.e, out=w)
    gap.add_(beyond.clamp_(min=0))
    value, slope = divergence.terms(Pair(p, q, x, gap))
    # A multiple of p_j may be subtracted from the slopes. If the mode has nearly all mass, its
    # gradient then comes from the other entries' slopes and not from 1 − p_mode.
    at_mode = slope.gather(-1, mode) / p.gather(-1, mode)
    slope = torch.addcmul(slope, p, at_mode, value=-1, out=zt)
    slope.scatter_(-1, mode, 0)
    return rows._replace(kl=value.sum(-1), slope=slope.sum(-1))


def softmax_(z: Tensor, y: Tensor, s: float, e: Tensor) -> Softmax:
    """Overwrite z [R, V] with softmax(s·z). e: scratch [R, V]."""
    mode = modes(z)
    top = z.gather(-1, mode)
    x = scale_(z.sub_(top), s)
    at_y = x.gather(-1, y[:, None])[:, 0]
    # The mode's exp() is 1. Adding it to a small sum of the others would round their digits away.
    torch.exp(x, out=e).scatter_(-1, mode, 0)
    rest = e.sum(-1, keepdim=True)
    log_sum = rest.log1p()
    total = rest + 1
    mean_x = x.mul_(e).sum(-1, keepdim=True) / total
    torch.div(e.scatter_(-1, mode, 1), total, out=z)
    return Softmax(
        mode,
        top,
        log_sum,
        logp=at_y - log_sum[:, 0],
        entropy=(log_sum - mean_x)[:, 0],
        greedy=(at_y == 0).to(z.dtype),
    )


def modes(z: Tensor) -> Tensor:
    """The column of the largest logit of every row, [R, 1].

    On a CPU, argmax over a whole row takes as long as exp. The maximum of each block of columns
    takes almost no time, so argmax reads one block and the columns after the last full block.
    """
    blocks = z.shape[1] // BLOCK
    end = blocks * BLOCK
    columns = torch.arange(end, z.shape[1], device=z.device)
    columns = columns.expand(len(z), -1)
    if blocks > 0:
        in_blocks = z[:, :end].unflatten(1, (blocks, BLOCK))
        largest = in_blocks.amax(-1)
        first = largest.argmax(-1, keepdim=True) * BLOCK
        inside = first + torch.arange(BLOCK, device=z.device)
        columns = torch.cat([inside, columns], -1)
    best = z.gather(-1, columns).argmax(-1, keepdim=True)
    return columns.gather(-1, best)


def scale_(x: Tensor, s: float) -> Tensor:
    return x if s == 1 else x.mul_(s)


def gradient(z: Tensor, zt: Tensor | None, y: Tensor, s: float,
             divergence: Divergence | None, row: Rows, d: Upstream, out: Tensor) -> None:
    """Write ∂L/∂z_j to out [C, V]: s times

        d.logp·(1[j=y] − p_j) − d.entropy·p_j·(log p_j + H) + d.kl·slope_j − d.p_weight·p_j

    z and zt are as `statistics` left them; out may be z. A row whose upstream gradients are all 0
    gets exact zeros, even if z has NaNs.
    """
    unused = (d.logp == 0) & (d.p_weight == 0)
    on_p = d.logp + d.p_weight
    if d.entropy is not None:
        unused &= d.entropy == 0
        on_p = on_p + d.entropy * row.entropy
    if d.kl is not None:
        unused &= d.kl == 0
    # Target and mode are computed apart: near p = 1, log p has digits of 1 − p that p lacks.
    apart = torch.stack([y, row.mode], -1)
    log_p = torch.stack([row.logp, -row.log_sum], -1)
    of_kl = -d.p_weight[:, None] * log_p.exp()
    if d.kl is not None:
        of_kl = of_kl + d.kl[:, None] * zt.gather(-1, apart)
    dz_apart = s * entries(apart, log_p, of_kl, y, row, d)
    scaled_on_p = (-s * on_p)[:, None]

    def work(tiles: list[slice]) -> list:
        for r in tiles:
            p = z[r]
            if d.entropy is not None:
                p_log_p = torch.xlogy(p, p)
            dz = p.mul_(scaled_on_p[r])
            if d.entropy is not None:
                dz.addcmul_(p_log_p, d.entropy[r, None], value=-s)
            if d.kl is not None:
                dz.addcmul_(zt[r], d.kl[r, None], value=s)
            dz.scatter_(-1, apart[r], dz_apart[r])
            if out is not z:
                out[r] = dz
        return []

    in_parallel(work, z)
    if unused.any():
        out[unused] = 0


def entries(index: Tensor, log_p: Tensor, of_kl: Tensor, y: Tensor, row: Rows,
            d: Upstream) -> Tensor:
    """∂L/∂z_j/s of the entries at `index` [C, n], each with all of its terms at once.

    log_p: their log-probabilities. of_kl: the divergence's term of each. Both [C, n].
    """
    minus_p = -log_p.exp()
    one_minus_p = -log_p.expm1()  # not a subtraction: p may be 1 − 1e-9
    is_target = index == y[:, None]
    of_logp = torch.where(is_target, one_minus_p, minus_p)
    out = d.logp[:, None] * of_logp + of_kl
    if d.entropy is not None:
        surprise = log_p + row.entropy[:, None]
        out += d.entropy[:, None] * minus_p * surprise
    return out


def log_sum(z: Tensor, s: float, origin: Tensor) -> Tensor:
    """(1/s)·log Σ_j exp(s·z_j) − origin, [C]: one logit with the mass of all entries together."""
    top = z.amax(-1)

    def work(tiles: list[slice]) -> list[Tensor]:
        sums = []
        for r in tiles:
            x = (z[r] - top[r, None]).mul_(s)
            sums.append(x.exp_().sum(-1))
        return sums

    parts = in_parallel(work, z)
    return (top - origin) + torch.cat(parts).log() / s


# -------------------------------------------------------------------------------------------------
# a few rows at a time, on every core
# -------------------------------------------------------------------------------------------------
def in_parallel(work: Callable[[list[slice]], list], z: Tensor) -> list:
    """Call `work` in the `workers` with slices of z's rows, TILE_BYTES each; → results in order."""
    row_bytes = z.shape[1] * z.element_size()
    tile_bytes = TILE_BYTES.get(z.device.type, 2**20)
    size = max(1, tile_bytes // row_bytes)
    starts = range(0, len(z), size)
    tiles = [slice(i, i + size) for i in starts]
    threads = torch.get_num_threads()
    if z.device.type != "cpu" or threads == 1 or len(tiles) == 1:
        return work(tiles)
    inference = torch.is_inference_mode_enabled()

    def guarded(some: list[slice]) -> list:
        with torch.inference_mode(inference):
            return work(some)

    share = math.ceil(len(tiles) / threads)
    starts = range(0, len(tiles), share)
    shares = [tiles[i : i + share] for i in starts]
    results = []
    for part in workers(threads).map(guarded, shares):
        results += part
    return results


@functools.cache
def workers(threads: int) -> ThreadPoolExecutor:
    """A pool of threads, each of which runs its PyTorch operations on one core.

    PyTorch would split every operation over the cores and make them wait for each other after it.
    With thirty small operations per row that wait costs time. If another program occupies a core,
    the wait takes many times as long as the work.
    """
    started = threading.Barrier(threads)

    def use_one_core() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()

    pool = ThreadPoolExecutor(threads, initializer=use_one_core)
    waits = [pool.submit(started.wait) for _ in range(threads)]
    for wait in waits:
        wait.result()
    torch.set_num_threads(threads)  # for threads that start from now on
    return pool


os.register_at_fork(after_in_child=workers.cache_clear)  # a forked process has no other threads
