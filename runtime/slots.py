"""Tensors of slots on a device: keys or values of one layer, ``[1, K, P, D]``, a slot for each token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mesart.runtime.cuda import Cuda, aligned


@dataclass(frozen=True)
class SlotTensor:
    """One tensor ``[1, heads, slots, D]``, contiguous, of ``slot_bytes`` = D times the size of a number."""

    address: int
    heads: int
    slots: int
    slot_bytes: int

    @property
    def pitch(self) -> int:
        """Bytes from one head to the next."""
        return self.slots * self.slot_bytes

    @property
    def bytes(self) -> int:
        return self.heads * self.pitch

    def at(self, slot: int) -> int:
        """The address of a slot of the first head."""
        return self.address + slot * self.slot_bytes

    def copy(self, cuda: Cuda, slot: int, source: SlotTensor, source_slot: int, count: int) -> None:
        """Copies ``count`` slots of another tensor to ``slot`` and those behind it."""
        width = count * self.slot_bytes
        cuda.copy_rows(self.at(slot), self.pitch, source.at(source_slot), source.pitch, width, self.heads)

    def clear(self, cuda: Cuda, slot: int) -> None:
        """Fills the slots from ``slot`` on with zeros."""
        if slot < self.slots:
            cuda.zero_rows(self.at(slot), self.pitch, (self.slots - slot) * self.slot_bytes, self.heads)


class SlotBlock:
    """Several tensors of as many slots, in one piece of device memory, all zero at first.

    Args:
        sizes: heads and bytes of a slot of each tensor.
        slots: P.
        what: what they are, for the error when there is not enough memory.
    """

    def __init__(self, cuda: Cuda, sizes: Sequence[tuple[int, int]], slots: int, what: str) -> None:
        self._cuda = cuda
        self.slots = slots
        self.bytes = self.bytes_of(sizes, slots)
        self._address = address = cuda.allocate(self.bytes, what)
        self.tensors: list[SlotTensor] = []
        for heads, size in sizes:
            tensor = SlotTensor(address, heads, slots, size)
            self.tensors.append(tensor)
            address += aligned(tensor.bytes)

    @staticmethod
    def bytes_of(sizes: Sequence[tuple[int, int]], slots: int) -> int:
        """What a block takes."""
        return sum(aligned(heads * slots * size) for heads, size in sizes)

    def free(self) -> None:
        self._cuda.free(self._address)


__all__ = ["SlotBlock", "SlotTensor"]
