"""Learning rate schedules: functions from the step (a tensor, from 0) to the rate, with linear warmup. Nothing is read back to the host."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from mtl.errors import UserError, unknown

Schedule = Callable[[Tensor], Tensor]


def _constant(t: Tensor, decay: int, warmup: int, floor: float) -> Tensor:
    return torch.ones_like(t)


def _linear(t: Tensor, decay: int, warmup: int, floor: float) -> Tensor:
    return 1.0 - (1.0 - floor) * _progress(t, warmup, decay)


def _cosine(t: Tensor, decay: int, warmup: int, floor: float) -> Tensor:
    return floor + (1.0 - floor) * 0.5 * (1.0 + torch.cos(torch.pi * _progress(t, warmup, decay)))


def _inverse_sqrt(t: Tensor, decay: int, warmup: int, floor: float) -> Tensor:
    start = float(max(warmup, 1))
    return (start / t.clamp(min=start)).sqrt().clamp(min=floor)


def _warmup_stable_decay(t: Tensor, decay: int, warmup: int, floor: float) -> Tensor:
    """Hold the rate, then fall linearly over the last fifth of the steps after warmup."""
    return 1.0 - (1.0 - floor) * _progress(t, decay - (decay - warmup) // 5, decay)


def _progress(t: Tensor, start: int, stop: int) -> Tensor:
    return ((t - start) / max(stop - start, 1)).clamp(0.0, 1.0)


SCHEDULES: Mapping[str, Callable[[Tensor, int, int, float], Tensor]] = MappingProxyType(
    {"constant": _constant, "linear": _linear, "cosine": _cosine, "inverse_sqrt": _inverse_sqrt, "wsd": _warmup_stable_decay}
)


def schedule(name: str, peak: float, steps: int, warmup: int = 0, floor: float = 0.0) -> Schedule:
    """Make a schedule: linear warmup over ``warmup`` steps to ``peak``, then ``name`` down to ``floor`` times the peak at ``steps``."""
    if name not in SCHEDULES:
        raise unknown("--optim.schedule", name, SCHEDULES)
    if warmup < 0 or not 0.0 <= floor <= 1.0 or peak < 0:
        raise UserError(
            f"--optim.lr {peak} and --optim.warmup-steps {warmup} must not be negative, --optim.min-lr-ratio {floor} must lie from 0 to 1."
        )

    def rate(step: Tensor) -> Tensor:
        t = step.to(torch.float32 if step.device.type == "mps" else torch.float64)
        rising = ((t + 1.0) / max(warmup, 1)).clamp(max=1.0) if warmup else torch.ones_like(t)
        return peak * torch.where(t < warmup, rising, SCHEDULES[name](t, steps, warmup, floor))

    return rate
