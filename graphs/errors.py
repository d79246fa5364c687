"""What goes wrong, in kinds that whoever calls may tell apart; each is one line for people."""

from __future__ import annotations

import re

# OpenVINO says of every error where in its own source it was noticed, layer by layer, and the reason last.
_SOURCE_POSITION = re.compile(r"(Exception from|Check '.*' failed at) \S*src/\S+:\d+:?$")


class MesaError(Exception):
    """The base of all errors that are raised on purpose, each of one of the kinds below; the command line exits with 2.

    A message says what came, what was expected, and what helps.
    """

    def __init__(self, message: str) -> None:
        line = " ".join(message.split())
        # Other libraries quote what is in a file, whatever it does to a terminal.
        super().__init__(line if line.isprintable() else "".join(map(_printable, line)))


class InputError(MesaError):
    """What was given cannot be used: an argument, a prompt, a checkpoint, a package or a device that is not there."""


class BundleError(MesaError):
    """A bundle is incomplete, damaged, altered, or of another version."""


class EngineError(MesaError):
    """What executes graphs failed, or gave no numbers."""


class CapacityError(MesaError):
    """There is not enough memory or disk for what was asked."""


def _printable(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode("ascii")


def first_line(error: BaseException) -> str:
    """The first line that says something, of another library's error that may go on for pages."""
    lines = _lines(error)
    return lines[0] if lines else type(error).__name__


def telling_line(error: BaseException) -> str:
    """The line of an OpenVINO error that gives its reason: the last one that is no position in OpenVINO's source."""
    lines = [line for line in _lines(error) if not _SOURCE_POSITION.search(line)]
    return lines[-1].removeprefix("-- ") if lines else first_line(error)


def _lines(error: BaseException) -> list[str]:
    return [line.strip() for line in str(error).splitlines() if line.strip()]
