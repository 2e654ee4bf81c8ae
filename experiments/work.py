"""What a kind of run brings to the run that all share: its settings, its samples, and the state it starts from."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from experiments.initial import TOKENIZER, Start, agree
from mtl.data.samples import Samples


class Work(NamedTuple):
    """What is trained on, and how it begins and ends."""

    train: Samples
    held_out: Samples | None
    held_out_samples: int
    """Held-out samples that an evaluation may read."""
    said: tuple[str, ...] = ()
    """Lines about the data, shown at the start."""
    length: Callable[[int, int], int] | None = None
    """``length(i, multiple)``: tokens a sample in step i (from 0), where that is not train.seq-len; divisible as the mesh needs it."""
    begin: Callable[..., Any] | None = None
    """``begin(specs, rules, mesh, precision, optimizer)``: the state to start from, where it is not a fresh one."""
    bytes_per_token: float | None = None
    """Bytes a held-out token, where they are known: bits a byte are then told."""
    test: Samples | None = None
    """Samples that are evaluated after the last step, as many as of the held-out ones."""
    epochs: Callable[[int], Mapping[str, float]] | None = None
    """How often each corpus was seen after so many samples."""
    prompt: tuple[int, ...] = ()
    """Tokens that the text shown at the end goes on from."""
    ends: tuple[int, ...] = ()
    """The tokens that end that text."""
    decode: Callable[[list[int]], str] = str
    following: str = ""
    """The command to try next; RUN stands for the run's folder, PRESET for its preset."""
    beside: Mapping[str, bytes] = MappingProxyType({})
    """Files that every checkpoint of the run carries on."""
    decides: Mapping[str, Any] = MappingProxyType({})
    """What decides samples and what the weights mean, by setting, saved with the run: a resumed run must find it equal."""

    def starting(self, start: Start | None) -> "Work":
        """Begin with the weights that ``--init`` names, unless this work begins by itself."""
        if start is None:
            return self
        if TOKENIZER in start.beside and TOKENIZER in self.beside:
            agree(start.beside[TOKENIZER], self.beside[TOKENIZER])
        return self._replace(begin=self.begin or start.state, beside={**start.beside, **self.beside})


class Kind(NamedTuple):
    """A kind of run: the program's name, what it does, its settings (made from a preset's), and the work they come to.

    ``work(settings)`` may settle settings that depend on the data; it gives both.
    """

    program: str
    does: str
    settings: Callable[[Any, list[str]], Any]
    work: Callable[[Any], tuple[Any, Work]]
