"""The pool of ranks: a case whose rank died is done again, with a warning, and not without end; an error of Python never is."""

from pathlib import Path

import pytest

from tests.ranks import JOINS, Ranks


def test_a_case_whose_rank_died_is_done_again(ranks: Ranks, tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match="done again"):
        assert ranks.run("tests.cases.dying:die", 2, path=str(tmp_path / "tries"), times=1) == 2


@pytest.mark.slow
def test_but_not_without_end(ranks: Ranks, tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning), pytest.raises(AssertionError, match="the rank died"):
        ranks.run("tests.cases.dying:die", 2, path=str(tmp_path / "tries"), times=JOINS)
    assert len((tmp_path / "tries").read_text()) == JOINS


def test_an_error_of_python_is_not_tried_again(ranks: Ranks, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="rank 0: Traceback"):
        ranks.run("tests.cases.dying:die", 2, path=str(tmp_path), times=0)
