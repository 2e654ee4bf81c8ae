"""Chat templates: a conversation written out as spans, each of one role or of the template itself.

Special tokens are spans of their own, by name. What a person wrote is plain text always, even where it spells a special token's name.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from mtl.data.chat.rows import Chat
from mtl.errors import UserError

Names = Mapping[str, str]
"""Names of the special tokens that a template writes: bos and eos, where it uses them."""


class Span(NamedTuple):
    """A stretch of text. ``role`` says whose words these are (with the token that ends them), None that they are the template's.

    A ``special`` span is the name of one special token.
    """

    text: str
    role: str | None = None
    special: bool = False


@dataclass(frozen=True)
class Template:
    """How chats are written out."""

    name: str
    write: Callable[[Chat], list[Span]]
    special: tuple[str, ...]
    """The special tokens it writes: the tokenizer must have them."""


def builtin(name: str, bos: str, eos: str, known: Mapping[str, int]) -> Template:
    """Give a template by name. ``bos`` and ``eos`` name the tokenizer's tokens; ``known`` are all its special tokens."""
    if name == "chatml":
        return Template(name, _chatml, ("<|im_start|>", "<|im_end|>"))
    if name == "llama3":
        special = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
        return Template(name, _llama3, special)
    if name == "llama2":
        return Template(name, lambda chat: list(_llama2(chat, bos, eos)), (bos, eos))
    if name == "mistral":
        own = "[INST]" in known and "[/INST]" in known
        return Template(name, lambda chat: list(_mistral(chat, bos, eos, own)), (bos, eos))
    raise UserError(
        f"template {name!r} is neither {', '.join(BUILTIN)} nor a file (a tokenizer_config.json, its folder, or a .jinja file)."
    )


BUILTIN = ("chatml", "llama2", "llama3", "mistral")


def _chatml(chat: Chat) -> list[Span]:
    spans: list[Span] = []
    for message in chat.messages:
        role = message["role"]
        spans += [Span("<|im_start|>", special=True), Span(f"{role}\n"), Span(message["content"], role)]
        spans += [Span("<|im_end|>", role, special=True), Span("\n")]
    return spans


def _llama3(chat: Chat) -> list[Span]:
    spans = [Span("<|begin_of_text|>", special=True)]
    for message in chat.messages:
        role = message["role"]
        header = "ipython" if role == "tool" else role
        spans += [Span("<|start_header_id|>", special=True), Span(header), Span("<|end_header_id|>", special=True), Span("\n\n")]
        spans += [Span(message["content"].strip(), role), Span("<|eot_id|>", role, special=True)]
    return spans


def _llama2(chat: Chat, bos: str, eos: str) -> Iterator[Span]:
    """Every exchange begins with bos; the system's words stand inside the first question."""
    for turn, (system, message) in enumerate(_turns(chat, "llama2")):
        content = message["content"].strip()
        if message["role"] == "assistant":
            yield from (Span(f" {content} ", "assistant"), Span(eos, "assistant", special=True))
            continue
        yield from (Span(bos, special=True), Span("[INST] "))
        if turn == 0 and system is not None:
            yield from (Span("<<SYS>>\n"), Span(system, "system"), Span("\n<</SYS>>\n\n"))
        yield from (Span(content, "user"), Span(" [/INST]"))


def _mistral(chat: Chat, bos: str, eos: str, own: bool) -> Iterator[Span]:
    """One bos; the system's words stand before the first question. Where [INST] is a token of its own, no space stands before [/INST]."""
    yield Span(bos, special=True)
    for turn, (system, message) in enumerate(_turns(chat, "mistral")):
        if message["role"] == "assistant":
            yield from (Span(f" {message['content'].strip()}", "assistant"), Span(eos, "assistant", special=True))
            continue
        yield from (Span("[INST]", special=own), Span(" "))
        if turn == 0 and system is not None:
            yield from (Span(system, "system"), Span("\n\n"))
        yield Span(message["content"], "user")
        yield from (Span("[/INST]", special=True),) if own else (Span(" [/INST]"),)


def _turns(chat: Chat, name: str) -> Iterator[tuple[str | None, Mapping[str, Any]]]:
    """Give (system's words, message) for messages that must go user, assistant, user and so on, after at most one system message."""
    system = chat.messages[0]["content"] if chat.messages[0]["role"] == "system" else None
    rest = chat.messages if system is None else chat.messages[1:]
    for i, message in enumerate(rest):
        wanted = "assistant" if i % 2 else "user"
        if message["role"] != wanted:
            place = i + 1 + (system is not None)
            raise UserError(
                f"{chat.where}: message {place} is of role {message['role']!r}, but template {name} takes a system message at most at the "
                f"start, then user and assistant in turn (here {wanted!r})."
            )
        yield system, message
