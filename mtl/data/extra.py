"""Libraries of the `data` extra, imported only where a file or tokenizer needs them."""

import importlib
from typing import Any

from mtl.errors import UserError


def need(module: str, what: str) -> Any:
    """Import a library of the `data` extra, or say how to get it; ``what`` names what needs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise UserError(f"{what} needs the library {name!r}, which cannot be imported ({error}): pip install 'mtl[data]'.") from None
