"""The one kind of error a user can cause: it names the setting, its value, what was expected and what to do."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A setting, file or mesh that cannot work. Every rank finds the same one by itself, so rank 0 alone prints it."""


class LocalError(UserError):
    """A user's error that one process finds alone, such as a bad token in the samples it reads: it prints it whatever its rank."""


def unknown(kind: str, value: str, known: Iterable[str]) -> UserError:
    """Describe a name that does not exist, with the nearest that does."""
    known = sorted(known)
    spelled = {name.lower(): name for name in known}
    near = difflib.get_close_matches(value.lower(), spelled, 1)
    hint = f" Did you mean {spelled[near[0]]!r}?" if near else ""
    return UserError(f"unknown {kind} {value!r}.{hint} Known: {', '.join(known)}.")


class PeerLost(RuntimeError):
    """Another process of the run is gone: what is left of it ends too, with one message from all."""
