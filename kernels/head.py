"""From hidden states to per-token quantities of the vocabulary distribution, without [T, V] logits.

    token_stats(hidden, head, targets, …)
        differentiable tensors [T]; the backward makes the logits again
    head_loss(loss_fn, hidden, head, targets, tokens, …)
        a scalar; loss_fn runs while a chunk's logits are at hand

T tokens, D hidden width, V vocabulary. hidden [T, D] and head [V, D] (the weight of lm_head) are
the student's. Given a teacher's hidden states, the same pass over the logits also yields the
teacher's log-probabilities and a divergence between student p and teacher q. Gradients go to the
student only. Logits are made one chunk of tokens at a time and are gone before the next chunk. They
are fp32 when hidden and head are bf16 too, and float64 when those are.

Both calls give the same numbers. With a teacher, head_loss takes 4 matrix products of the size
[T, D]·[D, V] (3 with a frozen head) and token_stats takes 6. But the loss of head_loss must be a
sum over tokens whose normalisers are known beforehand.

Rows of logits are worked on by rows_triton.py on CUDA and by rows_torch.py elsewhere. With
TRITON_INTERPRET=1 in the environment, rows_triton.py runs on a CPU, slowly, for tests. The
mathematics is in docs/kernels.md.
"""
from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import rows_torch
from kernels.divergence import Divergence
from kernels.rows_torch import FLOOR, Upstream

# Logits of one model at a time. On CUDA 1,024 tokens of V = 151,936: enough for a full-speed
# product. On a CPU enough that reading the head and its gradient again per chunk costs little.
CHUNK_BYTES = {"cuda": 640 * 2**20, "cpu": 144 * 2**20}
# Chunks whose bf16 gradients are multiplied together. dz·head of one chunk alone has too few tiles
# for a large GPU, and every product for the head's gradient reads and writes all of it.
GROUP = 4


class TokenStats(NamedTuple):
    """Per-token quantities, each [T], in nats. Without a teacher the last four are NaN."""

    logp: Tensor  # log p(y), the student's log-probability of the target
    entropy: Tensor  # H(p)
    teacher_logp: Tensor  # log q(y); no gradient
    teacher_entropy: Tensor  # H(q); no gradient
    teacher_greedy: Tensor  # 1 when y is the teacher's most likely token; no gradient
    kl: Tensor  # the divergence between p and q that was asked for


Teacher = Tensor | Sequence[Tensor] | None


def token_stats(hidden: Tensor, head: Tensor, targets: Tensor, teacher_hidden: Teacher = None,
                teacher_head: Teacher = None, *, teacher_mix: Sequence[float] = (1.0,),
                divergence: Divergence = Divergence(), temperature: float = 1.0) -> TokenStats:
    """TokenStats of `targets` [T] under p = softmax(hidden·headᵀ/temperature) and the teacher's q.

    Differentiable in hidden and head (if they require a gradient); plain scoring under
    torch.no_grad().
    teacher_head: None when the teacher has the student's head. A teacher whose logits are
    Σ_i mix_i·(logits of model i) is given as sequences of hidden states and of heads, with
    teacher_mix.
    Raises ValueError when shapes, dtypes or settings do not fit together.
    """
    inputs = Inputs.of(hidden, head, targets, teacher_hidden, teacher_head, teacher_mix, divergence,
                       temperature)
    stats = RecomputedStats.apply(inputs.settings, hidden, head, targets, *inputs.teacher)
    return TokenStats(*stats)


def head_loss(loss_fn: Callable, hidden: Tensor, head: Tensor, targets: Tensor,
              tokens: NamedTuple | None, teacher_hidden: Teacher = None,
              teacher_head: Teacher = None, *, teacher_mix: Sequence[float] = (1.0,),
              divergence: Divergence = Divergence(),
              temperature: float = 1.0) -> tuple[Tensor, TokenStats]:
    """Σ_t loss_fn(stats, tokens)_t and the (detached) TokenStats. Other arguments as token_stats.

    loss_fn: (TokenStats of some tokens, the same tokens' entries of `tokens`) → their losses, a
    tensor of that length. It is called once per chunk, so it must treat every token by itself.
    tokens: a NamedTuple of [T] tensors or Nones.
    A token to which loss_fn gives no gradient (weight 0) may have NaN hidden states: it adds
    nothing anywhere.
    Raises ValueError as token_stats does, and when loss_fn does not return one value per token.
    """
    inputs = Inputs.of(hidden, head, targets, teacher_hidden, teacher_head, teacher_mix, divergence,
                       temperature)
    wanted = tuple(x.requires_grad and torch.is_grad_enabled() for x in (hidden, head))
    loss, *stats = FusedLoss.apply(hidden, head, inputs, loss_fn, tokens, wanted)
    return loss, TokenStats(*stats)


# -------------------------------------------------------------------------------------------------
# the two ways through autograd
# -------------------------------------------------------------------------------------------------
class RecomputedStats(torch.autograd.Function):
    """TokenStats as tensors of the graph. Only the inputs are kept; the backward makes the logits
    a second time."""

    @staticmethod
    def forward(ctx, settings, hidden, head, targets, *teacher):
        inputs = Inputs(hidden, head, targets, teacher, settings)
        stats = joined([chunk.stats for _, chunk in chunks(inputs)], inputs)
        ctx.save_for_backward(hidden, head, targets, *teacher)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*stats[2:5], *([] if teacher else [stats.kl]))
        return tuple(stats)

    @staticmethod
    def backward(ctx, d_logp, d_entropy, _teacher_logp, _teacher_entropy, _teacher_greedy, d_kl):
        refuse_double_backward()
        hidden, head, targets, *teacher = ctx.saved_tensors
        inputs = Inputs(hidden, head, targets, teacher, ctx.settings)
        grads = HeadGradient(inputs, ctx.needs_input_grad[1:3])
        for c, chunk in chunks(inputs):
            grads.add(c, chunk, *(None if d is None else d[c] for d in (d_logp, d_entropy, d_kl)))
        return None, *grads.result(), *[None] * (1 + len(teacher))


class FusedLoss(torch.autograd.Function):
    """The loss and, while a chunk's logits are at hand, its gradient. The backward scales it."""

    @staticmethod
    def forward(ctx, hidden, head, inputs, loss_fn, tokens, wanted):
        grads = HeadGradient(inputs, wanted)
        loss = torch.zeros((), dtype=wide(hidden.dtype), device=hidden.device)
        parts = []
        for c, chunk in chunks(inputs):
            # loss_fn sees 0 instead of NaN, for 0·NaN is NaN; the loss of a token that does count
            # becomes NaN again
            broken = torch.stack(chunk.stats[: 6 if inputs.teacher else 2]).isnan().any(0)
            shown = TokenStats(*(x.masked_fill(broken, 0) for x in chunk.stats))
            variables = [x.requires_grad_() for x in (shown.logp, shown.entropy, shown.kl)]
            with torch.enable_grad():
                losses = loss_fn(shown, of_chunk(tokens, c))
                if losses.shape != broken.shape:
                    raise ValueError(f"loss_fn must return one loss a token, [{len(broken)}], "
                                     f"not {list(losses.shape)}")
                upstream = [None] * 3
                if losses.requires_grad:
                    upstream = torch.autograd.grad(losses.sum(), variables, allow_unused=True)
            if upstream[2] is not None and not inputs.teacher:
                raise ValueError("loss_fn uses kl, but head_loss was given no teacher_hidden")
            loss += losses.detach().masked_fill(broken & ~silent(upstream, broken), torch.nan).sum()
            if any(wanted):
                grads.add(c, chunk, *upstream)
            parts.append(chunk.stats)
        stats = joined(parts, inputs)
        ctx.grads = grads.result()
        ctx.mark_non_differentiable(*stats)
        return loss, *stats

    @staticmethod
    def backward(ctx, d_loss, *_):
        refuse_double_backward()
        if ctx.grads is None:
            raise RuntimeError("head_loss has one backward: its gradient is made in the forward "
                               "and given away. Call it again, or use token_stats, which makes "
                               "the gradient anew")
        grads, ctx.grads = ctx.grads, None
        # On a GPU, to look at d_loss is to wait for all that came before.
        if d_loss.is_cuda or d_loss != 1:
            grads = [None if g is None else g.mul_(d_loss) for g in grads]
        return *grads, None, None, None, None


def of_chunk(tokens: NamedTuple | None, c: slice) -> NamedTuple | None:
    if tokens is None:
        return None
    return tokens._make(x if x is None else x[c] for x in tokens)


def refuse_double_backward() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError("token_stats and head_loss can be differentiated once: no "
                           "create_graph=True through them")


# -------------------------------------------------------------------------------------------------
# a chunk of tokens: logits → statistics → gradient of the logits
# -------------------------------------------------------------------------------------------------
class Settings(NamedTuple):
    mix: Sequence[float]
    divergence: Divergence
    s: float  # 1/temperature


class Inputs(NamedTuple):
    hidden: Tensor
    head: Tensor
    targets: Tensor
    teacher: Sequence[Tensor]  # hidden states and head of each of its models in turn, if any
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
        hiddens = several(teacher_hidden)
        heads = several(head if teacher_head is None else teacher_head)
        heads = heads * len(hiddens) if len(heads) == 1 else heads
        if not len(hiddens) == len(heads) == len(mix):
            raise ValueError("a mixed teacher needs a teacher_hidden, a teacher_head and a "
                             f"teacher_mix for each model, not {len(hiddens)}, {len(heads)} and "
                             f"{len(mix)}")
        for h, w in zip(hiddens, heads):
            check(h, w, targets, "teacher_")
            if w.shape[0] != head.shape[0]:
                raise ValueError(f"teacher_head has {w.shape[0]} vocabulary entries and head "
                                 f"{head.shape[0]}: cut both to the entries that they share")
            teacher += [h.detach(), w.detach()]
        return cls(hidden, head, targets, teacher, settings)


def several(x: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [x] if isinstance(x, Tensor) else list(x)


def check(hidden: Tensor, head: Tensor, targets: Tensor, who: str) -> None:
    if hasattr(head, "full_tensor"):
        raise TypeError(f"{who}head is a DTensor, one rank's share of a weight: call this inside "
                        "the forward of the FSDP module that owns it, where the weight is whole")
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[1]:
        raise ValueError(f"{who}hidden must be [T, D] and {who}head [V, D], not "
                         f"{list(hidden.shape)} and {list(head.shape)}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets must be [{hidden.shape[0]}], one for each {who}hidden, not "
                         f"{list(targets.shape)}")
    known = (torch.bfloat16, torch.float32, torch.float64)
    if hidden.dtype != head.dtype or hidden.dtype not in known:
        raise ValueError(f"{who}hidden and {who}head must both be bfloat16, float32 or float64, "
                         f"not {hidden.dtype} and {head.dtype}: cast one of them")


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, statistics and sums over tokens."""
    return torch.promote_types(dtype, torch.float32)


def chunk_size(inputs: Inputs) -> int:
    """Tokens whose logits fill CHUNK_BYTES at most, in chunks of about equal size."""
    tokens, vocabulary = len(inputs.hidden), len(inputs.head)
    room = CHUNK_BYTES.get(inputs.hidden.device.type, CHUNK_BYTES["cpu"])
    most = max(1, room // (4 * vocabulary))
    return -(-tokens // -(-tokens // most)) if tokens else 1


def chunks(inputs: Inputs) -> Iterator[tuple[slice, Chunk]]:
    """The tokens in order. A Chunk lives until the next one is made: they share their memory."""
    hidden, head, targets, teacher, settings = inputs
    size = chunk_size(inputs)
    # 32 numbers between the rows: if V is a multiple of 1,024, all rows would else start in the
    # same few cache lines
    buffers = []
    for h in (hidden, *teacher[:1]):
        room = torch.empty(size, len(head) + 32, dtype=wide(h.dtype), device=h.device)
        buffers.append(room[:, : len(head)])
    for start in range(0, len(hidden), size):
        c = slice(start, min(start + size, len(hidden)))
        z, *zt = (b[: c.stop - c.start] for b in buffers)
        multiply(z, hidden[c], head.T)
        for i, share in enumerate(settings.mix if teacher else ()):
            h, w = teacher[2 * i : 2 * i + 2]
            multiply(zt[0], h[c], w.T, alpha=share, beta=float(i > 0))
        yield c, Chunk(z, zt[0] if zt else None, targets[c], settings)


def multiply(out: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0, beta: float = 0.0) -> None:
    """out ← alpha·a·b + beta·out. bf16 a and b give an fp32 out at full speed on CUDA; elsewhere
    they are widened."""
    if a.dtype == b.dtype == out.dtype:
        out.addmm_(a, b, alpha=alpha, beta=beta)
    elif out.is_cuda:
        torch.addmm(out, a, b, out_dtype=out.dtype, alpha=alpha, beta=beta, out=out)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype), alpha=alpha, beta=beta)


class Chunk:
    """The logits z, zt [C, V] of some tokens: their TokenStats at once and then, once, the gradient
    of z."""

    def __init__(self, z: Tensor, zt: Tensor | None, y: Tensor, settings: Settings):
        self.z, self.zt, self.y, self.s = z, zt, y, settings.s
        divergence = settings.divergence if zt is not None else None
        self.rows = backend(z, divergence)
        self.buckets = None
        if divergence and divergence.top_k:
            self.buckets = Buckets(z, zt, divergence, self.s, self.rows.log_sum)
            divergence = None  # none over the whole vocabulary
        self.divergence = divergence
        self.row = self.rows.statistics(z, zt, y, self.s, divergence)
        self.stats = TokenStats(*self.row[:5], self.buckets.row.kl if self.buckets else self.row.kl)

    def gradient(self, upstream: Upstream, out: Tensor) -> None:
        """∂L/∂z, into out."""
        d_kl = upstream.kl
        if d_kl is not None and self.buckets:
            upstream = upstream._replace(kl=None, drag=self.buckets.drag(d_kl))
        elif d_kl is not None:
            upstream = upstream._replace(drag=torch.where(d_kl == 0, 0, d_kl * self.row.slope))
        self.rows.gradient(self.z, self.zt, self.y, self.s, self.divergence, self.row, upstream,
                           out)
        if d_kl is not None and self.buckets:
            self.write_kept(d_kl, upstream, out)

    def write_kept(self, d_kl: Tensor, upstream: Upstream, out: Tensor) -> None:
        """Overwrite the K entries in out [C, V]: each is written once, with all of its terms.

        The tail's term is not taken back from them. It may be a thousand times what is left, and
        out may be bf16.
        """
        index, row = self.buckets.index, self.row
        log_p = self.s * (self.buckets.kept - row.top[:, None]) - row.log_sum[:, None]
        pull = self.buckets.pull(d_kl)
        dz = self.s * rows_torch.entries(index, log_p, pull, self.y, row, upstream)
        idle = silent((upstream.logp, upstream.entropy, d_kl), self.y)
        out.scatter_(-1, index, dz.masked_fill(idle[:, None], 0).to(out.dtype))


class Buckets:
    """A divergence over K entries of the vocabulary and, with a tail, all others as one more.

    The tail's logit is the log-sum-exp of the others'. The softmax of these K + 1 logits has the
    probabilities of the K entries and of the tail, so that K + 1 logits take the place of V and
    nothing else changes.
    """

    def __init__(self, z: Tensor, zt: Tensor, divergence: Divergence, s: float, log_sum: Callable):
        k = min(divergence.top_k, z.shape[1])
        self.tail = divergence.tail
        by = z if divergence.support == "student" else zt
        self.index = by.topk(k, sorted=False).indices  # [C, K]
        self.kept = z.gather(-1, self.index).clamp_(min=FLOOR)  # the student's logits, [C, K]
        small = []
        for full in (z, zt):
            kept = full.gather(-1, self.index)
            origin = kept.amax(-1)
            logits = kept - origin[:, None]
            if self.tail:  # summed over the others: 1 − Σ_K p has few digits when the tail is thin
                full.scatter_(-1, self.index, FLOOR)
                logits = torch.cat([logits, log_sum(full, s, origin)[:, None]], -1)
                full.scatter_(-1, self.index, kept)
            small.append(logits)
        any_target = torch.zeros_like(self.index[:, 0])
        self.row = rows_torch.statistics(*small, any_target, s, divergence)
        self.p, self.slope = small  # [C, K] or [C, K + 1]: `statistics` wrote over the logits

    def drag(self, d_kl: Tensor) -> Tensor:
        """What every entry of the tail loses by the divergence, in units of its p_j, [C]."""
        if not self.tail:
            return torch.zeros_like(d_kl)
        p = self.p[:, -1]
        own = self.row.slope - self.slope[:, -1] / p
        return torch.where((p > 0) & (d_kl != 0), d_kl * own, 0)

    def pull(self, d_kl: Tensor) -> Tensor:
        """What the divergence adds to the gradient of the K entries, [C, K]."""
        k = self.index.shape[1]
        own = self.slope[:, :k] - self.p[:, :k] * self.row.slope[:, None]
        return torch.where(d_kl[:, None] == 0, 0, d_kl[:, None] * own)


def backend(z: Tensor, divergence: Divergence | None):
    """rows_triton for fp32 logits on CUDA, else rows_torch; the latter also for a divergence that
    is a Python function."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    on_triton = z.dtype == torch.float32 and (z.is_cuda or interpreted)
    if not on_triton or (divergence and callable(divergence.kind)):
        return rows_torch
    from kernels import rows_triton  # not installed where it is not needed

    return rows_triton


def joined(parts: list[TokenStats], inputs: Inputs) -> TokenStats:
    empty = inputs.hidden.new_empty(6, 0, dtype=wide(inputs.hidden.dtype))
    return TokenStats(*map(torch.cat, zip(*parts))) if parts else TokenStats(*empty)


class HeadGradient:
    """Gradients of hidden [T, D] and of head [V, D], gathered chunk by chunk in fp32."""

    def __init__(self, inputs: Inputs, wanted: Sequence[bool]):
        self.hidden, self.head = inputs.hidden, inputs.head
        dtype = wide(self.hidden.dtype)
        self.d_hidden = torch.empty_like(self.hidden, dtype=dtype) if wanted[0] else None
        self.d_head = torch.empty_like(self.head, dtype=dtype) if wanted[1] else None
        # tokens without gradient, [T]
        self.silent = torch.zeros_like(inputs.targets, dtype=torch.bool)
        # dz of the tokens from start on, if it does not take the place of z
        self.group, self.start = None, 0

    def add(self, c: slice, chunk: Chunk, d_logp: Tensor | None, d_entropy: Tensor | None,
            d_kl: Tensor | None) -> None:
        self.silent[c] = silent((d_logp, d_entropy, d_kl), self.silent[c])
        zeros = torch.zeros_like(chunk.row.logp)
        upstream = Upstream(zeros if d_logp is None else d_logp, d_entropy, d_kl, zeros)
        if dz_dtype(self.hidden) == chunk.z.dtype:
            chunk.gradient(upstream, chunk.z)
            return self.multiply(c, chunk.z)
        size, tokens = c.stop - c.start, len(self.hidden)
        if self.group is None:
            rows = min(GROUP * size, tokens)
            self.group = chunk.z.new_empty(rows, chunk.z.shape[1], dtype=dz_dtype(self.hidden))
        chunk.gradient(upstream, self.group[c.start - self.start : c.stop - self.start])
        if c.stop == tokens or c.stop + size - self.start > len(self.group):
            self.multiply(slice(self.start, c.stop), self.group[: c.stop - self.start])
            self.start = c.stop

    def multiply(self, c: slice, dz: Tensor) -> None:
        if self.d_hidden is not None:
            multiply(self.d_hidden[c], dz, self.head)
        if self.d_head is not None:
            # A silent token's dz is 0, and 0 times a NaN in its hidden state would be NaN.
            hidden = self.hidden[c].masked_fill(self.silent[c, None], 0)
            multiply(self.d_head, dz.T, hidden, beta=float(c.start > 0))

    def result(self) -> list[Tensor | None]:
        self.group = None
        if self.d_head is not None and len(self.hidden) == 0:
            self.d_head.zero_()
        both = (self.d_hidden, self.d_head)
        return [None if d is None else d.to(self.hidden.dtype) for d in both]


def dz_dtype(hidden: Tensor) -> torch.dtype:
    """bf16 if a product of bf16 with an fp32 result is fast; else dz takes the logits' place."""
    return hidden.dtype if hidden.is_cuda else wide(hidden.dtype)


def silent(upstream: Sequence[Tensor | None], like: Tensor) -> Tensor:
    """Which tokens no gradient reaches, [C] bool."""
    out = torch.ones_like(like, dtype=torch.bool)
    for d in upstream:
        out &= d == 0 if d is not None else True
    return out
