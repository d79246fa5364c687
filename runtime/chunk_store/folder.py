"""The chunks that are kept in a folder, which several processes may use at once.

A file is written under another name and renamed once it is whole and on the disk, so a process that ends meanwhile
leaves nothing that anybody would read; what it leaves is cleared by the next that writes.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mesart.graphs.errors import InputError
from mesart.runtime.chunk_store.chunk_file import header_of, is_whole, read_block
from mesart.runtime.kv.block import BlockLayout, KvBlock

MARKER = "store.json"
_FORMAT = {"mesart_chunk_store": 1}
_CHUNK = re.compile(r"([0-9a-f]{64})\.safetensors")
_PARTIAL = re.compile(r"\.[0-9a-f]{64}\.[0-9a-f]{8}\.partial")


@dataclass(frozen=True)
class StoredFile:
    """A file of the store, whole or not."""

    path: Path
    bytes: int
    used: float
    """When it was written, or read last, in seconds since the epoch."""

    @property
    def key(self) -> str:
        return self.path.name.partition(".")[0]


class ChunkFolder:
    """Files of chunks in a folder, at most ``limit`` bytes of them: the one that was used longest ago goes first.

    Args:
        path: the folder; made if it is not there.
        limit: bytes.
        make: without it, a folder that is not there, or no store, is an error.

    Raises:
        InputError: it is a folder of something else, or cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], limit: int, *, make: bool = True) -> None:
        self.path, self.limit = Path(path), limit
        self._chunks = self.path / "chunks"
        try:
            self._open(make=make)
        except OSError as error:
            raise InputError(f"the store {self.path} cannot be used: {error.strerror or error}") from error

    @classmethod
    def existing(cls, path: str | os.PathLike[str]) -> ChunkFolder:
        """A store that is there, to be looked through; it may be one that cannot be written.

        Raises:
            InputError: there is none.
        """
        return cls(path, sys.maxsize, make=False)

    def _open(self, *, make: bool) -> None:
        marker = self.path / MARKER
        if not marker.exists():
            if not make:
                reason = f"it holds no {MARKER}" if self.path.exists() else "there is nothing of that name"
                raise InputError(f"{self.path} is no store of chunks: {reason}")
            own = ("lock", f".{MARKER}.")  # of a process that makes the store now
            is_other = self.path.is_dir() and not all(entry.name.startswith(own) for entry in self.path.iterdir())
            if is_other and not marker.exists():  # else that process has made it by now
                raise InputError(
                    f"{self.path} is no store of chunks: it holds other files and no {MARKER}; give a new folder"
                )
            self.path.mkdir(parents=True, exist_ok=True)
            with self.lock():
                partial = self.path / f".{MARKER}.{secrets.token_hex(4)}"
                partial.write_text(json.dumps(_FORMAT), encoding="utf-8")
                partial.replace(marker)
        try:
            found = json.loads(marker.read_bytes())
        except (ValueError, RecursionError):
            found = None
        if found != _FORMAT:
            raise InputError(f"{self.path} is a store of another version of mesart, or damaged; give a new folder")
        self._chunks.mkdir(exist_ok=True)
        if make:
            with self.lock():
                self._clear_partial()

    def read(self, key: str, layout: BlockLayout, tokens: int) -> KvBlock | None:
        """The block of a key; ``None`` if it is not there. A file that is damaged is removed."""
        path = self._file(key)
        try:
            file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return None
        try:
            block = read_block(file, layout, tokens, key)
        except OSError:
            block = None
        finally:
            os.close(file)
        if block is None:
            _remove(path)
        else:
            _note_use(path)
        return block

    def __contains__(self, key: str) -> bool:
        return os.path.isfile(self._file(key))  # false where it cannot be told

    def write(self, key: str, block: KvBlock) -> None:
        """Keeps a block, if it is within the limit beside what other processes are writing.

        Raises:
            OSError: the disk is full, or the folder is gone or cannot be written any more.
        """
        path = self._file(key)
        if path.exists():
            _note_use(path)
            return
        header = header_of(block, key)
        size = len(header) + block.bytes
        partial = self._chunks / f".{key}.{secrets.token_hex(4)}.partial"
        with self.lock():
            self._clear_partial()
            if not self._make_room(size):
                return
            file = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                fcntl.flock(file, fcntl.LOCK_EX)  # its writer lives
                os.truncate(file, size)  # so that others count it
            except BaseException:
                os.close(file)
                partial.unlink()
                raise
        try:
            with os.fdopen(file, "wb", buffering=0) as stream:
                _write_all(stream.fileno(), memoryview(header))
                _write_all(stream.fileno(), block.buffer.data)
                os.fsync(stream.fileno())
                with self.lock():  # who counts files meanwhile would find it under both names, or none
                    partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def drop(self, key: str) -> bool:
        """Removes a chunk; whether it was there."""
        try:
            self._file(key).unlink()
        except FileNotFoundError:
            return False
        return True

    def verify(self) -> tuple[int, list[str]]:
        """Reads all files; how many are whole, and the keys of those that were damaged and have been removed."""
        whole, damaged = 0, []
        for stored in self.files():
            key = stored.key
            try:
                file = os.open(stored.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            except OSError:
                continue
            try:
                good = is_whole(file, key)
            except OSError:
                good = False
            finally:
                os.close(file)
            if good:
                whole += 1
            else:
                damaged.append(key)
                _remove(stored.path)
        return whole, damaged

    def files(self) -> list[StoredFile]:
        """The chunks that are there, the one that was used longest ago first."""
        return sorted(self._entries(_CHUNK), key=lambda stored: stored.used)

    def _file(self, key: str) -> Path:
        return self._chunks / f"{key}.safetensors"

    def _entries(self, pattern: re.Pattern[str]) -> Iterator[StoredFile]:
        with os.scandir(self._chunks) as entries:
            for entry in entries:
                if pattern.fullmatch(entry.name):
                    try:
                        status = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue  # another process has removed it
                    if stat.S_ISREG(status.st_mode):
                        yield StoredFile(Path(entry.path), status.st_size, status.st_mtime)

    def _make_room(self, size: int) -> bool:
        """Removes what was used longest ago, until ``size`` bytes more are within the limit; whether they are."""
        files = self.files()
        taken = sum(stored.bytes for stored in (*files, *self._entries(_PARTIAL)))
        for stored in files:
            if taken + size <= self.limit:
                break
            stored.path.unlink(missing_ok=True)
            taken -= stored.bytes
        return taken + size <= self.limit  # else others are writing as much

    def _clear_partial(self) -> None:
        """Removes files that nobody goes on writing."""
        for stored in self._entries(_PARTIAL):
            try:
                file = os.open(stored.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            except OSError:
                continue
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                stored.path.unlink(missing_ok=True)
            except BlockingIOError:
                pass  # its writer lives
            finally:
                os.close(file)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """No other process counts, or makes room, meanwhile; held for moments only."""
        file = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
        finally:
            os.close(file)


def _note_use(path: Path) -> None:
    with suppress(OSError):  # of another user, or read-only by now: it is good all the same
        os.utime(path)


def _remove(path: Path) -> None:
    """Removes a damaged file, if it can be: it is a miss in any case."""
    with suppress(OSError):
        path.unlink()


def _write_all(file: int, content: memoryview) -> None:
    while content:
        content = content[os.write(file, content) :]


__all__ = ["MARKER", "ChunkFolder", "StoredFile"]
