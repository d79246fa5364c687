"""Text to token ids and back, and chat templates: what transformers does, without transformers.

A bundle keeps the checkpoint's own files; they are read here as transformers reads them:

============================ ===================================================================
``tokenizer.json``           the tokenizer itself
``tokenizer_config.json``    named special tokens, tokens to add, the chat template of older files
``special_tokens_map.json``  named special tokens of older files
``chat_template.jinja``      the chat template
``generation_config.json``   the end-of-text ids; else ``config.json``, else the tokenizer's own
============================ ===================================================================
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from os import PathLike
from typing import Any, Final

import jinja2
import tokenizers
from jinja2 import ext, nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken

from mesart.graphs.errors import MesaError
from mesart.runtime.text_files import TextFiles

# Tokens that are missing from tokenizer.json get their ids in this order, as transformers gives them.
_NAMED: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# Names under which a message may carry its reasoning; templates read the first two.
_REASONING: Final = ("reasoning_content", "thinking", "reasoning")


class Tokenizer:
    """The tokenizer of a bundle or a checkpoint folder.

    Attributes:
        special_tokens: the named special tokens, e.g. ``{"bos_token": "<s>"}``.
        special_ids: ids that ``decode`` leaves out by default.
        byte_ids: id of each byte-fallback piece (``<0x0A>``) to its byte; empty where the tokenizer has none.
        eos_token_ids: any of them ends the text.
        vocab_size: number of ids, added tokens included.
        chat_template: Jinja source of ``apply_chat_template``; ``None`` without one.

    Raises:
        MesaError: no ``tokenizer.json``, or one of the files is damaged.
    """

    def __init__(self, folder: str | PathLike[str]) -> None:
        self._load(TextFiles.of_folder(folder))

    @classmethod
    def of(cls, files: Mapping[str, bytes], where: str | PathLike[str] = ".") -> Tokenizer:
        """A tokenizer of files that are in memory already, by name; ``where`` they come from, for messages."""
        made = cls.__new__(cls)
        made._load(TextFiles(where, files))
        return made

    def _load(self, files: TextFiles) -> None:
        self._folder = files.where
        self._settings = _read_settings(files)
        self._tokenizer = _read_tokenizer(files)
        padding = self._tokenizer.padding
        if padding is not None:
            self._settings.setdefault("pad_token", padding["pad_token"])
        # Set by training scripts and saved by accident: a prompt would be cut, or grow.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = bool(self._settings.get("split_special_tokens"))
        named = _named_special_tokens(self._settings)
        _add_missing_tokens(self._tokenizer, self._settings, named)

        self.chat_template: str | None = self._template_source(files)
        self.special_tokens: dict[str, str] = {name: token.content for name, token in named.items()}
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids: frozenset[int] = frozenset(index for index, token in added.items() if token.special)
        self.byte_ids: dict[int, int] = _byte_ids(self._tokenizer)
        self.vocab_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.eos_token_ids: tuple[int, ...] = configured_eos_ids(files) or self._named_ids("eos_token")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, never cut and never padded.

        Args:
            text: any text.
            add_special_tokens: add what the tokenizer adds to a text (often a beginning-of-text token). False for text
                from ``apply_chat_template``: templates write those tokens themselves.

        Raises:
            MesaError: the text is not valid Unicode (a lone surrogate).
        """
        try:
            return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
        except TypeError as error:
            if not isinstance(text, str):
                raise
            raise MesaError("the text is not valid Unicode (a lone surrogate): is its file UTF-8?") from error

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; ids that the tokenizer does not know have none."""
        return self._tokenizer.decode([int(index) for index in ids], skip_special_tokens=skip_special_tokens)

    def has_text(self, token_id: int) -> bool:
        """Whether ``decode`` reads this id: it is neither special nor unknown (models pad their vocabulary)."""
        return token_id not in self.special_ids and self._tokenizer.id_to_token(token_id) is not None

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """A conversation as the text that the model was trained on. Encode it with ``add_special_tokens=False``.

        Args:
            messages: such as ``{"role": "user", "content": "Hello"}``.
            add_generation_prompt: end with the opening of the assistant's turn.
            tools: JSON schemas of the tools that the model may call.
            variables: what else this template reads, e.g. ``enable_thinking=False``.

        Raises:
            MesaError: no template, no messages, messages that are no plain JSON, or the template refuses them.
        """
        values = {**self.special_tokens, "documents": None, **variables, "tools": tools, "messages": list(messages)}
        values = _plain(values)
        if not messages or not all(isinstance(message, dict) for message in values["messages"]):
            raise MesaError('a chat needs at least one message such as {"role": "user", "content": "Hello"}')
        values["messages"] = [_normalised(message) for message in values["messages"]]
        try:
            return self._chat_template.render(values, add_generation_prompt=add_generation_prompt)
        except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())  # a template may raise whole paragraphs
            raise MesaError(f"the chat template cannot render these messages: {reason}") from error

    @property
    def has_chat_template(self) -> bool:
        """Whether ``apply_chat_template`` can work."""
        return self.chat_template is not None

    @cached_property
    def _chat_template(self) -> jinja2.Template:
        source = self.chat_template
        if source is None:
            raise MesaError(
                f"{self._folder} has no chat template: put the model's chat_template.jinja there, or give plain text"
            )
        try:
            return _template_environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise MesaError(f"the chat template of {self._folder} is damaged: line {error.lineno}: {error}") from error

    def _template_source(self, files: TextFiles) -> str | None:
        if "chat_template.jinja" in files:
            return files.text("chat_template.jinja")
        source = self._settings.get("chat_template")
        if isinstance(source, list):  # several, by name
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
        return source

    def _named_ids(self, name: str) -> tuple[int, ...]:
        token = self.special_tokens.get(name)
        index = None if token is None else self._tokenizer.token_to_id(token)
        return () if index is None else (index,)


def configured_eos_ids(files: TextFiles) -> tuple[int, ...]:
    """End-of-text ids of ``generation_config.json``, else of ``config.json``; empty where neither has any.

    Raises:
        MesaError: a file is damaged.
    """
    config = files.json("config.json")
    for values in (files.json("generation_config.json"), config, config.get("text_config") or {}):
        found = values.get("eos_token_id")
        if found is not None:
            return tuple(dict.fromkeys(found if isinstance(found, list) else [found]))
    return ()


def _read_tokenizer(files: TextFiles) -> tokenizers.Tokenizer:
    path = files.where / "tokenizer.json"
    if path.name not in files:
        raise MesaError(
            f"{path} is missing: save the model's tokenizer there (transformers' AutoTokenizer, save_pretrained), "
            "or give token ids instead of text"
        )
    try:
        return tokenizers.Tokenizer.from_buffer(files.contents[path.name])
    except Exception as error:  # the library raises nothing narrower
        raise MesaError(f"{path} is damaged: {error}") from error


def _read_settings(files: TextFiles) -> dict[str, Any]:
    settings = files.json("tokenizer_config.json")
    if "added_tokens_decoder" not in settings:  # written before 2023: the special tokens have a file of their own
        settings.update(files.json("special_tokens_map.json"))
    if not settings.get("extra_special_tokens"):
        settings["extra_special_tokens"] = settings.pop("additional_special_tokens", None) or []
    if isinstance(settings["extra_special_tokens"], dict):  # named ones, of a model that also hears or sees
        settings.update(settings.pop("extra_special_tokens"))
    return settings


def _named_special_tokens(settings: Mapping[str, Any]) -> dict[str, AddedToken]:
    others = [name for name in settings if name.endswith("_token") and name not in _NAMED]
    values = {name: settings.get(name) for name in (*_NAMED, *others)}
    return {name: _special_token(value) for name, value in values.items() if isinstance(value, str | dict)}


def _special_token(value: str | Mapping[str, Any]) -> AddedToken:
    if isinstance(value, str):
        return AddedToken(value, special=True)
    fields = {key: field for key, field in value.items() if key not in ("__type", "special")}
    return AddedToken(**fields, special=True)


def _add_missing_tokens(
    tokenizer: tokenizers.Tokenizer, settings: Mapping[str, Any], named: Mapping[str, AddedToken]
) -> None:
    """Add the tokens that only the settings know, in transformers' order: the order gives the ids."""
    known = tokenizer.get_added_tokens_decoder().values()
    same = {repr(token) for token in known}
    special = {token.content for token in named.values()}
    missing = []
    for _, fields in sorted((int(index), fields) for index, fields in settings.get("added_tokens_decoder", {}).items()):
        token = AddedToken(**fields)
        if repr(token) not in same:
            token.special = token.special or token.content in special
            missing.append(token)
    contents = {token.content for token in (*known, *missing)}
    for token in (*named.values(), *map(_special_token, settings.get("extra_special_tokens", []))):
        if token.content not in contents:
            contents.add(token.content)
            missing.append(token)
    tokenizer.add_tokens(missing)


def _byte_ids(tokenizer: tokenizers.Tokenizer) -> dict[int, int]:
    newline = tokenizer.token_to_id("<0x0A>")
    if newline is None or tokenizer.decode([newline]) != "\n":  # an ordinary token that looks like one
        return {}
    ids = {tokenizer.token_to_id(f"<0x{byte:02X}>"): byte for byte in range(256)}
    return {index: byte for index, byte in ids.items() if index is not None}


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """A copy of JSON types only: a template comes with a checkpoint, and must see no object that it could call."""
    try:
        copy: dict[str, Any] = json.loads(json.dumps(values))
    except (TypeError, ValueError) as error:
        raise MesaError(f"messages, tools and variables of a chat template must be plain JSON: {error}") from error
    return copy


def _normalised(message: dict[str, Any]) -> dict[str, Any]:
    """Without empty fields, which templates print as "None", and with the reasoning under the names that they read."""
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[name] for name in _REASONING if name in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


class _Generation(ext.Extension):
    """``{% generation %}``: marks the assistant's text for training; here it only passes it through."""

    tags = {"generation"}  # noqa: RUF012  (declared so by jinja2)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _template_environment() -> ImmutableSandboxedEnvironment:
    """The environment for which the templates on the hub are written: that of transformers."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _dict
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own escapes HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _dict(*arguments: Any, **items: Any) -> dict[Any, Any]:
    return dict(*arguments, **items)  # a function: the type itself leads out of the sandbox
