"""The store as a model sees it: chunks of token ids in, blocks out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mesart.runtime.chunk_store.keys import chunk_key, head_key
from mesart.runtime.chunk_store.store import ChunkStore, Tier
from mesart.runtime.kv.block import BlockLayout, KvBlock


@dataclass(frozen=True)
class StoredChunks:
    """A store, and what the names of a model's chunks begin with.

    Attributes:
        fingerprint: of what computes them, see :func:`~mesart.runtime.chunk_store.keys.fingerprint`.
        salt: keeps what users store apart: only who gives the same finds it.
    """

    store: ChunkStore
    fingerprint: str
    layout: BlockLayout
    salt: str = ""

    def behind(self, head: NDArray[np.int64]) -> ChunksBehind:
        """The chunks behind a head, given by its ids, int64 ``[F]``."""
        return ChunksBehind(self, head)


class ChunksBehind:
    """Heads and chunks of one prompt, in a store; keys that it has named stay in memory until :meth:`release`."""

    def __init__(self, stored: StoredChunks, head: NDArray[np.int64]) -> None:
        self._stored, self._head = stored, head
        self._pinned: list[str] = []

    def head_key(self) -> str:
        return head_key(self._stored.fingerprint, self._head, self._stored.salt)

    def chunk_key(self, chunk: NDArray[np.int64]) -> str:
        return chunk_key(self._stored.fingerprint, self._head, chunk, self._stored.salt)

    def pin(self, keys: Iterable[str]) -> None:
        new = list(keys)
        self._stored.store.pin(new)
        self._pinned += new

    def release(self) -> None:
        pinned, self._pinned = self._pinned, []
        self._stored.store.unpin(pinned)

    def has(self, key: str) -> bool:
        return self._stored.store.has(key)

    def find(self, key: str, tokens: int) -> tuple[KvBlock, Tier] | None:
        return self._stored.store.find(key, self._stored.layout, tokens)

    def expect(self, key: str, tokens: int) -> None:
        self._stored.store.expect(key, self._stored.layout, tokens)

    def put(self, key: str, block: KvBlock) -> None:
        self._stored.store.put(key, block)


__all__ = ["ChunksBehind", "StoredChunks"]
