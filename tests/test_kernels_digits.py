"""Digits of every entry of dz, from the hidden states on: confident students, thin tails, top K.

The oracle below is float64 and has one row and one bucket at a time; it shares nothing with
kernels/. Every token has a hidden coordinate of its own that no logit depends on, so that a column
of the head's gradient is that token's dz.
"""
import math
from typing import NamedTuple

import pytest
import torch
from test_kernels import TRITON
from torch import Tensor

from kernels import head as head_module
from kernels.divergence import Divergence
from kernels.head import TokenStats, head_loss, token_stats

VOCABULARY = 140 if TRITON else 300  # more than two blocks of each backend
TAILS = (1e-9,) if TRITON else (1e-2, 1e-4, 1e-7, 1e-9)
NAMED = 3  # coordinates of the hidden states that stand for something; then noise, then tokens
NOISE = 6


class Weights(NamedTuple):
    logp: Tensor
    entropy: Tensor
    kl: Tensor


class Case(NamedTuple):
    hidden: Tensor  # [T, D]
    head: Tensor  # [V, D]
    y: Tensor  # [T]
    teacher_hidden: Tensor
    weights: Weights


def confident(k: int, seed: int = 0) -> Case:
    """Students whose mass outside of their k likeliest entries is each of TAILS, peaked on one of
    the k or flat over them; teachers close by, and one that is flat; targets in and out of the k.
    """
    g = torch.Generator().manual_seed(seed)
    noise = torch.randn(VOCABULARY, NOISE, generator=g).double() * 0.3
    kept = torch.zeros(VOCABULARY).double()
    kept[torch.randperm(VOCABULARY, generator=g)[:k]] = 1
    members = kept.nonzero()[:, 0]
    mode = torch.zeros(VOCABULARY).double()
    mode[members[0]] = 1
    outside = (kept == 0).nonzero()[:, 0]
    students, teachers, targets = [], [], []
    for tail in TAILS:
        for on_mode in (0.0, 12.0):
            for agrees in (True, False):
                for y in (members[0], members[-1], outside[5]):
                    h = torch.randn(NOISE, generator=g).double()
                    z = noise @ h + on_mode * mode
                    ratio = z[members].logsumexp(0) - z[outside].logsumexp(0)
                    on_kept = math.log((1 - tail) / tail) - ratio
                    near = h + 0.2 * torch.randn(NOISE, generator=g).double()
                    students.append([on_mode, on_kept, 0.0, *h])
                    if agrees:
                        teachers.append([on_mode - 0.3, on_kept + 0.5, 0.0, *near])
                    else:
                        teachers.append([1.0, 1.0, 0.0, *near])
                    targets.append(y)
    tokens = len(targets)
    named = torch.stack([mode, kept, torch.zeros_like(mode)], -1)
    head = torch.cat([named, noise, torch.zeros(VOCABULARY, tokens)], -1).float()
    own = torch.eye(tokens)
    hidden = torch.cat([torch.tensor(students, dtype=torch.float64), own], -1).float()
    teacher = torch.cat([torch.tensor(teachers, dtype=torch.float64), own], -1).float()
    weights = Weights(*torch.randn(3, tokens, generator=g))
    return Case(hidden.requires_grad_(), head.requires_grad_(), torch.stack(targets), teacher,
                weights)


def loss_of(token: TokenStats, weights: Weights) -> Tensor:
    return weights.logp * token.logp + weights.entropy * token.entropy + weights.kl * token.kl


# -------------------------------------------------------------------------------------------------
# the oracle
# -------------------------------------------------------------------------------------------------
def summands(p: Tensor, q: Tensor, d: Divergence) -> Tensor:
    """Of probabilities p and q of some buckets, as the papers print the divergences."""
    reverse, forward = p * (p / q).log(), q * (q / p).log()
    if d.kind == "reverse_kl":
        return reverse
    if d.kind == "forward_kl":
        return forward if d.clip is None else forward.clamp(max=d.clip)
    if d.kind == "mixed_kl":
        return d.beta * reverse + (1 - d.beta) * forward
    m = d.beta * q + (1 - d.beta) * p
    return d.beta * q * (q / m).log() + (1 - d.beta) * p * (p / m).log()


def row_parts(z: Tensor, zt: Tensor, y: int, d: Divergence) -> list[Tensor]:
    """log p_y, H(p) and the divergence."""
    log_p, log_q = z.log_softmax(0), zt.log_softmax(0).detach()
    p, q = log_p.exp(), log_q.exp()
    by = z if d.support == "student" else zt
    if d.top_k:
        order = by.argsort(descending=True)
        kept, others = order[: d.top_k], order[d.top_k :]
        tail = [p[others].sum()[None], q[others].sum()[None]]
        p_of, q_of = p[kept], q[kept]
        if d.tail:
            p_of, q_of = torch.cat([p_of, tail[0]]), torch.cat([q_of, tail[1]])
    else:
        p_of, q_of = p, q
    kl = summands(p_of / p_of.sum(), q_of / q_of.sum(), d).sum()
    entropy = -(p * log_p).sum()
    return [log_p[y], entropy, kl]


class Exact(NamedTuple):
    dz: Tensor  # [T, V]
    size: Tensor  # [T, V]: |∂(w·log p_y)/∂z_j| + |∂(w·H)/∂z_j| + |∂(w·kl)/∂z_j|, which may cancel


def exact(c: Case, d: Divergence) -> Exact:
    head, rows, sizes = c.head.detach().double(), [], []
    for t in range(len(c.y)):
        z = (head @ c.hidden[t].detach().double()).requires_grad_()
        zt = head @ c.teacher_hidden[t].double()
        parts = []
        for weight, part in zip(c.weights, row_parts(z, zt, int(c.y[t]), d)):
            (gradient,) = torch.autograd.grad(part, z, retain_graph=True)
            parts.append(weight[t].double() * gradient)
        rows.append(sum(parts))
        sizes.append(sum(part.abs() for part in parts))
    return Exact(torch.stack(rows), torch.stack(sizes))


# -------------------------------------------------------------------------------------------------
# what is held
# -------------------------------------------------------------------------------------------------
DIVERGENCES = {
    "reverse": Divergence("reverse_kl"),
    "forward": Divergence("forward_kl"),
    "jsd": Divergence("jsd", beta=0.5),
    "mixed": Divergence("mixed_kl", beta=0.3),
    "clipped": Divergence("forward_kl", clip=0.05),
}
if TRITON:  # one of each kind of its kernels: the interpreter takes seconds for each
    DIVERGENCES = {name: DIVERGENCES[name] for name in ("mixed", "jsd", "clipped")}


def ours(c: Case, d: Divergence, way: str) -> tuple[Tensor, Tensor]:
    inputs = c.hidden, c.head, c.y
    if way == "head_loss":
        loss, _ = head_loss(loss_of, *inputs, c.weights, c.teacher_hidden, divergence=d)
    else:
        loss = loss_of(token_stats(*inputs, c.teacher_hidden, divergence=d), c.weights).sum()
    d_hidden, d_head = torch.autograd.grad(loss, (c.hidden, c.head))
    return d_head[:, -len(c.y) :].T.double(), d_hidden.double()


def groups(c: Case, k: int) -> dict[str, Tensor]:
    """Which entries of every row are looked at together, [T, V] each."""
    z = c.hidden.detach().double() @ c.head.detach().double().T
    order = z.argsort(-1, descending=True).argsort(-1)
    target = torch.arange(VOCABULARY) == c.y[:, None]
    return {"the mode": order == 0, "the target": target, "the k likeliest": order < k,
            "the others": order >= k}


def holds(c: Case, k: int, d: Divergence, way: str, tolerance: float) -> None:
    right, head = exact(c, d), c.head.detach().double()
    dz, d_hidden = ours(c, d, way)
    for what, of in groups(c, k).items():
        error = ((dz - right.dz) * of).norm(dim=-1) / (right.size * of).norm(dim=-1)
        assert error.max() < tolerance, (what, d, error)
    error = (d_hidden - right.dz @ head).norm(dim=-1) / (right.size @ head.abs()).norm(dim=-1)
    assert error.max() < tolerance, ("d_hidden", d, error)


# fp32: logits of 20 have errors of 1e-6. bf16: 8 bits; the interpreter of Triton truncates.
TOLERANCE = {"fp32": 2e-5, "bf16": 8e-3 if TRITON else 4e-3}


def rounded(monkeypatch, dz: str) -> None:
    """dz in bf16, as on CUDA, beside fp32 hidden states and heads."""
    if dz == "bf16":
        monkeypatch.setattr(head_module, "dz_dtype", lambda hidden: torch.bfloat16)


CASES = [(name, dz) for name in DIVERGENCES for dz in ("fp32", "bf16")]
if TRITON:
    CASES = [("mixed", "fp32"), ("jsd", "fp32"), ("clipped", "bf16")]


@pytest.mark.parametrize("k", [20] if TRITON else [1, 20, 100])
@pytest.mark.parametrize("name, dz", CASES)
def test_every_entry_of_a_top_k_gradient_is_as_exact_as_its_dtype(monkeypatch, name, dz, k):
    rounded(monkeypatch, dz)
    c = confident(k)
    for support in ("student", "teacher"):
        for tail in (True,) if TRITON else (True, False):
            d = DIVERGENCES[name]._replace(top_k=k, support=support, tail=tail)
            holds(c, k, d, "head_loss", TOLERANCE[dz])


@pytest.mark.parametrize("name, dz", CASES)
def test_every_entry_of_a_sure_student_is_exact_over_the_whole_vocabulary(monkeypatch, name, dz):
    rounded(monkeypatch, dz)
    holds(confident(1), 1, DIVERGENCES[name], "token_stats", TOLERANCE[dz])
