"""Stores of blocks and of rows: whatever is done to their texts, each holds what a plain list of tokens holds."""

from __future__ import annotations

import functools
import mmap
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mesart.graphs import MesaError, Span
from mesart.graphs.errors import CapacityError
from mesart.runtime.kv.block import KvBlock
from mesart.runtime.kv.paged import PagedStore
from mesart.runtime.kv.slab import SlabStore
from mesart.runtime.kv.store import Array, Positions
from tests.runtime.faults import Interruption
from tests.runtime.kv.oracle import BYTES, LAYERS, Rotation, Text, Tokens, spoil, write

MEMORY = 40 * 32 * BYTES


def slots_by_eights(tokens: int, growing: bool) -> int:
    return ((tokens + tokens // 8 if growing else tokens) // 8 + 1) * 8


def paged(rotation: Rotation, memory: int = MEMORY) -> PagedStore:
    return PagedStore(LAYERS, np.float32, rotation, memory)


def slab(rotation: Rotation, memory: int = MEMORY) -> SlabStore:
    return SlabStore(LAYERS, np.float32, rotation, memory, slots_by_eights)


STORES: dict[str, Callable[..., Any]] = {"paged": paged, "slab": slab}
COUNTS = st.sampled_from([0, 1, 2, 7, 31, 32, 33, 63, 64, 65, 100, 200])
PICKS = st.integers(0, 10**6)


class Store(RuleBasedStateMachine):
    """Some texts, and what may happen to them."""

    make: Callable[..., Any]

    def __init__(self) -> None:
        super().__init__()
        self.rotation = Rotation()
        self.store = self.make(self.rotation)
        self.texts: list[Text] = []
        self.blocks: list[tuple[KvBlock, Tokens, np.ndarray]] = []
        """Read from texts, of which some are gone; what is to be in them."""
        self.rng = np.random.default_rng(0)
        self.all = self.store.free_bytes

    def pick(self, which: int) -> Text:
        return self.texts[which % len(self.texts)]

    def positions(self, count: int) -> np.ndarray:
        return self.rng.integers(0, 500, count)

    def new_tokens(self, count: int) -> Tokens:
        return Tokens.random(self.rng, count)

    def refused(self, call: Callable[[], Any]) -> Any:
        """The result; ``None`` where there was no room, and nothing was taken."""
        free = self.store.free_bytes
        try:
            return call()
        except CapacityError:
            assert self.store.free_bytes == free
            return None

    @initialize(tokens=st.lists(st.sampled_from([7, 33, 64, 100]), min_size=1, max_size=2))
    def begin(self, tokens: list[int]) -> None:
        for count in tokens:
            self.allocate(count + 40)
            self.append(-1, count, False, False)

    @rule(tokens=COUNTS)
    def allocate(self, tokens: int) -> None:
        kv = self.refused(lambda: self.store.allocate(tokens))
        if kv is not None:
            assert kv.room >= tokens
            self.texts.append(Text(kv))

    @precondition(lambda self: self.texts)
    @rule(which=PICKS, tokens=COUNTS)
    def reserve(self, which: int, tokens: int) -> None:
        text = self.pick(which)
        room, missing, free = text.kv.room, self.store.bytes_missing(text.kv, tokens), self.store.free_bytes
        self.refused(lambda: self.store.reserve(text.kv, tokens))
        if missing <= free:
            assert text.kv.room >= max(room, tokens)
            assert self.store.free_bytes == free - missing
            assert self.store.bytes_missing(text.kv, tokens) == 0
        else:
            assert text.kv.room == room

    @precondition(lambda self: self.texts)
    @rule(which=PICKS, tokens=COUNTS, fails=st.booleans(), again=st.booleans())
    def append(self, which: int, tokens: int, fails: bool, again: bool) -> None:
        """A run, or one that fails, or one that succeeds when it is tried again."""
        text = self.pick(which)
        count = min(tokens, text.kv.room - len(text))
        if fails:
            spoil(self.store, text.kv, count)
            self.store.truncate(text.kv, len(text))
        if not fails or again:
            text.append(self.store, self.new_tokens(count), self.positions(count))

    @precondition(lambda self: self.texts)
    @rule(which=PICKS, length=PICKS)
    def truncate(self, which: int, length: int) -> None:
        text = self.pick(which)
        count = length % (len(text) + 1)
        self.store.truncate(text.kv, count)
        text.tokens, text.positions = text.tokens.part(0, count), text.positions[:count]

    @precondition(lambda self: self.texts)
    @rule(which=PICKS, tokens=COUNTS, fails=st.booleans())
    def come_back(self, which: int, tokens: int, fails: bool) -> None:
        """A turn that is undone."""
        text = self.pick(which)
        count = min(tokens, text.kv.room - len(text))
        bring_back = self.store.checkpoint(text.kv, count)
        done = count // 2
        Text(text.kv, text.tokens, text.positions).append(self.store, self.new_tokens(done), self.positions(done))
        if fails:
            spoil(self.store, text.kv, count - done)
        bring_back()

    @precondition(lambda self: self.texts)
    @rule(which=PICKS, length=PICKS)
    def copy(self, which: int, length: int) -> None:
        text = self.pick(which)
        count = length % (len(text) + 1)
        kv = self.refused(lambda: self.store.copy(text.kv, count))
        if kv is not None:
            copied = text.first(count)
            copied.kv = kv
            self.texts.append(copied)

    @precondition(lambda self: self.texts)
    @rule(
        which=PICKS,
        size=st.sampled_from([1, 8, 32, 33, 64]),
        lengths=st.lists(st.integers(1, 70), min_size=1, max_size=3),
        aligned=st.booleans(),
        copied=st.booleans(),
        moved=st.booleans(),
        given_up=st.integers(0, 3),
    )
    def chunks(
        self, which: int, size: int, lengths: list[int], aligned: bool, copied: bool, moved: bool, given_up: int
    ) -> None:
        """Chunks of a text's next tokens, computed side by side, each behind the text's head.

        ``copied``: behind a copy of the head; ``moved``: keys of the text are rotated meanwhile; ``given_up``: so many
        chunks are brought to their places, the others are undone.
        """
        text = self.pick(which)
        start = len(text)
        if aligned:
            self.append(which, -start % 32, False, False)
            start = len(text)
        if size > start:
            return
        self.reserve(which, start + sum(lengths))
        if start + sum(lengths) > text.kv.room:
            return
        head = self.refused(lambda: self.store.copy(text.kv, size)) if copied else text.kv
        spans, chunks = [], []
        for length in lengths:
            spans.append(Span(start, start + length))
            start += length
        for span in spans:
            begin = functools.partial(self.store.begin_chunk, head, size, text.kv, span)
            chunk = self.refused(begin) if head is not None else None
            if chunk is not None:
                begun = text.first(size)
                begun.kv = chunk
                begun.check(self.store)
                chunks.append((begun, span))
        if len(chunks) < len(lengths):
            given_up = 0
        if moved:
            self.rotate(which, 0, 10**6, 0, False)
        for begun, span in chunks:
            count = len(span) // 2
            begun.append(self.store, self.new_tokens(count), self.positions(count))
            spoil(self.store, begun.kv, len(span) - count)
            self.store.truncate(begun.kv, len(begun))
            more = len(span) - count
            begun.append(self.store, self.new_tokens(more), self.positions(more))
        for begun, _ in chunks:
            begun.check(self.store)
        for index, (begun, span) in enumerate(chunks):
            if index < given_up:
                own = self.positions(len(span))
                self.store.end_chunk(begun.kv, size, text.kv, own)
                text.tokens = text.tokens + begun.tokens.part(size, len(begun))
                text.positions = np.concatenate([text.positions, own])
            else:
                self.store.free(begun.kv)
        if copied and head is not None:
            self.store.free(head)
        self.store.truncate(text.kv, len(text))  # what chunks that were given up had written

    @precondition(lambda self: self.texts)
    @rule(which=PICKS, start=PICKS, count=PICKS)
    def read_block(self, which: int, start: int, count: int) -> None:
        """A copy, which no later change of the text reaches."""
        text = self.pick(which)
        start %= len(text) + 1
        stop = start + count % (len(text) - start + 1)
        block = self.store.read_block(text.kv, start, stop)
        assert (block.layout, block.tokens) == (self.store.layout, stop - start)
        assert block.bytes == (stop - start) * BYTES
        part, positions = text.tokens.part(start, stop), text.positions[start:stop]
        self.blocks = [*self.blocks[-2:], (block, part, positions)]

    @precondition(lambda self: self.texts and self.blocks)
    @rule(which=PICKS, block=PICKS, local=st.booleans())
    def append_block(self, which: int, block: int, local: bool) -> None:
        """To any text, rotated on the way or not; a block stays as it is, and may be appended again."""
        text, (read, part, positions) = self.pick(which), self.blocks[block % len(self.blocks)]
        self.reserve(which, len(text) + read.tokens)
        if len(text) + read.tokens > text.kv.room:
            return
        new = positions if local else self.positions(read.tokens)
        self.store.append_block(text.kv, read, positions, new)
        positions = new
        text.tokens, text.positions = text.tokens + part, np.concatenate([text.positions, positions])

    @precondition(lambda self: self.texts)
    @rule(which=PICKS, start=PICKS, count=PICKS, failing=st.integers(0, 4), interrupted=st.booleans())
    def rotate(self, which: int, start: int, count: int, failing: int, interrupted: bool) -> None:
        text = self.pick(which)
        start %= len(text) + 1
        positions = self.positions(count % (len(text) - start + 1))
        positions[:2] = text.positions[start : start + len(positions)][:2]  # some stay
        first = self.rotation.calls
        self.rotation.error = Interruption if interrupted else MesaError
        self.rotation.fails = lambda call: call == first + failing
        try:
            self.store.rotate(text.kv, start, positions)
        except CapacityError:  # of blocks that it shares
            pass
        except (MesaError, Interruption):
            assert failing
        else:
            text.positions = text.positions.copy()
            text.positions[start : start + len(positions)] = positions
        self.rotation.fails = lambda call: False
        assert not text.kv.torn

    @precondition(lambda self: self.texts)
    @rule(which=PICKS)
    def rotate_into_nothing(self, which: int) -> None:
        """The way back fails too: the text says so, and can only be given up."""
        text = self.pick(which)
        first = self.rotation.calls
        self.rotation.error = MesaError
        self.rotation.fails = lambda call: call > first + 1
        try:
            self.store.rotate(text.kv, 0, text.positions + 1)
        except CapacityError:
            pass
        except MesaError:
            assert text.kv.torn
        else:
            assert not len(text)
        self.rotation.fails = lambda call: False
        if text.kv.torn:
            self.free(which, False)

    @precondition(lambda self: self.texts)
    @rule(which=PICKS, fails=st.booleans())
    def free(self, which: int, fails: bool) -> None:
        """Whatever a run that failed has left behind it."""
        text = self.pick(which)
        if fails:
            spoil(self.store, text.kv, text.kv.room - len(text))
        room, free = text.kv.room, self.store.free_bytes
        for _ in range(2):  # twice is once
            self.store.free(text.kv)
        assert free <= self.store.free_bytes <= free + room * BYTES
        assert (text.kv.length, text.kv.room) == (0, 0)
        self.texts = [other for other in self.texts if other is not text]

    @invariant()
    def all_is_there(self) -> None:
        for text in self.texts:
            text.check(self.store)

    @invariant()
    def blocks_stay(self) -> None:
        for block, part, positions in self.blocks:
            for found, right in zip(block.tensors, [*part.standing(positions), *part.values], strict=True):
                assert np.array_equal(found, right)

    @invariant()
    def memory_adds_up(self) -> None:
        rooms = sum(text.kv.room for text in self.texts)
        assert self.store.bytes_in_use == rooms * BYTES
        assert self.store.free_bytes + self.store.bytes_in_use == self.all

    def teardown(self) -> None:
        for text in list(self.texts):
            self.store.free(text.kv)
        assert (self.store.bytes_in_use, self.store.free_bytes) == (0, self.all)
        self.store.close()


class Blocks(Store):
    make = staticmethod(paged)

    @invariant()
    def all_are_numbers(self) -> None:
        """In the blocks of texts: what is not seen has the weight 0, and 0 times NaN is NaN."""
        owned = [block for text in self.texts for block in text.kv.blocks]
        for pool in (*self.store.keys, *self.store.values):
            assert np.isfinite(pool.array[owned]).all()

    @rule()
    def trim(self) -> None:
        """The memory of all other blocks is given back."""
        self.store.trim()
        owned = [block for text in self.texts for block in text.kv.blocks]
        for pool in (*self.store.keys, *self.store.values):
            assert not np.delete(pool.array, owned, axis=0).any()


class Rows(Store):
    make = staticmethod(slab)


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(max_examples=100, stateful_step_count=40)
TestRows = Rows.TestCase
TestRows.settings = settings(max_examples=100, stateful_step_count=40)


@pytest.mark.parametrize("make", STORES.values(), ids=STORES)
class TestMemory:
    def test_what_is_missing_is_said(self, make):
        store = make(Rotation(), memory=10 << 20)
        tokens = (30 << 20) // BYTES
        with pytest.raises(CapacityError, match="larger kv_memory") as error:
            store.allocate(tokens)
        numbers = [float(number) for number in re.findall(r"([\d.]+) MiB", str(error.value))]
        assert numbers == pytest.approx([30, 10, 10, 20], abs=0.11)
        assert "\n" not in str(error.value)
        kv = store.allocate((4 << 20) // BYTES)
        with pytest.raises(CapacityError) as error:
            store.reserve(kv, tokens)
        numbers = [float(number) for number in re.findall(r"([\d.]+) MiB", str(error.value))]
        assert numbers == pytest.approx([26, 6, 10, 20], abs=0.11)

    def test_what_is_freed_can_be_taken_again(self, make):
        store = make(Rotation())
        most = store.free_bytes // BYTES
        for _ in range(3):
            texts = [store.allocate(most // 4) for _ in range(4)]
            assert store.free_bytes < 32 * BYTES
            with pytest.raises(CapacityError):
                store.allocate(32)
            for kv in texts:
                store.free(kv)
            assert (store.free_bytes, store.bytes_in_use) == (most * BYTES, 0)

    def test_a_turn_that_is_promised_its_bytes_gets_them(self, make):
        """However much is added at a time, it takes no more on its way than it said it would in the end."""
        store = make(Rotation())
        most = store.free_bytes // BYTES
        texts = [store.allocate(0) for _ in range(4)]
        promised = [store.bytes_missing(kv, most // 4) for kv in texts]
        assert sum(promised) <= store.free_bytes
        for tokens in range(0, most // 4 + 1, 7):
            for kv in texts:
                store.reserve(kv, tokens)
        for kv in texts:
            store.reserve(kv, most // 4)

    def test_what_a_failed_run_left_is_gone_from_what_is_used_again(self, make):
        store, rng = make(Rotation()), np.random.default_rng(0)
        for _ in range(3):
            text = Text(store.allocate(150))
            text.append(store, Tokens.random(rng, 70), np.arange(70))
            spoil(store, text.kv, 80)
            store.truncate(text.kv, 40)
            text = Text(text.kv, text.tokens.part(0, 40), text.positions[:40])
            text.check(store)
            text.append(store, Tokens.random(rng, 20), np.arange(40, 60))
            text.check(store)
            spoil(store, text.kv, 90)
            store.free(text.kv)
            fresh = Text(store.allocate(150))
            fresh.append(store, Tokens.random(rng, 33), np.arange(33))
            fresh.check(store)
            if isinstance(store, PagedStore):
                assert not any(pool.array[fresh.kv.blocks[2:]].any() for pool in (*store.keys, *store.values))
                assert not any(pool.array[fresh.kv.blocks[1], :, 1:].any() for pool in (*store.keys, *store.values))
            store.free(fresh.kv)


class TestBlocksOfSeveralTexts:
    def test_chunks_between_blocks_lie_where_they_stay(self):
        """Nothing is copied: head and chunk begin at blocks, and the chunk's text is made of its text's own."""
        store, rng = paged(Rotation()), np.random.default_rng(0)
        text = Text(store.allocate(160))
        text.append(store, Tokens.random(rng, 64), np.arange(64))
        taken = store.bytes_in_use
        chunk = store.begin_chunk(text.kv, 32, text.kv, Span(64, 160))
        assert chunk.blocks.tolist() == [*text.kv.blocks[:1], *text.kv.blocks[2:]]
        assert store.bytes_in_use == taken
        chunk = store.begin_chunk(text.kv, 31, text.kv, Span(64, 160))
        assert not set(chunk.blocks) & set(text.kv.blocks)
        assert store.bytes_in_use > taken

    def test_rotating_a_shared_block_copies_it_first(self):
        store, rng = paged(Rotation()), np.random.default_rng(0)
        text = Text(store.allocate(64))
        text.append(store, Tokens.random(rng, 32), np.arange(32))
        chunk = text.first(32)
        chunk.kv = store.begin_chunk(text.kv, 32, text.kv, Span(32, 64))
        before = store.bytes_in_use
        store.rotate(text.kv, 0, np.arange(32) + 9)
        text.positions = np.arange(32) + 9
        text.check(store)
        chunk.check(store)
        assert store.bytes_in_use == before + 32 * BYTES
        store.free(chunk.kv)
        assert store.bytes_in_use == before

    def test_slots_that_stay_keep_their_bits(self):
        """Blocks are rotated whole, and rotating by nothing may round."""

        class Rounding(Rotation):
            def __call__(self, layer: int, keys: Array, old: Positions, new: Positions) -> Array:
                return super().__call__(layer, keys, old, new) * np.float32(1.001)

        store, rng = paged(Rounding()), np.random.default_rng(0)
        text = Text(store.allocate(96))
        text.append(store, Tokens.random(rng, 90), np.arange(90))
        before, _ = store.read(text.kv)
        store.rotate(text.kv, 40, np.arange(40, 50) + 7)
        after, _ = store.read(text.kv)
        still = np.r_[:40, 50:90]
        assert all(np.array_equal(x[:, still], y[:, still]) for x, y in zip(before, after, strict=True))
        assert not np.array_equal(before[0][:, 40:50], after[0][:, 40:50])

    def test_no_address_space_is_one_line(self, monkeypatch):
        def refuse(*arguments: Any, **options: Any) -> Any:
            raise OSError("Cannot allocate memory")

        monkeypatch.setattr(mmap, "mmap", refuse)
        with pytest.raises(MesaError, match="no address space for 40 blocks .*smaller kv_memory") as error:
            paged(Rotation())
        assert "\n" not in str(error.value)

    def test_a_pool_larger_than_memory_takes_none_before_it_is_written(self):
        store = paged(Rotation(), memory=1 << 40)
        text = Text(store.allocate(100))
        text.append(store, Tokens.random(np.random.default_rng(0), 100), np.arange(100))
        text.check(store)
        store.close()


class TestRowsOfASlab:
    def test_rows_that_are_free_are_taken_again(self):
        store = slab(Rotation())
        texts = [store.allocate(10) for _ in range(4)]
        assert [kv.row for kv in texts] == [0, 1, 2, 3]
        store.free(texts[1])
        assert store.allocate(10).row == 1

    def test_texts_that_come_copy_the_others_seldom(self):
        store, rng = slab(Rotation(), memory=1 << 22), np.random.default_rng(0)
        text = Text(store.allocate(20))
        text.append(store, Tokens.random(rng, 15), np.arange(15))
        moved = set()
        for _ in range(100):
            store.allocate(10)
            text.check(store)
            moved.add(text.kv.slab.keys[0].ctypes.data)
        assert len(moved) < 15

    def test_growing_without_memory_leaves_all_texts(self, monkeypatch):
        store, rng = slab(Rotation()), np.random.default_rng(0)
        texts = [Text(store.allocate(20)) for _ in range(2)]
        for text in texts:
            text.append(store, Tokens.random(rng, 15), np.arange(15))
        zeros, left = np.zeros, 0

        def short(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise MemoryError
            return zeros(*arguments, **options)

        for calls in range(6):
            for grow in (lambda: store.reserve(texts[0].kv, 100), lambda: store.allocate(10)):
                with monkeypatch.context() as patch:
                    left = calls
                    patch.setattr(np, "zeros", short)
                    with pytest.raises(MemoryError):
                        grow()
                assert store.bytes_in_use == 40 * BYTES
                for text in texts:
                    text.check(store)
        store.reserve(texts[0].kv, 100)
        for text in texts:
            text.check(store)

    def test_room_for_one_token_more_than_any_text_has(self):
        """Where rows run together, one that has nothing to do writes behind its text."""
        store = slab(Rotation())
        kv = store.allocate(0)
        for tokens in range(100):
            store.reserve(kv, tokens)
            assert kv.slab.capacity > tokens


def test_writing_takes_what_engines_write():
    """The oracle's own hands: what they write is what the store reads."""
    for make in STORES.values():
        store, rng = make(Rotation()), np.random.default_rng(0)
        kv, tokens = store.allocate(40), Tokens.random(rng, 40)
        write(store, kv, 0, tokens.keys, tokens.values)
        kv.append(np.zeros(40, np.int64))
        keys, values = store.read(kv)
        for found, right in ((keys, tokens.keys), (values, tokens.values)):
            assert all(np.array_equal(ours, theirs) for ours, theirs in zip(found, right, strict=True))
