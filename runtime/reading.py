"""The computing of one turn: its plan's steps, cut into segments of whatever size there is time for."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from collections.abc import Sequence as Tokens

import numpy as np
from numpy.typing import NDArray

from mesart.graphs.bundle.manifest import Manifest
from mesart.graphs.bundle.names import Phase
from mesart.graphs.errors import CapacityError, InputError
from mesart.graphs.method.plan import Chunk, Plan, Prefix, Rerotate, Span, TailSlice, query_scales
from mesart.graphs.method.stairs import ORDINARY
from mesart.runtime.chunk_store.store import Tier
from mesart.runtime.chunk_store.stored import ChunksBehind, StoredChunks
from mesart.runtime.kv.store import Kv, KvStore
from mesart.runtime.runners.runner import Logits, Runner, Segment
from mesart.runtime.scheduler import Budget
from mesart.runtime.sequence import Sequence
from mesart.runtime.usage import CachedTokens, Usage


class Reading:
    """Appends tokens to a text. Says what to run next, and is told what came of it.

    Until :meth:`commit` everything can be undone.

    Args:
        ids: int64 ``[S]``, at least one.
        wanted: of how many of the last of them the logits are wanted; with none, the tail is not computed.
        edges: where chunks of a first prompt have to begin and end.
        stored: chunks that were computed before; those that are computed now are put there.
    """

    def __init__(
        self,
        manifest: Manifest,
        store: KvStore,
        runner: Runner,
        text: Sequence,
        ids: NDArray[np.int64],
        wanted: int,
        *,
        edges: Tokens[int] = (),
        stored: StoredChunks | None = None,
    ) -> None:
        self._config, self._store, self._runner, self._text = manifest.config, store, runner, text
        self.plan = plan_of_turn(manifest, text, len(ids), edges)
        self._shown = text.shown
        self._ids = np.concatenate([text.ids, ids])
        self._steps = deque(step for step in self.plan.steps() if wanted or isinstance(step, (Prefix, Chunk)))
        self._wanted = wanted
        self._found: Counter[Tier] = Counter()
        self._logits: list[Logits] = []
        self._old = text.require_kv()
        self._before = len(text), text.stairs, text.chunks
        self._chunks: list[tuple[Chunk, Kv]] = []  # those that are being computed
        self._head: Kv | None = None  # what they begin with, where that is a copy
        self._head_is_stored = False
        if self.plan.start < len(text):  # all of it is computed again
            self._kv = store.allocate(self.plan.length)
            self._bring_back: Callable[[], None] = lambda: None
        else:
            self._kv = self._old
            store.reserve(self._kv, self.plan.length)
            self._bring_back = store.checkpoint(self._kv, len(ids))
        text.shown = []
        self.rotated = 0
        """Keys that the last :meth:`next` has rotated."""
        self.restored = False
        """Whether the last :meth:`next` has found a head or a chunk."""
        self._stored: ChunksBehind | None = None
        if stored is not None and self.plan.chunks:
            self._stored = stored.behind(self._ids[: self._config.head_length])
            self._stored.pin([self._stored.head_key(), *map(self._key, self.plan.chunks)])

    @property
    def is_done(self) -> bool:
        return not self._steps

    @property
    def is_decoding(self) -> bool:
        """Whether all there is to compute is one token."""
        return self.plan.start > 0 and self.plan.length - self.plan.start == 1

    @property
    def logits(self) -> Logits:
        """Float32 ``[wanted, V]``, once all is computed."""
        return np.concatenate(self._logits) if self._logits else np.zeros((0, 0), np.float32)

    @property
    def progress(self) -> tuple[int, int]:
        """Tokens whose keys are there, of all of them."""
        chunks = sum(kv.length - self._config.head_length for _, kv in self._chunks)
        return self._kv.length + chunks, self.plan.length

    @property
    def usage(self) -> Usage:
        """What becomes of the text's tokens; of those so far that are there."""
        found = CachedTokens(self.plan.start, self._found["memory"], self._found["disk"])
        return Usage(self.plan.length, self._kv.length - found.total, found)

    def next(self, budget: Budget) -> list[Segment]:
        """What to run next, taken from the budget; nothing where keys were rotated, or found, or no time is left."""
        self.rotated, self.restored = 0, False
        while isinstance(step := self._steps[0], Rerotate):
            self._rotate(step, budget)
            if self.rotated:
                return []
        if not isinstance(step, TailSlice) and self._restore(step):
            self.restored = True
            return []
        if isinstance(step, Chunk):
            return self._next_chunks(budget)
        span = step.span
        start = max(self._kv.length, span.start)
        phase: Phase = "prefix" if isinstance(step, Prefix) else "decode" if self.is_decoding else "tail"
        # A text's next token is what the budget was made beside.
        count = 1 if phase == "decode" else self._slice(phase, start, span.stop - start, budget)
        if not count:
            return []
        stop = start + count
        stairs = step.stairs if isinstance(step, TailSlice) else ORDINARY
        return [self._segment(phase, self._kv, Span(start, stop), stairs.positions(start, stop))]

    def done(self, segments: list[Segment], logits: list[Logits]) -> None:
        """What :meth:`next` gave has been run."""
        self._logits += [part for part in logits if len(part)]
        step = self._steps[0]
        if isinstance(step, Chunk):
            self._end_chunks()
        elif segments and self._kv.length == step.span.stop:  # type: ignore[union-attr]
            if isinstance(step, Prefix) and self._stored is not None:
                self._stored.put(self._stored.head_key(), self._store.read_block(self._kv, 0, len(step.span)))
            self._end_step()

    def _end_step(self) -> None:
        """The first step is done."""
        self._steps.popleft()
        if not self._steps or not isinstance(self._steps[0], (Prefix, Chunk)):
            self.release()
        if self.is_done:
            self._text.append(self._ids[len(self._text) : self._kv.length])
            self._text.chunks = self._chunks_kept()
            self._text.stairs = self.plan.stairs
            self._text.kv = self._kv

    def _chunks_kept(self) -> tuple[Span, ...]:
        """The chunks of the text's first prompt, if their keys have not been rotated again since."""
        if self.plan.start == 0:
            return self.plan.chunks
        return self._text.chunks if self.plan.stairs == self._text.stairs and not self.plan.chunks else ()

    def commit(self) -> None:
        """It cannot be undone any more, and what was kept for that is freed."""
        if self._old is not self._kv:
            self._store.free(self._old)
        self._old = self._kv

    def undo(self) -> None:
        """The text is as it was before, also after the last step."""
        for _, chunk in self._chunks:
            self._store.free(chunk)
        self._chunks.clear()
        self.release()
        self._steps.clear()
        length, stairs, chunks = self._before
        self._text.truncate(length)
        self._text.shown = self._shown
        self._text.stairs, self._text.chunks, self._text.kv = stairs, chunks, self._old
        if self._old is not self._kv:
            self._store.free(self._kv)
            return
        self._bring_back()
        if not self._kv.torn:
            kv = self._kv
            kv.torn = True  # until its keys are where they were
            self._store.rotate(kv, 0, stairs.positions(0, length))
            kv.torn = False

    def _rotate(self, step: Rerotate, budget: Budget) -> None:
        """Rotates some of the keys that are not yet where they are to be, from the last to the first."""
        positions = step.stairs.positions(0, step.stop)
        wrong = np.flatnonzero(self._kv.positions[: step.stop] != positions)
        if len(wrong):
            start = max(int(wrong[0]), int(wrong[-1]) + 1 - budget.take_keys())
            self._store.rotate(self._kv, start, positions[start : int(wrong[-1]) + 1])
            self.rotated = int(wrong[-1]) + 1 - start
            if int(wrong[0]) < start:
                return
        self._end_step()

    def _final(self, span: Span) -> NDArray[np.int64]:
        """Where tokens stand when the tail runs."""
        return self.plan.stairs.positions(span.start, span.stop)

    def _key(self, chunk: Span) -> str:
        assert self._stored is not None
        return self._stored.chunk_key(self._ids[chunk.start : chunk.stop])

    def _restore(self, step: Prefix | Chunk) -> bool:
        """Whether a head or chunk that has not begun was in the store, and now is in the text."""
        if self._stored is None or self._chunks or self._kv.length > step.span.start:
            return False
        is_head = isinstance(step, Prefix)
        found = self._stored.find(self._stored.head_key() if is_head else self._key(step.span), len(step.span))
        if found is None:
            return False
        following = self._steps[1] if len(self._steps) > 1 else None
        if isinstance(following, Chunk):
            self._stored.expect(self._key(following.span), len(following.span))
        block, tier = found
        first = 0 if is_head else self._config.head_length
        local = ORDINARY.positions(first, first + block.tokens)
        # A head stays there until no chunk behind it is to be computed any more.
        final = local if is_head else self._final(step.span)
        self._store.append_block(self._kv, block, local, final)
        self._found[tier] += block.tokens
        self._end_step()
        return True

    def _next_chunks(self, budget: Budget) -> list[Segment]:
        """The next slice of a chunk that has begun, or as many whole chunks as there is time for."""
        if not self._chunks:
            self._begin_chunks(budget)
        segments, size = [], self._config.head_length
        for chunk, kv in self._chunks:
            done = kv.length - size
            if done == len(chunk.span):
                continue
            count = self._slice("chunk", kv.length, len(chunk.span) - done, budget)
            if not count:
                break
            span = Span(chunk.span.start + done, chunk.span.start + done + count)
            segments.append(self._segment("chunk", kv, span, ORDINARY.positions(size + done, size + done + count)))
        return segments

    def _begin_chunks(self, budget: Budget) -> None:
        size = self._config.head_length
        keys: set[str] = set()
        left = budget.tokens(size)
        for step in self._steps:
            if not isinstance(step, Chunk) or (self._chunks and len(step.span) > left):
                break
            if self._stored is not None:
                key = self._key(step.span)
                if self._chunks and (key in keys or self._stored.has(key)):
                    break  # it will be found, once those before it are done
                keys.add(key)
            head = self._local_head()
            try:
                chunk = self._store.begin_chunk(head, size, self._kv, step.span)
            except CapacityError:
                if not self._chunks:
                    raise
                break  # fewer at a time
            self._chunks.append((step, chunk))
            left -= len(step.span)

    def _end_chunks(self) -> None:
        """Brings what is computed to its place, if that is all that was begun."""
        size = self._config.head_length
        if any(kv.length - size < len(chunk.span) for chunk, kv in self._chunks):
            return
        while self._chunks:
            chunk, kv = self._chunks[0]
            if self._stored is not None and (self.plan.head is not None or self._head_is_stored):
                self._stored.put(self._key(chunk.span), self._store.read_block(kv, size, kv.length))
            self._store.end_chunk(kv, size, self._kv, self._final(chunk.span))
            self._chunks.pop(0)
            self._end_step()

    def _local_head(self) -> Kv:
        """The text's head at its ordinary positions: chunks see it there, in later turns too.

        To the last bit it is what a first prompt's is only as that, or from the store: else it was computed with the
        rest of a short text, or rotated, and what follows from it is this text's alone.
        """
        size = self._config.head_length
        if self.plan.head is not None:
            return self._kv
        if self._head is None:
            local = ORDINARY.positions(0, size)
            found = None if self._stored is None else self._stored.find(self._stored.head_key(), size)
            if found is None and np.array_equal(self._kv.positions[:size], local):
                return self._kv
            head = self._store.copy(self._kv, size) if found is None else self._store.allocate(size)
            try:
                if found is None:
                    self._store.rotate(head, 0, local)
                else:
                    self._store.append_block(head, found[0], local, local)
            except BaseException:
                self._store.free(head)
                raise
            self._head, self._head_is_stored = head, found is not None
        return self._head

    def release(self) -> None:
        """Frees what only chunks need."""
        if self._head is not None:
            self._store.free(self._head)
            self._head = None
        if self._stored is not None:
            self._stored.release()

    def _slice(self, phase: Phase, past: int, left: int, budget: Budget) -> int:
        """Tokens of the next run, of ``left``: fewer than there is time for only where the graph takes no more."""
        most = min(left, self._runner.slice_length(phase, past))
        if not self._runner.whole_slices:
            return budget.take(most, past)
        budget.spend(most, past)
        return most

    def _segment(self, phase: Phase, kv: Kv, span: Span, positions: NDArray[np.int64]) -> Segment:
        first_wanted = self.plan.length - self._wanted
        tail = phase in ("tail", "decode")
        scales = query_scales(self._config, span) if tail else np.ones(len(span), np.float32)
        wanted = max(0, span.stop - max(span.start, first_wanted)) if tail else 0
        return Segment(phase, kv, self._ids[span.start : span.stop], positions, scales, wanted)


def plan_of_turn(manifest: Manifest, text: Sequence | None, tokens: int, edges: Tokens[int] = ()) -> Plan:
    """The plan of a turn: of ``text``, or with ``None`` of a new one, whose chunks may have to lie between edges.

    Raises:
        MesaError: a first prompt longer than the largest bucket.
    """
    if text is None or not len(text):
        largest = manifest.buckets[-1].max_tokens
        if tokens > largest:
            if tokens <= manifest.max_tokens:
                raise InputError(
                    f"a prompt of {tokens} tokens is longer than the largest bucket that engines were built for, "
                    f"{largest} tokens; run `mesart build` with --max-tokens {tokens}, or without it"
                )
            raise InputError(
                f"a prompt of {tokens} tokens is longer than the largest bucket of this bundle, {largest} tokens; "
                f"export again with --max-tokens {tokens}"
            )
        return Plan.of(manifest.config, tokens, edges)
    return Plan.extend(manifest.config, text.stairs, len(text), tokens)


__all__ = ["Reading", "plan_of_turn"]
