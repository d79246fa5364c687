"""Ids, text and chats are those of transformers, for the same folder."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from tokenizers import Tokenizer as Trained
from transformers import AutoTokenizer, GemmaTokenizer, LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from mesart.graphs.errors import MesaError
from mesart.runtime.text import Tokenizer

TEXTS = [
    "",
    "The quick",
    " leading",
    "日本語 👩‍👩‍👧‍👦 e\u0301",
    "a  b\n\n c",
    "<|im_start|>user\n</s><s>",
    "x<tool> y<|sep|>z<|pad|>",
]

CHATML = """\
{%- for message in messages %}
    {%- if loop.first and message['role'] != 'system' %}
        {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + (message.content or '') }}
    {%- if message.tool_calls is defined %}
        {%- for call in message.tool_calls %}
            {{- '<tool>' + call.function | tojson + '</tool>' }}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
"""

LLAMA3 = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" }}
{{- system_message + "<|eot|>" }}
{%- if tools is not none %}
    {{- "Tools:\\n" }}
    {%- for tool in tools %}
    {{- tool | tojson(indent=4) }}
    {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{% for message in messages %}
  {% if message.role == 'tool' %}{% continue %}{% endif %}
  {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot|>' }}
{% endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

GEMMA = """\
{{ bos_token }}{% set ns = namespace(turns=0) %}
{% for message in messages %}
{% if message['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}
{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{% if message.content is string %}{% set parts = [{'type': 'text', 'text': message.content}] %}{% else %}
{% set parts = message.content %}{% endif %}
{{ '<start_of_turn>' + role + '\\n' }}{% for part in parts %}{{ part.text | trim }}{% endfor %}{{ '<end_of_turn>\\n' }}
{% set ns.turns = ns.turns + 1 %}
{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}[{{ ns.turns }}]{{ dict(a=1) }}
"""

THINKING = """\
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{% generation %}{{ message.thinking }}|{{ message.reasoning_content }}|{{ message.content }}{{ eos_token }}
{%- set leaked = 1 %}{% endgeneration %}{{ leaked }}
{%- else %}[{{ message | tojson }}]{{ '\\n' }}{% endif %}
{%- endfor %}
{%- for name in ['a', 'b', 'c'] %}{{ name }}{% if loop.index > 1 %}{% break %}{% endif %}{% endfor %}
{{- image_token }}{{ pad_token }}{{ "é <b>&" | tojson }}{{ documents is none }}
"""

USER = {"role": "user", "content": " <b>Héllo</b> & 'you' "}
CHATS: list[list[dict[str, Any]]] = [
    [USER],
    [{"role": "system", "content": "Be brief."}, USER],
    [
        USER,
        {"role": "assistant", "content": "Yes?", "thinking": "hm", "tool_calls": None},
        {"role": "user", "content": "No."},
    ],
    [{"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": " b"}]}],
    [
        USER,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "f", "arguments": {"x": [1, "é"]}}}],
        },
    ],
]


def write(folder: Path, **files: Any) -> None:
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values))


def copied(folders: dict[str, Path], kind: str, tmp_path: Path) -> Path:
    shutil.copy(folders[kind] / "tokenizer.json", tmp_path)
    return tmp_path


def assert_same(folder: Path, texts: list[str]) -> None:
    ours, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.vocab_size == len(theirs)
    assert ours.special_tokens == theirs.special_tokens_map
    for text in texts:
        for special in (True, False):
            ids = theirs.encode(text, add_special_tokens=special)
            assert ours.encode(text, add_special_tokens=special) == ids
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
            assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)


def as_hub(folder: Path) -> None:
    """As most checkpoints come: tokenizer.json and a tokenizer_config.json that repeats the added tokens."""
    special = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    values = {
        "added_tokens_decoder": {
            "0": {"content": "<|begin|>", **special},
            "1": {"content": "<|end|>", **special},
            "430": {"content": "<tool>", **special, "rstrip": True, "special": False},
            "431": {"content": "<|sep|>", **special, "special": False},  # named below, hence special
        },
        "bos_token": "<|begin|>",
        "eos_token": {"__type": "AddedToken", "content": "<|end|>", **special},
        "pad_token": "<|pad|>",  # in no vocabulary: gets a new id
        "additional_special_tokens": ["<|im_start|>", "<|extra|>"],
        "sep_token": "<|sep|>",
        "image_token": "<|image|>",
        "add_bos_token": False,  # ignored by transformers beside a tokenizer.json
        "clean_up_tokenization_spaces": True,  # ignored by transformers for BPE
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 4,
    }
    write(folder, tokenizer_config=values, config={"model_type": "llama"})


def as_2022(folder: Path) -> None:
    """As old checkpoints come: the special tokens in a file of their own."""
    eos = {"content": "The", "lstrip": False, "normalized": False, "rstrip": False, "single_word": True}
    write(
        folder,
        tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_end|>"},
        special_tokens_map={"bos_token": "<|begin|>", "eos_token": eos},
        config={"model_type": "gpt_neox"},
    )


def with_truncation(folder: Path) -> None:
    """As training scripts leave it behind."""
    tokenizer = Trained.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=7, pad_token="<|end|>", pad_id=1)
    tokenizer.save(str(folder / "tokenizer.json"))
    write(folder, tokenizer_config={"tokenizer_class": "TokenizersBackend"}, config={"model_type": "llama"})


def splitting_special_tokens(folder: Path) -> None:
    write(folder, tokenizer_config={"tokenizer_class": "TokenizersBackend", "split_special_tokens": True})


def resaved(folder: Path) -> None:
    make: Any = PreTrainedTokenizerFast
    make(
        tokenizer_object=Trained.from_file(str(folder / "tokenizer.json")),
        bos_token="<|begin|>",
        eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>", "<tool>"],
    ).save_pretrained(folder)


@pytest.mark.parametrize("prepare", [as_hub, as_2022, with_truncation, splitting_special_tokens, resaved])
def test_same_as_transformers(
    tokenizer_folders: dict[str, Path], tmp_path: Path, prepare: Callable[[Path], None]
) -> None:
    folder = copied(tokenizer_folders, "byte_level", tmp_path)
    prepare(folder)
    assert_same(folder, TEXTS)


@pytest.mark.parametrize(
    ("kind", "family"),
    [("llama2_like", LlamaTokenizer), ("gemma_like", GemmaTokenizer), ("byte_level", Qwen2Tokenizer)],
)
def test_same_as_families(tokenizer_folders: dict[str, Path], tmp_path: Path, kind: str, family: Any) -> None:
    """Families build the tokenizer anew, in Python: what they save is what they use."""
    folder = copied(tokenizer_folders, kind, tmp_path)
    write(folder, tokenizer_config={"tokenizer_class": family.__name__})
    family.from_pretrained(folder).save_pretrained(folder)
    assert_same(folder, TEXTS)


@pytest.mark.parametrize("kind", ["byte_level", "llama2_like", "gemma_like", "unigram"])
def test_any_text(tokenizer_folders: dict[str, Path], kind: str) -> None:
    ours = Tokenizer(tokenizer_folders[kind])
    make: Any = PreTrainedTokenizerFast
    theirs = make(tokenizer_file=str(tokenizer_folders[kind] / "tokenizer.json"))

    @settings(max_examples=100, deadline=None)
    @given(st.text(max_size=20))
    def check(text: str) -> None:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)

    check()


@pytest.mark.parametrize("in_config", [False, True])
@pytest.mark.parametrize("template", [CHATML, LLAMA3, GEMMA, THINKING], ids=["chatml", "llama3", "gemma", "thinking"])
def test_chat_templates(tokenizer_folders: dict[str, Path], tmp_path: Path, template: str, in_config: bool) -> None:
    folder = copied(tokenizer_folders, "byte_level", tmp_path)
    as_hub(folder)
    if in_config:
        values = json.loads((folder / "tokenizer_config.json").read_text())
        templates = [{"name": "other", "template": "?"}, {"name": "default", "template": template}]
        write(folder, tokenizer_config={**values, "chat_template": templates})
    else:
        (folder / "chat_template.jinja").write_text(template)
    ours, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.has_chat_template
    rendered = 0
    choices: list[dict[str, Any]] = [{}, {"tools": [{"name": "f", "type": "<int>"}]}, {"enable_thinking": False}]
    for chat, choice, prompt in itertools.product(CHATS, choices, (True, False)):
        options = {"add_generation_prompt": prompt, **choice}
        try:
            expected: Any = theirs.apply_chat_template(chat, tokenize=False, **options)
        except (TemplateError, TypeError) as error:
            expected = error
        if isinstance(expected, Exception):  # the template refuses this chat
            with pytest.raises(MesaError, match="cannot render") as caught:
                ours.apply_chat_template(chat, **options)
            assert str(expected) in str(caught.value)
        else:
            assert ours.apply_chat_template(chat, **options) == expected
            rendered += 1
    assert rendered >= 12


def test_template_is_kept_in_its_sandbox(tokenizer_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(tokenizer_folders, "byte_level", tmp_path)
    for attack in (
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__.os }}",
        "{{ dict.mro() }}",
    ):
        (folder / "chat_template.jinja").write_text(attack)
        with pytest.raises(MesaError, match="cannot render"):
            Tokenizer(folder).apply_chat_template([USER])


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config": {"eos_token_id": [2, 7, 2]}, "config": {"eos_token_id": 3}}, (2, 7)),
        ({"generation_config": {"eos_token_id": 0}}, (0,)),
        ({"generation_config": {"eos_token_id": None}, "config": {"eos_token_id": 3}}, (3,)),
        ({"config": {"text_config": {"eos_token_id": [4, 5]}}}, (4, 5)),
        ({"tokenizer_config": {"eos_token": "<|im_end|>"}}, (3,)),
        ({}, ()),
    ],
)
def test_eos(
    tokenizer_folders: dict[str, Path], tmp_path: Path, files: dict[str, Any], expected: tuple[int, ...]
) -> None:
    folder = copied(tokenizer_folders, "byte_level", tmp_path)
    write(folder, **files)
    assert Tokenizer(folder).eos_token_ids == expected


def test_bad_input_gets_one_line(tokenizer_folders: dict[str, Path], tmp_path: Path) -> None:
    def message(call: Callable[[], Any]) -> str:
        with pytest.raises(MesaError) as caught:
            call()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "tokenizer.json is missing: save the model's tokenizer there" in message(lambda: Tokenizer(tmp_path))
    (tmp_path / "tokenizer.json").write_text('{"version": ')
    assert "tokenizer.json is damaged" in message(lambda: Tokenizer(tmp_path))
    tokenizer = Tokenizer(copied(tokenizer_folders, "byte_level", tmp_path))
    assert not tokenizer.has_chat_template
    assert "put the model's chat_template.jinja there" in message(lambda: tokenizer.apply_chat_template([USER]))
    assert "lone surrogate" in message(lambda: tokenizer.encode("a\ud800"))
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    tokenizer = Tokenizer(tmp_path)
    assert "is damaged: line 1" in message(lambda: tokenizer.apply_chat_template([USER]))
    assert "at least one message" in message(lambda: tokenizer.apply_chat_template([]))
    assert "at least one message" in message(lambda: tokenizer.apply_chat_template(["hello"]))  # type: ignore[list-item]
    assert "plain JSON" in message(lambda: tokenizer.apply_chat_template([{"role": "user", "content": object()}]))
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    assert "tokenizer_config.json is damaged: a JSON object" in message(lambda: Tokenizer(tmp_path))
