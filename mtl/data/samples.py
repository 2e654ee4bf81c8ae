"""Samples as pure functions of (seed, index): never of mesh, micro-batch or how often they were asked for."""

from typing import Protocol

import numpy as np
import numpy.typing as npt

from mtl import random
from mtl.errors import UserError

Tokens = npt.NDArray[np.int64]


class Samples(Protocol):
    """Anything that gives sample ``index`` as ``length`` tokens."""

    def __call__(self, index: int, length: int) -> Tokens:
        """Give one sample."""
        ...


class Windows:
    """Windows of a long text, drawn without order: one epoch visits every window once, in a keyed permutation."""

    def __init__(self, text: npt.NDArray[np.uint8], seed: int, name: str) -> None:
        """Take the text, and what decides the order."""
        self.text, self.seed, self.name = text, seed, name

    def __call__(self, index: int, length: int) -> Tokens:
        """Give sample ``index``. Every epoch shifts the windows' borders by an amount of its own."""
        count = len(self.text) // length - 1
        if count < 1:
            raise UserError(
                f"the {self.name} text has {len(self.text)} tokens: too few for sequences of {length - 1}; lower train.seq-len."
            )
        epoch, place = divmod(index, count)
        key = random.key(self.seed, self.name, epoch)
        start = random.permute(key, place, count) * length + key % length
        return self.text[start : start + length].astype(np.int64)
