"""Texts from files: .jsonl, .txt (each also .gz or .zst) and .parquet, cut into blocks that know their file and line."""

import gzip
import zlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mtl.data.extra import need
from mtl.errors import UserError

BLOCK = 1 << 20
FORMATS = {".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".txt": "txt", ".text": "txt", ".parquet": "parquet"}
PACKED = (".gz", ".zst")
_CHUNK = 1 << 18


@dataclass(frozen=True)
class Place:
    """Where reading stands: in which input, after how many rows, and for lines after how many bytes of text."""

    source: int = 0
    row: int = 0
    byte: int = 0


@dataclass(frozen=True)
class Block:
    """Rows that follow one another in one file: the bytes of whole lines, or values of a column."""

    path: Path
    format: str
    first_row: int
    rows: bytes | list[Any]
    size: int
    """Bytes of text."""
    after: Place
    done: int
    """Bytes of the input files (as they lie on disk) read so far."""


def format_of(path: Path, given: str = "auto") -> str:
    """Tell a file's format by its name, unless it is given."""
    if path.is_dir():
        raise UserError(f"--input {path} is a folder: name its files ({path}/*.jsonl).")
    if not path.exists():
        raise UserError(f"--input {path} does not exist.")
    suffixes = [s.lower() for s in path.suffixes if s.lower() not in PACKED]
    found = FORMATS.get(suffixes[-1] if suffixes else "", "") if given == "auto" else given
    if not found:
        known = ", ".join([*FORMATS, *(f".jsonl{p}" for p in PACKED), *(f".txt{p}" for p in PACKED)])
        raise UserError(f"--input {path}: the name does not tell the format. Known are {known}; or say --format jsonl, txt or parquet.")
    return found


def blocks(paths: list[Path], formats: list[str], key: str, whole_files: bool, start: Place) -> Generator[Block]:
    """Cut the inputs into blocks, from ``start`` on. ``whole_files`` makes one row of a .txt file."""
    done = sum(p.stat().st_size for p in paths[: start.source])
    for i in range(start.source, len(paths)):
        path, kind = paths[i], formats[i]
        begin = start if i == start.source else Place(i)
        try:
            if kind == "parquet":
                yield from _columns(path, key, begin, done)
            else:
                yield from _lines(path, kind, whole_files and kind == "txt", begin, done)
        except OSError as error:
            raise UserError(f"--input {path} cannot be read: {error}.") from None
        done += path.stat().st_size


def _lines(path: Path, kind: str, whole: bool, begin: Place, done: int) -> Iterator[Block]:
    """Cut a file of lines at the ends of lines, or not at all."""
    row, byte = begin.row, begin.byte
    rest: list[bytes] = []
    held = 0

    def block(data: bytes, at: int) -> Block:
        text = data.removeprefix(b"\xef\xbb\xbf") if byte == 0 else data
        after = Place(begin.source, row + (1 if whole else data.count(b"\n") + (not data.endswith(b"\n"))), byte + len(data))
        return Block(path, "whole" if whole else kind, row, text, len(text), after, done + at)

    with path.open("rb") as raw:
        try:
            for chunk in _chunks(path, raw, begin.byte):
                cut = -1 if whole or held + len(chunk) < BLOCK else chunk.rfind(b"\n")
                if cut >= 0:
                    made = block(b"".join([*rest, chunk[: cut + 1]]), raw.tell())
                    row, byte = made.after.row, made.after.byte
                    yield made
                    rest, held, chunk = [], 0, chunk[cut + 1 :]  # noqa: PLW2901
                rest.append(chunk)
                held += len(chunk)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"--input {path} is cut short or damaged after line {row:,}: {error}. Copy it again.") from None
        if data := b"".join(rest):
            yield block(data, raw.tell())


def _chunks(path: Path, raw: BinaryIO, skip: int) -> Iterator[bytes]:
    """Give a file's text in chunks, from byte ``skip`` of the text on."""
    packed = path.suffix.lower()
    if packed not in PACKED:
        raw.seek(skip)
        while chunk := raw.read(_CHUNK):
            yield chunk
        return
    for chunk in _unzip(raw) if packed == ".gz" else _unzstd(raw, str(path)):
        if skip >= len(chunk):
            skip -= len(chunk)
        else:
            yield chunk[skip:]
            skip = 0


def _unzip(raw: BinaryIO) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=raw, mode="rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def _unzstd(raw: BinaryIO, name: str) -> Iterator[bytes]:
    """Unpack frame after frame; the library itself does not say when the last one is cut short."""
    library = need("zstandard", f"--input {name}")
    unpacker = library.ZstdDecompressor(max_window_size=2**31)
    frame: Any = None
    try:
        while chunk := raw.read(_CHUNK):
            while chunk:
                frame = frame or unpacker.decompressobj()
                if text := frame.decompress(chunk):
                    yield text
                chunk, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    except library.ZstdError as error:
        raise EOFError(str(error)) from None
    if frame is not None:
        raise EOFError("the compressed data ends in the middle")


def _columns(path: Path, key: str, begin: Place, done: int) -> Iterator[Block]:
    """Read one column of a parquet file, some rows at a time."""
    arrow = need("pyarrow", f"--input {path}")
    parquet = need("pyarrow.parquet", f"--input {path}")
    row = 0
    try:
        with parquet.ParquetFile(path) as file:
            names: list[str] = file.schema_arrow.names
            if key not in names:
                raise UserError(f"--input {path} has no column {key!r}: it has {', '.join(names)}. Choose one with --key.")
            share = path.stat().st_size / max(file.metadata.num_rows, 1)
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                if row + count <= begin.row:
                    row += count
                    continue
                for batch in file.iter_batches(batch_size=256, row_groups=[group], columns=[key]):
                    values = _as_bytes(arrow, batch.column(0)).to_pylist()[max(begin.row - row, 0) :]
                    first, row = row + batch.num_rows - len(values), row + batch.num_rows
                    if values:
                        after = Place(begin.source, row)
                        yield Block(path, "parquet", first, values, batch.column(0).nbytes, after, done + int(row * share))
    except UserError:
        raise
    except (arrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise UserError(f"--input {path} is no parquet file that can be read, after row {row:,}: {error}.") from None


def _as_bytes(arrow: Any, column: Any) -> Any:
    """Give text as bytes, so that a row that is not UTF-8 is found as a row."""
    if arrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if arrow.types.is_large_string(column.type):
        return column.cast(arrow.large_binary())
    return column.cast(arrow.binary()) if arrow.types.is_string(column.type) else column
