"""The plan: how a prompt is cut and which positions its tokens have. Which it is, the method says.

Pure integers; no engine, no tensor library beyond numpy. A first prompt and the continuation of a live cache are the
same thing: tokens ``start .. length - 1`` are new, the ones before are in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mesart.graphs.checks import check_whole
from mesart.graphs.errors import InputError
from mesart.graphs.method.stairs import Stairs

if TYPE_CHECKING:
    from mesart.graphs.method.protocol import StaticMethod


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
    """E for all prompts of this bucket, so that a chunk's keys have the same positions in a shorter prompt."""


def buckets_up_to(config: StaticMethod, max_tokens: int) -> tuple[Bucket, ...]:
    """The buckets that serve every prompt of up to ``max_tokens`` tokens.

    Raises:
        MesaError: texts of ``max_tokens`` tokens leave the positions that the method has (of Mesa, by a fixed stair
            width), or that is no number of tokens.
    """
    check_whole("max_tokens", max_tokens, least=1)
    buckets = []
    for bucket in config.buckets():
        buckets.append(bucket)
        if bucket.max_tokens >= max_tokens:
            break
    config.require_room(min(max_tokens, buckets[-1].max_tokens))
    return tuple(buckets)


def bucket_for(config: StaticMethod, tokens: int) -> Bucket:
    """The smallest bucket that serves a prompt of ``tokens`` tokens.

    Raises:
        MesaError: there is none, under a method whose one bucket ends.
    """
    for bucket in config.buckets():
        if bucket.max_tokens >= tokens:
            return bucket
    raise InputError(f"no bucket holds {tokens} tokens; export again with --max-tokens {tokens}")


@dataclass(frozen=True)
class Plan:
    """What to compute for tokens ``start .. length - 1``, given the tokens before them in the cache.

    Every token of ``start .. length - 1`` is in exactly one of ``head``, ``chunks`` and ``tail``. With no chunks and
    ``start == 0`` this is the dense path: the plain model. Positions are always below ``config.positions``.

    A model may rotate short texts by other frequencies (LongRoPE). Their positions are in a part of the position table
    of their own, and a text that outgrows it is computed again from its start, as the plain model would: rotating its
    keys anew would not do, for keys and values of all layers but the first follow from what the short ones gave.
    """

    config: StaticMethod
    start: int
    length: int
    head: Span | None
    chunks: tuple[Span, ...]
    tail: Span
    stairs: Stairs
    """Positions of all tokens when the tail runs. Keys of the cache that have others are re-rotated."""

    @classmethod
    def of(cls, config: StaticMethod, tokens: int, edges: Sequence[int] = ()) -> Plan:
        """The plan of a first prompt.

        Args:
            config: the method.
            tokens: of the prompt.
            edges: where chunks have to begin and end, however short the prompt is: tokens before the first are head and
                chunks of their own, those between two edges are cut into equal pieces of at most ``C``, those behind
                the last are the tail. So what lies between two edges makes the same chunks in every prompt.

        Raises:
            MesaError: an empty prompt, one that leaves the positions that the method has, or edges that cut nothing.
        """
        if tokens < 1:
            raise InputError("the prompt is empty; give at least one token")
        if not edges:
            return config.plan(tokens)
        first, last = config.head_length, tokens - 1
        if list(edges) != sorted(set(edges)) or not (first <= edges[0] and edges[-1] <= last) or edges[-1] == first:
            raise InputError(
                f"a prompt of {tokens} tokens cannot be cut at {list(edges)}: edges rise, from {first} (head_length) "
                f"to {last} at most, with tokens before the last"
            )
        return config.plan_between(tokens, edges)

    @classmethod
    def extend(cls, config: StaticMethod, stairs: Stairs, cached: int, tokens: int) -> Plan:
        """The plan that appends ``tokens`` tokens to a cache of ``cached`` tokens whose positions are ``stairs``.

        A plan with ``start == 0`` computes the whole text again, those of the cache included.
        """
        if tokens < 1:
            raise InputError("the prompt is empty; give at least one token")
        if cached == 0:
            return cls.of(config, tokens)
        length = cached + tokens
        if stairs.offset and cached <= config.short_length < length:
            return cls.of(config, length)
        return config.extension(stairs, cached, tokens)

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

        Positions of head and chunk queries are below T_r, where it is 1.
        """
        return query_scales(self.config, span)


def query_scales(config: StaticMethod, span: Span) -> NDArray[np.float32]:
    """See :meth:`Plan.query_scales`."""
    if not config.log_n:
        return np.ones(len(span), dtype=np.float32)
    tokens = np.arange(span.start, span.stop, dtype=np.float64)
    return np.maximum(1.0, np.log(tokens + 1) / math.log(config.train_length)).astype(np.float32)


__all__ = [
    "Bucket",
    "Chunk",
    "Plan",
    "Prefix",
    "Rerotate",
    "Span",
    "Step",
    "TailSlice",
    "bucket_for",
    "buckets_up_to",
    "query_scales",
]
