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

from mesart.graphs.errors import MesaError, first_line
from mesart.graphs.manifest import GraphInfo
from mesart.runtime.engines import PACKAGES
from mesart.runtime.signature import check_signature, onnxruntime_signature, openvino_signature

Array = NDArray[Any]

STORAGE: dict[str, type[np.generic]] = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
"""The numpy type that holds a bundle's dtype."""

SymbolicRole = Literal["any", "onnxruntime"]

Activations = Literal["int8"]
"""To what activations are rounded in front of quantised weights, where that is asked for (docs/decoding.md)."""

ROUNDED_GROUP = 32
"""Inputs of a product that are rounded to 8 bits with a scale of their own."""


class Graph(Protocol):
    """A loaded graph. Outputs belong to the caller until the next call."""

    def __call__(self, feeds: Mapping[str, Array], /) -> dict[str, Array]: ...


class Backend(Protocol):
    """Executes ONNX files."""

    name: str
    device: str
    graph_role: SymbolicRole
    """Of the symbolic graph that it runs."""

    def open(self, path: Path, info: GraphInfo | None = None) -> Graph:
        """Compiles the graph in a file, which has the inputs and outputs that ``info`` says."""
        ...


class OnnxRuntimeBackend:
    """onnxruntime: its CUDA provider where present, else the CPU."""

    name = "onnxruntime"

    def __init__(self, dtype: str, threads: int | None = None, activations: Activations | None = None) -> None:
        import onnxruntime  # noqa: PLC0415

        self._onnxruntime = onnxruntime
        cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
        self.device = "cuda" if cuda else "cpu"
        self.graph_role: SymbolicRole = "any" if cuda else "onnxruntime"
        if dtype == "bfloat16" and not cuda:
            raise MesaError(
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

    def open(self, path: Path, info: GraphInfo | None = None) -> Graph:
        try:
            session = self._onnxruntime.InferenceSession(os.fspath(path), self._options, providers=self._providers)
        except Exception as error:  # onnxruntime raises kinds of its own, all for a graph that it cannot load
            raise MesaError(f"onnxruntime cannot load {path}: {first_line(error)}") from error
        check_signature(path, info, *onnxruntime_signature(session))
        names = [output.name for output in session.get_outputs()]
        known = {value.name for value in session.get_inputs()}

        def run(feeds: Mapping[str, Array]) -> dict[str, Array]:
            try:
                outputs = session.run(names, {name: value for name, value in feeds.items() if name in known})
            except Exception as error:
                raise MesaError(f"onnxruntime failed in {path.name}: {first_line(error)}") from error
            return dict(zip(names, outputs, strict=True))

        return run


class OpenVinoBackend:
    """OpenVINO on the CPU."""

    name = "openvino"
    device = "cpu"
    graph_role: SymbolicRole = "any"

    def __init__(self, dtype: str, threads: int | None = None, activations: Activations | None = None) -> None:
        import openvino  # noqa: PLC0415

        self._openvino = openvino
        self._core = openvino.Core()
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
        openvino = self._openvino
        try:
            compiled = self._core.compile_model(self._core.read_model(os.fspath(path)), "CPU", self._options)
        except RuntimeError as error:
            raise MesaError(f"OpenVINO cannot load {path}: {first_line(error)}") from error
        check_signature(path, info, *openvino_signature(compiled))
        request = compiled.create_infer_request()
        # A tensor that needs no conversion carries the names of both its ends.
        ports = [(port.get_names(), port) for port in compiled.inputs]
        outputs = [(port.get_names(), port) for port in compiled.outputs]
        brain = openvino.Type.bf16

        def run(feeds: Mapping[str, Array]) -> dict[str, Array]:
            tensors = {}
            for names, port in ports:
                name = next(name for name in names if name in feeds)
                value = np.ascontiguousarray(feeds[name])
                if port.get_element_type() == brain:
                    tensors[name] = openvino.Tensor(value, openvino.Shape(value.shape), brain)
                else:
                    tensors[name] = openvino.Tensor(value, shared_memory=True)
            try:
                request.infer(tensors, share_inputs=True, share_outputs=True)
            except RuntimeError as error:
                raise MesaError(f"OpenVINO failed in {path.name}: {first_line(error)}") from error
            results = {}
            for names, port in outputs:
                data = request.get_tensor(port).data
                array = data.view(np.uint16) if port.get_element_type() == brain else data
                results.update(dict.fromkeys(names, array))
            return results

        return run


class TorchBackend:
    """The reference: the model's own PyTorch code, with the bundle's weights."""

    name = "torch"
    device = "cpu"
    graph_role: SymbolicRole = "any"

    def __init__(self, dtype: str, threads: int | None = None, activations: Activations | None = None) -> None:
        del dtype, threads  # the bundle's; torch's own setting
        if activations:
            raise MesaError("backend 'torch' is the reference and rounds no activations; leave activations out")
        self.trust_remote_code = False
        """Whether Python code of the bundle may run."""
        self._opened: dict[str, Any] = {}

    def open(self, path: Path, info: GraphInfo | None = None) -> Graph:
        from mesart.graphs.torch_graph import open_torch  # noqa: PLC0415  (torch only where it is asked for)

        del info  # it computes any of them
        return open_torch(path, self._opened, trust_remote_code=self.trust_remote_code)


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
        MesaError: unknown name, missing package, or a dtype that the backend does not compute.
    """
    if name != "auto":
        if name not in _BACKENDS:
            raise MesaError(f"unknown backend {name!r}; there are auto, {', '.join(backend_names())}")
        package, make = _BACKENDS[name]
        if importlib.util.find_spec(package) is None:
            extra = "export" if name == "torch" else name
            raise MesaError(f"backend {name!r} needs the package {package}: pip install 'mesart[{extra}]'")
        return make(dtype, threads, activations), "asked for"
    present = present_backends()
    if "onnxruntime" in present and dtype != "bfloat16":
        backend = OnnxRuntimeBackend(dtype, threads, activations)
        if backend.device == "cuda":
            return backend, "the fastest here: it has a GPU"
    if not present:
        raise MesaError("no backend is installed: pip install 'mesart[openvino]' or 'mesart[onnxruntime]'")
    for candidate in present:
        if candidate == "onnxruntime" and dtype == "bfloat16":
            continue
        made = _BACKENDS[candidate][1](dtype, threads, activations)
        return made, f"the fastest of those installed ({', '.join(present)})"
    raise MesaError("none of the installed backends computes bfloat16 on this machine: pip install 'mesart[openvino]'")


def available_threads() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
