"""SIGTERM (`docker stop`, batch systems) and SIGHUP (a terminal that is closed) end a command as Ctrl-C does."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_ENDING = (signal.SIGTERM, signal.SIGHUP)


class Terminated(KeyboardInterrupt):
    """The process was told to end: what Ctrl-C undoes and what it keeps is undone and kept here too."""


class Ending:
    """What a command was ended by."""

    number: int | None = None
    """Of the signal; ``None`` while there was none."""


@contextlib.contextmanager
def ending_signals() -> Iterator[Ending]:
    """Raises :class:`Terminated` where the first signal finds the program; a second one ends it at once.

    Handlers of the program around, and signals that it ignores (``nohup``), stay as they are.
    """
    ending = Ending()
    if threading.current_thread() is not threading.main_thread():  # Python lets no other set handlers
        yield ending
        return
    ours = [number for number in _ENDING if signal.getsignal(number) == signal.SIG_DFL]

    def restore() -> None:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)

    def end(number: int, frame: FrameType | None) -> None:
        del frame
        ending.number = number
        restore()
        raise Terminated

    for number in ours:
        signal.signal(number, end)
    try:
        yield ending
    finally:
        restore()


__all__ = ["Ending", "Terminated", "ending_signals"]
