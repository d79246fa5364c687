"""What a store of keys and values is, whatever memory it lies in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mesart.graphs.errors import CapacityError
from mesart.graphs.method.plan import Span

if TYPE_CHECKING:
    from mesart.graphs.bundle.manifest import LayerInfo
    from mesart.runtime.kv.block import BlockLayout, KvBlock

Array: TypeAlias = NDArray[Any]
Positions: TypeAlias = NDArray[np.int64]

Rotate: TypeAlias = Callable[[int, Array, Positions, Positions], Array]
"""``(layer, keys [B, K, S, D], old [B, S], new [B, S])``: the keys, rotated from their old positions to new ones."""


def with_room(numbers: NDArray[np.int64], used: int, size: int) -> NDArray[np.int64]:
    """A buffer for ``size`` numbers that begins with the first ``used`` of another: that one, if it is long enough."""
    if size <= len(numbers):
        return numbers
    grown = np.zeros(size + size // 2, np.int64)  # so that appending copies seldom
    grown[:used] = numbers[:used]
    return grown


class Kv:
    """The keys and values of one text, or of a chunk of one; slot ``i`` holds its token ``i``.

    Attributes:
        length: tokens whose keys and values are there.
        room: tokens for which it has slots.
        torn: whether keys may be half written, after an interruption that could not be undone; the text is lost then.
    """

    def __init__(self) -> None:
        self.length = 0
        self.room = 0
        self.torn = False
        self._positions = np.zeros(0, np.int64)

    @property
    def positions(self) -> Positions:
        """Position of each key, int64 ``[length]``."""
        return self._positions[: self.length]

    def append(self, positions: Positions) -> None:
        """Keys and values of the next tokens have been written, at these positions."""
        start, stop = self.length, self.length + len(positions)
        self._positions = with_room(self._positions, start, stop)
        self._positions[start:stop] = positions
        self.length = stop

    def place(self, start: int, positions: Positions) -> None:
        """Keys from slot ``start`` on have been rotated to these positions."""
        self._positions[start : start + len(positions)] = positions


class KvStore(Protocol):
    """Keys and values of live texts.

    A call that fails leaves every text as it was; so does a run that fails, since what it wrote lies beyond the length
    of its text, where nothing looks.
    """

    bytes_per_token: int
    """Of keys and values of all layers."""
    layout: BlockLayout
    """Of its blocks."""

    @property
    def free_bytes(self) -> int:
        """What texts may still take."""
        ...

    @property
    def bytes_in_use(self) -> int:
        """What texts take."""
        ...

    def bytes_missing(self, kv: Kv, tokens: int) -> int:
        """What a text would take more, if it had ``tokens`` tokens in all."""
        ...

    def shortage(self, needed: int) -> CapacityError:
        """The error that says that so many bytes are more than are free, and what to do."""
        ...

    def allocate(self, tokens: int) -> Kv:
        """An empty text with room for ``tokens`` tokens.

        Raises:
            CapacityError: there is no room; the message says how much is missing.
        """
        ...

    def reserve(self, kv: Kv, tokens: int) -> None:
        """Makes room for ``tokens`` tokens in all; what is there stays. Errors as of :meth:`allocate`."""
        ...

    def free(self, kv: Kv) -> None:
        """Gives a text's memory back; twice is once."""
        ...

    def truncate(self, kv: Kv, length: int) -> None:
        """Forgets all tokens from ``length`` on, and whatever a run that failed has left behind them."""
        ...

    def checkpoint(self, kv: Kv, tokens: int) -> Callable[[], None]:
        """To be called before a text goes on by so many tokens; the result takes them away again.

        It brings back what they have overwritten; keys that have been rotated meanwhile stay where they are.
        """
        ...

    def begin_chunk(self, head: Kv, size: int, text: Kv, span: Span) -> Kv:
        """A text of its own for a chunk: it begins with the first ``size`` tokens of ``head``, which stay as they are.

        ``span``: the tokens of ``text`` that it computes, for which there is room.
        """
        ...

    def end_chunk(self, chunk: Kv, size: int, text: Kv, new: Positions) -> None:
        """Its text goes on by a chunk's own tokens, their keys rotated to these positions; the chunk is freed.

        All of them, or none. The keys have the same bits as by :meth:`append_block` of the chunk's block.
        """
        ...

    def copy(self, kv: Kv, length: int) -> Kv:
        """A text of its own with the first ``length`` tokens of another."""
        ...

    def rotate(self, kv: Kv, start: int, positions: Positions) -> None:
        """Rotates the keys of slots ``start ..`` from where they are to these positions; all of them, or none."""
        ...

    def read(self, kv: Kv) -> tuple[list[Array], list[Array]]:
        """Copies of keys and values, ``[K, length, D]``, a layer each, as they are kept."""
        ...

    def read_block(self, kv: Kv, start: int, stop: int) -> KvBlock:
        """A copy of the keys and values of tokens ``start .. stop - 1``."""
        ...

    def append_block(self, kv: Kv, block: KvBlock, old: Positions, new: Positions) -> None:
        """A text, which has room for them, goes on by the tokens of a block: all of them, or none.

        The block's keys stand at the positions ``old``, and are rotated to ``new`` on the way.
        """
        ...

    def trim(self) -> None:
        """Gives memory back that no text has, and that was only kept for the next."""
        ...

    def close(self) -> None:
        """Frees all memory."""
        ...


class MemoryBudget:
    """Bytes that keys and values may take in all."""

    def __init__(self, limit: int) -> None:
        self.limit, self.taken = limit, 0

    @property
    def free(self) -> int:
        return self.limit - self.taken

    def take(self, count: int) -> None:
        """Raises a :class:`CapacityError` if ``count`` bytes are more than are free."""
        if count > self.free:
            raise self.shortage(count)
        self.taken += count

    def give(self, count: int) -> None:
        self.taken -= count

    def shortage(self, needed: int) -> CapacityError:
        return no_room(needed, self.free, self.limit)


def no_room(needed: int, free: int, limit: int) -> CapacityError:
    return CapacityError(
        f"keys and values need {_size(needed)} more where {_size(free)} of {_size(limit)} are free, "
        f"{_size(needed - free)} are missing: use fewer or shorter texts, end others first, or load the model with a "
        "larger kv_memory"
    )


def _size(count: int) -> str:
    return f"{count / (1 << 20):,.1f} MiB"


def rotated_keys(
    block: KvBlock, layers: Sequence[LayerInfo], rotate: Rotate, old: Positions, new: Positions
) -> Iterator[Array]:
    """Keys of a block's layers, one after the other, ``[K, S, D]``, rotated to new positions."""
    stays = np.array_equal(old, new)
    for layer, (keys, info) in enumerate(zip(block.keys, layers, strict=True)):
        yield keys if stays or info.rerotate is None else rotate(layer, keys[None], old[None], new[None])[0]


def moved_span(old: Positions, new: Positions) -> tuple[int, int]:
    """The first and one behind the last index where positions differ; ``(0, 0)`` if none does."""
    moved = np.flatnonzero(old != new)
    return (int(moved[0]), int(moved[-1]) + 1) if len(moved) else (0, 0)


__all__ = [
    "Array",
    "Kv",
    "KvStore",
    "MemoryBudget",
    "Positions",
    "Rotate",
    "moved_span",
    "no_room",
    "rotated_keys",
    "with_room",
]
