"""Build a corpus from texts: workers tokenize, one process writes; a killed build leaves nothing that loads and can go on."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mtl.data.encode import encode_block
from mtl.data.indexed import smallest_dtype
from mtl.data.indexed_writer import IndexedWriter, Written, building
from mtl.data.sources import Block, Place, blocks, format_of
from mtl.data.tokenizers import Tokenizer, describe
from mtl.data.tokenizers.description import SUFFIX, dumps
from mtl.errors import UserError
from mtl.runtime.workers import ordered_map

FORMAT = "mtl build 1"


@dataclass(frozen=True)
class Job:
    """What to build, and how."""

    inputs: tuple[Path, ...]
    output: Path
    key: str = "text"
    append_eod: bool = False
    txt: Literal["line", "file"] = "line"
    format: str = "auto"
    workers: int = 1
    on_error: Literal["stop", "skip"] = "stop"
    overwrite: bool = False
    restart: bool = False
    save_every: float = 30.0
    """Seconds between the points from which a killed build goes on."""


@dataclass(frozen=True)
class Progress:
    """How far a build is."""

    place: Place = field(default_factory=Place)
    written: Written = field(default_factory=Written)
    skipped: int = 0
    text_bytes: int = 0
    done: int = 0
    """Bytes of the inputs, as they lie on disk."""
    total: int = 0
    resumed_at: int = 0
    """The value of ``done`` with which this process began."""
    resumed_text: int = 0
    examples: tuple[str, ...] = field(default=())
    """The first malformed rows of this process."""


def build(job: Job, tokenizer: Tokenizer, show: Callable[[Progress], None] = lambda _: None) -> Progress:
    """Build ``job.output``.bin and .idx, and the tokenizer's description beside them."""
    formats = _check(job, tokenizer)
    dtype = smallest_dtype(tokenizer.vocab_size)
    description = describe(tokenizer)
    settings = _settings(job, formats, description.fingerprint, dtype)
    old = None if job.restart else _left(job, settings)
    writer = IndexedWriter(job.output, dtype, job.overwrite, old.written if old else None)
    total = sum(p.stat().st_size for p in job.inputs)
    at = replace(old, total=total, resumed_at=old.done, resumed_text=old.text_bytes) if old else Progress(total=total)
    saved = old is not None
    try:
        state = writer.folder / "state.json"
        if not saved:
            state.unlink(missing_ok=True)
        task = partial(encode_block, tokenizer=tokenizer, key=job.key, append_eod=job.append_eod, dtype=dtype)
        work = blocks(list(job.inputs), formats, job.key, job.txt == "file", at.place)
        last = time.monotonic()
        for block, found in ordered_map(task, work, job.workers):
            at = _account(job, at, block, found.errors)
            writer.add(found.tokens, found.lengths, found.counts)
            at = replace(at, written=writer.written)
            show(at)
            if time.monotonic() - last >= job.save_every:
                writer.flush()
                _save(state, at, settings)
                saved, last = True, time.monotonic()
        if not at.written.tokens:
            raise UserError(f"the inputs hold no text ({_rows(at)}): nothing was written. Is --key {job.key!r} right?")
        writer.finish({SUFFIX: dumps(description)})
    except BaseException as error:
        if saved or isinstance(error, KeyboardInterrupt):
            writer.close()
        else:
            writer.abandon()
        if isinstance(error, OSError):
            raise UserError(f"building {job.output} failed: {error}. Mend that and repeat the command.") from None
        raise
    return at


def _check(job: Job, tokenizer: Tokenizer) -> list[str]:
    """Refuse what cannot work before anything is made; gives the inputs' formats."""
    if not job.inputs:
        raise UserError("--input names no file.")
    if job.workers < 1:
        raise UserError(f"--workers is {job.workers}: it must be at least 1.")
    if job.output.suffix in (".bin", ".idx"):
        raise UserError(f"--output {job.output}: leave {job.output.suffix} away; .bin and .idx are added.")
    if job.append_eod and tokenizer.eod is None:
        raise UserError(f"--append-eod: tokenizer {tokenizer.kind!r} knows no end-of-document token. Name it with --eod.")
    made = {Path(f"{job.output}{suffix}").resolve() for suffix in (".bin", ".idx", SUFFIX)}
    for path in (*job.inputs, *tokenizer.files.values()):
        if path.resolve() in made:
            raise UserError(f"--output {job.output} would replace {path}, which it is made from. Choose another name.")
    return [format_of(path, job.format) for path in job.inputs]


def _account(job: Job, at: Progress, block: Block, errors: list[tuple[int, str]]) -> Progress:
    """Count a block, and end at a malformed row unless they are to be skipped."""
    unit = "row" if block.format == "parquet" else "line"
    told = tuple(f"{block.path} {unit} {number}: {what}" for number, what in errors)
    if told and job.on_error == "stop":
        raise UserError(f"{told[0].removesuffix('.')}. Mend it, or pass --on-error skip to leave such rows out and count them.")
    return replace(
        at, place=block.after, skipped=at.skipped + len(errors), text_bytes=at.text_bytes + block.size, done=block.done,
        examples=(*at.examples, *told)[:20],
    )  # fmt: skip


def _rows(at: Progress) -> str:
    rows = f"{at.written.documents:,} empty documents, {at.skipped:,} malformed rows"
    return rows + (f", the first: {at.examples[0]}" if at.examples else "")


def _settings(job: Job, formats: list[str], fingerprint: str, dtype: np.dtype[Any]) -> dict[str, Any]:
    """What must be equal for a build to go on."""
    inputs = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in job.inputs]
    said = {"format": FORMAT, "inputs": inputs, "formats": formats, "tokenizer": fingerprint, "dtype": dtype.name}
    return json.loads(json.dumps({**said, "key": job.key, "append_eod": job.append_eod, "txt": job.txt}))


def _save(path: Path, at: Progress, settings: dict[str, Any]) -> None:
    new = path.with_name("state.new")
    kept = {name: value for name, value in asdict(at).items() if name in ("place", "written", "skipped", "text_bytes", "done")}
    new.write_text(json.dumps({"settings": settings, **kept}))
    new.replace(path)


def _left(job: Job, settings: dict[str, Any]) -> Progress | None:
    """Find what a killed build left, None if nothing."""
    folder = building(job.output)
    try:
        said = json.loads((folder / "state.json").read_text())
        theirs = said["settings"]
        at = Progress(Place(**said["place"]), Written(**said["written"]), said["skipped"], said["text_bytes"], said["done"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError, OSError):
        raise UserError(f"{folder} holds a build that cannot be gone on with: pass --restart to begin again.") from None
    if theirs != settings:
        other = next(name for name in settings if theirs.get(name) != settings[name])
        raise UserError(
            f"{folder} holds an unfinished build with other {other}: pass --restart to throw it away and begin again, "
            "or repeat its command to go on with it."
        )
    return at
