"""Streamed text is the decoded text, whatever the tokens and however the stop strings fall."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesart.graphs.errors import MesaError
from mesart.runtime.stream import TextStream
from mesart.runtime.text import Tokenizer

KINDS = ["byte_level", "llama2_like", "gemma_like", "unigram"]
WORDS = ["The quick", " brown", "  ", "日本語", "👩‍👩‍👧‍👦", "🇩🇪", "e\u0301", "नमस्ते", "\r\n", "�", "▁", "<0x41>"]
texts = st.lists(st.one_of(st.text(max_size=8), st.sampled_from(WORDS)), max_size=6).map("".join)


@pytest.fixture(scope="module")
def tokenizers(tokenizer_folders: dict[str, Path]) -> dict[str, Tokenizer]:
    return {kind: Tokenizer(folder) for kind, folder in tokenizer_folders.items()}


def pieces(stream: TextStream, ids: Sequence[int]) -> list[str]:
    return [*(stream.push(index) for index in ids), stream.flush()]


def cut(text: str, stops: Sequence[str]) -> str:
    """The text up to the stop string that is complete first."""
    found = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    return text[: min(found)[1]] if found else text


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(text=texts)
def test_pieces_make_the_text(tokenizers: dict[str, Tokenizer], kind: str, text: str) -> None:
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text)
    whole = tokenizer.decode(ids)
    assert "".join(pieces(TextStream(tokenizer), ids)) == whole
    if kind == "byte_level":
        assert whole == text


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_mixture_of_tokens(tokenizers: dict[str, Tokenizer], kind: str, data: st.DataObject) -> None:
    """Special, unknown and random tokens among those of text, in places where no encoder puts them."""
    tokenizer = tokenizers[kind]
    anything = st.integers(0, tokenizer.vocab_size + 3)
    if kind != "byte_level":  # bytes in any order: see the next but one test
        anything = anything.filter(lambda index: index not in tokenizer.byte_ids)
    parts = st.one_of(st.lists(anything, max_size=5), texts.map(tokenizer.encode))
    ids = [index for part in data.draw(st.lists(parts, max_size=6)) for index in part]
    assert "".join(pieces(TextStream(tokenizer), ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(text=texts, data=st.data())
def test_stop_strings(tokenizers: dict[str, Tokenizer], kind: str, text: str, data: st.DataObject) -> None:
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text)
    whole = tokenizer.decode(ids)
    within = st.tuples(st.integers(0, len(whole)), st.integers(1, 6)).map(lambda at: whole[at[0] : at[0] + at[1]])
    stops = data.draw(st.lists(st.one_of(within, st.text(min_size=1, max_size=3)).filter(bool), max_size=3))
    stream = TextStream(tokenizer, stops)
    assert "".join(pieces(stream, ids)) == cut(whole, stops)
    assert stream.stopped == any(stop in whole for stop in stops)


def test_broken_byte_pieces(tokenizers: dict[str, Tokenizer]) -> None:
    """A run of byte pieces that is no UTF-8: one U+FFFD a byte as when decoding, but what was shown stays."""
    tokenizer = tokenizers["llama2_like"]
    ids = {byte: index for index, byte in tokenizer.byte_ids.items()}
    word = tokenizer.encode("The", add_special_tokens=False)
    broken = [ids[0xE4], ids[0xBD], *word]
    assert "".join(pieces(TextStream(tokenizer), broken)) == tokenizer.decode(broken) == "�� The"
    shown = [*(ids[byte] for byte in "你".encode()), ids[0xFF], *word]
    assert "".join(pieces(TextStream(tokenizer), shown)) == "你� The"
    assert pieces(TextStream(tokenizer), [ids[0xF0], ids[0x9F]]) == ["", "", "��"]


def test_flush_gives_the_rest_once(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte_level"]
    stream = TextStream(tokenizer)
    assert stream.push(tokenizer.encode("日", add_special_tokens=False)[0]) == ""
    assert [stream.flush(), stream.flush()] == ["�", ""]


@pytest.mark.parametrize("kind", ["byte_level", "llama2_like", "gemma_like"])
def test_whole_characters_at_once(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    """Nothing is shown of a character before it is whole, and nothing is held back after."""
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode("The dog 🦊 says 你好.", add_special_tokens=False)
    stream, shown, whole = TextStream(tokenizer), "", ""
    for count, index in enumerate(ids, start=1):
        shown += stream.push(index)
        # While "好" is incomplete, decoding at once also loses "你", a byte piece before it.
        whole = max(whole, tokenizer.decode(ids[:count]).rstrip("�"), key=len)
        assert shown == whole
    assert "🦊 says 你好" in shown


def test_context_keeps_the_space_between_words(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["llama2_like"]
    prompt, ids = tokenizer.encode("The lazy"), tokenizer.encode("dog", add_special_tokens=False)
    assert "".join(pieces(TextStream(tokenizer), ids)) == "dog"
    assert "".join(pieces(TextStream(tokenizer, context=prompt), ids)) == " dog"
    assert "".join(pieces(TextStream(tokenizer, context=[*prompt, 2, 1]), ids)) == " dog"  # special ones are silent


def test_silent_tokens_leave_no_trace(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["llama2_like"]
    special, unknown = 1, tokenizer.vocab_size + 7  # models pad their vocabulary
    words = [tokenizer.encode(word, add_special_tokens=False) for word in ("lazy", "dog")]
    assert "".join(pieces(TextStream(tokenizer), [*words[0], *[special, unknown] * 20, *words[1]])) == "lazy dog"


@pytest.mark.parametrize("kind", ["byte_level", "llama2_like", "gemma_like"])
def test_context_is_not_shown(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode("The quick 日本語 fox\n jumps 🦊  over")
    whole = tokenizer.decode(ids)
    for count in range(len(ids)):
        before = tokenizer.decode(ids[:count])
        if not before.endswith("�"):
            assert "".join(pieces(TextStream(tokenizer, context=ids[:count]), ids[count:])) == whole[len(before) :]


def test_text_that_may_become_a_stop_string_is_held_back(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte_level"]
    stream = TextStream(tokenizer, "</s>")
    letters = {letter: tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "a</s>b"}
    assert [stream.push(letters[letter]) for letter in "a</<"] == ["a", "", "", "</"]
    assert [stream.push(letters[letter]) for letter in "/s>b"] == ["", "", "", ""]
    assert stream.stopped
    assert stream.flush() == ""


@pytest.mark.parametrize("kind", KINDS)
def test_stop_string_within_another(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    """The one that is complete first ends the text, though one token may bring both."""
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode("The quick brown")
    assert "".join(pieces(TextStream(tokenizer, ["uick", "i"]), ids)) == "The qu"


def test_empty_stop_string_is_refused(tokenizers: dict[str, Tokenizer]) -> None:
    with pytest.raises(ValueError, match="stop string is empty"):
        TextStream(tokenizers["byte_level"], ["</s>", ""])


@pytest.mark.parametrize("stop", ["</s>", b"x", 3, None, "\ud800"])
def test_a_stop_string_is_text(tokenizers: dict[str, Tokenizer], stop: object) -> None:
    if stop == "</s>":
        TextStream(tokenizers["byte_level"], [stop])
        return
    with pytest.raises(MesaError, match="stop string"):
        TextStream(tokenizers["byte_level"], [stop])  # type: ignore[list-item]


def test_special_tokens_in_stop_strings(tokenizers: dict[str, Tokenizer]) -> None:
    """They end a text though no text shows them; alone, and with text before or behind them."""
    tokenizer = tokenizers["byte_level"]
    end, start = (tokenizer.special_texts[name] for name in ("<|im_end|>", "<|im_start|>"))
    the, dog = (tokenizer.encode(text, add_special_tokens=False) for text in ("The", " dog"))
    ids = [*the, start, *dog, end, *the, *dog]
    cases = {
        "<|im_end|>": "The dog",
        "dog<|im_end|>": "The ",
        "<|im_end|>Th": "The dog",
        "<|im_start|> dog<|im_end|>The": "The",
        "<|im_end|> dog": "The dogThe dog",  # not in this order
        "The dog": "",  # what is not looked for leaves no trace
    }
    for stop, expected in cases.items():
        stream = TextStream(tokenizer, stop)
        assert "".join(pieces(stream, ids)) == expected
        assert stream.stopped == (stop != "<|im_end|> dog")
    written = tokenizer.encode("a<|im", add_special_tokens=False) + tokenizer.encode(
        "_end|>b", add_special_tokens=False
    )
    assert end not in written
    assert "".join(pieces(TextStream(tokenizer, "<|im_end|>"), written)) == "a"


@pytest.mark.parametrize("kind", KINDS)
def test_work_does_not_grow(tokenizers: dict[str, Tokenizer], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of tokens decoded for one more token is bounded, even if no character is ever whole."""
    tokenizer, decode, longest = tokenizers[kind], Tokenizer.decode, 0

    def counted(self: Tokenizer, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return decode(self, ids, skip_special_tokens)

    monkeypatch.setattr(Tokenizer, "decode", counted)
    stream = TextStream(tokenizer, "zzz")
    endless = [tokenizer.encode("日", add_special_tokens=False)[0]] * 500
    pieces(stream, [*tokenizer.encode("The quick brown fox 🦊 " * 30), *endless])
    assert longest <= 12
