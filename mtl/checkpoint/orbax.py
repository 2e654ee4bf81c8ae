"""Orbax's own metadata: written so that `orbax.checkpoint` restores our arrays, and read so that we restore what it wrote."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtl.checkpoint.files import ITEM, UNFINISHED, dump
from mtl.checkpoint.peers import CheckpointError, Damaged
from mtl.errors import UserError

Keys = tuple[str | int, ...]
_EMPTY: Mapping[type, str] = {dict: "Dict", list: "List", tuple: "Tuple", type(None): "None"}


@dataclass(frozen=True)
class Listing:
    """The arrays that an Orbax item holds, and how: ``driver`` is zarr or zarr3, ``ocdbt`` says whether they share one database."""

    folder: Path
    arrays: Mapping[str, Keys]
    driver: str
    ocdbt: bool


def tree_metadata(arrays: Sequence[Keys], empty: Sequence[tuple[Keys, Any]]) -> bytes:
    """Write ``_METADATA``. Arrays count as numpy's: Orbax restores those with no target, and sharded where it is given one."""
    rows = {keys: {"value_type": "np.ndarray", "skip_deserialize": False} for keys in arrays}
    rows |= {keys: {"value_type": _kind(value), "skip_deserialize": True} for keys, value in empty}
    tree = {
        str(tuple(str(k) for k in keys)): {
            "key_metadata": [{"key": str(k), "key_type": 1 if isinstance(k, int) else 2} for k in keys],
            "value_metadata": value,
        }
        for keys, value in rows.items()
    }
    settings = {"use_ocdbt": False, "use_zarr3": True, "store_array_data_equal_to_fill_value": True, "custom_metadata": None}
    return json.dumps({"tree_metadata": tree, **settings}).encode()


def step_metadata(begun: float) -> bytes:
    """Write ``_CHECKPOINT_METADATA``, which Orbax's manager and its v1 functions look for."""
    now = {"init_timestamp_nsecs": int(begun * 1e9), "commit_timestamp_nsecs": time.time_ns()}
    handler = "orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler"
    return dump({"item_handlers": {ITEM: handler}, "metrics": {}, "performance_metrics": {}, **now, "custom_metadata": {}})


def item_folder(path: Path) -> Path:
    """Find the item in a checkpoint's folder: the folder itself, ``state``, or the only one that has arrays."""
    if path.name.endswith(UNFINISHED):
        raise Damaged(f"{path} was never finished: its writer stopped before the commit. Restore another checkpoint.")
    if not path.is_dir():
        raise CheckpointError(f"{path} is no checkpoint: {'it is a file' if path.exists() else 'there is no such folder'}.")
    places = [path, path / ITEM, *sorted(p for p in path.iterdir() if p.is_dir() and p.name != ITEM)]
    found = [p for p in places if (p / "_METADATA").is_file()]
    if not found:
        near = sorted({p.parent.parent.name for p in path.glob("*/*/_METADATA") if p.is_file()})
        if (path / ITEM).is_dir():
            raise Damaged(f"{path / ITEM / '_METADATA'} is missing. Restore another checkpoint.")
        hint = f" It holds the checkpoints {', '.join(near)}: name one of them." if near else ""
        raise CheckpointError(f"{path} is no checkpoint: neither it nor a folder in it has a _METADATA.{hint}")
    if len(found) > 1 and found[0] not in (path, path / ITEM):
        raise UserError(f"{path} holds several items: {', '.join(p.name for p in found)}. Name one, such as {found[0]}.")
    return found[0]


def listing(path: Path) -> Listing:
    """Read ``_METADATA``: the names of the arrays and how they are stored."""
    folder = item_folder(path)
    try:
        content = json.loads((folder / "_METADATA").read_bytes())
        rows: list[Any] = list(content["tree_metadata"].values())
        arrays: dict[str, Keys] = {}
        for row in rows:
            keys: Keys = tuple(int(k["key"]) if k["key_type"] == 1 else str(k["key"]) for k in row["key_metadata"])
            value = row["value_metadata"]
            if not value.get("skip_deserialize") and value["value_type"] != "string":
                arrays[".".join(str(k) for k in keys)] = keys
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{folder / '_METADATA'} is damaged ({type(error).__name__}: {error}). Restore another checkpoint.") from None
    ocdbt = content.get("use_ocdbt")
    ocdbt = (folder / "manifest.ocdbt").exists() if ocdbt is None else bool(ocdbt)
    return Listing(folder, arrays, "zarr3" if content.get("use_zarr3") else "zarr", ocdbt)


def _kind(value: Any) -> str:
    return next((name for kind, name in _EMPTY.items() if type(value) is kind), "None")
