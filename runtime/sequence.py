"""One live text: its tokens, their positions, and where their keys and values lie."""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mesart.graphs.errors import EngineError, InputError
from mesart.graphs.method.plan import Plan, Span
from mesart.graphs.method.stairs import ORDINARY, Stairs
from mesart.runtime.kv.store import Kv, with_room

if TYPE_CHECKING:
    from mesart.runtime.engine import Turn


class Sequence:
    """A live text of an engine.

    Attributes:
        kv: the keys and values of its tokens; ``None`` once it has been closed.
        stairs: the positions of its tokens.
        turn: what is being appended to it, if anything is.
        shown: tokens that were given out and not computed yet: the next turn begins with them.
        chunks: the chunks of its first prompt, while their keys still are where that put them; none otherwise.
    """

    def __init__(self, kv: Kv) -> None:
        self.kv: Kv | None = kv
        self.stairs: Stairs = ORDINARY
        self.turn: Turn | None = None
        self.shown: list[int] = []
        self.chunks: tuple[Span, ...] = ()
        self._ids = np.zeros(0, np.int64)
        self._length = 0

    def __len__(self) -> int:
        return self._length

    @property
    def ids(self) -> NDArray[np.int64]:
        """All tokens whose keys are there, int64 ``[T]``; a view that the next turn leaves alone."""
        return self._ids[: self._length]

    def append(self, ids: Tokens[int] | NDArray[np.int64]) -> None:
        start, stop = self._length, self._length + len(ids)
        self._ids = with_room(self._ids, start, stop)
        self._ids[start:stop] = ids
        self._length = stop

    def truncate(self, length: int) -> None:
        self._length = length

    def begins(self, plan: Plan, ids: Tokens[int] | NDArray[np.int64]) -> bool:
        """Whether a first prompt of these tokens differs from the text in its tail at most."""
        count = plan.tail.start
        if not plan.chunks or self.kv is None or self.kv.torn or len(self) < count:
            return False
        same_cut = self.chunks == plan.chunks and self.stairs == plan.stairs
        return same_cut and np.array_equal(self.ids[:count], ids[:count])

    def require_kv(self) -> Kv:
        """Its keys and values, if it can go on.

        Raises:
            MesaError: it was closed, or an interrupted call left keys half written.
        """
        if self.kv is None:
            raise InputError("this text was closed or aborted; begin a new one")
        if self.kv.torn:
            raise EngineError("keys of the text are half written since a call was interrupted; begin a new one")
        return self.kv


__all__ = ["Sequence"]
