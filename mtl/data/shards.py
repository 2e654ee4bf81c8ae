"""Token shards of other projects: .npy arrays and raw .bin files, read in place as corpora of one document a file."""

from pathlib import Path
from typing import Any

import numpy as np

from mtl.data.indexed import Indexed, Tokens, open_indexed
from mtl.errors import UserError

SUFFIXES = (".npy", ".bin")
_NPY = b"\x93NUMPY"
_LLMC = {20240520: np.dtype("<u2"), 20240801: np.dtype("<u4")}
"""Magic numbers of llm.c's and modded-nanogpt's shards: 256 int32 (magic, version, tokens), then the tokens."""
_LLMC_HEADER = 1024


def open_corpus(path: str | Path, dtype: str | None = None) -> Indexed:
    """Open a Megatron corpus by its name without suffix, or with ``dtype`` (such as uint16) a .npy or .bin shard by its whole name."""
    if Path(path).suffix in SUFFIXES and Path(path).is_file():
        return open_shard(Path(path), dtype)
    if dtype is not None:
        raise UserError(f"{path} is no .npy or .bin file that exists, so element type {dtype} has no use: a .idx file says its own.")
    return open_indexed(path)


def open_shard(path: Path, dtype: str | None) -> Indexed:
    """Map a shard: a numpy file, an llm.c shard, or raw elements of ``dtype``."""
    said = _dtype(path, dtype)
    try:
        with path.open("rb") as file:
            head = file.read(12)
            size = file.seek(0, 2)
        if head.startswith(_NPY):
            tokens = _npy(path, said)
        else:
            tokens = _raw(path, said, head, size)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None
    if not len(tokens):
        raise UserError(f"{path} holds no tokens.")
    return Indexed(
        str(path), tokens, np.array([len(tokens)]), np.array([0]), np.array([0, 1]), None
    )  # fmt: skip


def _dtype(path: Path, dtype: str | None) -> np.dtype[Any] | None:
    if dtype is None:
        return None
    try:
        found = np.dtype(dtype).newbyteorder("<")
    except TypeError:
        found = np.dtype("f8")
    if found.kind not in "iu":
        raise UserError(f"element type {dtype!r} of {path} is no integer type: use uint8, uint16, uint32, int32 or int64.")
    return found


def _npy(path: Path, said: np.dtype[Any] | None) -> Tokens:
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(f"{path} is no numpy file of plain numbers: {error}.") from None
    if tokens.dtype.kind not in "iu" or tokens.ndim != 1:
        raise UserError(f"{path} holds an array {list(tokens.shape)} of {tokens.dtype.name}: expected one row of whole numbers.")
    if said is not None and tokens.dtype != said:
        raise UserError(f"{path} holds {tokens.dtype.name} by its own header, not {said.name}.")
    return tokens.view(np.ndarray)


def _raw(path: Path, said: np.dtype[Any] | None, head: bytes, size: int) -> Tokens:
    magic, _, count = (int(n) for n in np.frombuffer(head, "<i4")) if len(head) == 12 else (0, 0, 0)
    own = _LLMC.get(magic)
    if own is not None and size == _LLMC_HEADER + count * own.itemsize:
        if said is not None and said != own:
            raise UserError(f"{path} holds {own.name} by its own header, not {said.name}.")
        return np.memmap(path, own, "r", _LLMC_HEADER, (count,)).view(np.ndarray) if count else np.zeros(0, own)
    if said is None:
        raise UserError(f"{path} does not say what its elements are: give their type, such as uint16.")
    if size % said.itemsize:
        raise UserError(f"{path} has {size} bytes, no whole number of {said.name}: it is cut short or has another element type.")
    return np.memmap(path, said, "r").view(np.ndarray) if size else np.zeros(0, said)
