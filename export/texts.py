"""The small files of a bundle: config, tokenizer, chat templates, generation settings.

They are read before anything is traced, so that a tokenizer that cannot be used is refused before the work, and written
at the end, next to the graphs. transformers saves the tokenizer anew: it repairs old files while it reads them, and the
runtime, which has no transformers, must find them repaired. The generation settings stay as they are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import tokenizers
from transformers import AutoTokenizer, GenerationConfig

from mesart.graphs.errors import InputError, MesaError
from mesart.graphs.generation import GENERATION_FILE, SamplingConfig, eos_ids, unsupported_settings
from mesart.graphs.json_file import described
from mesart.graphs.tokenizer_limits import Limits, check_ids
from mesart.graphs.user_data import user_data

_SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_VOCABULARIES = ("tokenizer.json", *_SENTENCEPIECE, "tekken.json", "tiktoken.model", "vocab.json", "vocab.txt")
_SETTINGS = "tokenizer_config.json"
"""A checkpoint that has one of these files has a tokenizer."""

_MOST_BYTES = 256 << 20
"""The largest files of tokenizers have 35 MB."""

_FILLER = "The documents that follow are given in no special order. "
"""What a head is filled up with, over and over, where less than a head stands before the documents of a prompt."""


@dataclass(frozen=True)
class Texts:
    """What a checkpoint brings beside its weights."""

    files: Mapping[str, bytes] = field(repr=False)
    """The tokenizer's files and the generation settings; by plain names."""

    def filler(self, count: int) -> list[int]:
        """Token ids to fill up a head with; the first of the vocabulary where no tokenizer can read the sentence."""
        return list(islice(cycle(self._sentence() or [0]), count))

    def _sentence(self) -> list[int]:
        if "tokenizer.json" not in self.files:
            return []
        with suppress(MesaError), user_data("the tokenizer cannot read the filler"):
            tokenizer = tokenizers.Tokenizer.from_buffer(self.files["tokenizer.json"])
            tokenizer.no_truncation()
            tokenizer.no_padding()
            return list(tokenizer.encode(_FILLER, add_special_tokens=False).ids)
        return []

    def write(self, folder: Path, network: Any) -> None:
        """Writes them and the network's config; a file that is there already is never written to.

        Raises:
            MesaError: a file of one of those names is there.
        """
        files = {**_saved(network.config), **self.files}
        if GENERATION_FILE not in files and getattr(network, "generation_config", None) is not None:
            files[GENERATION_FILE] = network.generation_config.to_json_string().encode("utf-8")
        for name, content in files.items():
            try:
                with (folder / name).open("xb") as file:
                    file.write(content)
            except FileExistsError as error:
                raise InputError(f"the checkpoint has weights in a file called {name}; rename that file") from error


def read_texts(source: Path, config: Any, say: Callable[[str], None], *, trust_remote_code: bool = False) -> Texts:
    """Reads a checkpoint's tokenizer and generation settings, and says what will not be as they want.

    Args:
        source: the checkpoint's folder.
        config: the model's, of transformers.
        say: called with a line for each thing to know.
        trust_remote_code: run the tokenizer's own Python code, if it brings any.

    Raises:
        MesaError: a file is damaged, a package that reads it is missing, or there is no fast tokenizer.
    """
    files = tokenizer_files(source, config, trust_remote_code=trust_remote_code)
    if not files:
        say(f"{source} has no tokenizer: the bundle is driven by token ids")
    settings = _generation_settings(source)
    if settings:
        files[GENERATION_FILE] = settings
        _report(source, json.loads(settings), config, say)
    return Texts(files)


def tokenizer_files(
    source: str | os.PathLike[str], config: Any = None, *, trust_remote_code: bool = False
) -> dict[str, bytes]:
    """The files of a tokenizer as transformers saves them, ``tokenizer.json`` among them; none for a folder without.

    Args:
        source: a checkpoint's folder, or a hub id.
        config: the model's, checked; if left out, transformers reads it once more.
        trust_remote_code: run the tokenizer's own Python code, if it brings any.

    Raises:
        MesaError: a file is damaged, a package that reads it is missing, or there is no fast tokenizer.
    """
    folder = Path(source)
    if folder.is_dir():
        if not any((folder / name).is_file() for name in (*_VOCABULARIES, _SETTINGS)):
            return {}
        _require_vocabulary(folder, own_code=trust_remote_code)
        _check_limits(folder)
    auto: Any = AutoTokenizer
    with user_data(f"{source} has a tokenizer that cannot be loaded"):
        tokenizer = auto.from_pretrained(os.fspath(source), config=config, trust_remote_code=trust_remote_code)
    # Several templates with names would make a folder, and a bundle is flat: they go into tokenizer_config.json.
    flat = isinstance(getattr(tokenizer, "chat_template", None), dict)
    with user_data(f"{source} has a tokenizer that cannot be saved"):
        files = _saved(tokenizer, save_jinja_files=not flat)
    if "tokenizer.json" not in files:
        raise InputError(f"{source} has no fast tokenizer (tokenizer.json); convert it with transformers first")
    with user_data(f"{source} has a tokenizer that cannot be used"):
        size = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"]).get_vocab_size(with_added_tokens=False)
    if size == 0:
        raise InputError(f"{source} has a tokenizer without a vocabulary; is the download complete?")
    return files


def _require_vocabulary(folder: Path, *, own_code: bool) -> None:
    """Refuses what transformers would read as an empty tokenizer, and names the package that another library's format
    needs: transformers often names the wrong one."""
    present = [name for name in _VOCABULARIES if (folder / name).is_file()]
    if not present and not own_code:  # whose files may have any name
        raise InputError(
            f"{folder} has {_SETTINGS} but no vocabulary ({', '.join(_VOCABULARIES)}); is the download complete?"
        )
    if {"tokenizer.json", "tekken.json"} & {*present}:
        return
    path = next((folder / name for name in _SENTENCEPIECE if (folder / name).is_file()), None)
    if path is None:
        return
    with path.open("rb") as file:
        first = file.read(1)
    package = "sentencepiece" if first == b"\n" else "tiktoken"  # the tag of a message's first field; or lines of text
    if find_spec(package) is None:
        raise InputError(f"{path} is a tokenizer of {package}, which is not installed: pip install {package}")


def _check_limits(folder: Path) -> None:
    """Refuses what would fill the memory, in which the library ends the process."""
    for name in ("tokenizer.json", "vocab.json"):
        path = folder / name
        if not path.is_file():
            continue
        if path.stat().st_size > _MOST_BYTES:
            raise InputError(f"{path} has more than {_MOST_BYTES >> 20} MiB; is it what its name says?")
        with user_data(f"{path} is damaged"):
            values = json.loads(path.read_bytes())
        if not isinstance(values, dict):
            raise InputError(f"{path} is damaged: it holds {described(values)} where a JSON object is expected")
        if name == "tokenizer.json":
            Limits.of(values, str(path))
        else:
            check_ids(values.values(), str(path))


def _saved(what: Any, **options: Any) -> dict[str, bytes]:
    """The files that ``save_pretrained`` makes."""
    with TemporaryDirectory(prefix="mesart-") as folder:
        what.save_pretrained(folder, **options)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}


def _generation_settings(source: Path) -> bytes:
    """``generation_config.json`` of the checkpoint; older ones have such settings in ``config.json``."""
    path = source / GENERATION_FILE
    if path.is_file():
        content = path.read_bytes()
        with user_data(f"{path} is damaged"):
            values = json.loads(content.decode("utf-8"))
        if not isinstance(values, dict):
            raise InputError(f"{path} is damaged: a JSON object is expected")
        return content
    generation: Any = GenerationConfig
    with user_data(f"{source / 'config.json'} has generation settings that cannot be read"):
        made = generation.from_pretrained(source, config_file_name="config.json", _from_model_config=True)
    return made.to_json_string().encode("utf-8")  # type: ignore[no-any-return]


def _report(source: Path, values: Mapping[str, Any], config: Any, say: Callable[[str], None]) -> None:
    where = source / GENERATION_FILE
    for name in ("bos_token_id", "pad_token_id"):  # not followed, but transformers stumbles over others
        if not isinstance(values.get(name), (int, type(None))):
            raise InputError(f"{where}: {name} is {described(values[name])}; it must be a token id")
    try:
        ignored = unsupported_settings(values)
        followed = {**values, **dict.fromkeys(setting.split("=")[0] for setting in ignored)}
        SamplingConfig.from_generation_config(followed)
    except MesaError as error:
        raise InputError(f"{where}: {error}") from error
    if ignored:
        say(f"{where}: mesart does not follow {', '.join(ignored)}")
    size = config.get_text_config().vocab_size
    outside = [index for index in eos_ids(values, str(where)) if index >= size]
    if outside:
        say(f"{where}: no text ends with {', '.join(map(str, outside))}: the vocabulary has {size} tokens")


__all__ = ["Texts", "read_texts", "tokenizer_files"]
