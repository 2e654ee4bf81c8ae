"""Matrices as columns of one: side by side, or in turn, which is how kernels with a gate inside take its two halves."""

from collections.abc import Sequence

import torch
from torch import Tensor


def beside(parts: Sequence[Tensor], turns: bool = False) -> Tensor:
    """Make one matrix of several: side by side, or the first column of each, then the second of each."""
    if len(parts) == 1:
        return parts[0]
    return torch.stack(list(parts), -1).flatten(-2) if turns else torch.cat(list(parts), -1)


def cut(x: Tensor, columns: Sequence[int], turns: bool = False) -> list[Tensor]:
    """Undo `beside`."""
    if turns and len(columns) > 1:
        return [part.contiguous() for part in x.unflatten(-1, (-1, len(columns))).unbind(-1)]
    return list(x.split(list(columns), -1))
