"""What executes a graph. One interface, one class for each engine; engines are imported when they are asked for.

Arrays are numpy. bfloat16, which numpy lacks, travels as its bits in uint16.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from mesart.graphs.bundle.manifest import GraphInfo
from mesart.graphs.bundle.names import past_of
from mesart.graphs.errors import BundleError, CapacityError, EngineError, InputError, first_line, telling_line
from mesart.runtime.engine_imports import import_onnxruntime, import_openvino, leave_alone_in_forks
from mesart.runtime.engines import PACKAGES
from mesart.runtime.external_data import require_file_names
from mesart.runtime.linked_weights import MappedGraph, has_links
from mesart.runtime.openvino_paged import cache_types, free_cache_types, paged_attention
from mesart.runtime.signature import check_signature, onnxruntime_signature, openvino_signature

Array = NDArray[Any]

STORAGE: dict[str, type[np.generic]] = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
"""The numpy type that holds a bundle's dtype."""

SymbolicKind = Literal["symbolic", "onnxruntime"]

Activations = Literal["int8"]
"""To what activations are rounded in front of quantised weights, where that is asked for (docs/decoding.md)."""

KvDtype = Literal["float16"]
"""In what keys and values are kept, where another dtype than the bundle's is asked for (docs/decoding.md)."""

THREADS_PER_CORE = 4
"""More threads than that only wait for each other; engines make any number that they are asked for, or die of it."""

_POISON: dict[int, int] = {2: 0x7FED, 4: 0x7FEDC0DE}
"""A NaN that no computation gives, by its size in bytes: in float16 and bfloat16 as in float32."""

ROUNDED_GROUP = 32
"""Inputs of a product that are rounded to 8 bits with a scale of their own."""


class Graph(Protocol):
    """A loaded graph. Outputs belong to the caller until the next call."""

    def __call__(self, feeds: Mapping[str, Array], /) -> dict[str, Array]: ...


class Backend(Protocol):
    """Executes ONNX files."""

    name: str
    device: str
    graph_kind: SymbolicKind
    """Of the symbolic graph that it runs."""

    def open(self, path: Path, info: GraphInfo | None = None) -> Graph:
        """Compiles the graph in a file, which has the inputs and outputs that ``info`` says."""
        ...


class OnnxRuntimeBackend:
    """onnxruntime: its CUDA provider where present, else the CPU."""

    name = "onnxruntime"

    def __init__(self, dtype: str, threads: int | None = None, activations: Activations | None = None) -> None:
        self._onnxruntime = onnxruntime = import_onnxruntime()
        cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
        self.device = "cuda" if cuda else "cpu"
        self.graph_kind: SymbolicKind = "symbolic" if cuda else "onnxruntime"
        if dtype == "bfloat16" and not cuda:
            raise InputError(
                "onnxruntime computes no bfloat16 on the CPU; use backend 'openvino', or export with --dtype float32"
            )
        self._providers = ["CUDAExecutionProvider"] * cuda + ["CPUExecutionProvider"]
        self._options = onnxruntime.SessionOptions()
        self._options.intra_op_num_threads = threads or available_threads()
        self._options.log_severity_level = 3
        # Weights outside the arena, which would take twice their size.
        self._options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        # 1: products with quantised weights in float32. 4, the default, rounds activations to 8 bits.
        self._options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "4" if activations else "1")

    def unpack_weights(self) -> None:
        """Unpacks quantised weights while a graph is loaded: for 8 bits, which its kernels unpack at each run else."""
        self._options.add_session_config_entry("session.disable_quant_qdq", "1")

    def _session(self, path: Path, info: GraphInfo | None) -> Any:
        require_file_names(path)
        try:
            session = self._onnxruntime.InferenceSession(os.fspath(path), self._options, providers=self._providers)
        except Exception as error:  # onnxruntime raises kinds of its own, all for a graph that it cannot load
            raise EngineError(f"onnxruntime cannot load {path}: {first_line(error)}") from error
        check_signature(path, info, *onnxruntime_signature(session))
        return session

    def open_in_place(self, path: Path, info: GraphInfo | None = None) -> OnnxRuntimeInPlace:
        """Compiles a graph that writes into the caches that it is given."""
        return OnnxRuntimeInPlace(self._onnxruntime, self._session(path, info), path.name)

    def open(self, path: Path, info: GraphInfo | None = None) -> Graph:
        session = self._session(path, info)
        names = [output.name for output in session.get_outputs()]
        known = {value.name for value in session.get_inputs()}

        def run(feeds: Mapping[str, Array]) -> dict[str, Array]:
            try:
                outputs = session.run(names, {name: value for name, value in feeds.items() if name in known})
            except Exception as error:
                raise EngineError(f"onnxruntime failed in {path.name}: {first_line(error)}") from error
            return dict(zip(names, outputs, strict=True))

        return run


class OnnxRuntimeInPlace:
    """A loaded graph that reads and writes caches where they lie: each ``present`` is its ``past_key_values``."""

    def __init__(self, onnxruntime: Any, session: Any, name: str) -> None:
        self._session, self._name = session, name
        self._value = onnxruntime.OrtValue.ortvalue_from_numpy  # which copies nothing on a CPU
        self._inputs = [value.name for value in session.get_inputs()]
        self._outputs = [value.name for value in session.get_outputs()]

    def __call__(self, feeds: Mapping[str, Array], caches: Mapping[str, Array], /) -> dict[str, Array]:
        values = {name: self._value(array) for name, array in caches.items()}
        try:
            binding = self._session.io_binding()
            for name in self._inputs:
                cache = values.get(name)
                if cache is not None:
                    binding.bind_ortvalue_input(name, cache)
                else:
                    binding.bind_ortvalue_input(name, self._value(np.asarray(feeds[name], order="C")))
            for name in self._outputs:
                cache = values.get(past_of(name))
                if cache is not None:
                    binding.bind_ortvalue_output(name, cache)
                else:
                    binding.bind_output(name)
            self._session.run_with_iobinding(binding)
            outputs = dict(zip(self._outputs, binding.get_outputs(), strict=True))
            return {name: value.numpy() for name, value in outputs.items() if past_of(name) not in values}
        except Exception as error:
            raise EngineError(f"onnxruntime failed in {self._name}: {first_line(error)}") from error


class OpenVinoBackend:
    """OpenVINO on the CPU."""

    name = "openvino"
    device = "cpu"
    graph_kind: SymbolicKind = "symbolic"

    def __init__(self, dtype: str, threads: int | None = None, activations: Activations | None = None) -> None:
        self._openvino = openvino = import_openvino()
        self._core = openvino.Core()
        leave_alone_in_forks(self)
        self._dtype = dtype
        precision = {"float32": "f32", "float16": "f32", "bfloat16": "bf16"}[dtype]
        # Without the hint OpenVINO computes float32 graphs in bfloat16 where the CPU has it.
        self._options = {
            "INFERENCE_PRECISION_HINT": precision,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads or available_threads(),
            # 0: activations are never rounded; OpenVINO's default rounds them in front of quantised weights.
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": ROUNDED_GROUP if activations else 0,
        }

    def open(self, path: Path, info: GraphInfo | None = None) -> Graph:
        require_file_names(path)
        linked = MappedGraph(path) if has_links(path.parent) else None
        try:
            model = self._core.read_model(linked.serialised() if linked else os.fspath(path))
            compiled = self._core.compile_model(model, "CPU", self._options)
        except (RuntimeError, MemoryError) as error:
            raise EngineError(f"OpenVINO cannot load {path}: {telling_line(error)}") from error
        check_signature(path, info, *openvino_signature(compiled))
        return OpenVinoGraph(self._openvino, compiled, path.name, linked)

    def open_paged(self, path: Path, info: GraphInfo | None = None, kv_dtype: KvDtype | None = None) -> OpenVinoGraph:
        """Compiles the paged graph, with OpenVINO's operator for paged attention in the place of ours.

        Args:
            kv_dtype: in what it is to keep keys and values; the bundle's dtype if left out.

        Raises:
            MesaError: this version of OpenVINO has no such operator, or another one than is known here; or on this CPU
                it keeps keys and values in another dtype.
        """
        require_file_names(path)
        linked = MappedGraph(path) if has_links(path.parent) else None
        dtype = kv_dtype or self._dtype
        cache = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[dtype]
        try:
            with paged_attention(self._openvino, self._core):
                model = self._core.read_model(linked.serialised() if linked else os.fspath(path))
            check_signature(path, info, *openvino_signature(model))
            free_cache_types(self._openvino, model)
            compiled = self._core.compile_model(model, "CPU", self._options | {"KV_CACHE_PRECISION": cache})
        except (RuntimeError, MemoryError) as error:
            raise EngineError(f"OpenVINO cannot load {path}: {telling_line(error)}") from error
        kept = cache_types(compiled)
        if kept != {cache}:
            raise EngineError(
                f"on this CPU OpenVINO's paged attention keeps {' and '.join(sorted(kept))} where "
                f"{dtype} was asked for; "
                + ("leave kv_dtype out" if kv_dtype else "export with --dtype float32 for it")
            )
        return OpenVinoGraph(self._openvino, compiled, path.name, linked)


class OpenVinoGraph:
    """A compiled graph; see :class:`Graph`."""

    def __init__(self, openvino: Any, compiled: Any, name: str, linked: MappedGraph | None) -> None:
        self._openvino, self._name = openvino, name
        self._linked = linked  # weights may be read where they are mapped
        self._request = compiled.create_infer_request()
        leave_alone_in_forks(self)
        # A tensor that needs no conversion carries the names of both its ends.
        self._inputs = [(port.get_names(), port) for port in compiled.inputs]
        self._outputs = [(port.get_names(), port) for port in compiled.outputs]
        self._bound: dict[str, Any] = {}
        self._end: Array | None = None
        """The last number of the first output of the run before, as bits."""

    def __call__(self, feeds: Mapping[str, Array], /) -> dict[str, Array]:
        tensors = self._tensors(feeds)
        # Short of memory, OpenVINO computes nothing, says nothing, and leaves the results of the run before.
        if self._end is not None:
            self._end[...] = _POISON[self._end.itemsize]
        try:
            self._request.infer(tensors, share_inputs=True, share_outputs=True)
        except (RuntimeError, MemoryError) as error:
            raise EngineError(f"OpenVINO failed in {self._name}: {telling_line(error)}") from error
        results: dict[str, Array] = {}
        for names, port in self._outputs:
            data = self._request.get_tensor(port).data
            array = data.view(np.uint16) if port.get_element_type() == self._openvino.Type.bf16 else data
            results.update(dict.fromkeys(names, array))
        self._end = _last_number(next(iter(results.values())))
        if self._end is not None and self._end[0] == _POISON[self._end.itemsize]:
            raise CapacityError(
                f"OpenVINO computed nothing in {self._name} and gave no reason: it is probably out of memory; use "
                "fewer rows or shorter prompts, or give the process more memory"
            )
        return results

    def bind(self, name: str, array: Array) -> None:
        """Gives an input memory for all runs, which the graph may write into."""
        port = next(port for names, port in self._inputs if name in names)
        kind = port.get_element_type()
        self._bound[name] = tensor = self._openvino.Tensor(array, self._openvino.Shape(array.shape), kind)
        self._request.set_tensor(port, tensor)
        self._inputs = [(names, port) for names, port in self._inputs if name not in names]

    def _tensors(self, feeds: Mapping[str, Array]) -> dict[str, Any]:
        openvino, tensors = self._openvino, {}
        for names, port in self._inputs:
            name = next((name for name in names if name in feeds), None)
            if name is None:
                raise BundleError(
                    f"{self._name} has an input {min(names, default='without a name')!r} that nothing is fed to; "
                    "export the bundle again"
                )
            value = np.asarray(feeds[name], order="C")
            if port.get_element_type() == openvino.Type.bf16:
                tensors[name] = openvino.Tensor(value, openvino.Shape(value.shape), openvino.Type.bf16)
            else:
                tensors[name] = openvino.Tensor(value, shared_memory=True)
        return tensors


def _last_number(array: Array) -> Array | None:
    """The last number of an array in its own memory, as bits, if it has one of a float type."""
    bits = {2: np.uint16, 4: np.uint32}.get(array.itemsize)
    return array.reshape(-1)[-1:].view(bits) if bits is not None and array.size else None


class TorchBackend:
    """The reference: the model's own PyTorch code, with the bundle's weights."""

    name = "torch"
    device = "cpu"
    graph_kind: SymbolicKind = "symbolic"

    def __init__(self, dtype: str, threads: int | None = None, activations: Activations | None = None) -> None:
        del dtype, threads  # the bundle's; torch's own setting
        if activations:
            raise InputError("backend 'torch' is the reference and rounds no activations; leave activations out")
        self.trust_remote_code = False
        """Whether Python code of the bundle may run."""
        self._opened: dict[str, Any] = {}

    def open(self, path: Path, info: GraphInfo | None = None) -> Graph:
        from mesart.graphs.model.torch_graph import open_torch  # noqa: PLC0415  (torch only where it is asked for)

        del info  # it computes any of them
        graph = open_torch(path, self._opened, trust_remote_code=self.trust_remote_code)

        def run(feeds: Mapping[str, Array]) -> dict[str, Array]:
            try:
                return graph(feeds)
            except RuntimeError as error:  # among others for memory that it does not get
                raise EngineError(f"PyTorch failed in {path.name}: {first_line(error)}") from error

        return run


_BACKENDS: dict[str, tuple[str, Callable[..., Backend]]] = {
    # In the order of speed measured on CPUs (docs/log.md); the package that each needs, and is an extra of this one.
    "openvino": ("openvino", OpenVinoBackend),
    "onnxruntime": ("onnxruntime", OnnxRuntimeBackend),
    "torch": ("torch", TorchBackend),
}


def backend_names() -> list[str]:
    """The backends that exist, the fastest first."""
    return [*PACKAGES, *_BACKENDS]


def present_backends() -> list[str]:
    """The backends that are installed and run any bundle, the fastest first: not TensorRT, which needs engines."""
    return [name for name, (package, _) in _BACKENDS.items() if importlib.util.find_spec(package)]


def choose_backend(
    name: str, dtype: str, threads: int | None = None, activations: Activations | None = None
) -> tuple[Backend, str]:
    """The backend of that name, or with ``auto`` the fastest that is installed; and the reason, a phrase for people.

    TensorRT is none of them: it runs engines, not ONNX files (:mod:`mesart.runtime.load`).

    Raises:
        MesaError: unknown name, missing package, a number of threads that is none, or a dtype that the backend does not
            compute.
    """
    require_threads(threads)
    if name != "auto":
        if name not in _BACKENDS:
            raise InputError(f"unknown backend {name!r}; there are auto, {', '.join(backend_names())}")
        package, make = _BACKENDS[name]
        if importlib.util.find_spec(package) is None:
            extra = "export" if name == "torch" else name
            raise InputError(f"backend {name!r} needs the package {package}: pip install 'mesart[{extra}]'")
        return make(dtype, threads, activations), "asked for"
    present = present_backends()
    if "onnxruntime" in present and dtype != "bfloat16":
        backend = OnnxRuntimeBackend(dtype, threads, activations)
        if backend.device == "cuda":
            return backend, "the fastest here: it has a GPU"
    if not present:
        raise InputError("no backend is installed: pip install 'mesart[openvino]' or 'mesart[onnxruntime]'")
    for candidate in present:
        if candidate == "onnxruntime" and dtype == "bfloat16":
            continue
        made = _BACKENDS[candidate][1](dtype, threads, activations)
        return made, f"the fastest of those installed ({', '.join(present)})"
    raise InputError("none of the installed backends computes bfloat16 on this machine: pip install 'mesart[openvino]'")


def require_threads(threads: int | None) -> None:
    """Raises a :class:`MesaError` unless ``threads`` is ``None`` or a number of threads that a machine can use."""
    most = THREADS_PER_CORE * (os.cpu_count() or 1)
    if threads is None:
        return
    whole = type(threads) is int  # True is none
    if not whole or not 1 <= threads <= most:
        raise InputError(
            f"threads is {threads!r}; it must be a whole number from 1 to {most} "
            f"({THREADS_PER_CORE} for each of this machine's cores), or left out for all of them"
        )


def available_threads() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
