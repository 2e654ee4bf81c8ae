"""Tell the system how mapped files will be read, so that it reads what is asked for and no more."""

import mmap
from typing import Any


def at_random(array: Any) -> None:
    """Expect reads of a few bytes here and there: without this a page that is needed brings some hundred kilobytes that are not."""
    _advise(array, "MADV_RANDOM")


def in_turn(array: Any) -> None:
    """Expect reads from beginning to end, as of any file."""
    _advise(array, "MADV_NORMAL")


def _advise(array: Any, name: str) -> None:
    while array is not None and not isinstance(array, mmap.mmap):
        array = getattr(array, "base", None)  # an array in memory ends in None
    if array is not None and hasattr(mmap, name):
        array.madvise(getattr(mmap, name))
