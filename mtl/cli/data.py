"""Corpora: build them from text, look into them, merge them."""

import importlib
import pkgutil
from pathlib import Path

from mtl.errors import unknown


def main(arguments: list[str]) -> None:
    """Hand the arguments to the subcommand that the first one names: the module data_NAME beside this one."""
    names = subcommands()
    if not arguments or arguments[0] in ("-h", "--help"):
        about = {name: (importlib.import_module(f"mtl.cli.data_{name}").__doc__ or "").partition("\n")[0] for name in names}
        print("usage: mtl data COMMAND ... (mtl data COMMAND --help says more)\n")
        print("\n".join(f"  {name:10} {what}" for name, what in about.items()))
    elif arguments[0] not in names:
        raise unknown("subcommand of mtl data", arguments[0], names)
    else:
        importlib.import_module(f"mtl.cli.data_{arguments[0]}").main(arguments[1:])


def subcommands() -> list[str]:
    """List the modules named data_NAME beside this one."""
    found = (m.name for m in pkgutil.iter_modules([str(Path(__file__).parent)]))
    return sorted(name.removeprefix("data_") for name in found if name.startswith("data_"))
