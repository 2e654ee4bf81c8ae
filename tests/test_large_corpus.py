"""A corpus of 10^9 documents is read at once: no index is built, whatever its size."""

import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from mtl.data.corpus import open_corpus
from mtl.data.indexed import open_indexed
from tests.corpora import write

ROOT = Path(__file__).parent.parent
DOCUMENTS = 1_000_000_000


def check(folder: Path, *flags: str, seconds: float) -> None:
    """Have the benchmark measure start-up: under 2 seconds and under 200 MB more, to the first eight samples."""
    command = [
        sys.executable,
        "experiments/bench/data.py",
        "--documents",
        str(DOCUMENTS),
        "--folder",
        str(folder),
        "--samples",
        "20",
        *flags,
    ]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
    assert run.returncode == 0, run.stderr
    found = re.search(r"([\d,]+) documents: first 8 samples after ([\d.]+) s, (\d+) MB more", run.stdout)
    assert found, run.stdout
    assert found[1] == f"{DOCUMENTS:,}" and float(found[2]) < 2 and int(found[3]) < 200, run.stdout


def test_a_thousand_million_documents_start_at_once(tmp_path: Path) -> None:
    """All but two million are empty, so that the index of 12 GB is nearly all a hole; every search still goes over the whole of it."""
    check(tmp_path, "--empty", str(DOCUMENTS - 2_000_000), seconds=120)


def advised(name: str) -> bool:
    """Whether the system knows that a mapped file is read at random (Linux: the flag rr of its mapping)."""
    text = Path("/proc/self/smaps").read_text().split("VmFlags:")
    parts = [(before, after.partition("\n")[0].split()) for before, after in pairwise(text) if name in before]
    assert parts, f"{name} is not mapped"
    return all("rr" in flags for _, flags in parts)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")
def test_a_run_reads_only_what_it_asks_for(tmp_path: Path) -> None:
    """Pages around those that are needed are not read along; whoever reads a file from end to end keeps the system's reading ahead."""
    write(tmp_path / "a", [[1, 2, 3]] * 9)
    write(tmp_path / "b", [[1, 2, 3]] * 9)
    np.save(tmp_path / "c.npy", np.arange(9, dtype=np.uint16))
    kept = [open_corpus(str(tmp_path / name)) for name in ("a", "c.npy")], open_indexed(tmp_path / "b")
    assert [advised(str(tmp_path / name)) for name in ("a.bin", "a.idx", "c.npy", "b.bin", "b.idx")] == [True, True, True, False, False]
    assert len(kept) == 2


@pytest.mark.slow
def test_a_thousand_million_documents_with_tokens_start_at_once(tmp_path: Path) -> None:
    if shutil.disk_usage(tmp_path).free < 14 * 10**9:
        pytest.skip("needs 12 GB of disk")
    check(tmp_path, seconds=1200)
