"""Which segments of one run go together where texts are rows of a slab: decoding ones, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mesart.runtime.kv.slab import Slab, SlabKv
from mesart.runtime.kv.store import Array
from mesart.runtime.runners.runner import Segment


@dataclass(frozen=True)
class Rows:
    """Neighbouring rows of a slab that run together, each with one segment or none, all of one length."""

    slab: Slab
    start: int
    segments: list[Segment | None]
    indices: list[int]
    """Of the segments, among those of the whole run; in the order of their rows."""

    @property
    def part(self) -> slice:
        return slice(self.start, self.start + len(self.segments))

    @property
    def size(self) -> int:
        """New tokens of a row."""
        return len(self.given[0])

    @property
    def given(self) -> list[Segment]:
        return [segment for segment in self.segments if segment is not None]

    def ids(self) -> NDArray[np.int64]:
        """``[B, S]``; 0 in a row that runs along."""
        return self._stacked("ids", 0, np.dtype(np.int64))

    def positions(self) -> NDArray[np.int64]:
        return self._stacked("positions", 0, np.dtype(np.int64))

    def scales(self) -> NDArray[np.float32]:
        return self._stacked("scales", 1, np.dtype(np.float32))

    def _stacked(self, name: str, other: int, dtype: np.dtype[np.generic]) -> Array:
        idle = np.full(self.size, other, dtype)
        return np.stack([idle if segment is None else getattr(segment, name) for segment in self.segments])

    def lengths(self) -> NDArray[np.int32]:
        """Tokens that each row has before, ``[B]``."""
        texts = self.slab.texts[self.part]
        return np.array([0 if text is None else text.length for text in texts], np.int32)


def in_rows(segments: Sequence[Segment], most: int | None) -> Iterator[Rows]:
    """Groups segments: decoding ones of neighbouring rows together, at most ``most`` rows; others each on its own.

    Rows between them that have nothing to do run along where they are no more than those that have. What they write
    lies behind their texts: so decoding comes first, and then what those rows may have to do themselves in this run.
    """
    decoding: dict[int, list[int]] = {}
    alone: list[Rows] = []
    for index, segment in enumerate(segments):
        assert isinstance(segment.kv, SlabKv)
        if segment.phase == "decode" and most != 1:
            decoding.setdefault(id(segment.kv.slab), []).append(index)
        else:
            alone.append(Rows(segment.kv.slab, segment.kv.row, [segment], [index]))
    for indices in decoding.values():
        yield from _neighbours(segments, sorted(indices, key=lambda index: _row(segments[index])), most)
    yield from alone


def _neighbours(segments: Sequence[Segment], indices: list[int], most: int | None) -> Iterator[Rows]:
    group: list[int] = []
    for index in [*indices, None]:
        if group and (index is None or not _joins(segments, group, index, most)):
            first = _row(segments[group[0]])
            rows: list[Segment | None] = [None] * (_row(segments[group[-1]]) - first + 1)
            for member in group:
                rows[_row(segments[member]) - first] = segments[member]
            kv = segments[group[0]].kv
            assert isinstance(kv, SlabKv)
            yield Rows(kv.slab, first, rows, group)
            group = []
        if index is not None:
            group.append(index)


def _joins(segments: Sequence[Segment], group: list[int], index: int, most: int | None) -> bool:
    span = _row(segments[index]) - _row(segments[group[0]]) + 1
    return (most is None or span <= most) and span <= 2 * (len(group) + 1)


def _row(segment: Segment) -> int:
    assert isinstance(segment.kv, SlabKv)
    return segment.kv.row


__all__ = ["Rows", "in_rows"]
