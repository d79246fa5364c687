"""Writing to disks: every file under a new name, every failure one line."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mesart.graphs.errors import CapacityError, MesaError, first_line

_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk is full: your quota is used up"}
_LIBRARY_ERROR = re.compile(r"\(os error (\d+)\)")
"""Libraries in Rust (safetensors, tokenizers) give the number in the text of an error of their own."""

_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
"""Of file systems that cannot be told to write at once."""


@contextmanager
def explained(place: Path, needed: int = 0, also: str = "") -> Iterator[None]:
    """Turns the failures of writing below ``place`` into one line.

    Args:
        place: what the user knows it by.
        needed: about how many bytes are written there, if that is known.
        also: what the user should know on top of it.

    Raises:
        MesaError: the disk is full, the file system read-only, the name too long, ...
    """
    try:
        yield
    except (MesaError, BrokenPipeError):  # a line already; whoever read our report has left, which main() knows
        raise
    except Exception as error:
        line = _explain(error, place, needed)
        if line is None:
            raise
        raise CapacityError(f"{line}; {also}" if also else line) from error


def _explain(error: Exception, place: Path, needed: int) -> str | None:
    """In one line, if it is an error of the operating system."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := _LIBRARY_ERROR.search(str(error))):
        number = int(found[1])
    if number in _FULL:
        return (
            f"{_FULL[number]}: {place} needs about {max(needed >> 20, 1)} MiB"
            if needed
            else f"{_FULL[number]}: {place}"
        )
    if number == errno.EFBIG:
        return f"cannot write {place}: a file is larger than its file system, or a limit of this process, allows"
    if not isinstance(error, OSError):
        return None
    if number == errno.ENAMETOOLONG:
        return f"cannot write {_shortened(place)}: the name is too long"
    where = f" ({error.filename})" if error.filename not in (None, "", os.fspath(place)) else ""
    return f"cannot write {place}: {error.strerror or first_line(error)}{where}"


def _shortened(place: Path) -> str:
    text = os.fspath(place)
    return text if len(text) <= 80 else f"{text[:40]}...{text[-20:]}"


def require_space(folder: Path, target: Path, kind: str, needed: int) -> None:
    """Refuses to begin what the disk cannot hold.

    Args:
        folder: where it is written.
        target: what the user knows it by.
        kind: what it is called.
        needed: about how many bytes it will take.

    Raises:
        MesaError: says what is free and what is needed.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CapacityError(
            f"the disk of {target} has {free >> 20} MiB free, the {kind} needs about {needed >> 20} MiB"
        )


def write_new(path: Path, data: bytes | str) -> None:
    """Writes a file that is not there yet; text in UTF-8.

    Raises:
        FileExistsError: it is there, as a file, a folder or a link to anywhere.
    """
    with path.open("xb") as file:
        file.write(data.encode() if isinstance(data, str) else data)


def replace_file(path: Path, data: bytes) -> None:
    """Writes a file all or nothing, in place of one that is there.

    A link in its place is replaced, never followed: what is written is a new file under a name that nobody can guess.
    """
    prefix, suffix = f".{path.name}.", ".partial"
    for entry in path.parent.iterdir():
        if entry.name.startswith(prefix) and entry.name.endswith(suffix):
            _remove_if_dead(entry)
    number, name = tempfile.mkstemp(prefix=prefix, suffix=suffix, dir=path.parent)
    partial = Path(name)
    try:
        with os.fdopen(number, "wb") as file:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(number, fcntl.LOCK_EX)
            file.write(data)
            os.fchmod(number, 0o666 & ~current_umask())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _remove_if_dead(partial: Path) -> None:
    """Removes what a killed process has left over: one that lives holds a lock on what it writes."""
    with suppress(OSError), open(os.open(partial, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        partial.unlink()


def current_umask() -> int:
    """The permissions that new files of this process lack."""
    with (
        suppress(OSError, StopIteration, IndexError, ValueError),
        open("/proc/self/status", encoding="ascii") as status,
    ):
        return int(next(line for line in status if line.startswith("Umask:")).split()[1], 8)
    mask = os.umask(0o077)  # which can only be asked for by setting it
    os.umask(mask)
    return mask


def require_no_link(root: Path, inside: str) -> None:
    """Refuses links between ``root`` and ``root/inside``: a folder from elsewhere may bring them, to anywhere.

    Raises:
        MesaError: names the link.
    """
    path = root
    for part in Path(inside).parts:
        path = path / part
        if path.is_symlink():
            raise CapacityError(
                f"{path} is a link, and writing would follow it; make a copy of the folder without links (cp -rL)"
            )


def sync_folder(folder: Path) -> None:
    """Has all of a folder written to the disk, but for files that have other names too: their owner has done that."""
    for root, _, files in os.walk(folder):
        for name in files:
            path = os.path.join(root, name)
            info = os.lstat(path)
            if stat.S_ISREG(info.st_mode) and info.st_nlink == 1:
                sync(path)
        sync(root)


def sync(path: str | Path) -> None:
    """Has a file, or the names in a folder, written to the disk, where its file system can."""
    number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(number)


__all__ = [
    "current_umask",
    "explained",
    "replace_file",
    "require_no_link",
    "require_space",
    "sync",
    "sync_folder",
    "write_new",
]
