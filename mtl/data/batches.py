"""From samples to what a device gets: its rows of the global batch and its pieces of the sequence, nothing more."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mtl.data.feed import to
from mtl.data.samples import Sample, Samples
from mtl.errors import UserError
from mtl.ops.attention import chunks
from mtl.sharding.parallel import Parallel


@dataclass(frozen=True)
class BatchShape:
    """Samples a step over all devices, samples a device takes at once, tokens a sample."""

    global_batch: int
    micro_batch: int
    seq_len: int

    def check(self, rows: int) -> None:
        """Refuse a global batch that does not divide into micro-batches on ``rows`` data-parallel devices."""
        for name, size in {"global-batch-size": self.global_batch, "micro-batch-size": self.micro_batch, "seq-len": self.seq_len}.items():
            if size < 1:
                raise UserError(f"--train.{name} is {size}: it must be at least 1.")
        if self.global_batch % (self.micro_batch * rows):
            raise UserError(
                f"--train.global-batch-size {self.global_batch} does not divide by --train.micro-batch-size {self.micro_batch} x {rows} "
                f"data-parallel devices. Use a multiple of {self.micro_batch * rows}, or a smaller micro-batch or mesh."
            )


def batch_at(
    par: Parallel, samples: Samples, first: int, shape: BatchShape, dtype: torch.dtype, stop: int | None = None
) -> dict[str, Tensor]:
    """Make this device's part of the global batch that starts at sample ``first``, on the device; see ``host_batch``."""
    return to(host_batch(par, samples, first, shape, dtype, stop), torch.device(par.mesh.device_type))


def host_batch(
    par: Parallel, samples: Samples, first: int, shape: BatchShape, dtype: torch.dtype, stop: int | None = None
) -> dict[str, Tensor]:
    """Make this device's part of the global batch that starts at sample ``first``, in host memory.

    Gives tokens, targets, weights, positions [A, b, S] (and documents, where samples have segments), rows [A, b] and slots [S], where A
    counts micro-batches and S is local.
    Samples from ``stop`` on count for nothing (their weights are 0).
    """
    axes = par.axes("B")
    count, index = par.mesh.size(axes), par.mesh.index(axes)
    local = shape.global_batch // count
    rows = np.arange(local).reshape(-1, shape.micro_batch)
    rows = (rows // shape.micro_batch * count + index) * shape.micro_batch + rows % shape.micro_batch
    found = [samples(first + int(r), shape.seq_len) for r in rows.flat]
    whole = {
        name: np.stack([getattr(sample, name) for sample in found]).reshape(*rows.shape, -1)
        for name in Sample._fields
        if getattr(found[0], name) is not None
    }
    if stop is not None:
        whole["weights"] = whole["weights"] * (first + rows < stop)[..., None]
    return cut(par, whole.pop("tokens"), whole.pop("targets"), rows, dtype, whole)


def to_device(
    par: Parallel,
    tokens: np.ndarray,
    targets: np.ndarray,
    rows: np.ndarray,
    dtype: torch.dtype,
    extra: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Tensor]:
    """Cut arrays as ``cut`` does and move them to the device."""
    return to(cut(par, tokens, targets, rows, dtype, extra), torch.device(par.mesh.device_type))


def cut(
    par: Parallel,
    tokens: np.ndarray,
    targets: np.ndarray,
    rows: np.ndarray,
    dtype: torch.dtype,
    extra: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Tensor]:
    """Cut arrays [A, b, whole S] of this device's rows to its pieces of the sequence, in host memory.

    ``extra`` may hold weights (default 1 a token), positions (default their place) and segments, shaped alike. Segments number the
    documents of a row; the batch holds where these end in the whole row, as documents [A, b, D].
    """
    mine, pieces = chunks(par)
    length = tokens.shape[-1]
    if length % pieces:
        raise UserError(f"a sequence of {length} tokens does not divide into the {pieces} pieces of rules {par.rules.name!r}.")
    slots = np.arange(length).reshape(pieces, -1)[list(mine)].reshape(-1)
    given = {"weights": np.ones(tokens.shape), "positions": np.broadcast_to(np.arange(length), tokens.shape), **(extra or {})}
    segments = given.pop("segments", None)
    arrays = {"tokens": tokens, "targets": targets, **given}
    batch = {name: torch.from_numpy(np.ascontiguousarray(a[..., slots])) for name, a in arrays.items()}
    batch["weights"] = batch["weights"].to(dtype)
    if segments is not None:
        batch["documents"] = torch.from_numpy(document_ends(segments))
    batch |= {"rows": torch.from_numpy(np.ascontiguousarray(rows)), "slots": torch.from_numpy(slots)}
    return batch


def document_ends(segments: np.ndarray) -> np.ndarray:
    """Turn document numbers [..., S] into where documents end, [..., D] in int32: a document ends where the next token's number differs.

    D is 8, 32, 128 and so on, the first that holds the longest row's, so that compiled steps see few shapes; the rest of a row is S.
    """
    length = segments.shape[-1]
    last = np.ones(segments.shape, dtype=bool)
    last[..., :-1] = segments[..., 1:] != segments[..., :-1]
    most, room = int(last.sum(-1).max()), 8
    while room < most:
        room *= 4
    ends = np.full((*segments.shape[:-1], room), length, dtype=np.int32)
    *rows, places = np.nonzero(last)
    ends[(*rows, (last.cumsum(-1) - 1)[last])] = places + 1
    return ends
