"""Text that every Python ships: its manual's topics, its library's docstrings and source, as bytes."""

import hashlib
import os
import pydoc_data.topics
import sysconfig
from pathlib import Path

import numpy as np
import numpy.typing as npt

END = b"\x00"
"""Ends a document; it occurs in no text."""

_LEFT_OUT = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "__pycache__",
    "idlelib",
    "turtledemo",
    "lib2to3",
    "ensurepip",
    "pydoc_data",
}


def python_text() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Give (train, validation): whole documents, split by a hash of their names, so that the same Python gives the same split."""
    parts: dict[bool, list[bytes]] = {True: [], False: []}
    for name, text in sorted(_documents().items()):
        held_out = hashlib.sha256(name.encode()).digest()[0] < 13  # 13 of 256: 5 %
        parts[held_out].append(text.replace(END, b" ") + END)
    train, validation = (np.frombuffer(b"".join(parts[held_out]), dtype=np.uint8) for held_out in (False, True))
    return train, validation


def _documents() -> dict[str, bytes]:
    found = {f"topic:{name}": text.encode() for name, text in pydoc_data.topics.topics.items()}
    library = Path(sysconfig.get_path("stdlib"))
    for folder, folders, files in os.walk(library):
        folders[:] = [name for name in folders if name not in _LEFT_OUT]  # not walked: site-packages alone may hold 10,000 files
        for path in (Path(folder) / name for name in files if name.endswith(".py")):
            if path.is_file():
                found[f"source:{path.relative_to(library).as_posix()}"] = path.read_bytes()
    return found
