"""From hidden states to per-token quantities of the vocabulary distribution, without [T, V] logits.

    token_stats(hidden, head, targets, …)
        differentiable tensors [T]; the backward computes the logits again
    head_loss(loss_fn, hidden, head, targets, tokens, …)
        a scalar; loss_fn runs while the logits of a chunk of tokens are in memory

T tokens, D hidden width, V vocabulary. hidden [T, D] and head [V, D] (the weight of lm_head) are
the student's. Given a teacher's hidden states, the same pass over the logits also yields the
teacher's log-probabilities and a divergence between student p and teacher q. Gradients go to the
student only. Logits are computed for one chunk of tokens at a time and freed before the next chunk.
They are fp32 for bf16 and fp32 inputs, and float64 for float64 inputs.

Both calls give the same numbers. With a teacher, head_loss takes 4 matrix products of the size
[T, D]·[D, V] (3 with a frozen head) and token_stats takes 6. But the loss of head_loss must be a
sum over tokens whose normalisers are known beforehand.

rows_triton.py processes the rows of logits on CUDA, rows_torch.py elsewhere. With
TRITON_INTERPRET=1 in the environment, rows_triton.py runs on a CPU, slowly, for tests.
reference.py computes the same with full logits; docs/kernels.md has the mathematics.
"""
from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import rows_torch
from kernels.divergence import Divergence
from kernels.rows_torch import FLOOR, Upstream

# Bytes of one model's logits in a chunk. On CUDA 1,024 tokens of V = 151,936: enough for a
# full-speed product. On a CPU enough that reading the head and its gradient per chunk costs little.
CHUNK_BYTES = {"cuda": 640 * 2**20, "cpu": 144 * 2**20}
# Number of chunks whose bf16 gradients are multiplied together. dz·head of a single chunk has too
# few tiles for a large GPU, and each product for the head's gradient reads and writes all of it.
GROUP = 4


class TokenStats(NamedTuple):
    """Per-token quantities, each [T], in nats. Without a teacher the last four are NaN."""

    logp: Tensor  # log p(y), the student's log-probability of the target
    entropy: Tensor  # H(p)
    teacher_logp: Tensor  # log q(y); no gradient
    teacher_entropy: Tensor  # H(q); no gradient
    teacher_greedy: Tensor  # 1 when y is the teacher's most likely token; no gradient
    kl: Tensor  # the divergence between p and q that `divergence` names


Teacher = Tensor | Sequence[Tensor] | None  # one model's tensor, or one per model of a mix


def token_stats(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    teacher_hidden: Teacher = None,
    teacher_head: Teacher = None,
    *,
    teacher_mix: Sequence[float] = (1.0,),
    divergence: Divergence = Divergence(),
    temperature: float = 1.0,
) -> TokenStats:
    """TokenStats of `targets` [T] under p = softmax(hidden·headᵀ/temperature) and the teacher's q.

    Differentiable in hidden and head (if they require a gradient); plain scoring under
    torch.no_grad().
    teacher_head: None if the teacher shares the student's head. For a teacher whose logits are
    Σ_i mix_i·(logits of model i), give sequences of hidden states and of heads, and teacher_mix.
    Raises ValueError if shapes, dtypes or settings do not fit together, TypeError for a DTensor.
    """
    inputs = Inputs.of(
        hidden, head, targets, teacher_hidden, teacher_head, teacher_mix, divergence, temperature
    )
    stats = RecomputedStats.apply(inputs.settings, hidden, head, targets, *inputs.teacher)
    return TokenStats(*stats)


def head_loss(
    loss_fn: Callable,
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    tokens: NamedTuple | None,
    teacher_hidden: Teacher = None,
    teacher_head: Teacher = None,
    *,
    teacher_mix: Sequence[float] = (1.0,),
    divergence: Divergence = Divergence(),
    temperature: float = 1.0,
) -> tuple[Tensor, TokenStats]:
    """Σ_t loss_fn(stats, tokens)_t and the (detached) TokenStats. Other arguments as token_stats.

    loss_fn: (TokenStats of C tokens, the same tokens' entries of `tokens`) → their losses [C]. It
    is called once per chunk, so the loss of a token must not depend on other tokens.
    tokens: a NamedTuple of [T] tensors or Nones.
    A token whose loss has no gradient (weight 0) may have NaN hidden states: it contributes nothing
    to the loss or to any gradient.
    Raises what token_stats raises, and ValueError if loss_fn does not return one value per token.
    """
    inputs = Inputs.of(
        hidden, head, targets, teacher_hidden, teacher_head, teacher_mix, divergence, temperature
    )
    recording = torch.is_grad_enabled()
    wanted = (recording and hidden.requires_grad, recording and head.requires_grad)
    loss, *stats = FusedLoss.apply(hidden, head, inputs, loss_fn, tokens, wanted)
    return loss, TokenStats(*stats)


# -------------------------------------------------------------------------------------------------
# the two ways through autograd
# -------------------------------------------------------------------------------------------------
class RecomputedStats(torch.autograd.Function):
    """TokenStats as tensors of the graph. Only the inputs are kept; the backward computes the
    logits a second time."""

    @staticmethod
    def forward(ctx, settings, hidden, head, targets, *teacher):
        inputs = Inputs(hidden, head, targets, teacher, settings)
        parts = [chunk.stats for _, chunk in chunks(inputs)]
        stats = concatenated(parts, inputs)
        ctx.save_for_backward(hidden, head, targets, *teacher)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        constant = [stats.teacher_logp, stats.teacher_entropy, stats.teacher_greedy]
        if not teacher:
            constant.append(stats.kl)
        ctx.mark_non_differentiable(*constant)
        return tuple(stats)

    @staticmethod
    def backward(ctx, d_logp, d_entropy, _teacher_logp, _teacher_entropy, _teacher_greedy, d_kl):
        refuse_double_backward()
        hidden, head, targets, *teacher = ctx.saved_tensors
        inputs = Inputs(hidden, head, targets, teacher, ctx.settings)
        grads = HeadGradient(inputs, ctx.needs_input_grad[1:3])
        for c, chunk in chunks(inputs):
            upstream = [part(d, c) for d in (d_logp, d_entropy, d_kl)]
            grads.add(c, chunk, *upstream)
        d_hidden, d_head = grads.result()
        constant = [None] * len(teacher)
        return None, d_hidden, d_head, None, *constant


class FusedLoss(torch.autograd.Function):
    """The loss, and its gradient while a chunk's logits are in memory. The backward scales it."""

    @staticmethod
    def forward(ctx, hidden, head, inputs, loss_fn, tokens, wanted):
        grads = HeadGradient(inputs, wanted)
        loss = hidden.new_zeros((), dtype=wide_dtype(hidden.dtype))
        parts = []
        for c, chunk in chunks(inputs):
            defined = chunk.stats if inputs.teacher else chunk.stats[:2]
            has_nan = torch.stack(defined).isnan().any(0)  # [C]
            losses, upstream = losses_and_gradients(loss_fn, chunk.stats, part(tokens, c), has_nan)
            if upstream[2] is not None and not inputs.teacher:
                raise ValueError("loss_fn uses kl, but head_loss was given no teacher_hidden")
            counted_nan = has_nan & ~no_gradient(upstream, has_nan)
            loss += losses.masked_fill(counted_nan, torch.nan).sum()
            if any(wanted):
                grads.add(c, chunk, *upstream)
            parts.append(chunk.stats)
        stats = concatenated(parts, inputs)
        ctx.grads = grads.result()
        ctx.mark_non_differentiable(*stats)
        return loss, *stats

    @staticmethod
    def backward(ctx, d_loss, *_):
        refuse_double_backward()
        if ctx.grads is None:
            raise RuntimeError("head_loss has one backward: the forward computed the gradient, and "
                               "the first backward used it up. Call head_loss again, or use "
                               "token_stats, whose backward computes the gradient anew")
        grads, ctx.grads = ctx.grads, None
        # reading d_loss on a GPU would wait for all queued work, so there it is always multiplied
        if d_loss.is_cuda or d_loss != 1:
            for grad in grads:
                if grad is not None:
                    grad.mul_(d_loss)
        return *grads, None, None, None, None


def losses_and_gradients(loss_fn: Callable, stats: TokenStats, tokens: NamedTuple | None,
                         has_nan: Tensor) -> tuple[Tensor, Sequence[Tensor | None]]:
    """The losses of a chunk, detached, and their gradients by logp, entropy and kl, each [C].

    loss_fn sees 0 instead of NaN: if a token has weight 0, 0·NaN would make its loss NaN. The
    caller restores the NaN of tokens that count.
    """
    finite = TokenStats._make(x.masked_fill(has_nan, 0) for x in stats)
    variables = [finite.logp, finite.entropy, finite.kl]
    for x in variables:
        x.requires_grad_()
    with torch.enable_grad():
        losses = loss_fn(finite, tokens)
        if losses.shape != has_nan.shape:
            raise ValueError(f"loss_fn must return one loss per token, [{len(has_nan)}], not "
                             f"{list(losses.shape)}")
        upstream = [None, None, None]
        if losses.requires_grad:
            upstream = torch.autograd.grad(losses.sum(), variables, allow_unused=True)
    return losses.detach(), upstream


def part(x, c: slice):
    """The chunk c of a tensor [T], or of each tensor in a NamedTuple; None stays None."""
    if x is None:
        return None
    if isinstance(x, Tensor):
        return x[c]
    return x._make(part(field, c) for field in x)


def refuse_double_backward() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError("token_stats and head_loss can be differentiated once: no "
                           "create_graph=True through them")


# -------------------------------------------------------------------------------------------------
# a chunk of tokens: logits → statistics → gradient of the logits
# -------------------------------------------------------------------------------------------------
class Settings(NamedTuple):
    mix: Sequence[float]  # the weight of each teacher model's logits
    divergence: Divergence
    s: float  # 1/temperature


class Inputs(NamedTuple):
    """The checked arguments of token_stats and head_loss."""

    hidden: Tensor  # [T, D]
    head: Tensor  # [V, D]
    targets: Tensor  # [T]
    teacher: Sequence[Tensor]  # hidden states and head of each teacher model in turn; may be empty
    settings: Settings

    @classmethod
    def of(cls, hidden, head, targets, teacher_hidden, teacher_head, mix, divergence,
           temperature) -> Inputs:
        check(hidden, head, targets, "")
        divergence.check()
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, not {temperature}")
        settings = Settings(mix, divergence, 1.0 / temperature)
        teacher = []
        if teacher_hidden is None:
            return cls(hidden, head, targets, teacher, settings)
        if teacher_head is None:
            teacher_head = head
        hiddens, heads = as_list(teacher_hidden), as_list(teacher_head)
        if len(heads) == 1:  # all models share a head
            heads = heads * len(hiddens)
        if not len(hiddens) == len(heads) == len(mix):
            raise ValueError("a mixed teacher needs a teacher_hidden, a teacher_head and a "
                             f"teacher_mix for each model, not {len(hiddens)}, {len(heads)} and "
                             f"{len(mix)}")
        for h, w in zip(hiddens, heads):
            check(h, w, targets, "teacher_")
            if w.shape[0] != head.shape[0]:
                raise ValueError(f"teacher_head has {w.shape[0]} vocabulary entries and head has "
                                 f"{head.shape[0]}: cut both to the entries that they share")
            teacher += [h.detach(), w.detach()]
        return cls(hidden, head, targets, teacher, settings)


def as_list(x: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [x] if isinstance(x, Tensor) else list(x)


def check(hidden: Tensor, head: Tensor, targets: Tensor, who: str) -> None:
    """Raise TypeError for a DTensor, ValueError for shapes or dtypes that do not fit together.

    who: the prefix of the arguments' names in the message, "" or "teacher_".
    """
    if hasattr(head, "full_tensor"):
        raise TypeError(f"{who}head is a DTensor, one rank's share of a weight: call this inside "
                        "the forward of the FSDP module that owns it, where the weight is whole")
    matrices = hidden.ndim == 2 and head.ndim == 2
    if not matrices or hidden.shape[1] != head.shape[1]:
        raise ValueError(f"{who}hidden must be [T, D] and {who}head [V, D], not "
                         f"{list(hidden.shape)} and {list(head.shape)}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets must be [{hidden.shape[0]}], one for each {who}hidden, not "
                         f"{list(targets.shape)}")
    known = (torch.bfloat16, torch.float32, torch.float64)
    if hidden.dtype != head.dtype or hidden.dtype not in known:
        raise ValueError(f"{who}hidden and {who}head must both be bfloat16, float32 or float64, "
                         f"not {hidden.dtype} and {head.dtype}: cast one of them")


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, statistics and sums over tokens: fp32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def chunk_size(inputs: Inputs) -> int:
    """Tokens per chunk: their logits fill CHUNK_BYTES at most, and chunks are about equal."""
    tokens, vocabulary = len(inputs.hidden), len(inputs.head)
    if tokens == 0:
        return 1
    room = CHUNK_BYTES.get(inputs.hidden.device.type, CHUNK_BYTES["cpu"])
    most = max(1, room // (4 * vocabulary))
    count = math.ceil(tokens / most)
    return math.ceil(tokens / count)


def chunks(inputs: Inputs) -> Iterator[tuple[slice, Chunk]]:
    """The tokens in order, chunk by chunk. All chunks share one buffer, so a Chunk is valid only
    until the next one is computed."""
    hidden, head, targets, teacher, settings = inputs
    size, vocabulary = chunk_size(inputs), len(head)
    student_logits = logits_buffer(hidden, size, vocabulary)
    if teacher:
        teacher_logits = logits_buffer(teacher[0], size, vocabulary)
    for start in range(0, len(hidden), size):
        c = slice(start, min(start + size, len(hidden)))
        tokens = c.stop - c.start
        z, zt = student_logits[:tokens], None
        multiply(z, hidden[c], head.T)
        if teacher:
            zt = teacher_logits[:tokens]
            beta = 0.0  # the first product overwrites the buffer, the others are added
            for i, share in enumerate(settings.mix):
                h, w = teacher[2 * i], teacher[2 * i + 1]
                multiply(zt, h[c], w.T, alpha=share, beta=beta)
                beta = 1.0
        yield c, Chunk(z, zt, targets[c], settings)


def logits_buffer(hidden: Tensor, tokens: int, vocabulary: int) -> Tensor:
    """Uninitialised logits [tokens, V]. Rows are 32 numbers apart: if V is a multiple of 1,024, all
    rows would otherwise start in the same few cache lines."""
    dtype = wide_dtype(hidden.dtype)
    padded = torch.empty(tokens, vocabulary + 32, dtype=dtype, device=hidden.device)
    return padded[:, :vocabulary]


def multiply(out: Tensor, a: Tensor, b: Tensor, *,
             alpha: float = 1.0, beta: float = 0.0) -> None:
    """out ← alpha·a·b + beta·out. bf16 a and b give an fp32 out: at full speed on CUDA, elsewhere
    by conversion to fp32."""
    factors = {"alpha": alpha, "beta": beta}
    if a.dtype == b.dtype == out.dtype:
        out.addmm_(a, b, **factors)
    elif out.is_cuda:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out, **factors)
    else:
        wide_a, wide_b = a.to(out.dtype), b.to(out.dtype)
        out.addmm_(wide_a, wide_b, **factors)


class Chunk:
    """The logits z, zt [C, V] of some tokens. The constructor computes their TokenStats;
    `gradient` may be called once after it, because both overwrite the logits."""

    def __init__(self, z: Tensor, zt: Tensor | None, y: Tensor, settings: Settings):
        self.z, self.zt, self.y = z, zt, y
        self.s = settings.s
        divergence = None
        if zt is not None:
            divergence = settings.divergence
        self.rows = backend(z, divergence)
        self.buckets = None
        if divergence is not None and divergence.top_k > 0:
            self.buckets = Buckets(z, zt, divergence, self.s, self.rows.log_sum)
            divergence = None  # none over the whole vocabulary
        self.divergence = divergence
        self.row = self.rows.statistics(z, zt, y, self.s, divergence)
        kl = self.row.kl
        if self.buckets is not None:
            kl = self.buckets.row.kl
        self.stats = TokenStats(*self.row[:5], kl)

    def gradient(self, upstream: Upstream, out: Tensor) -> None:
        """Write ∂L/∂z to out [C, V]."""
        d_kl = upstream.kl
        over_buckets = d_kl is not None and self.buckets is not None
        if over_buckets:
            upstream = upstream._replace(kl=None, p_weight=self.buckets.tail_weight(d_kl))
        elif d_kl is not None:
            p_weight = torch.where(d_kl == 0, 0, d_kl * self.row.slope)
            upstream = upstream._replace(p_weight=p_weight)
        logits = (self.z, self.zt, self.y, self.s)
        self.rows.gradient(*logits, self.divergence, self.row, upstream, out)
        if over_buckets:
            self.write_kept(d_kl, upstream, out)

    def write_kept(self, d_kl: Tensor, upstream: Upstream, out: Tensor) -> None:
        """Overwrite the K entries in out [C, V]: each is written once, with all of its terms.

        Subtracting the tail's term from them would lose digits: it may be a thousand times their
        own gradient, and out may be bf16.
        """
        index, row = self.buckets.index, self.row
        top, log_sum = row.top[:, None], row.log_sum[:, None]
        log_p = self.s * (self.buckets.kept - top) - log_sum
        of_kl = self.buckets.kept_gradient(d_kl)
        dz = rows_torch.entries(index, log_p, of_kl, self.y, row, upstream)
        dz = self.s * dz
        unused = no_gradient((upstream.logp, upstream.entropy, d_kl), self.y)
        dz = dz.masked_fill(unused[:, None], 0)
        out.scatter_(-1, index, dz.to(out.dtype))


class Buckets:
    """A divergence over K entries of the vocabulary and, with a tail, all others as one more.

    The tail's logit is the log-sum-exp of the others' logits. The softmax of these K + 1 logits has
    the probabilities of the K entries and of the tail. So the same code runs on K + 1 logits
    instead of V.
    """

    def __init__(self, z: Tensor, zt: Tensor, divergence: Divergence, s: float,
                 log_sum: Callable):
        k = min(divergence.top_k, z.shape[1])
        self.tail = divergence.tail
        ranked = z if divergence.support == "student" else zt
        self.index = ranked.topk(k, sorted=False).indices  # [C, K]
        kept = z.gather(-1, self.index)
        self.kept = kept.clamp_(min=FLOOR)  # the student's logits, [C, K]
        logits_of_both = []  # student, teacher
        for full in (z, zt):
            kept = full.gather(-1, self.index)
            origin = kept.amax(-1)
            logits = kept - origin[:, None]
            if self.tail:  # summed over the others: 1 − Σ_K p has few digits if the tail is thin
                full.scatter_(-1, self.index, FLOOR)
                tail = log_sum(full, s, origin)
                logits = torch.cat([logits, tail[:, None]], -1)
                full.scatter_(-1, self.index, kept)
            logits_of_both.append(logits)
        any_target = torch.zeros_like(self.index[:, 0])
        self.row = rows_torch.statistics(*logits_of_both, any_target, s, divergence)
        # [C, K] or [C, K + 1]: `statistics` has overwritten the logits with these
        self.p, self.slope = logits_of_both

    def tail_weight(self, d_kl: Tensor) -> Tensor:
        """Upstream.p_weight of the divergence for the entries of the tail, [C]."""
        if not self.tail:
            return torch.zeros_like(d_kl)
        p = self.p[:, -1]
        per_p = self.row.slope - self.slope[:, -1] / p
        defined = (p > 0) & (d_kl != 0)
        return torch.where(defined, d_kl * per_p, 0)

    def kept_gradient(self, d_kl: Tensor) -> Tensor:
        """The divergence's term in ∂L/∂z_j/s of the K entries, [C, K]."""
        k = self.index.shape[1]
        p, slope = self.p[:, :k], self.slope[:, :k]
        d_kl = d_kl[:, None]
        per_kl = slope - p * self.row.slope[:, None]
        return torch.where(d_kl == 0, 0, d_kl * per_kl)


def backend(z: Tensor, divergence: Divergence | None):
    """The module that processes rows of logits: rows_triton for fp32 logits on CUDA, otherwise
    rows_torch. A divergence that is a Python function always runs in rows_torch."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    on_triton = z.dtype == torch.float32 and (z.is_cuda or interpreted)
    custom = divergence is not None and callable(divergence.kind)
    if not on_triton or custom:
        return rows_torch
    from kernels import rows_triton  # imported late: triton need not be installed on a CPU

    return rows_triton


def concatenated(parts: list[TokenStats], inputs: Inputs) -> TokenStats:
    """The statistics of all chunks, each [T]."""
    if not parts:
        dtype = wide_dtype(inputs.hidden.dtype)
        return TokenStats(*inputs.hidden.new_empty(6, 0, dtype=dtype))
    return TokenStats(*map(torch.cat, zip(*parts)))


class HeadGradient:
    """Gradients of hidden [T, D] and of head [V, D], summed chunk by chunk in wide_dtype.

    wanted: whether hidden and head need theirs.
    """

    def __init__(self, inputs: Inputs, wanted: Sequence[bool]):
        self.hidden, self.head = inputs.hidden, inputs.head
        dtype = wide_dtype(self.hidden.dtype)
        self.d_hidden = self.d_head = None
        if wanted[0]:
            self.d_hidden = torch.empty_like(self.hidden, dtype=dtype)
        if wanted[1]:
            self.d_head = torch.empty_like(self.head, dtype=dtype)
        self.unused = torch.zeros_like(inputs.targets, dtype=torch.bool)  # tokens without gradient
        # dz of the tokens from `start` on, if dz is not written over z
        self.group, self.start = None, 0

    def add(self, c: slice, chunk: Chunk, d_logp: Tensor | None, d_entropy: Tensor | None,
            d_kl: Tensor | None) -> None:
        """Add what the tokens c contribute, given ∂L/∂(their statistics), each [C]."""
        self.unused[c] = no_gradient((d_logp, d_entropy, d_kl), self.unused[c])
        zeros = torch.zeros_like(chunk.row.logp)
        if d_logp is None:
            d_logp = zeros
        upstream = Upstream(d_logp, d_entropy, d_kl, p_weight=zeros)
        dtype = dz_dtype(self.hidden)
        if dtype == chunk.z.dtype:
            chunk.gradient(upstream, chunk.z)
            self.multiply(c, chunk.z)
            return
        size, tokens = c.stop - c.start, len(self.hidden)
        if self.group is None:
            rows = min(GROUP * size, tokens)
            self.group = chunk.z.new_empty(rows, len(self.head), dtype=dtype)
        filled = c.stop - self.start
        chunk.gradient(upstream, self.group[c.start - self.start : filled])
        if c.stop == tokens or filled + size > len(self.group):
            tokens_in_group = slice(self.start, c.stop)
            self.multiply(tokens_in_group, self.group[:filled])
            self.start = c.stop

    def multiply(self, c: slice, dz: Tensor) -> None:
        """d_hidden[c] ← dz·head and d_head ← d_head + dzᵀ·hidden[c], for dz [C, V]."""
        if self.d_hidden is not None:
            multiply(self.d_hidden[c], dz, self.head)
        if self.d_head is not None:
            # dz of an unused token is 0, but 0 times a NaN in its hidden state would be NaN
            hidden = self.hidden[c].masked_fill(self.unused[c, None], 0)
            beta = 0.0 if c.start == 0 else 1.0  # the first product overwrites
            multiply(self.d_head, dz.T, hidden, beta=beta)

    def result(self) -> list[Tensor | None]:
        """The gradients of hidden and head in their own dtype; None if not wanted."""
        self.group = None
        if self.d_head is not None and len(self.hidden) == 0:
            self.d_head.zero_()
        both, dtype = (self.d_hidden, self.d_head), self.hidden.dtype
        return [None if d is None else d.to(dtype) for d in both]


def dz_dtype(hidden: Tensor) -> torch.dtype:
    """bf16 on CUDA, where a product of bf16 with an fp32 result is fast. Elsewhere the dtype of the
    logits, so that dz can overwrite them."""
    return hidden.dtype if hidden.is_cuda else wide_dtype(hidden.dtype)


def no_gradient(upstream: Sequence[Tensor | None], like: Tensor) -> Tensor:
    """The tokens that no gradient reaches, [C] bool."""
    out = torch.ones_like(like, dtype=torch.bool)
    for d in upstream:
        if d is not None:
            out &= d == 0
    return out
