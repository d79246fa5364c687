"""The error of the user's input."""

from __future__ import annotations


class MesaError(Exception):
    """An error of the user's input, shown as one line; the command line exits with status 2."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def first_line(error: BaseException) -> str:
    """The first line that says something, of another library's error that may go on for pages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
