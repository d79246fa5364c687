"""JSON files of the user: read with limits, and refused in one line that names the file and what is wrong in it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Final, NoReturn

from mesart.graphs.errors import InputError

_DEEPEST: Final = 64
"""Levels of nesting; configs have about five, and libraries copy them by recursion."""


def read_object(path: Path, most_bytes: int, *, finite: bool = False) -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
        path: the file.
        most_bytes: it is refused beyond that.
        finite: refuse numbers that are infinite or none, wherever they are.

    Raises:
        MesaError: it cannot be read, is too large, no UTF-8, no JSON, no object or nested too deep.
    """
    try:
        with path.open("rb") as stream:
            content = stream.read(most_bytes + 1)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > most_bytes:
        raise InputError(f"{path} has more than {most_bytes >> 20} MiB; is it what its name says?")
    try:
        value = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no UTF-8 text ({error.reason} at byte {error.start}); is it damaged?") from error
    except RecursionError as error:
        raise InputError(f"{path} is nested too deep") from error
    except ValueError as error:  # also a whole number of thousands of digits
        raise InputError(f"{path} is not valid JSON ({error}); is the checkpoint complete?") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds {described(value)} where a JSON object is expected")
    _check(path, value, finite=finite)
    return value


def _check(path: Path, value: Any, *, finite: bool, place: str = "", depth: int = 0) -> None:
    def refuse(what: str) -> NoReturn:
        raise InputError(f"{path}: {ascii(place)[1:-1].lstrip('.')[:100] or 'the object'} is {what}")

    if depth > _DEEPEST:
        refuse("nested too deep")
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            inner = f"{place}[{key}]" if isinstance(value, list) else f"{place}.{key}"
            _check(path, item, finite=finite, place=inner, depth=depth + 1)
        if finite and isinstance(value, dict) and "__float__" in value:  # as transformers 5 writes them
            refuse(f"{str(value['__float__'])[:20]}, and must be a finite number")
    elif finite and isinstance(value, float) and not math.isfinite(value):
        refuse(f"{value}, and must be a finite number")


def described(value: Any) -> str:
    """A value of a JSON file, for messages: short ones as they are."""
    kinds = {dict: "an object", list: "a list", type(None): "null"}
    if type(value) in kinds:
        return kinds[type(value)]
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def type_name(value: object) -> str:
    """What JSON calls a value's type, with its article."""
    if isinstance(value, bool):
        return "a truth value"
    names = {dict: "an object", list: "a list", str: "a string", int: "a whole number", float: "a number"}
    return next((name for kind, name in names.items() if isinstance(value, kind)), "null")


__all__ = ["described", "read_object", "type_name"]
