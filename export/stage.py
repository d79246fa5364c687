"""Where an output is built: a hidden folder beside its place, or in it, which dies with the process that made it.

The process holds a lock on a file in its stage. The system lets go of the lock when the process ends, however it
ends: a stage that nobody has locked was left over, and the next export to the same place clears it away.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mesart.export.disk import explained
from mesart.export.swap import remove, settle
from mesart.graphs.errors import InputError

_LOCK_FILE = "owner.lock"
_UNLOCKED = "unlocked-"
"""How a lock's name begins before it is locked."""
_LONGEST_NAME = 200
"""Bytes of an output's name that its stage can bear in its own, of 255."""


@dataclass(frozen=True)
class Stage:
    """A folder to build in, in the file system of the target."""

    folder: Path
    inside: bool
    """It lies in the target: beside it we may not write, or the target cannot be renamed."""


def real_place(target: Path) -> Path:
    """Where an output really goes: links are followed, and stay."""
    return Path(os.path.realpath(target))


def is_stage(target: Path, name: str) -> bool:
    """Whether an entry in or beside a target (:func:`real_place`) is one of its stages, of whatever process."""
    return re.fullmatch(re.escape(_prefix(target)) + r"[a-z0-9_]{8}\.partial", name) is not None


def _prefix(target: Path) -> str:
    name = os.fsencode(target.name)
    return f".{target.name if len(name) <= _LONGEST_NAME else hashlib.sha256(name).hexdigest()}."


@contextmanager
def staged(target: Path, last: str) -> Iterator[Stage]:
    """A stage for ``target`` (:func:`real_place`); see :func:`~mesart.export.swap.settle` for ``last``.

    Raises:
        MesaError: there is nowhere to write, or what was there before cannot be put back, and is kept.
    """
    parents = _make_parents(target)
    try:
        stage, lock = _make_locked(target)
    except BaseException:
        _unmake(parents)
        raise
    try:
        try:
            yield stage
        finally:
            with explained(target, also=f"what was there is in {stage.folder}"):
                _end(stage.folder, target, last)
    finally:
        os.close(lock)
        if not target.exists():
            _unmake(parents)


def _end(folder: Path, target: Path, last: str) -> None:
    if not settle(folder, target, last):
        raise InputError(f"{target} was changed meanwhile; what was there before is in {folder}")
    _remove_stage(folder)


def _remove_stage(folder: Path) -> None:
    """The lock goes last: what is left if the process is killed meanwhile can still be told from what is in use."""
    with suppress(OSError):
        for path in folder.iterdir():
            if path.name != _LOCK_FILE:
                remove(path)
    remove(folder)


def _make_parents(target: Path) -> list[Path]:
    """Those that were not there, the innermost first."""
    missing = []
    for parent in target.parents:
        if parent.exists():
            break
        missing.append(parent)
    with explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    return missing


def _unmake(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # another has put something there
            folder.rmdir()


def _make_locked(target: Path) -> tuple[Stage, int]:
    while True:
        stage = _make_stage(target)
        # Until it is locked, another export may take it for one that was killed just then, and clear it away.
        with suppress(FileNotFoundError):
            return stage, _lock_new(stage.folder)


def _make_stage(target: Path) -> Stage:
    def make(place: Path) -> Path:
        return Path(tempfile.mkdtemp(prefix=_prefix(target), suffix=".partial", dir=place))

    if not _is_fixed(target):
        try:
            return Stage(make(target.parent), inside=False)
        except OSError:
            if not target.is_dir():
                with explained(target):
                    raise
    with explained(target):
        return Stage(make(target), inside=True)


def _is_fixed(target: Path) -> bool:
    """Whether a folder is a mount point, or the working folder, which stays where it is for whoever is in it."""
    if not target.is_dir():
        return False
    return os.path.ismount(target) or target in mounts() or target.samefile(".")


def mounts() -> set[Path]:
    """The mount points of this process, as far as the system tells them: some have the device of their parent."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return set()
    escapes = re.compile(r"\\([0-7]{3})")
    return {Path(escapes.sub(lambda code: chr(int(code[1], 8)), line.split(" ")[4])) for line in lines}


def _lock_new(folder: Path) -> int:
    """Locks a file before it has the name by which others know it."""
    number, name = tempfile.mkstemp(prefix=_UNLOCKED, dir=folder)
    with suppress(OSError):  # a file system without locks: then nobody else gets one either
        fcntl.flock(number, fcntl.LOCK_EX)
    try:
        os.rename(name, folder / _LOCK_FILE)
    except BaseException:
        os.close(number)
        raise
    return number


def _lock_of_the_dead(folder: Path) -> int | None:
    """The lock of a stage of ours whose process has ended; ``None``: it lives, or we cannot know."""
    with suppress(OSError):
        number = os.open(folder / _LOCK_FILE, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            info = os.fstat(number)
            if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid():
                raise PermissionError
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(number)
            raise
        return number
    return None


def clear_leftovers(target: Path, last: str, say: Callable[[str], None]) -> None:
    """Removes the stages that killed exports to ``target`` have left, and ends what they were in the middle of.

    Args:
        target: an output.
        last: see :func:`~mesart.export.swap.settle`.
        say: called with a line for each.
    """
    real = real_place(target)
    for place in (real.parent, real):
        names: list[str] = []
        with suppress(OSError):  # no such folder, or none that we may list
            names = [entry.name for entry in os.scandir(place) if entry.is_dir(follow_symlinks=False)]
        for name in sorted(names):
            if is_stage(real, name):
                _clear(place / name, real, last, say)


def _clear(folder: Path, target: Path, last: str, say: Callable[[str], None]) -> None:
    if not (folder / _LOCK_FILE).exists():
        with suppress(OSError):
            _clear_unlocked(folder)
            say(f"removed {folder}, which a killed export had left over")
            return
        say(f"{folder} may be left over from a killed export; if none is running, delete it")
        return
    lock = _lock_of_the_dead(folder)
    if lock is None:
        return
    try:
        there = target.exists()
        with explained(target, also=f"{folder} is left over from a killed export"):
            done = settle(folder, target, last)
        if not done:
            say(f"{folder} holds what was in {target} before an export was killed; move it back, or delete it")
            return
        if target.exists() and not there:
            say(f"brought back {target}, which a killed export had moved away")
        _remove_stage(folder)
        say(f"removed {folder}, which a killed export had left over")
    finally:
        os.close(lock)


def _clear_unlocked(folder: Path) -> None:
    """Removes a stage that holds nothing: its process was killed before it had a lock, or when the lock was gone.

    Raises:
        OSError: it holds something, or a process is about to lock it.
    """
    for path in folder.glob(f"{_UNLOCKED}*"):
        number = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        finally:
            os.close(number)
    folder.rmdir()


__all__ = ["Stage", "clear_leftovers", "is_stage", "mounts", "real_place", "staged"]
