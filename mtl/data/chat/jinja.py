"""Chat templates in Jinja, as tokenizer_config.json files carry them, rendered in jinja2's sandbox.

Whose words a stretch of the result is comes from the template's own ``{% generation %}`` marks, or from rendering the conversation up to
each message, which needs a template that writes a message alike whatever follows it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mtl.data.chat.rows import Chat
from mtl.data.chat.templates import Span, Template
from mtl.data.extra import need
from mtl.errors import UserError

OPEN, CLOSE, HIDE = "\ue000", "\ue001", "\ue002"
"""Characters without meaning that mark the start and end of a generation, and hide a special token's name in somebody's words."""


class Source(NamedTuple):
    """A template's text, the special tokens that its file names, and where it came from."""

    text: str
    special: tuple[str, ...]
    values: Mapping[str, str]
    """Tokens by use: bos_token, eos_token and so on."""
    path: Path


def read_template(path: Path) -> Source:
    """Read a tokenizer_config.json, the folder that holds it, or a .jinja file (a tokenizer_config.json beside it names tokens)."""
    folder = path if path.is_dir() else path.parent
    own = path if path.suffix == ".jinja" else folder / "chat_template.jinja"
    file = path if path.suffix == ".json" else folder / "tokenizer_config.json"
    said = _read_json(file) if file.exists() or path.suffix == ".json" else {}
    text = said.get("chat_template")
    if path.suffix == ".jinja" or (text is None and own.exists()):
        text = _read(own)
    elif isinstance(text, list):
        named = {t.get("name"): t.get("template") for t in text if isinstance(t, dict)}
        text = named.get("default")
    if not isinstance(text, str):
        raise UserError(f"template {path} has no chat_template: give a tokenizer_config.json that has one, or a .jinja file.")
    uses = {k: _token(said[k]) for k in ("bos_token", "eos_token", "pad_token", "unk_token") if said.get(k) is not None}
    added = said.get("added_tokens_decoder") or {}
    special = [t["content"] for t in added.values() if t.get("special")]
    return Source(text, tuple(dict.fromkeys([*special, *uses.values()])), uses, path)


def jinja_template(source: Source, special: Sequence[str], roles: Sequence[str]) -> Template:
    """Make a template that tells apart the words of ``roles``; ``special`` are the names of the tokenizer's special tokens."""
    compiled = _compile(source)
    ends = tuple(sorted({*special, *source.special}, key=lambda n: (-len(n), n)))
    names = re.compile("|".join(map(re.escape, ends)) or r"(?!)")
    marked = "generation" in compiled.marks and set(roles) <= {"assistant"}

    def render(chat: Chat, count: int, prompt: bool = False) -> str:
        messages = [{**_hidden(m, names), "role": m["role"]} for m in chat.messages[:count]]
        try:
            return compiled.render(messages=messages, tools=chat.tools, documents=None, add_generation_prompt=prompt, **source.values)
        except Exception as error:  # the template is a program of its own and may fail in any way
            what = str(error).removesuffix(".")
            raise UserError(f"{chat.where}: template {source.path} fails on this row: {type(error).__name__}: {what}.") from None

    def write(chat: Chat) -> list[Span]:
        _refuse_marks(chat)
        whole = render(chat, len(chat.messages))
        parts = _by_marks(whole) if marked else _by_prefix(chat, whole.translate(_UNMARK), render, roles, ends, source.path)
        return [span for text, role in parts for span in _spans(text, role, names)]

    return Template(str(source.path), write, source.special)


Parts = list[tuple[str, str | None]]


class _Compiled(NamedTuple):
    render: Any
    marks: frozenset[str]


_UNMARK = {ord(OPEN): None, ord(CLOSE): None}


def _compile(source: Source) -> _Compiled:
    jinja2 = need("jinja2", f"template {source.path}")
    sandbox, ext = need("jinja2.sandbox", "a Jinja template"), need("jinja2.ext", "a Jinja template")
    marks: set[str] = set()

    class Generation(ext.Extension):
        """``{% generation %}`` ... ``{% endgeneration %}`` puts marks round what it holds."""

        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            marks.add("generation")
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Any) -> str:
            return OPEN + caller() + CLOSE

    def refuse(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(x: Any, **options: Any) -> str:
        given: dict[str, Any] = {"ensure_ascii": False, **options}
        return json.dumps(x, **given)

    environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    try:
        return _Compiled(environment.from_string(source.text).render, frozenset(marks))
    except jinja2.exceptions.TemplateError as error:
        raise UserError(f"template {source.path} is not valid Jinja: {error} (line {getattr(error, 'lineno', '?')}).") from None


def _by_marks(whole: str) -> Parts:
    """Cut a rendered conversation at the template's own marks."""
    pieces = re.split(f"([{OPEN}{CLOSE}])", whole)
    parts: Parts = []
    role: str | None = None
    for piece in pieces:
        if piece in (OPEN, CLOSE):
            role = "assistant" if piece == OPEN else None
        elif piece:
            parts.append((piece, role))
    return parts


def _by_prefix(chat: Chat, whole: str, render: Any, roles: Sequence[str], ends: tuple[str, ...], path: Path) -> Parts:
    """Find the messages of ``roles`` in a rendered conversation: each is what its rendering adds to that of the messages before it."""
    parts: Parts = []
    done = 0
    for i, message in enumerate(chat.messages):
        if message["role"] not in roles:
            continue
        before = render(chat, i, message["role"] == "assistant").translate(_UNMARK) if i else ""
        after = render(chat, i + 1).translate(_UNMARK)
        if not (after.startswith(before) and whole.startswith(after) and len(before) >= done):
            raise UserError(
                f"{chat.where}: template {path} writes message {i + 1} otherwise when more messages follow, so its words cannot be found. "
                "Use a template with {% generation %} marks, or one of mtl's own."
            )
        words = after[len(before) :]
        tail = len(words) - len(words.rstrip()) if words.rstrip().endswith(ends) else 0  # the line break after the end of a message
        parts += [(whole[done : len(before)], None), (words[: len(words) - tail], message["role"])]
        done = len(after) - tail
    return [*parts, (whole[done:], None)]


def _spans(text: str, role: str | None, names: re.Pattern[str]) -> list[Span]:
    """Cut text at the names of special tokens; names that were hidden are plain text again."""
    spans: list[Span] = []
    done = 0
    for found in names.finditer(text):
        spans += [Span(text[done : found.start()].replace(HIDE, ""), role), Span(found.group(), role, special=True)]
        done = found.end()
    spans.append(Span(text[done:].replace(HIDE, ""), role))
    return [s for s in spans if s.text]


def _hidden(x: Any, names: re.Pattern[str]) -> Any:
    """Hide the names of special tokens in somebody's words, so that they stay words."""
    if isinstance(x, str):
        return names.sub(lambda found: found.group()[:1] + HIDE + found.group()[1:], x)
    if isinstance(x, dict):
        return {key: _hidden(value, names) for key, value in x.items()}
    return [_hidden(value, names) for value in x] if isinstance(x, list) else x


def _refuse_marks(chat: Chat) -> None:
    said = json.dumps([dict(m) for m in chat.messages], ensure_ascii=False)
    if any(mark in said for mark in (OPEN, CLOSE, HIDE)):
        raise UserError(f"{chat.where}: the row holds a character from U+E000 to U+E002, which Jinja templates need here. Take it out.")


def _token(said: Any) -> str:
    return str(said["content"]) if isinstance(said, dict) else str(said)


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"template {path} cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"template {path} is not UTF-8 (byte {error.start}).") from None


def _read_json(path: Path) -> Any:
    try:
        said: Any = json.loads(_read(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"template {path} is not JSON: {error}.") from None
    if not isinstance(said, dict):
        raise UserError(f"template {path} holds no object: is it a tokenizer_config.json?")
    return said
