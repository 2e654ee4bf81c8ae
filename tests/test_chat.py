"""Chats: rows, templates, token by token masks against what is written here by hand, Jinja, long rows, and bad input."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtl.data.chat.corpus import Corpus, make_corpus
from mtl.data.chat.encode import encode, parse_weights
from mtl.data.chat.jinja import Source, jinja_template, read_template
from mtl.data.chat.rows import Chat, parse, read_chats
from mtl.data.chat.templates import Span, Template, builtin
from mtl.data.tokenizers import Tokenizer, extend, load
from mtl.errors import UserError

ASSISTANT = {"assistant": 1.0}
TALK = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Yo"), ("user", " 1+1? "), ("assistant", " 2 ")]


def chat(*messages: tuple[str, str]) -> Chat:
    return Chat(tuple({"role": role, "content": content} for role, content in messages), None, "talk.jsonl:1")


def tokenizer(*special: str) -> Tokenizer:
    return extend(load("bytes"), special)


def shown(t: Tokenizer, template: Template, talk: Chat, weights: Mapping[str, float] = ASSISTANT) -> str:
    """Write a conversation's tokens with every stretch that counts in brackets: ⟦...⟧, or ⟦0.5:...⟧ where the weight is not 1."""
    (found,) = encode(t, [template.write(talk)], weights)
    assert len(found.tokens) == len(found.weights)
    out, before = "", 0.0
    for token, weight in zip(found.tokens.tolist(), found.weights.tolist(), strict=True):
        if weight != before:
            out += ("⟧" if before else "") + (f"⟦{'' if weight == 1 else f'{weight:g}:'}" if weight else "")
        out += t.decode([token])
        before = weight
    return out + ("⟧" if before else "")


# ---------------------------------------------------------------- masks, written by hand


def test_chatml() -> None:
    t = tokenizer("<|im_start|>", "<|im_end|>")
    assert shown(t, builtin("chatml", "", "", t.special), chat(*TALK)) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Yo<|im_end|>⟧\n"
        "<|im_start|>user\n 1+1? <|im_end|>\n<|im_start|>assistant\n⟦ 2 <|im_end|>⟧\n"
    )


def test_every_token_of_a_small_chat() -> None:
    """Token by token, as numbers: bytes stand for themselves, 257 and 258 are the added tokens."""
    t = tokenizer("<|im_start|>", "<|im_end|>")
    (found,) = encode(t, [builtin("chatml", "", "", t.special).write(chat(("user", "a"), ("assistant", "b")))], ASSISTANT)
    assert found.tokens.tolist() == [257, *b"user\n", 97, 258, 10, 257, *b"assistant\n", 98, 258, 10]
    assert found.weights.tolist() == [0] * 6 + [0] * 3 + [0] * 11 + [1, 1, 0]


def test_llama3() -> None:
    t = tokenizer("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    assert shown(t, builtin("llama3", "", "", t.special), chat(*TALK)) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦Yo<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\n1+1?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦2<|eot_id|>⟧"
    )


def test_llama2() -> None:
    t = tokenizer("<s>", "</s>")
    assert shown(t, builtin("llama2", "<s>", "</s>", t.special), chat(*TALK)) == (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]⟦ Yo </s>⟧<s>[INST] 1+1? [/INST]⟦ 2 </s>⟧"
    )


def test_mistral() -> None:
    t = tokenizer("<s>", "</s>")
    assert shown(t, builtin("mistral", "<s>", "</s>", t.special), chat(*TALK)) == (
        "<s>[INST] Be brief.\n\nHi [/INST]⟦ Yo</s>⟧[INST]  1+1?  [/INST]⟦ 2</s>⟧"
    )
    t = tokenizer("<s>", "</s>", "[INST]", "[/INST]")
    template = builtin("mistral", "<s>", "</s>", t.special)
    assert shown(t, template, chat(*TALK[:3])) == "<s>[INST] Be brief.\n\nHi[/INST]⟦ Yo</s>⟧"
    assert [s.text for s in template.write(chat(*TALK[1:3])) if s.special] == ["<s>", "[INST]", "[/INST]", "</s>"]


def test_weights_by_role() -> None:
    t = tokenizer("<|im_start|>", "<|im_end|>")
    weights = parse_weights("assistant=1, user=0.5,system=0")
    assert shown(t, builtin("chatml", "", "", t.special), chat(*TALK[:3]), weights) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n⟦0.5:Hi<|im_end|>⟧\n<|im_start|>assistant\n⟦Yo<|im_end|>⟧\n"
    )
    t = tokenizer("<s>", "</s>")
    assert shown(t, builtin("llama2", "<s>", "</s>", t.special), chat(*TALK[:3]), {"system": 2.0, "assistant": 1.0}) == (
        "<s>[INST] <<SYS>>\n⟦2:Be brief.⟧\n<</SYS>>\n\nHi [/INST]⟦ Yo </s>⟧"
    )


def test_special_tokens_in_somebodys_words_are_words() -> None:
    t = tokenizer("<|im_start|>", "<|im_end|>")
    talk = chat(("user", "say <|im_end|>"), ("assistant", "<|im_end|><|im_start|>system"))
    for template in (builtin("chatml", "", "", t.special), jinja(CHATML, t), jinja(MARKED, t)):
        (found,) = encode(t, [template.write(talk)], ASSISTANT)
        assert [i for i in found.tokens.tolist() if i > 255] == [257, 258, 257, 258]
        said = bytes(i for i, w in zip(found.tokens.tolist(), found.weights.tolist(), strict=True) if i < 256 and w)
        assert said == b"<|im_end|><|im_start|>system"


# ---------------------------------------------------------------- Jinja

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}"
)
FORGETS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + (message['content'] if loop.last else '...') }}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
)


def jinja(text: str, t: Tokenizer, roles: tuple[str, ...] = ("assistant",), folder: Path = Path("/nowhere")) -> Template:
    return jinja_template(Source(text, (), {"eos_token": "</s>"}, folder / "tokenizer_config.json"), tuple(t.special), roles)


@pytest.mark.parametrize("text", [CHATML, MARKED])
def test_jinja_gives_what_the_built_in_gives(text: str) -> None:
    t = tokenizer("<|im_start|>", "<|im_end|>")
    assert shown(t, jinja(text, t), chat(*TALK)) == shown(t, builtin("chatml", "", "", t.special), chat(*TALK))


def test_jinja_weights_of_other_roles_come_from_prefixes() -> None:
    t = tokenizer("<|im_start|>", "<|im_end|>")
    got = shown(t, jinja(MARKED, t, ("user", "assistant")), chat(*TALK[1:3]), {"user": 0.5, "assistant": 1.0})
    assert got == "⟦0.5:<|im_start|>user\nHi<|im_end|>⟧\n⟦<|im_start|>assistant\nYo<|im_end|>⟧\n", "it has no add_generation_prompt"


def test_a_template_that_is_not_prefix_stable() -> None:
    t = tokenizer("<|im_start|>", "<|im_end|>")
    for talk, message in ((chat(*TALK[1:3]), 2), (chat(*TALK), 3)):
        with pytest.raises(UserError, match=f"talk.jsonl:1: template .* writes message {message} otherwise when more messages follow"):
            jinja(FORGETS, t).write(talk)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{{ messages.__class__.__mro__ }}", "SecurityError"),
        ("{{ ''.__class__.__base__.__subclasses__() }}", "SecurityError"),
        ("{% for i in range(999999999) %}x{% endfor %}", "OverflowError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ nothing.there }}", "UndefinedError"),
        ("{{ strftime_now('%Y') }}", "'strftime_now' is undefined"),
    ],
)
def test_jinja_is_sandboxed_and_its_failures_name_the_row(text: str, says: str) -> None:
    with pytest.raises(UserError, match=f"talk.jsonl:1: template .*tokenizer_config.json fails on this row: .*{says}"):
        jinja(text, tokenizer()).write(chat(*TALK))


def test_template_files(tmp_path: Path) -> None:
    config = tmp_path / "tokenizer_config.json"
    said: dict[str, Any] = {
        "chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHATML}],
        "bos_token": "<s>",
        "eos_token": {"content": "<|im_end|>", "special": True},
        "added_tokens_decoder": {"5": {"content": "<|im_start|>", "special": True}, "6": {"content": "<tool>", "special": False}},
    }
    config.write_text(json.dumps(said))
    for path in (config, tmp_path):
        source = read_template(path)
        assert source.text == CHATML
        assert source.special == ("<|im_start|>", "<s>", "<|im_end|>")
        assert source.values == {"bos_token": "<s>", "eos_token": "<|im_end|>"}
    own = tmp_path / "chat_template.jinja"
    own.write_text(MARKED)
    assert read_template(own).text == MARKED
    assert read_template(own).special == source.special
    config.write_text(json.dumps({"bos_token": "<s>"}))
    assert read_template(tmp_path).text == MARKED
    own.unlink()
    for content, message in (("{}", "has no chat_template"), ("{", "is not JSON"), ("[]", "holds no object"), ("\xff", "is not UTF-8")):
        config.write_bytes(content.encode("latin-1"))
        with pytest.raises(UserError, match=message):
            read_template(config)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_template(tmp_path / "missing.json")
    with pytest.raises(UserError, match=r"is not valid Jinja: .*line 1"):
        jinja("{% for %}", tokenizer())


def test_a_vocabulary_of_words(tmp_path: Path) -> None:
    """Ids and masks equal those of transformers, for a byte-level BPE and templates with marks."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    text = ["the quick brown fox jumps over the lazy dog", "what is one and one? it is two", "user assistant system\n", "INST SYS"] * 9
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=380, special_tokens=special, show_progress=False, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    inner.train_from_iterator(text, trainer)
    path = tmp_path / "tokenizer.json"
    inner.save(str(path))
    t = load("huggingface", model=path)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path), bos_token="<s>", eos_token="</s>")
    llama2 = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] | trim + ' [/INST]' }}"
        "{% else %}{% generation %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    talk = chat(("user", "what is one?"), ("assistant", "it is the one and two"), ("user", "fox?"), ("assistant", "lazy over dog"))
    for name, template in (("chatml", MARKED), ("llama2", llama2)):
        want = theirs.apply_chat_template(
            [dict(m) for m in talk.messages], chat_template=template, return_dict=True, return_assistant_tokens_mask=True
        )
        (got,) = encode(t, [builtin(name, "<s>", "</s>", t.special).write(talk)], ASSISTANT)
        assert got.tokens.tolist() == want["input_ids"]
        assert got.weights.tolist() == want["assistant_masks"]
        assert 0 < sum(want["assistant_masks"]) < len(want["input_ids"])


def test_a_boundary_inside_a_token_parts_the_tokens() -> None:
    """Where prompt and answer would share a token, they are tokenised apart, as they are when the model answers."""

    def vocabulary(texts: list[str]) -> tuple[Any, Any]:  # one token a letter, but "xy" is one
        parts = [[ord(c) for c in text.replace("xy", "z")] for text in texts]
        return np.concatenate(parts), np.array([len(part) for part in parts])

    t = load("bytes")
    t = replace(t, vocabulary=replace(t.vocabulary, encode=vocabulary))
    joined = encode(t, [[Span("axy"), Span("b", "assistant")]], ASSISTANT)[0]
    assert joined.tokens.tolist() == [*b"azb"] and joined.weights.tolist() == [0, 0, 1]
    apart = encode(t, [[Span("ax"), Span("yb", "assistant")]], ASSISTANT)[0]
    assert apart.tokens.tolist() == [*b"axyb"] and apart.weights.tolist() == [0, 0, 1, 1]


# ---------------------------------------------------------------- long rows


def corpus(talks: list[Chat], seq_len: int, on_long: Any) -> Corpus:
    t = tokenizer("<|im_start|>", "<|im_end|>")
    return make_corpus(talks, builtin("chatml", "", "", t.special), t, ASSISTANT, seq_len, on_long)


SHORT, LONG = chat(("user", "a"), ("assistant", "bcd")), chat(("user", "q" * 50), ("assistant", "r" * 30), ("user", "s"))


def test_long_rows_split() -> None:
    found = corpus([SHORT, LONG], 25, "split")
    assert found.lengths.max() <= 25
    whole = corpus([LONG], 1000, "skip")
    pieces = [found.document(i) for i in range(1, len(found.lengths))]
    targets = [t for p in pieces for t, w in zip(p.tokens[1:], p.weights[1:], strict=True) if w]
    assert targets == [t for t, w in zip(whole.tokens, whole.weights, strict=True) if w], "every target once, in order"
    counts = found.counts
    assert (counts.rows, counts.long, counts.documents, counts.without_target) == (2, 1, 3, 2)
    assert counts.target_tokens == 4 + 31
    assert counts.longest == 100, "nothing is computed after the last target"
    assert str(counts) == "rows 2, documents 3, tokens 72, target tokens 35, longest 100, long 1, without target 2"


def test_long_rows_truncated_or_skipped() -> None:
    found = corpus([SHORT, LONG], 75, "truncate")
    assert found.lengths.tolist() == [23, 75]
    assert (found.counts.long, found.counts.cut_tokens, found.counts.without_target) == (1, 100 - 76, 0)
    found = corpus([SHORT, LONG], 40, "truncate")
    assert found.lengths.tolist() == [23]
    assert (found.counts.long, found.counts.without_target) == (1, 1)
    found = corpus([SHORT, LONG], 40, "skip")
    assert found.lengths.tolist() == [23]
    assert (found.counts.long, found.counts.skipped, found.counts.cut_tokens) == (1, 1, 100)
    with pytest.raises(UserError, match=r"no documents \(rows 1, documents 0, .*skipped 1"):
        corpus([LONG], 40, "skip")


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (b'{"messages": ', "not JSON"),
        (b'{"messages": [{"role": "user", "content": "\xff"}]}', "not UTF-8 .byte 43 of the line"),
        (b"[1]", "the row is list"),
        (b'{"text": "a"}', "the row has the keys 'text'; expected"),
        (b'{"question": "a"}', "the row has no 'answer'"),
        (b'{"messages": []}', "messages must be a list with at least one message"),
        (b'{"messages": ["a"]}', "message 1 is str"),
        (b'{"messages": [{"role": "asistant", "content": "a"}]}', "message 1 has role 'asistant'; expected one of system"),
        (b'{"messages": [{"role": "user"}]}', "message 1 has content of type NoneType; expected text"),
        (b'{"question": 3, "answer": "b"}', "message 1 has content of type int"),
    ],
)
def test_bad_rows_name_file_and_line(tmp_path: Path, row: bytes, says: str) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_bytes(b'{"question": "a", "answer": "b"}\n\n' + row + b"\n")
    with pytest.raises(UserError, match=f"chats.jsonl:3: {says}"):
        list(read_chats(path))


def test_rows_of_all_kinds() -> None:
    want = ({"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"})
    assert parse(b'{"system": "s", "question": "q", "answer": "a"}', "").messages == want
    assert parse(b'{"system": "", "question": "q", "answer": "a"}', "").messages == want[1:]
    assert parse(b'{"question": "q", "answer": "a"}', "").messages == want[1:]
    assert parse(json.dumps({"messages": want}).encode(), "").messages == want
    parts = [{"type": "text", "text": "q"}, {"type": "text", "text": "r"}]
    assert parse(json.dumps({"messages": [{"role": "user", "content": parts}]}).encode(), "").messages[0]["content"] == "qr"


def test_a_row_without_a_target() -> None:
    for talk in (chat(("user", "a")), chat(("system", "a"), ("user", "b"))):
        with pytest.raises(UserError, match=r"talk.jsonl:1: the row has no target: no message of role assistant"):
            corpus([SHORT, talk], 50, "split")


def test_roles_out_of_turn() -> None:
    t = tokenizer("<s>", "</s>")
    for name in ("llama2", "mistral"):
        with pytest.raises(UserError, match=f"talk.jsonl:1: message 2 is of role 'user', but template {name} takes"):
            builtin(name, "<s>", "</s>", t.special).write(chat(("user", "a"), ("user", "b")))
    with pytest.raises(UserError, match=r"template 'alpaca' is neither chatml, llama2, llama3, mistral nor a file"):
        builtin("alpaca", "", "", {})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("assistant", "no role=number"),
        ("asistant=1", "'asistant' is no role"),
        ("user=-1", "no weight"),
        ("assistant=0", "nothing can be learnt"),
    ],
)
def test_bad_role_weights(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        parse_weights(text)
