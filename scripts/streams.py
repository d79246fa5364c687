"""Standard streams that may be closed, full, hung up on, or unable to show a text."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any

_NAMES = ("stdin", "stdout", "stderr")


class StdoutError(OSError):
    """Standard output is closed, or on a full disk; a reader that went away is a ``BrokenPipeError``."""


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """Opens the streams that are closed, and lets the others show characters that they have none for, as escapes."""
    _open_missing()
    strict: list[tuple[io.TextIOWrapper, str | None]] = []
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            strict.append((stream, stream.errors))
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream, errors in strict:
            try:
                stream.reconfigure(errors=errors)  # flushes, too
            except (OSError, ValueError):
                _silence(stream)


def _open_missing() -> None:
    """Takes the numbers of closed streams: else the next file gets them, and what engines print would go into it."""
    for name in _NAMES:
        if getattr(sys, name) is None:
            number = os.open(os.devnull, os.O_WRONLY if name == "stderr" else os.O_RDONLY)
            if name != "stdin":  # whoever reads it is told; what is written to stdout is an error as it comes
                setattr(sys, name, os.fdopen(number, "w", encoding="utf-8", closefd=False))


def write(text: str, *, flush: bool = False) -> None:
    """Writes results to standard output.

    Raises:
        StdoutError: it cannot be written to.
        BrokenPipeError: its reader went away.
    """
    with _stdout():
        sys.stdout.write(text)
        if flush:
            sys.stdout.flush()


def flush() -> None:
    """Sees to it that all results are out; raises as :func:`write` does."""
    with _stdout():
        sys.stdout.flush()


def say(text: str, end: str = "\n") -> None:
    """Writes a line for people to standard error; a message that nobody can get is no reason to stop."""
    try:
        print(text, end=end, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        _silence(sys.stderr)


def read() -> bytes:
    """All of standard input.

    Raises:
        OSError: it is closed, or cannot be read.
    """
    from mesart.graphs.text_file import LIMIT  # noqa: PLC0415  (numpy comes with it, in reach of the handlers)

    if sys.stdin is None:
        raise OSError("it is closed")
    source: Any = getattr(sys.stdin, "buffer", None)
    data: bytes = source.read(LIMIT + 1) if source is not None else sys.stdin.read(LIMIT + 1).encode()
    return data


@contextlib.contextmanager
def _stdout() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        _silence(sys.stdout)
        if isinstance(error, BrokenPipeError):
            raise
        raise StdoutError(error.errno, error.strerror) from error


def _silence(stream: Any) -> None:
    """Sends what is still buffered nowhere: Python flushes once more as it ends, and would fail again."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


__all__ = ["StdoutError", "flush", "read", "say", "standard_streams", "write"]
