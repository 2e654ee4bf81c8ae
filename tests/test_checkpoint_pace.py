"""What makes saves quick: when the first file goes out, what makes room for the next, how many threads and heaps there are."""

import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from mtl import checkpoint
from mtl.checkpoint import arrays, files, geometry
from mtl.checkpoint.peers import peers
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
