"""`mtl data build`, `merge` and `inspect`: bytes against an independent writer, every input format, bad rows, and killed builds."""

import gzip
import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from mtl.cli import data
from mtl.data import tokenizers
from mtl.data.build import Job
from mtl.data.build import build as run
from mtl.data.indexed import open_indexed
from mtl.data.shards import map_tokens, open_readable
from mtl.errors import UserError
from tests import vocabularies

ODD = ["Hello world", "", "wörld \U0001f642 日本\nnext line", "<|endoftext|> is text", "  spaces \t\r\n", "x" * 5000]
TEXTS = ODD + vocabularies.TEXT[:20]


JSON_PIECES = [b'{"text": "', b'"}', b'{"text": "1"}\n', b'{"text": ""}\n', b"null", b"[", b"{}", b"\\ud800"]
PIECES = [*JSON_PIECES, b"\n", b"\r\n", b" ", b"\xef\xbb\xbf", b"\xff"]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return vocabularies.gpt2(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def build(*words: Any, workers: int = 1) -> None:
    data.main(["build", *map(str, words), "--workers", str(workers)])


def null(*words: Any, workers: int = 1) -> None:
    build(*words, "--output", "P", "--tokenizer", "null", "--vocab-size", "1000", workers=workers)


def lines(texts: Sequence[Any], **more: Any) -> str:
    return "".join(json.dumps({"id": i, "text": t, **more}) + "\n" for i, t in enumerate(texts))


def expected(documents: list[list[list[int]]], code: int = 8) -> tuple[bytes, bytes]:
    """Write the two files by the format's description alone."""
    sequences = [s for d in documents for s in d]
    kind = {8: "H", 4: "i"}[code]
    tokens = b"".join(struct.pack(f"<{len(s)}{kind}", *s) for s in sequences)
    pointers, place = [], 0
    for s in sequences:
        pointers.append(place)
        place += len(s) * struct.calcsize(kind)
    ends = [0]
    for d in documents:
        ends.append(ends[-1] + len(d))
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sequences), len(ends))
    rest = struct.pack(f"<{len(sequences)}i{len(sequences)}q{len(ends)}q", *map(len, sequences), *pointers, *ends)
    return tokens, head + rest


def files(prefix: str = "P") -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def documents(prefix: str = "P") -> list[list[int]]:
    corpus = open_indexed(prefix)
    return [corpus.document(d).tolist() for d in range(corpus.documents)]


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("append", [True, False])
def test_gpt2_byte_for_byte(here: Path, gpt2: dict[str, Path], workers: int, append: bool) -> None:
    (here / "X.jsonl").write_text(lines(TEXTS))
    flags = ["--append-eod"] if append else []
    build(
        "--input", "X.jsonl", "--output", "P", "--tokenizer", "gpt2", "--vocab", gpt2["vocab"], "--merges", gpt2["merges"],
        *flags, workers=workers,
    )  # fmt: skip
    own = Tokenizer(models.BPE.from_file(str(gpt2["vocab"]), str(gpt2["merges"])))
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    ids = [own.encode(t).ids for t in TEXTS]
    assert files() == expected([[i + [0] * append] if i else [] for i in ids])
    assert names(here) == ["P.bin", "P.idx", "P.tokenizer.json", "X.jsonl"]


@pytest.mark.parametrize(("size", "code"), [(100, 8), (65498, 8), (65499, 4), (100000, 4)])
def test_null_has_megatrons_element_type(here: Path, size: int, code: int) -> None:
    """Megatron's NullTokenizer counts its end of document, so 65,499 numbers are 65,500 ids."""
    (here / "X.jsonl").write_text(lines(["1 2 3", "", f"{size - 1} 0"]))
    build("--input", "X.jsonl", "--output", "P", "--tokenizer", "null", "--vocab-size", size, "--append-eod")
    assert files() == expected([[[1, 2, 3, size]], [], [[size - 1, 0, size]]], code)


def test_lists_of_texts_are_sequences(here: Path) -> None:
    (here / "X.jsonl").write_text(lines([["1 2", "", "3"], [], "4", [""]]))
    null("--input", "X.jsonl", "--append-eod")
    assert files() == expected([[[1, 2], [3, 1000]], [], [[4, 1000]], []])


def test_every_format_gives_the_same(here: Path) -> None:
    texts = [f"{i} {i + 1} {i * 7 % 1000}" for i in range(900)]
    plain, table = lines(texts, other="x").encode(), "".join(t + "\n" for t in texts).encode()
    packed = zstandard.ZstdCompressor()
    half = len(plain) // 2
    made = {
        "a.jsonl": plain,
        "a.json": plain.rstrip(b"\n"),
        "a.jsonl.gz": gzip.compress(plain[:half]) + gzip.compress(plain[half:]),
        "a.jsonl.zst": packed.compress(plain[:half]) + packed.compress(plain[half:]),
        "bom.jsonl": b"\xef\xbb\xbf" + plain.replace(b"\n", b"\r\n") + b"\r\n\n  \n",
        "a.txt": table,
        "crlf.TXT": b"\xef\xbb\xbf" + table.replace(b"\n", b"\r\n\r\n"),
        "a.txt.gz": gzip.compress(table),
        "a.txt.zst": packed.compress(table),
    }
    for name, content in made.items():
        (here / name).write_bytes(content)
    for kind in ("string", "large_string", "binary"):
        column = pyarrow.array([t.encode() if kind == "binary" else t for t in texts], type=getattr(pyarrow, kind)())
        made[f"{kind}.parquet"] = b""
        whole = pyarrow.table({"n": list(range(900)), "text": column})
        pyarrow.parquet.write_table(whole, here / f"{kind}.parquet", row_group_size=350)
    dictionary = pyarrow.table({"text": pyarrow.array(texts).dictionary_encode()})
    pyarrow.parquet.write_table(dictionary, here / "dictionary.parquet")
    want = [[int(n) for n in t.split()] for t in texts]
    for name in [*made, "dictionary.parquet"]:
        null("--input", name, "--overwrite", workers=2)
        assert documents() == want, name
    null("--input", *made, "--overwrite")
    assert documents() == want * len(made)


def test_blocks_do_not_show(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut into blocks of a few bytes, files give the same corpus."""
    monkeypatch.setattr("mtl.data.sources.BLOCK", 16)
    monkeypatch.setattr("mtl.data.sources._CHUNK", 7)
    content = lines(["1 2", "3", "4 5 6 7 8 9 10 11 12 13 14 15", "", "16"])
    for name, put in {"x.jsonl": content.encode(), "x.jsonl.gz": gzip.compress(content.encode()),
                      "x.jsonl.zst": zstandard.compress(content.encode())}.items():  # fmt: skip
        (here / name).write_bytes(put)
        null("--input", name, "--overwrite", workers=2)
        assert documents() == [[1, 2], [3], list(range(4, 16)), [], [16]]


def test_whole_text_files(here: Path) -> None:
    (here / "a.txt").write_bytes("one\r\n\r\ntwo é\n".encode())
    (here / "b.txt").write_bytes(b"three")
    build("--input", "a.txt", "b.txt", "--output", "P", "--tokenizer", "bytes", "--txt", "file", "--append-eod")
    assert documents() == [[*"one\r\n\r\ntwo é\n".encode(), 256], [*b"three", 256]]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(PIECES) | st.binary(max_size=6), max_size=12).map(b"".join), st.sampled_from(["", ".gz", ".zst"]))
def test_any_bytes_as_lines(here: Path, content: bytes, packed: str) -> None:
    """Whatever a .jsonl holds: the rows that are documents are built, the others counted, none invented."""
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[packed]
    (here / f"X.jsonl{packed}").write_bytes(pack(content))
    good, bad = [], 0
    for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n"):
        try:
            text = line.decode("utf-8")
            if not text.strip(" \t\r"):
                continue
            row = json.loads(text)
            good.append(row["text"].encode())
        except (ValueError, TypeError, KeyError, AttributeError):
            bad += 1
    job = Job((here / f"X.jsonl{packed}",), here / "P", on_error="skip", overwrite=True)
    if any(good):
        assert run(job, tokenizers.load("bytes")).skipped == bad
        assert [bytes(d) for d in documents()] == good
    else:
        with pytest.raises(UserError, match="no text"):
            run(job, tokenizers.load("bytes"))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_packed_files_are_refused_or_read_right(here: Path, data: st.DataObject) -> None:
    """Change or cut a compressed file or a parquet file anywhere: one message, or (a byte that nobody reads) the right corpus."""
    kind = data.draw(st.sampled_from(["jsonl.gz", "jsonl.zst", "parquet"]))
    texts = [f"{i}" * 3 for i in range(50)]
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), here / "X.parquet", write_page_checksum=True)
        whole = (here / "X.parquet").read_bytes()
    elif kind == "jsonl.gz":
        whole = gzip.compress(lines(texts).encode())
    else:
        whole = zstandard.ZstdCompressor(write_checksum=True).compress(lines(texts).encode())
    at = data.draw(st.integers(0, len(whole) - 1))
    cut = data.draw(st.booleans())
    changed = b"" if cut else bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :]
    (here / f"X.{kind}").write_bytes(whole[:at] + changed)
    job = Job((here / f"X.{kind}",), here / "P", overwrite=True)
    try:
        run(job, tokenizers.load("bytes"))
    except UserError:
        return
    assert not cut
    if kind != "parquet":  # parquet's own metadata (counts, statistics, names) carries no checksum
        assert [bytes(d).decode() for d in documents()] == texts


def test_key_choice(here: Path) -> None:
    (here / "X.jsonl").write_text(lines(["1"], body="7 8"))
    null("--input", "X.jsonl", "--key", "body")
    assert documents() == [[7, 8]]


BAD = [
    (b'{"text": "1"', "not JSON"),
    (b"[1]", "not a JSON object but a list"),
    (b'{"body": "1"}', "no key 'text'"),
    (b'{"text": null}', "holds null, not text"),
    (b'{"text": 3}', "holds a number, not text"),
    (b'{"text": ["1", 2]}', "holds a number, not text"),
    (b'{"text": "\\ud800"}', "half a surrogate pair"),
    (b'{"text": "\xff"}', "not UTF-8"),
    (b'{"text": "1 x"}', "is no number"),
    (b'{"text": "1000"}', "outside the vocabulary"),
    (b"[" * 100_000, "not JSON"),
    (b'{"text": "1"} {"text": "2"}', "not JSON"),
    (b"\x00", "not JSON"),
]


@pytest.mark.parametrize(("row", "says"), BAD, ids=range(len(BAD)))
def test_malformed_rows_name_file_and_line(here: Path, row: bytes, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "X.jsonl").write_bytes(b'{"text": "1"}\n\n' + row + b'\n{"text": "2"}\n' + row)
    with pytest.raises(UserError, match=says) as caught:
        null("--input", "X.jsonl")
    assert "X.jsonl line 3: " in str(caught.value) and ".." not in str(caught.value)
    assert names(here) == ["X.jsonl"]
    null("--input", "X.jsonl", "--on-error", "skip", workers=2)
    assert documents() == [[1], [2]]
    said = capsys.readouterr().err
    assert "skipped 2 malformed rows" in said
    assert "X.jsonl line 3: " in said
    assert "X.jsonl line 5: " in said


def test_parquet_with_nulls_and_wrong_columns(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["1", None, "2"], "n": [1, 2, 3]}), "x.parquet")
    with pytest.raises(UserError, match=r"x.parquet row 2: column 'text' holds null"):
        null("--input", "x.parquet")
    null("--input", "x.parquet", "--on-error", "skip")
    assert documents() == [[1], [2]]
    assert "skipped 1 malformed" in capsys.readouterr().err
    with pytest.raises(UserError, match="no column 'body': it has text, n"):
        null("--input", "x.parquet", "--key", "body", "--overwrite")
    with pytest.raises(UserError, match="row 1: column 'n' holds a number"):
        null("--input", "x.parquet", "--key", "n", "--overwrite")
    assert documents() == [[1], [2]]


def test_damaged_inputs(here: Path) -> None:
    content = lines([str(i) for i in range(999)] * 30).encode()
    (here / "a.jsonl.gz").write_bytes(gzip.compress(content)[:-20])
    (here / "b.jsonl.zst").write_bytes(zstandard.compress(content)[:-20])
    (here / "c.jsonl.gz").write_bytes(content)
    (here / "d.jsonl.zst").write_bytes(content)
    (here / "e.parquet").write_bytes(content)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["1"] * 9}), "f.parquet")
    (here / "f.parquet").write_bytes((here / "f.parquet").read_bytes()[:-9])
    (here / "empty.jsonl").write_bytes(b"")
    (here / "blank.jsonl").write_bytes(b"\n\n")
    (here / "empty.parquet").write_bytes(b"")
    (here / "x.csv").write_bytes(b"1")
    (here / "folder").mkdir()
    before = names(here)
    for name, says in {
        "a.jsonl.gz": "cut short", "b.jsonl.zst": "cut short", "c.jsonl.gz": "cut short or damaged", "d.jsonl.zst": "cut short or damaged",
        "e.parquet": "no parquet file", "f.parquet": "no parquet file", "empty.jsonl": "no text", "blank.jsonl": "no text",
        "empty.parquet": "no parquet file", "x.csv": "does not tell the format", "folder": "is a folder", "none.jsonl": "does not exist",
    }.items():  # fmt: skip
        for mode in ("stop", "skip"):
            with pytest.raises(UserError, match=says) as caught:
                null("--input", name, "--on-error", mode, workers=2)
            assert "no text" in says or name in str(caught.value)
            assert names(here) == before


def test_wrong_settings(here: Path) -> None:
    (here / "X.jsonl").write_text(lines(["1"]))
    for words, says in (
        (("--output", "P.bin", "--tokenizer", "bytes"), "leave .bin away"),
        (("--output", "P"), "--tokenizer is not given"),
        (("--output", "P", "--tokenizer", "null"), "needs --vocab-size"),
        (("--output", "P", "--tokenizer", "null", "--vocab-size", "0"), "must be from 1"),
        (("--output", "P", "--tokenizer", "tiktoken", "--model", vocabularies.tiktoken_file(here), "--pattern", "gpt2", "--append-eod"),
         "no end-of-document token"),
        (("--output", "X.jsonl/P", "--tokenizer", "bytes"), "cannot be written"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=says):
            build("--input", "X.jsonl", *words)
    with pytest.raises(UserError, match="at least 1"):
        null("--input", "X.jsonl", workers=0)
    assert names(here) == ["X.jsonl", "small.tiktoken"]


def test_a_corpus_is_not_replaced_unasked(here: Path) -> None:
    (here / "X.jsonl").write_text(lines(["1"]))
    (here / "Y.jsonl").write_text(lines(["2"]))
    null("--input", "X.jsonl")
    with pytest.raises(UserError, match="exists already"):
        null("--input", "Y.jsonl")
    assert documents() == [[1]]
    null("--input", "Y.jsonl", "--overwrite")
    assert documents() == [[2]]


@pytest.mark.parametrize(("suffix", "workers"), [("jsonl", 1), ("jsonl.gz", 2), ("parquet", 2)])
def test_a_killed_build_goes_on(here: Path, suffix: str, workers: int) -> None:
    """Kill builds at several moments: nothing loads, no process stays, and the corpus is in the end that of one build."""
    texts = [" ".join(str((i * j) % 1000) for j in range(40)) for i in range(20_000)]
    for n in range(2):
        name = here / f"{n}.{suffix}"
        if suffix == "parquet":
            pyarrow.parquet.write_table(pyarrow.table({"text": texts}), name, row_group_size=4000)
        else:
            content = lines(texts).encode()
            name.write_bytes(content if suffix == "jsonl" else gzip.compress(content, 1))
    words = ["--input", f"0.{suffix}", f"1.{suffix}", "--tokenizer", "null", "--vocab-size", "1000", "--append-eod"]
    build(*words, "--output", "whole")
    script = "import sys; from mtl.cli import data; data.main(sys.argv[1:])"
    resumed = 0
    for _ in range(40):
        process = subprocess.Popen(
            [sys.executable, "-c", script, "build", *words, "--output", "P", "--workers", str(workers), "--save-every", "0.05"],
            start_new_session=True, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        state = here / "P.building" / "state.json"
        before = state.read_text() if state.exists() else ""
        while process.poll() is None and (not state.exists() or state.read_text() == before):
            time.sleep(0.002)
        if process.poll() is None and resumed < 3:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            assert not (here / "P.idx").exists() or files() == files("whole")
            with pytest.raises(UserError, match="does not exist"):
                open_indexed("P")
            resumed += 1
        else:
            out = process.communicate()[0]
            assert process.returncode == 0
            assert "went on from" in out
            break
    assert resumed == 3
    assert files() == files("whole")
    assert not (here / "P.building").exists()
    assert not workers_left(here)


def workers_left(folder: Path) -> list[str]:
    """List processes that still work in a folder, half a second being given to leave."""
    for _ in range(40):
        left = []
        for p in Path("/proc").glob("[0-9]*"):
            try:
                if (p / "cwd").readlink() == folder and int(p.name) != os.getpid():
                    left.append(p.name)
            except OSError:
                continue
        if not left:
            return []
        time.sleep(0.1)
    return left


def test_what_a_build_left_is_not_mixed_with_another(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtl.data.sources.BLOCK", 10_000)
    monkeypatch.setattr("mtl.data.sources._CHUNK", 10_000)
    (here / "X.jsonl").write_text(lines(["1"] * 3000 + ["bad"]))
    with pytest.raises(UserError, match="line 3001"):
        null("--input", "X.jsonl", "--save-every", "0")
    assert (here / "P.building").exists()
    with pytest.raises(UserError, match="other append_eod"):
        null("--input", "X.jsonl", "--append-eod")
    null("--input", "X.jsonl", "--on-error", "skip")
    assert len(documents()) == 3000
    with pytest.raises(UserError, match="line 3001"):
        null("--input", "X.jsonl", "--save-every", "0", "--overwrite")
    assert len(documents()) == 3000
    (here / "X.jsonl").write_text(lines(["5"]))
    with pytest.raises(UserError, match="other inputs"):
        null("--input", "X.jsonl", "--overwrite")
    null("--input", "X.jsonl", "--overwrite", "--restart")
    assert documents() == [[5]]


def test_merge(here: Path) -> None:
    for name, texts in {"A": ["1 2", "", "3"], "B": [["4", "5 6"], "7"], "C": [""] * 3 + ["8"]}.items():
        (here / f"{name}.jsonl").write_text(lines(texts))
        build("--input", f"{name}.jsonl", "--output", name, "--tokenizer", "null", "--vocab-size", "1000")
    build("--input", "A.jsonl", "B.jsonl", "C.jsonl", "--output", "whole", "--tokenizer", "null", "--vocab-size", "1000")
    data.main(["merge", "--input", "A", "B", "C", "--output", "M"])
    assert files("M") == files("whole")
    assert Path("M.tokenizer.json").read_bytes() == Path("whole.tokenizer.json").read_bytes()
    build("--input", "A.jsonl", "--output", "wide", "--tokenizer", "null", "--vocab-size", "70000")
    build("--input", "A.jsonl", "--output", "other", "--tokenizer", "null", "--vocab-size", "999")
    for words, says in (
        (("A", "wide", "--output", "N"), "only corpora of one element type"),
        (("A", "other", "--output", "N"), "different tokenizers: vocab-size is 1000 in one and 1001|different tokenizers"),
        (("A", "nothing", "--output", "N"), "nothing.idx does not exist"),
        (("A", "B", "--output", "A", "--overwrite"), "one of the inputs"),
        (("A", "B", "--output", "C"), "exists already"),
    ):
        with pytest.raises(UserError, match=says):
            data.main(["merge", "--input", *words])
    assert files("C") == expected([[], [], [], [[8]]])


def test_a_replaced_corpus_loses_its_description(here: Path) -> None:
    (here / "A.jsonl").write_text(lines(["1"]))
    for name in ("A", "M"):
        build("--input", "A.jsonl", "--output", name, "--tokenizer", "null", "--vocab-size", "1000")
    (here / "A.tokenizer.json").unlink()
    data.main(["merge", "--input", "A", "A", "--output", "M", "--overwrite"])
    assert names(here) == ["A.bin", "A.idx", "A.jsonl", "M.bin", "M.idx"]


def test_merge_in_small_pieces(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtl.data.merge._TOKENS", 5)
    monkeypatch.setattr("mtl.data.merge._DOCUMENTS", 4)
    (here / "A.jsonl").write_text(lines(["1 2 3", "", "", "4", "5 6 7 8 9 10 11 12", "", "13 14", "15", "", "", "", "", ""]))
    build("--input", "A.jsonl", "--output", "A", "--tokenizer", "null", "--vocab-size", "1000")
    build("--input", "A.jsonl", "A.jsonl", "--output", "whole", "--tokenizer", "null", "--vocab-size", "1000")
    data.main(["merge", "--input", "A", "A", "--output", "M"])
    assert files("M") == files("whole")


def test_inspect(here: Path, gpt2: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    (here / "X.jsonl").write_text(lines(TEXTS))
    vocabulary = ("--tokenizer", "gpt2", "--vocab", gpt2["vocab"], "--merges", gpt2["merges"])
    build("--input", "X.jsonl", "--output", "P", *vocabulary, "--append-eod")
    capsys.readouterr()
    data.main(["inspect", "P", "--json", "--verify", "--samples", "30", "--picture", "lengths.svg"])
    report = json.loads(capsys.readouterr().out)
    lengths = [len(d) for d in documents()]
    assert (report["documents"], report["tokens"], report["dtype"]) == (len(TEXTS), sum(lengths), "uint16")
    assert (report["lengths"]["shortest"], report["lengths"]["longest"], report["lengths"]["empty"]) == (0, max(lengths), 1)
    assert report["lengths"]["percentiles"]["50"] == sorted(lengths)[(len(lengths) + 1) // 2 - 1]
    assert sum(n for *_, n in report["lengths"]["bins"]) == len(TEXTS)
    assert all(sum(low <= x <= high for x in lengths) == n for low, high, n in report["lengths"]["bins"])
    assert report["special_counts"] == {"<|endoftext|>": len(TEXTS) - 1}
    assert [s["text"] for s in report["samples"]][:3] == ["Hello world<|endoftext|>", "", TEXTS[2] + "<|endoftext|>"]
    assert Path("lengths.svg").read_text().startswith("<svg")
    data.main(["inspect", "P"])
    said = capsys.readouterr().out
    assert "Hello world" in said
    assert "█" in said
    data.main(["inspect", "P", "--document", "5"])
    assert capsys.readouterr().out == "x" * 5000 + "<|endoftext|>\n"
    with pytest.raises(UserError, match="another tokenizer"):
        data.main(["inspect", "P", "--tokenizer", "bytes"])
    Path("P.tokenizer.json").unlink()
    data.main(["inspect", "P"])
    assert "give --tokenizer" in capsys.readouterr().out
    with pytest.raises(UserError, match="but the vocabulary is 0 to 10"):
        data.main(["inspect", "P", "--verify", "--tokenizer", "null", "--vocab-size", "10"])


def test_shards_of_other_projects(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = np.arange(1000, dtype="<u2")
    np.save("a.npy", tokens)
    tokens.tofile("a.bin")
    head = np.zeros(256, "<i4")
    head[:3] = 20240520, 1, 1000
    Path("b.bin").write_bytes(head.tobytes() + tokens.tobytes())
    for name, dtype in (("a.npy", None), ("a.npy", "uint16"), ("a.bin", "uint16"), ("b.bin", None)):
        corpus = open_readable(Path(name), dtype)
        assert corpus.tokens.tolist() == list(range(1000))
        assert (corpus.documents, corpus.document(0).tolist(), corpus.holding(999)) == (1, list(range(1000)), 0)
    tokens.tofile("raw.npy")
    assert len(map_tokens("raw.npy", "uint16")) == 1000
    Path("c.bin").write_bytes(bytes(6) + tokens.tobytes())
    assert map_tokens("c.bin", "uint16", 6).tolist() == list(range(1000))
    data.main(["inspect", "a.bin", "--dtype", "uint16"])
    assert "1,000 tokens of uint16" in capsys.readouterr().out
    np.save("float.npy", np.zeros(3))
    np.save("square.npy", np.zeros((3, 3), "i4"))
    np.save("objects.npy", np.array([{}], dtype=object))
    Path("cut.npy").write_bytes(Path("a.npy").read_bytes()[:-7])
    Path("odd.bin").write_bytes(bytes(5))
    Path("empty.bin").write_bytes(b"")
    for name, dtype, says in (
        ("a.bin", None, "no a.idx beside it .* --data.dtype"), ("a.npy", "int32", "by its own header"),
        ("b.bin", "int32", "by its own header"), ("float.npy", None, "whole numbers"), ("square.npy", None, "one row"),
        ("objects.npy", None, "plain numbers"), ("cut.npy", None, "cut.npy"), ("odd.bin", "uint16", "no whole number"),
        ("empty.bin", "uint16", "no tokens"), ("a.bin", "float32", "data.dtype is"), ("a.bin", "word", "data.dtype is"),
        ("nothing.bin", "uint16", "cannot be read: No such file"), ("nothing", None, "nothing.idx does not exist"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=says):
            open_readable(Path(name), dtype)
