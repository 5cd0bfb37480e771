"""Token ids of prompts and responses → padded tensors, and where in them each response token is predicted."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def padded(rows: Sequence[Sequence[int]], left: bool = False) -> Tensor:
    """[B, L] with zeros on the right or left; at least one row and one column, for a model reads no
    less."""
    width = max(map(len, rows), default=0) or 1
    out = torch.zeros(max(1, len(rows)), width, dtype=torch.long)
    for b, row in enumerate(rows):
        start = width - len(row) if left else 0
        out[b, start : start + len(row)] = torch.tensor(row, dtype=torch.long)
    return out


def pad_right(prompts: list[list[int]], responses: list[list[int]]) -> tuple[Tensor, ...]:
    """→ ids [B, L], prompt and response; index [T], the flattened position that predicts each response token; targets
    [T], the response tokens.

    >>> [x.tolist() for x in pad_right([[1, 2], [3]], [[4], [5, 6]])]
    [[[1, 2, 4], [3, 5, 6]], [1, 3, 4], [4, 5, 6]]
    """
    ids = padded([p + r for p, r in zip(prompts, responses)])
    ends = [b * ids.shape[1] + len(p) - 1 for b, p in enumerate(prompts)]  # of the prompts
    index = [end + i for end, r in zip(ends, responses) for i in range(len(r))]
    targets = [t for r in responses for t in r]
    return ids, torch.tensor(index, dtype=torch.long), torch.tensor(targets, dtype=torch.long)


def behind_prefix(prompts: list[list[int]], responses: list[list[int]]) -> tuple[Tensor, ...]:
    """As pad_right, with each different prompt once: ids [B, L] hold responses alone, and after the
    targets come the prompts [P, Lp], padded on the left, their mask [P, Lp], and the prompt of each
    row [B]. Positions count through all prompts, then all rows. A response's first token is predicted
    at its prompt's end, the others at the token before them, so that its last token need not be read.
    """
    different = list(dict.fromkeys(map(tuple, prompts))) or [(0,)]
    which = [different.index(tuple(p)) for p in prompts]
    prefix, ids = padded(different, left=True), padded([r[:-1] for r in responses])
    mask = padded([[1] * len(p) for p in different], left=True)
    wide, width = prefix.shape[1], ids.shape[1]
    index = []
    for b, (k, r) in enumerate(zip(which, responses)):
        start = len(different) * wide + b * width  # where this row begins, behind all prompts
        index += [k * wide + wide - 1, *range(start, start + len(r) - 1)]
    targets = torch.tensor([t for r in responses for t in r], dtype=torch.long)
    return ids, torch.tensor(index, dtype=torch.long), targets, prefix, mask, torch.tensor(which or [0])
