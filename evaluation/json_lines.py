"""Files of JSON, a line each, that grow line by line and survive interrupts and full disks."""

from __future__ import annotations

import contextlib
import json
import os
import stat
from pathlib import Path
from typing import Any

from mesart.evaluation.output import require_folder, write_error
from mesart.graphs.errors import InputError, MesaError

_BLOCK = 1 << 16


class JsonLines:
    """The lines of one file, which is made with its first line.

    Args:
        path: of the file.
        beginning: with which each line begins. A last line that was cut short is dropped if it begins so, and is
            somebody else's text, to be left alone, if it does not.

    Raises:
        MesaError: the file is none, or cannot be read or written.
    """

    def __init__(self, path: str | os.PathLike[str], beginning: str) -> None:
        self.path = Path(path)
        self._beginning = beginning.encode()
        try:
            mode = os.stat(self.path).st_mode
        except FileNotFoundError:
            require_folder(self.path.parent)
            return
        except OSError as error:
            raise write_error(self.path, error) from error
        if not stat.S_ISREG(mode):
            what = "a folder" if stat.S_ISDIR(mode) else "no plain file"
            raise InputError(f"{self.path} cannot be read: it is {what}; name another file")
        if not os.access(self.path, os.R_OK | os.W_OK):
            raise InputError(f"{self.path} may not be read and written; name another file")

    def read(self) -> list[str]:
        """The complete lines, without their ends.

        Raises:
            MesaError: the file cannot be read, or ends in a text that is none of ours.
        """
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise InputError(f"{self.path} cannot be read: {error.strerror or error}") from error
        whole, _, torn = data.rpartition(b"\n")
        lines = whole.split(b"\n") if whole or data.startswith(b"\n") else []
        self._require_ours(torn, len(lines) + 1)
        try:
            return [line.decode("utf-8") for line in lines]
        except UnicodeDecodeError as error:
            raise InputError(f"{self.path} cannot be read: it is no UTF-8 text") from error

    def append(self, value: Any) -> None:
        """Writes a line and sees to it that it is on the disk; leaves the file as it was if it cannot.

        Raises:
            WriteError: the disk is full, or the file cannot be written.
        """
        data = json.dumps(value).encode() + b"\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            try:
                end = self._drop_torn_line(descriptor)
                try:
                    while data:
                        data = data[os.write(descriptor, data) :]
                    os.fsync(descriptor)
                except BaseException:
                    with contextlib.suppress(OSError):  # the next line drops what is left
                        os.ftruncate(descriptor, end)
                    raise
            finally:
                os.close(descriptor)
        except OSError as error:
            hint = "; what was found before is kept: the same command goes on from there"
            raise write_error(self.path, error, hint) from error

    def _drop_torn_line(self, descriptor: int) -> int:
        """Cuts the file behind its last complete line; returns its size."""
        size = start = os.fstat(descriptor).st_size
        torn = b""
        while start and b"\n" not in torn:
            step = min(start, _BLOCK)
            start -= step
            torn = os.pread(descriptor, step, start) + torn
        torn = torn.rpartition(b"\n")[2]
        if torn:
            self._require_ours(torn, None)
            os.ftruncate(descriptor, size - len(torn))
        return size - len(torn)

    def _require_ours(self, torn: bytes, number: int | None) -> None:
        if not self._beginning.startswith(torn[: len(self._beginning)]):
            raise self.foreign(number)

    def foreign(self, number: int | None) -> MesaError:
        """The error of a line, counted from 1, that is not ours; None: the last."""
        which = "the last line" if number is None else f"line {number}"
        return InputError(f"{which} of {self.path} is no result of an evaluation; write to another place")


__all__ = ["JsonLines"]
