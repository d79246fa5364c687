"""Token ids to text, as they come: whole characters only, and an end at the first stop string."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Final

from mesart.graphs.errors import MesaError
from mesart.runtime.text import Tokenizer

_FIRST_MARK: Final = "\ud800"  # lone surrogates are in no text that a tokenizer decodes
_LAST_MARK: Final = "\udfff"
_REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"  # what decoders print for bytes that are no character (yet)

# Tokens decoded together with a new one: how a token reads can depend on those before it (the space that begins a text
# is dropped), and the bytes of one character may be spread over four tokens.
_CONTEXT: Final = 4
_WINDOW: Final = 3 * _CONTEXT  # trimmed to _CONTEXT when it gets this long


class StopError(MesaError, ValueError):
    """A stop string that cannot be looked for."""


class TextStream:
    """Turns generated ids into text that can be shown at once.

    All pieces together are the text that decoding all ids at once gives, cut at the first stop string: the one that is
    complete first. The work for a token does not depend on the length of the text.

    A stop string may be a special token, or hold some: they are looked for, though no text shows them.

    One difference is meant: where byte-fallback pieces (``<0xE4>``) form no valid UTF-8, decoding at once also replaces
    the valid characters of the same run of pieces; here they have been shown by then.

    Args:
        tokenizer: gives the text of ids.
        stop: one stop string or several; none of them is shown.
        context: ids that come before, such as the prompt's: the text then continues theirs (many tokenizers drop the
            space before the first word of a text).

    Attributes:
        stopped: a stop string was found; what comes after it is ignored.

    Raises:
        StopError: a stop string is empty, or no text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: str | Sequence[str] = (), context: Sequence[int] = ()) -> None:
        self._detokenizer = _Detokenizer(tokenizer, context)
        stops = _checked(stop)
        self._marks = _marks(tokenizer, stops)
        contents = {tokenizer.token(index) or "": mark for index, mark in self._marks.items()}
        # A special token may also be written in ordinary ones, so both forms are looked for.
        self._stop = tuple(dict.fromkeys((*stops, *(_marked(text, contents) for text in stops))))
        self._held = ""  # may be the beginning of a stop string
        self.stopped = False

    def push(self, token_id: int) -> str:
        """The text that one more token makes safe to show; often empty."""
        if self.stopped:
            return ""
        mark = self._marks.get(int(token_id))
        text = self._detokenizer.push(int(token_id)) if mark is None else self._detokenizer.flush() + mark
        return _unmarked(self._until_stop(text))

    def flush(self) -> str:
        """The rest of the text, once no token follows: an incomplete character becomes U+FFFD."""
        text = "" if self.stopped else self._until_stop(self._detokenizer.flush())
        held, self._held = self._held, ""
        return _unmarked(text + held)

    def _until_stop(self, text: str) -> str:
        text = self._held + text
        found = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            # The first that is complete, so that the result does not depend on how tokens cut the text.
            _, start = min(found)
            self.stopped, self._held = True, ""
            return text[:start]
        cut = len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[cut:]
        return text[:cut]


class _Detokenizer:
    """Ids to whole characters, by decoding the last few ids with and without the new one."""

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        read = (int(index) for index in reversed(context) if tokenizer.has_text(int(index)))
        self._window = list(islice(read, _CONTEXT))[::-1]
        self._shown = len(self._decode())  # characters of the window's text that are out
        self._bytes = bytearray()  # byte-fallback pieces that are not a whole character yet
        self._invalid = False  # the current run of such pieces is no UTF-8

    def push(self, token_id: int) -> str:
        if not self._tokenizer.has_text(token_id):
            return ""
        byte = self._tokenizer.byte_ids.get(token_id)
        if byte is not None:
            return self._restart(token_id) + self._push_byte(byte)
        text = self._end_of_run()
        self._window.append(token_id)
        decoded = self._decode()
        # Only the last replacement character can still change: the bytes of an incomplete character make one.
        held = 1 if decoded.endswith(_REPLACEMENT) else 0
        text += decoded[self._shown : len(decoded) - held]
        self._shown = max(self._shown, len(decoded) - held)
        if len(self._window) >= _WINDOW:
            del self._window[:-_CONTEXT]
            self._shown = len(self._decode()) - held
        return text

    def flush(self) -> str:
        rest = self._decode()[self._shown :]
        self._shown += len(rest)
        return self._end_of_run() + rest

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window)

    def _restart(self, token_id: int) -> str:
        held = self._decode()[self._shown :]
        # A byte piece's own text is kept apart; in the window it only says that what follows does not start the text.
        self._window = [token_id]
        self._shown = len(self._decode())
        return held

    def _push_byte(self, byte: int) -> str:
        self._bytes.append(byte)
        try:
            text = self._bytes.decode()
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data" and not self._invalid:
                return ""
            self._invalid = True
        if self._invalid:
            return self._end_of_bytes()
        self._bytes.clear()
        return text

    def _end_of_run(self) -> str:
        self._invalid = False
        return self._end_of_bytes()

    def _end_of_bytes(self) -> str:
        count = len(self._bytes)
        self._bytes.clear()
        return _REPLACEMENT * count  # one a byte, as the decoder does


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` with which ``stop`` begins."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)


def _checked(stop: str | Sequence[str]) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    for text in stops:
        if not isinstance(text, str):
            raise StopError(f"a stop string is {text!r:.60}, which is no text")
        if not text:
            raise StopError("a stop string is empty; it must have at least one character")
        if any(_FIRST_MARK <= character <= _LAST_MARK for character in text):
            raise StopError(f"the stop string {text!r:.60} is not valid Unicode (a lone surrogate)")
    return stops


def _marks(tokenizer: Tokenizer, stops: Sequence[str]) -> dict[int, str]:
    """A character that no text has for each special token in the stop strings, by the token's id."""
    ids = [index for text, index in tokenizer.special_texts.items() if text and any(text in stop for stop in stops)]
    return {index: chr(ord(_FIRST_MARK) + i) for i, index in enumerate(ids[: ord(_LAST_MARK) - ord(_FIRST_MARK)])}


def _marked(text: str, marks: Mapping[str, str]) -> str:
    for content in sorted(marks, key=len, reverse=True):  # one may be part of another
        text = text.replace(content, marks[content])
    return text


def _unmarked(text: str) -> str:
    return "".join(c for c in text if not _FIRST_MARK <= c <= _LAST_MARK) if not text.isascii() else text
