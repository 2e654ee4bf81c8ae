"""What makes saves quick: when the first file goes out, what makes room for the next, how many threads and heaps there are."""

import json
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from mtl import checkpoint
from mtl.checkpoint import arrays, files, geometry
from mtl.checkpoint.peers import Peers, peers
from mtl.checkpoint.plan import make_plan
from mtl.checkpoint.save import part_of, write_checkpoint


def test_the_first_file_goes_out_before_all_arrays_are_made_and_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def telling(name: str, usual: Any) -> Any:
        return lambda *args: told.append(name) or usual(*args)

    for module, name in ((arrays, "create"), (arrays, "write"), (files, "stamp")):
        monkeypatch.setattr(module, name, telling(name, getattr(module, name)))
    state = {f"w{i:02}": torch.randn(40 - i, 8) for i in range(20)}
    checkpoint.save(tmp_path / "c", state)
    assert told.count("create") == told.count("write") == 20
    assert told.index("write") <= 2, "each array that is written brings two others"
    assert told.index("stamp") > max(i for i, name in enumerate(told) if name == "write")
    for at, name in enumerate(told):
        made, written = told[: at + 1].count("create"), told[: at + 1].count("write")
        assert name != "write" or made >= min(20, 2 * written), "arrays are made ahead of what is written"
    assert all(checkpoint.restore(tmp_path / "c", state)[name].equal(x) for name, x in state.items())


def test_whichever_file_ends_makes_room_for_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first file ends after the others here; two may be under way."""
    usual, held, count, late = arrays.write, list[tuple[Any, Future[Any]]](), [0], threading.Event()

    def let_go() -> None:
        for write, future in held:
            future.set_result(write.result())
        held.clear()

    def write(array: Any, offset: Any, x: Any) -> Any:
        done = usual(array, offset, x)
        count[0] += 1
        if count[0] == 1:
            held.append((done, Future()))
            return held[0][1]
        if count[0] == 6:
            let_go()
        return done

    monkeypatch.setattr(arrays, "write", write)
    monkeypatch.setattr(geometry, "FILE_BYTES", 1 << 16)
    monkeypatch.setattr(geometry, "SHARE_BYTES", 1 << 16)
    state = {"w": torch.randn(512, 256)}
    plan, part = make_plan(state, peers()), part_of(state)
    pieces = [(leaf, box, part(leaf.name, box)) for leaf in plan.leaves for box in leaf.mine]
    assert len(pieces) >= 6
    rescue = threading.Timer(20.0, lambda: (late.set(), let_go()))
    rescue.start()
    small = {"_host.json": b"null\n", "_config.json": b"null\n"}
    write_checkpoint(tmp_path / "c", plan, small, peers(), [pieces], in_flight=2 * pieces[0][2].nbytes)
    rescue.cancel()
    assert not late.is_set(), "the oldest file stopped the others"
    assert checkpoint.restore(tmp_path / "c", state)["w"].equal(state["w"])


@pytest.mark.parametrize(("processes", "heaps"), [("1", 16), ("4", 4), ("16", 2)])
def test_malloc_has_as_many_heaps_as_cores(processes: str, heaps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int, int]] = []
    monkeypatch.setattr(files, "from_libc", lambda name: lambda what, n: asked.append((name, what, n)))
    monkeypatch.setattr(arrays, "cores", lambda: 16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    arrays.keep_pages.__wrapped__()
    assert asked == [("mallopt", -8, heaps)]
    monkeypatch.setattr(files, "from_libc", lambda name: None)
    arrays.keep_pages.__wrapped__()  # a C library that has no such thing


def test_in_memory_no_more_threads_write_than_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert arrays.context(10, in_memory=True)["file_io_concurrency"].to_json() == {"limit": 10}
    assert arrays.context(10)["file_io_concurrency"].to_json() == {"limit": 16}, "a disk is waited for"
    assert arrays.context(20)["file_io_concurrency"].to_json() == {"limit": 20}
    usual, asked = arrays.context, list[bool]()
    monkeypatch.setattr(arrays, "context", lambda threads, in_memory: asked.append(in_memory) or usual(threads, in_memory))
    for kinds in ((files._file_system(tmp_path),), ()):
        monkeypatch.setattr(files, "MEMORY", kinds)
        checkpoint.save(tmp_path / str(len(kinds)), {"w": torch.randn(3)})
    assert asked == [True, False]


def test_tiles_are_whole_rows_where_one_process_saves_to_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They lie in memory as in the file: no copy gathers them. Readers of columns want squares, and so do disks and many processes."""
    for name, size in (("ROW_FILE_BYTES", 1 << 20), ("ROW_TILE_BYTES", 1 << 16), ("FILE_BYTES", 1 << 20), ("TILE_BYTES", 1 << 16)):
        monkeypatch.setattr(geometry, name, size)
    monkeypatch.setattr(files, "MEMORY", (files._file_system(tmp_path),))
    state = {"w": torch.randn(1024, 512), "layers": torch.randn(3, 256, 512), "odd": torch.randn(701, 331), "prime": torch.randn(9973)}

    def squares(path: Path) -> dict[str, bool]:
        found = checkpoint.inspect(path).arrays
        assert all(checkpoint.restore(path, state)[name].equal(x) for name, x in state.items())
        assert all(a.tile != a.file for name, a in found.items() if name != "prime")
        return {name: a.tile[-1] < a.file[-1] for name, a in found.items()}

    checkpoint.save(tmp_path / "rows", state)
    assert not any(squares(tmp_path / "rows").values())
    assert checkpoint.inspect(tmp_path / "rows").arrays["w"].tile == (32, 512)
    checkpoint.save(tmp_path / "parts", state, part=part_of(state))
    checkpoint.save(tmp_path / "files", state, files_of=lambda name, shape: shape)
    monkeypatch.setattr(files, "MEMORY", ())
    checkpoint.save(tmp_path / "disk", state)
    for name in ("parts", "files", "disk"):
        assert squares(tmp_path / name) == {"w": True, "layers": True, "odd": True, "prime": False}, name

    def asking(state: Any, group: Any, files_of: Any, rows: bool) -> Any:
        asked.append(rows)
        return make_plan(state, group, files_of, rows)

    saving, asked = sys.modules["mtl.checkpoint.save"], list[bool]()
    monkeypatch.setattr(files, "MEMORY", (files._file_system(tmp_path),))
    monkeypatch.setattr(saving, "peers", lambda: Peers(world=2))
    monkeypatch.setattr(saving, "make_plan", asking)
    monkeypatch.setattr(saving, "write_checkpoint", lambda *_: None)
    checkpoint.save(tmp_path / "two", state)
    assert asked == [False]


@pytest.mark.parametrize(
    ("file", "tile"),
    [
        ((2048, 4096), (256, 4096)),  # 32 MiB: eight tiles of 4
        ((8, 1024, 1024), (1, 1024, 1024)),
        ((512, 1024), (256, 1024)),  # 2 MiB: two tiles, each under a checksum that is quick
        ((256, 1024), (256, 1024)),  # 1 MiB: no tiles
        ((251, 20032), (1, 20032)),  # a prime length: whole rows still
        ((7, 5_000_000), (1, 1_000_000)),
        ((9_090_944,), (568_184,)),
        ((3, 5), (3, 5)),
    ],
)
def test_tiles_of_whole_rows_divide_a_file(file: tuple[int, ...], tile: tuple[int, ...]) -> None:
    assert geometry.row_tile_shape(file, 4) == tile


def test_contents_are_listed_after_waves_of_which_none_is_known_to_be_the_last(tmp_path: Path) -> None:
    """The list says when: a background save's waves may take minutes."""
    state, between = {"w": torch.randn(8, 4)}, list[float]()
    plan, part = make_plan(state, peers()), part_of(state)
    small = {"_host.json": b"null\n", "_config.json": b"null\n"}

    def waves() -> Iterator[Any]:
        yield [(leaf, box, part(leaf.name, box)) for leaf in plan.leaves for box in leaf.mine]
        time.sleep(0.05)
        between.append(time.time_ns())
        yield []

    write_checkpoint(tmp_path / "c", plan, small, peers(), waves())
    told = json.loads((tmp_path / "c/_CHECKPOINT_METADATA").read_bytes())
    assert told["init_timestamp_nsecs"] < between[0] <= told["commit_timestamp_nsecs"]


def test_files_in_memory_are_read_through_maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those on a disk only where they are read whole: the system reads ahead of a map."""
    monkeypatch.setattr(geometry, "FILE_BYTES", 1 << 18)
    state, usual, asked = {"w": torch.randn(1024, 512)}, arrays.open_old, list[bool]()
    checkpoint.save(tmp_path / "c", state)
    monkeypatch.setattr(arrays, "open_old", lambda *args: asked.append(args[-1]) or usual(*args))
    monkeypatch.setattr(geometry, "whole", lambda *_: False)
    monkeypatch.setattr(files, "LOCAL", (files._file_system(tmp_path),))
    for kinds in ((files._file_system(tmp_path),), ()):
        monkeypatch.setattr(files, "MEMORY", kinds)
        assert checkpoint.restore(tmp_path / "c", state)["w"].equal(state["w"])
    assert asked == [True, False]
