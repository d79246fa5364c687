"""ONNX -> TensorRT plan: the only place of the export that calls TensorRT. One code path for both flavours."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx

from mesart.export.disk import replace_file
from mesart.graphs.bundle.manifest import Flavour, TensorInfo
from mesart.graphs.errors import EngineError, InputError, MesaError, first_line

_MODULES: dict[Flavour, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}

Shapes = dict[str, list[int]]
"""The shape of each input that has a free axis."""

Progress = Callable[[str, int, int], None]
"""Called with a phase of the build, its finished steps and their number."""


class NoKernelError(MesaError):
    """TensorRT has no kernel of its own for an attention of such shapes."""


@dataclass(frozen=True)
class BuiltPlan:
    """A built engine."""

    data: bytes
    inputs: list[TensorInfo]
    """All of them, weights too; a free axis has its extent in the first profile."""
    outputs: list[TensorInfo]
    layers: list[str] = field(default_factory=list)
    """What TensorRT made of a graph with fp8 in it, in its own words, a line each; of other graphs, nothing."""


class TensorRtBuilder:
    """Builds engines with one flavour of TensorRT for some compute capabilities.

    Args:
        flavour: which TensorRT.
        capabilities: such as ``["sm89"]``; TensorRT for RTX builds for any of its own, the other for this machine's.
        timing_cache: a file that is read and written; TensorRT for RTX, which times nothing, leaves it alone.

    Raises:
        MesaError: the package is not installed, or knows no such compute capability.
    """

    def __init__(self, flavour: Flavour, capabilities: Sequence[str], timing_cache: Path) -> None:
        module = _MODULES[flavour]
        if importlib.util.find_spec(module) is None:
            raise InputError(f"building needs the package {module}: pip install 'mesart[{flavour}]'")
        self.trt: Any = importlib.import_module(module)
        self.version: str = self.trt.__version__
        self._rtx = flavour == "tensorrt-rtx"
        self._timing_cache = timing_cache
        self._logger = _logger(self.trt)
        known = [name for name in self.trt.ComputeCapability.__members__ if name.startswith("SM")] if self._rtx else []
        for capability in capabilities:
            if self._rtx and capability.upper() not in known:
                raise InputError(
                    f"TensorRT for RTX {self.version} builds for {', '.join(known).lower()}, not for {capability}; "
                    "use --engine tensorrt on such a machine"
                )
        self._capabilities = list(capabilities)

    def build(
        self,
        graph: bytes,
        folder: Path,
        profiles: Sequence[Shapes],
        progress: Progress,
    ) -> BuiltPlan:
        """Builds one engine.

        Args:
            graph: a serialised ONNX model; each of its ``Attention`` must become one of TensorRT's own kernels, and
                each ``TensorScatter`` an update in place.
            folder: where its external data lies.
            profiles: an entry for each optimisation profile, with minimum, optimum and maximum the same; empty if all
                shapes are fixed.
            progress: called now and then.

        Raises:
            NoKernelError: an attention would have to be taken apart.
            MesaError: TensorRT cannot parse or build the graph; the message has its reason.
        """
        trt = self.trt
        self._logger.errors.clear()
        self._logger.layers.clear()
        builder = trt.Builder(self._logger)
        network = builder.create_network(_network_flags(trt))
        parser = trt.OnnxParser(network, self._logger)
        if not parser.parse(graph, str(folder / "engine.onnx")):
            errors = [parser.get_error(i) for i in range(parser.num_errors)]
            reasons = [f"{error.node_operator()} ({error.node_name()}): {error.desc()}" for error in errors]
            raise EngineError(f"TensorRT {self.version} cannot read the graph: {first_line_of(reasons)}")
        operators = [node.op_type for node in onnx.load_model_from_string(graph).graph.node]
        self._check_attention(network, operators.count("Attention"), operators.count("TensorScatter"))
        config = builder.create_builder_config()
        if "QuantizeLinear" in operators:
            config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # so that the layers are told
        if self._rtx:
            config.num_compute_capabilities = len(self._capabilities)
            for index, capability in enumerate(self._capabilities):
                config.set_compute_capability(getattr(trt.ComputeCapability, capability.upper()), index)
        else:
            cache = self._timing_cache.read_bytes() if self._timing_cache.is_file() else b""
            config.set_timing_cache(config.create_timing_cache(cache), ignore_mismatch=False)
        for shapes in profiles:
            profile = builder.create_optimization_profile()
            for name, shape in shapes.items():
                profile.set_shape(name, shape, shape, shape)
            config.add_optimization_profile(profile)
        monitor = _monitor(trt, progress)
        config.progress_monitor = monitor
        serialized = builder.build_serialized_network(network, config)
        if monitor.error is not None:
            raise monitor.error
        if serialized is None:
            self._require_kernel()
            raise EngineError(f"TensorRT {self.version} cannot build the engine: {first_line_of(self._logger.errors)}")
        if not self._rtx:
            replace_file(self._timing_cache, bytes(config.get_timing_cache().serialize()))
        fixed = profiles[0] if profiles else {}
        inputs = [self._tensor(network.get_input(i), fixed) for i in range(network.num_inputs)]
        outputs = [self._tensor(network.get_output(i), fixed) for i in range(network.num_outputs)]
        return BuiltPlan(bytes(serialized), inputs, outputs, list(self._logger.layers))

    def _require_kernel(self) -> None:
        if any("dedicated kernel" in error or "decompose_composite_ops" in error for error in self._logger.errors):
            raise NoKernelError(
                f"TensorRT {self.version} has no attention kernel for this model's head size and dtype; "
                "use another backend (onnxruntime, openvino) for it"
            )

    def _check_attention(self, network: Any, attentions: int, cache_updates: int) -> None:
        """Every attention is one that TensorRT may not take apart, and every cache is updated in place."""
        trt = self.trt
        layers = [network.get_layer(i) for i in range(network.num_layers)]
        found = [layer for layer in layers if layer.type == trt.LayerType.ATTENTION_INPUT]
        for layer in found:
            layer.__class__ = trt.IAttentionInputLayer  # how TensorRT's Python API casts a layer
        whole = sum(not layer.attention.decomposable for layer in found)
        if whole != attentions:
            raise EngineError(
                f"TensorRT {self.version} runs {whole} of the graph's {attentions} attention layers in its own kernel; "
                "this version cannot run the model"
            )
        updates = sum(layer.type == trt.LayerType.KV_CACHE_UPDATE for layer in layers)
        if updates != cache_updates:
            raise EngineError(f"TensorRT {self.version} updates {updates} of {cache_updates} caches in place")

    def _tensor(self, tensor: Any, fixed: Shapes) -> TensorInfo:
        names = {"HALF": "float16", "BF16": "bfloat16", "FLOAT": "float32"}
        kind = str(tensor.dtype).rpartition(".")[2]
        shape = fixed.get(tensor.name, list(tensor.shape))
        return TensorInfo(tensor.name, names.get(kind, kind.lower()), [int(extent) for extent in shape])


def first_line_of(reasons: Sequence[str]) -> str:
    """The first reason in one line, without TensorRT's own file names."""
    text = first_line(Exception(reasons[0])) if reasons else "it gave no reason"
    return re.sub(r"\s*\(?In \w+ at /\S+\)?", "", text)


def _network_flags(trt: Any) -> int:
    """Types are those of the graph: TensorRT 10 has to be told, later ones know nothing else."""
    flags = getattr(trt, "NetworkDefinitionCreationFlag", None)
    return 1 << int(flags.STRONGLY_TYPED) if flags is not None and hasattr(flags, "STRONGLY_TYPED") else 0


_loggers: dict[str, Any] = {}


def _logger(trt: Any) -> Any:
    """The one logger of a process: TensorRT keeps the first that it was given. Keeps errors and lists of layers."""
    if trt.__name__ not in _loggers:

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.errors: list[str] = []
                self.layers: list[str] = []

            def log(self, severity: Any, message: str) -> None:
                # Without a driver, TensorRT for RTX looks for a GPU all the same, and says so.
                if severity <= trt.ILogger.ERROR and "Cuda Runtime" not in message:
                    self.errors.append(message)
                if message.startswith("Layers:"):  # as an engine's inspector says, but that wants a GPU
                    self.layers += [line for line in message.splitlines() if line.startswith("Name:")]

        _loggers[trt.__name__] = Logger()
    return _loggers[trt.__name__]


def _monitor(trt: Any, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.error: BaseException | None = None
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps
            self._tell(phase_name, 0)

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._tell(phase_name, step + 1)
            return self.error is None  # False ends the build

        def _tell(self, phase: str, done: int) -> None:
            try:
                progress(phase, done, self._steps.get(phase, 0))
            except BaseException as error:  # noqa: BLE001  (an interruption too: raised once TensorRT has returned)
                self.error = error

    return Monitor()


__all__ = ["BuiltPlan", "NoKernelError", "Progress", "TensorRtBuilder"]
