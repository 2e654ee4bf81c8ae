"""Dropout whose mask depends on (key, global index) alone: the same on every mesh and in every recomputation."""

import torch
from torch import Tensor

from mtl import random


def dropout(x: Tensor, rate: float, key: Tensor, rows: Tensor, slots: Tensor, length: int) -> Tensor:
    """Zero a share of an activation [B, S, D] and scale the rest.

    ``rows`` [B] numbers the samples in the global batch, ``slots`` [S] the places in a sequence of ``length``; D is whole.
    """
    if rate == 0.0:
        return x
    place = rows.unsqueeze(1) * length + slots.unsqueeze(0)
    index = place.unsqueeze(-1) * x.shape[-1] + torch.arange(x.shape[-1], device=x.device)
    keep = random.uniform(key, index, torch.float32) >= rate
    return x * keep.to(x.dtype) * (1.0 / (1.0 - rate))
