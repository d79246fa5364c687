"""Rotates keys on a device from their positions to others, by the bundle's engine for that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mesart.graphs.bundle.manifest import Manifest
from mesart.graphs.bundle.names import key_name, rotated_name
from mesart.runtime.backends import STORAGE
from mesart.runtime.engines import Engines
from mesart.runtime.kv.store import Positions
from mesart.runtime.run_inputs import Packing, RunInputs
from mesart.runtime.slots import SlotBlock, SlotTensor


class DeviceRotation:
    """Takes keys of all layers that rotate, as many at a time as the engine takes; the result lies apart from them.

    What it needs is allocated before the first rotation and kept: to undo one must not fail for want of memory.
    """

    def __init__(self, manifest: Manifest, engines: Engines) -> None:
        self._engines, self._cuda = engines, engines.cuda
        itemsize = np.dtype(STORAGE[manifest.dtype]).itemsize
        self._sizes = {i: (x.kv_heads, x.key_size * itemsize) for i, x in enumerate(manifest.layers) if x.rerotate}
        self._staging: tuple[SlotBlock, SlotBlock, RunInputs] | None = None

    @property
    def at_a_time(self) -> int:
        """Keys of a layer that one call rotates; 0 where no layer rotates its keys."""
        return self._engines.profile("rerotate").new if self._sizes else 0

    def prepare(self) -> None:
        """Takes what rotations need, before others take the memory.

        Raises:
            MesaError: there is not so much memory.
        """
        if self._sizes and self._staging is None:
            self._allocate()
            self._engines.prepare("rerotate")

    def __call__(
        self, keys: Sequence[SlotTensor], slot: int, old: Positions, new: Positions
    ) -> Mapping[int, SlotTensor]:
        """The keys of ``slot`` and those behind it, rotated, in the first slots of a tensor a layer.

        Args:
            keys: of all layers; those of layers that do not rotate are left out of the result.
            old: where they are, int64, at most :attr:`at_a_time`.
            new: where they are to be.
        """
        before, after, inputs = self._staging or self._allocate()
        self._engines.prepare("rerotate")
        packing = Packing(before.slots)
        addresses = packing.addresses(inputs.address)
        for layer, source, target in zip(self._sizes, before.tensors, after.tensors, strict=True):
            source.copy(self._cuda, 0, keys[layer], slot, len(old))
            source.clear(self._cuda, len(old))  # or the engine reads what was rotated before, which may be no numbers
            addresses[key_name(layer)], addresses[rotated_name(layer)] = source.address, target.address
        memory = inputs.next()
        packing.fill_rotation(memory, old, new)
        inputs.upload(memory, packing.bytes)
        self._engines.enqueue("rerotate", None, addresses)
        return dict(zip(self._sizes, after.tensors, strict=True))

    def _allocate(self) -> tuple[SlotBlock, SlotBlock, RunInputs]:
        sizes, count = list(self._sizes.values()), self.at_a_time
        blocks: list[SlotBlock] = []
        try:
            blocks += [SlotBlock(self._cuda, sizes, count, "the keys that are rotated")]
            blocks += [SlotBlock(self._cuda, sizes, count, "the keys that are rotated")]
            self._staging = blocks[0], blocks[1], RunInputs(self._cuda, Packing(count).bytes)
        except BaseException:
            for block in blocks:
                block.free()
            raise
        return self._staging


__all__ = ["DeviceRotation"]
