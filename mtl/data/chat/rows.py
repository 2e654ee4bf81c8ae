"""Chat files: JSONL, one conversation a row, as ``messages`` with roles or as system, question and answer."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from mtl.errors import UserError

ROLES = ("system", "developer", "user", "assistant", "tool")
WANTED = 'expected {"messages": [{"role": ..., "content": ...}, ...]} or {"system": ..., "question": ..., "answer": ...}'


class Chat(NamedTuple):
    """One conversation: its messages as they stand in the file (role and content are text), the tools offered, and file and line."""

    messages: tuple[Mapping[str, Any], ...]
    tools: Any
    where: str


def read_chats(path: Path) -> Iterator[Chat]:
    """Read a file row by row; the first bad row is an error with file and line. Blank lines are passed over."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"chat file {path} cannot be read: {error.strerror or error}.") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield parse(line, f"{path}:{number}")


def parse(line: bytes, where: str) -> Chat:
    """Read one row."""
    try:
        row: Any = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 (byte {error.start} of the line). Convert the file to UTF-8.") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); {WANTED}.") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: the row is {type(row).__name__}; {WANTED}.")
    found = cast(dict[str, Any], row)
    if "messages" in found:
        return Chat(_messages(found["messages"], where), found.get("tools"), where)
    if "question" in found or "answer" in found:
        parts = (("system", "system"), ("user", "question"), ("assistant", "answer"))
        given = [{"role": role, "content": found[key]} for role, key in parts if key in found and not (key == "system" and not found[key])]
        missing = [key for key in ("question", "answer") if key not in found]
        if missing:
            raise UserError(f"{where}: the row has no {missing[0]!r}; {WANTED}.")
        return Chat(_messages(given, where), found.get("tools"), where)
    raise UserError(f"{where}: the row has the keys {', '.join(map(repr, found)) or 'none'}; {WANTED}.")


def _messages(given: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(given, list) or not given:
        raise UserError(f"{where}: messages must be a list with at least one message.")
    found: list[dict[str, Any]] = []
    for i, message in enumerate(cast(list[Any], given)):
        at = f"{where}: message {i + 1}"
        if not isinstance(message, dict):
            raise UserError(f"{at} is {type(message).__name__}, not an object with role and content.")
        fields = cast(dict[str, Any], message)
        if fields.get("role") not in ROLES:
            raise UserError(f"{at} has role {fields.get('role')!r}; expected one of {', '.join(ROLES)}.")
        found.append({**fields, "content": _text(fields.get("content"), "tool_calls" in fields, at)})
    return tuple(found)


def _text(content: Any, may_lack: bool, at: str) -> str:
    """Take content that is text, or a list of text parts as chat interfaces write it."""
    if isinstance(content, str):
        return content
    if content is None and may_lack:
        return ""
    if isinstance(content, list):
        parts = cast(list[Any], content)
        if parts and all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in parts):
            return "".join(p["text"] for p in parts)
    raise UserError(f"{at} has content of type {type(content).__name__}; expected text.")
