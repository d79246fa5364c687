"""Folders that are written all or nothing, and never over what belongs to somebody else."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from mesart.export.disk import explained, require_space, sync, sync_folder
from mesart.export.stage import clear_leftovers, is_stage, mounts, real_place, staged
from mesart.export.swap import NEW, take_place
from mesart.graphs.bundle.manifest import MANIFEST_FILE
from mesart.graphs.errors import InputError, MesaError

Entries = Callable[[Path], Collection[str]]
"""The files of a folder that are its own, by their paths in it; a :class:`MesaError` if it is not of the kind."""


def check_target(
    output: str | os.PathLike[str],
    marker: str,
    kind: str,
    *,
    force: bool,
    entries: Entries | None = None,
    keep: Collection[Path] = (),
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """Refuses to replace what is not ours, and clears what killed exports have left.

    Args:
        output: the folder that is to be written.
        marker: a file that every folder of this kind holds.
        kind: what such a folder is called.
        force: let everything be replaced.
        entries: what of it is its own: whatever else is in it, the user has put there. Left out: all of it.
        keep: folders that are never replaced, nor written into.
        report: called with a line for each thing that was cleared.

    Raises:
        MesaError: ``output`` is one of ``keep``, above or in it; a file, or a folder with something else in it; or
            nothing that could be written.
    """
    if not os.fspath(output) or "\0" in os.fspath(output):  # an empty name would mean the working folder
        raise InputError(f"{os.fspath(output)!r} is no name of a folder; give another output folder")
    target = Path(output)
    with explained(target):
        real = real_place(target)
        for folder in keep:
            require_apart(target, folder)
        clear_leftovers(target, marker, report)
        try:
            target.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return
        if not target.exists():
            raise InputError(
                f"{target} is a link to {os.readlink(target)}, which does not exist; make that folder first"
            )
        mode = real.stat().st_mode
        if stat.S_ISREG(mode) and not force:
            raise InputError(f"{target} is a file; give another output folder, or --force to replace it")
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # a device, say, which no --force replaces
            raise InputError(f"{target} is neither a folder nor a plain file; give another output folder")
        if stat.S_ISDIR(mode):
            _check_folder(target, real, marker, kind, entries, force=force)


def _check_folder(target: Path, real: Path, marker: str, kind: str, entries: Entries | None, *, force: bool) -> None:
    if not os.access(real, os.W_OK | os.X_OK):
        raise InputError(f"{target} may not be written to; give another output folder")
    inner = next((path for path in mounts() if real in path.parents), None)
    if inner is not None:
        raise InputError(f"{target} holds the mount point {inner}; give another output folder")
    try:
        require_own(real, target, marker, kind, entries)
    except MesaError:
        if not force:
            raise
        for place, what in (("~", "your home folder"), ("..", "what the working folder lies in")):
            if _is_in(real_place(Path(place).expanduser()), real):
                raise InputError(
                    f"{target} holds {what}, which not even --force replaces; give another output folder"
                ) from None


def require_own(folder: Path, target: Path, marker: str, kind: str, entries: Entries | None) -> None:
    """Refuses a folder in which there is anything that we have not made.

    Args:
        folder: where it is now.
        target: where it was, which is what the user knows it by.
        marker: see :func:`check_target`; so are ``kind`` and ``entries``.

    Raises:
        MesaError: names what is not ours.
    """
    if not folder.is_dir():
        raise InputError(f"{target} is a file; give another output folder, or --force to replace it")
    found = list(_files(folder, real_place(target)))
    if not found:
        return
    way_out = "give another output folder, or --force to replace it"
    if marker not in found:
        raise InputError(f"{target} exists and is no {kind}; {way_out}")
    if entries is None:
        return
    try:
        own = entries(folder)
    except MesaError as error:
        raise InputError(f"{target} exists and is no {kind} that this version can read; {way_out}") from error
    foreign = next((name for name in found if name not in own), None)
    if foreign is not None:
        raise InputError(f"{target} holds {foreign}, which is not the {kind}'s; {way_out}, with all that is in it")


def _files(folder: Path, target: Path) -> Iterator[str]:
    """Files, links and whatever is no folder, by their paths in it; but for stages, which are nobody's."""
    for root, folders, files in os.walk(folder):
        here = os.path.relpath(root, folder)
        if here == ".":
            folders[:] = [name for name in folders if not is_stage(target, name)]
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        for name in sorted([*files, *links]):
            yield name if here == "." else f"{here}/{name}"


def require_apart(target: Path, source: Path) -> None:
    """Refuses an output that is what it is made from, above it or in it, by whatever names.

    Raises:
        MesaError: says which.
    """
    real, origin = real_place(target), real_place(source)
    with explained(target):
        if _is_in(origin, real) and _is_in(real, origin):
            raise InputError(f"{target} is the source, {source}, itself; give another output folder")
        if any(_is_replaced(path, real) for path in (origin, *_link_targets(origin))):
            raise InputError(f"{target} holds the source, {source}, or files of it; give another output folder")
        if _is_in(real, _repository(origin)):
            raise InputError(f"{target} lies in the source, {source}; give another output folder")


def _is_replaced(path: Path, target: Path) -> bool:
    """Whether a path lies in what an output replaces; a stage in it stays, such as one with a calibrated model."""
    return _is_in(path, target) and not is_stage(target, os.path.relpath(path, target).split(os.sep)[0])


def _is_in(path: Path, folder: Path) -> bool:
    """Whether a path is a folder or lies in it; compared as files, since one file may have several paths."""
    if not folder.exists():
        return False
    return any(parent.exists() and parent.samefile(folder) for parent in (path, *path.parents))


def _link_targets(folder: Path) -> Iterator[Path]:
    """The files that a folder's links mean."""
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(root, name)
            if path.is_symlink():
                yield real_place(path)


def _repository(folder: Path) -> Path:
    """A checkpoint's folder, or all of its repository in a hub cache, where a snapshot links to blobs beside it."""
    above = folder.parent
    return above.parent if above.name == "snapshots" and above.parent.name.startswith("models--") else folder


@contextmanager
def atomic(
    target: Path,
    kind: str,
    needed: int,
    *,
    marker: str = MANIFEST_FILE,
    accept: Callable[[Path], None] = lambda folder: None,
) -> Iterator[Path]:
    """A folder that takes the place of ``target`` when all went well, and vanishes otherwise.

    Args:
        target: the folder that is to be written: where links lead to, which stay.
        kind: what it is called.
        needed: about how many bytes it will take.
        marker: a file that every folder of this kind holds.
        accept: called with what was in the way before it is given up, to raise if it is not to be replaced.

    Raises:
        MesaError: it cannot be written there, or the disk is full.
    """
    real = real_place(target)
    with explained(target, needed), staged(real, marker) as stage:
        require_space(stage.folder, target, kind, needed)
        new = stage.folder / NEW
        new.mkdir()
        yield new
        sync_folder(new)
        if real.is_dir():
            shutil.copymode(real, new)
        take_place(
            stage.folder,
            real,
            fill=stage.inside,
            accept=accept,
            last=marker,
            stays=lambda name: is_stage(real, name),
        )
        sync(real)
        sync(real.parent)


__all__ = ["Entries", "atomic", "check_target", "require_apart", "require_own"]
