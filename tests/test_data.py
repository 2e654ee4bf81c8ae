"""Data: the same text, split and order every time, and every sample of a global batch on exactly one data rank, whatever the mesh."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sharding_rules
from mtl.axes import MESH_AXES
from mtl.data import python_text as source
from mtl.data.batches import BatchShape, batch_at, to_device
from mtl.data.python_text import END, python_text
from mtl.data.samples import Documents, Sample, Windows, as_sample
from mtl.errors import UserError
from mtl.ops.attention import chunks
from mtl.sharding.mesh import Mesh, MeshShape
from mtl.sharding.parallel import Parallel

One = Callable[..., Parallel]

# ---------------------------------------------------------------- text


def test_python_text_is_the_same_every_time() -> None:
    first, again = python_text(), python_text()
    assert all(a.dtype == np.uint8 and np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    sizes = [len(part) for part in first]
    assert sizes[0] > 5_000_000 and 0.02 < sizes[1] / sum(sizes) < 0.08
    assert all(bytes(part[-1:]) == END for part in first)


def test_held_out_documents_are_not_trained_on() -> None:
    train, validation = (Counter(part.tobytes().split(END)[:-1]) for part in python_text())
    assert train.total() > 300 and validation.total() > 10
    texts = Counter(source._documents().values())
    assert set(train) & set(validation) <= {t for t, n in texts.items() if n > 1}, "equal text under two names, such as empty modules"
    assert train.total() + validation.total() == texts.total()


def test_a_document_stays_on_its_side(monkeypatch: pytest.MonkeyPatch) -> None:
    def split(names: list[str]) -> list[set[str]]:
        monkeypatch.setattr(source, "_documents", lambda: {n: f"{n}\x00{n}".encode() for n in names})
        found = [part.tobytes().split(END)[:-1] for part in python_text()]
        assert sum(map(len, found)) == len(names), "an END inside a document ends nothing"
        return [{d.decode().split()[0] for d in part} for part in found]

    names = [f"name{i}" for i in range(1000)]
    train, validation = split(names)
    assert train | validation == set(names) and not train & validation
    assert 20 < len(validation) < 90
    assert split(names[::-1][:300]) == [train & set(names[700:]), validation & set(names[700:])]


# ---------------------------------------------------------------- windows


def starts(windows: Windows, indices: range, length: int) -> list[int]:
    """Find where samples start in a text that counts up."""
    found = [windows(i, length - 1) for i in indices]
    assert all(s.tokens.dtype == np.int64 and np.array_equal(s.tokens, np.arange(s.tokens[0], s.tokens[0] + length - 1)) for s in found)
    assert all(np.array_equal(s.targets, s.tokens + 1) for s in found)
    return [int(s.tokens[0]) for s in found]


@settings(deadline=None)
@given(st.integers(2, 40), st.integers(2, 30), st.integers(0, 39), st.integers(0, 10**6))
def test_an_epoch_visits_every_window_once(length: int, count: int, rest: int, seed: int) -> None:
    text: Any = np.arange(length * (count + 1) + rest % length)
    windows = Windows(text, seed, "train")
    for epoch in range(3):
        found = starts(windows, range(epoch * count, (epoch + 1) * count), length)
        assert sorted(found) == list(range(min(found), min(found) + count * length, length)), "no gap and no overlap"
        assert 0 <= min(found) < length


def test_epochs_seeds_and_names_differ() -> None:
    text: Any = np.arange(64 * 101)
    orders = [starts(Windows(text, seed, name), range(100), 64) for seed, name in ((0, "train"), (1, "train"), (0, "validation"))]
    orders.append(starts(Windows(text, 0, "train"), range(100, 200), 64))
    for i, a in enumerate(orders):
        assert a != sorted(a)
        for b in orders[:i]:
            assert sum(x // 64 == y // 64 for x, y in zip(a, b, strict=True)) < 10
    assert len({min(order) for order in orders}) > 1, "borders move"


def test_a_sample_depends_on_seed_and_index_alone() -> None:
    text = np.frombuffer(np.random.default_rng(0).bytes(10_000), np.uint8)
    want = [Windows(text, 3, "train")(i, 32).tokens for i in range(700)]
    windows = Windows(text, 3, "train")
    for i in (699, 0, 350, 350, 12):
        assert np.array_equal(windows(i, 32).tokens, want[i])
    assert all(w.min() >= 0 and w.max() < 256 for w in want)


def test_a_text_that_is_too_short() -> None:
    assert len(Windows(np.zeros(66, np.uint8), 0, "train")(0, 32).targets) == 32
    with pytest.raises(UserError, match=r"the train text has 65 tokens: too few for sequences of 32"):
        Windows(np.zeros(65, np.uint8), 0, "train")(0, 32)


# ---------------------------------------------------------------- documents

TEXT = np.array([5, 6, 0, 7, 8, 9, 0, 4, 3])  # documents end in 0


def test_documents_joined() -> None:
    plain = as_sample(TEXT)
    assert plain.tokens.tolist() == TEXT[:-1].tolist() and plain.targets.tolist() == TEXT[1:].tolist()
    assert plain.weights.tolist() == [1.0] * 8 and plain.positions.tolist() == list(range(8)) and plain.segments is None


@pytest.mark.parametrize(("end", "begins"), [(0, ()), (None, (3, 7)), (0, (0, 3, 7))])
def test_documents_apart_known_by_their_end_or_by_their_beginnings(end: int | None, begins: tuple[int, ...]) -> None:
    found = as_sample(TEXT, Documents(True, True, True, end), begins)
    assert found.segments is not None and found.segments.tolist() == [0, 0, 0, 1, 1, 1, 1, 2]
    assert found.positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 0]
    assert found.weights.tolist() == [1, 1, 0, 1, 1, 1, 0, 1]
    assert found.tokens.tolist() == TEXT[:-1].tolist() and found.targets.tolist() == TEXT[1:].tolist()
    last = as_sample(TEXT[:8], Documents(mask_ends=True), [7])
    assert last.weights.tolist() == [1] * 6 + [0], "the last target is another document's"


def test_every_document_setting_acts_alone() -> None:
    apart, reset, masked = (as_sample(TEXT, Documents(**{name: True}, end=0)) for name in ("apart", "reset_positions", "mask_ends"))
    plain = as_sample(TEXT)
    assert apart.segments is not None and reset.segments is None and masked.segments is None
    for sample, name in ((apart, "segments"), (reset, "positions"), (masked, "weights")):
        for field in ("tokens", "targets", "weights", "positions"):
            assert np.array_equal(getattr(sample, field), getattr(plain, field)) == (field != name)


# ---------------------------------------------------------------- batches

SEQ, GLOBAL = 16, 24
CUTS = [
    ("single", MeshShape(), 6),
    ("ddp", MeshShape(replica=4), 3),
    ("fsdp", MeshShape(fsdp=4), 6),
    ("hsdp", MeshShape(replica=2, fsdp=2), 2),
    ("fsdp_tensor", MeshShape(fsdp=2, tensor=2), 4),
    ("context", MeshShape(replica=2, context=2), 4),
    ("ring", MeshShape(fsdp=2, context=4), 3),
    ("fsdp_context_tensor", MeshShape(fsdp=2, context=2, tensor=2), 12),
    ("ulysses", MeshShape(replica=2, fsdp=2, context=2), 3),
]


def everywhere(one: One, table: str, shape: MeshShape, **sizes: int) -> Iterator[Parallel]:
    """Play every device of a mesh in turn; enough for what sends nothing."""
    par = one()
    for place in np.ndindex(*shape.sizes().values()):
        mesh = Mesh(shape, par.mesh.device_mesh, dict(zip(MESH_AXES, map(int, place), strict=True)), {})
        yield Parallel(mesh, sharding_rules.load(table), sizes)


def count_up(index: int, seq_len: int) -> Sample:
    return as_sample(index * 1000 + np.arange(seq_len + 1))


@pytest.mark.parametrize(("table", "shape", "micro"), CUTS)
def test_every_token_is_on_exactly_one_data_rank(one: One, table: str, shape: MeshShape, micro: int) -> None:
    seen: Counter[tuple[int, int]] = Counter()
    copies = set[int]()
    first = 2 * GLOBAL
    for par in everywhere(one, table, shape, batch=GLOBAL, seq=SEQ):
        got = batch_at(par, count_up, first, BatchShape(GLOBAL, micro, SEQ), torch.float64)
        rows, slots = got["rows"], got["slots"]
        count, local_seq = par.mesh.size(par.axes("B")), SEQ // par.mesh.size(par.axes("S"))
        assert rows.shape == (GLOBAL // count // micro, micro) and slots.shape == (local_seq,)
        place = slots.expand(*rows.shape, local_seq)
        assert torch.equal(got["positions"], place)
        assert torch.equal(got["tokens"], (first + rows.unsqueeze(-1)) * 1000 + place)
        assert torch.equal(got["targets"], got["tokens"] + 1), "the target is the next token"
        assert torch.equal(got["weights"], torch.ones_like(got["tokens"], dtype=torch.float64))
        for i, some in enumerate(rows.tolist()):  # a micro-batch step takes consecutive samples over all ranks, on any mesh
            assert {r // (micro * count) for r in some} == {i}
        seen.update((r, s) for r in rows.flatten().tolist() for s in slots.tolist())
        copies.add(par.copies("BS"))
    assert set(seen) == {(r, s) for r in range(GLOBAL) for s in range(SEQ)}
    assert set(seen.values()) == copies and len(copies) == 1


@pytest.mark.parametrize("size", [1, 2, 4])
def test_zigzag_gives_every_rank_an_early_and_a_late_piece(one: One, size: int) -> None:
    piece = SEQ // (2 * size)
    for i, par in enumerate(everywhere(one, "ring", MeshShape(context=size), batch=1, seq=SEQ)):
        late = 2 * size - 1 - i
        slots = batch_at(par, count_up, 0, BatchShape(1, 1, SEQ), torch.float64)["slots"].tolist()
        assert slots == [*range(i * piece, (i + 1) * piece), *range(late * piece, (late + 1) * piece)]
        assert chunks(par) == (((i, late), 2 * size) if size > 1 else ((0,), 1))
    for i, par in enumerate(everywhere(one, "ulysses", MeshShape(context=size), batch=1, seq=SEQ)):
        slots = batch_at(par, count_up, 0, BatchShape(1, 1, SEQ), torch.float64)["slots"].tolist()
        assert slots == [*range(i * SEQ // size, (i + 1) * SEQ // size)], "contiguous where nothing is gained"


def test_consecutive_batches_take_consecutive_samples(one: One) -> None:
    shape = BatchShape(4, 2, SEQ)
    tokens = [batch_at(one(batch=4, seq=SEQ), count_up, i * 4, shape, torch.float32)["tokens"][..., 0].flatten() for i in range(3)]
    assert torch.cat(tokens).tolist() == [1000 * i for i in range(12)]


def test_arrays_beside_the_tokens_are_cut_alike(one: One) -> None:
    whole = np.arange(2 * 3 * SEQ).reshape(2, 3, SEQ)
    extra = {"weights": whole * 0.5, "positions": whole + 7, "segments": whole // 5}
    for par in everywhere(one, "ring", MeshShape(context=2), batch=3, seq=SEQ):
        got = to_device(par, whole, whole + 1, np.zeros((2, 3), np.int64), torch.float32, extra)
        want = torch.from_numpy(whole)[..., got["slots"]]
        assert got["weights"].dtype == torch.float32
        for name, value in {
            "tokens": want,
            "targets": want + 1,
            "weights": want * 0.5,
            "positions": want + 7,
        }.items():
            assert torch.equal(got[name], value.to(got[name].dtype)), name
        assert got["documents"][0, :2].tolist() == [[5, 10, 15, *[16] * 5], [4, 9, 14, *[16] * 5]], "ends are of the whole row"
        assert "segments" not in got


def test_a_sequence_that_does_not_divide(one: One) -> None:
    par = next(everywhere(one, "ring", MeshShape(context=2), batch=1, seq=SEQ + 2))
    with pytest.raises(UserError, match="a sequence of 18 tokens does not divide into the 4 pieces of rules 'ring'"):
        batch_at(par, count_up, 0, BatchShape(1, 1, SEQ + 2), torch.float64)


@pytest.mark.parametrize(
    ("name", "flag"), [("global_batch", "global-batch-size"), ("micro_batch", "micro-batch-size"), ("seq_len", "seq-len")]
)
def test_batch_shapes_are_at_least_1(name: str, flag: str) -> None:
    for value in (0, -3):
        with pytest.raises(UserError, match=rf"train\.{flag} is {value}: it must be at least 1"):
            BatchShape(**{"global_batch": 8, "micro_batch": 2, "seq_len": 4, name: value}).check(1)


def test_a_global_batch_must_divide() -> None:
    for shape, rows in ((BatchShape(8, 2, 4), 1), (BatchShape(8, 2, 4), 4), (BatchShape(24, 3, 1), 8)):
        shape.check(rows)
    for shape, rows, multiple in ((BatchShape(8, 3, 4), 1, 3), (BatchShape(8, 2, 4), 3, 6), (BatchShape(4, 8, 4), 1, 8)):
        with pytest.raises(UserError, match=rf"Use a multiple of {multiple},"):
            shape.check(rows)
