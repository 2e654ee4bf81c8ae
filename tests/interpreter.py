"""A kernel's check under Triton's interpreter, in a process of its own: Triton reads the switch as it is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def interpret(module: str, call: str) -> None:
    """Run a function of a module of cases; without Triton the test is skipped."""
    pytest.importorskip("triton", reason="needs Triton, whose interpreter runs the kernel")
    command = [sys.executable, "-c", f"from tests.cases import {module}; {module}.{call}"]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1], env={**os.environ, "TRITON_INTERPRET": "1"})
