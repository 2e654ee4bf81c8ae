"""A corpus of 10^9 documents is read at once: no index is built, whatever its size."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.slow
def test_a_thousand_million_documents_with_tokens_start_at_once(tmp_path: Path) -> None:
    if shutil.disk_usage(tmp_path).free < 14 * 10**9:
        pytest.skip("needs 12 GB of disk")
    check(tmp_path, seconds=1200)
