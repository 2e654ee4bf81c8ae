"""The kernel for few rows, run by Triton's interpreter: `python -m tests.cases.interpreted`, a process of its own."""

import importlib
import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch

tests: Any = importlib.import_module("tests.test_few_rows")

for case in tests.CASES:
    tests.check(case, torch.float16, "cpu")  # the interpreter cuts bfloat16 off where a GPU rounds
print("checked", len(tests.CASES))
