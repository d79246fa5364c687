"""A store that drops keys: the first tokens and the last ones stay, in as much memory as they take."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mesart.graphs.method.sink_window import SinkWindow
from mesart.runtime.kv.ring import RingStore
from tests.runtime.kv.oracle import BYTES, LAYERS, Rotation, Text, Tokens

STEPS = st.lists(
    st.tuples(st.sampled_from(["append", "append", "append", "undo"]), st.integers(1, 40)), min_size=1, max_size=25
)


def slots_by_eights(tokens: int, growing: bool) -> int:
    return ((tokens + tokens // 8 if growing else tokens) // 8 + 1) * 8


def ring(window: int, sinks: int, memory: int = 1 << 20) -> tuple[RingStore, SinkWindow]:
    sink_window = SinkWindow(window, sinks, sinks, 0, sinks_at_zero=True)
    return RingStore(LAYERS, np.float32, Rotation(), memory, slots_by_eights, sink_window), sink_window


def kept(length: int, sink_window: SinkWindow) -> list[int]:
    return [token for token in range(length) if token < sink_window.sinks or length - token <= sink_window.window]


def append(store: RingStore, text: Text, count: int, sink_window: SinkWindow, rng: np.random.Generator) -> None:
    """In slices, of which none drops what it sees."""
    while count:
        part = min(count, sink_window.window)
        start = len(text)
        text.append(store, Tokens.random(rng, part), np.arange(start, start + part))
        count -= part


def check(store: RingStore, text: Text, sink_window: SinkWindow) -> None:
    text.check(store, kept(len(text), sink_window))
    used = store.slots_in_use(text.kv)
    assert used == min(len(text), sink_window.slots)
    positions = store.slot_positions(text.kv, used)
    assert sorted(positions.tolist()) == kept(len(text), sink_window), "each slot in use tells where its key stands"
    assert positions[: sink_window.sinks].tolist() == list(range(min(used, sink_window.sinks)))


@given(
    window=st.integers(1, 20), sinks=st.integers(0, 6), texts=st.integers(1, 3), steps=STEPS, seed=st.integers(0, 99)
)
def test_holds_the_first_and_the_last_tokens(window, sinks, texts, steps, seed):
    store, sink_window = ring(window, sinks)
    rng, free = np.random.default_rng(seed), store.free_bytes
    live = [Text(store.allocate(0)) for _ in range(texts)]
    for index, (what, count) in enumerate(steps):
        text = live[index % texts]
        missing, before = store.bytes_missing(text.kv, len(text) + count), store.free_bytes
        store.reserve(text.kv, len(text) + count)
        assert before - store.free_bytes == missing
        if what == "append":
            append(store, text, count, sink_window, rng)
        else:
            bring_back: Any = store.checkpoint(text.kv, count)
            for more in (int(rng.integers(0, count + 1)),):
                append(store, Text(text.kv, text.tokens, text.positions), more, sink_window, rng)
            bring_back()
            assert not text.kv.torn
        for other in live:
            check(store, other, sink_window)
        assert store.bytes_in_use <= texts * sink_window.slots * BYTES
        assert store.bytes_in_use + store.free_bytes == free
    for text in live:
        store.free(text.kv)
    assert store.free_bytes == free


def test_no_text_takes_more_than_its_slots():
    store, sink_window = ring(16, 4, memory=2 * 20 * BYTES)
    texts = [Text(store.allocate(10**6)) for _ in range(2)]
    assert store.free_bytes == 0
    for text in texts:
        assert store.bytes_missing(text.kv, 10**9) == 0
        store.reserve(text.kv, 10**9)
        append(store, text, 300, sink_window, np.random.default_rng(0))
        check(store, text, sink_window)
        assert text.kv.slab.capacity == sink_window.slots
