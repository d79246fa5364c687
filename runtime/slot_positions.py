"""Where the keys of a buffer on a device are: for the engines of models that look at positions (windows, ALiBi)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mesart.runtime.cuda import Cuda


class SlotPositions:
    """The position of each slot, int64 ``[1, P]``.

    Kept on the host and copied whole before a run: a few kilobytes, and always the same copy, as a CUDA graph wants it.
    ``numbers`` may change once the stream is synchronised behind the last :meth:`upload`.
    """

    def __init__(self, cuda: Cuda, slots: int) -> None:
        self._cuda = cuda
        self.bytes = self.bytes_of(slots)
        self.address = cuda.allocate(self.bytes, "the positions of keys")
        self._host = cuda.pinned(self.bytes)
        self.numbers: NDArray[np.int64] = self._host.bytes.view(np.int64)
        self.numbers[:] = np.arange(slots)

    @staticmethod
    def bytes_of(slots: int) -> int:
        """What they take on the device."""
        return 8 * slots

    def upload(self) -> None:
        """Enqueues the copy to the device."""
        self._cuda.upload(self.address, self._host, self.bytes)

    def free(self) -> None:
        self._cuda.free(self.address)
        self._cuda.free_pinned(self._host)


__all__ = ["SlotPositions"]
