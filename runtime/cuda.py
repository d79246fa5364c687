"""A GPU and its memory, through NVIDIA's ``cuda-python``: one device, one stream, errors in one line.

Device memory is an address, a plain int. All work is put on the one stream and done in that order, later; only
:meth:`Cuda.synchronize` waits.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mesart.graphs.errors import CapacityError, EngineError, InputError
from mesart.graphs.memory_size import GIB

ALIGNMENT = 256
"""Of every device address that an engine reads or writes."""


def aligned(size: int) -> int:
    """The next multiple of :data:`ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Pinned:
    """Page-locked host memory, which the device copies without the CPU."""

    address: int
    bytes: NDArray[np.uint8]
    """The memory itself; gone when it is freed."""


class Cuda:
    """The first GPU that the process sees (``CUDA_VISIBLE_DEVICES`` chooses another).

    Raises:
        MesaError: no cuda-python, no driver, or no GPU.
    """

    def __init__(self) -> None:
        try:
            self._api: Any = importlib.import_module("cuda.bindings.runtime")
        except ImportError as missing:
            raise InputError(
                "engines need the package cuda-python: pip install 'mesart[tensorrt-rtx]', or 'mesart[tensorrt]'"
            ) from missing
        error, count = self._api.cudaGetDeviceCount()
        if error != self._api.cudaError_t.cudaSuccess or not count:
            reason = self._text(error) if count is None else "it counts none"
            raise InputError(f"there is no GPU here, or no driver for it ({reason}); use another backend")
        self._call("cudaSetDevice", 0)
        attributes = self._api.cudaDeviceAttr
        major = self._call("cudaDeviceGetAttribute", attributes.cudaDevAttrComputeCapabilityMajor, 0)
        minor = self._call("cudaDeviceGetAttribute", attributes.cudaDevAttrComputeCapabilityMinor, 0)
        self.capability = f"sm{major}{minor}"
        """Compute capability, such as ``sm89``."""
        self._allocated: dict[int, int] = {}
        self._pinned: set[int] = set()
        self._graphs: dict[int, Any] = {}
        self.reclaim: Callable[[], bool] = lambda: False
        """Called where memory is short: frees what is kept only to be used again; whether that was anything."""
        self.waits = 0
        """How often all work on the stream has been waited for."""
        self._stream = self._call("cudaStreamCreateWithFlags", self._api.cudaStreamNonBlocking)

    @property
    def stream(self) -> int:
        """The stream's handle, for TensorRT."""
        return int(self._stream)

    def memory(self) -> tuple[int, int]:
        """Bytes of device memory that are free, and that there are."""
        free, total = self._call("cudaMemGetInfo")
        return int(free), int(total)

    @property
    def allocated_bytes(self) -> int:
        """Of device memory, by :meth:`allocate`."""
        return sum(self._allocated.values())

    def require(self, size: int, what: str) -> None:
        """Raises a :class:`MesaError` if less than ``size`` bytes are free; arguments as of :meth:`allocate`."""
        while size > self.memory()[0]:
            if not self.reclaim():
                raise self.out_of_memory(size, what)

    def allocate(self, size: int, what: str) -> int:
        """Device memory of ``size`` bytes, all zero.

        Args:
            what: what it is for, a noun for the error.

        Raises:
            MesaError: there is not so much memory.
        """
        error, address = self._api.cudaMalloc(size)
        if error == self._api.cudaError_t.cudaErrorMemoryAllocation:
            self._api.cudaGetLastError()  # or TensorRT finds it later, and takes it for its own
            if self.reclaim():
                return self.allocate(size, what)
            raise self.out_of_memory(size, what)
        self._check(error, "cudaMalloc")
        self._allocated[int(address)] = size
        self._call("cudaMemsetAsync", int(address), 0, size, self._stream)
        return int(address)

    def out_of_memory(self, size: int, what: str) -> CapacityError:
        """The error that says that ``size`` bytes for something are more than there are."""
        free, total = self.memory()
        return CapacityError(
            f"the GPU is out of memory: {what} take {size / GIB:.2f} GiB, {free / GIB:.2f} of {total / GIB:.2f} GiB "
            "are free; use fewer rows, shorter prompts, or export with a smaller --max-tokens"
        )

    def free(self, address: int) -> None:
        """Gives device memory back once all work on the stream is done."""
        self.synchronize()
        del self._allocated[address]
        self._call("cudaFree", address)

    def pinned(self, size: int) -> Pinned:
        """Page-locked host memory of ``size`` bytes."""
        address = int(self._call("cudaMallocHost", size))
        self._pinned.add(address)
        return Pinned(address, np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address)))

    def free_pinned(self, memory: Pinned) -> None:
        self._pinned.remove(memory.address)
        self._call("cudaFreeHost", memory.address)

    def upload(self, device: int, host: Pinned, size: int) -> None:
        """Copies the first ``size`` bytes; the host memory must stay as it is until then."""
        kind = self._api.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", device, host.address, size, kind, self._stream)

    def download(self, host: Pinned, device: int, size: int, at: int = 0) -> None:
        """Copies ``size`` bytes to host memory, from its byte ``at`` on."""
        kind = self._api.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", host.address + at, device, size, kind, self._stream)

    def copy_rows(self, to: int, to_pitch: int, source: int, source_pitch: int, width: int, rows: int) -> None:
        """Copies ``rows`` rows of ``width`` bytes on the device, whose beginnings lie a pitch apart."""
        kind = self._api.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call("cudaMemcpy2DAsync", to, to_pitch, source, source_pitch, width, rows, kind, self._stream)

    def upload_rows(self, to: int, pitch: int, host: Pinned, at: int, width: int, rows: int) -> None:
        """Copies rows that lie side by side in host memory, from its byte ``at`` on, a ``pitch`` apart to the device.

        The host memory must stay as it is until then.
        """
        kind = self._api.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpy2DAsync", to, pitch, host.address + at, width, width, rows, kind, self._stream)

    def download_rows(self, host: Pinned, at: int, source: int, pitch: int, width: int, rows: int) -> None:
        """The way back of :meth:`upload_rows`."""
        kind = self._api.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpy2DAsync", host.address + at, width, source, pitch, width, rows, kind, self._stream)

    def zero_rows(self, to: int, pitch: int, width: int, rows: int) -> None:
        """Fills ``rows`` rows of ``width`` bytes with zeros."""
        self._call("cudaMemset2DAsync", to, pitch, 0, width, rows, self._stream)

    def synchronize(self) -> None:
        """Waits until all work is done; errors of that work show here."""
        self._call("cudaStreamSynchronize", self._stream)
        self.waits += 1

    def capture(self, work: Callable[[], None]) -> Any:
        """What ``work`` puts on the stream, as a graph that :meth:`launch` runs; it is not run now."""
        self._call("cudaStreamBeginCapture", self._stream, self._api.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed)
        try:
            work()
        except BaseException:
            error, recorded = self._api.cudaStreamEndCapture(self._stream)  # or the stream could not be used any more
            if error == self._api.cudaError_t.cudaSuccess:
                self._api.cudaGraphDestroy(recorded)
            self._api.cudaGetLastError()
            raise
        recorded = self._call("cudaStreamEndCapture", self._stream)
        try:
            graph = self._call("cudaGraphInstantiate", recorded, 0)
        finally:
            self._call("cudaGraphDestroy", recorded)
        self._graphs[int(graph)] = graph
        return graph

    def launch(self, graph: Any) -> None:
        self._call("cudaGraphLaunch", graph, self._stream)

    def free_graph(self, graph: Any) -> None:
        del self._graphs[int(graph)]
        self._call("cudaGraphExecDestroy", graph)

    def close(self) -> None:
        """Frees everything; without an error, also after one that has left the device unusable."""
        api = self._api
        api.cudaStreamSynchronize(self._stream)
        for graph in self._graphs.values():
            api.cudaGraphExecDestroy(graph)
        for address in self._allocated:
            api.cudaFree(address)
        for address in self._pinned:
            api.cudaFreeHost(address)
        api.cudaStreamDestroy(self._stream)
        self._graphs.clear()
        self._allocated.clear()
        self._pinned.clear()

    def _call(self, name: str, *arguments: Any) -> Any:
        """Calls a function of the CUDA runtime; its result, or results."""
        error, *results = getattr(self._api, name)(*arguments)
        self._check(error, name)
        return results[0] if len(results) == 1 else results

    def _check(self, error: Any, name: str) -> None:
        if error != self._api.cudaError_t.cudaSuccess:
            self._api.cudaGetLastError()
            raise EngineError(f"CUDA: {name}: {self._text(error)}")

    def _text(self, error: Any) -> str:
        _, text = self._api.cudaGetErrorString(error)
        return text.decode() if isinstance(text, bytes) else str(text)


__all__ = ["ALIGNMENT", "Cuda", "Pinned", "aligned"]
