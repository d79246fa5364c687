"""Texts that are given on a command line: prompts, conversations, documents."""

from __future__ import annotations

import json
import os
from typing import Any

from mesart.graphs.errors import InputError
from mesart.graphs.text_file import read_text


def document(path: str | os.PathLike[str]) -> str:
    """The text of a document, byte for byte as it is in its file.

    Raises:
        InputError: it cannot be read, is no UTF-8 text, or is empty; names the file.
    """
    try:
        text = read_text(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    if not text:
        raise InputError(f"{path} is empty; leave it out")
    return text


def messages(text: str) -> list[dict[str, Any]]:
    """A conversation given as JSON.

    Raises:
        InputError: it is none.
    """
    try:
        found = json.loads(unicode_text("--chat", text))
    except json.JSONDecodeError as error:
        raise InputError(f"--chat is not valid JSON: {error}") from error
    except RecursionError as error:
        raise InputError("--chat is not a chat: its JSON is nested too deeply") from error
    except ValueError as error:  # a number of thousands of digits
        raise InputError(f"--chat cannot be read: {error}") from error
    if not isinstance(found, list) or not all(isinstance(message, dict) for message in found):
        raise InputError('--chat must be a list of messages, such as [{"role": "user", "content": "Hi"}]')
    for message in found:
        if not isinstance(message.get("role"), str):
            raise InputError('each message of --chat needs a "role" that is a text, such as {"role": "user", ...}')
    return found


def unicode_text(name: str, text: str) -> str:
    """An argument, in which Python keeps bytes that the locale has no characters for as lone surrogates."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise InputError(f"{name} is no UTF-8 text: {error.reason}") from error


__all__ = ["document", "messages", "unicode_text"]
