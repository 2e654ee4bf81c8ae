"""Random numbers from a counter: value i depends on (seed, name, i) alone, never on device, mesh or call order.

A 64-bit counter is mixed with a key by two rounds of the splitmix64 finaliser (Steele, Lea, Flood 2014), in wrapping int64 arithmetic,
which every torch device and compiler has.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def key(*parts: int | str) -> int:
    """Hash integers and names to a signed 64-bit key."""
    text = "\x1f".join(f"{type(p).__name__}:{p}" for p in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def bits(key: int | Tensor, index: Tensor) -> Tensor:
    """Give 64 random bits for every int64 index."""
    return _mix(_mix(_spread(index) + key) ^ key)


def uniform(key: int | Tensor, index: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Give one number in (0, 1) for every index: 23 random bits in float32, 52 in float64, never 0 or 1."""
    wide = dtype == torch.float64
    return (_shift(bits(key, index), 12 if wide else 41).to(dtype) + 0.5) * (2.0**-52 if wide else 2.0**-23)


def normal(key: int | Tensor, index: Tensor) -> Tensor:
    """Give one standard normal number for every index, in float64."""
    return torch.special.ndtri(uniform(key, index))


def global_index(shape: Sequence[int], offset: Sequence[int], whole: Sequence[int], device: torch.device) -> Tensor:
    """Number the elements of a box inside an array: a tensor of ``shape`` whose corner sits at ``offset`` of an array of ``whole``."""
    index = torch.zeros((), dtype=torch.int64, device=device)
    for size, start, extent in zip(shape, offset, whole, strict=True):
        index = index.unsqueeze(-1) * extent + torch.arange(start, start + size, device=device)
    return index


def permute(key: int, index: int, size: int) -> int:
    """Send index to its place in a random permutation of range(size): a four-round Feistel network, walked until inside."""
    half = max(4, ((size - 1).bit_length() + 1) // 2)  # narrower halves mix badly
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(4):
            mixed = _mix_int((right * 0x9E3779B97F4A7C15 + turn + (key & _WORD)) & _WORD)
            left, right = right, left ^ (mixed & mask)
        index = (left << half) | right
        if index < size:
            return index


_WORD = (1 << 64) - 1


def _spread(index: Tensor) -> Tensor:
    """Multiply by 0x9E3779B97F4A7C15 in halves of 32 bits.

    As one product, inductor's code for the CPU multiplies a loop's counter, and C++ forbids that to overflow: gcc concluded how far the
    loop could go, and it wrote past its array. The mask, which changes nothing, keeps inductor from computing with the counter itself.
    """
    index = index & -1
    low, high = index * 0x7F4A7C15, index * 0x9E3779B9
    return (low & 0xFFFFFFFF) | (((low >> 32) + high) << 32)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def _shift(x: Tensor, n: int) -> Tensor:
    """Shift right filling with zeros (torch's shift keeps the sign)."""
    return (x >> n) & ((1 << (64 - n)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _mix_int(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _WORD
    return x ^ (x >> 31)
