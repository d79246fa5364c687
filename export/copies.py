"""A file under a second name: a clone, a hard link or a copy; never over anything that is there."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from io import FileIO
from pathlib import Path
from typing import Literal

Way = Literal["clone", "link", "copy"]
"""``clone``: a file of its own, whose blocks are shared until either is written to (Btrfs, XFS, ...); takes no time and
no space. ``link``: one file under two names. ``copy``: a file of its own."""

_FICLONE = 0x40049409
"""The ioctl of Linux: this file becomes a clone of that one."""

_NO_LINK = (
    *(errno.EXDEV, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS),
    *(errno.EPERM, errno.EACCES),  # a file system without links, or a file of another user (protected_hardlinks)
)
"""These say that there can be no hard link, where a copy may do; anything else is an error of the copy too."""

_BLOCK_BYTES = 4 << 20
"""Copied and hashed at a time."""


def link_or_copy(source: Path, target: Path, ways: tuple[Way, ...] = ("link",)) -> tuple[Way, str | None]:
    """Gives a file a second name, in one of some ways, or as a copy where they are not possible; makes the folder.

    Args:
        source: the file; a link, as hub caches hold them, stands for what it links to.
        target: a name that nothing has yet.
        ways: a clone is tried before a link.

    Returns:
        The way, and the SHA-256 of a copy, hexadecimal, which has been read anyway.

    Raises:
        FileExistsError: ``target`` is there, as a file or a link.
        OSError: it cannot be read or written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    real = Path(os.path.realpath(source))
    if "clone" in ways and _clone(real, target):
        return "clone", None
    if "link" in ways and _link(real, target):
        return "link", None
    return "copy", _copy(real, target)


def _link(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        return False
    return True


def _create(target: Path, source: FileIO) -> FileIO:
    """A new file that nobody may read who may not read the source."""
    mode = os.fstat(source.fileno()).st_mode & 0o666
    return FileIO(target, "x", opener=lambda path, flags: os.open(path, flags, mode))


def _clone(source: Path, target: Path) -> bool:
    with source.open("rb", buffering=0) as read, _create(target, read) as write:
        try:
            fcntl.ioctl(write.fileno(), _FICLONE, read.fileno())
        except OSError:  # file systems that cannot say so in many ways
            target.unlink()
            return False
    return True


def _copy(source: Path, target: Path) -> str:
    """Copies to a new file; returns the SHA-256 of what was written, which is thus read once."""
    digest = hashlib.sha256()
    block = memoryview(bytearray(_BLOCK_BYTES))
    with source.open("rb", buffering=0) as read, _create(target, read) as write:
        while count := read.readinto(block):
            digest.update(block[:count])
            done = 0
            while done < count:
                done += write.write(block[done:count])
        os.fsync(write.fileno())  # now, while the model is traced, and not at the end
    return digest.hexdigest()


__all__ = ["Way", "link_or_copy"]
