"""Rows of logits → per-token statistics and their gradient in Triton: for fp32 logits on CUDA.

Three kernels. `statistics_kernel` reads both models' logits and computes log-probabilities and
entropies from running sums. `sums_kernel` reads the logits again for a divergence.
`gradient_kernel` reads them once more and writes dz. Between kernels, only a few numbers per row
are kept. The kernels do not change z.

The table `known` [10, C] holds these numbers:
    0  top, the largest logit of z      1  log_sum = log Σ_j exp(s·(z_j − top))
    2  log p_y      3  H(p)      4 … 7  the same of zt, y and q
    8  1 if y is the teacher's mode      9  slope_m/p_m of the student's mode m

Only functions of `tl` are used: the interpreter (TRITON_INTERPRET=1) has no libdevice, so expm1 and
log1p are written out.
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


def statistics(z: Tensor, zt: Tensor | None, y: Tensor, s: float,
               divergence: Divergence | None) -> Rows:
    """Statistics of every row of z, zt [C, V], fp32, with equal strides."""
    tokens, vocabulary = z.shape
    known = z.new_full((10, tokens), torch.nan)
    kl, slope = known.new_full((2, tokens), torch.nan)
    mode = torch.empty_like(y)
    teacher = z if zt is None else zt
    size = blocks(vocabulary, 1024)
    with torch.cuda.device_of(z):
        statistics_kernel[(tokens,)](
            z, teacher, y, known, mode,
            tokens, z.stride(0), vocabulary, s,
            TEACHER=zt is not None, **size,
        )
        if divergence is not None:
            kind, beta, clip = kind_and_constants(divergence)
            sums_kernel[(tokens,)](
                z, zt, known, mode, kl, slope,
                tokens, z.stride(0), vocabulary, s, beta, clip,
                KIND=kind, **size,
            )
    return Rows(
        logp=known[2],
        entropy=known[3],
        teacher_logp=known[6],
        teacher_entropy=known[7],
        teacher_greedy=known[8],
        kl=kl,
        slope=slope,
        mode=mode,
        top=known[0],
        log_sum=known[1],
        state=known,
    )


def gradient(z: Tensor, zt: Tensor | None, y: Tensor, s: float,
             divergence: Divergence | None, row: Rows, d: Upstream, out: Tensor) -> None:
    """Write ∂L/∂z as in rows_torch.gradient to out [C, V] of any floating dtype."""
    tokens, vocabulary = z.shape
    zeros = torch.zeros_like(d.logp)
    d_entropy = zeros if d.entropy is None else d.entropy
    d_kl = zeros if d.kl is None else d.kl
    upstream = torch.stack([d.logp, d_entropy, d_kl, d.p_weight])
    kind, beta, clip = kind_and_constants(divergence)
    teacher = z if zt is None else zt
    size = blocks(vocabulary, 2048)
    grid = (tokens, triton.cdiv(vocabulary, size["BLOCK"]))
    with torch.cuda.device_of(z):
        gradient_kernel[grid](
            z, teacher, y, row.state, row.mode, upstream, out, out.stride(0),
            tokens, z.stride(0), vocabulary, s, beta, clip,
            DIVERGENCE=d.kl is not None, ENTROPY=d.entropy is not None,
            KIND=kind, **size,
        )


def log_sum(z: Tensor, s: float, origin: Tensor) -> Tensor:
    """(1/s)·log Σ_j exp(s·z_j) − origin, [C]: one logit with the mass of all entries together."""
    any_target = z.new_zeros(len(z), dtype=torch.long)
    row = statistics(z, None, any_target, s, None)
    return (row.top - origin) + row.log_sum / s


def kind_and_constants(divergence: Divergence | None) -> tuple[int, float, float]:
    """KIND, β and bound of a divergence, as `terms` takes them."""
    if divergence is None:
        return KL, 0.0, 0.0
    if divergence.kind == "jsd" and 0 < divergence.beta < 1:
        return JSD, divergence.beta, 0.0
    if divergence.clip is not None:
        return CLIPPED, 0.0, divergence.clip
    if divergence.kind == "reverse_kl":
        return KL, 1.0, 0.0
    if divergence.kind == "forward_kl":
        return KL, 0.0, 0.0
    return KL, divergence.beta, 0.0  # mixed_kl, or jsd with β = 0 or 1


def blocks(vocabulary: int, most: int) -> dict:
    """How a row is read: at most `most` entries at a time, four per thread (one 16-byte load).

    With 1,024 or 2,048 entries, a multiprocessor has registers for two programs or more, so that
    one can load while another computes.
    """
    size = min(most, triton.next_power_of_2(vocabulary))
    warps = max(1, size // 128)
    return {"BLOCK": size, "num_warps": warps, "enable_fp_fusion": True}


# -------------------------------------------------------------------------------------------------
# the kernels
# -------------------------------------------------------------------------------------------------
@triton.jit
def statistics_kernel(z_ptr, zt_ptr, y_ptr, known_ptr, mode_ptr,
                      tokens, stride, vocabulary, s,
                      TEACHER: tl.constexpr, BLOCK: tl.constexpr):
    """Rows 0 to 8 of `known`, and the mode; one program per row of logits.

    Every lane of a block keeps sums over its own columns. The lanes' sums are merged once, at the
    end of the row.
    """
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * stride
    zt_ptr += row * stride
    known_ptr += row
    lanes = tl.arange(0, BLOCK)
    zeros = tl.zeros([BLOCK], tl.float32)
    top, mode, rest, moment = zeros + FLOOR, lanes, zeros, zeros
    t_top, t_mode, t_rest, t_moment = top, lanes, zeros, zeros
    for start in range(0, vocabulary, BLOCK):
        cols = start + lanes
        z = logits(z_ptr, cols, vocabulary)
        top, mode, rest, moment = add_column(z, cols, s, top, mode, rest, moment)
        if TEACHER:
            zt = logits(zt_ptr, cols, vocabulary)
            t_top, t_mode, t_rest, t_moment = add_column(
                zt, cols, s, t_top, t_mode, t_rest, t_moment
            )
    y = tl.load(y_ptr + row)
    z_y = logits(z_ptr, y, vocabulary)
    highest, mode = merge_lanes(
        z_y, known_ptr, tokens, vocabulary, s, top, mode, rest, moment
    )
    tl.store(mode_ptr + row, mode)
    if TEACHER:
        zt_y = logits(zt_ptr, y, vocabulary)
        t_known_ptr = known_ptr + 4 * tokens
        highest, _ = merge_lanes(
            zt_y, t_known_ptr, tokens, vocabulary, s, t_top, t_mode, t_rest, t_moment
        )
        greedy = zt_y >= highest
        tl.store(known_ptr + 8 * tokens, greedy.to(tl.float32))


@triton.jit
def add_column(z, cols, s, top, mode, rest, moment):
    """Add one column to each lane's sums: rest = Σ e and moment = Σ e·s·(z − top), both over all
    columns but the top, with e = exp(s·(z − top)).

    The top's own e is 1. Adding it to a small sum of the others would round their digits away.
    """
    fall = -tl.abs(z - top) * s
    e = tl.exp(fall)  # one exp: it scales either the new term or the sums so far
    new = z > top
    moment_below_new = e * (moment + (rest + 1) * fall)
    moment = tl.where(new, moment_below_new, moment + e * fall)
    rest = tl.where(new, e * (rest + 1), rest + e)
    top = tl.where(new, z, top)
    mode = tl.where(new, cols, mode)
    return top, mode, rest, moment


@triton.jit
def merge_lanes(z_y, known_ptr, tokens, vocabulary, s, top, mode, rest, moment):
    """Merge the lanes' sums into four rows of `known`; → the row's top logit and its column."""
    highest = tl.max(top, 0)
    is_highest = top == highest
    column = tl.min(tl.where(is_highest, mode, vocabulary), 0)
    others = rest + tl.where(mode == column, 0.0, 1.0)  # adds every lane's top but the highest
    fall = (top - highest) * s
    e = tl.exp(fall)
    mass = tl.sum(e * others, 0)
    log_sum = log1p(mass)
    tl.store(known_ptr, highest)
    tl.store(known_ptr + tokens, log_sum)
    tl.store(known_ptr + 2 * tokens, (z_y - highest) * s - log_sum)
    lane_moments = e * (moment + others * fall)
    mean = tl.sum(lane_moments, 0) / (1 + mass)
    tl.store(known_ptr + 3 * tokens, log_sum - mean)
    return highest, column


@triton.jit
def sums_kernel(z_ptr, zt_ptr, known_ptr, mode_ptr, kl_ptr, slope_ptr,
                tokens, stride, vocabulary, s, beta, clip,
                KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Σ_j value_j and Σ_j slope_j, shifted so that the mode's slope is 0; one program per row."""
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * stride
    zt_ptr += row * stride
    known_ptr += row
    mode = tl.load(mode_ptr + row)
    z_m = logits(z_ptr, mode, vocabulary)
    zt_m = logits(zt_ptr, mode, vocabulary)
    _, slope_m, p_m = terms(z_m, zt_m, known_ptr, tokens, s, beta, clip, KIND)
    at_mode = slope_m / p_m
    kl = tl.zeros([BLOCK], tl.float32)
    all_slopes = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z = logits(z_ptr, cols, vocabulary)
        zt = logits(zt_ptr, cols, vocabulary)
        value, slope, p = terms(z, zt, known_ptr, tokens, s, beta, clip, KIND)
        kl += value
        all_slopes += tl.where(cols == mode, 0.0, slope - at_mode * p)
    tl.store(kl_ptr + row, tl.sum(kl, 0))
    tl.store(slope_ptr + row, tl.sum(all_slopes, 0))
    tl.store(known_ptr + 9 * tokens, at_mode)


@triton.jit
def gradient_kernel(z_ptr, zt_ptr, y_ptr, known_ptr, mode_ptr, upstream_ptr,
                    out_ptr, out_stride,
                    tokens, stride, vocabulary, s, beta, clip,
                    DIVERGENCE: tl.constexpr, ENTROPY: tl.constexpr,
                    KIND: tl.constexpr, BLOCK: tl.constexpr):
    """dz, one program per block of a row. If all upstream gradients of a row are 0, so is dz, even
    if z has NaNs."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    known_ptr += row
    d_logp = tl.load(upstream_ptr + row)
    d_entropy = tl.load(upstream_ptr + tokens + row)
    d_kl = tl.load(upstream_ptr + 2 * tokens + row)
    p_weight = tl.load(upstream_ptr + 3 * tokens + row)
    dz = tl.zeros([BLOCK], tl.float32)
    unused = (d_logp == 0) & (d_entropy == 0)
    unused = unused & (d_kl == 0) & (p_weight == 0)
    if not unused:
        z = logits(z_ptr + row * stride, cols, vocabulary)
        top, log_sum = tl.load(known_ptr), tl.load(known_ptr + tokens)
        log_p = (z - top) * s - log_sum
        p = tl.exp(log_p)
        log_p_y = tl.load(known_ptr + 2 * tokens)
        one_minus_p = -expm1(log_p_y)  # of y, whose p may be 1 − 1e-9
        is_target = cols == tl.load(y_ptr + row)
        dz = d_logp * tl.where(is_target, one_minus_p, -p) - p_weight * p
        if ENTROPY:
            entropy = tl.load(known_ptr + 3 * tokens)
            dz -= d_entropy * p * (log_p + entropy)
        if DIVERGENCE:
            zt = logits(zt_ptr + row * stride, cols, vocabulary)
            _, slope, p = terms(z, zt, known_ptr, tokens, s, beta, clip, KIND)
            at_mode = tl.load(known_ptr + 9 * tokens)
            is_mode = cols == tl.load(mode_ptr + row)
            dz += d_kl * tl.where(is_mode, 0.0, slope - at_mode * p)
        dz *= s
    inside = cols < vocabulary
    rounded = dz.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * out_stride + cols, rounded, mask=inside)


@triton.jit
def terms(z, zt, known_ptr, tokens, s, beta, clip, KIND: tl.constexpr):
    """(value, slope, p) of some entries of a row: the functions of divergence.py. Entries without
    mass give 0."""
    top, log_sum = tl.load(known_ptr), tl.load(known_ptr + tokens)
    t_top = tl.load(known_ptr + 4 * tokens)
    t_log_sum = tl.load(known_ptr + 5 * tokens)
    p = tl.exp((z - top) * s - log_sum)
    q = tl.exp((zt - t_top) * s - t_log_sum)
    logit_gap = (zt - z) - (t_top - top)
    x = s * logit_gap - (t_log_sum - log_sum)  # log q − log p
    fall = expm1(-tl.abs(x))
    gap = tl.where(x > 0, -q, p) * fall  # q − p
    if KIND == 0:  # KL: β·KL(p‖q) + (1−β)·KL(q‖p)
        reverse = gap - p * x
        forward = q * x - gap
        value = beta * reverse + (1 - beta) * forward
        slope = -beta * p * x - (1 - beta) * gap
    elif KIND == 1:  # CLIPPED
        value = tl.minimum(q * x, clip) - gap
        slope = tl.where(q * x > clip, p, -gap)
    else:  # JSD
        weight = tl.where(x > 0, 1 - beta, beta)
        log_ratio = log1p(fall * weight)
        log_p_over_m = -log_ratio - tl.maximum(x, 0.0)
        log_q_over_m = tl.minimum(x, 0.0) - log_ratio
        slope = (1 - beta) * p * log_p_over_m
        value = slope + beta * q * log_q_over_m
    return value, slope, p


@triton.jit
def logits(row_ptr, cols, vocabulary):
    """Logits of a row; FLOOR for −inf and for columns beyond the row. NaN stays NaN."""
    z = tl.load(row_ptr + cols, mask=cols < vocabulary, other=FLOOR)
    return tl.where(z < FLOOR, FLOOR, z)


@triton.jit
def expm1(x):
    """exp(x) − 1: the Taylor series up to x⁷ for |x| < 0.5, where the subtraction loses digits."""
    series = 1 / 720 + x / 5040
    series = 1 / 24 + x * (1 / 120 + x * series)
    series = 1 / 2 + x * (1 / 6 + x * series)
    series = x * (1 + x * series)
    return tl.where(tl.abs(x) < 0.5, series, tl.exp(x) - 1)


@triton.jit
def log1p(w):
    """log(1 + w) for w > −1. The quotient corrects the rounding of u = 1 + w."""
    u = 1 + w
    corrected = tl.log(u) * (w / (u - 1))
    return tl.where(u == 1, w, corrected)
