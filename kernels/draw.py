"""Sampling from logits: temperature, top-k, top-p, and the log-probability in the distribution that was drawn from."""
import torch
from torch import Tensor


def draw(logits: Tensor, uniform: Tensor, temperature: float, top_p: float, top_k: int) -> tuple[Tensor, Tensor]:
    """One token for each row of logits [B, V] by inversion of its cumulative distribution at uniform [B] in [0, 1).

    → token [B] and its log-probability [B] in the distribution drawn from (after temperature, top-k and top-p).

    >>> draw(torch.tensor([[0.0, 0.0]]), torch.tensor([0.6]), 1.0, 1.0, 0)
    (tensor([1]), tensor([-0.6931]))
    """
    if temperature == 0:
        return logits.argmax(-1), torch.zeros_like(logits[:, 0])
    logp = (logits / temperature).log_softmax(-1)
    if top_k > 0:
        logp = logp.masked_fill(logp < logp.topk(min(top_k, logp.shape[-1])).values[:, -1:], -torch.inf).log_softmax(-1)
    if top_p < 1:
        ranked, order = logp.sort(-1, descending=True)
        before = ranked.exp().cumsum(-1) - ranked.exp()  # mass of the likelier tokens; the first is always kept
        logp = logp.scatter(-1, order, ranked.masked_fill(before >= top_p, -torch.inf)).log_softmax(-1)
    mass = logp.exp().cumsum(-1)
    total = mass[:, -1]
    target = torch.minimum(uniform.to(mass.dtype) * total, total.nextafter(torch.zeros_like(total)))  # below the end
    token = torch.searchsorted(mass, target[:, None], right=True)  # the first with mass > target: its p is positive
    return token[:, 0], logp.gather(-1, token)[:, 0]
