"""Rotary position embedding from explicit positions, with angles in float32, and the ways to stretch it over longer texts."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mtl.errors import UserError, unknown
from mtl.kernels.angles import rotary_angles, rotate
from mtl.sharding.parallel import Parallel

__all__ = ["KINDS", "RopeScaling", "angles", "document_lengths", "frequencies", "rotate"]

KINDS = ("none", "linear", "dynamic", "yarn", "llama3")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched by ``factor``. Each kind reads the fields that name it."""

    kind: Literal["none", "linear", "dynamic", "yarn", "llama3"] = "none"
    factor: float = 1.0
    original: int = 0
    """yarn, llama3: the positions the model knew before it was stretched. dynamic: those it knows without stretching."""
    low_freq_factor: float = 1.0
    """llama3: waves longer than original / this are stretched in full."""
    high_freq_factor: float = 4.0
    """llama3: waves shorter than original / this stay."""
    beta_fast: float = 32.0
    """yarn: pairs that turn more often than this within original stay."""
    beta_slow: float = 1.0
    """yarn: pairs that turn less often than this are stretched in full."""
    truncate: bool = True
    """yarn: whether the ramp between the two starts and ends at whole pairs."""
    attention_factor: float = 1.0
    """yarn: what queries and keys are multiplied by."""

    def __post_init__(self) -> None:
        """Refuse numbers that stretch nothing."""
        if self.kind not in KINDS:
            raise unknown("--model.rope-scaling.kind", self.kind, KINDS)
        if self.kind != "none" and self.factor < 1.0:
            raise UserError(f"--model.rope-scaling.factor is {self.factor}: it must be at least 1.")
        if self.kind in ("dynamic", "yarn", "llama3") and self.original < 1:
            raise UserError(f"--model.rope-scaling.original is {self.original}: rope scaling {self.kind} needs the positions known so far.")
        if self.kind == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise UserError(
                f"--model.rope-scaling.low-freq-factor {self.low_freq_factor} must lie from 0 to high-freq-factor {self.high_freq_factor}."
            )


def frequencies(size: int, theta: float, scaling: RopeScaling, device: torch.device, lengths: Tensor | None = None) -> Tensor:
    """Give every pair's angle a position, [size / 2] in float32; for dynamic scaling [..., size / 2] from the texts' lengths [...].

    The order of the roundings is that of the models' first implementations: angles far out depend on the last bit of a frequency.
    """
    exponent = torch.arange(0, size, 2, device=device).float() / size
    if scaling.kind == "dynamic" and lengths is not None:
        longer = lengths.clamp(min=scaling.original)
        grown = (scaling.factor * longer / scaling.original - (scaling.factor - 1)) ** (size / (size - 2))
        return 1.0 / ((theta * grown).unsqueeze(-1) ** exponent)
    if scaling.kind == "yarn":
        return _yarn(size, theta, scaling, exponent)
    plain = 1.0 / (theta**exponent)
    if scaling.kind == "linear":
        return plain / scaling.factor
    return _llama3(plain, scaling) if scaling.kind == "llama3" else plain


def angles(
    positions: Tensor, head_size: int, theta: float, scaling: RopeScaling | None = None, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Give (cos, sin) of shape [..., head_size / 2] in float32 for positions of any shape."""
    scaling = scaling or RopeScaling()
    scale = scaling.attention_factor if scaling.kind == "yarn" else 1.0
    return rotary_angles(positions, frequencies(head_size, theta, scaling, positions.device, lengths), scale)


def document_lengths(par: Parallel, batch: Mapping[str, Tensor]) -> Tensor:
    """Give every token its document's length, or its row's (B, 1), also where the rest lies on other devices: for dynamic scaling."""
    if "documents" not in batch:
        return par.reshard(batch["positions"], "BS", "B_").amax(1, keepdim=True) + 1
    ends = batch["documents"].long()
    which = torch.searchsorted(ends, batch["slots"].expand(ends.shape[0], -1).contiguous(), right=True)
    return ends.diff(dim=1, prepend=torch.zeros_like(ends[:, :1])).gather(1, which.clamp(max=ends.shape[1] - 1))


def _llama3(plain: Tensor, scaling: RopeScaling) -> Tensor:
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wave = 2 * math.pi / plain
    far = wave > scaling.original / low
    stretched = torch.where(far, plain / scaling.factor, plain)
    smooth = (scaling.original / wave - low) / (high - low)
    between = (1 - smooth) * stretched / scaling.factor + smooth * stretched
    return torch.where(~far & ~(wave < scaling.original / high), between, stretched)


def _yarn(size: int, theta: float, scaling: RopeScaling, exponent: Tensor) -> Tensor:
    def pair(turns: float) -> float:
        return (size * math.log(scaling.original / (turns * 2 * math.pi))) / (2 * math.log(theta))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    high = high + 0.001 if low == high else high
    ramp = ((torch.arange(size // 2, dtype=torch.float32, device=exponent.device) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    power = theta**exponent
    return 1.0 / (scaling.factor * power) * (1 - kept) + 1.0 / power * kept
