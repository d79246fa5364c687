"""Text to token ids and back, and chat templates: what transformers does, without transformers.

A bundle keeps the checkpoint's own files; they are read here as transformers reads them:

================================ ===================================================================
``tokenizer.json``               the tokenizer itself
``tokenizer_config.json``        named special tokens, tokens to add, the chat templates of older files
``special_tokens_map.json``      named special tokens of older files
``chat_template.jinja``          the chat template
``additional_chat_templates/``   further ones, ``NAME.jinja``; a bundle has them in ``tokenizer_config.json``
``generation_config.json``       the end-of-text ids; else ``config.json``, else the tokenizer's own
================================ ===================================================================
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from os import PathLike
from typing import Any, Final

import tokenizers
from tokenizers import AddedToken

from mesart.graphs.errors import BundleError, InputError, MesaError
from mesart.graphs.generation import GENERATION_FILE, SamplingConfig, eos_ids
from mesart.graphs.json_file import type_name
from mesart.graphs.tokenizer_limits import Limits, within_seconds
from mesart.graphs.user_data import user_data
from mesart.runtime.chat_template import ChatTemplate
from mesart.runtime.text_files import MORE_TEMPLATES, TextFiles

# Tokens that are missing from tokenizer.json get their ids in this order, as transformers gives them.
_NAMED: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# Names under which a message may carry its reasoning; templates read the first two.
_REASONING: Final = ("reasoning_content", "thinking", "reasoning")

_SETTINGS: Final = "tokenizer_config.json"
_OLDER_SETTINGS: Final = "special_tokens_map.json"
_TOKENIZER: Final = "tokenizer.json"
_CONFIG: Final = "config.json"


class Tokenizer:
    """The tokenizer of a bundle or a checkpoint folder. Its files are read when it is made, and not again.

    Attributes:
        special_tokens: the named special tokens, e.g. ``{"bos_token": "<s>"}``.
        special_texts: every special token's text to its id.
        special_ids: ids that ``decode`` leaves out by default.
        byte_ids: id of each byte-fallback piece (``<0x0A>``) to its byte; empty where the tokenizer has none.
        eos_token_ids: any of them ends the text.
        vocab_size: number of ids, added tokens included.
        chat_templates: Jinja sources for ``apply_chat_template``, by name; often one, called ``default``, or none.

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
        settings = _read_settings(files)
        self._tokenizer, self._limits = _read_tokenizer(files)
        where = f"{files.where / _SETTINGS} does not fit {_TOKENIZER}"
        with user_data(where):
            padding = self._tokenizer.padding
            if padding is not None:
                settings.setdefault("pad_token", padding["pad_token"])
            # Set by training scripts and saved by accident: a prompt would be cut, or grow.
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            self._tokenizer.encode_special_tokens = settings["split_special_tokens"]
            named = _named_special_tokens(settings)
            _add_missing_tokens(self._tokenizer, settings, named)
            added = self._tokenizer.get_added_tokens_decoder()
            self.byte_ids: dict[int, int] = _byte_ids(self._tokenizer)
            self.vocab_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.chat_templates: dict[str, str] = _chat_templates(files, settings)
        self.special_tokens: dict[str, str] = {name: token.content for name, token in named.items()}
        self.special_texts: dict[str, int] = {token.content: index for index, token in added.items() if token.special}
        self.special_ids: frozenset[int] = frozenset(index for index, token in added.items() if token.special)
        self.eos_token_ids: tuple[int, ...] = configured_eos_ids(files) or self._named_ids("eos_token")
        self._compiled = lru_cache(ChatTemplate)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, never cut and never padded.

        Args:
            text: any text.
            add_special_tokens: add what the tokenizer adds to a text (often a beginning-of-text token). False for text
                from ``apply_chat_template``: templates write those tokens themselves.

        Raises:
            MesaError: the text is not valid Unicode (a lone surrogate), or the tokenizer fails at it or takes for ever.
        """
        if not isinstance(text, str):
            raise TypeError(f"a text is expected, got {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError("the text is not valid Unicode (a lone surrogate): is its file UTF-8?") from error
        what = f"the tokenizer of {self._folder}"
        seconds = self._limits.seconds_for(text, what)
        # A batch of one: unlike encode, it leaves other threads running. And it keeps no offsets: half the time.
        batch = lambda: self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)  # noqa: E731
        with user_data(f"{what} cannot read this text"):
            return list(within_seconds(seconds, what, batch)[0].ids)

    @cached_property
    def around(self) -> tuple[list[int], list[int]]:
        """What :meth:`encode` adds before a text, and behind it."""
        found = self._tokenizer.encode_batch_fast(["a"], add_special_tokens=True)[0]
        added = [bool(mask) for mask in found.special_tokens_mask]
        begins = added.index(False) if False in added else 0
        ends = added[::-1].index(False) if False in added else 0
        return found.ids[:begins], found.ids[len(added) - ends :]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; ids that the tokenizer does not know have none.

        Raises:
            MesaError: the tokenizer fails at them.
        """
        known = [int(index) for index in ids]
        with user_data(f"the tokenizer of {self._folder} cannot decode these ids"):
            return self._tokenizer.decode(known, skip_special_tokens=skip_special_tokens)

    def has_text(self, token_id: int) -> bool:
        """Whether ``decode`` reads this id: it is neither special nor unknown (models pad their vocabulary)."""
        return token_id not in self.special_ids and self.token(token_id) is not None

    def token(self, token_id: int) -> str | None:
        """A token as the vocabulary has it; ``None`` for an id that the tokenizer does not know."""
        known: str | None = self._tokenizer.id_to_token(token_id) if 0 <= token_id < 1 << 32 else None
        return known

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        **variables: Any,
    ) -> str:
        """A conversation as the text that the model was trained on. Encode it with ``add_special_tokens=False``.

        Args:
            messages: such as ``{"role": "user", "content": "Hello"}``.
            add_generation_prompt: end with the opening of the assistant's turn.
            tools: JSON schemas of the tools that the model may call.
            template: a name of ``chat_templates``; if left out, ``tool_use`` with tools, where there is one, else
                ``default``, as transformers chooses.
            variables: what else this template reads, e.g. ``enable_thinking=False``.

        Raises:
            MesaError: no template, no messages, messages that are no plain JSON, or the template refuses them, takes
                too long or makes too much of them.
        """
        if isinstance(messages, str | Mapping) or not isinstance(messages, Iterable):
            raise InputError('a chat is a list of messages such as {"role": "user", "content": "Hello"}')
        values = {**self.special_tokens, "documents": None, **variables, "tools": tools}
        given: list[Any] = list(messages)
        values["messages"] = [dict(message) if isinstance(message, Mapping) else message for message in given]
        values, size = _plain(values)
        if not values["messages"] or not all(isinstance(message, dict) for message in values["messages"]):
            raise InputError('a chat needs at least one message such as {"role": "user", "content": "Hello"}')
        values["messages"] = [_normalised(message) for message in values["messages"]]
        source = self._choose_template(template, has_tools=tools is not None)
        compiled = self._compiled(source, str(self._folder))
        return compiled.render({**values, "add_generation_prompt": add_generation_prompt}, size)

    @property
    def has_chat_template(self) -> bool:
        """Whether ``apply_chat_template`` can work."""
        return bool(self.chat_templates)

    @property
    def chat_template(self) -> str | None:
        """Jinja source of the template for a chat without tools; ``None`` without one."""
        return self.chat_templates.get("default")

    def _choose_template(self, name: str | None, *, has_tools: bool) -> str:
        there = self.chat_templates
        if not there:
            raise InputError(
                f"{self._folder} has no chat template: put the model's chat_template.jinja there, or give plain text"
            )
        name = name or ("tool_use" if has_tools and "tool_use" in there else "default")
        if name not in there:
            raise InputError(f"{self._folder} has no chat template {name!r}; there are {', '.join(sorted(there))}")
        return there[name]

    def _named_ids(self, name: str) -> tuple[int, ...]:
        token = self.special_tokens.get(name)
        index = None if token is None else self._tokenizer.token_to_id(token)
        return () if index is None else (index,)


def configured_eos_ids(files: TextFiles) -> tuple[int, ...]:
    """End-of-text ids of ``generation_config.json``, else of ``config.json``; empty where neither has any.

    Raises:
        MesaError: a file is damaged, or the ids are no token ids.
    """
    where, config = str(files.where / _CONFIG), files.json(_CONFIG)
    text = config.get("text_config") or {}
    if not isinstance(text, dict):
        raise BundleError(f"{where}: text_config is {type_name(text)}; an object is expected")
    return (
        eos_ids(files.json(GENERATION_FILE), str(files.where / GENERATION_FILE))
        or eos_ids(config, where)
        or eos_ids(text, where)
    )


def default_sampling(files: TextFiles) -> SamplingConfig:
    """What ``generation_config.json`` asks for; greedy if there is none.

    Raises:
        MesaError: the file is damaged, or a setting out of its range.
    """
    values = files.json(GENERATION_FILE)
    try:
        return SamplingConfig.from_generation_config(values)
    except MesaError as error:
        raise BundleError(f"{files.where / GENERATION_FILE}: {error}") from error


def _read_tokenizer(files: TextFiles) -> tuple[tokenizers.Tokenizer, Limits]:
    path = files.where / _TOKENIZER
    if _TOKENIZER not in files:
        raise BundleError(
            f"{path} is missing: save the model's tokenizer there (transformers' AutoTokenizer, save_pretrained), "
            "or give token ids instead of text"
        )
    limits = Limits.of(files.json(_TOKENIZER), str(path))
    with user_data(f"{path} is damaged"):
        return tokenizers.Tokenizer.from_buffer(files.contents[_TOKENIZER]), limits


def _read_settings(files: TextFiles) -> dict[str, Any]:
    settings = files.json(_SETTINGS)
    if "added_tokens_decoder" not in settings:  # written before 2023: the special tokens have a file of their own
        older = files.json(_OLDER_SETTINGS)
        _check_tokens(older, str(files.where / _OLDER_SETTINGS), named={})
        settings.update(older)
    if not settings.get("extra_special_tokens"):
        settings["extra_special_tokens"] = settings.pop("additional_special_tokens", None) or []
    extra = settings["extra_special_tokens"]
    if isinstance(extra, dict):  # named ones, of a model that also hears or sees
        settings.update(settings.pop("extra_special_tokens"))
    where = files.where / _SETTINGS
    if not isinstance(extra, dict | list):
        raise BundleError(f"{where}: extra_special_tokens is {type_name(extra)}; a list or an object is expected")
    split = settings["split_special_tokens"] = settings.get("split_special_tokens") or False
    if not isinstance(split, bool):
        raise BundleError(f"{where}: split_special_tokens is {type_name(split)}; true or false is expected")
    _check_tokens(settings, str(where), named=extra if isinstance(extra, dict) else {})
    return settings


def _check_tokens(settings: Mapping[str, Any], where: str, named: Mapping[str, Any]) -> None:
    """Every token of the settings is a string, or an object with its content."""
    tokens = {name: settings[name] for name in _NAMED if settings.get(name) is not None} | dict(named)
    tokens |= {f"extra_special_tokens[{i}]": it for i, it in enumerate(settings.get("extra_special_tokens", []))}
    added = settings.get("added_tokens_decoder") or {}
    if not isinstance(added, dict):
        raise BundleError(f"{where}: added_tokens_decoder is {type_name(added)}; an object is expected")
    for index, token in added.items():
        if not (index.isdecimal() and len(index) < 11):
            raise BundleError(f"{where}: added_tokens_decoder has the key {index[:40]!r}; a token id is expected")
        if not isinstance(token, dict):
            raise BundleError(f"{where}: added_tokens_decoder[{index}] is {type_name(token)}; an object is expected")
    tokens |= {f"added_tokens_decoder[{index}]": token for index, token in added.items()}
    tokens |= {name: it for name, it in settings.items() if name.endswith("_token") and isinstance(it, dict)}
    for name, token in tokens.items():
        content = token.get("content") if isinstance(token, dict) else token
        if not isinstance(content, str):
            found = (
                type_name(token) if not isinstance(token, dict) else f"an object whose content is {type_name(content)}"
            )
            raise BundleError(f"{where}: {name} is {found}; a string, or an object with its content, is expected")


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
    decoder = settings.get("added_tokens_decoder") or {}
    for _, fields in sorted(((int(index), fields) for index, fields in decoder.items()), key=lambda item: item[0]):
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


def _chat_templates(files: TextFiles, settings: Mapping[str, Any]) -> dict[str, str]:
    """Sources by name. Files come before settings, as for transformers."""
    where = files.where / _SETTINGS
    found = settings.get("chat_template")
    if isinstance(found, list):
        if not all(isinstance(entry, dict) and {"name", "template"} <= {*entry} for entry in found):
            raise BundleError(f"{where}: chat_template is a list; objects with name and template are expected in it")
        found = {entry["name"] if isinstance(entry["name"], str) else "": entry["template"] for entry in found}
    elif isinstance(found, str):
        found = {"default": found}
    elif found is None:
        found = {}
    if not isinstance(found, dict) or not all(isinstance(source, str) for source in found.values()):
        what = "has a template that is no string" if isinstance(found, dict | list) else f"is {type_name(found)}"
        raise BundleError(f"{where}: chat_template {what}; a string, or strings by name, is expected")
    more = {name: name.removeprefix(f"{MORE_TEMPLATES}/").removesuffix(".jinja") for name in files.contents}
    of_files = {short: files.text(name) for name, short in more.items() if name.startswith(f"{MORE_TEMPLATES}/")}
    of_files["default"] = files.text("chat_template.jinja")
    written = {name: source for name, source in of_files.items() if source is not None}
    return written or found


def _plain(values: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """A copy of JSON types only, and its length as JSON: a template comes with a checkpoint, and must see no object
    that it could call."""
    what = "messages, tools and variables of a chat template must be plain JSON"
    try:
        text = json.dumps(values)
        copy: dict[str, Any] = json.loads(text)
    except RecursionError as error:
        raise InputError(f"{what}, and these are nested too deeply") from error
    except (TypeError, ValueError) as error:
        raise InputError(f"{what}: {error}") from error
    return copy, len(text)


def _normalised(message: dict[str, Any]) -> dict[str, Any]:
    """Without empty fields, which templates print as "None", and with the reasoning under the names that they read."""
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[name] for name in _REASONING if name in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}
