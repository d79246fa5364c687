"""Texts that users give, byte for byte: no newline is translated, and no file is read without end."""

from __future__ import annotations

import codecs
import errno
import os
from typing import Final

from mesart.graphs.errors import InputError

LIMIT: Final = 256 << 20
"""Bytes of a text at most; a device such as /dev/zero has no end."""


def read_text(path: str | os.PathLike[str]) -> str:
    """The text in a UTF-8 file, a pipe or a device, without a byte order mark.

    Raises:
        OSError: it cannot be opened or read.
        MesaError: it has more than :data:`LIMIT` bytes, or is no UTF-8; names the file.
    """
    if "\0" in os.fspath(path):  # open() has a ValueError for it
        raise OSError(errno.EINVAL, "there is a NUL character in its name")
    with open(path, "rb") as file:
        return decode_text(file.read(LIMIT + 1), os.fspath(path))


def decode_text(data: bytes, name: str) -> str:
    """The same of bytes that were read already; ``name`` is what the message calls them."""
    if len(data) > LIMIT:
        raise InputError(f"{name} holds more than {LIMIT >> 20} MiB; give a shorter text")
    mark = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
    try:
        return data[mark:].decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name} is no UTF-8 text ({error.reason} at byte {mark + error.start}); convert it first, with iconv say"
        ) from error


__all__ = ["LIMIT", "decode_text", "read_text"]
