"""Megatron's .bin/.idx files: known answers, round trips, and damage of every kind."""

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mtl.data.indexed import HEADER, Indexed, open_indexed, smallest_dtype
from mtl.data.indexed_writer import IndexedWriter, building, write_indexed
from mtl.errors import UserError

BIN = bytes.fromhex("0100 0200 0300 0201 0900")
IDX = bytes.fromhex(
    "4d4d4944494458 0000 0100000000000000 08 0200000000000000 0300000000000000 03000000 02000000"
    "0000000000000000 0600000000000000 0000000000000000 0100000000000000 0200000000000000"
)
MULTIMODAL = bytes.fromhex(
    "4d4d4944494458 0000 0100000000000000 08 0300000000000000 0300000000000000 02000000 01000000 02000000"
    "0000000000000000 0400000000000000 0600000000000000 0000000000000000 0200000000000000 0300000000000000 000100"
)
quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def put(folder: Path, tokens: bytes = BIN, index: bytes = IDX) -> Path:
    (folder / "P.bin").write_bytes(tokens)
    (folder / "P.idx").write_bytes(index)
    return folder / "P"


def test_known_answer_is_written(tmp_path: Path) -> None:
    write_indexed(tmp_path / "P", [[1, 2, 3], [258, 9]], np.uint16)
    assert (tmp_path / "P.bin").read_bytes() == BIN
    assert (tmp_path / "P.idx").read_bytes() == IDX
    assert sorted(p.name for p in tmp_path.iterdir()) == ["P.bin", "P.idx"]


def test_known_answer_is_read(tmp_path: Path) -> None:
    corpus = open_indexed(put(tmp_path))
    assert (corpus.dtype, corpus.sequences, corpus.documents, corpus.total) == (np.dtype("<u2"), 2, 2, 5)
    assert [corpus.document(i).tolist() for i in range(2)] == [[1, 2, 3], [258, 9]]
    assert corpus.sequence(0, 1, 3).tolist() == [2, 3]
    assert [corpus.holding(i) for i in range(5)] == [0, 0, 0, 1, 1]
    assert [corpus.start(i) for i in range(3)] == [0, 3, 5]
    assert corpus.modes is None
    assert not corpus.tokens.flags.writeable


def test_multimodal_known_answer(tmp_path: Path) -> None:
    writer = IndexedWriter(tmp_path / "W", np.dtype("<u2"))
    writer.add(np.array([1, 2, 3, 258, 9]), [2, 1, 2], [2, 1], np.array([0, 1, 0]))
    writer.finish()
    assert (tmp_path / "W.idx").read_bytes() == MULTIMODAL
    corpus = open_indexed(put(tmp_path, index=MULTIMODAL))
    assert corpus.modes is not None
    assert corpus.modes.tolist() == [0, 1, 0]
    assert [corpus.document(i).tolist() for i in range(2)] == [[1, 2, 3], [258, 9]]
    assert open_indexed(tmp_path / "P", multimodal=True).modes is not None
    with pytest.raises(UserError, match="longer than it says"):
        open_indexed(tmp_path / "P", multimodal=False)


@quick
@given(st.lists(st.lists(st.lists(st.integers(0, 65535), max_size=5), max_size=3), max_size=8), st.sampled_from(["<u2", "<i4", "<i8"]))
def test_round_trip(tmp_path: Path, documents: list[list[list[int]]], dtype: str) -> None:
    writer = IndexedWriter(tmp_path / "R", np.dtype(dtype), overwrite=True)
    for document in documents:
        writer.add(np.array([t for s in document for t in s], dtype=np.int64), [len(s) for s in document], [len(document)])
    writer.finish()
    corpus = open_indexed(tmp_path / "R")
    assert [[corpus.sequence(s).tolist() for s in corpus.document_sequences(d)] for d in range(corpus.documents)] == documents
    flat = [(s, t) for s in range(corpus.sequences) for t in corpus.sequence(s)]
    assert [(corpus.holding(i), corpus.tokens[i]) for i in range(corpus.total)] == flat
    assert sum(corpus.verify(65536)) == corpus.total * corpus.dtype.itemsize + 12 * corpus.sequences + 8 * corpus.documents


def read_all(corpus: Indexed) -> list[list[int]]:
    return [corpus.document(d).tolist() for d in range(corpus.documents)] + [corpus.sequence(s).tolist() for s in range(corpus.sequences)]


@quick
@given(st.data())
def test_damaged_files_give_one_message_or_the_truth(tmp_path: Path, data: st.DataObject) -> None:
    """Cut, lengthen or change a file anywhere: either a UserError, or exactly what an intact index would say."""
    tokens, index = BIN, data.draw(st.sampled_from([IDX, MULTIMODAL]))
    kind = data.draw(st.sampled_from(["cut", "longer", "flip", "number"]))
    if kind == "cut":
        index = index[: data.draw(st.integers(0, len(index) - 1))]
    elif kind == "longer":
        index += data.draw(st.binary(min_size=1, max_size=20))
    elif kind == "flip":
        at = data.draw(st.integers(0, len(index) - 1))
        index = index[:at] + bytes([index[at] ^ data.draw(st.integers(1, 255))]) + index[at + 1 :]
    else:
        at = data.draw(st.sampled_from(range(18, len(index) - 8)))
        index = index[:at] + struct.pack("<q", data.draw(st.integers(-(2**63), 2**63 - 1))) + index[at + 8 :]
    prefix = put(tmp_path, tokens, index)
    try:
        corpus = open_indexed(prefix)
        read_all(corpus)
        list(corpus.verify())
    except UserError:
        return
    assert corpus.total * corpus.dtype.itemsize == len(BIN)
    assert sum(len(corpus.sequence(s)) for s in range(corpus.sequences)) == corpus.total
    plain = HEADER.size + 12 * corpus.sequences + 8 * (corpus.documents + 1)  # only its size tells whether modes follow
    if kind in ("cut", "longer") and len(index) not in (plain, plain + corpus.sequences):
        pytest.fail("damage was not seen")


@quick
@given(st.binary(max_size=200), st.binary(max_size=50))
def test_noise_never_opens_silently(tmp_path: Path, index: bytes, tokens: bytes) -> None:
    with pytest.raises(UserError):
        open_indexed(put(tmp_path, tokens, index))


def header(sequences: int, entries: int, code: int = 8, version: int = 1) -> bytes:
    return HEADER.pack(b"MMIDIDX\x00\x00", version, code, sequences, entries)


@pytest.mark.parametrize(
    ("index", "tokens", "says"),
    [
        (b"", BIN, "cut short"),
        (b"TNTIDX\x00\x00\x00" + IDX[9:], BIN, "no Megatron index"),
        (header(2, 3, version=2) + IDX[34:], BIN, "version 2"),
        (header(2, 3, code=9) + IDX[34:], BIN, "element type 9"),
        (header(2**62, 3) + IDX[34:], BIN, "cut short"),
        (header(2, 0) + IDX[34:-24], BIN, "document entries"),
        (IDX[:-8], BIN, "cut short"),
        (IDX, BIN[:-2], "cut short"),
        (IDX, BIN + b"\x00\x00", "another length"),
        (IDX, b"", "cut short"),
    ],
)
def test_messages(tmp_path: Path, index: bytes, tokens: bytes, says: str) -> None:
    with pytest.raises(UserError, match=says):
        open_indexed(put(tmp_path, tokens, index))


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"P\.idx does not exist"):
        open_indexed(tmp_path / "P")
    put(tmp_path)
    (tmp_path / "P.bin").unlink()
    with pytest.raises(UserError, match=r"P\.bin does not exist"):
        open_indexed(tmp_path / "P")


def test_ids_outside_the_vocabulary(tmp_path: Path) -> None:
    corpus = open_indexed(put(tmp_path))
    with pytest.raises(UserError, match="token 3 is 258"):
        list(corpus.verify(vocab_size=258))
    list(corpus.verify(vocab_size=259))


def test_an_unfinished_corpus_does_not_load_and_an_old_one_stays(tmp_path: Path) -> None:
    writer = IndexedWriter(tmp_path / "P", np.dtype("<u2"))
    writer.add(np.array([1, 2]), [2], [1])
    writer.flush()
    with pytest.raises(UserError, match="locked"):
        IndexedWriter(tmp_path / "P", np.dtype("<u2"))
    writer.close()
    with pytest.raises(UserError, match="does not exist"):
        open_indexed(tmp_path / "P")
    writer.abandon()
    assert not building(tmp_path / "P").exists()
    put(tmp_path)
    with pytest.raises(UserError, match="exists already"):
        IndexedWriter(tmp_path / "P", np.dtype("<u2"))
    assert open_indexed(tmp_path / "P").total == 5


def test_ids_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="65536 do not fit"):
        write_indexed(tmp_path / "P", [[65536]], np.uint16)
    assert list(tmp_path.iterdir()) == []


def test_element_type_is_megatrons() -> None:
    assert [smallest_dtype(n) for n in (1, 50257, 65499, 65500, 65536, 128256)] == [np.dtype("<u2")] * 3 + [np.dtype("<i4")] * 3
