"""Saving and restoring: any tree, any mesh, bit for bit; and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mtl import checkpoint, tree
from mtl.checkpoint import arrays, files, geometry
from mtl.checkpoint.arrays import DTYPES
from mtl.runtime.workers import cores
from tests.cases.checkpoint import layouts_of, values
from tests.ranks import Ranks

CASE = "tests.cases.checkpoint:"


def small() -> dict[str, Any]:
    """A tree of every kind of node and type."""
    odd = {name: torch.arange(6).reshape(2, 3).to(dtype) for name, dtype in DTYPES.items()}
    return {"params": {"w": values((40, 30)), "layers": [values((3,)), {"b": values((2, 2))}]}, "step": torch.tensor(7), "odd": odd}


def meta(state: Any) -> Any:
    """The same tree without memory."""
    return tree.map(lambda x: torch.empty_like(x, device="meta"), state)


def same(a: Any, b: Any) -> bool:
    """Bitwise."""
    pairs = zip(tree.paths(a), tree.paths(b), strict=True)
    return all(n == m and x.dtype == y.dtype and x.view(torch.uint8).equal(y.view(torch.uint8)) for (n, x), (m, y) in pairs if x.dim())


def test_every_type_and_node_comes_back(tmp_path: Path) -> None:
    state = small()
    extra = {"_model/config.json": {"layers": 2}, "_model/tokenizer.bin": b"\x00\x01", "_note": Path(__file__)}
    checkpoint.save(tmp_path / "c", state, host={"step": 7}, config={"lr": 0.1}, extra=extra)
    back = checkpoint.restore(tmp_path / "c", meta(state))
    assert same(back, state) and back["step"] == 7
    found = checkpoint.inspect(tmp_path / "c")
    assert found.host == {"step": 7} and found.config == {"lr": 0.1} and found.by_mtl
    assert found.arrays["params.layers.1.b"].shape == (2, 2) and found.arrays["odd.bfloat16"].dtype == "bfloat16"
    assert json.loads(found.read("_model/config.json")) == {"layers": 2} and found.read("_model/tokenizer.bin") == b"\x00\x01"
    assert found.read("_note") == Path(__file__).read_bytes()
    assert checkpoint.structure(found)["params"]["layers"][1]["b"].name == "params.layers.1.b"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c"]


@pytest.mark.parametrize("name", DTYPES)
def test_squeezed_values_take_less_room_and_come_back(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MEMORY", ())
    monkeypatch.setattr(geometry, "TILE_BYTES", 1 << 14)
    torch.manual_seed(0)
    state = {"w": (torch.randn(320, 320, dtype=torch.float64) * 3).to(DTYPES[name])}
    sizes = {}
    for path, needed in (("plain", 1 << 20), ("squeezed", 0)):
        monkeypatch.setattr(arrays, "SQUEEZE_CORES", needed)
        checkpoint.save(tmp_path / path, state)
        assert same(checkpoint.restore(tmp_path / path, meta(state)), state)
        sizes[path] = sum(p.stat().st_size for p in (tmp_path / path / "state/w/c").rglob("*") if p.is_file())
    assert sizes["squeezed"] < sizes["plain"] * {"float32": 0.93, "bfloat16": 0.86}.get(name, 1.01)


def test_values_are_squeezed_where_a_disk_sets_the_pace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MEMORY", ())
    monkeypatch.setattr(arrays, "cores", lambda: 16)
    assert arrays.squeezes(tmp_path)
    for processes in ("2", "3"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert arrays.squeezes(tmp_path) == (processes == "2"), "eight cores a process"
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setattr(files, "MEMORY", (files._file_system(tmp_path),))
    assert not arrays.squeezes(tmp_path), "memory is quicker than that"


def test_cores_are_no_more_than_a_container_s_share(tmp_path: Path) -> None:
    share, bound = tmp_path / "cpu.max", cores(tmp_path / "none")
    for text, want in (("max 100000", bound), ("", bound), ("100000 100000", 1), ("50000 100000", 1), (f"{bound * 10**6} 100000", bound)):
        share.write_text(text)
        assert cores(share) == want, text


def test_all_processes_squeeze_what_the_first_one_does(ranks: Ranks, tmp_path: Path) -> None:
    """Processes that see other machines must not write other bytes than zarr.json says."""
    for first in (True, False):
        path = tmp_path / str(first)
        assert ranks.run(CASE + "squeezed", 4, path=str(path), first=first)
        codecs = json.loads((path / "state/list.0/zarr.json").read_text())["codecs"][0]["configuration"]["codecs"]
        assert ("blosc" in [codec["name"] for codec in codecs]) == first


def test_a_subset_and_other_types_can_be_asked_for(tmp_path: Path) -> None:
    state = small()
    checkpoint.save(tmp_path / "c", state)
    params = checkpoint.restore(tmp_path / "c", {"params": meta(state["params"])})
    assert same(params, {"params": state["params"]})
    cast = checkpoint.restore(tmp_path / "c", {"params": {"w": torch.empty(40, 30, dtype=torch.bfloat16)}}, subset=True)
    assert cast["params"]["w"].equal(state["params"]["w"].bfloat16())


def test_differences_are_listed_by_path_before_anything_is_read(tmp_path: Path) -> None:
    state = {"a": {"w": values((4, 4)), "b": values((3,))}, "n": torch.tensor(1)}
    checkpoint.save(tmp_path / "c", state)
    shutil.rmtree(tmp_path / "c/state/a.w/c")
    other = {"a": {"w": torch.empty(4, 5), "v": torch.empty(2)}, "n": torch.tensor(1.0)}
    with pytest.raises(checkpoint.CheckpointError) as error:
        checkpoint.restore(tmp_path / "c", other)
    text = str(error.value)
    assert "a.v: not in the checkpoint" in text and "a.b: in the checkpoint, but not asked for" in text
    assert "a.w: shape (4, 4) in the checkpoint, (4, 5) asked for" in text and "n: type int64 in the checkpoint, float32 asked for" in text
    with pytest.raises(checkpoint.CheckpointError, match=r"n: in the checkpoint, but not asked for"):
        checkpoint.restore(tmp_path / "c", {"a": meta(state["a"])})


def test_a_missing_file_is_an_error_and_never_zeros(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c", {"w": torch.zeros(4, 4)})
    assert (tmp_path / "c/state/w/c/0/0").is_file(), "zeros are stored too"
    (tmp_path / "c/state/w/c/0/0").unlink()
    with pytest.raises(checkpoint.CheckpointError, match=r"array 'w' is damaged or incomplete"):
        checkpoint.restore(tmp_path / "c", {"w": torch.empty(4, 4)})


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "collision": (lambda: {"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}, "both called 'a.b'"),
    "empty": (lambda: {"a": torch.ones(0, 3)}, "has no elements"),
    "number": (lambda: {"a": 3}, "is a int: expected a tensor"),
    "hidden": (lambda: {"_METADATA": torch.ones(1)}, "not begin with '_'"),
    "slash": (lambda: {"a/b": torch.ones(1)}, "no '/'"),
    "dots": (lambda: {"..": torch.ones(1)}, "no empty part"),
    "type": (lambda: {"a": torch.ones(1).to(torch.complex32)}, "checkpoints cannot hold"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_saved_is_refused(name: str, tmp_path: Path) -> None:
    make, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        checkpoint.save(tmp_path / "c", make())
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c", {"a": torch.ones(2)})
    with pytest.raises(ValueError, match="exists already"):
        checkpoint.save(tmp_path / "c", {"a": torch.zeros(2)})
    assert checkpoint.restore(tmp_path / "c", {"a": torch.empty(2)})["a"].sum() == 2
    with pytest.raises(ValueError, match="cannot be saved as JSON"):
        checkpoint.save(tmp_path / "d", {"a": torch.ones(2)}, host={"a": object()})
    with pytest.raises(ValueError, match="must begin with '_'"):
        checkpoint.save(tmp_path / "d", {"a": torch.ones(2)}, extra={"a": 1})


def test_any_layout_restores_what_any_other_saved(ranks: Ranks, tmp_path: Path) -> None:
    """From and to 1, 2, 4 and 8 processes; all tables at all numbers are slow."""
    paths = []
    for table, world in (("single", 1), ("zero1", 2), ("tensor", 4), ("pipe:fsdp_tensor", 8)):
        paths.append(str(tmp_path / f"{table.replace(':', '_')}{world}"))
        ranks.run(CASE + "save", world, table=table, world=world, path=paths[-1])
    for world, tables in {1: ["single"], 2: ["tensor", "fsdp"], 4: ["hsdp", "pipe:single"], 8: ["fsdp_tensor"]}.items():
        assert ranks.run(CASE + "matrix", world, paths=paths, layouts=[[table, world] for table in tables]) == []


@pytest.mark.slow
@pytest.mark.parametrize("saver", [1, 2, 4, 8])
def test_every_layout_restores_what_every_other_saved(saver: int, ranks: Ranks, tmp_path: Path) -> None:
    """All tables at all numbers of processes, with pipelines, both ways."""
    paths = []
    for table, world in layouts_of(saver):
        paths.append(str(tmp_path / f"{table.replace(':', '_')}{world}"))
        ranks.run(CASE + "save", world, table=table, world=world, path=paths[-1])
    for world in (1, 2, 4, 8):
        assert ranks.run(CASE + "matrix", world, paths=paths, layouts=layouts_of(world)) == []


@pytest.mark.parametrize(("first", "second"), [((2, 2), (1, 1)), ((2, 2), (4, 1)), ((1, 3), (2, 2)), ((4, 2), (2, 3)), ((1, 1), (2, 4))])
def test_uneven_nested_and_replicated_leaves(first: tuple[int, int], second: tuple[int, int], ranks: Ranks, tmp_path: Path) -> None:
    path = str(tmp_path / "c")
    ranks.run(CASE + "save_odd", first[0] * first[1], rows=first[0], columns=first[1], path=path)
    assert ranks.run(CASE + "restore_odd", second[0] * second[1], rows=second[0], columns=second[1], path=path)
    back = checkpoint.restore(path, {name: torch.empty(s) for name, s in {"nested_uneven": (13, 3), "both": (7, 9)}.items()}, subset=True)
    assert back["nested_uneven"].equal(values((13, 3))) and back["both"].equal(values((7, 9)))


@pytest.mark.parametrize("world", [1, 4])
def test_a_tree_can_be_written_box_by_box(world: int, ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(CASE + "streamed", world, path=str(tmp_path / "c"))
    back = checkpoint.restore(tmp_path / "c", {"w": torch.empty(3000, 1000), "b": torch.empty(7, dtype=torch.bfloat16)})
    assert back["w"].equal(values((3000, 1000))) and back["b"].equal(values((7,), torch.bfloat16))


def test_every_process_gets_the_same_refusal(ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    assert "exists already" in ranks.run(CASE + "refusal", 4, kind="exists", path=str(tmp_path / "there"))
    assert "a sum is outstanding" in ranks.run(CASE + "refusal", 2, kind="partial", path=str(tmp_path / "c"))
    assert "process 1: [Errno 28] No space left" in ranks.run(CASE + "refusal", 4, kind="writer", path=str(tmp_path / "c"))
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


def split(shape: tuple[int, ...], cuts: tuple[tuple[int, ...], ...], mesh: tuple[int, ...]) -> geometry.Split:
    """A split on ranks 0, 1, ..."""
    return geometry.Split(shape, cuts, mesh, tuple(range(torch.Size(mesh).numel())))


@pytest.mark.parametrize(
    "case",
    [
        split((32, 4096, 14336), ((), (0,), (1,)), (4, 2)),
        split((32, 4096, 32, 128), ((), (0,), (1,), ()), (8, 4)),
        split((50257, 768), ((1,), (0,)), (2, 4)),
        split((50257, 768), ((), ()), (4, 2)),
        split((8, 4096), ((), (0,)), (2, 2)),
        split((1009, 1013, 3), ((), (), ()), (3,)),
    ],
)
def test_files_cover_an_array_once_and_tiles_divide_them(case: geometry.Split) -> None:
    chunk = geometry.file_shape(case, 4, geometry.FILE_BYTES)
    tile = geometry.tile_shape(chunk, 4, case.shape)
    assert all(c % t == 0 for c, t in zip(chunk, tile, strict=True)), (chunk, tile)
    size = 4 * torch.Size(tile).numel()
    assert size <= geometry.TILE_BYTES
    if 4 * torch.Size(chunk).numel() > 4 << 20 and 1009 not in case.shape:
        assert size >= geometry.TILE_BYTES // 4, (chunk, tile)
    world = len(case.ranks)
    shares = geometry.writers([(case, chunk, 4)], world)[0]
    elements = [sum(torch.Size(shape).numel() for _, shape in shares.get(r, [])) for r in range(world)]
    assert sum(elements) == torch.Size(case.shape).numel()
    assert max(elements) <= 1.35 * sum(elements) / world or sum(elements) * 4 < geometry.SHARE_BYTES * world, elements
    corners = {tuple(o // c for o, c in zip(offset, chunk, strict=True)) for boxes in shares.values() for offset, _ in boxes}
    assert len(corners) == sum(len(boxes) for boxes in shares.values()), "one writer a file"
    assert all(o % c == 0 for boxes in shares.values() for offset, _ in boxes for o, c in zip(offset, chunk, strict=True))


def test_an_unfinished_folder_is_named_and_a_stale_one_is_replaced(tmp_path: Path) -> None:
    left = tmp_path / "c.orbax-checkpoint-tmp"
    (left / "state/old").mkdir(parents=True)
    with pytest.raises(checkpoint.CheckpointError, match="was never finished"):
        checkpoint.inspect(left)
    checkpoint.save(tmp_path / "c", {"a": torch.ones(2)})
    assert not left.exists() and not (tmp_path / "c/state/old").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
