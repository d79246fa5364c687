"""Blocks in memory: whatever is done, as many bytes as are allowed, those that were used last, and those in use."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from mesart.runtime.chunk_store.memory import BlockCache
from mesart.runtime.kv.block import KvBlock
from tests.runtime.chunk_store.blocks import LAYOUT, block_of

LIMIT = 20 * LAYOUT.bytes_per_token
KEYS = st.sampled_from("abcdefgh")


def block(tokens: int) -> KvBlock:
    return KvBlock(LAYOUT, tokens, np.zeros(tokens * LAYOUT.bytes_per_token, np.uint8))


class Cache(RuleBasedStateMachine):
    """Beside a plain list of what was used, the last at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = BlockCache(LIMIT)
        self.used: list[tuple[str, KvBlock]] = []
        self.pins: Counter[str] = Counter()

    def find(self, key: str) -> KvBlock | None:
        return next((block for other, block in self.used if other == key), None)

    def touch(self, key: str, block: KvBlock) -> None:
        self.used = [*(entry for entry in self.used if entry[0] != key), (key, block)]

    @rule(key=KEYS, tokens=st.integers(0, 21))
    def put(self, key: str, tokens: int) -> None:
        new, there = block(tokens), self.find(key)
        pinned = sum(found.bytes for other, found in self.used if self.pins[other])
        fits = there is not None or pinned + new.bytes <= LIMIT
        assert self.cache.put(key, new) == fits
        if there is not None:
            self.touch(key, there)
        elif fits:
            for other in [entry for entry in self.used if not self.pins[entry[0]]]:
                if sum(found.bytes for _, found in self.used) + new.bytes > LIMIT:
                    self.used.remove(other)
            self.touch(key, new)

    @rule(key=KEYS)
    def get(self, key: str) -> None:
        there = self.find(key)
        assert self.cache.get(key) is there
        if there is not None:
            self.touch(key, there)

    @rule(keys=st.lists(KEYS, max_size=4))
    def pin(self, keys: list[str]) -> None:
        """Those that are not there yet, and some twice."""
        self.cache.pin(keys)
        self.pins.update(keys)

    @rule(keys=st.lists(KEYS, max_size=4))
    def unpin(self, keys: list[str]) -> None:
        given = Counter(keys) & self.pins
        self.cache.unpin(given.elements())
        self.pins -= given

    @rule(key=KEYS)
    def drop(self, key: str) -> None:
        self.cache.drop(key)
        self.used = [entry for entry in self.used if entry[0] != key]

    @rule()
    def clear(self) -> None:
        self.cache.clear()
        self.used = []

    @invariant()
    def is_what_was_used_last(self) -> None:
        assert [key for key in "abcdefgh" if key in self.cache] == sorted(key for key, _ in self.used)
        assert len(self.cache) == len(self.used)
        assert self.cache.bytes == sum(found.bytes for _, found in self.used) <= LIMIT


TestCache = Cache.TestCase
TestCache.settings = settings(max_examples=40, stateful_step_count=30)


def test_a_prompt_of_more_chunks_than_there_is_room_for_finds_some_the_next_time():
    """Without pins each would make room for the one behind it, and none would be found, for ever."""
    cache, keys = BlockCache(3 * block(5).bytes), list("abcdef")
    found = []
    for _ in range(3):
        cache.pin(keys)
        found.append([key for key in keys if cache.get(key) is not None])
        for key in keys:
            cache.put(key, block(5))
        cache.unpin(keys)
    assert found == [[], ["a", "b", "c"], ["a", "b", "c"]]


def test_a_block_larger_than_all_the_room_leaves_the_others():
    cache = BlockCache(block(5).bytes)
    cache.put("a", block_of(1))
    assert not cache.put("b", block(6))
    assert "a" in cache
