"""How Mesa-Extrapolation cuts a prompt into head, chunks and tail, and which positions their tokens have.

Source: arXiv 2410.15859 v3, sections 4.1 (chunks) and 4.2 (Stair PE).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from mesart.graphs.errors import InputError
from mesart.graphs.method.plan import Plan, Span, bucket_for
from mesart.graphs.method.stairs import Stairs

if TYPE_CHECKING:
    from mesart.graphs.method.config import MesaConfig


def plan(config: MesaConfig, tokens: int) -> Plan:
    """The plan of a first prompt: the plain model up to ``train_length`` tokens, chunks beyond.

    Raises:
        MesaError: a fixed stair width leaves the trained range.
    """
    if tokens <= config.train_length:
        return Plan(config, 0, tokens, None, (), Span(0, tokens), config.stairs(tokens))
    head = Span(0, config.head_length)
    chunks, tail, stairs = _cut(config, head.stop, tokens, bucket_for(config, tokens).stair_width)
    return Plan(config, 0, tokens, head, chunks, tail, stairs)


def plan_between(config: MesaConfig, tokens: int, edges: Sequence[int]) -> Plan:
    """The plan of a first prompt whose chunks lie between edges, from the head to the tail.

    A tail that is too long (see :func:`_cut`) hands tokens to chunks of its own, behind the last edge.

    Raises:
        MesaError: a fixed stair width leaves the trained range.
    """
    head = Span(0, config.head_length)
    ends = [head.stop, *edges] if edges[0] > head.stop else [*edges]
    chunks = tuple(piece for first, last in pairwise(ends) for piece in _pieces(first, last, config.chunk_length))
    width = bucket_for(config, tokens).stair_width
    tail, stairs = Span(edges[-1], tokens), _stairs_before(config, edges[-1], width)
    if _is_long(config, tail, stairs):
        more, tail, stairs = _cut(config, tail.start, tokens, width)
        chunks += more
    _require_range(config, stairs, tokens)
    return Plan(config, 0, tokens, head, chunks, tail, stairs)


def extension(config: MesaConfig, stairs: Stairs, cached: int, tokens: int) -> Plan:
    """The plan that appends ``tokens`` tokens to a cache of ``cached`` tokens whose positions are ``stairs``.

    If they do not fit in the trained range behind the cache, the anchor moves forward, by whole stair steps while
    that makes enough room, else to wider stairs. If they do not fit even so, they are cut into chunks of their own.
    """
    length = cached + tokens
    if stairs.offset:  # it stays within the short texts
        return Plan(config, cached, length, None, (), Span(cached, length), stairs)
    room = max(tokens, min(config.tail_min, config.train_length // 16))  # not to move at every step
    for candidate in _anchors(config, stairs, cached, length):
        needed = tokens if candidate == stairs else room
        if candidate.position(cached) + needed <= config.train_length:
            return Plan(config, cached, length, None, (), Span(cached, length), candidate)
    if cached < config.head_length:
        # Too little is cached to be the head that chunks need: it is cheaper to start again.
        return plan(config, length)
    # A width that was fixed for first prompts gives way here too: a live cache is never lost to it.
    width = max(stairs.width, config.fitting_width(bucket_for(config, length).max_tokens))
    chunks, tail, moved = _cut(config, cached, length, width)
    return Plan(config, cached, length, None, chunks, tail, moved)


def require_room(config: MesaConfig, tokens: int) -> None:
    """Raises a :class:`MesaError` if a prompt of ``tokens`` tokens leaves the trained range."""
    if tokens > config.train_length:
        # The worst tail of its bucket: as long as the minimum, with all the rest on stairs.
        anchor = tokens - config.tail_min - config.linear_window
        _require_range(config, Stairs(anchor, bucket_for(config, tokens).stair_width), tokens)


def _cut(config: MesaConfig, start: int, stop: int, width: int) -> tuple[tuple[Span, ...], Span, Stairs]:
    """Chunks of ``C`` and a tail, which is the rest: at least ``tail_min``, though a single chunk may leave less.

    A tail longer than ``tail_max``, or that does not fit in the trained range, hands all but ``tail_min`` tokens to a
    short last chunk: each token of a tail costs as much as the text is long, one of a chunk as much as a chunk.
    """
    whole = max(1, (stop - start - config.tail_min) // config.chunk_length)
    edges = [start + index * config.chunk_length for index in range(whole + 1)]
    if edges[-1] >= stop:  # a continuation too short for a whole chunk and too long for the trained range
        edges[-1] = stop - config.tail_min
    stairs = _stairs_before(config, edges[-1], width)
    if _is_long(config, Span(edges[-1], stop), stairs):
        edges.append(stop - config.tail_min)
        stairs = _stairs_before(config, edges[-1], width)
    _require_range(config, stairs, stop)
    chunks = tuple(Span(first, last) for first, last in pairwise(edges))
    return chunks, Span(edges[-1], stop), stairs


def _pieces(start: int, stop: int, most: int) -> tuple[Span, ...]:
    """As few pieces as there can be of at most so many tokens, of lengths that differ by one at most."""
    count = -(-(stop - start) // most)
    edges = [start + (stop - start) * index // count for index in range(count + 1)]
    return tuple(Span(first, last) for first, last in pairwise(edges))


def _stairs_before(config: MesaConfig, tail: int, width: int) -> Stairs:
    """The stairs of a tail that starts at this token: the linear window before it stays as it is."""
    return Stairs(tail - config.linear_window, width)


def _is_long(config: MesaConfig, tail: Span, stairs: Stairs) -> bool:
    """Whether a tail is to hand tokens to a chunk: it is longer than ``tail_max``, or leaves the trained range."""
    beyond = stairs.position(tail.stop - 1) >= config.train_length
    above = config.tail_max is not None and len(tail) > config.tail_max
    return (beyond or above) and len(tail) > config.tail_min


def _anchors(config: MesaConfig, stairs: Stairs, cached: int, length: int) -> Iterator[Stairs]:
    """Where the anchor may be, the cheapest first: unmoved, moved by whole steps, with wider stairs."""
    yield stairs
    earliest = cached - config.linear_window  # the linear window never shrinks below N
    if earliest <= stairs.anchor:
        return
    yield Stairs(stairs.anchor + (earliest - stairs.anchor) // stairs.width * stairs.width, stairs.width)
    # Wide enough for twice the tokens: re-rotates all keys, but the next time only after the text has doubled.
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


__all__ = ["extension", "plan", "plan_between", "require_room"]
