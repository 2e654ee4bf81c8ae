"""The command ``mtl``: its first word names a module beside this one, whose ``main(arguments)`` does the work."""

import importlib
import pkgutil
from pathlib import Path

from mtl.errors import unknown
from mtl.runtime import process


def main() -> None:
    """Run one command; a user's error ends it with one message."""
    process.guarded(run)


def run() -> None:
    """Hand the rest of the command line to the command it names."""
    names = commands()
    words = process.command_line()
    if not words or words[0] in ("-h", "--help"):
        about = {name: (importlib.import_module(f"mtl.cli.{name}").__doc__ or "").partition("\n")[0] for name in names}
        print("usage: mtl COMMAND ... (mtl COMMAND --help says more)\n\n" + "\n".join(f"  {n:10} {what}" for n, what in about.items()))
    elif words[0] not in names:
        raise unknown("command", words[0], names)
    else:
        importlib.import_module(f"mtl.cli.{words[0]}").main(words[1:])


def commands() -> list[str]:
    """List what ``mtl`` can do: every public module beside this one that is named for a command."""
    return sorted(m.name for m in pkgutil.iter_modules([str(Path(__file__).parent)]) if m.name != "main" and "_" not in m.name)


if __name__ == "__main__":
    main()
