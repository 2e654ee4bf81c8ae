"""Blends without an index: which corpus gives sample n, and how many it gave before, within one sample of its weight at every prefix.

Corpus k's j-th sample may come from slot floor((j - 1) / w_k) on and must come by slot ceil(j / w_k). One sample a slot, the earliest
deadline first, meets every deadline (Steiner and Yeomans 1993; Baruah and others 1996, "Pfair"), which is the bound. And the schedule
forgets: started before slot n with each corpus's due samples and, of those that might have come early, the earliest deadlines, it agrees
from slot n + 1 / min(w) on with the schedule that began at 0. So any slot is found without the slots far before it, in whole numbers.
See docs/decisions/0004-order-without-an-index.md.
"""

import heapq
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from math import gcd, lcm

import numpy as np
import numpy.typing as npt

from mtl.errors import UserError

BLOCK = 4096
RAREST = 1_000_000
"""A corpus gives at least one sample of so many, since finding a slot takes total / rarest steps (about a second for this)."""


class Blend:
    """The schedule of a blend; ``blend(n)`` gives (corpus, its sample's number) of sample n. Weights are exact: 0.3 is 3 of 10."""

    def __init__(self, weights: Sequence[Fraction | int]) -> None:
        """Take the weights, in any unit. A corpus of weight 0 gives nothing."""
        if not weights or any(w < 0 for w in weights) or not any(weights):
            raise UserError(f"blend weights {_shown(weights)}: none may be negative, and one at least must be above 0.")
        exact = [Fraction(w) for w in weights]
        unit = lcm(*(w.denominator for w in exact))
        whole = [int(w * unit) for w in exact]
        shared = gcd(*whole)
        self.weights = tuple(w // shared for w in whole)
        self.total = sum(self.weights)
        rarest = min(w for w in self.weights if w)
        if self.total > RAREST * rarest:
            raise UserError(
                f"blend weights {_shown(weights)}: the smallest is under one sample in {RAREST:,}. "
                "Leave that corpus out or raise its weight."
            )
        self.memory = self.total // rarest + 2
        self._known: dict[int, Sequence[int]] = {}
        self._schedule = lru_cache(maxsize=8)(self._schedule_of)

    def __call__(self, n: int) -> tuple[int, int]:
        """Give which corpus sample ``n`` comes from, and which of that corpus's samples it is."""
        block, place = divmod(n, BLOCK)
        which, number = self._schedule(block)
        return int(which[place]), int(number[place])

    def _schedule_of(self, block: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        start = block * BLOCK
        counts = self._known.get(start)  # where the block before was asked for too
        if counts is None:
            first = max(0, start - self.memory)
            counts = _counts_at(self.weights, self.total, first)
            early = np.array(_earliest_deadlines(self.weights, self.total, first, counts, start - first), np.int32)
            counts = [c + n for c, n in zip(counts, np.bincount(early, minlength=len(counts)).tolist(), strict=True)]
        picks = np.array(_earliest_deadlines(self.weights, self.total, start, counts, BLOCK), np.int32)
        number, after = np.empty(BLOCK, np.int64), list(counts)
        for k, before in enumerate(counts):
            mine = np.flatnonzero(picks == k)
            number[mine] = before + np.arange(len(mine))
            after[k] += len(mine)
        self._known = {start + BLOCK: after}
        return picks, number


def _shown(weights: Sequence[Fraction | int]) -> str:
    return ", ".join(f"{float(w):g}" for w in weights[:20]) + (" ..." if len(weights) > 20 else "")


def _counts_at(weights: Sequence[int], total: int, n: int) -> list[int]:
    """Give samples taken of each corpus in the first ``n``: all that are due, and of those begun the earliest deadlines."""
    counts = [w * n // total for w in weights]
    begun = [((counts[k] + 1) * total // -w, k) for k, w in enumerate(weights) if w * n % total]
    for _, k in sorted(begun, key=lambda x: (-x[0], x[1]))[: n - sum(counts)]:
        counts[k] += 1
    return counts


def _earliest_deadlines(weights: Sequence[int], total: int, first: int, counts: Sequence[int], slots: int) -> list[int]:
    """Schedule the slots after ``first``: in each the released sample with the earliest deadline, the first corpus among equals."""
    done = list(counts)
    waiting = [(done[k] * total // w, k) for k, w in enumerate(weights) if w]
    heapq.heapify(waiting)
    ready: list[tuple[int, int]] = []
    picks: list[int] = []
    for slot in range(first, first + slots):
        while waiting and waiting[0][0] <= slot:
            k = heapq.heappop(waiting)[1]
            heapq.heappush(ready, (-(-(done[k] + 1) * total // weights[k]), k))
        k = heapq.heappop(ready)[1]
        picks.append(k)
        done[k] += 1
        heapq.heappush(waiting, (done[k] * total // weights[k], k))
    return picks
