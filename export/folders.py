"""Folders that are written all or nothing."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from mesart.graphs.errors import MesaError


def check_target(target: Path, marker: str, kind: str, *, force: bool) -> None:
    """Refuses to replace what is not ours.

    Args:
        target: the folder that is to be written.
        marker: a file that every folder of this kind holds.
        kind: what such a folder is called.
        force: let everything be replaced.

    Raises:
        MesaError: ``target`` is a file, or a folder with something else in it.
    """
    if not target.exists() or force:
        return
    if not target.is_dir():
        raise MesaError(f"{target} is a file; give another output folder, or --force to replace it")
    if any(target.iterdir()) and not (target / marker).is_file():
        raise MesaError(f"{target} exists and is no {kind}; give another output folder, or --force to replace it")


@contextmanager
def atomic(target: Path, kind: str, needed: int) -> Iterator[Path]:
    """A folder beside ``target`` that takes its place when all went well, and vanishes otherwise.

    Args:
        target: the folder that is to be written.
        kind: what it is called.
        needed: about how many bytes it will take.

    Raises:
        MesaError: it cannot be written there, or the disk is full.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    except OSError as error:
        raise MesaError(f"cannot write to {target.parent}: {error.strerror}") from error
    try:
        require_space(target.parent, kind, needed)
        folder.chmod(0o755)
        yield folder
        _replace(folder, target)
    except (OSError, SafetensorError) as error:
        if _is_full(error):
            raise MesaError(f"the disk is full: {target.parent} needs about {needed >> 20} MiB") from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def require_space(folder: Path, kind: str, needed: int) -> None:
    """Refuses to begin what the disk cannot hold.

    Raises:
        MesaError: says what is free and what is needed.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise MesaError(f"{folder} has {free >> 20} MiB free, the {kind} needs about {needed >> 20} MiB")


def link_or_copy(source: Path, target: Path) -> None:
    """Gives a file a second name, or a copy where there are no hard links (another file system); makes the folder."""
    target.parent.mkdir(parents=True, exist_ok=True)
    real = source.resolve()  # hub caches hold symbolic links
    try:
        os.link(real, target)
    except OSError:
        shutil.copyfile(real, target)


def _is_full(error: Exception) -> bool:
    full = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError):
        return error.errno in full
    return any(f"os error {number})" in str(error) for number in full)  # safetensors gives the number in its text


def _replace(folder: Path, target: Path) -> None:
    if not target.exists():
        folder.rename(target)
        return
    old = folder.with_suffix(".replaced")
    target.rename(old)
    try:
        folder.rename(target)
    except BaseException:
        old.rename(target)
        raise
    if old.is_dir():
        shutil.rmtree(old)
    else:
        old.unlink()


__all__ = ["atomic", "check_target", "link_or_copy", "require_space"]
