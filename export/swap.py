"""A finished folder takes the place of what is there, so that a crash at any moment loses neither.

It is built in a *stage*, a folder that vanishes in the end, and that holds:

* ``new``: the folder that is written; after an exchange, what was there before.
* ``old``: what was there before, where two names cannot be exchanged at once.
* ``ready``: what was ``new``, while its entries move one by one into a folder that cannot be renamed.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

NEW, OLD, READY = "new", "old", "ready"

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM)
"""An older kernel, a file system that has no such thing, or a container's filter of system calls."""

_OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
_IMMOVABLE = (errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM)
"""A mount point, a layer of a container's image, a parent folder in which we may not rename."""

_TRIES = 100
"""Against others who write to the same place at the same moment."""


def take_place(
    stage: Path,
    target: Path,
    *,
    fill: bool,
    accept: Callable[[Path], None],
    last: str,
    stays: Callable[[str], bool],
) -> None:
    """Puts ``stage/new`` in the place of ``target``.

    Args:
        stage: a stage, in or beside ``target``.
        target: a folder, a file, or nothing.
        fill: the folder itself stays, and what is in it is replaced.
        accept: called with what was taken out before it is given up; if it raises, that goes back.
        last: the entry that makes the folder one of its kind: the first to go and the last to come, where entries
            move one by one.
        stays: whether an entry of this name is a stage, which never moves.

    Raises:
        OSError: it cannot be done; :func:`settle` then brings back what was there.
    """
    try:
        if not fill:
            _swap(stage, target, accept)
    except OSError as error:
        if error.errno not in _IMMOVABLE or not target.is_dir():
            raise
        fill = True
    if fill:
        _fill(stage, target, accept, last, stays)


def _swap(stage: Path, target: Path, accept: Callable[[Path], None]) -> None:
    new, old = stage / NEW, stage / OLD
    for _ in range(_TRIES):
        try:
            new.rename(target)  # where nothing is, or an empty folder
        except OSError as error:
            if error.errno not in _OCCUPIED:
                raise
        else:
            return
        with suppress(FileNotFoundError):  # another has just taken away what was there
            if exchange(new, target):
                try:
                    accept(new)
                except BaseException:
                    exchange(new, target)
                    raise
                return
            target.rename(old)
            accept(old)
            with suppress(FileExistsError, NotADirectoryError):  # another has put something there meanwhile
                rename_new(new, target)
                return
            remove(old)
    raise OSError(errno.EBUSY, "others write to it all the time", os.fspath(target))


def rename_new(folder: Path, target: Path) -> None:
    """Renames a folder to a name that nothing has.

    Raises:
        FileExistsError: something has it.
    """
    try:
        folder.rename(target)
    except OSError as error:
        if error.errno in _OCCUPIED:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(target)) from error
        raise


def exchange(one: Path, other: Path) -> bool:
    """Swaps the names of two files or folders: nobody ever finds either missing. False where that cannot be done.

    Raises:
        OSError: they cannot be renamed at all.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # Linux has it
    if rename is None:
        return False
    rename.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), os.fspath(one), None, os.fspath(other))


def _fill(stage: Path, target: Path, accept: Callable[[Path], None], last: str, stays: Callable[[str], bool]) -> None:
    old, ready = stage / OLD, stage / READY
    with _alone(target):
        old.mkdir(exist_ok=True)
        for entry in sorted(target.iterdir(), key=lambda entry: entry.name != last):
            if not stays(entry.name):
                shutil.move(entry, old / entry.name)
        accept(old)
        (stage / NEW).rename(ready)
        _move_in(ready, target, last)


def _move_in(ready: Path, target: Path, last: str) -> None:
    for entry in sorted(ready.iterdir(), key=lambda entry: entry.name == last):
        shutil.move(entry, target / entry.name)
    ready.rmdir()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits for others who fill the same folder."""
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        os.close(number)


def settle(stage: Path, target: Path, last: str) -> bool:
    """Ends a replacement that was broken off: what was there is put back, or what is ready is put there.

    Returns:
        Whether the stage holds nothing any more that anybody could miss.
    """
    new, old, ready = stage / NEW, stage / OLD, stage / READY
    if ready.exists():
        target.mkdir(exist_ok=True)
        _move_in(ready, target, last)
    elif new.exists() and os.path.lexists(old):
        with suppress(FileExistsError):
            if not os.path.lexists(target):
                rename_new(old, target)
        if old.is_dir() and target.is_dir():
            for entry in sorted(old.iterdir(), key=lambda entry: entry.name == last):
                if not os.path.lexists(target / entry.name):
                    shutil.move(entry, target / entry.name)
            with suppress(OSError):  # not empty: something else has taken a name
                old.rmdir()
        return not os.path.lexists(old)
    return True


def remove(path: Path) -> None:
    """Deletes a file, or a folder with all that is in it, as far as that is allowed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


__all__ = ["NEW", "exchange", "remove", "settle", "take_place"]
