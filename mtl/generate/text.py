"""From tokens to text as it grows: whole characters alone, up to a stop string, nothing shown that must be taken back."""

from collections.abc import Callable, Iterator, Sequence

from mtl.generate.decode import Tokens

LOOKBACK = 6
"""Tokens before the new ones that are decoded with them: what a tokenizer makes of spaces and bytes depends on those just before."""


class Continuation:
    """What one prompt's tokens say. ``reason`` is None while it goes on, then end (an end token), stop (a stop string) or length."""

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        prompt: Sequence[int],
        stops: Sequence[str] = (),
        ends: Sequence[int] = (),
        silent: Sequence[int] = (),
    ) -> None:
        """Follow ``prompt``. Tokens ``ends`` end the text; they and special tokens, ``silent``, are not part of it."""
        self.decode, self.stops, self.ends = decode, [s for s in stops if s], frozenset(ends)
        self.silent = frozenset(silent) | self.ends
        self.tokens: list[int] = []
        self.text = ""
        self.reason: str | None = None
        self._seen = [t for t in prompt[-LOOKBACK:] if t not in self.silent]
        self._read = len(self._seen)
        self._given = 0
        self._held = ""

    def feed(self, token: int) -> str:
        """Take one token; give the text that is certain now."""
        self.tokens.append(token)
        if token in self.ends:
            return self._finish("end")
        if token not in self.silent:
            self._seen.append(token)
            self._held += self._new_text()
        return self._release()

    def finish(self) -> str:
        """End for want of more tokens; give what was held back."""
        return self._finish("length") if self.reason is None else ""

    def _new_text(self, last: bool = False) -> str:
        """Give what the tokens say beyond what was given; replacement characters at the end may be one that is not whole yet."""
        before, now = self.decode(self._seen[: self._read]), self.decode(self._seen)
        loose = 0 if last else min(len(now) - len(now.rstrip("\ufffd")), 3)
        end = max(len(now) - loose, len(before) + self._given)
        given = now[len(before) + self._given : end]
        self._given = end - len(before)
        if not loose:
            start = max(0, len(self._seen) - LOOKBACK)
            self._seen, self._read, self._given = self._seen[start:], len(self._seen) - start, 0
        return given

    def _release(self) -> str:
        """Give what is held but for the longest end that may begin a stop string; stop at a whole one."""
        found = [i for i in (self._held.find(s) for s in self.stops) if i >= 0]
        if found:
            given, self._held, self.reason = self._held[: min(found)], "", "stop"
        else:
            keep = max((n for s in self.stops for n in range(1, len(s)) if self._held.endswith(s[:n])), default=0)
            given, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self.text += given
        return given

    def _finish(self, reason: str) -> str:
        self._held += self._new_text(last=True)
        given = self._release()
        if self.reason is None:
            given, self.reason = given + self._held, reason
            self.text += self._held
        self._held = ""
        return given


def stream(tokens: Iterator[Tokens], rows: Sequence[Continuation]) -> Iterator[list[str]]:
    """Feed every row its tokens as they come and yield the new text of each, until all rows are over."""
    for column in tokens:
        yield [row.feed(t) if row.reason is None and t is not None else "" for row, t in zip(rows, column, strict=True)]
        if all(row.reason is not None for row in rows):
            return
    rest = [row.finish() for row in rows]
    if any(rest):
        yield rest
