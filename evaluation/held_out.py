"""The text that evaluations are made from: the library's held-out text, or a file of the user's."""

from __future__ import annotations

import hashlib
import os
import platform
from dataclasses import dataclass

from mesart.evaluation.corpus import library_text
from mesart.graphs.errors import InputError
from mesart.graphs.text_file import read_text

_FEWEST_WORDS = 200
"""Below it, excerpts from random places are all the same."""


@dataclass(frozen=True)
class Text:
    """A text, and what a report says of it."""

    name: str
    content: str

    def record(self) -> dict[str, str | int]:
        """Enough to tell whether two reports used the same text."""
        digest = hashlib.sha256(self.content.encode("utf-8", "replace")).hexdigest()
        return {"name": self.name, "characters": len(self.content), "sha256": digest}


def held_out_text(path: str | os.PathLike[str] | None = None) -> Text:
    """The text in a UTF-8 file; without one, library text that the demo model never saw.

    Raises:
        MesaError: the file is missing, no text or too short, or this Python comes without its library's source.
    """
    if path is None:
        try:
            content = library_text("held_out")
        except FileNotFoundError as error:
            raise InputError(f"{error}; give a text file instead (--text)") from error
        return Text(f"held-out source of the standard library of Python {platform.python_version()}", content)
    try:
        content = read_text(path)
    except OSError as error:
        raise InputError(f"cannot read the text {path}: {error.strerror or error}") from error
    words = len(content.split())
    if words < _FEWEST_WORDS:
        raise InputError(f"{path} holds {words} words between spaces; at least {_FEWEST_WORDS} are needed")
    return Text(os.fspath(path), content)
