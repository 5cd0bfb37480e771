"""What kernels/head.py computes, with full logits and autograd: the page to read first.

Short and slow on purpose: the logits of 8,192 tokens and 152k entries take 5 GB per model. It is
for reading, for doctests, and a second oracle in the tests.
"""
from __future__ import annotations

import torch
from torch import Tensor

from kernels.divergence import Divergence, Pair
from kernels.head import TokenStats


def token_stats(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    divergence: Divergence,
    temperature: float = 1.0,
) -> TokenStats:
    """TokenStats of targets [T] from hidden states [T, D] and heads [V, D] of both models.

    Differentiable in hidden and head.
    """
    logits = hidden @ head.T / temperature  # [T, V]
    teacher_logits = teacher_hidden @ teacher_head.T / temperature
    log_p = logits.log_softmax(-1)
    log_q = teacher_logits.log_softmax(-1).detach()
    p, q = log_p.exp(), log_q.exp()
    y = targets[:, None]
    logp = log_p.gather(-1, y)[:, 0]
    teacher_logp = log_q.gather(-1, y)[:, 0]
    greedy = teacher_logp == log_q.amax(-1)
    return TokenStats(
        logp=logp,
        entropy=entropy(p),
        teacher_logp=teacher_logp,
        teacher_entropy=entropy(q),
        teacher_greedy=greedy.to(logp.dtype),
        kl=divergence_of(divergence, p, q),
    )


def entropy(p: Tensor) -> Tensor:
    """H(p) = −Σ_j p_j log p_j, [T, V] → [T]."""
    return -torch.xlogy(p, p).sum(-1)


def divergence_of(divergence: Divergence, p: Tensor, q: Tensor) -> Tensor:
    """The divergence between student p and teacher q, both [T, V] probabilities, as [T].

    >>> p, q = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.2, 0.2, 0.6]])
    >>> top_1 = divergence_of(Divergence("reverse_kl", top_k=1), p, q)  # and one for the rest
    >>> torch.allclose(top_1, kl(torch.tensor([[0.5, 0.5]]), torch.tensor([[0.2, 0.8]])))
    True
    """
    if divergence.top_k:
        p, q = top_k(divergence, p, q)
    beta = divergence.beta
    if callable(divergence.kind):
        x = q.log() - p.log()
        pair = Pair(p, q, x, gap=q - p)
        value, _ = divergence.kind(pair, divergence)
        return value.sum(-1)
    if divergence.kind == "mixed_kl":
        return beta * kl(p, q) + (1 - beta) * kl(q, p)
    if divergence.kind == "jsd" and 0 < beta < 1:
        m = beta * q + (1 - beta) * p
        return beta * kl(q, m) + (1 - beta) * kl(p, m)
    if divergence.kind == "reverse_kl" or (divergence.kind == "jsd" and beta == 1):
        return kl(p, q)
    if divergence.clip is not None:  # OPSD: each entry's summand is bounded
        bounded = summands(q, p).clamp(max=divergence.clip)
        return bounded.sum(-1)
    return kl(q, p)


def kl(a: Tensor, b: Tensor) -> Tensor:
    """KL(a‖b) = Σ_j a_j (log a_j − log b_j), [T, V] → [T]."""
    return summands(a, b).sum(-1)


def summands(a: Tensor, b: Tensor) -> Tensor:
    """a_j (log a_j − log b_j), [T, V]; 0 if a_j = 0."""
    return torch.xlogy(a, a) - torch.xlogy(a, b)


def top_k(divergence: Divergence, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """p and q over the K likeliest entries: with a tail [T, K + 1], or renormalised [T, K]."""
    likeliest_to = p if divergence.support == "student" else q
    k = min(divergence.top_k, p.shape[-1])
    index = likeliest_to.topk(k).indices
    p = p.gather(-1, index)  # [T, K]
    q = q.gather(-1, index)
    p_mass = p.sum(-1, keepdim=True)
    q_mass = q.sum(-1, keepdim=True)
    if not divergence.tail:
        return p / p_mass, q / q_mass
    if k == likeliest_to.shape[-1]:  # no entry is left for a tail
        return p, q
    p = torch.cat([p, 1 - p_mass], -1)  # [T, K + 1]
    q = torch.cat([q, 1 - q_mass], -1)
    return p, q
