"""Where a run came from: versions, machine, commit."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

from mtl import __version__


def provenance() -> dict[str, object]:
    """Give versions of Python and the main packages, the device's name, and the commit of the source tree where it is a repository."""
    found = {name: version for name in ("torch", "numpy", "safetensors", "tyro", "triton") if (version := _version(name))}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"versions": {"python": platform.python_version(), **found, "mtl": __version__}, "device": device, "commit": _commit()}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    try:
        where = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
        return subprocess.run(where, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
