"""Packing: documents of many lengths into sequences of one, each document whole. Pure functions of the lengths."""

from bisect import bisect_left, insort
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from mtl import random
from mtl.errors import UserError

Ints = npt.NDArray[np.int64]


class Packing(NamedTuple):
    """Which documents share a sequence: sequence i has those of ``ranks[ends[i - 1] : ends[i]]``, rank r being the r-th longest."""

    ranks: Ints
    ends: Ints
    efficiency: float
    """Tokens over places."""


def best_fit(lengths: Ints, capacity: int) -> Packing:
    """Pack by best fit, longest documents first: each goes to the fullest sequence that has room for it, or to a new one.

    Sequences that hold the same lengths are counted, not listed, while this goes on: a million documents take seconds.
    """
    if lengths.size == 0 or lengths.min() < 1 or lengths.max() > capacity:
        raise UserError(f"packing takes documents of 1 to {capacity} tokens, and at least one of them.")
    sizes, counts = np.unique(lengths, return_counts=True)
    groups: dict[int, list[tuple[int, Any]]] = {}  # by room left: how many sequences, what each holds: (length, times, what else)
    rooms: list[int] = []

    def put(room: int, count: int, held: Any) -> None:
        if count and room not in groups:
            groups[room] = []
            insort(rooms, room)
        if count:
            groups[room].append((count, held))

    for size, number in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        left = number
        while left:
            place = bisect_left(rooms, size)
            room, (count, held) = capacity, (left, None)  # new sequences, at most as many as documents
            if place < len(rooms):
                room = rooms[place]
                count, held = groups[room].pop()
                if not groups[room]:
                    del groups[room], rooms[place]
            each = room // size
            full = min(count, left // each)
            put(room - each * size, full, (size, each, held))
            left -= full * each
            if full < count and left:  # fewer than fill one more
                put(room - left * size, 1, (size, left, held))
                left, full = 0, full + 1
            if held is not None:
                put(room, count - full, held)
    return _listed(groups, dict(zip(sizes.tolist(), (lengths.size - counts.cumsum()).tolist(), strict=True)), capacity, int(lengths.sum()))


def _listed(groups: dict[int, list[tuple[int, Any]]], following: dict[int, int], capacity: int, tokens: int) -> Packing:
    """Write the sequences out one after the other; ``following`` has the next rank of every length."""
    ranks: list[Ints] = []
    held_by_each: list[Ints] = []
    for count, held in (group for room in sorted(groups) for group in groups[room]):
        columns: list[Ints] = []
        node = held
        while node is not None:
            size, times, node = node
            columns.append(np.arange(following[size], following[size] + count * times).reshape(count, times))
            following[size] += count * times
        table = np.concatenate(columns, 1)
        ranks.append(table.reshape(-1))
        held_by_each.append(np.full(count, table.shape[1]))
    ends = np.concatenate(held_by_each).cumsum()
    return Packing(np.concatenate(ranks), ends, tokens / (len(ends) * capacity))


def deal(lengths: Ints, ranks: Ints, key: int) -> Ints:
    """Give the documents of these ranks. Documents of equal length take places by a keyed shuffle, so that every epoch mixes anew."""
    draw = random.bits(key, torch.arange(lengths.size)).numpy()
    return np.lexsort((draw, -lengths))[ranks]
