"""Faults and pitfalls: flipped bytes, truncated files, full disks, writers that fail or die, two writers, and what is kept and removed."""

import ctypes
import dataclasses
import errno
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.checkpoints import check_metric
from experiments.settings import CheckpointSettings
from mtl import checkpoint, tree
from mtl.checkpoint import arrays, files, geometry
from mtl.checkpoint.background import Saver
from mtl.checkpoint.files import UNFINISHED, seal, take_lock, unseal
from mtl.checkpoint.peers import Damaged
from mtl.checkpoint.store import Keep, Store
from mtl.checkpoint.verify import find_damage, verify
from mtl.errors import UserError
from mtl.runtime.log import RunLog
from tests.cases.checkpoint import values
from tests.forks import Forks
from tests.ranks import Ranks
from tests.test_resume import STEPS, TINY, until

CASE = "tests.cases.checkpoint:"
STATE = {"params": {"w": values((700, 900)), "b": values((30,), torch.bfloat16)}, "step": torch.tensor(3)}


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A checkpoint."""
    checkpoint.save(tmp_path / "3", STATE, host={"step": 3}, config={"a": 1}, extra={"_model/tokenizer.json": b"{}" * 50})
    return tmp_path / "3"


def target() -> Any:
    """The tree to restore."""
    return tree.map(lambda x: torch.empty_like(x, device="meta"), STATE)


def flip(path: Path, place: int) -> None:
    """Flip one bit."""
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 1 << place % 8
    path.write_bytes(data)


@pytest.mark.usefixtures("tiles")
def test_every_flipped_bit_is_found_and_named(good: Path, tmp_path: Path) -> None:
    luck, state = random.Random(0), good / "state"
    files = sorted(p.relative_to(state) for p in state.rglob("*") if p.is_file())
    assert len(files) >= 8
    for i in range(60):
        copy = tmp_path / f"copy{i}"
        shutil.copytree(good, copy)
        file = files[i % len(files)]
        flip(copy / "state" / file, luck.randrange(1 << 30))
        with pytest.raises(Damaged) as error:
            checkpoint.restore(copy, target())
        named = file.parts[0] if "/c" in f"/{file.parent}" else str(file)
        assert named in str(error.value), (file, str(error.value))
        with pytest.raises(Damaged):
            verify(copy)
        shutil.rmtree(copy)
    assert find_damage(good) == find_damage(good) and not find_damage(good).problems


@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "commit_success.txt"])
def test_what_lies_beside_the_item_for_orbax_is_checked_too(good: Path, tmp_path: Path, name: str) -> None:
    flipped, gone, item = (shutil.copytree(good, tmp_path / what) for what in ("flipped", "gone", "item"))
    flip(flipped / name, 20)
    (gone / name).unlink()
    for copy in (flipped, gone):
        with pytest.raises(Damaged, match=name):
            verify(copy)
    shutil.move(item / "state", tmp_path / "alone")
    verify(tmp_path / "alone")  # whoever has the item's folder alone has all arrays


def test_a_flipped_byte_anywhere_in_a_frame_is_found(tiles: str, tmp_path: Path) -> None:
    """But six of gzip's header, which say when, how and where it was written: values do not depend on them (nor on a bit of its flags)."""
    magic, idle = (b"\x28\xb5\x2f\xfd", range(0)) if tiles == "squeezed" else (b"\x1f\x8b\x08", range(4, 10))
    state = {"w": torch.randn(600, 700)}
    checkpoint.save(tmp_path / "c", state)
    info = checkpoint.inspect(tmp_path / "c").arrays["w"]
    assert info.tile != info.file
    chunk = next(p for p in (tmp_path / "c/state/w/c").rglob("*") if p.is_file())
    data = chunk.read_bytes()
    frames = [found.start() for found in re.finditer(re.escape(magic), data)]
    assert len(frames) >= 2
    header, block, end = range(20), range(4000, 4020), range(frames[1] - frames[0] - 12, frames[1] - frames[0])
    for place in (*header, *block, *(e for e in end if frames[1] + e < len(data))):
        at = frames[1] + place
        chunk.unlink()  # a reader that gave up may still hold the old one mapped
        chunk.write_bytes(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
        if place in idle:
            assert checkpoint.restore(tmp_path / "c", state)["w"].equal(state["w"])
            continue
        with pytest.raises(Damaged, match="'w'"):
            checkpoint.restore(tmp_path / "c", {"w": torch.empty(600, 700, device="meta")})
    chunk.unlink()
    chunk.write_bytes(data)
    assert checkpoint.restore(tmp_path / "c", state)["w"].equal(state["w"])


@pytest.mark.parametrize("codec", [{"name": "crc32c"}, arrays.SQUEEZED[1]], ids=lambda codec: codec["name"])
def test_what_older_versions_wrote_is_read(codec: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "SUMMED", codec)
    monkeypatch.setattr(arrays, "SQUEEZE_CORES", 1 << 20)
    monkeypatch.setattr(geometry, "FILE_BYTES", 64 << 20)
    state = {"w": torch.randn(3000, 7000)}
    checkpoint.save(tmp_path / "c", state)
    assert json.loads((tmp_path / "c/state/w/zarr.json").read_text())["codecs"][0]["configuration"]["codecs"][1] == codec
    monkeypatch.undo()
    assert checkpoint.restore(tmp_path / "c", state)["w"].equal(state["w"])
    verify(tmp_path / "c")


def test_a_subset_is_restored_although_another_array_is_damaged(good: Path) -> None:
    chunk = next(p for p in (good / "state/params.w/c").rglob("*") if p.is_file())
    flip(chunk, 99)
    assert checkpoint.restore(good, {"step": torch.empty((), dtype=torch.int64)}, subset=True)["step"] == 3
    found = find_damage(good)
    assert [(name, file) for name, file, _ in found.problems] == [("params.w", str(chunk.relative_to(good / "state")))]


@pytest.mark.parametrize("file", ["_METADATA", "_mtl.json", "_host.json", "params.w/zarr.json", "params.w/c/0/0", "step/c"])
@pytest.mark.parametrize("size", [0, 0.5])
def test_power_loss_as_truncation(file: str, size: float, good: Path, tmp_path: Path) -> None:
    path = good / "state" / file
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * size)])
    with pytest.raises(Damaged):
        checkpoint.restore(good, target())
    if file in ("_METADATA", "_mtl.json") and size == 0:
        assert Store(tmp_path).steps() == [], "it is not even listed"


def test_other_versions_and_other_folders_are_refused(good: Path, tmp_path: Path) -> None:
    manifest = unseal(good / "state/_mtl.json")
    (good / "state/_mtl.json").write_bytes(seal({**manifest, "format_version": 2}))
    with pytest.raises(checkpoint.CheckpointError, match=r"format version 2; this mtl reads 1. Use a newer mtl"):
        checkpoint.restore(good, target())
    (good / "state/_mtl.json").write_text("{not json")
    with pytest.raises(checkpoint.CheckpointError, match=r"_mtl.json is damaged"):
        checkpoint.inspect(good)
    (tmp_path / "empty").mkdir()
    with pytest.raises(checkpoint.CheckpointError, match="is no checkpoint"):
        checkpoint.inspect(tmp_path / "empty")
    with pytest.raises(checkpoint.CheckpointError, match=r"It holds the checkpoints 3: name one"):
        (good / "state/_mtl.json").write_bytes(seal(manifest))
        checkpoint.inspect(tmp_path)
    (tmp_path / "manager/7/default").mkdir(parents=True)
    (tmp_path / "manager/7/default/_METADATA").write_text("{}")
    with pytest.raises(checkpoint.CheckpointError, match=r"It holds the checkpoints 7: name one"):  # as Orbax's manager names an item
        checkpoint.inspect(tmp_path / "manager")
    with pytest.raises(checkpoint.CheckpointError, match="there is no such folder"):
        checkpoint.inspect(tmp_path / "none")


def test_every_file_and_folder_is_flushed_before_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[tuple[Path, set[str]]] = []
    real = os.fsync

    def fsync(handle: int) -> None:
        path = Path(f"/proc/self/fd/{handle}").readlink()
        flushed.append((path, {p.name for p in path.iterdir()} if path.is_dir() else set()))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(files, "MEMORY", ())
    monkeypatch.setattr(files, "LITTLE", -1)
    checkpoint.save(tmp_path / "3", STATE | {"many": {f"n{i}": values((3,)) for i in range(80)}}, extra={"_model/x/a.json": b"{}"})
    place = tmp_path / f"3{UNFINISHED}"
    want = {place / p.relative_to(tmp_path / "3"): p for p in [tmp_path / "3", *(tmp_path / "3").rglob("*")]}
    assert len(want) > files.FLUSHES and set(want) == {path for path, _ in flushed[:-1]}
    assert flushed[-1][0] == tmp_path, "the folder's new name comes last"
    for path, held in dict(flushed[:-1]).items():  # each folder's last flush
        assert not want[path].is_dir() or held >= {p.name for p in want[path].iterdir()}, f"{path} was flushed before its last entry came"
    monkeypatch.setattr(files, "MEMORY", files.LOCAL)
    flushed.clear()
    checkpoint.save(tmp_path / "4", STATE)
    assert [path for path, _ in flushed] == [tmp_path] and not find_damage(tmp_path / "4").problems, "in memory there is nothing to flush"


def test_files_leave_for_the_disk_before_the_first_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, Path]] = []
    write_out, flush = files.write_out, files.flush
    monkeypatch.setattr(files, "write_out", lambda path: (write_out(path), done.append(("out", path))))
    monkeypatch.setattr(files, "flush", lambda path: (done.append(("flush", path)), flush(path)))
    monkeypatch.setattr(files, "MEMORY", ())
    monkeypatch.setattr(files, "LITTLE", -1)
    monkeypatch.setattr(geometry, "FILE_BYTES", 1 << 16)
    checkpoint.save(tmp_path / "3", STATE)
    out = {path for what, path in done if what == "out"}
    assert {path.relative_to(f"{tmp_path}/3{UNFINISHED}") for path in out} == {
        path.relative_to(tmp_path / "3") for path in (tmp_path / "3").glob("state/*/c/**/*") if path.is_file()
    } | {Path("state/step/c")}
    last = max(i for i, (what, _) in enumerate(done) if what == "out")
    early, late = ({path for what, path in some if what == "flush"} for some in (done[:last], done[last:]))
    assert len(out) > 30 and not out & early and out < late, "each flush waits for the disk: all files share few"


@pytest.fixture
def whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let one call flush the file system, which notes that it was called and answers with the error's number that stands first."""
    answer, usual = [0], files.from_libc

    def syncfs(handle: int) -> int:
        answer.append(handle)
        ctypes.set_errno(answer[0])
        return -1 if answer[0] else 0

    monkeypatch.setattr(files, "from_libc", lambda name: syncfs if name == "syncfs" else usual(name))
    monkeypatch.setattr(files, "MEMORY", ())
    monkeypatch.setattr(files, "WHOLE", (files._file_system(tmp_path),))
    monkeypatch.setattr(files, "SURE", (0, 0))
    monkeypatch.setattr(files, "_unwritten", lambda: files.LITTLE)
    return answer


def test_one_call_flushes_all_where_little_else_is_to_be_written(whole: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there when the last such call is followed by a flush is all that the commit shows; the folder's new name comes after."""
    done: list[tuple[int, Path, set[Path]]] = []
    place, real = tmp_path / f"3{UNFINISHED}", os.fsync

    def fsync(handle: int) -> None:
        done.append((len(whole), Path(f"/proc/self/fd/{handle}").readlink(), {p.relative_to(place) for p in place.rglob("*")}))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    checkpoint.save(tmp_path / "3", STATE)
    calls, paths, held = zip(*done, strict=True)
    assert held[-2] == {p.relative_to(tmp_path / "3") for p in (tmp_path / "3").rglob("*")}
    assert paths[-1] == tmp_path and all(path.is_relative_to(place) for path in paths[:-1])
    assert calls[-2] == len(whole) == len(done) > 2, "one flush after each call, then that of the name"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WHOLE", ()),
        ("SURE", (99, 0)),
        ("_unwritten", lambda: files.LITTLE + 1),
        ("from_libc", lambda name: None),
        ("answer", errno.EPERM),
    ],
)
def test_files_are_flushed_one_by_one_where_one_call_would_wait_or_say_nothing(
    name: str, value: Any, whole: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert files._flushed_whole(tmp_path)
    if name == "answer":
        whole[0] = value
    else:
        monkeypatch.setattr(files, name, value)
    assert not files._flushed_whole(tmp_path)


def test_what_other_programs_have_not_written_is_counted(tmp_path: Path) -> None:
    (tmp_path / "said").write_text("MemFree:  9 kB\nDirty:               300 kB\nWriteback:            20 kB\nWritebackTmp:  5 kB\n")
    assert files._unwritten(tmp_path / "said") == 1024 * 320
    (tmp_path / "said").write_text("nothing of the kind")
    assert files._unwritten(tmp_path / "said") == files._unwritten(tmp_path / "none") == math.inf


def test_a_file_system_that_cannot_be_flushed_ends_the_save(whole: list[int], tmp_path: Path) -> None:
    whole[0] = errno.EIO
    with pytest.raises(checkpoint.CheckpointError, match=os.strerror(errno.EIO)):
        checkpoint.save(tmp_path / "3", STATE)
    assert not list(tmp_path.iterdir()), "nothing is kept"


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_file_that_cannot_be_written_out_ends_the_save(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_sync_file_range", lambda handle: code)  # a disk that fails or is full
    monkeypatch.setattr(files, "MEMORY", ())
    with pytest.raises(checkpoint.CheckpointError, match=rf"{os.strerror(code)}: '.*/state/.*/c"):
        checkpoint.save(tmp_path / "3", STATE)
    assert not list(tmp_path.iterdir()), "nothing is kept"
    assert not [t.name for t in threading.enumerate() if t.name.startswith("flush")]


@pytest.mark.parametrize("code", [0, None, errno.ENOSYS, errno.EINVAL, errno.ESPIPE, errno.EOPNOTSUPP])
def test_files_are_flushed_where_they_cannot_be_written_out(code: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    (tmp_path / "file").write_bytes(b"values")
    if code is None:
        monkeypatch.setattr(files, "from_libc", lambda name: None)  # a system without it
    elif code:
        monkeypatch.setattr(files, "_sync_file_range", lambda handle: code)
    files.write_out(tmp_path / "file")
    assert len(flushed) == (code != 0)


def test_the_system_says_which_files_it_cannot_write_out() -> None:
    read, write = os.pipe()
    assert files._sync_file_range(read) == errno.ESPIPE and files._sync_file_range(-1) == errno.EBADF
    os.close(read)
    os.close(write)


def test_a_folder_in_a_file_s_place_is_not_that_file(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "file").write_bytes(b"")
    found = [files.is_there(f"{tmp_path}/{name}") for name in ("file", "c", "none", "file/c")]
    assert found == [True, False, False, False]


def test_the_file_system_of_a_path_is_the_one_mounted_last(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    place = tmp_path / "a b"
    mounts = ["none / overlay rw 0 0", f"none {tmp_path}/a\\040b tmpfs rw 0 0", f"/dev/x {tmp_path}/a\\040b/c ext4 rw 0 0"]
    for more, memory in (([], True), ([f"/dev/y {tmp_path}/a\\040b ext4 rw 0 0"], False)):
        monkeypatch.setattr(Path, "read_text", lambda _, lines=(*mounts, *more): "\n".join(lines))
        assert files.in_memory(place / "d") == memory and not files.in_memory(place / "c/d") and not files.in_memory(tmp_path)
        assert files.is_local(place / "d")


def test_a_place_that_cannot_be_a_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("kept")
    with pytest.raises(checkpoint.CheckpointError, match=r"notes/3 cannot be written: .*Nothing was changed"):
        checkpoint.save(tmp_path / "notes/3", STATE)
    with pytest.raises(checkpoint.CheckpointError, match="notes is no checkpoint: it is a file"):
        checkpoint.inspect(tmp_path / "notes")
    assert (tmp_path / "notes").read_text() == "kept"


def test_a_write_error_leaves_nothing(tmp_path: Path) -> None:
    """The operating system refuses files beyond 64 KiB, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(checkpoint.CheckpointError, match=r"File too large|EFBIG|write"):
            checkpoint.save(tmp_path / "c", {"w": values((700, 900))})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())
    checkpoint.save(tmp_path / "c", {"w": values((700, 900))})


def test_the_system_s_own_word_is_found_in_what_tensorstore_tells() -> None:
    """With and without the specification that it adds where an array could not be made."""
    text = 'Error opening "zarr3" driver: Error writing local file "/d/a/zarr.json": Failed writing: "/d/a/zarr.json.__lock": No space left'
    for more in (" [os_error_code='28']", """ [tensorstore_spec='{"shape":[],"path":"/d/a/"}'] [os_error_code='28']"""):
        assert arrays.reason(ValueError(f"RESOURCE_EXHAUSTED: {text}{more}")) == "writing /d/a/zarr.json failed: No space left"


@pytest.mark.parametrize("memory", [("tmpfs",), ()])
def test_a_full_disk_leaves_the_last_good_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: tuple[str, ...]) -> None:
    saving: Any = sys.modules["mtl.checkpoint.save"]
    usual = saving._write_pieces

    def arrays_first(folder: Path, pieces: Any, array: Any, *more: Any) -> None:
        pieces = list(pieces)
        for leaf, *_ in pieces:  # else the disk may be full before one of the arrays is made, which is another file's error
            array(leaf)
        usual(folder, pieces, array, *more)

    monkeypatch.setattr(saving, "_write_pieces", arrays_first)
    monkeypatch.setattr(files, "MEMORY", memory)
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], check=False, capture_output=True).returncode:
        pytest.skip("mounting a file system is not allowed here")
    try:
        checkpoint.save(disk / "1", STATE)
        with pytest.raises(checkpoint.CheckpointError, match=r"^writing .*/2.*/c/.* failed: No space left on device\. Nothing of this"):
            checkpoint.save(disk / "2", STATE)
        assert Store(disk).steps() == [1] and [p.name for p in disk.iterdir()] == ["1"]
        assert not find_damage(disk / "1").problems
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_two_writers_of_one_place_are_refused(tmp_path: Path) -> None:
    release = take_lock(tmp_path / ".c.lock", "c")
    with pytest.raises(ValueError, match="another program is writing"):
        checkpoint.save(tmp_path / "c", STATE)
    release()
    checkpoint.save(tmp_path / "c", STATE)


def test_a_process_that_dies_while_saving_fails_the_others(ranks: Ranks, tmp_path: Path) -> None:
    text = ranks.run(CASE + "deserted", 3, path=str(tmp_path / "c"))
    assert "process 2 did not report within 1 s" in text and "Nothing was committed" in text
    assert not (tmp_path / "c").exists()


def test_copies_in_waves_and_values_as_they_were(tmp_path: Path) -> None:
    """With host memory for a part alone, and with the state overwritten as soon as the fence lets it."""
    state = {f"w{i}": values((300, 400)) + i for i in range(12)} | {"s": torch.tensor(1.5)}
    want = tree.map(torch.clone, state)
    for i, memory in enumerate((None, 1 << 20, 1)):
        saver = Saver(memory)
        saver.prepare(state)
        saver.save(tmp_path / str(i), state)
        saver.fence()
        for x in state.values():
            x.fill_(-1)
        saver.wait()
        held = sum(s.numel() for s in saver._slabs)
        assert memory is None or held <= max(memory, 1 << 19), held
        back = checkpoint.restore(tmp_path / str(i), tree.map(lambda x: torch.empty_like(x, device="meta"), want))
        assert all(back[k].equal(want[k]) for k in want)
        state = tree.map(torch.clone, want)


def test_a_background_failure_is_told_and_raised_once(tmp_path: Path) -> None:
    told: list[str] = []
    saver = Saver(on_failure=told.append)
    (tmp_path / "c").mkdir()
    saver.save(tmp_path / "c", STATE)
    saver.fence()
    with pytest.raises(checkpoint.CheckpointError, match="exists already"):
        saver.wait()
    assert len(told) == 1
    saver.save(tmp_path / "d", STATE)
    saver.wait()
    assert saver.committed == tmp_path / "d" and not find_damage(tmp_path / "d").problems


def test_what_stays_and_what_goes(tmp_path: Path) -> None:
    store = Store(tmp_path)
    losses = {1: 5.0, 2: 1.0, 3: 4.0, 4: None, 5: 3.0, 6: 2.0, 7: 6.0}
    for step, loss in losses.items():
        checkpoint.save(store.path(step), {"a": torch.ones(1)}, host={"metrics": {"eval_loss": loss} if loss else {}})
    (tmp_path / f"9{UNFINISHED}").mkdir()
    (tmp_path / "8/state").mkdir(parents=True)
    (tmp_path / "notes").mkdir()
    assert store.steps() == list(range(1, 8)) and store.latest() == 7 and store.found() == list(range(1, 9))
    assert store.prune(Keep()) == []
    assert store.prune(Keep(2, 3, 2)) == [1, 4, 5]
    assert store.steps() == [2, 3, 6, 7], "the best two, every third, and the newest two"
    assert store.prune(Keep(1)) == [2, 3, 6] and store.steps() == [7]
    assert store.prune(Keep(1)) == []
    store.clean()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["7", "8", "notes"]


def test_a_metric_that_no_step_has_is_refused() -> None:
    settings = CheckpointSettings(keep=1, keep_best=1, metric="eval_loos")
    check_metric(settings, {"loss": 1.0})  # not evaluated: cannot be known
    check_metric(dataclasses.replace(settings, keep_best=0), {"eval_loss": 1.0})
    check_metric(dataclasses.replace(settings, metric="eval_loss"), {"eval_loss": 1.0})
    with pytest.raises(UserError, match=r"unknown metric in --checkpoint.metric 'eval_loos'. Did you mean 'eval_loss'?"):
        check_metric(settings, {"loss": 1.0, "eval_loss": 1.0, "epochs": {}})
    with pytest.raises(UserError, match="'lss'"):
        check_metric(dataclasses.replace(settings, metric="lss"), {"loss": 1.0})


def test_a_damaged_newest_is_passed_over_if_told(forks: Forks, tmp_path: Path) -> None:
    out = tmp_path / "run"
    straight = forks.start([*TINY, "--checkpoint.every", "3", "--out", str(out)])
    assert forks.wait(straight) == [0], straight.text()
    want = (out / "metrics.jsonl").read_text()
    assert Store(out / "checkpoints").steps() == [3, 6, 8]
    flip(next(p for p in (out / "checkpoints/8/state/params.embed.weight/c").rglob("*") if p.is_file()), 5)
    must = forks.start([*TINY, "--resume", "must", "--out", str(out)])
    assert forks.wait(must) == [2] and "array 'params.embed.weight'" in must.text() and "Traceback" not in must.text()
    assert (out / "metrics.jsonl").read_text() == want, "nothing was changed"
    listed = out / "checkpoints/8/state/_mtl.json"
    listed.write_bytes(seal({**unseal(listed), "format_version": 2}))
    newer = forks.start([*TINY, "--resume", "auto", "--out", str(out)])
    assert forks.wait(newer) == [2] and "format version 2; this mtl reads 1. Use a newer mtl" in newer.text()
    assert (out / "metrics.jsonl").read_text() == want, "nothing was changed"
    listed.write_text('{"arrays": ')
    flip(out / "checkpoints/6/state/_host.json", 5)
    auto = forks.start([*TINY, "--resume", "auto", "--out", str(out)])
    assert forks.wait(auto) == [0] and "step 6 is damaged" in auto.text() and "resumed after step 3" in auto.text()
    assert "step 8 is damaged" in auto.text() and "8.damaged" in auto.text()
    assert Store(out / "checkpoints").steps() == [3, 8], "a damaged step is saved again"
    assert (out / "checkpoints/8.damaged/state/_mtl.json").read_text() == '{"arrays": ', "and what was there is kept"
    lines = [[json.loads(line)["loss"] for line in text.splitlines()] for text in (want, (out / "metrics.jsonl").read_text())]
    assert lines[0] == lines[1]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(forks: Forks, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = forks.start([*TINY, "--out", str(out)])
    assert forks.wait(run) == [0], run.text()
    want = (out / "metrics.jsonl").read_text()
    (out / "checkpoints/8/state/_mtl.json").write_text("")
    auto = forks.start([*TINY, "--resume", "auto", "--out", str(out)])
    assert forks.wait(auto) == [2] and "does not start over by itself" in auto.text()
    shutil.rmtree(out / "checkpoints/8")
    checkpoint.save(out / "checkpoints/8", STATE, host={"step": 3})
    auto = forks.start([*TINY, "--resume", "auto", "--out", str(out)])
    assert forks.wait(auto) == [2] and "was not saved by a run after step 8: it says step 3" in auto.text()
    assert (out / "metrics.jsonl").read_text() == want, "nothing was changed"


@pytest.mark.parametrize("what", ["stop", "continue"])
def test_a_failed_save_stops_the_run_or_is_tried_again(what: str, forks: Forks, tmp_path: Path) -> None:
    """A file lies where step 4 should go."""
    out = tmp_path / "run"
    (out / "checkpoints").mkdir(parents=True)
    (out / f"checkpoints/4{UNFINISHED}").write_text("in the way")
    run = forks.start([*TINY, "--checkpoint.every", "2", "--checkpoint.on-error", what, "--resume", "auto", "--out", str(out)])
    code = forks.wait(run)
    assert "The newest good step is 2" in run.text() and "Traceback" not in run.text(), run.text()
    assert code == ([2] if what == "stop" else [0]), run.text()
    assert Store(out / "checkpoints").steps() == ([2] if what == "stop" else [2, 6, STEPS])


def test_a_run_whose_folder_is_taken_away_says_so_and_goes_on(forks: Forks, tmp_path: Path) -> None:
    out, gone = tmp_path / "run", tmp_path / "gone"
    run = forks.start([*TINY, "--train.steps", "100000", "--checkpoint.every", "5", "--checkpoint.on-error", "continue", "--out", str(out)])
    until(run, out, 5)
    out.rename(gone)
    until(run, out, 10)
    run.signal(signal.SIGTERM)
    assert forks.wait(run) == [0], run.text()
    assert f"{out / 'checkpoints'} or files in it are gone" in run.text() and "Traceback" not in run.text()
    newest = Store(out / "checkpoints").latest()
    assert newest is not None and f"after step {newest}: saved" in run.text()
    steps = [json.loads(line)["step"] for folder in (gone, out) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, newest + 1)) and (out / "config.json").exists()


def test_the_log_waits_for_room_on_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The operating system refuses more than 1000 bytes for a while, as a full disk would."""
    log = RunLog(tmp_path, True, 50)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for i in range(1, 51):
        if i in (5, 40):
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000 if i == 5 else soft, hard))
        log.write({"step": i, "loss": 1.0, "tokens_per_second_per_device": 1.0, "text": "x" * 50})
    log.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == list(range(1, 51))
    assert capsys.readouterr().out.count("cannot be written (File too large)") == 1


def test_two_runs_cannot_share_a_folder(forks: Forks, tmp_path: Path) -> None:
    out = tmp_path / "run"
    long = [*TINY, "--train.steps", "100000", "--checkpoint.every", "5", "--checkpoint.keep", "2", "--out", str(out)]
    first = forks.start(long)
    until(first, out, 10)
    second = forks.start([*long, "--resume", "auto"])
    assert forks.wait(second) == [2] and "another program is writing" in second.text(), second.text()
    first.signal(signal.SIGUSR1)
    assert forks.wait(first) == [0], first.text()
    store = Store(out / "checkpoints")
    assert len(store.steps()) <= 3 and f"after step {store.latest()}" in first.text()


def test_a_second_signal_leaves_the_old_one_intact(forks: Forks, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = forks.start([*TINY, "--train.steps", "100000", "--checkpoint.every", "5", "--out", str(out)])
    until(run, out, 5)
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        run.signal(number)
        time.sleep(0.02)
    assert forks.wait(run) == [0], run.text()
    assert all(not find_damage(Store(out / "checkpoints").path(s)).problems for s in Store(out / "checkpoints").steps()[-2:])


def wait_until_caught(pid: int) -> None:
    """Wait until a process has a handler for SIGTERM: a mask in /proc tells."""
    for _ in range(2000):
        caught = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt"))
        if int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.01)


def test_a_signal_during_the_slow_imports_saves_the_first_state(tmp_path: Path) -> None:
    out = tmp_path / "run"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "experiments/pretrain.py", *TINY, "--out", str(out)]
    run = subprocess.Popen(command, cwd=Path(__file__).parent.parent, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_until_caught(run.pid)
    run.send_signal(signal.SIGTERM)
    text, _ = run.communicate(timeout=120)
    assert run.returncode == 0 and "stopped by SIGTERM after step 0" in text, text
    assert Store(out / "checkpoints").steps() == [0]


def test_a_signal_during_compilation_does_not_wait_for_it(tmp_path: Path, forks: Forks) -> None:
    """The first step compiles for many seconds; the state before it is saved within two of them."""
    out = tmp_path / "run"
    run = forks.start([*TINY, "--compile", "step", "--model.layers", "8", "--out", str(out)])
    end = time.monotonic() + 60
    while "mesh one device" not in run.text() and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.5)
    begun = time.monotonic()
    run.signal(signal.SIGTERM)
    assert forks.wait(run) == [0], run.text()
    assert time.monotonic() - begun < 20 and "after step 0" in run.text()
