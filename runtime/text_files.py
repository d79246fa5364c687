"""The small files of a bundle that say how text becomes token ids and how ids are chosen: read once, never trusted.

They come from strangers, and from disks that fail. Whatever is wrong with one of them is a single line that names it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from mesart.graphs.errors import BundleError
from mesart.graphs.json_file import type_name

TEXT_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
)
"""Whatever the runtime reads of a bundle beside graphs and weights; a bundle may lack any of them."""

MORE_TEMPLATES: Final = "additional_chat_templates"
"""The folder in which transformers keeps the chat templates that have a name, ``NAME.jinja``; checkpoints have it,
bundles have those templates in ``tokenizer_config.json``."""

_MOST_BYTES: Final = 1 << 28  # the largest tokenizers that are known have 35 MB


class TextFiles:
    """The content of those files, in memory: what is used is what was verified, whatever happens to the folder.

    Attributes:
        where: the folder, for messages.
        contents: file name to bytes.
    """

    def __init__(self, where: str | os.PathLike[str], contents: Mapping[str, bytes]) -> None:
        self.where, self.contents = Path(where), contents

    @classmethod
    def of_folder(cls, folder: str | os.PathLike[str]) -> TextFiles:
        """Reads those files of a bundle or checkpoint that are there.

        Raises:
            MesaError: a file cannot be read, or is far too large.
        """
        where = Path(folder)
        names = [
            *TEXT_FILES,
            *(f"{MORE_TEMPLATES}/{path.name}" for path in sorted((where / MORE_TEMPLATES).glob("*.jinja"))),
        ]
        return cls(where, {name: _read(where / name) for name in names if (where / name).is_file()})

    def __contains__(self, name: str) -> bool:
        return name in self.contents

    def json(self, name: str) -> dict[str, Any]:
        """The JSON object that a file holds; empty without the file.

        Raises:
            MesaError: it is not UTF-8, no JSON, nested too deeply, or no object.
        """
        if name not in self.contents:
            return {}
        try:
            values = json.loads(self.contents[name].decode("utf-8"))
        except RecursionError as error:
            raise BundleError(f"{self.where / name} is damaged: its JSON is nested too deeply") from error
        except ValueError as error:
            raise BundleError(f"{self.where / name} is damaged: {error}") from error
        if not isinstance(values, dict):
            raise BundleError(
                f"{self.where / name} is damaged: a JSON object is expected, it holds {type_name(values)}"
            )
        return values

    def text(self, name: str) -> str | None:
        """A file as text; ``None`` without the file.

        Raises:
            MesaError: it is not UTF-8.
        """
        if name not in self.contents:
            return None
        try:
            return self.contents[name].decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError as error:
            raise BundleError(f"{self.where / name} is damaged: it is not UTF-8 ({error})") from error


def _read(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > _MOST_BYTES:
            raise BundleError(
                f"{path} has {size >> 20} MiB, more than the {_MOST_BYTES >> 20} that such a file may have"
            )
        return path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from error


__all__ = ["MORE_TEMPLATES", "TEXT_FILES", "TextFiles"]
