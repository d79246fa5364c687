"""The live cache of methods that drop keys: the first tokens, and the last ones in a ring."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from mesart.graphs.manifest import Manifest
from mesart.graphs.reach import Reach
from mesart.runtime.backends import Array
from mesart.runtime.cache import Positions
from mesart.runtime.graphs import RoleGraphs
from mesart.runtime.host_cache import MASKED, HostCache

_ROWS = 256
"""Tokens of a slice that products with weights need to be fast."""


class WindowCache(HostCache):
    """A host cache whose size does not grow with the text; see :class:`~mesart.graphs.reach.Reach`.

    The slots of the first tokens are theirs. The others are taken in turn: a token overwrites the one that was
    ``window`` tokens before it. Graphs see by a key's position, not by its slot, what it is.
    """

    def __init__(self, manifest: Manifest, graphs: RoleGraphs) -> None:
        assert manifest.config.reach is not None
        self._reach: Reach = manifest.config.reach
        super().__init__(manifest, graphs)

    def make_room(self, row: int, tokens: int) -> None:
        super().make_room(row, min(tokens, self._reach.slots))

    def keep(self, row: int, tokens: int) -> Callable[[], None]:
        seen = self.mask[row, 0, 0] == 0
        start = int(self.positions[row][seen].max(initial=-1)) + 1
        # As many tokens as there are slots overwrite each slot at most once.
        parts = self._slots(start, start + min(tokens, self._reach.slots)) if start else ()
        slots = [slice(slot, slot + part.stop - part.start) for part, slot in parts]
        buffers = range(len(self.keys))
        keys = [[self.keys[i][row][:, part].copy() for i in buffers] for part in slots]
        values = [[self.values[i][row][:, part].copy() for i in buffers] for part in slots]
        mask, positions = self.mask[row].copy(), self.positions[row].copy()

        def bring_back() -> None:
            self._torn = True
            for part, old_keys, old_values in zip(slots, keys, values, strict=True):
                for index in buffers:
                    self.keys[index][row][:, part] = old_keys[index]
                    self.values[index][row][:, part] = old_values[index]
            self.mask[row], self.positions[row] = mask, positions
            self._torn = False

        return bring_back

    def forget(self, row: int, start: int) -> None:
        self._require_whole()
        self.mask[row, ..., self.positions[row] >= start] = MASKED

    def snapshot(self, row: int) -> tuple[list[Array], list[Array]]:
        """As of every cache; zeros in place of the keys and values that were dropped."""
        kept = np.flatnonzero(self.mask[row, 0, 0] == 0)
        tokens = self.positions[row, kept]
        result: list[list[Array]] = []
        for buffers in (self.keys, self.values):
            result.append([])
            for buffer in buffers:
                whole = np.zeros((buffer.shape[1], int(tokens.max(initial=-1)) + 1, buffer.shape[3]), buffer.dtype)
                whole[:, tokens] = buffer[row][:, kept]
                result[-1].append(whole)
        return result[0], result[1]

    def _room(self, tokens: int, *, growing: bool = False) -> int:
        return min(super()._room(tokens, growing=growing), self._reach.slots)

    def _past_slots(self, tokens: int) -> int:
        del tokens  # they lie in a ring, and the graph looks for the first of them in the first slots
        return self._capacity

    def _slice_length(self, past: int) -> int:
        # What it writes may drop nothing that it has to see. Each of its tokens has scores with a window and with the
        # slice, of which those of a window are needed: short slices waste less.
        window = self._reach.window
        return min(super()._slice_length(past), window, max(window // 4, _ROWS))

    def _write(self, row: int, start: int, keys: list[Array], values: list[Array], positions: Positions) -> None:
        self._torn = True
        for part, slot in self._slots(start, start + len(positions)):
            super()._write(row, slot, [k[:, part] for k in keys], [v[:, part] for v in values], positions[part])
        self._torn = False

    def _slots(self, start: int, stop: int) -> Iterator[tuple[slice, int]]:
        """The parts of the tokens ``start .. stop - 1`` whose slots lie side by side, and the first slot of each."""
        first, window = self._reach.sinks, self._reach.window
        token = start
        while token < stop:
            turn = (token - first) % window
            slot, end = (token, first) if token < first else (first + turn, token + window - turn)
            yield slice(token - start, min(end, stop) - start), slot
            token = min(end, stop)


__all__ = ["WindowCache"]
