"""Headless Chromium for tests of pages: what a page says after its script ran, and how it looks."""

import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

FLAGS = [
    "--headless",
    "--no-sandbox",
    *(f"--disable-{what}" for what in ("gpu", "quic", "background-networking", "component-update", "sync")),
    "--no-first-run",
    "--hide-scrollbars",
    "--force-device-scale-factor=1",
]
NAMES = ("chromium", "chromium-browser", "google-chrome")


def found() -> str | None:
    """Find the browser."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


needed = pytest.mark.skipif(found() is None, reason="needs Chromium (apt-get install chromium)")


def _run(*arguments: str) -> str:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [str(found()), *FLAGS, f"--user-data-dir={profile}", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def text_of(page: Path, fragment: str = "") -> str:
    """Give the page's HTML as it is after its script ran."""
    return _run("--dump-dom", page.as_uri() + fragment)


def screenshot(page: Path, to: Path, width: int, height: int, fragment: str = "") -> Path:
    """Take a picture of the page in a window of this size."""
    _run(f"--window-size={width},{height}", f"--screenshot={to}", page.as_uri() + fragment)
    return to
