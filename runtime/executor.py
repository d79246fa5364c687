"""Executes plans: head, chunks in batches, place, tail in slices, step; the same for every backend."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from mesart.graphs.errors import MesaError
from mesart.graphs.manifest import Manifest, Role
from mesart.graphs.plan import Plan, Span, query_scales
from mesart.graphs.stairs import ORDINARY
from mesart.runtime.backends import STORAGE, Array, Graph
from mesart.runtime.cache import MASKED, Cache, move_keys, past_feeds
from mesart.runtime.graphs import RoleGraphs


class Executor:
    """A live batch of prompts on one set of graphs."""

    def __init__(self, manifest: Manifest, graphs: RoleGraphs) -> None:
        self.manifest, self.config, self._graphs = manifest, manifest.config, graphs
        self._places: dict[str, Graph] = {x.place: graphs.place(x.place) for x in manifest.layers if x.place}
        self._storage = STORAGE[manifest.dtype]
        self.cache = self._new_cache(1, 0)

    def _new_cache(self, batch: int, tokens: int) -> Cache:
        capacity = self._graphs.capacity(tokens) if tokens else 0
        return Cache(self.manifest.layers, self._storage, batch, capacity)

    def prefill(self, prompts: Sequence[Sequence[int]], *, all_logits: bool = False) -> list[NDArray[np.float32]]:
        """Computes prompts from nothing; what was in the cache is forgotten. Logits ``[S, V]`` of each row."""
        for prompt in prompts:
            self._check_length(len(prompt))
        self.cache = self._new_cache(len(prompts), max(len(prompt) for prompt in prompts))
        return [self._extend(row, prompt, all_logits) for row, prompt in enumerate(prompts)]

    def extend(self, turns: Sequence[Sequence[int]], *, all_logits: bool = False) -> list[NDArray[np.float32]]:
        """Appends tokens to every row. Logits ``[S, V]`` of each row's tail, or ``[1, V]`` of its last token."""
        for row, turn in zip(self.cache.rows, turns, strict=True):
            self._check_length(len(row.tokens) + len(turn))
        return [self._extend(index, turn, all_logits) for index, turn in enumerate(turns)]

    def _extend(self, index: int, ids: Sequence[int], all_logits: bool) -> NDArray[np.float32]:
        if all_logits and self._graphs.last_logits_only:
            raise MesaError("the specialised graphs give the last logits only, no all_logits; load the symbolic graph")
        row = self.cache.rows[index]
        plan = Plan.extend(self.config, row.stairs, len(row.tokens), len(ids))
        tokens = [*row.tokens, *map(int, ids)]
        self._make_room(plan.length)
        kept = len(row.tokens)
        # A plan that starts again at 0 computes what is cached once more, as the head, to the same values.
        standing = row.stairs.positions(0, plan.start)  # where each key of the cache stands now
        target = plan.stairs.positions(0, plan.tail.start)
        moved = False
        try:
            if plan.head is not None:
                self._head(index, tokens, plan.head)
                standing = ORDINARY.positions(0, len(plan.head))
            if plan.chunks:
                standing = self._chunks(index, tokens, plan, standing)
            moved = True
            self.cache.move(index, standing, target, self._places)
            logits = self._tail(index, tokens, plan, all_logits=all_logits)
        except BaseException:
            # Nothing is lost: the row is again what it was before this turn.
            self.cache.forget(index, kept)
            if moved:
                self.cache.move(index, target[:kept], row.stairs.positions(0, kept), self._places)
            raise
        row.tokens, row.stairs = tokens, plan.stairs
        return logits

    def step(self, tokens: Sequence[int | None]) -> NDArray[np.float32]:
        """Appends one token to each row, nothing to a row whose token is ``None``. Logits ``[B, V]`` of the next."""
        rows = range(len(self.cache.rows))
        self._make_room(1 + max(len(row.tokens) for row in self.cache.rows))
        together = self._graphs.step_batch or len(rows)
        return np.concatenate([self._step(tokens, rows[i : i + together]) for i in range(0, len(rows), together)])

    def _step(self, tokens: Sequence[int | None], rows: range) -> NDArray[np.float32]:
        cache, part = self.cache, slice(rows.start, rows.stop)
        positions, scales = [], []
        for index in rows:
            row = cache.rows[index]
            length = len(row.tokens)
            plan = Plan.extend(self.config, row.stairs, length, 1)
            if plan.stairs != row.stairs:
                old, new = row.stairs.positions(0, length), plan.stairs.positions(0, length)
                cache.move(index, old, new, self._places)
                row.stairs = plan.stairs
            positions.append(plan.stairs.position(length))
            scales.append(query_scales(self.config, Span(length, length + 1)))
        logits, keys, values = self._run(
            "step",
            np.array([[tokens[index] or 0] for index in rows], dtype=np.int64),
            np.array(positions, dtype=np.int64)[:, None],
            cache.mask[part],
            past_feeds([k[part] for k in cache.keys], [v[part] for v in cache.values]),
            np.array(scales),
        )
        for place, index in enumerate(rows):
            token = tokens[index]
            if token is not None:
                row = cache.rows[index]
                cache.write(index, len(row.tokens), [k[place] for k in keys], [v[place] for v in values])
                row.tokens.append(int(token))
        return np.array(logits[:, -1])  # the engine writes its next result to the same place

    def _make_room(self, tokens: int) -> None:
        if tokens > self.cache.capacity:
            self.cache.grow(self._graphs.capacity(tokens, growing=True))

    def _head(self, index: int, tokens: Sequence[int], span: Span) -> None:
        ids, positions = _ids(tokens, [span]), ORDINARY.positions(span.start, span.stop)[None]
        past = [np.zeros((1, x.kv_heads, 0, x.key_size), self._storage) for x in self.manifest.layers]
        past_values = [np.zeros((1, x.kv_heads, 0, x.value_size), self._storage) for x in self.manifest.layers]
        none = np.zeros((1, 1, 1, 0), np.float32)
        _, keys, values = self._run("head", ids, positions, none, past_feeds(past, past_values))
        self.cache.write(index, span.start, [k[0] for k in keys], [v[0] for v in values])

    def _chunks(self, index: int, tokens: Sequence[int], plan: Plan, standing: NDArray[np.int64]) -> NDArray[np.int64]:
        """Computes the chunks at their local positions; returns where every key of the cache stands then."""
        cache, size = self.cache, self.config.head_length
        local = ORDINARY.positions(0, size)
        head_keys = [k[index : index + 1, :, :size] for k in cache.keys]
        if not np.array_equal(standing[:size], local):  # a later turn: the head stands on stairs
            head_keys = [
                keys
                if info.place is None
                else np.array(move_keys(self._places[info.place], keys, standing[:size], local))
                for keys, info in zip(head_keys, cache.layers, strict=True)
            ]
        head_values = [v[index : index + 1, :, :size] for v in cache.values]
        limit = self._graphs.chunk_batch(self.config.chunk_length)
        for batch in _batches(plan.chunks, limit):
            count = len(batch)
            positions = np.tile(plan.chunk_positions(batch[0]), (count, 1))
            _, keys, values = self._run(
                "chunk",
                _ids(tokens, batch),
                positions,
                np.zeros((count, 1, 1, size), np.float32),
                past_feeds(
                    [np.repeat(key, count, axis=0) for key in head_keys],
                    [np.repeat(value, count, axis=0) for value in head_values],
                ),
            )
            for place, span in enumerate(batch):
                cache.write(index, span.start, [k[place] for k in keys], [v[place] for v in values])
            standing = np.concatenate([standing, positions.reshape(-1)])
        return standing

    def _tail(self, index: int, tokens: Sequence[int], plan: Plan, *, all_logits: bool) -> NDArray[np.float32]:
        """The tail, a slice at a time: each sees all before it, so that slicing changes nothing."""
        cache = self.cache
        length = self._graphs.slice_length(cache.capacity)
        pieces = []
        for start in range(plan.tail.start, plan.tail.stop, length):
            span = Span(start, min(start + length, plan.tail.stop))
            wanted = range(len(span)) if all_logits else (len(span) - 1,)
            logits, keys, values = self._run(
                "tail",
                _ids(tokens, [span]),
                plan.stairs.positions(span.start, span.stop)[None],
                cache.mask[index : index + 1],
                cache.past(index),
                plan.query_scales(span)[None],
                wanted,
            )
            if all_logits or span.stop == plan.tail.stop:
                pieces.append(np.array(logits[0]))
            cache.write(index, span.start, [k[0] for k in keys], [v[0] for v in values])
        return np.concatenate(pieces)

    def _run(
        self,
        role: Role,
        ids: NDArray[np.int64],
        positions: NDArray[np.int64],
        past_mask: NDArray[np.float32],
        past: dict[str, Array],
        scales: NDArray[np.float32] | None = None,
        wanted: Sequence[int] | None = None,
    ) -> tuple[Array, list[Array], list[Array]]:
        """Runs a role on ``[B, S]`` new tokens, filled up at the end to what the graph takes."""
        batch, new = ids.shape
        padding = ((0, 0), (0, self._graphs.padded(role, new) - new))
        ids, positions = np.pad(ids, padding), np.pad(positions, padding)
        scales = np.pad(np.ones((batch, new), np.float32) if scales is None else scales, padding, constant_values=1)
        size = ids.shape[1]
        causal = np.triu(np.full((size, size), MASKED), 1)
        feeds: dict[str, Array] = {
            "input_ids": ids,
            "position_ids": positions,
            "past_mask": past_mask,
            "new_mask": np.broadcast_to(causal, (batch, 1, size, size)).copy(),
            "query_scale": scales[:, None, :, None],
            "logits_at": np.array(wanted if wanted is not None else [new - 1], np.int64),
            **past,
        }
        bucket = self._bucket(past_mask.shape[-1])
        outputs = self._graphs.run(role, bucket, feeds)
        if np.isnan(outputs["logits"]).any():
            raise MesaError(
                f"NaN in the logits of the {role}: the weights are broken, or {self.manifest.dtype} overflows "
                "(export with another --dtype); `mesart validate` names the layer"
            )
        count = range(len(self.manifest.layers))
        return (
            outputs["logits"],
            [outputs[f"present.{i}.key"][:, :, :new] for i in count],
            [outputs[f"present.{i}.value"][:, :, :new] for i in count],
        )

    def _bucket(self, capacity: int) -> int:
        return next((b.chunks for b in self.manifest.buckets if b.max_tokens >= capacity), -1)

    def _check_length(self, tokens: int) -> None:
        largest = self.manifest.buckets[-1].max_tokens
        if tokens > largest:
            raise MesaError(
                f"a prompt of {tokens} tokens is longer than the largest bucket of this bundle, {largest} tokens; "
                f"export again with --max-tokens {tokens}"
            )


def _ids(tokens: Sequence[int], spans: Sequence[Span]) -> NDArray[np.int64]:
    return np.array([tokens[span.start : span.stop] for span in spans], dtype=np.int64)


def _batches(chunks: Sequence[Span], limit: int) -> list[list[Span]]:
    """Chunks of one length together, at most ``limit``."""
    batches = []
    for _, same in groupby(chunks, key=len):
        group = list(same)
        batches += [group[i : i + limit] for i in range(0, len(group), limit)]
    return batches


__all__ = ["Executor"]
