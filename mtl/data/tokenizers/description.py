"""A tokenizer's description: a JSON file beside the data, by which training knows that data, tokenizer and model belong together."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mtl.data.tokenizers.load import load
from mtl.data.tokenizers.tokenizer import Tokenizer
from mtl.data.tokenizers.vocabulary import read_json
from mtl.errors import UserError

SUFFIX = ".tokenizer.json"
FORMAT = "mtl tokenizer 1"


@dataclass(frozen=True)
class Description:
    """What must be equal for two uses of a tokenizer to mean the same ids."""

    kind: str
    vocab_size: int
    eod: int | None
    bos: int | None
    pad: int | None
    special: Mapping[str, int]
    added: tuple[str, ...]
    roles: Mapping[str, str]
    options: Mapping[str, str | int]
    files: Mapping[str, str]
    """Where the files were; the fingerprint leaves them out."""
    sha256: Mapping[str, str]

    @property
    def fingerprint(self) -> str:
        """Name the mapping from text to ids: equal fingerprints mean equal ids."""
        said = {name: value for name, value in asdict(self).items() if name not in ("files", "added")}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    def differs(self, other: "Description") -> str | None:
        """Say in what another description differs, or None."""
        for name in ("kind", "vocab_size", "eod", "bos", "pad", "special", "options", "sha256"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name.replace('_', '-')} is {_short(mine)} in one and {_short(theirs)} in the other"
        return None

    def lost_in(self, other: "Description") -> str | None:
        """Say what of this tokenizer another one lacks or changes, or None where it is this one, perhaps with more special tokens."""
        for name in ("kind", "options", "sha256"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name} was {_short(mine)} and is {_short(theirs)}"
        moved = [name for name, i in self.special.items() if other.special.get(name) != i]
        return f"{moved[0]} was {self.special[moved[0]]} and is {other.special.get(moved[0], 'missing')}" if moved else None


def beside(prefix: str | Path) -> Path:
    """Name the description of the corpus ``prefix``.bin."""
    return Path(f"{prefix}{SUFFIX}")


def describe(tokenizer: Tokenizer) -> Description:
    """Describe a tokenizer."""
    files = {name: str(path) for name, path in tokenizer.files.items()}
    sha256 = {name: _digest(path) for name, path in tokenizer.files.items()}
    t = tokenizer
    return Description(
        t.kind, t.vocab_size, t.eod, t.bos, t.pad, dict(t.special), t.added, dict(t.roles), dict(t.options), files, sha256
    )  # fmt: skip


def dumps(description: Description) -> str:
    """Write a description as JSON."""
    return json.dumps({"format": FORMAT, "fingerprint": description.fingerprint, **asdict(description)}, indent=1, sort_keys=True) + "\n"


def save(description: Description, path: Path) -> None:
    """Write a description to a file, whole or not at all."""
    beginning = path.with_name(path.name + ".tmp")
    beginning.write_text(dumps(description))
    beginning.replace(path)


def read(path: Path) -> Description | None:
    """Read a description; None where there is none (data of other programs)."""
    if not path.exists():
        return None
    return _checked(read_json(path, "the tokenizer's description"), str(path))


def loads(text: str, where: str) -> Description:
    """Read a description from text; ``where`` names it in messages."""
    try:
        return _checked(json.loads(text), where)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error}).") from None


def _checked(said: Any, path: str) -> Description:
    if not isinstance(said, dict) or said.get("format") != FORMAT:
        raise UserError(f"{path} is no tokenizer description of mtl ({FORMAT!r}). Move it away, or build the data again.")
    fingerprint = said.pop("fingerprint", None)
    said.pop("format")
    try:
        entries: dict[str, Any] = {**said, "added": tuple(said["added"])}
        found = Description(**entries)
    except (TypeError, KeyError):
        raise UserError(f"the tokenizer's description {path} lacks entries: build the data again.") from None
    if found.fingerprint != fingerprint:
        raise UserError(f"the tokenizer's description {path} was changed by hand or is damaged: its fingerprint does not fit its content.")
    return found


def reopen(description: Description, folder: Path | None = None) -> Tokenizer:
    """Open the tokenizer that a description speaks of; files that moved are looked for by name in ``folder``."""
    files: dict[str, Path] = {}
    for name, place in description.files.items():
        places = [Path(place)] + ([folder / Path(place).name] if folder else [])
        found = next((p for p in places if p.exists() and _digest(p) == description.sha256[name]), None)
        if found is None:
            raise UserError(f"the tokenizer's {name} file {place} is gone or has changed since the data was built. Put it back.")
        files[name] = found
    roles = {role: description.roles.get(role) for role in ("eod", "bos", "pad")}
    given: dict[str, Any] = {**roles, **files, **description.options}
    tokenizer = load(description.kind, special=description.added, **given)
    if difference := description.differs(describe(tokenizer)):
        raise UserError(f"tokenizer {description.kind!r} opens otherwise than it was described: {difference}.")
    return tokenizer


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) < 80 else text[:77] + "..."
