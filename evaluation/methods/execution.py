"""The one executor of all methods: a run of tokens through the model, block by block of queries, part by part.

No more scores than those of one block with the keys that it sees are alive at a time, on fused kernels not even those.

Axes: H heads, K key-value heads, G = H / K, S new tokens, Q queries of a block, N keys, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mesart.evaluation.methods.attention import Merged, attend
from mesart.evaluation.methods.cache import CacheRows, LayerCache
from mesart.evaluation.methods.method import Indices, Part, Positions, Rule, arange
from mesart.evaluation.methods.rotation import Angles, angles_of, turn
from mesart.evaluation.methods.wrapped import WrappedModel
from mesart.graphs.model.rotary import LayerSpec

QUERY_BLOCK = 256
"""Queries that are computed together."""


@dataclass(frozen=True)
class KeyRange:
    """Consecutive keys that a block sees: all queries all of them, or by a mask."""

    start: int
    stop: int
    first: Indices | None
    """``[Q]``, the interval that each query sees; none if each sees all."""
    last: Indices | None


@dataclass
class Live:
    """The cache of one prompt, and what the rule remembers with it."""

    rule: Rule
    rows: CacheRows
    layers: list[LayerCache]
    memories: list[Any]
    standing: dict[str, Positions]
    """Where the cached keys stand, for rules that move them."""


class Execution:
    """Tokens ``start .. stop - 1`` on their way through the layers.

    Args:
        total: the number of tokens that the text is known to have.
    """

    def __init__(self, model: WrappedModel, live: Live, start: int, stop: int, total: int, train_length: int) -> None:
        self._model, self._live, self._rule = model, live, live.rule
        self._start, self._stop = start, stop
        self._train_length = train_length
        self._rule.enter(start, stop)
        live.rows.begin(self._rule.needed(start), stop - start, total)
        self._frequencies = model.frequencies_of(total)
        self._turns = {id(f): self._rule.turn(f, total) for f in self._frequencies if f is not None}
        self._blocks = [
            (first, last, self._rule.parts(first, last)) for first, last in self._rule.blocks(start, stop, QUERY_BLOCK)
        ]
        self._moved = self._moves()
        self._angles: dict[Any, Angles] = {}
        self._masks: dict[Any, Tensor] = {}

    def finish(self) -> None:
        """Called when all layers have run."""
        self._live.rows.tokens = self._stop
        self._live.rows.move = None

    def _moves(self) -> dict[str, tuple[Indices, Positions]]:
        """For each view the cached tokens that change their places, and by how much."""
        result: dict[str, tuple[Indices, Positions]] = {}
        if not self._rule.moves:
            return result
        for view in self._rule.views:
            now = self._rule.key_positions(view, arange(0, self._stop))
            before = self._live.standing.get(view, np.zeros(0))
            moved = np.flatnonzero(now[: len(before)] != before)
            if len(moved):
                span = arange(int(moved[0]), int(moved[-1]) + 1)
                result[view] = span, (now[: len(before)] - before)[span]
            self._live.standing[view] = now
        return result

    def attend(
        self,
        index: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
        slopes: Sequence[float] | None,
    ) -> Tensor:
        """Attention of one layer to all that the rule lets the new queries see, ``[1, H, S, Dv]``.

        Args:
            index: of the layer.
            query: unturned, ``[1, H, S, D]``.
            key: unturned, ``[1, K, S, D]``.
            value: ``[1, K, S, Dv]``.
            scale: multiplies the scores.
            window: the layer's sliding window, if it has one.
            softcap: scores are bent to stay within it.
            sinks: one more score a head, for a key without value, ``[H]``.
            slopes: ALiBi, one for each head.
        """
        rows, cache = self._live.rows, self._live.layers[index]
        stored = self._stored(index, key)
        cache.make_room(rows, stored, value)
        for view, (moved, by) in self._moved.items():
            self._move(index, view, moved, by)
        cache.write(self._start - rows.gap, stored, value)
        views = self._views(index)
        if window is not None and self._rule.window_by_position and window >= self._train_length:
            window = None
        heads, size = query.shape[1], query.shape[-1]
        kv_heads = key.shape[1]
        assert cache.values is not None
        output = query.new_empty(1, heads, self._stop - self._start, value.shape[-1])
        memory = self._live.memories[index]
        for number, (first, last, parts) in enumerate(self._blocks):
            here = slice(first - self._start, last - self._start)
            block = query[:, :, here]
            scales = self._rule.query_scales(first, last)
            if scales is not None:
                block = block * torch.from_numpy(scales)[:, None].to(block)
            merged = Merged()
            for place, part in enumerate(parts):
                turned = self._turned_queries(index, block, part, (number, place))
                folded = turned.reshape(1, kv_heads, -1, size)
                keys = views[part.view]
                if part.looked_up:
                    found = memory.look_up(turned, keys, first, last)
                    if len(found) and window is None:  # a layer with a window sees nothing that far
                        merged.add(*attend(folded, keys[:, :, found], cache.values[:, :, found], None, scale, softcap))
                    continue
                for piece in self._key_ranges(part, first, last, window):
                    span = slice(rows.row(piece.start), rows.row(piece.stop - 1) + 1)
                    bias = self._bias(piece, heads // kv_heads, block)
                    if slopes is not None:
                        bias = self._alibi(part, piece, slopes, kv_heads, block) + (0 if bias is None else bias)
                    merged.add(*attend(folded, keys[:, :, span], cache.values[:, :, span], bias, scale, softcap))
            rest = None
            if sinks is not None:
                rest = sinks.float().reshape(1, kv_heads, -1, 1).expand(-1, -1, -1, last - first).flatten(2)
            output[:, :, here] = merged.result(output.dtype, rest).reshape(1, heads, last - first, -1)
        return output

    def _stored(self, index: int, key: Tensor) -> dict[str, Tensor]:
        """The new keys in every view that this layer's cache holds."""
        layer, radians = self._model.layers[index], self._frequencies[index]
        if radians is None or self._rule.turns_again:
            return {"": key}
        new = arange(self._start, self._stop)
        return {
            view: self._turn(key, self._rule.key_positions(view, new), (view,), radians, layer)
            for view in self._rule.views
        }

    def _views(self, index: int) -> dict[str, Tensor]:
        """All keys of a layer in every view."""
        keys = self._live.layers[index].keys
        radians = self._frequencies[index]
        if radians is None:
            return dict.fromkeys(self._rule.views, keys[""])
        if not self._rule.turns_again:
            return keys
        every = arange(0, self._stop)
        plain = keys[""][:, :, : self._stop]
        return {
            view: self._turn(
                plain, self._rule.key_positions(view, every), (view, "all"), radians, self._model.layers[index]
            )
            for view in self._rule.views
        }

    def _move(self, index: int, view: str, span: Indices, by: Positions) -> None:
        """Turns cached keys where they lie, from where they stand to where they stand now."""
        radians = self._frequencies[index]
        if radians is None:
            return
        rows = slice(int(span[0]), int(span[-1]) + 1)
        buffer = self._live.layers[index].keys[view]
        # A factor of the rule is in the keys already.
        name = (view, "moved", id(radians))
        if name not in self._angles:
            self._angles[name] = angles_of(by, self._turns[id(radians)][0], buffer.device)
        buffer[:, :, rows] = turn(buffer[:, :, rows], self._angles[name], self._model.layers[index])

    def _turned_queries(self, index: int, query: Tensor, part: Part, name: tuple[int, int]) -> Tensor:
        radians = self._frequencies[index]
        if radians is None:
            return query
        return self._turn(query, part.queries, name, radians, self._model.layers[index])

    def _turn(self, x: Tensor, positions: Positions, name: Any, radians: Positions, layer: LayerSpec) -> Tensor:
        turned, factor = self._turns[id(radians)]
        if factor == 1.0 and not positions.any():
            return x
        key = (*name, id(radians))
        if key not in self._angles:
            self._angles[key] = angles_of(positions, turned, x.device, factor)
        return turn(x, self._angles[key], layer)

    def _key_ranges(self, part: Part, start: int, stop: int, window: int | None) -> list[KeyRange]:
        first, last = part.first, part.stop
        if window is not None:
            first = np.maximum(first, self._window_start(part, start, stop, window))
        seeing = first < last
        if not seeing.any():
            return []
        low, high = int(first[seeing].min()), int(last[seeing].max())
        all_from, all_to = int(first.max()), int(last.min())
        if (all_from, all_to) == (low, high):
            return [KeyRange(low, high, None, None)]
        # Where much is seen by all, only the edges need a mask.
        if not seeing.all() or all_to - all_from < 2 * (stop - start):
            return [KeyRange(low, high, first, last)]
        pieces = [
            KeyRange(low, all_from, first, last),
            KeyRange(all_from, all_to, None, None),
            KeyRange(all_to, high, first, last),
        ]
        return [piece for piece in pieces if piece.start < piece.stop]

    def _window_start(self, part: Part, start: int, stop: int, window: int) -> Indices:
        """The first key that a layer's own sliding window shows to each query."""
        if not self._rule.window_by_position:
            return arange(start, stop) - window + 1
        first = int(part.first.min())
        keys = self._rule.key_positions(part.view, arange(first, max(first, int(part.stop.max()))))
        # Positions rise with the index within a part: the first one that is less than the window away.
        inside: Indices = first + np.searchsorted(keys, part.queries - window, side="right")
        return inside

    def _bias(self, piece: KeyRange, group: int, like: Tensor) -> Tensor | None:
        """What hides keys of a piece, ``[1, 1, G Q, N]``; none if all queries see all of it."""
        if piece.first is None or piece.last is None:
            return None
        width = piece.stop - piece.start
        first, last = ((edge - piece.start).clip(0, width) for edge in (piece.first, piece.last))
        name = (width, group, first.tobytes(), last.tobytes())  # most blocks have the same
        if name not in self._masks:
            keys = arange(0, width)
            seen = (keys >= first[:, None]) & (keys < last[:, None])
            visible = torch.from_numpy(seen).to(like.device)
            # Finite, so that a row that sees nothing is no NaN; so low that its part then weighs nothing.
            hidden = torch.finfo(like.dtype).min / 2
            bias = torch.zeros(visible.shape, dtype=like.dtype, device=like.device).masked_fill_(~visible, hidden)
            self._masks[name] = bias.repeat(group, 1)[None, None]
        return self._masks[name]

    def _alibi(self, part: Part, piece: KeyRange, slopes: Sequence[float], kv_heads: int, like: Tensor) -> Tensor:
        """``slope * (key position - query position)``, ``[1, K, G Q, N]``."""
        keys = self._rule.key_positions(part.view, arange(piece.start, piece.stop))
        distance = torch.from_numpy(keys[None, :] - part.queries[:, None])
        slope = torch.tensor(list(slopes), dtype=torch.float64).reshape(kv_heads, -1, 1, 1)
        return (slope * distance).flatten(1, 2).unsqueeze(0).to(like)
