"""Files of results: found out before the work whether they can be written, and written all or nothing after it."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from pathlib import Path

from mesart.graphs.errors import MesaError

PathLike = str | os.PathLike[str]


class WriteError(MesaError, OSError):
    """Results that cannot be written (also an ``OSError``)."""


def write_error(path: PathLike, error: OSError, hint: str = "", kind: str = "") -> WriteError:
    """What an ``OSError`` says of a path, in one line; ``kind``: of what lies there."""
    return WriteError(f"cannot write {kind and f'the {kind} '}{os.fspath(path)}: {error.strerror or error}{hint}")


def require_file(path: PathLike) -> None:
    """Finds out whether :func:`write_file` can write there, by making a file beside it for a moment.

    Raises:
        WriteError: it is a folder, its folder is missing, or may not be written to.
    """
    try:
        if _in_place(path):
            if not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return
        descriptor, partial = _open_beside(os.path.realpath(path))
        os.close(descriptor)
        os.unlink(partial)
    except OSError as error:
        missing = "; make its folder first" if error.errno == errno.ENOENT else ""
        raise write_error(path, error, missing) from error


def write_file(path: PathLike, content: str | bytes, kind: str = "") -> None:
    """Writes a file anew: by another name and renamed, so that a full disk or an interrupt leaves what was there.

    What is no plain file (a pipe, a device), or lies in a folder that may not be written to, is written as it is.

    Raises:
        WriteError: it, a file of this ``kind``, cannot be written, or the disk is full.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    try:
        if _in_place(path):
            with open(path, "wb") as file:
                file.write(data)
        else:
            _replace(os.path.realpath(path), data)
    except OSError as error:
        raise write_error(path, error, kind=kind) from error


def require_folder(path: PathLike) -> None:
    """Finds out whether files can be made in a folder, which need not be there yet, and makes nothing.

    Raises:
        WriteError: it or a folder above it is a file, or may not be written to.
    """
    try:
        for folder in (Path(path), *Path(os.path.abspath(path)).parents):
            try:
                mode = os.stat(folder).st_mode
            except FileNotFoundError:
                continue
            if not stat.S_ISDIR(mode):
                raise NotADirectoryError(errno.ENOTDIR, f"{folder} is no folder")
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, f"no files can be made in {folder}")
            return
    except OSError as error:
        raise write_error(path, error) from error


def _in_place(path: PathLike) -> bool:
    """Whether a file is written as it is, not replaced by another.

    Raises:
        OSError: it is a folder, or cannot be looked at.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return False
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    return not stat.S_ISREG(mode) or not os.access(os.path.dirname(os.path.realpath(path)), os.W_OK | os.X_OK)


def _open_beside(path: str) -> tuple[int, str]:
    """A new file in the same folder, opened for writing, and its name."""
    partial = os.path.join(os.path.dirname(path), f".mesart-{secrets.token_hex(8)}.partial")
    return os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), partial


def _replace(path: str, data: bytes) -> None:
    descriptor, partial = _open_beside(path)
    try:
        with open(descriptor, "wb") as file:
            with contextlib.suppress(FileNotFoundError):
                os.fchmod(descriptor, stat.S_IMODE(os.stat(path).st_mode))
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise


__all__ = ["WriteError", "require_file", "require_folder", "write_error", "write_file"]
