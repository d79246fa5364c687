"""Chunks in memory and on a disk, for any number of models."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock, RLock
from types import TracebackType
from typing import Literal, TypeAlias

from mesart.graphs.errors import InputError
from mesart.graphs.memory_size import parse_memory
from mesart.runtime.chunk_store.folder import ChunkFolder
from mesart.runtime.chunk_store.memory import BlockCache
from mesart.runtime.kv.block import BlockLayout, KvBlock

Tier: TypeAlias = Literal["memory", "disk"]

_log = logging.getLogger(__name__)


class ChunkStore:
    """Keys and values of chunks that were computed once, for every prompt that holds these chunks.

    What is in it may be used by any model: entries are named by all that they follow from, so that a model finds its
    own and no other. Several threads and models may share a store, several processes its folder.

    Args:
        memory: bytes that may be kept in memory, a number or a text such as ``"2GiB"``.
        path: a folder to keep chunks in as well; made if it is not there. Without one they are gone with the process.
        disk: bytes that the folder may have.

    Raises:
        MesaError: a size that cannot be read, or a folder that is no store or cannot be written.
    """

    def __init__(
        self,
        memory: int | str = "2GiB",
        path: str | os.PathLike[str] | None = None,
        disk: int | str = "20GiB",
    ) -> None:
        self._cache = BlockCache(parse_memory(memory, "memory"))
        limit = parse_memory(disk, "disk")
        self.folder = None if path is None else ChunkFolder(path, limit)
        self._lock = Lock()
        self._writing = RLock()
        self._pool: ThreadPoolExecutor | None = None
        self._coming: dict[str, Future[KvBlock | None]] = {}
        self._written: Future[None] | None = None
        self._process = os.getpid()

    def __enter__(self) -> ChunkStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def memory_in_use(self) -> int:
        """Bytes of the blocks that are in memory."""
        return self._cache.bytes

    def find(self, key: str, layout: BlockLayout, tokens: int) -> tuple[KvBlock, Tier] | None:
        """The block of a key, and where it was; ``None`` if it is not there. It is in memory then, if there is room."""
        with self._lock:
            block = self._cache.get(key)
        if block is not None:
            return (block, "memory") if block.tokens == tokens and block.layout == layout else None
        if self.folder is None:
            return None
        with self._lock:
            coming = self._coming.pop(key, None) if self._process == os.getpid() else None
        block = self.folder.read(key, layout, tokens) if coming is None else coming.result()
        if block is None or block.tokens != tokens or block.layout != layout:
            return None
        with self._lock:
            self._cache.put(key, block)
        return block, "disk"

    def expect(self, key: str, layout: BlockLayout, tokens: int) -> None:
        """Begins to read an entry that is on the disk only: :meth:`find` will be asked for it next."""
        with self._lock:
            if self.folder is None or key in self._cache or key in self._coming:
                return
        if key in self.folder:
            with self._writing:
                coming = self._threads().submit(self.folder.read, key, layout, tokens)
            with self._lock:
                self._coming = {key: coming}  # one at a time: each takes memory beyond the budget

    def _threads(self) -> ThreadPoolExecutor:
        """A thread to read and one to write."""
        if self._pool is None or self._process != os.getpid():
            self._pool, self._process = ThreadPoolExecutor(2, "chunk-store"), os.getpid()
        return self._pool

    def has(self, key: str) -> bool:
        """Whether there is an entry of that key; it may be gone, or turn out to be damaged, when it is asked for."""
        with self._lock:
            if key in self._cache:
                return True
        return self.folder is not None and key in self.folder

    def put(self, key: str, block: KvBlock) -> None:
        """Keeps a block, as far as there is room; one that is there already stays.

        The disk is written meanwhile, one block at a time: while it is busy with one, the next waits here.
        """
        with self._lock:
            self._cache.put(key, block)
        if self.folder is not None:
            with self._writing:
                self.flush()
                self._written = self._threads().submit(self._write, self.folder, key, block)

    @staticmethod
    def _write(folder: ChunkFolder, key: str, block: KvBlock) -> None:
        try:
            folder.write(key, block)
        except OSError as error:  # what is asked is answered all the same, only not sooner the next time
            _log.warning("a chunk is not kept in %s: %s", folder.path, error.strerror or error)

    def flush(self) -> None:
        """Waits until all that was put is on the disk."""
        with self._writing:
            written, self._written = self._written, None
            if written is not None and self._process == os.getpid():
                written.result()

    def pin(self, keys: Iterable[str]) -> None:
        """Keeps blocks of these keys in memory until they are unpinned as often."""
        with self._lock:
            self._cache.pin(keys)

    def unpin(self, keys: Iterable[str]) -> None:
        with self._lock:
            self._cache.unpin(keys)

    def forget(self, key: str) -> bool:
        """Removes an entry from memory and disk; whether it was there."""
        self.flush()
        with self._lock:
            known = key in self._cache
            self._cache.drop(key)
        return (self.folder is not None and self.folder.drop(key)) or known

    def clear_memory(self) -> None:
        """Frees the memory; the disk keeps what it has."""
        with self._lock:
            self._cache.clear()

    def close(self) -> None:
        """Waits for the disk and frees the memory. The store may be used again."""
        self.flush()
        if self._pool is not None and self._process == os.getpid():
            self._pool.shutdown()
        self._pool, self._coming = None, {}
        self.clear_memory()


def require_store(store: object) -> ChunkStore | None:
    """Raises an :class:`InputError` if what was given as a store is none."""
    if store is None or isinstance(store, ChunkStore):
        return store
    raise InputError(f"store is {type(store).__name__}; give a ChunkStore, such as ChunkStore(memory='2GiB')")


__all__ = ["ChunkStore", "Tier", "require_store"]
