"""The line that says how much of a prompt has been read, where somebody watches."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType

from mesart.scripts import streams

_PATIENCE = 1.0
"""Seconds in which nobody asks what is happening."""

_BETWEEN = 0.1
"""Seconds between two changes of the line."""


class ReadingLine:
    """One line on standard error, if that is a terminal: rewritten in place, gone once the prompt is read.

    Is called with tokens that are there, and those that there are to be. Used in a ``with`` statement, it is gone at
    the end of that too.

    Args:
        name: of what is read, to begin the line with.
    """

    def __init__(self, name: str = "") -> None:
        self._prefix = f"{name}: " if name else ""
        self._next = time.monotonic() + _PATIENCE
        self._shown = 0

    def __enter__(self) -> ReadingLine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.clear()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now < self._next or not sys.stderr.isatty():
            return
        self._next = now + _BETWEEN
        text = f"{self._prefix}reading {done:,} of {total:,} tokens"[-(_columns() - 1) :]
        streams.say("\r" + text.ljust(self._shown), end="")
        self._shown = len(text)

    def clear(self) -> None:
        """Takes the line away."""
        if self._shown:
            streams.say("\r" + " " * self._shown + "\r", end="")
        self._shown = 0


def _columns() -> int:
    """Of the terminal: a line that is longer would not be rewritten in place."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


__all__ = ["ReadingLine"]
