"""The plan: how a prompt is cut and where its tokens stand. The one place that knows the method.

Pure integers; no engine, no tensor library beyond numpy. A first prompt and the continuation of a live cache are the
same thing: tokens ``start .. length - 1`` are new, the ones before are in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from mesart.graphs.baseline import BaselineConfig
from mesart.graphs.config import AUTO, MesaConfig, check_whole
from mesart.graphs.errors import InputError
from mesart.graphs.stairs import Stairs


@dataclass(frozen=True)
class Span:
    """Tokens ``start .. stop - 1``."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Prefix:
    """Compute the head, at its ordinary positions, behind nothing."""

    span: Span


@dataclass(frozen=True)
class Chunk:
    """Compute a chunk at its local positions, behind the head at its ordinary ones."""

    span: Span


@dataclass(frozen=True)
class Rerotate:
    """Rotate the keys of tokens ``0 .. stop - 1`` to their positions on ``stairs``, from wherever they are."""

    stop: int
    stairs: Stairs


@dataclass(frozen=True)
class TailSlice:
    """Compute tokens behind all that come before them, at their positions on ``stairs``."""

    span: Span
    stairs: Stairs


Step: TypeAlias = "Prefix | Chunk | Rerotate | TailSlice"


@dataclass(frozen=True)
class Bucket:
    """A number of chunks that graphs are specialised for."""

    chunks: int
    max_tokens: int
    """The longest prompt that it serves."""
    stair_width: int
    """E for all prompts of this bucket, so that a chunk's keys stand where they stood for a shorter prompt."""


def all_buckets(config: MesaConfig) -> Iterator[Bucket]:
    """Buckets of 0 (the dense path), 1, 2, 3, 4, 6, 8, 12, ... chunks: at most a quarter of the slots stays empty.

    A method that keeps a window of the text has one bucket.
    """
    if isinstance(config, BaselineConfig) and config.reach:
        yield Bucket(0, config.max_tokens, 1)  # it keeps as many keys of any text
        return
    yield Bucket(0, config.train_length, 1)
    for chunks, tokens in config.bucket_lengths():
        yield Bucket(chunks, tokens, 1 if isinstance(config, BaselineConfig) else config.width_for(tokens))


def buckets_up_to(config: MesaConfig, max_tokens: int) -> tuple[Bucket, ...]:
    """The buckets that serve every prompt of up to ``max_tokens`` tokens.

    Raises:
        MesaError: the configured stair width leaves the trained range before ``max_tokens``, or that is no number of
            tokens.
    """
    check_whole("max_tokens", max_tokens, least=1)
    buckets = []
    for bucket in all_buckets(config):
        buckets.append(bucket)
        if bucket.max_tokens >= max_tokens:
            break
    longest = min(max_tokens, buckets[-1].max_tokens)
    if longest > config.train_length and not isinstance(config, BaselineConfig):
        # The worst tail of this bucket: as long as the minimum, with all the rest on stairs.
        _require_range(
            config, Stairs(longest - config.tail_min - config.linear_window, buckets[-1].stair_width), longest
        )
    return tuple(buckets)


def bucket_for(config: MesaConfig, tokens: int) -> Bucket:
    """The smallest bucket that serves a prompt of ``tokens`` tokens.

    Raises:
        MesaError: there is none, under a method whose one bucket ends.
    """
    for bucket in all_buckets(config):
        if bucket.max_tokens >= tokens:
            return bucket
    raise InputError(f"no bucket holds {tokens} tokens; export again with --max-tokens {tokens}")


@dataclass(frozen=True)
class Plan:
    """What to compute for tokens ``start .. length - 1``, given the tokens before them in the cache.

    Every token of ``start .. length - 1`` is in exactly one of ``head``, ``chunks`` and ``tail``. With no chunks and
    ``start == 0`` this is the dense path: the plain model. Positions are always below ``config.positions``.

    A model may turn short texts by other frequencies (LongRoPE). They stand in a part of the position table of their
    own, and a text that outgrows it is computed again from its start, as the plain model would: turning its keys anew
    would not do, for the keys and values of all layers but the first follow from what turned by the short frequencies.
    """

    config: MesaConfig
    start: int
    length: int
    head: Span | None
    chunks: tuple[Span, ...]
    tail: Span
    stairs: Stairs
    """Where all tokens stand when the tail runs. Tokens of the cache that stood elsewhere are placed anew."""

    @classmethod
    def of(cls, config: MesaConfig, tokens: int) -> Plan:
        """The plan of a first prompt.

        Raises:
            MesaError: an empty prompt, or a fixed stair width that leaves the trained range.
        """
        if tokens < 1:
            raise InputError("the prompt is empty; give at least one token")
        if config.train_length is AUTO:
            raise InputError("the configuration has no train_length; give one, or use MesaConfig.from_model")
        if isinstance(config, BaselineConfig):
            return cls(config, 0, tokens, None, (), Span(0, tokens), config.stairs(tokens))
        if tokens <= config.train_length:
            return cls(config, 0, tokens, None, (), Span(0, tokens), config.stairs(tokens))
        head = Span(0, config.head_length)
        chunks, tail, stairs = _cut(config, head.stop, tokens, bucket_for(config, tokens).stair_width)
        return cls(config, 0, tokens, head, chunks, tail, stairs)

    @classmethod
    def extend(cls, config: MesaConfig, stairs: Stairs, cached: int, tokens: int) -> Plan:
        """The plan that appends ``tokens`` tokens to a cache of ``cached`` tokens which stand at ``stairs``.

        If they do not fit in the trained range behind the cache, the anchor moves forward, by whole stair steps while
        that makes enough room, else to wider stairs. If they do not fit even so, they are cut into chunks of their own.
        A plan with ``start == 0`` computes the whole text again, those of the cache included.
        """
        if tokens < 1:
            raise InputError("the prompt is empty; give at least one token")
        if cached == 0:
            return cls.of(config, tokens)
        length = cached + tokens
        if cached <= config.short_length < length:
            return cls.of(config, length)
        if isinstance(config, BaselineConfig) or length <= config.short_length:
            return cls(config, cached, length, None, (), Span(cached, length), config.stairs(length))
        room = max(tokens, min(config.tail_min, config.train_length // 16))  # not to move at every step
        for candidate in _anchors(config, stairs, cached, length):
            needed = tokens if candidate == stairs else room
            if candidate.position(cached) + needed <= config.train_length:
                return cls(config, cached, length, None, (), Span(cached, length), candidate)
        if cached < config.head_length:
            # Too little is cached to be the head that chunks need: it is cheaper to start again.
            return cls.of(config, length)
        # A width that was fixed for first prompts gives way here too: a live cache is never lost to it.
        width = max(stairs.width, config.fitting_width(bucket_for(config, length).max_tokens))
        chunks, tail, moved = _cut(config, cached, length, width)
        return cls(config, cached, length, None, chunks, tail, moved)

    def steps(self) -> Iterator[Step]:
        """What there is to do, in its order; only chunks need nothing of one another.

        A step on tokens may be cut into slices, computed one after the other: each sees all before it in any case.
        """
        if self.head is not None:
            yield Prefix(self.head)
        for chunk in self.chunks:
            yield Chunk(chunk)
        yield Rerotate(self.tail.start, self.stairs)
        yield TailSlice(self.tail, self.stairs)

    def chunk_positions(self, chunk: Span) -> NDArray[np.int64]:
        """Local positions of a chunk's tokens, behind the head, int64 ``[len(chunk)]``."""
        return np.arange(self.config.head_length, self.config.head_length + len(chunk), dtype=np.int64)

    def query_scales(self, span: Span) -> NDArray[np.float32]:
        """The log-n scale of tail queries, ``max(1, ln(t + 1) / ln T_r)``, float32 ``[len(span)]``.

        Head and chunk queries stand below T_r, where it is 1.
        """
        return query_scales(self.config, span)


def query_scales(config: MesaConfig, span: Span) -> NDArray[np.float32]:
    """See :meth:`Plan.query_scales`."""
    if not config.log_n:
        return np.ones(len(span), dtype=np.float32)
    tokens = np.arange(span.start, span.stop, dtype=np.float64)
    return np.maximum(1.0, np.log(tokens + 1) / math.log(config.train_length)).astype(np.float32)


def _cut(config: MesaConfig, start: int, stop: int, width: int) -> tuple[tuple[Span, ...], Span, Stairs]:
    """Chunks of ``C`` and a tail, which is the rest: at least ``tail_min``, though a single chunk may leave less.

    A tail longer than ``tail_max``, or that does not fit in the trained range, hands all but ``tail_min`` tokens to a
    short last chunk: each token of a tail costs as much as the text is long, one of a chunk as much as a chunk.
    """
    whole = max(1, (stop - start - config.tail_min) // config.chunk_length)
    edges = [start + index * config.chunk_length for index in range(whole + 1)]
    if edges[-1] >= stop:  # a continuation too short for a whole chunk and too long for the trained range
        edges[-1] = stop - config.tail_min
    stairs = Stairs(edges[-1] - config.linear_window, width)
    is_long = config.tail_max is not None and stop - edges[-1] > config.tail_max
    if (is_long or stairs.position(stop - 1) >= config.train_length) and stop - edges[-1] > config.tail_min:
        edges.append(stop - config.tail_min)
        stairs = Stairs(edges[-1] - config.linear_window, width)
    _require_range(config, stairs, stop)
    chunks = tuple(Span(first, last) for first, last in pairwise(edges))
    return chunks, Span(edges[-1], stop), stairs


def _anchors(config: MesaConfig, stairs: Stairs, cached: int, length: int) -> Iterator[Stairs]:
    """Where the anchor may stand, the cheapest first: unmoved, moved by whole steps, with wider stairs."""
    yield stairs
    earliest = cached - config.linear_window  # the linear window never shrinks below N
    if earliest <= stairs.anchor:
        return
    yield Stairs(stairs.anchor + (earliest - stairs.anchor) // stairs.width * stairs.width, stairs.width)
    # Wide enough for twice the tokens: places all keys anew, but the next time only after the text has doubled.
    yield Stairs(earliest, max(stairs.width, config.fitting_width(2 * length)))


def _require_range(config: MesaConfig, stairs: Stairs, tokens: int) -> None:
    if stairs.position(tokens - 1) < config.train_length:
        return
    steps = config.train_length - (tokens - stairs.anchor)
    if steps < 1:
        raise InputError(
            f"linear_window + tail = {tokens - stairs.anchor} tokens leave no trained position for stairs "
            f"(train_length = {config.train_length}); lower linear_window, tail_min or chunk_length"
        )
    raise InputError(
        f"stair_width = {stairs.width} leaves the trained range of {config.train_length} positions at {tokens} tokens; "
        f"a stair_width of {-(-stairs.anchor // steps)} or more would do (or leave it out: it is then chosen)"
    )


__all__ = [
    "Bucket",
    "Chunk",
    "Plan",
    "Prefix",
    "Rerotate",
    "Span",
    "Step",
    "TailSlice",
    "all_buckets",
    "bucket_for",
    "buckets_up_to",
    "query_scales",
]
