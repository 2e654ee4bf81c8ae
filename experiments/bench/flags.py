"""What the benchmarks ask of their flags before anything is timed: one message, not an error at the end of a long run."""

from pathlib import Path
from typing import Any

from mtl.errors import UserError


def check_counts(settings: Any, least: int, *names: str) -> None:
    """Refuse numbers below ``least``; a setting that is None or several numbers may be named too."""
    for name in names:
        value = getattr(settings, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and number < least:
                raise UserError(f"--{name.replace('_', '-')} is {number}: it must be at least {least}.")


def check_file(path: Path | None) -> None:
    """Refuse a --json that no line can be written to."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise UserError(f"--json {path} cannot be written: expected a file in a folder that exists.")
