"""Rows of logits → per-token statistics and their gradient in Triton: what rows_torch.py does, for fp32 on CUDA.

Three kernels. `statistics_kernel` reads both models' logits once and gets, from running sums, log-probabilities,
entropies and both KL divergences. `sums_kernel` reads them again for a divergence that needs p and q themselves.
`gradient_kernel` reads them again and writes dz. Only numbers per row are kept between them; z stays as it is.

They are kept in `known` [13, C]:
    0  max z      1  log Σ_j exp(s·(z_j − max z))      2  log p_y      3  H(p)      4 … 7  the same of zt, y and q
    8  1 where y is the teacher's mode      9  KL(p‖q)      10  KL(q‖p)
    11  shift = s·(zt_y − z_y)              12  log_ratio = log Σ_j p_j·exp(s·(zt_j − z_j) − shift)

Plain tl only: the interpreter (TRITON_INTERPRET=1) has no libdevice, so expm1 and log1p are written out.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.divergence import Divergence
from kernels.rows_torch import Rows, Upstream

FLOOR = tl.constexpr(-1e30)  # as in rows_torch
KL, CLIPPED, JSD = 0, 1, 2  # KIND of `terms`


def statistics(z: Tensor, zt: Tensor | None, y: Tensor, s: float, divergence: Divergence | None) -> Rows:
    """Statistics of every row of z, zt [C, V], fp32, rows at the same distance in both."""
    tokens, vocabulary = z.shape
    known = z.new_full((13, tokens), torch.nan)
    kind, beta, clip = form(divergence)
    with torch.cuda.device_of(z):
        statistics_kernel[(tokens,)](z, z if zt is None else zt, y, known, tokens, z.stride(0), vocabulary, s,
                                     TEACHER=zt is not None, **blocks(vocabulary, 1024))
        if kind != KL:
            kl, slope = torch.empty_like(known[:2])
            sums_kernel[(tokens,)](z, zt, known, kl, slope, tokens, z.stride(0), vocabulary, s, beta, clip, KIND=kind,
                                   **blocks(vocabulary, 1024))
        else:  # Σ_j slope_j of KL(p‖q) is that KL itself, and of KL(q‖p) it is 0
            kl, slope = beta * known[9] + (1 - beta) * known[10], beta * known[9]
    return Rows(known[2], known[3], known[6], known[7], known[8], kl, slope, known)


def gradient(z: Tensor, zt: Tensor | None, y: Tensor, s: float, divergence: Divergence | None, row: Rows, d: Upstream,
             out: Tensor) -> None:
    """∂L/∂z as in rows_torch.gradient, into out [C, V] of any floating dtype."""
    tokens, vocabulary = z.shape
    zeros = torch.zeros_like(d.logp)
    upstream = torch.stack([d.logp, zeros if d.entropy is None else d.entropy, zeros if d.kl is None else d.kl, d.drag])
    kind, beta, clip = form(divergence)
    size = blocks(vocabulary, 2048)
    with torch.cuda.device_of(z):
        gradient_kernel[(tokens, triton.cdiv(vocabulary, size["BLOCK"]))](
            z, z if zt is None else zt, y, row.state, upstream, out, out.stride(0), tokens, z.stride(0), vocabulary, s,
            beta, clip, DIVERGENCE=d.kl is not None, ENTROPY=d.entropy is not None, KIND=kind, **size)


def log_sum(z: Tensor, s: float, origin: Tensor) -> Tensor:
    """(1/s)·log Σ_j exp(s·z_j) − origin, [C]: the logit that all entries have together."""
    state = statistics(z, None, torch.zeros(len(z), dtype=torch.long, device=z.device), s, None).state
    return (state[0] - origin) + state[1] / s


def form(divergence: Divergence | None) -> tuple[int, float, float]:
    """(KIND, β, bound) of a divergence in `terms`."""
    if divergence is None:
        return KL, 0.0, 0.0
    if divergence.kind == "jsd" and 0 < divergence.beta < 1:
        return JSD, divergence.beta, 0.0
    if divergence.clip is not None:
        return CLIPPED, 0.0, divergence.clip
    return KL, {"reverse_kl": 1.0, "forward_kl": 0.0}.get(divergence.kind, divergence.beta), 0.0


def blocks(vocabulary: int, most: int) -> dict:
    """How a row is read: at most `most` entries at a time, four to a thread (one 16-byte load). The sizes below leave
    registers for two programs or more on a multiprocessor, so that one loads while another computes."""
    size = min(most, triton.next_power_of_2(vocabulary))
    return {"BLOCK": size, "num_warps": max(1, size // 128), "enable_fp_fusion": True}


# ---------------------------------------------------------------------------------------------------------------------
# the kernels
# ---------------------------------------------------------------------------------------------------------------------
@triton.jit
def statistics_kernel(z_ptr, zt_ptr, y_ptr, known_ptr, tokens, stride, vocabulary, s, TEACHER: tl.constexpr,
                      BLOCK: tl.constexpr):
    """One program a row. Every lane of a block keeps sums over its own columns, weighted with exp(s·(z − top)) where
    top is the largest logit that the lane has seen; the lanes meet once, at the end of the row."""
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * stride
    zt_ptr += row * stride
    y = tl.load(y_ptr + row)
    z_y = logits(z_ptr, y, vocabulary)
    zeros = tl.zeros([BLOCK], tl.float32)
    top, total, moment = zeros + FLOOR, zeros, zeros  # max, Σ e, Σ e·s·(z − top)
    zt_y = logits(zt_ptr, y, vocabulary)
    shift = s * (zt_y - z_y)  # differences of the two models' logits are taken relative to that at y
    t_top, t_total, t_moment = top, zeros, zeros
    gap, t_gap, ratio = zeros, zeros, zeros  # Σ e·x, Σ e_t·x, Σ e·expm1(x) of x = s·(zt − z) − shift
    for start in range(0, vocabulary, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z = logits(z_ptr, cols, vocabulary)
        fall = -tl.abs(z - top) * s
        e, new = tl.exp(fall), z > top  # one exp: it scales either the new term or the sums so far
        moment = tl.where(new, e * (moment + total * fall), moment + e * fall)
        total = add(total, e, new, 1.0)
        top = tl.where(new, z, top)
        if TEACHER:
            zt = logits(zt_ptr, cols, vocabulary)
            x = s * (zt - z) - shift
            gap = add(gap, e, new, x)
            ratio = add(ratio, e, new, expm1(x))
            t_fall = -tl.abs(zt - t_top) * s
            e, new = tl.exp(t_fall), zt > t_top
            t_moment = tl.where(new, e * (t_moment + t_total * t_fall), t_moment + e * t_fall)
            t_gap = add(t_gap, e, new, x)
            t_total = add(t_total, e, new, 1.0)
            t_top = tl.where(new, zt, t_top)

    known_ptr += row
    highest = tl.max(top, 0)
    fall = (top - highest) * s
    e = tl.exp(fall)
    mass = tl.sum(e * total, 0)
    log_sum = tl.log(mass)
    tl.store(known_ptr, highest)
    tl.store(known_ptr + tokens, log_sum)
    tl.store(known_ptr + 2 * tokens, (z_y - highest) * s - log_sum)
    tl.store(known_ptr + 3 * tokens, log_sum - tl.sum(e * (moment + total * fall), 0) / mass)
    if TEACHER:
        t_highest = tl.max(t_top, 0)
        t_fall = (t_top - t_highest) * s
        t_e = tl.exp(t_fall)
        t_mass = tl.sum(t_e * t_total, 0)
        t_log_sum = tl.log(t_mass)
        tl.store(known_ptr + 4 * tokens, t_highest)
        tl.store(known_ptr + 5 * tokens, t_log_sum)
        tl.store(known_ptr + 6 * tokens, (zt_y - t_highest) * s - t_log_sum)
        tl.store(known_ptr + 7 * tokens, t_log_sum - tl.sum(t_e * (t_moment + t_total * t_fall), 0) / t_mass)
        tl.store(known_ptr + 8 * tokens, (zt_y >= t_highest).to(tl.float32))
        # log Σ_j p_j·e^x twice: from the two normalisers, right to 1e-6 or so, and from Σ_j p_j·expm1(x), which has
        # all digits where x is small but overflows, or misses what underflowed in p, where it is not
        log_ratio = ((t_highest - highest) * s - shift) + (t_log_sum - log_sum)
        mean = tl.sum(e * ratio, 0) / mass
        fine = mean * (1 - mean * (1 / 2 - mean * (1 / 3 - mean / 4)))  # log1p
        log_ratio = tl.where((tl.abs(mean) < 0.02) & (tl.abs(fine - log_ratio) < 1e-5), fine, log_ratio)
        tl.store(known_ptr + 9 * tokens, log_ratio - tl.sum(e * gap, 0) / mass)
        tl.store(known_ptr + 10 * tokens, tl.sum(t_e * t_gap, 0) / t_mass - log_ratio)
        tl.store(known_ptr + 11 * tokens, shift)
        tl.store(known_ptr + 12 * tokens, log_ratio)


@triton.jit
def sums_kernel(z_ptr, zt_ptr, known_ptr, kl_ptr, slope_ptr, tokens, stride, vocabulary, s, beta, clip,
                KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Σ_j value_j and Σ_j slope_j, one program a row."""
    row = tl.program_id(0).to(tl.int64)
    kl, all_slopes = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z = logits(z_ptr + row * stride, cols, vocabulary)
        zt = logits(zt_ptr + row * stride, cols, vocabulary)
        value, slope = terms(z, zt, known_ptr + row, tokens, s, beta, clip, KIND)
        kl += value
        all_slopes += slope
    tl.store(kl_ptr + row, tl.sum(kl, 0))
    tl.store(slope_ptr + row, tl.sum(all_slopes, 0))


@triton.jit
def gradient_kernel(z_ptr, zt_ptr, y_ptr, known_ptr, upstream_ptr, out_ptr, out_stride, tokens, stride, vocabulary, s,
                    beta, clip, DIVERGENCE: tl.constexpr, ENTROPY: tl.constexpr, KIND: tl.constexpr,
                    BLOCK: tl.constexpr):
    """dz, one program a block of a row. Where all upstream gradients are 0, dz is 0 whatever z is."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    d_logp = tl.load(upstream_ptr + row)
    d_entropy = tl.load(upstream_ptr + tokens + row)
    d_kl = tl.load(upstream_ptr + 2 * tokens + row)
    drag = tl.load(upstream_ptr + 3 * tokens + row)
    dz = tl.zeros([BLOCK], tl.float32)
    if not ((d_logp == 0) & (d_entropy == 0) & (d_kl == 0) & (drag == 0)):
        z = logits(z_ptr + row * stride, cols, vocabulary)
        log_p = (z - tl.load(known_ptr + row)) * s - tl.load(known_ptr + tokens + row)
        p = tl.exp(log_p)
        dz = d_logp * (tl.where(cols == tl.load(y_ptr + row), 1.0, 0.0) - p) - drag * p
        if ENTROPY:
            dz -= d_entropy * p * (log_p + tl.load(known_ptr + 3 * tokens + row))
        if DIVERGENCE:
            zt = logits(zt_ptr + row * stride, cols, vocabulary)
            _, slope = terms(z, zt, known_ptr + row, tokens, s, beta, clip, KIND)
            dz += d_kl * slope
        dz *= s
    tl.store(out_ptr + row * out_stride + cols, dz.to(out_ptr.dtype.element_ty), mask=cols < vocabulary)


@triton.jit
def terms(z, zt, known_ptr, tokens, s, beta, clip, KIND: tl.constexpr):
    """(value, slope) of some entries of a row: the functions of divergence.py. Columns without mass give 0."""
    p = tl.exp((z - tl.load(known_ptr)) * s - tl.load(known_ptr + tokens))
    q = tl.exp((zt - tl.load(known_ptr + 4 * tokens)) * s - tl.load(known_ptr + 5 * tokens))
    x = (s * (zt - z) - tl.load(known_ptr + 11 * tokens)) - tl.load(known_ptr + 12 * tokens)  # log q − log p
    fall = expm1(-tl.abs(x))
    gap = tl.where(x > 0, -q, p) * fall  # q − p
    if KIND == 0:  # KL: β·KL(p‖q) + (1−β)·KL(q‖p)
        value = beta * (gap - p * x) + (1 - beta) * (q * x - gap)
        slope = -beta * p * x - (1 - beta) * gap
    elif KIND == 1:  # CLIPPED
        value = tl.minimum(q * x, clip) - gap
        slope = tl.where(q * x > clip, p, -gap)
    else:  # JSD
        log_ratio = log1p(fall * tl.where(x > 0, 1 - beta, beta))
        slope = (1 - beta) * p * (-log_ratio - tl.maximum(x, 0.0))
        value = slope + beta * q * (tl.minimum(x, 0.0) - log_ratio)
    return value, slope


@triton.jit
def logits(row_ptr, cols, vocabulary):
    """Logits of a row; FLOOR outside of it and for −inf. NaN stays NaN."""
    z = tl.load(row_ptr + cols, mask=cols < vocabulary, other=FLOOR)
    return tl.where(z < FLOOR, FLOOR, z)


@triton.jit
def add(sums, e, new, term):
    """A lane's weighted sum with one term more; `new`: the term has the largest weight yet, and the sum is scaled."""
    return tl.where(new, sums * e + term, sums + e * term)


@triton.jit
def expm1(x):
    series = x * (1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x / 5040))))))
    return tl.where(tl.abs(x) < 0.5, series, tl.exp(x) - 1)


@triton.jit
def log1p(w):
    """log(1 + w) for w in (−1, 0]: the rounding of 1 + w is undone by the quotient."""
    u = 1 + w
    return tl.where(u == 1, w, tl.log(u) * w / (u - 1))
