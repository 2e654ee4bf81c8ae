"""The command ``mtl``: its first word names a module beside this one, whose ``main(arguments)`` does the work."""

import importlib
import os
import pkgutil
import select
import sys
from pathlib import Path

from mtl.errors import unknown
from mtl.runtime import process

READER_GONE = 141
"""The exit code of a program whose reader has left: what a shell gives for one that SIGPIPE ended."""


def main() -> None:
    """Run one command; a user's error ends it with one message, and a reader that leaves (`mtl ... | head`) ends it without any."""
    process.guarded(while_read)


def while_read() -> None:
    """Run one command as long as somebody reads what it prints."""
    try:
        run()
        sys.stdout.flush()
    except BrokenPipeError:
        if not readers_gone():
            raise  # another pipe than the output's: a worker is gone
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):
            os.dup2(nowhere, descriptor)  # what is still in Python's buffers goes there
        process.leave(READER_GONE)


def readers_gone() -> bool:
    """Tell whether nobody reads standard output, or standard error, any more."""
    poll = select.poll()
    for descriptor in (1, 2):
        poll.register(descriptor, 0)
    return any(found & (select.POLLERR | select.POLLHUP) for _, found in poll.poll(0))


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
