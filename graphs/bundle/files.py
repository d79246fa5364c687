"""The files of a bundle: checked when it is loaded, and still the same when one of them is opened later.

A bundle may be replaced, or altered, while a model has it open: by an export to the same path, by a copy over a
checkpoint that it shares its weights with. What is opened after that would be of another model.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeAlias

from mesart.graphs.bundle.records import Must
from mesart.graphs.errors import BundleError, MesaError

_BLOCK_BYTES = 16 << 20
"""Read at a time: a thread that hashes while another computes waits for its turn after each block."""

_MOST_KEPT = 1 << 28
"""Bytes of a file that is kept in memory; the largest tokenizers have 35 MB."""

Hash: TypeAlias = Annotated[
    str, Must("64 hexadecimal digits", lambda text: len(text) == 64 and not set(text) - set("0123456789abcdef"))
]
"""A SHA-256."""


@dataclass(frozen=True)
class FileInfo:
    """What a file of a bundle holds."""

    bytes: Annotated[int, Must("a size of at least 0", lambda size: size >= 0)]
    sha256: Hash


@dataclass(frozen=True)
class _Identity:
    """Which file it is, and when it was written last: what ``stat`` tells without reading."""

    device: int
    inode: int
    bytes: int
    modified_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> _Identity:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


class BundleFiles:
    """A bundle's files.

    Links are followed, as huggingface_hub keeps files; whatever is no regular file is refused without opening it.

    Args:
        folder: the bundle.
        infos: by name, what the files held when they were written.
        advice: what helps if one is missing or damaged.
    """

    def __init__(self, folder: Path, infos: Mapping[str, FileInfo], advice: str = "export the model again") -> None:
        self.folder, self.infos, self._advice = folder, infos, advice
        self._known: dict[str, _Identity] = {}
        self._kept: dict[str, bytes] = {}

    def verify(self, *, contents: bool = True, keep: Iterable[str] = ()) -> None:
        """Checks that every file is there and whole; ``contents``: also that its SHA-256 is the recorded one.

        Args:
            contents: read the files, all of them.
            keep: files whose bytes are kept for :meth:`read`, read in any case.

        Raises:
            MesaError: names the first file that is missing, truncated, altered or no regular file.
        """
        kept = set(keep)
        for name, info in self.infos.items():
            status = self._stat(name)
            if status.st_size != info.bytes:
                raise self._error(name, f"has {status.st_size} bytes instead of {info.bytes}")
            if name in kept and info.bytes > _MOST_KEPT:
                raise self._error(name, f"has {info.bytes} bytes, more than the {_MOST_KEPT} that it may have")
            found = _Identity.of(status)
            if contents or name in kept:
                with self._reading(name) as file:
                    found = _Identity.of(os.fstat(file))
                    digest = self._keep(name, file, info.bytes) if name in kept else _hash(file, info.bytes)
                if contents and digest != info.sha256:
                    raise self._error(name, "was altered (its SHA-256 differs)")
            self._known[name] = found

    def read(self, name: str) -> bytes:
        """The bytes of a file that :meth:`verify` was told to keep: the very ones that it checked."""
        return self._kept[name]

    def __contains__(self, name: str) -> bool:
        return name in self.infos

    @contextmanager
    def unchanged(self, *names: str) -> Iterator[None]:
        """Surrounds the opening of files: they are those that were verified, before and after.

        Raises:
            MesaError: one of them is no file of the bundle, is gone, or has changed since.
        """
        self._require_unchanged(names)
        yield
        self._require_unchanged(names)

    def require_not_overwritten(self, names: Iterable[str]) -> None:
        """Checks that files which are open, and mapped into memory, were not written to.

        A file that is gone, or that another took the place of, still is what it was to whoever has it open.

        Raises:
            MesaError: one was overwritten in place.
        """
        for name in names:
            try:
                found, known = _Identity.of(os.stat(self.folder / name)), self._known[name]
            except OSError:
                continue
            if (found.device, found.inode) == (known.device, known.inode) and found != known:
                raise self._changed(name)

    def _require_unchanged(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self._known:
                raise self._error(name, "is none of the files that its manifest lists")
            try:
                found = _Identity.of(os.stat(self.folder / name))
            except OSError as error:
                raise self._changed(name) from error
            if found != self._known[name]:
                raise self._changed(name)

    def _changed(self, name: str) -> MesaError:
        return BundleError(f"{self.folder}: {name} has changed since the bundle was loaded; load it again")

    def _stat(self, name: str) -> os.stat_result:
        try:
            status = os.stat(self.folder / name)
        except FileNotFoundError as error:
            raise self._error(name, "is missing") from error
        except (OSError, ValueError) as error:
            raise self._error(name, f"cannot be read ({reason(error)})") from error
        if not stat.S_ISREG(status.st_mode):
            raise self._error(name, "is no regular file")
        return status

    @contextmanager
    def _reading(self, name: str) -> Iterator[int]:
        try:
            # Another kind of file may have taken its place by now: a FIFO must not be waited for.
            file = os.open(self.folder / name, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
            try:
                if not stat.S_ISREG(os.fstat(file).st_mode):
                    raise self._error(name, "is no regular file")
                yield file
            finally:
                os.close(file)
        except OSError as error:
            raise self._error(name, f"cannot be read ({reason(error)})") from error

    def _keep(self, name: str, file: int, size: int) -> str:
        with open(file, "rb", buffering=0, closefd=False) as stream:
            content = stream.read(size + 1)
        self._kept[name] = content
        return hashlib.sha256(content).hexdigest()

    def _error(self, name: str, problem: str) -> MesaError:
        return BundleError(f"{self.folder}: {name} {problem}; {self._advice}")


def reason(error: OSError | ValueError) -> str:
    """Why a file cannot be opened, without its name."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    with path.open("rb", buffering=0) as file:
        return _hash(file.fileno(), path.stat().st_size)


def _hash(file: int, size: int) -> str:
    """SHA-256 of an open file's content; ``size``: what it is expected to have."""
    digest = hashlib.sha256()
    block = memoryview(bytearray(min(size, _BLOCK_BYTES) or 1))
    drop = _is_larger_than_memory(size)
    start = 0
    with open(file, "rb", buffering=0, closefd=False) as stream:
        while start <= size and (count := stream.readinto(block)):  # not for ever, if it grows
            digest.update(block[:count])
            if drop:
                os.posix_fadvise(file, start, count, os.POSIX_FADV_DONTNEED)
            start += count
    return digest.hexdigest()


def _is_larger_than_memory(size: int) -> bool:
    """Whether a file cannot stay in the system's cache: what was read of it would only push out all the rest."""
    if not hasattr(os, "posix_fadvise"):
        return False
    return size > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


__all__ = ["BundleFiles", "FileInfo", "Hash", "reason", "sha256"]
