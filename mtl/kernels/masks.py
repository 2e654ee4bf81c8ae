"""What attention is told of its mask: a rule on the distance of query and key, and where documents end. Never a tensor of all pairs."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mask:
    """Which pairs count: query i and key j, where i stands ``offset`` places further in the sequence than key 0.

    Causal: key not after the query. Window: fewer than ``window`` places before it. Documents are kept apart by `Documents` beside this.
    """

    causal: bool = True
    window: int | None = None
    offset: int = 0

    def trivial(self, queries: int, keys: int) -> bool:
        """Tell whether every pair counts."""
        first_before_last = not self.causal or self.offset >= keys - 1
        return first_before_last and (self.window is None or self.offset + queries <= self.window)

    def empty(self, queries: int, keys: int) -> bool:
        """Tell whether no pair counts."""
        return (self.causal and self.offset + queries <= 0) or (self.window is not None and self.offset - keys + 1 >= self.window)

    def pairs(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """Draw the mask as booleans [Q, T]."""
        gap = torch.arange(queries, device=device).unsqueeze(1) + self.offset - torch.arange(keys, device=device)
        allowed = torch.ones_like(gap, dtype=torch.bool)
        if self.causal:
            allowed = allowed & (gap >= 0)
        return allowed if self.window is None else allowed & (gap < self.window)


class Documents(NamedTuple):
    """Where documents end: after so many queries [B, D] and so many keys [B, D]; a query sees the keys of its own document alone.

    Document d of a row has queries ends[d - 1] to ends[d] and likewise keys, in the sequence's order; a part may be empty. The last end is
    the length. D is fixed by the data, not by what a row holds: documents that a row lacks are empty.
    """

    queries: Tensor
    keys: Tensor

    def pairs(self, queries: int, keys: int) -> Tensor:
        """Draw which pairs share a document, as booleans [B, Q, T]."""
        return _numbers(self.queries, queries).unsqueeze(2) == _numbers(self.keys, keys).unsqueeze(1)


def _numbers(ends: Tensor, length: int) -> Tensor:
    """Number the document of every token, [B, length]."""
    places = torch.arange(length, device=ends.device, dtype=ends.dtype).expand(ends.shape[0], length)
    return torch.searchsorted(ends, places.contiguous(), right=True)
