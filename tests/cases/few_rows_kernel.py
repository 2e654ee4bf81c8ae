"""The kernel for few rows, run by Triton's interpreter."""

import torch

from tests import test_few_rows


def check() -> None:
    """Every case in float16: the interpreter cuts bfloat16 off where a GPU rounds."""
    for case in test_few_rows.CASES:
        test_few_rows.check(case, torch.float16, "cpu")
