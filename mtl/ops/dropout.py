"""Dropout whose mask depends on (key, global index) alone: the same on every mesh and in every recomputation."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mtl import random


def dropout(
    x: Tensor, rate: float, key: Tensor, rows: Tensor, slots: Tensor, length: int, parts: Sequence[tuple[int, int]] | None = None
) -> Tensor:
    """Zero a share of an activation [B, S, ...] and scale the rest.

    ``rows`` [B] numbers the samples in the global batch, ``slots`` [S] the places in a sequence of ``length``. ``parts`` says of each
    further dimension where this device's part begins and how long the whole is; without it they are whole.
    """
    if rate == 0.0:
        return x
    index = rows.unsqueeze(1) * length + slots.unsqueeze(0)
    for size, (start, whole) in zip(x.shape[2:], parts or [(0, size) for size in x.shape[2:]], strict=True):
        index = index.unsqueeze(-1) * whole + torch.arange(start, start + size, device=x.device)
    keep = random.uniform(key, index, torch.float32) >= rate
    return x * keep.to(x.dtype) * (1.0 / (1.0 - rate))
