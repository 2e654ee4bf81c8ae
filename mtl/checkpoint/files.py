"""Files beside the arrays: JSON flushed to the disk, checksums, the commit as one rename, and a lock against a second writer."""

import contextlib
import ctypes
import errno
import fcntl
import functools
import hashlib
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Generator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mtl.checkpoint.peers import CheckpointError, Damaged
from mtl.errors import UserError

ITEM = "state"
MANIFEST = "_mtl.json"
VERSION = 1
AROUND = "../"
"""How the list of contents names what lies beside the item's folder; whoever has that folder alone does not have it."""
UNFINISHED = ".orbax-checkpoint-tmp"
"""A folder with this ending is being written, or was left behind; Orbax and mtl never list it."""
FLUSHES = 64
"""How many files are flushed to the disk at a time: their threads only wait, and an H200 host's disk was sooner done with 64 than 16."""
WRITE_AND_WAIT = 7
"""To sync_file_range(2): write what changed, and wait for that and for what was being written before."""
LOCAL = ("btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "tmpfs", "xfs", "zfs")
"""File systems of this machine alone, whose files may be read through memory maps: a server that goes away would kill the reader."""

MEMORY = ("ramfs", "tmpfs")
"""File systems without a disk."""
WHOLE = ("btrfs", "ext2", "ext3", "ext4", "f2fs", "xfs")
"""File systems that one call brings to the disk whole."""
LITTLE = 64 << 20
"""Bytes that all programs may have written and not brought to the disk, for that call to wait for no one else."""
SURE = (5, 17)
"""The first Linux whose call tells of all errors of a file system."""
REFUSED = (errno.ENOSYS, errno.EPERM, errno.EINVAL, errno.EOPNOTSUPP)
"""What a system says that does not have a call, or does not let it through."""


def dump(value: Any) -> bytes:
    """Spell JSON one way: sorted keys, no surprises."""
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def as_json(value: Any, what: str) -> bytes:
    """Spell a user's value as JSON, or say why it is none."""
    try:
        return dump(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"{what} cannot be saved as JSON: {error}. Use numbers, strings, lists and dicts with string keys.") from None


def write_file(path: Path, data: bytes) -> Path:
    """Write a file; `flush_all` brings it to the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def flush(path: Path) -> None:
    """Flush a file that was written, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_out(path: Path) -> None:
    """Hand a file's values to the disk and wait until it has taken them; nothing is safe before `flush`.

    A flush also waits for the disk to empty its own memory. Files that were all written out before share few such waits.
    Where the system cannot do it (Linux alone can, and not every file system) the file is flushed.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        code = _sync_file_range(handle)
        if code in (errno.ENOSYS, errno.EINVAL, errno.ESPIPE, errno.EOPNOTSUPP):
            os.fsync(handle)
        elif code:
            raise OSError(code, os.strerror(code), str(path))
    finally:
        os.close(handle)


def _sync_file_range(handle: int) -> int:
    """Call Linux's sync_file_range(2), which Python does not have, on a whole file; gives the error's number, or 0."""
    call = from_libc("sync_file_range")
    if call is None:
        return errno.ENOSYS
    return ctypes.get_errno() if call(handle, ctypes.c_int64(0), ctypes.c_int64(0), ctypes.c_uint(WRITE_AND_WAIT)) else 0


@functools.cache
def from_libc(name: str) -> Any:
    """Find a function of the C library, or None where it has no such one."""
    return getattr(ctypes.CDLL(None, use_errno=True), name, None)


def flush_all(paths: Iterable[Path]) -> None:
    """Flush files and folders of one file system: the whole of it at once where that is quick and sure, else many at a time.

    One after the other each would wait for the disk to empty its memory, which files that are flushed together do together.
    """
    todo = list(paths)
    if not todo or _flushed_whole(todo[0]):
        return
    n = min(FLUSHES, len(todo))
    with ThreadPoolExecutor(FLUSHES, thread_name_prefix="flush") as pool:
        for done in [pool.submit(lambda some: [flush(path) for path in some], todo[i::n]) for i in range(n)]:
            done.result()


def _flushed_whole(path: Path) -> bool:
    """Flush the whole file system that holds a path by Linux's syncfs(2), unless that might wait for other programs or not tell of errors.

    A disk took 60 ms to flush a hundred files that it had, and 5 ms so. Some file systems empty the disk's memory before they have written
    all; the flush of one file at the end does so after it. Of two programs that ask, the first alone is told of an error; values of arrays
    are written out, and their errors told, file by file.
    """
    version = tuple(int(n) for n in re.findall(r"\d+", os.uname().release)[:2])
    call = from_libc("syncfs")
    if call is None or version < SURE or _file_system(path) not in WHOLE or _unwritten() > LITTLE:
        return False
    handle = os.open(path, os.O_RDONLY)
    try:
        if call(handle):
            code = ctypes.get_errno()
            if code in REFUSED:
                return False
            raise OSError(code, os.strerror(code), str(path))
        os.fsync(handle)
    finally:
        os.close(handle)
    return True


def _unwritten(said: Path = Path("/proc/meminfo")) -> float:
    """Count the bytes that this machine's programs have written and not brought to a disk."""
    try:
        found = re.findall(r"^(?:Dirty|Writeback): +(\d+) kB", said.read_text(), re.MULTILINE)
    except OSError:
        found = []
    return 1024 * sum(map(int, found)) if found else math.inf


def with_folders(paths: Iterable[Path], top: Path) -> list[Path]:
    """Add to files the folders that hold them, up to ``top``: a file is on the disk once the folders' entries are too."""
    todo = list(paths)
    folders: set[Path] = set()
    for path in todo:
        folder = path.parent
        while folder != top.parent and folder not in folders:
            folders.add(folder)
            folder = folder.parent
    return [*todo, *folders]


def stamp(data: bytes) -> dict[str, Any]:
    """Give a file's size and checksum."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def seal(manifest: Mapping[str, Any]) -> bytes:
    """Spell a manifest with its own checksum: one more line, where sorted keys have it, before that of the files."""
    text, files = dump(manifest), b'\n "files": '
    return text.replace(files, f'\n "checksum": "{hashlib.sha256(text).hexdigest()}",'.encode() + files, 1)


def unseal(path: Path) -> dict[str, Any]:
    """Read a manifest and check it."""
    try:
        manifest = json.loads(path.read_bytes())
        checksum = manifest.pop("checksum")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise Damaged(f"{path} is damaged ({error}). Restore another checkpoint.") from None
    version, intact = manifest.get("format_version"), hashlib.sha256(dump(manifest)).hexdigest() == checksum
    if version != VERSION:
        newer = isinstance(version, int) and version > VERSION
        kind, hint = (CheckpointError, "") if newer and intact else (Damaged, ", or restore another checkpoint")
        hint = f"{'Use a newer mtl' if newer else 'The file may be damaged'}{hint}."
        raise kind(f"{path} has format version {version!r}; this mtl reads {VERSION}. {hint}")
    if not intact:
        raise Damaged(f"{path} is damaged: its checksum does not match. Restore another checkpoint.")
    return manifest


def check_file(folder: Path, name: str, want: Mapping[str, Any]) -> bytes:
    """Read a file that a manifest lists and check it."""
    try:
        data = (folder / name).read_bytes()
    except OSError as error:
        raise Damaged(f"{folder / name} cannot be read ({error.strerror}), but the checkpoint lists it.") from None
    if stamp(data) != dict(want):
        raise Damaged(f"{folder / name} is damaged: its checksum does not match. Restore another checkpoint.")
    return data


def is_there(path: str) -> bool:
    """Tell whether a file is there; what else is wrong with it is raised. Saves ask this of hundreds, for which pathlib is slow."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)  # noqa: PTH116
    except (FileNotFoundError, NotADirectoryError):
        return False


def is_local(path: Path) -> bool:
    """Tell whether a path lies on this machine's own disks or memory."""
    return _file_system(path) in LOCAL


def in_memory(path: Path) -> bool:
    """Tell whether a path lies in a file system that has no disk: there is nothing to flush to."""
    return _file_system(path) in MEMORY


def _file_system(path: Path) -> str:
    """Name the kind of file system that holds a path, as the table of mounts says; nothing where there is no such table."""
    try:
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return ""
    found = path.resolve()
    over = [(len(where), i, kind) for i, (_, where, kind, *_) in enumerate(mounts) if found.is_relative_to(where.replace("\\040", " "))]
    return max(over, default=(0, 0, ""))[2]  # of two mounts on one place the later hides the other


def unfinished(path: Path) -> Path:
    """Name the folder that a checkpoint is written in before it is committed."""
    return path.with_name(path.name + UNFINISHED)


def publish(path: Path) -> None:
    """Make a checkpoint whose files and folders are on the disk visible in one step, on the disk too."""
    partial = unfinished(path)
    if path.exists():
        raise CheckpointError(
            f"{path} came into being while this checkpoint was written: two programs save there. Nothing was overwritten."
        )
    partial.rename(path)
    flush(path.parent)


def refuse_existing(path: Path) -> None:
    """Refuse to write where something is already."""
    if path.exists():
        raise UserError(f"{path} exists already. Checkpoints are never overwritten: choose another folder, or remove it first.")


def remove(path: Path) -> None:
    """Remove a checkpoint so that an interruption never leaves half of it under its name."""
    doomed = path if path.name.endswith(UNFINISHED) else path.with_name(f".trash-{path.name}{UNFINISHED}")
    if doomed != path:
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        flush(path.parent)
    shutil.rmtree(doomed)


@contextlib.contextmanager
def locked(path: Path, what: str) -> Generator[None]:
    """Hold the lock file ``path`` for the time of the block; the operating system drops it when the process ends, however it ends."""
    release = take_lock(path, what)
    try:
        yield
    finally:
        release()


def take_lock(path: Path, what: str) -> Any:
    """Take the lock file ``path`` or refuse; gives the function that releases it."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise UserError(f"another program is writing {what} now (it holds {path}). Two must not share one folder.") from None
        except OSError:
            return _nothing_held(handle)  # a file system without locks
        with contextlib.suppress(OSError):
            if path.stat().st_ino == os.fstat(handle).st_ino:
                break
        os.close(handle)

    def release() -> None:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(handle)

    return release


def _nothing_held(handle: int) -> Any:
    return lambda: os.close(handle)
