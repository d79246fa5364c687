"""Executes plans: head, chunks, place, tail, step; the same for every backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mesart.graphs.errors import MesaError
from mesart.graphs.manifest import Manifest
from mesart.graphs.plan import Plan, Span, query_scales
from mesart.graphs.stairs import ORDINARY, Stairs
from mesart.runtime.cache import LiveCache, NextToken


@dataclass
class Row:
    """One prompt of the batch."""

    tokens: list[int] = field(default_factory=list)
    """All tokens whose keys are in the cache."""
    stairs: Stairs = ORDINARY
    """Where they stand."""
    lost: bool = False
    """Whether no keys are there after all, since computing the text again failed: it is when it next continues."""

    @property
    def cached(self) -> int:
        """The number of tokens whose keys are there."""
        return 0 if self.lost else len(self.tokens)


class Executor:
    """A live batch of prompts: what its rows are is known here, their keys and values lie in a live cache."""

    def __init__(self, manifest: Manifest, cache: LiveCache) -> None:
        self.manifest, self.config, self.cache = manifest, manifest.config, cache
        self.rows = [Row()]

    def prefill(self, prompts: Sequence[Sequence[int]], *, all_logits: bool = False) -> list[NDArray[np.float32]]:
        """Computes prompts from nothing; what was in the cache is forgotten. Logits ``[S, V]`` of each row."""
        for prompt in prompts:
            self._check_length(len(prompt))
        self.rows = [Row()]
        self.cache.begin([len(prompt) for prompt in prompts])
        self.rows = [Row() for _ in prompts]
        return [self._extend(row, prompt, all_logits) for row, prompt in enumerate(prompts)]

    def extend(self, turns: Sequence[Sequence[int]], *, all_logits: bool = False) -> list[NDArray[np.float32]]:
        """Appends tokens to every row. Logits ``[S, V]`` of each row's tail, or ``[1, V]`` of its last token."""
        for row, turn in zip(self.rows, turns, strict=True):
            self._check_length(len(row.tokens) + len(turn))
        return [self._extend(index, turn, all_logits) for index, turn in enumerate(turns)]

    def _extend(self, index: int, ids: Sequence[int], all_logits: bool) -> NDArray[np.float32]:
        if all_logits and self.cache.last_logits_only:
            raise MesaError("these graphs give the last logits only, no all_logits; load the symbolic graph")
        row, cache = self.rows[index], self.cache
        tokens = [*row.tokens, *map(int, ids)]
        plan = Plan.extend(self.config, row.stairs, row.cached, len(tokens) - row.cached)
        cache.make_room(index, plan.length)
        if plan.start < row.cached:  # it starts again at 0, over what is cached
            row.lost = True
            cache.forget(index, 0)
        kept = row.cached
        standing = row.stairs.positions(0, plan.start)  # where each key of the cache stands now
        target = plan.stairs.positions(0, plan.tail.start)
        moved = False
        try:
            if plan.head is not None:
                cache.head(index, tokens, plan.head)
                standing = ORDINARY.positions(0, len(plan.head))
            if plan.chunks:
                cache.chunks(index, tokens, plan.chunks, standing[: self.config.head_length])
                standing = np.concatenate([standing, *map(plan.chunk_positions, plan.chunks)])
            cache.move(index, standing, target)
            moved = True
            positions = plan.stairs.positions(plan.tail.start, plan.tail.stop)
            scales = plan.query_scales(plan.tail)
            logits = cache.tail(index, tokens, plan.tail, positions, scales, all_logits=all_logits)
        except BaseException:
            # Nothing is lost: the row is again what it was before this turn.
            cache.forget(index, kept)
            if moved:
                cache.move(index, target[:kept], row.stairs.positions(0, kept))
            raise
        row.tokens, row.stairs, row.lost = tokens, plan.stairs, False
        return logits[-len(ids) :]

    def step(self, tokens: Sequence[int | None]) -> NDArray[np.float32]:
        """Appends one token to each row, nothing to a row whose token is ``None``. Logits ``[B, V]`` of the next."""
        for index, token in enumerate(tokens):
            if token is not None:
                self.cache.make_room(index, len(self.rows[index].tokens) + 1)
        steps = [None if token is None else self._next(index, token) for index, token in enumerate(tokens)]
        whole = {index: token for index, token in enumerate(tokens) if token is not None and steps[index] is None}
        computed: dict[int, NDArray[np.float32]] = {}
        try:
            logits = self.cache.step(steps) if any(steps) or not whole else None
            for index, token in whole.items():
                computed[index] = self._extend(index, [token], False)[-1]
        except BaseException:
            for index in computed:
                self.rows[index].tokens.pop()
            for index, row in enumerate(self.rows):  # some rows may have been computed
                self.cache.forget(index, row.cached)
            raise
        for index, (row, token) in enumerate(zip(self.rows, tokens, strict=True)):
            if token is not None and index not in whole:
                row.tokens.append(int(token))
        if logits is None:
            logits = np.zeros((len(tokens), len(next(iter(computed.values())))), np.float32)
        for index, last in computed.items():
            logits[index] = last
        return logits

    def _next(self, index: int, token: int) -> NextToken | None:
        """Where a row's next token stands; moves its anchor first where that is due.

        ``None``: the whole text has to be computed again, the token behind it.
        """
        row = self.rows[index]
        length = len(row.tokens)
        plan = Plan.extend(self.config, row.stairs, row.cached, length + 1 - row.cached)
        if plan.start < length:
            return None
        if plan.stairs != row.stairs:
            self.cache.move(index, row.stairs.positions(0, length), plan.stairs.positions(0, length))
            row.stairs = plan.stairs
        scale = float(query_scales(self.config, Span(length, length + 1))[0])
        return NextToken(int(token), length, plan.stairs.position(length), scale)

    def _check_length(self, tokens: int) -> None:
        largest = self.manifest.buckets[-1].max_tokens
        if tokens > largest:
            if tokens <= self.manifest.max_tokens:
                raise MesaError(
                    f"a prompt of {tokens} tokens is longer than the largest bucket that engines were built for, "
                    f"{largest} tokens; run `mesart build` with --max-tokens {tokens}, or without it"
                )
            raise MesaError(
                f"a prompt of {tokens} tokens is longer than the largest bucket of this bundle, {largest} tokens; "
                f"export again with --max-tokens {tokens}"
            )


__all__ = ["Executor", "Row"]
