"""Executes plans: head, chunks, place, tail, step; the same for every backend."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mesart.graphs.errors import EngineError, InputError
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
    """A live batch of prompts: what its rows are is known here, their keys and values lie in a live cache.

    A call that fails, for whatever reason, leaves all rows as they were before it; a :meth:`prefill`, which has
    forgotten them by then, leaves one empty row. Where not even that can be done, the cache says so until the next
    prefill.

    Attributes:
        turn: counts the calls that changed the cache: who finds another number than it left is no longer alone.
    """

    def __init__(self, manifest: Manifest, cache: LiveCache) -> None:
        self.manifest, self.config, self.cache = manifest, manifest.config, cache
        self.rows = [Row()]
        self.turn = 0
        self._lost = False

    def prefill(self, prompts: Sequence[Sequence[int]], *, all_logits: bool = False) -> list[NDArray[np.float32]]:
        """Computes prompts from nothing; what was in the cache is forgotten. Logits ``[S, V]`` of each row."""
        plans = [self._first_plan(len(prompt)) for prompt in prompts]
        self._require_logits(plans, prompts, all_logits)
        self.turn += 1
        self.rows, self._lost = [Row()], True  # until it is known what there is instead
        try:
            self.cache.begin([len(prompt) for prompt in prompts])
            self.rows = [Row() for _ in prompts]
            logits = [self._run(row, plan, prompts[row], all_logits) for row, plan in enumerate(plans)]
        except BaseException:
            self.rows = [Row()]
            self.cache.clear()
            self._lost = False
            raise
        self._lost = False
        return logits

    def extend(self, turns: Sequence[Sequence[int]], *, all_logits: bool = False) -> list[NDArray[np.float32]]:
        """Appends tokens to every row. Logits ``[S, V]`` of each row's tail, or ``[1, V]`` of its last token.

        A live text goes on beyond the largest bucket as far as the method and the graphs do.
        """
        self.require_cache()
        plans = [self._plan(row, len(turn)) for row, turn in zip(self.rows, turns, strict=True)]
        self._require_logits(plans, turns, all_logits)
        for index, plan in enumerate(plans):
            self.cache.make_room(index, plan.length)
        with self._undone_on_error(list(map(len, turns))):
            return [self._run(index, plan, turns[index], all_logits) for index, plan in enumerate(plans)]

    def step(self, tokens: Sequence[int | None]) -> NDArray[np.float32]:
        """Appends one token to each row, nothing to a row whose token is ``None``. Logits ``[B, V]`` of the next."""
        self.require_cache()
        for index, token in enumerate(tokens):
            if token is not None:
                self.cache.make_room(index, len(self.rows[index].tokens) + 1)
        with self._undone_on_error():
            steps = [None if token is None else self._next(index, token) for index, token in enumerate(tokens)]
            again = [index for index, token in enumerate(tokens) if token is not None and steps[index] is None]
            logits = self.cache.step(steps) if any(steps) or not again else None
            for row, step in zip(self.rows, steps, strict=True):
                if step is not None:
                    row.tokens.append(step.token)
            for index in again:
                token = tokens[index]
                assert token is not None
                last = self._run(index, self._plan(self.rows[index], 1), [token], False)[-1]
                if logits is None:
                    logits = np.zeros((len(tokens), len(last)), np.float32)
                logits[index] = last
        assert logits is not None
        return logits

    def require_cache(self) -> None:
        """Raises a :class:`MesaError` if a call failed so badly that nobody knows what is in the cache."""
        if self._lost:
            raise EngineError("the cache was lost when a call failed and could not be undone; call prefill first")

    def _run(self, index: int, plan: Plan, ids: Sequence[int], all_logits: bool) -> NDArray[np.float32]:
        """Computes a plan. ``row.stairs`` says at any time where the tokens stand that were there before."""
        row, cache = self.rows[index], self.cache
        tokens = [*row.tokens, *map(int, ids)]
        # A plan that starts again at 0 computes what is cached once more: as the head, to the same values, or all of
        # it, from its place among short texts, to others.
        if plan.start < row.cached and row.stairs != ORDINARY:
            row.lost = True
            cache.forget(index, 0)
        standing = row.stairs.positions(0, plan.start)  # where each key of the cache stands now
        target = plan.stairs.positions(0, plan.tail.start)
        if plan.head is not None:
            cache.head(index, tokens, plan.head)
            standing, row.stairs = ORDINARY.positions(0, len(plan.head)), ORDINARY
        if plan.chunks:
            cache.chunks(index, tokens, plan.chunks, standing[: self.config.head_length])
            standing = np.concatenate([standing, *map(plan.chunk_positions, plan.chunks)])
        cache.move(index, standing, target)
        row.stairs = plan.stairs
        positions = plan.stairs.positions(plan.tail.start, plan.tail.stop)
        scales = plan.query_scales(plan.tail)
        logits = cache.tail(index, tokens, plan.tail, positions, scales, all_logits=all_logits)
        row.tokens.extend(tokens[len(row.tokens) :])
        return logits[-len(ids) :]

    def _next(self, index: int, token: int) -> NextToken | None:
        """Where a row's next token stands; moves its anchor first where that is due.

        ``None``: the whole text has to be computed again, the token behind it.
        """
        row = self.rows[index]
        length = len(row.tokens)
        plan = self._plan(row, 1)
        if plan.start < length:
            return None
        self._move(index, plan.stairs)
        scale = float(query_scales(self.config, Span(length, length + 1))[0])
        return NextToken(int(token), length, plan.stairs.position(length), scale)

    def _move(self, index: int, stairs: Stairs) -> None:
        """Moves a row's tokens to other stairs."""
        row = self.rows[index]
        if stairs != row.stairs:
            count = len(row.tokens)
            self.cache.move(index, row.stairs.positions(0, count), stairs.positions(0, count))
            row.stairs = stairs

    @contextmanager
    def _undone_on_error(self, tokens: Sequence[int] = ()) -> Iterator[None]:
        """All rows are as they were if one fails, and keys that are to be overwritten by ``tokens`` tokens are kept."""
        before = [(len(row.tokens), row.stairs) for row in self.rows]
        kept = [self.cache.keep(index, count) for index, count in enumerate(tokens)]
        try:
            yield
        except BaseException:
            self._lost = True  # until all is undone
            for bring_back in kept:
                bring_back()
            for index, (length, stairs) in enumerate(before):
                row = self.rows[index]
                del row.tokens[length:]
                self.cache.forget(index, row.cached)
                if row.lost:
                    row.stairs = stairs
                else:
                    self._move(index, stairs)
            self._lost = False
            raise
        for row, (length, _) in zip(self.rows, before, strict=True):
            row.lost = row.lost and len(row.tokens) == length  # what went on has been computed
        self.turn += 1

    def _first_plan(self, tokens: int) -> Plan:
        """The plan of a prompt, which may not be longer than the largest bucket."""
        largest = self.manifest.buckets[-1].max_tokens
        if tokens > largest:
            if tokens <= self.manifest.max_tokens:
                raise InputError(
                    f"a prompt of {tokens} tokens is longer than the largest bucket that engines were built for, "
                    f"{largest} tokens; run `mesart build` with --max-tokens {tokens}, or without it"
                )
            raise InputError(
                f"a prompt of {tokens} tokens is longer than the largest bucket of this bundle, {largest} tokens; "
                f"export again with --max-tokens {tokens}"
            )
        return Plan.of(self.config, tokens)

    def _plan(self, row: Row, tokens: int) -> Plan:
        """The plan of a turn, a first one or a later one."""
        if not row.tokens:
            return self._first_plan(tokens)
        return Plan.extend(self.config, row.stairs, row.cached, len(row.tokens) + tokens - row.cached)

    def _require_logits(self, plans: Sequence[Plan], turns: Sequence[Sequence[int]], all_logits: bool) -> None:
        """Before anything is computed: all logits can be had, as one array."""
        if not all_logits:
            return
        if self.cache.last_logits_only:
            raise InputError("these graphs give the last logits only, no all_logits; load the symbolic graph")
        sizes = {min(len(plan.tail), len(turn)) for plan, turn in zip(plans, turns, strict=True)}
        if len(sizes) > 1:
            raise InputError(
                f"all_logits of a batch needs tails of one length, these have {', '.join(map(str, sorted(sizes)))}; "
                "run the prompts one by one"
            )


__all__ = ["Executor", "Row"]
