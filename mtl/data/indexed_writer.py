"""Write Megatron-LM's .bin/.idx corpora in a folder beside them; they take their names only when they are whole."""

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from mtl.data.indexed import CODES, HEADER, MAGIC, VERSION, Tokens, bin_path, idx_path
from mtl.errors import UserError

_BLOCK = 1 << 20


@dataclass(frozen=True)
class Written:
    """How much stands on disk for certain."""

    tokens: int = 0
    sequences: int = 0
    documents: int = 0


def building(prefix: str | Path) -> Path:
    """Name the folder in which a corpus is written."""
    return Path(f"{prefix}.building")


class IndexedWriter:
    """Takes documents one after another. ``finish`` makes the corpus; before it, nothing exists that would load."""

    def __init__(self, prefix: str | Path, dtype: np.dtype[Any], overwrite: bool = False, keep: Written | None = None) -> None:
        """Open the folder ``prefix``.building, alone; ``keep`` says how much of what it holds stays, None is nothing."""
        self.prefix, self.dtype, self.overwrite = str(prefix), np.dtype(dtype), overwrite
        self.folder = building(prefix)
        self._check_free()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / "lock").open("w")
        except OSError as error:
            raise UserError(f"--output {prefix} cannot be written: {error}.") from None
        if not _locked(self._lock):
            self._lock.close()
            raise UserError(f"another process is writing {prefix} just now ({self.folder} is locked).")
        keep = keep or Written()
        sizes = {"tokens": keep.tokens * self.dtype.itemsize, "lengths": 4 * keep.sequences, "ends": 8 * keep.documents}
        self._files = {name: self._open(name, size) for name, size in sizes.items()}
        self.written = keep
        self._modes: list[Tokens] = []

    def add(self, tokens: Tokens, lengths: Sequence[int] | Tokens, counts: Sequence[int] | Tokens, modes: Tokens | None = None) -> None:
        """Append documents: their tokens joined, the length of every sequence, and how many sequences each document has."""
        lengths, counts = np.asarray(lengths, dtype=np.int64), np.asarray(counts, dtype=np.int64)
        if lengths.sum() != len(tokens) or counts.sum() != len(lengths):
            raise ValueError(f"{len(tokens)} tokens, lengths of {lengths.sum()}, {len(lengths)} sequences, counts of {counts.sum()}")
        if lengths.size and lengths.max() > np.iinfo(np.int32).max:
            raise UserError(f"a sequence of {lengths.max():,} tokens does not fit the format, which ends at {np.iinfo(np.int32).max:,}.")
        if len(tokens) and self.dtype.kind in "iu":
            low, high = np.iinfo(self.dtype).min, np.iinfo(self.dtype).max
            if int(tokens.min()) < low or int(tokens.max()) > high:
                raise UserError(
                    f"ids from {tokens.min()} to {tokens.max()} do not fit elements of type {self.dtype.name} ({low} to {high})."
                )
        ends = self.written.sequences + np.cumsum(counts)
        for name, array in (("tokens", tokens.astype(self.dtype, copy=False)), ("lengths", lengths.astype("<i4")), ("ends", ends)):
            self._files[name].write(np.ascontiguousarray(array).data)
        if modes is not None:
            self._modes.append(np.array(modes, dtype=np.int8))
        w = self.written
        self.written = Written(w.tokens + len(tokens), w.sequences + len(lengths), w.documents + len(counts))

    def flush(self) -> Written:
        """Bring everything to disk and say how much it is."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        return self.written

    def finish(self, beside: Mapping[str, str | None] | None = None) -> None:
        """Write the index, then give the files their names, the index last.

        ``beside`` maps suffixes to texts that go with the corpus; None removes what an older corpus of that name had.
        """
        self.flush()
        index = self.folder / "index"
        with index.open("wb") as file:
            self._write_index(file)
            file.flush()
            os.fsync(file.fileno())
        texts = {suffix: text for suffix, text in (beside or {}).items() if text is not None}
        for suffix, text in texts.items():
            (self.folder / f"beside{suffix}").write_text(text)
        self._check_free()
        idx_path(self.prefix).unlink(missing_ok=True)  # from here on an old corpus of that name does not load
        (self.folder / "tokens").replace(bin_path(self.prefix))
        for suffix in beside or {}:
            Path(f"{self.prefix}{suffix}").unlink(missing_ok=True)
        for suffix in texts:
            (self.folder / f"beside{suffix}").replace(f"{self.prefix}{suffix}")
        index.replace(idx_path(self.prefix))
        _sync_folder(idx_path(self.prefix).parent)
        self.abandon()

    def close(self) -> None:
        """Leave the folder as it is, to be gone on with."""
        for file in (*self._files.values(), self._lock):
            with contextlib.suppress(OSError):
                file.close()

    def abandon(self) -> None:
        """Remove the folder."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _check_free(self) -> None:
        taken = next((p for p in (idx_path(self.prefix), bin_path(self.prefix)) if p.exists()), None)
        if taken is not None and not self.overwrite:
            raise UserError(f"{taken} exists already: choose another --output, or pass --overwrite to replace it. Nothing was changed.")

    def _open(self, name: str, size: int) -> IO[bytes]:
        path = self.folder / name
        path.touch()
        if path.stat().st_size < size:
            raise UserError(f"{path} is shorter than its build noted ({size} bytes): pass --restart to begin again.")
        file = path.open("r+b")
        file.truncate(size)
        file.seek(size)
        return file

    def _write_index(self, out: IO[bytes]) -> None:
        w = self.written
        out.write(HEADER.pack(MAGIC, VERSION, CODES[self.dtype], w.sequences, w.documents + 1))
        with (self.folder / "lengths").open("rb") as lengths:
            shutil.copyfileobj(lengths, out, _BLOCK)
            lengths.seek(0)
            place = 0
            while block := lengths.read(4 * _BLOCK):
                sizes = np.frombuffer(block, "<i4").astype(np.int64) * self.dtype.itemsize
                ends = place + np.cumsum(sizes)
                out.write((ends - sizes).astype("<i8").data)
                place = int(ends[-1])
        out.write(bytes(8))
        with (self.folder / "ends").open("rb") as ends_file:
            shutil.copyfileobj(ends_file, out, _BLOCK)
        if self._modes:
            modes = np.concatenate(self._modes)
            if len(modes) != w.sequences:
                raise ValueError(f"{len(modes)} modes for {w.sequences} sequences")
            out.write(modes.data)


def write_indexed(
    prefix: str | Path, documents: Iterable[Sequence[int]], dtype: np.dtype[Any] | type[np.integer[Any]], overwrite: bool = False
) -> None:
    """Write documents of one sequence each as a corpus, whole or not at all; an empty document has no sequence."""
    writer = IndexedWriter(prefix, np.dtype(dtype), overwrite)
    try:
        for document in documents:
            tokens = np.asarray(document, dtype=np.int64)
            writer.add(tokens, [len(tokens)] if len(tokens) else [], [1 if len(tokens) else 0])
        writer.finish()
    except BaseException:
        writer.abandon()
        raise


def _locked(file: IO[str]) -> bool:
    """Lock a file; the workers of a killed build hold its lock for half a second more."""
    for _ in range(20):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            time.sleep(0.1)
    return False


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
