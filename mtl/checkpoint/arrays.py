"""Arrays on disk through tensorstore: zarr3, tiles inside files, a checksum over every tile; and torch memory as numpy sees it."""

import functools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore as ts
import torch
from torch import Tensor

from mtl.checkpoint import files
from mtl.errors import UserError
from mtl.runtime import process
from mtl.runtime.workers import cores

_SAME = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64", "complex64")
_ODD = {"bfloat16": torch.int16, "float8_e4m3fn": torch.uint8, "float8_e5m2": torch.uint8}
DTYPES: Mapping[str, torch.dtype] = MappingProxyType({name: getattr(torch, name) for name in (*_SAME, "complex128", *_ODD)})
"""Types a checkpoint can hold, by tensorstore's names."""

SUMMED: dict[str, Any] = {"name": "gzip", "configuration": {"level": 0}}
"""What tiles are written with: blocks as they are and the crc32 of their content. Of what tensorstore has, as it is packaged, this takes
least of the processor's time: it computes crc32c by table look-ups, and frames of zstd copy everything once more."""
SQUEEZED: tuple[dict[str, Any], ...] = (
    {"name": "blosc", "configuration": {"cname": "lz4", "clevel": 5, "shuffle": "bitshuffle", "blocksize": 0}},
    {"name": "zstd", "configuration": {"level": -131072, "checksum": True}},
)
"""What they are written with where they are squeezed: bits of one place side by side, then lz4, which leaves about 0.9 of float32 values;
then a frame of raw blocks (the lowest level looks for nothing but runs of one byte) and the xxhash64 of its content."""
SQUEEZE_CORES = 8
"""Squeezing is quicker than a disk where a process has so many cores."""


ARENA_MAX = -8
"""To mallopt(3): the number of malloc's heaps."""


@functools.cache
def keep_pages() -> None:
    """Let malloc keep the pages of what is freed: the next copies and tiles are made in them, not in fresh ones that the system zeroes.

    glibc raises its thresholds once it frees a block of almost 32 MiB (mallopt(3), M_MMAP_THRESHOLD); the block itself is never touched.
    Its threads share as many heaps as there are cores: with eight times as many, as it would have, what was freed lies in one and the next
    block comes from another, for which the system has to find pages.
    """
    limit = files.from_libc("mallopt")
    if limit is not None:
        limit(ARENA_MAX, max(2, cores() // process.processes_here()))
    np.empty((32 << 20) - (64 << 10), np.uint8)


def context(threads: int = 4, in_memory: bool = False) -> Any:
    """Make a tensorstore context: ``threads`` copy and check at once, no cache. Who writes flushes the files.

    As many read or write files, and at least 16 where that is waiting for a disk.
    """
    keep_pages()
    return ts.Context(
        {
            "cache_pool": {"total_bytes_limit": 0},
            "file_io_concurrency": {"limit": max(1 if in_memory else 16, threads)},
            "file_io_sync": False,
            "data_copy_concurrency": {"limit": max(1, threads)},
        }
    )


def squeezes(folder: Path) -> bool:
    """Tell whether what this process saves there is squeezed: where a disk sets the pace, not the processor."""
    return not files.in_memory(folder) and cores() >= SQUEEZE_CORES * process.processes_here()


def dtype_name(dtype: torch.dtype, what: str) -> str:
    """Name a type as files do."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise UserError(f"{what} has type {dtype}, which checkpoints cannot hold. They hold {', '.join(DTYPES)}.")
    return name


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Take memory on the CPU by way of numpy, which asks for huge pages: filled four times as fast as torch's."""
    if not math.prod(shape):
        return torch.empty(tuple(shape), dtype=dtype)
    return torch.from_numpy(np.empty(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(tuple(shape))


def as_numpy(x: Tensor) -> Any:
    """View a CPU tensor as a numpy array: the same memory, bfloat16 and float8 included."""
    name = str(x.dtype).removeprefix("torch.")
    if name in _ODD:
        return x.view(_ODD[name]).numpy().view(getattr(ml_dtypes, name))
    return x.numpy()


def metadata(shape: Sequence[int], dtype: str, chunk: Sequence[int], tile: Sequence[int], squeezed: bool = False) -> dict[str, Any]:
    """Give an array's zarr.json: files of ``chunk``, in each of them tiles with a checksum; a small array is one tile with a crc32c.

    Tiles may be ``squeezed``: they take less room and more of the processor's time.
    """
    size = np.dtype(getattr(ml_dtypes, dtype, dtype)).itemsize
    plain: list[dict[str, Any]] = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    if size == 1:
        plain = [{"name": "bytes"}, {"name": "crc32c"}]
    index = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    blosc, frame = SQUEEZED
    packed = [{**blosc, "configuration": {**blosc["configuration"], "typesize": size}}, frame] if squeezed else [SUMMED]
    inside = {"chunk_shape": list(tile), "codecs": [plain[0], *packed], "index_codecs": index}
    return {
        "shape": list(shape),
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [max(1, n) for n in chunk]}},
        "chunk_key_encoding": {"name": "default"},
        "data_type": dtype,
        "fill_value": False if dtype == "bool" else [0, 0] if dtype.startswith("complex") else 0,
        "codecs": plain if tuple(tile) == tuple(chunk) else [{"name": "sharding_indexed", "configuration": inside}],
    }


def create(folder: Path, name: str, meta: Mapping[str, Any], ctx: Any) -> Any:
    """Write an array's zarr.json and open the array to write to, in a resolved folder; gives a future."""
    return ts.open(_new(folder, name, meta), create=True, context=ctx)


def open_new(folder: Path, name: str, meta: Mapping[str, Any], ctx: Any) -> Any:
    """Open an array that another process creates, without reading its zarr.json; gives a future."""
    return ts.open(_new(folder, name, meta), open=True, assume_metadata=True, context=ctx)


def open_old(folder: Path, name: str, ctx: Any, driver: str = "zarr3", ocdbt: bool = False, mapped: bool = False) -> Any:
    """Open an array to read; a missing file is an error, never zeros. Gives a future.

    ``mapped`` reads files through memory maps: half the processor time (tensorstore takes fresh pages for every plain read), for files
    that are read whole, since the kernel reads ahead of a map more than of a file.
    """
    spec: dict[str, Any] = {**_spec(folder.resolve(), name), "driver": driver, "fill_missing_data_reads": False}
    if mapped:
        spec["kvstore"]["file_io_mode"] = {"mode": "memmap"}
    if ocdbt:
        spec["kvstore"] = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder.resolve()}/"}, "path": f"{name}/"}
    return ts.open(spec, open=True, read=True, context=ctx)


def reason(error: Exception) -> str:
    """Say in a few words what went wrong in tensorstore, which tells all it knows: the file and the operating system's own word."""
    text = str(error).split(" [source locations", maxsplit=1)[0]
    found = re.search(r'Error (\w+) local file "([^"]+)".*: ([^:\[\]]+) \[(?:os_error_code|tensorstore_spec)', text, re.DOTALL)
    return f"{found[1]} {found[2]} failed: {found[3]}" if found else text


def window(array: Any, offset: Sequence[int], shape: Sequence[int]) -> Any:
    """Take a box of a tensorstore array; what is written to it or takes its values need not have its origin."""
    return array[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))] if shape else array


def write(array: Any, offset: Sequence[int], x: Any) -> Any:
    """Write a numpy array into a box; gives a future. The memory must stay as it is until then."""
    future = window(array, offset, x.shape).write(x, can_reference_source_data_indefinitely=True)
    future.commit.force()  # nobody may ask for the result: tensorstore would be free to let it wait
    return future


def read_into(array: Any, offset: Sequence[int], x: Any) -> Any:
    """Read a box into a numpy array's memory; gives a future."""
    return ts.array(x).write(window(array, offset, x.shape))


def _new(folder: Path, name: str, meta: Mapping[str, Any]) -> dict[str, Any]:
    return _spec(folder, name) | {"metadata": dict(meta), "store_data_equal_to_fill_value": True}


def _spec(folder: Path, name: str) -> dict[str, Any]:
    return {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder}/{name}/"}}
