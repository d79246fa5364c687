"""Tokenizers of strangers and damaged ones end in one line: no panic, no hang, no memory without bounds."""

from __future__ import annotations

import base64
import copy
import json
import time
from pathlib import Path
from typing import Any

import pytest

from mesart.graphs.errors import MesaError
from mesart.graphs.tokenizer_limits import within_seconds
from mesart.runtime.text import Tokenizer, configured_eos_ids, default_sampling
from mesart.runtime.text_files import TextFiles

GROWING = base64.b64encode(bytes(4) + b"a" * 999 + b"\0").decode()
NESTED = '{"a":' * 100_000 + "1" + "}" * 100_000


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def sequence(kind: str, *rules: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", kind: [*rules]}


A, ANY = {"String": "a"}, {"Regex": "(?=.)"}
BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
TEXT = {"Sequence": {"id": "A", "type_id": 0}}
TEMPLATE = {"type": "TemplateProcessing", "pair": [], "special_tokens": {}}
UNKNOWN = {"SpecialToken": {"id": "nope", "type_id": 0}}

RULES: dict[str, tuple[dict[str, Any], str]] = {
    "replacements": ({"normalizer": sequence("normalizers", *[replace(A, "a" * 10)] * 12)}, "normalizer may make"),
    "insertions": ({"normalizer": sequence("normalizers", *[replace(ANY, "a")] * 12)}, "normalizer may make"),
    "prepended": ({"normalizer": {"type": "Prepend", "prepend": "a" * 2000}}, "normalizer may make"),
    "bytes of bytes": ({"pre_tokenizer": sequence("pretokenizers", *[BYTES] * 12)}, "normalizer may make"),
    "decoder": ({"decoder": sequence("decoders", *[replace(A, "a" * 10)] * 12)}, "decoder may make"),
    "long replacement": ({"decoder": replace(A, "a" * 10**6)}, "decoder: content has 1,000,000 characters"),
    "many rules": ({"normalizer": sequence("normalizers", *[{"type": "NFC"}] * 999)}, "normalizer has 10.. rules"),
    "repeats": ({"pre_tokenizer": split("((a{999}){999}){999}")}, "larger than any that makes sense"),
    "strip": ({"decoder": {"type": "Strip", "content": "e", "start": 2**40, "stop": 0}}, "decoder: start is"),
    "template": ({"post_processor": {**TEMPLATE, "single": [TEXT] * 99}}, "adds more to a text"),
    "special": ({"post_processor": {**TEMPLATE, "single": [UNKNOWN, TEXT]}}, "special token 'nope', which"),
    "charsmap": ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "?"}}, "charsmap is not base64"),
    "short map": ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/wAA"}}, "charsmap is cut off"),
    "growing map": (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": GROWING}},
        "replacement of 999 bytes",
    ),
}


@pytest.fixture
def values(tokenizer_folders: dict[str, Path]) -> dict[str, Any]:
    return dict(json.loads((tokenizer_folders["byte_level"] / "tokenizer.json").read_text()))


def of(values: Any, **files: Any) -> Tokenizer:
    contents = {"tokenizer.json": json.dumps(values).encode()}
    contents |= {f"{name}.json": it if isinstance(it, bytes) else json.dumps(it).encode() for name, it in files.items()}
    return Tokenizer.of(contents, "folder")


@pytest.mark.parametrize("name", RULES)
def test_rules_that_make_no_sense(values: dict[str, Any], name: str) -> None:
    changes, message = RULES[name]
    with pytest.raises(MesaError, match=f"^folder/tokenizer.json.*{message}"):
        of({**values, **changes})


def test_long_tokens(values: dict[str, Any]) -> None:
    values = copy.deepcopy(values)
    values["model"]["vocab"]["x" * 99_999] = 9999
    with pytest.raises(MesaError, match="a token has 99,999 characters"):
        of(values)


def test_a_regular_expression_that_backtracks(values: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    """The library panics, and says so; what the caller gets is an ordinary error."""
    tokenizer = of({**values, "pre_tokenizer": split(r"(a|a?)+$x|(\w+\s?)+\d")})
    with pytest.raises(MesaError, match="cannot read this text: .*retry-limit"):
        tokenizer.encode("a" * 40)
    capfd.readouterr()


def test_a_call_that_takes_too_long_is_left() -> None:
    start = time.monotonic()
    with pytest.raises(MesaError, match="the tokenizer was not done after 0 s"):
        within_seconds(0.2, "the tokenizer", lambda: time.sleep(5))
    assert time.monotonic() - start < 3
    assert within_seconds(5, "", lambda: 3) == 3
    with pytest.raises(KeyError):
        within_seconds(5, "", lambda: {"a": 1}["b"])


def test_long_texts(values: dict[str, Any]) -> None:
    tokenizer = of(values)
    text = "The quick brown fox.\n" * 20_000
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"added_tokens_decoder": [1]}, "added_tokens_decoder is a list"),
        ({"added_tokens_decoder": {"x": {"content": "a"}}}, "added_tokens_decoder has the key 'x'"),
        ({"added_tokens_decoder": {"1": 3}}, r"added_tokens_decoder\[1\] is a whole number"),
        ({"added_tokens_decoder": {"999": {}}}, "an object whose content is null"),
        ({"added_tokens_decoder": {"1": {"content": "a", "lstrip": "x"}}}, "does not fit tokenizer.json"),
        ({"eos_token": {"content": 3}}, "eos_token is an object whose content is a whole number"),
        ({"eos_token": 3}, "eos_token is a whole number"),
        ({"extra_special_tokens": [1]}, r"extra_special_tokens\[0\] is a whole number"),
        ({"extra_special_tokens": "abc"}, "extra_special_tokens is a string"),
        ({"extra_special_tokens": {"image_token": 3}}, "image_token is a whole number"),
        ({"split_special_tokens": "yes"}, "split_special_tokens is a string"),
        ({"chat_template": 3}, "chat_template is a whole number"),
        ({"chat_template": [1]}, "chat_template is a list"),
        ({"chat_template": [{"name": "default"}]}, "chat_template is a list"),
        ({"chat_template": {"default": 3}}, "chat_template has a template that is no string"),
        (NESTED.encode(), "its JSON is nested too deeply"),
        (b"\xff", "utf-8"),
        (b"\xef\xbb\xbf{}", "BOM"),
        ({"eos_token": "\ud800"}, "does not fit tokenizer.json"),
    ],
)
def test_damaged_settings(values: dict[str, Any], settings: Any, message: str) -> None:
    with pytest.raises(MesaError, match=f"^folder/tokenizer_config.json.*{message}"):
        of(values, tokenizer_config=settings)


@pytest.mark.parametrize("found", ["x", [[1]], {"a": 1}, 1.0, True, -1, [1, 10**20], [None]])
@pytest.mark.parametrize("file", ["generation_config", "config"])
def test_eos_that_is_no_token_id(values: dict[str, Any], file: str, found: Any) -> None:
    with pytest.raises(MesaError, match=f"^folder/{file}.json: eos_token_id is .*; it must be a token id"):
        of(values, **{file: {"eos_token_id": found}})
    with pytest.raises(MesaError, match="eos_token_id"):
        configured_eos_ids(TextFiles("folder", {f"{file}.json": json.dumps({"eos_token_id": found}).encode()}))


def test_text_config(values: dict[str, Any]) -> None:
    with pytest.raises(MesaError, match=r"^folder/config.json: text_config is a list"):
        of(values, config={"text_config": [1]})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_sample": True, "temperature": "hot"}, "temperature is hot"),
        ({"do_sample": True, "temperature": float("nan")}, "temperature is nan"),
        ({"do_sample": True, "temperature": 10**400}, "temperature is 1000"),
        ({"do_sample": True, "temperature": 1e308}, "temperature is 1e.308"),
        ({"do_sample": True, "top_k": True}, "top_k is True"),
        ({"do_sample": True, "top_p": [1]}, "top_p is"),
        ({"do_sample": "yes"}, "do_sample is yes"),
        ({"repetition_penalty": 1e-320}, "repetition_penalty is"),
        ({"repetition_penalty": 1e308}, "repetition_penalty is"),
    ],
)
def test_sampling_that_makes_no_sense(settings: dict[str, Any], message: str) -> None:
    files = TextFiles("folder", {"generation_config.json": json.dumps(settings).encode()})
    with pytest.raises(MesaError, match=f"^folder/generation_config.json: {message}") as caught:
        default_sampling(files)
    assert len(str(caught.value)) < 300


def test_chats_that_are_none(values: dict[str, Any]) -> None:
    tokenizer = of(values, tokenizer_config={"chat_template": "{{ messages[0].content }}"})
    deep: Any = []
    for _ in range(50_000):
        deep = [deep]
    chats: Any
    for chats in (deep, [{"role": "user", "content": deep}], [1], "text", {"role": "user"}, 3, None):
        with pytest.raises(MesaError, match="chat"):
            tokenizer.apply_chat_template(chats)
