"""A decoding step that is enqueued with one call: as a CUDA graph, captured the second time that it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mesart.runtime.cuda import Cuda, Pinned
from mesart.runtime.engines import Engines
from mesart.runtime.kv.device_buffers import DeviceBuffer


@dataclass
class BufferRuns:
    """What runs on one buffer need on the host, at addresses that stay: a graph copies from and to them."""

    inputs: Pinned
    """Of a decoding step."""
    logits: Pinned
    graphs: dict[int, tuple[int, Any]] = field(default_factory=dict)
    """The decoding step of each bucket, and the generation of the activations when it was captured."""

    def free(self, cuda: Cuda) -> None:
        for _, graph in self.graphs.values():
            cuda.free_graph(graph)
        for memory in (self.inputs, self.logits):
            cuda.free_pinned(memory)


class Replay:
    """Keeps, for each buffer, what was captured with its addresses; texts that get the buffer later replay it too."""

    def __init__(self, engines: Engines, input_bytes: int, logit_bytes: int) -> None:
        self._engines, self._cuda = engines, engines.cuda
        self._input_bytes, self._logit_bytes = input_bytes, logit_bytes
        self._runs: dict[DeviceBuffer, BufferRuns] = {}
        self._warm: set[int] = set()
        self._generation = engines.generation

    def of(self, buffer: DeviceBuffer) -> BufferRuns:
        """What runs on a buffer need."""
        if buffer not in self._runs:
            self._drop_freed()
            memory = self._cuda.pinned(self._input_bytes), self._cuda.pinned(self._logit_bytes)
            self._runs[buffer] = BufferRuns(*memory)
        return self._runs[buffer]

    def decode(self, runs: BufferRuns, bucket: int, work: Callable[[], None]) -> None:
        """Enqueues ``work``, a decoding step of a bucket: the same each time but for what lies in memory."""
        self._engines.prepare("decode", bucket)
        generation = self._engines.generation
        if self._generation != generation:  # graphs hold the address that activations had
            self._warm, self._generation = set(), generation
        for known, (captured, graph) in list(runs.graphs.items()):
            if captured != generation:
                del runs.graphs[known]
                self._cuda.free_graph(graph)
        if bucket not in self._warm or not self._engines.capturable("decode", bucket):
            work()  # the first run may allocate, which a capture may not
            self._warm.add(bucket)
            return
        if bucket not in runs.graphs:
            runs.graphs[bucket] = (generation, self._cuda.capture(work))
        self._cuda.launch(runs.graphs[bucket][1])

    def _drop_freed(self) -> None:
        freed = [buffer for buffer in self._runs if buffer.freed]
        if freed:
            self._cuda.synchronize()  # what was enqueued since may not wait while page-locked memory goes
        for buffer in freed:
            self._runs.pop(buffer).free(self._cuda)

    def close(self) -> None:
        """Forgets all of it; the device's owner frees it."""
        self._runs.clear()


__all__ = ["BufferRuns", "Replay"]
