"""The settings of what a run reads."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from mtl.data.dataset import DataSettings


@dataclass(frozen=True)
class DataFlags(DataSettings):
    """Which data a run reads, and how."""

    paths: Annotated[tuple[str, ...], tyro.conf.arg(name="", metavar="WHAT")] = ()
    """A corpus (its path without .bin and .idx), several, `weight path` pairs, or a list file of such lines; split by data.split. By
    default text that Python ships."""


@dataclass(frozen=True)
class BatchFlags:
    """Global batches that grow: train.global-batch-size is the last size."""

    rampup: tuple[int, int, int] | None = None
    """START INCREMENT SAMPLES: begin with START samples a step and add INCREMENT at equal distances over SAMPLES samples."""
    schedule: str | None = None
    """SIZE:UNTIL pairs, such as '8:1000 16:5000'."""
    unit: Literal["steps", "samples", "tokens"] = "steps"
    """What the schedule's UNTIL counts."""
    workers: int = 2
    """Threads that make batches while the device works; 0 makes each when it is needed."""
    prefetch: int = 4
    """Batches made ahead."""
