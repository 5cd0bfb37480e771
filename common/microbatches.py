"""Micro-batches: several rollouts as padded tensors, and per-token quantities [T] beside them.

Rows are padded on the right and need no attention mask: under causal attention no real token sees
the padding, and positions count from 0. Masks come from lengths, never from `token != pad`.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from common.settings import Setup

Ids = Sequence[list[int]]  # token ids, one list per rollout of the batch
MOST_PADDING = 0.25  # every row has at least 1 − MOST_PADDING times the tokens of the longest


@dataclass
class Micro:
    """Some rollouts of a batch. [T] counts their response tokens, one rollout after the other."""

    rows: list[int]  # which rollouts of the batch, in the order of their tokens
    lengths: list[int]  # number of response tokens of each
    ids: Tensor  # [B, L] prompt and response; with shared prompts the response alone
    index: Tensor  # [T] position in the flattened ids whose hidden state predicts each token
    targets: Tensor  # [T] the response tokens, end token included
    prefix: Tensor | None = None  # [P, Lp] the different prompts, padded on the left, if shared
    prefix_mask: Tensor | None = None  # [P, Lp] 1 for a token, 0 for padding
    prefix_of: Tensor | None = None  # [B] the prompt of each row
    tokens: int = 0  # that are read, without padding
    pairs: int = 0  # of a token with one that it sees, itself included

    @property
    def padded(self) -> int:
        """Tokens that are read, padding included."""
        prefix = 0 if self.prefix is None else self.prefix.numel()
        return self.ids.numel() + prefix

    @property
    def rollout(self) -> Tensor:
        """[T] which rollout of this micro-batch a token belongs to, 0 … R−1."""
        device = self.ids.device
        lengths = as_long(self.lengths, device)
        order = torch.arange(len(lengths), device=device)
        total = sum(self.lengths)
        return order.repeat_interleave(lengths, output_size=total)

    @property
    def first(self) -> Tensor:
        """[T] True for the first token of each response."""
        rollout = self.rollout
        before = rollout.new_full((1,), -1)
        return rollout.diff(prepend=before) != 0

    def with_prompts(self, prompts: Ids, responses: Ids) -> Micro:
        """The same responses behind other prompts, which are shared if these are."""
        make = padded_right if self.prefix is None else shared_prompts
        return make(prompts, responses, self.rows, self.ids.device)

    def per_token(self, values: Sequence[float] | Tensor) -> Tensor:
        """One value per rollout of the batch ([Q, G] or flat) → one per token [T], in fp32.

        >>> m = Micro([2, 0], [1, 2], *[torch.zeros(3, dtype=torch.long)] * 3)
        >>> m.per_token(torch.tensor([0.5, 9.0, 7.0]))
        tensor([7.0000, 0.5000, 0.5000])
        """
        flat = torch.as_tensor(values, dtype=torch.float32).flatten()
        mine = flat[self.rows].to(self.ids.device)
        return mine[self.rollout]

    def concat(self, values: Sequence[Sequence[float] | Tensor] | None) -> Tensor | None:
        """One sequence per rollout of the batch → their concatenation [T], in fp32; None → None."""
        if values is None:
            return None
        device = self.ids.device
        parts = [torch.empty(0, device=device)]
        for row in self.rows:
            part = torch.as_tensor(values[row], dtype=torch.float32, device=device)
            parts.append(part)
        return torch.cat(parts)

    def split(self, values: Tensor) -> dict[int, Tensor]:
        """Per-token values [T] → {rollout of the batch: its values [|o|]}, on the CPU."""
        parts = values.cpu().split(self.lengths)
        return dict(zip(self.rows, parts))


def micro_batches(prompts: Ids, responses: Ids, kept: Tensor | None, setup: Setup,
                  device: torch.device) -> list[Micro]:
    """Sort rollouts by length and group them into micro-batches.

    kept: a mask over the rollouts, [Q, G] or flat; None keeps all.
    setup: `token_budget`, the padded tokens of a micro-batch at most, and `share_prompts`, with
    which prompts and responses are padded apart.
    A row longer than the budget gets a micro-batch of its own. Every rank gets the same number of
    micro-batches, so that FSDP's collectives match: ranks with fewer split some of theirs or add
    empty ones. A collective.
    """
    sizes = []
    for prompt, response in zip(prompts, responses):
        sizes.append(len(prompt) + len(response))
    rows = list(range(len(sizes)))
    if kept is not None:
        rows = kept.flatten().nonzero().flatten().tolist()
    rows.sort(key=lambda row: -sizes[row])
    bins: list[list[int]] = []
    longest = 0  # of the last bin: its first row
    for row in rows:
        size = sizes[row]
        similar = size >= (1 - MOST_PADDING) * longest
        if bins and similar:
            wider = [*bins[-1], row]
            width = longest
            if setup.share_prompts:
                width = max(len(prompts[i]) for i in wider) + max(len(responses[i]) for i in wider)
            if len(wider) * width <= setup.token_budget:
                bins[-1].append(row)
                continue
        bins.append([row])
        longest = size
    split_evenly(bins)
    make = shared_prompts if setup.share_prompts else padded_right
    return [make(prompts, responses, part, device) for part in bins]


def split_evenly(bins: list[list[int]]) -> None:
    """Split bins, or add empty ones, until every rank has as many as the rank with the most."""
    count = torch.tensor(len(bins))
    dist.all_reduce(count, dist.ReduceOp.MAX)
    while len(bins) < count:
        fullest = max(bins, key=len, default=[])
        half = (len(fullest) + 1) // 2
        bins.append(fullest[half:])
        del fullest[half:]


def padded_right(prompts: Ids, responses: Ids, rows: list[int], device: torch.device) -> Micro:
    """Rows of prompt and response, padded on the right.

    >>> m = padded_right([[1, 2], [3]], [[4], [5, 6]], [0, 1], torch.device("cpu"))
    >>> m.ids.tolist(), m.index.tolist(), m.targets.tolist()
    ([[1, 2, 4], [3, 5, 6]], [1, 3, 4], [4, 5, 6])
    """
    ids = padded([prompts[row] + responses[row] for row in rows])
    width = ids.shape[1]
    index: list[int] = []
    for b, row in enumerate(rows):
        first = b * width + len(prompts[row]) - 1  # the prompt's last token
        index += range(first, first + len(responses[row]))
    micro = micro_of(rows, responses, ids, index, device)
    sizes = [len(prompts[row]) + len(responses[row]) for row in rows]
    micro.tokens = sum(sizes)
    micro.pairs = sum(map(triangle, sizes))
    return micro


def shared_prompts(prompts: Ids, responses: Ids, rows: list[int], device: torch.device) -> Micro:
    """Each different prompt once, padded on the left, and rows of responses alone.

    Also if no prompt repeats: every rank must make the same forward passes, for FSDP's collectives.
    Flattened positions count through all prompts, then through all rows. A prompt's last token
    predicts the first token of a response. The last token of a response predicts nothing and is
    not read.
    """
    wanted = [prompts[row] for row in rows]
    prefix, mask, which = each_once(wanted or [[0]])
    read = [responses[row][:-1] for row in rows]
    ids = padded(read)
    wide = prefix.shape[1]
    width = ids.shape[1]
    index: list[int] = []
    for b, row in enumerate(rows):
        prompt_end = (which[b] + 1) * wide - 1
        start = prefix.numel() + b * width
        index.append(prompt_end)
        index += range(start, start + len(responses[row]) - 1)
    micro = micro_of(rows, responses, ids, index, device)
    micro.prefix = prefix.to(device)
    micro.prefix_mask = mask.to(device)
    micro.prefix_of = as_long(which, device)
    lengths = mask.sum(1).tolist()
    micro.tokens = sum(lengths) + sum(map(len, read))
    micro.pairs = sum(map(triangle, lengths))
    for prompt, response in zip(wanted, read):
        micro.pairs += len(prompt) * len(response) + triangle(len(response))
    return micro


def each_once(prompts: Ids) -> tuple[Tensor, Tensor, list[int]]:
    """The different prompts as ids and mask [P, L], padded on the left; and which of them each
    prompt is.

    >>> each_once([[5], [3, 4], [5]])
    (tensor([[0, 5],
            [3, 4]]), tensor([[0, 1],
            [1, 1]]), [0, 1, 0])
    """
    wanted = list(map(tuple, prompts))
    different = list(dict.fromkeys(wanted))
    ones = [[1] * len(prompt) for prompt in different]
    which = [different.index(prompt) for prompt in wanted]
    return padded(different, left=True), padded(ones, left=True), which


def triangle(n: int) -> int:
    """1 + 2 + … + n."""
    return n * (n + 1) // 2


def micro_of(rows: list[int], responses: Ids, ids: Tensor, index: list[int],
             device: torch.device) -> Micro:
    """The Micro of `rows` whose response tokens are predicted at `index`."""
    lengths: list[int] = []
    targets: list[int] = []
    for row in rows:
        response = responses[row]
        lengths.append(len(response))
        targets += response
    return Micro(
        rows,
        lengths,
        ids=ids.to(device),
        index=as_long(index, device),
        targets=as_long(targets, device),
    )


def padded(rows: Sequence[Sequence[int]], left: bool = False) -> Tensor:
    """The rows as [B, L], filled up with zeros. B and L are at least 1, as a model requires."""
    height = max(1, len(rows))
    width = max([1, *map(len, rows)])
    out = torch.zeros(height, width, dtype=torch.long)
    for b, row in enumerate(rows):
        values = torch.tensor(row, dtype=torch.long)
        if left:
            out[b, width - len(row) :] = values
        else:
            out[b, : len(row)] = values
    return out


def as_long(values: list[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.long, device=device)
