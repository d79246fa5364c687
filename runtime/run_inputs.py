"""The small inputs of a run on a device: ids, positions, scales. They travel together, in one copy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mesart.graphs.bundle.names import FROM_IDS, INPUT_IDS, LOGITS_AT, POSITION_IDS, QUERY_SCALE, TO_IDS, WRITE_AT
from mesart.runtime.cuda import Cuda, Pinned, aligned
from mesart.runtime.kv.store import Array, Positions

_RUNS_AHEAD = 16
"""Runs that the CPU may be ahead of the GPU: each has its own copy of its inputs until they are on the device."""


class Packing:
    """Where the small inputs of a run of ``new`` tokens lie in one block."""

    def __init__(self, new: int) -> None:
        self.new = new
        ids, scales = aligned(8 * new), aligned(4 * new)
        self._at = {INPUT_IDS: 0, POSITION_IDS: ids, QUERY_SCALE: 2 * ids}
        self._at |= {LOGITS_AT: 2 * ids + scales, WRITE_AT: 2 * ids + scales + aligned(8)}
        self._at |= {FROM_IDS: 0, TO_IDS: ids}  # no run has both
        self.bytes = 2 * ids + scales + 2 * aligned(8)

    def addresses(self, block: int) -> dict[str, int]:
        """The device address of each input."""
        return {name: block + at for name, at in self._at.items()}

    def fill(
        self, memory: Pinned, ids: Sequence[int] | Array, positions: Positions, scales: NDArray[np.float32], slot: int
    ) -> None:
        """The inputs of a run that writes to ``slot`` and those behind it; filled up with tokens that nobody sees."""
        count = len(ids)
        self._put(memory, INPUT_IDS, ids)
        self._put(memory, POSITION_IDS, positions)
        scale = self._view(memory, QUERY_SCALE, np.float32, self.new)
        scale[:count], scale[count:] = scales, 1
        self._view(memory, LOGITS_AT, np.int64, 1)[0] = count - 1
        self._view(memory, WRITE_AT, np.int64, 1)[0] = slot

    def fill_rotation(self, memory: Pinned, old: Positions, new: Positions) -> None:
        """The inputs of a run that rotates keys."""
        self._put(memory, FROM_IDS, old)
        self._put(memory, TO_IDS, new)

    def _put(self, memory: Pinned, name: str, numbers: Sequence[int] | Array) -> None:
        view = self._view(memory, name, np.int64, self.new)
        view[: len(numbers)], view[len(numbers) :] = numbers, 0

    def _view(self, memory: Pinned, name: str, dtype: type[np.generic], count: int) -> Array:
        start = self._at[name]
        return memory.bytes[start : start + count * np.dtype(dtype).itemsize].view(dtype)


class RunInputs:
    """One block on the device, and copies of it on the host: a run's is not written while another's is on its way."""

    def __init__(self, cuda: Cuda, size: int) -> None:
        self._cuda = cuda
        self.address = cuda.allocate(size, "the inputs of runs")
        self._ahead = [cuda.pinned(size) for _ in range(_RUNS_AHEAD)]
        self._used, self._waits = 0, cuda.waits

    def next(self) -> Pinned:
        """Memory on the host for a run's inputs, which no copy is still reading."""
        if self._used == len(self._ahead) and self._waits == self._cuda.waits:
            self._cuda.synchronize()
        if self._waits != self._cuda.waits:
            self._used, self._waits = 0, self._cuda.waits
        self._used += 1
        return self._ahead[self._used - 1]

    def upload(self, memory: Pinned, size: int) -> None:
        """Enqueues the copy to the device; runs that were enqueued before have read theirs by then."""
        self._cuda.upload(self.address, memory, size)


__all__ = ["Packing", "RunInputs"]
