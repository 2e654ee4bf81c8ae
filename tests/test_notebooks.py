"""The notebooks of docs/notebooks: each runs top to bottom, its own checks hold, and what is stored in it shows no machine."""

import json
import re
import resource
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))
QUICK = ("1_",)
"""The default suite runs this one; the others are slow."""
LIMIT = 120.0


def run(path: Path) -> tuple[Any, float]:
    """Run a notebook from the root, as after `pip install -e .`; a cell that fails raises."""
    book = nbformat.read(path, 4)
    begun = _used()
    NotebookClient(book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    return book, _used() - begun


def _used() -> float:
    """Processor time of ended child processes and theirs: other work on the machine does not count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def outputs(book: Any) -> list[Any]:
    return [out for cell in book.cells if cell.cell_type == "code" for out in cell.outputs]


def test_there_are_five() -> None:
    assert [path.name[:2] for path in NOTEBOOKS] == ["1_", "2_", "3_", "4_", "5_"]


@pytest.mark.parametrize(
    "path", [pytest.param(p, id=p.stem, marks=[] if p.name.startswith(QUICK) else [pytest.mark.slow]) for p in NOTEBOOKS]
)
def test_it_runs_top_to_bottom(path: Path) -> None:
    book, took = run(path)
    print(f"{path.name}: {took:.1f} s of processor time")
    stored = nbformat.read(path, 4)
    kinds = [[(o.output_type, *sorted(o.get("data", {}))) for o in outputs(b) if o.output_type != "stream"] for b in (book, stored)]
    assert kinds[0] == kinds[1], "the stored results are of the same kinds as those of a fresh run"
    assert not [o for o in outputs(book) if o.output_type == "stream" and o.name == "stderr"], "nothing is said on stderr"
    assert took < LIMIT, f"{took:.0f} s of processor time; it should take under two minutes on a laptop"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_what_is_stored_is_clean(path: Path) -> None:
    text = path.read_text()
    assert len(text) < 200_000
    assert not re.search(r"/(tmp|home|root|work|usr|opt)/\w", text), "no machine's paths"
    book = nbformat.read(path, 4)
    assert outputs(book), "results are stored, so that it can be read without running"
    assert not [o for o in outputs(book) if o.output_type == "error"]
    assert [c for c in book.cells if c.cell_type == "markdown"] and json.loads(text)["nbformat"] == 4
    pictures = [o for o in outputs(book) if {"image/png", "text/html"} & set(o.get("data", {}))]
    assert pictures, "a picture"
    for out in outputs(book):
        if "text/html" in out.get("data", {}):
            assert "<" not in out.data["text/plain"].replace("<-", ""), "clean text in a terminal"
