"""Token shards of other projects: .npy arrays, raw .bin files and llm.c's, mapped in place."""

from pathlib import Path
from typing import Any

import numpy as np

from mtl.data.indexed import Indexed, Tokens, idx_path, open_indexed
from mtl.errors import UserError

DTYPES = {name: np.dtype(name).newbyteorder("<") for name in ("int8", "uint8", "uint16", "uint32", "int16", "int32", "int64")}
"""What a raw shard's elements may be."""
_NPY = b"\x93NUMPY"
_LLMC = {20240520: DTYPES["uint16"], 20240801: DTYPES["uint32"]}
"""Magic numbers of llm.c's and modded-nanogpt's shards: 256 int32 (magic, version, tokens), then the tokens."""
_LLMC_HEADER = 1024


def map_tokens(path: str | Path, dtype: str | None = None, skip_bytes: int = 0) -> Tokens:
    """Map a shard: a numpy file, an llm.c shard, or raw elements of ``dtype`` behind ``skip_bytes`` of a header."""
    path = Path(path)
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--data.dtype is {dtype!r}: known are {', '.join(DTYPES)}.")
    said = None if dtype is None else DTYPES[dtype]
    try:
        with path.open("rb") as file:
            head = file.read(12)
            size = file.seek(0, 2)
        tokens = _npy(path, said) if head.startswith(_NPY) else _raw(path, said, head, size, skip_bytes)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None
    if not len(tokens):
        raise UserError(f"{path} holds no tokens.")
    return tokens


def open_readable(path: Path, dtype: str | None = None) -> Indexed:
    """Open a Megatron corpus by its name (with or without suffix), or a shard as a corpus of one document."""
    prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    if idx_path(prefix).exists() or path.suffix not in (".npy", ".bin"):
        if dtype is not None:
            raise UserError(f"--dtype {dtype} has no use for {path}: a .idx file says the element type itself.")
        return open_indexed(prefix)
    tokens = map_tokens(path, dtype)
    return Indexed(str(path), tokens, np.array([len(tokens)]), np.array([0]), np.array([0, 1]), None)


def _npy(path: Path, said: np.dtype[Any] | None) -> Tokens:
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(f"{path} is no numpy file of plain numbers: {error}.") from None
    if tokens.dtype.kind not in "iu" or tokens.ndim != 1:
        raise UserError(f"{path} holds an array {list(tokens.shape)} of {tokens.dtype.name}: tokens must be one row of whole numbers.")
    if said is not None and tokens.dtype != said:
        raise UserError(f"{path} holds {tokens.dtype.name} by its own header, not {said.name}.")
    return tokens.view(np.ndarray)


def _raw(path: Path, said: np.dtype[Any] | None, head: bytes, size: int, skip: int) -> Tokens:
    magic, _, count = (int(n) for n in np.frombuffer(head, "<i4")) if len(head) == 12 else (0, 0, 0)
    own = _LLMC.get(magic)
    if own is not None and size == _LLMC_HEADER + count * own.itemsize:
        if said is not None and said != own:
            raise UserError(f"{path} holds {own.name} by its own header, not {said.name}.")
        return np.memmap(path, own, "r", _LLMC_HEADER, (count,)).view(np.ndarray) if count else np.zeros(0, own)
    if said is None and path.suffix == ".npy":
        raise UserError(f"{path} cannot be read as a .npy array of tokens: it has no numpy header. For a plain array give --data.dtype.")
    if said is None:
        raise UserError(
            f"{path} has no {path.with_suffix('.idx').name} beside it and does not say what its elements are. "
            "Give a corpus's prefix, or --data.dtype (such as uint16) for a plain array of tokens."
        )
    if skip < 0 or size < skip or (size - skip) % said.itemsize:
        raise UserError(f"{path} has {size} bytes: after {skip} (--data.skip-bytes) that is no whole number of {said.name} tokens.")
    return np.memmap(path, said, "r", skip).view(np.ndarray) if size > skip else np.zeros(0, said)
