"""Memory of keys and values on a device, taken and given back by texts that come and go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mesart.graphs.bundle.manifest import LayerInfo
from mesart.runtime.cuda import Cuda
from mesart.runtime.slot_positions import SlotPositions
from mesart.runtime.slots import SlotBlock, SlotTensor


@dataclass(eq=False)
class DeviceBuffer:
    """Keys of all layers, then values of all layers, ``[1, K, P, D]`` each, and where the keys are."""

    block: SlotBlock
    positions: SlotPositions | None
    """If the engines look at them."""
    freed: bool = field(default=False, init=False)
    """Whether its memory is gone: nothing that was made for its addresses may be used any more."""

    @property
    def slots(self) -> int:
        return self.block.slots

    @property
    def tensors(self) -> Sequence[SlotTensor]:
        return self.block.tensors

    @property
    def bytes(self) -> int:
        return self.block.bytes + (self.positions.bytes if self.positions is not None else 0)

    def clear(self, cuda: Cuda, start: int) -> None:
        """Fills the slots from ``start`` on with zeros."""
        for tensor in self.tensors:
            tensor.clear(cuda, start)

    def copy(self, cuda: Cuda, start: int, source: DeviceBuffer, source_start: int, count: int) -> None:
        """Copies ``count`` slots of another buffer to slot ``start`` and those behind it."""
        if count:
            for target, origin in zip(self.tensors, source.tensors, strict=True):
                target.copy(cuda, start, origin, source_start, count)

    def free(self) -> None:
        self.freed = True
        self.block.free()
        if self.positions is not None:
            self.positions.free()


class DeviceBuffers:
    """Buffers of a kind. One that is given back is kept for the next that asks for its size.

    Whoever takes one finds all slots zero: what another text has left may be no numbers, and 0 times NaN is NaN.

    Args:
        itemsize: bytes of a number.
        positions: whether engines look at positions of keys.
        what: what they are, for the error when there is not enough memory.
    """

    def __init__(self, cuda: Cuda, layers: Sequence[LayerInfo], itemsize: int, *, positions: bool, what: str) -> None:
        self._cuda, self._positions, self._what = cuda, positions, what
        self._sizes = [(x.kv_heads, x.key_size * itemsize) for x in layers]
        self._sizes += [(x.kv_heads, x.value_size * itemsize) for x in layers]
        self._spare: list[DeviceBuffer] = []

    @property
    def spare_bytes(self) -> int:
        """Of buffers that nobody has."""
        return sum(buffer.bytes for buffer in self._spare)

    def bytes_of(self, slots: int) -> int:
        """What a buffer takes."""
        return SlotBlock.bytes_of(self._sizes, slots) + (SlotPositions.bytes_of(slots) if self._positions else 0)

    def take(self, slots: int) -> DeviceBuffer:
        """A buffer of so many slots, all zero."""
        for buffer in self._spare:
            if buffer.slots == slots:
                self._spare.remove(buffer)
                buffer.clear(self._cuda, 0)
                return buffer
        self.trim()  # of other sizes: texts have changed
        block = SlotBlock(self._cuda, self._sizes, slots, self._what)
        try:
            return DeviceBuffer(block, SlotPositions(self._cuda, slots) if self._positions else None)
        except BaseException:
            block.free()
            raise

    def give(self, buffer: DeviceBuffer) -> None:
        self._spare.append(buffer)

    def trim(self) -> bool:
        """Frees the buffers that nobody has; whether there were any."""
        spare, self._spare = self._spare, []
        for buffer in spare:
            buffer.free()
        return bool(spare)

    def close(self) -> None:
        """Forgets all buffers, whose memory has gone with the device's."""
        self._spare.clear()


__all__ = ["DeviceBuffer", "DeviceBuffers"]
