"""The blocks that are kept in memory: those that were used last, within a number of bytes."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable

from mesart.runtime.kv.block import KvBlock


class BlockCache:
    """Blocks by key, never more than ``limit`` bytes of them: the one that was used longest ago goes first.

    What is pinned stays: so a prompt with more chunks than there is room for finds some of them the next time, where
    otherwise each would have made room for the one behind it.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0
        self._blocks: OrderedDict[str, KvBlock] = OrderedDict()
        self._pins: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, key: str) -> bool:
        return key in self._blocks

    def get(self, key: str) -> KvBlock | None:
        block = self._blocks.get(key)
        if block is not None:
            self._blocks.move_to_end(key)
        return block

    def put(self, key: str, block: KvBlock) -> bool:
        """Keeps a block, if there is room beside what is pinned; whether it is there now."""
        if self.get(key) is not None:
            return True
        pinned = sum(self._blocks[other].bytes for other in self._pins if other in self._blocks)
        if pinned + block.bytes > self.limit:
            return False
        for other in [other for other in self._blocks if other not in self._pins]:
            if self.bytes + block.bytes <= self.limit:
                break
            self.bytes -= self._blocks.pop(other).bytes
        self._blocks[key] = block
        self.bytes += block.bytes
        return True

    def pin(self, keys: Iterable[str]) -> None:
        """Keeps these, those of them that come later too, until they are unpinned as often."""
        self._pins.update(keys)

    def unpin(self, keys: Iterable[str]) -> None:
        self._pins.subtract(keys)
        self._pins = +self._pins

    def drop(self, key: str) -> None:
        block = self._blocks.pop(key, None)
        if block is not None:
            self.bytes -= block.bytes

    def clear(self) -> None:
        self._blocks.clear()
        self.bytes = 0


__all__ = ["BlockCache"]
