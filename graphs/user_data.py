"""The seam to other libraries where they read what the user gave: whatever they raise there becomes one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from mesart.graphs.errors import InputError, MesaError, first_line

_LONGEST: Final = 300
"""Characters of a reason; libraries quote whole configs."""

_SAY_ENOUGH: Final = ("ValueError", "RuntimeError", "OSError", "SafetensorError", "Exception")
"""Kinds of errors whose text needs no name in front."""


@contextmanager
def user_data(what: str, way_out: str = "") -> Iterator[None]:
    """Lets a library read the user's data: an error becomes ``what: reason; way_out``.

    Every error, because transformers, tokenizers, safetensors and torch check little of what they read and fail where
    the damage happens to hurt: transformers 5 alone raises fourteen kinds on damaged configs, tokenizers panics, which
    is not even an ``Exception``. So keep the block small, and none of our own work in it; the error that was raised is
    the ``__cause__``.

    Args:
        what: what cannot be done, with the file's name.
        way_out: what the user may do about it.

    Raises:
        MesaError: for whatever is raised inside, a ``MesaError`` as it is.
    """
    try:
        yield
    except MesaError:
        raise
    except BaseException as error:  # (see above; what ends the process is passed on)
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        end = f"; {way_out}" if way_out else ""
        raise InputError(f"{what}: {reason(error)}{end}") from error


def reason(error: BaseException) -> str:
    """What an error says in one line: the field and what it wants, or the kind of error where its text is too short."""
    name, text = type(error).__name__, first_line(error)
    cause = error.__cause__
    if name.startswith("StrictDataclass") and cause is not None:  # "Validation error for field 'x':", and the cause
        text, name = first_line(cause), "ValueError"
        field = first_line(error).rpartition("'")[0].rpartition("'")[2]
        if "validate_" not in field and field not in text:
            text = f"{field}: {text}"
    elif isinstance(error, MemoryError):
        text, name = "it needs more memory than there is", "ValueError"
    elif isinstance(error, RecursionError):
        text, name = "it is nested too deep", "ValueError"
    elif isinstance(error, KeyError):
        text, name = f"{text} is missing or unknown", "ValueError"
    if len(text) > _LONGEST:
        text = text[: _LONGEST - 3] + "..."
    return text if name in _SAY_ENOUGH or text == name else f"{name}: {text}"


__all__ = ["reason", "user_data"]
