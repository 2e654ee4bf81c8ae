"""Read what --data says: one corpus, several, `weight path` pairs, or a file that lists them."""

import shlex
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from mtl.data.indexed import idx_path
from mtl.errors import UserError

_CORPUS = (".bin", ".idx", ".npy")


class Entry(NamedTuple):
    """One corpus of a mixture; no weight where none of them has one."""

    path: str
    weight: Fraction | None
    name: str


def read_mixture(words: Sequence[str], setting: str = "--data") -> list[Entry]:
    """Read `A`, `A B`, `0.3 A 0.7 B` (as one word or several), or the path of a list file."""
    words = [part for word in words for part in ([word] if _exists(word) else _parts(word, setting))]
    if len(words) == 1 and _is_list(words[0]):
        return _checked(_listed(Path(words[0])), f"{setting} {words[0]}")
    where = f"{setting} {' '.join(words)!r}"
    if not words:
        raise UserError(f"{setting} is empty: give a corpus, several, `weight path` pairs, or a list file.")
    if not any(map(_is_number, words[::2])) or (len(words) == 1):
        return _checked([Entry(w, None, Path(w).name) for w in words], where)
    if len(words) % 2:
        raise UserError(f"{where} has {len(words)} words: with weights it must be pairs of a weight and a path.")
    return _checked([Entry(p, _weight(w, where), Path(p).name) for w, p in zip(words[::2], words[1::2], strict=True)], where)


def _parts(word: str, setting: str) -> list[str]:
    try:
        return shlex.split(word)
    except ValueError as error:
        raise UserError(f"{setting} has the word {word!r}, which cannot be read: {error}.") from None


def _checked(entries: list[Entry], where: str) -> list[Entry]:
    weights = [e.weight for e in entries if e.weight is not None]
    if any(w < 0 for w in weights):
        raise UserError(f"{where}: the weight {float(min(weights)):g} is negative; weights must be from 0 up.")
    if weights and not any(weights):
        raise UserError(f"{where}: all weights are 0; one at least must be above 0.")
    return entries


def _listed(path: Path) -> list[Entry]:
    """Read lines of `weight path name`, `weight path` or `path`; text after # is left out."""
    try:
        lines = path.read_bytes().decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no list of corpora: byte {error.start} is no UTF-8 text.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    entries: list[Entry] = []
    for number, line in enumerate(lines, 1):
        words = line.split("#")[0].split()
        if not words:
            continue
        where = f"{path}, line {number}"
        if len(words) > 3 or (len(words) == 3 and not _is_number(words[0])):
            raise UserError(f"{where}: {line.strip()!r} is neither `weight path name`, `weight path` nor `path`.")
        weight = None if len(words) == 1 else _weight(words[0], where)
        if weight is not None and weight < 0:
            raise UserError(f"{where}: the weight {words[0]} is negative; weights must be from 0 up.")
        place = words[0] if weight is None else words[1]
        if not _exists(place) and _exists(str(path.parent / place)):
            place = str(path.parent / place)
        if not _exists(place):
            raise UserError(f"{where}: there is no corpus {place} (looked for {idx_path(place)}).")
        entries.append(Entry(place, weight, words[2] if len(words) == 3 else Path(place).name))
    if not entries:
        raise UserError(f"{path} lists no corpus: expected lines of `weight path name`.")
    if len({e.weight is None for e in entries}) > 1:
        raise UserError(f"{path}: some lines have a weight and some have none. Give all of them one.")
    return entries


def _weight(word: str, where: str) -> Fraction:
    if not _is_number(word):
        raise UserError(f"{where}: {word!r} stands where a weight is expected, a number such as 0.3.")
    return Fraction(word)


def _is_number(word: str) -> bool:
    try:
        Fraction(word)
    except (ValueError, ZeroDivisionError):
        return False
    return True


def _exists(path: str) -> bool:
    return Path(path).is_file() or idx_path(path).exists() or Path(f"{path}.bin").exists()


def _is_list(path: str) -> bool:
    return Path(path).is_file() and not path.endswith(_CORPUS) and not idx_path(path).exists()
