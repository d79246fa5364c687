"""The TensorRT engines of a bundle on this machine's GPU: which of them run here, their weights, their contexts."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mesart.graphs.bundle.files import BundleFiles
from mesart.graphs.bundle.manifest import (
    EngineInfo,
    EngineSet,
    FileInfo,
    Flavour,
    Layout,
    Manifest,
    ProfileInfo,
    TensorInfo,
    WeightInfo,
)
from mesart.graphs.bundle.names import ATTENDED, PRESENT, EnginePhase, past_of
from mesart.graphs.errors import BundleError, EngineError, InputError, MesaError, first_line
from mesart.graphs.method.plan import Bucket
from mesart.runtime.cuda import Cuda, aligned

PACKAGES: Final[dict[Flavour, str]] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""The Python package of each flavour of TensorRT."""

_PIECE = 32 << 20
"""Bytes of the weight file that are read at a time."""


_Weight: TypeAlias = tuple[str, int, int]
"""File, offset and length: weights that are the same bytes are the same."""


def _weight(info: WeightInfo) -> _Weight:
    return info.file, info.offset, info.bytes


class Engines:
    """Engines for every phase and bucket, opened when first needed; one copy of the weights if they are shared.

    Args:
        files: the bundle's, verified.
        manifest: what it holds.
        flavour: which TensorRT.
        verify: check the SHA-256 of all plans now. That of a plan is always checked before it is opened: it is code.

    Raises:
        MesaError: no package, no GPU, no engines for this GPU and this version of TensorRT, a plan that is missing or
            altered, or more weights than free memory.
    """

    def __init__(self, files: BundleFiles, manifest: Manifest, flavour: Flavour, *, verify: bool = True) -> None:
        _require_half(manifest)
        self._files, self._bundle, self._flavour = files, files.folder, flavour
        self._trt = _import(flavour)
        self.cuda = Cuda()
        self._runtime: Any = None
        self._engines: dict[str, Any] = {}
        self._contexts: dict[tuple[str, int], _Context] = {}
        self._weights: dict[_Weight, int] = {}
        self._activations, self._activation_bytes = 0, 0
        self.weight_bytes = 0
        """Of device memory."""
        self.generation = 0
        """Of the activation memory; each has another address, and what was captured before holds no longer."""
        try:
            self.set = choose(self._bundle, manifest, flavour, str(self._trt.__version__), self.cuda.capability)
            plans = {engine.file: FileInfo(engine.bytes, engine.sha256) for engine in self.set.engines}
            BundleFiles(self._bundle, plans, f"run `{self._command()}`").verify(contents=verify)
            self._logger = _logger(self._trt)
            self._runtime = self._trt.Runtime(self._logger)
            self._require_memory()
            self._upload_weights()
        except BaseException:
            self.close()
            raise

    @property
    def activation_bytes(self) -> int:
        """Of the memory that all contexts share."""
        return self._activation_bytes

    @property
    def allocated_bytes(self) -> int:
        """Of device memory that weights and activations take, without what TensorRT allocates itself."""
        return self._activation_bytes + (self.weight_bytes if self.set.weights == "shared" else 0)

    @property
    def layout(self) -> Layout:
        return self.set.layout

    def buckets(self, manifest: Manifest) -> list[Bucket]:
        """The buckets that there are engines for."""
        built = {
            profile.bucket for engine in self.set.engines for profile in engine.profiles if profile.phase == "tail"
        }
        return [bucket for bucket in manifest.buckets if bucket.chunks in built]

    def profile(self, phase: EnginePhase, bucket: int | None = None) -> ProfileInfo:
        """The fixed shapes of a phase and bucket."""
        info, index = self.set.find(phase, bucket)
        return info.profiles[index]

    def prepare(self, phase: EnginePhase, bucket: int | None = None) -> None:
        """Opens what a phase needs, so that :meth:`enqueue` fails for no reason that could have been known."""
        self._context(phase, bucket)

    def enqueue(self, phase: EnginePhase, bucket: int | None, addresses: Mapping[str, int]) -> None:
        """Puts one run on the stream.

        Args:
            addresses: of the engine's inputs and outputs but the weights; of others too, which are not looked at.
        """
        context = self._context(phase, bucket)
        context.bind(addresses)
        self._logger.lines.clear()
        if not context.trt.execute_async_v3(self.cuda.stream):
            raise EngineError(f"TensorRT failed in the {phase}: {self._reason()}")

    def capturable(self, phase: EnginePhase, bucket: int | None) -> bool:
        """Whether a run can become part of a CUDA graph."""
        asked = getattr(self._context(phase, bucket).trt, "is_stream_capturable", None)
        return asked is None or bool(asked(self.cuda.stream))

    def close(self) -> None:
        """Frees the engines and all device memory, that of others on the same :class:`Cuda` too."""
        # Contexts before their engines, engines before the runtime, all before the memory that they point to.
        self._contexts.clear()
        self._engines.clear()
        self._runtime = None
        self.cuda.close()
        self._weights.clear()
        self._activations = self._activation_bytes = self.weight_bytes = 0

    def _command(self) -> str:
        return build_command(self._bundle, self._flavour, self.cuda.capability)

    def _require_memory(self) -> None:
        """Compares the weights with the free memory before anything is allocated."""
        if self.set.weights == "shared":
            needed = sum(aligned(size) for _, _, size in self._distinct_weights())
        else:
            first = self.set.engines if self.set.layout == "profile" else self._first_of_each_phase()
            needed = sum(engine.unpacked for engine in first)
        self.cuda.require(needed, "the weights")

    def _first_of_each_phase(self) -> list[EngineInfo]:
        return list({engine.profiles[0].phase: engine for engine in reversed(self.set.engines)}.values())

    def _distinct_weights(self) -> list[_Weight]:
        """Every weight that engines share, each once."""
        return sorted({_weight(weight) for engine in self.set.engines for weight in engine.weights})

    def _upload_weights(self) -> None:
        weights = self._distinct_weights()
        if not weights:
            return
        self.weight_bytes = sum(aligned(size) for _, _, size in weights)
        address = self.cuda.allocate(self.weight_bytes, "the weights")
        for weight in weights:
            self._weights[weight] = address
            address += aligned(weight[2])
        buffers = [self.cuda.pinned(_PIECE) for _ in range(2)]
        with self._files.unchanged(*dict.fromkeys(file for file, _, _ in weights)):
            for index, (address, piece) in enumerate(self._pieces()):
                buffer = buffers[index % 2]
                buffer.bytes[: piece.size] = piece  # while the piece before is on its way
                self.cuda.synchronize()
                self.cuda.upload(address, buffer, piece.size)
        self.cuda.synchronize()
        for buffer in buffers:
            self.cuda.free_pinned(buffer)

    def _pieces(self) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """All weights in bounded pieces, mapped from their files, and the device address of each."""
        mapped: dict[str, NDArray[np.uint8]] = {}
        for (name, offset, size), address in self._weights.items():
            if name not in mapped:
                mapped[name] = np.memmap(self._bundle / name, dtype=np.uint8, mode="r")
            if offset + size > mapped[name].size:
                raise BundleError(
                    f"{self._bundle / name} is shorter than the engines' weights; run `{self._command()}`"
                )
            for start in range(0, size, _PIECE):
                yield address + start, mapped[name][offset + start : offset + min(start + _PIECE, size)]

    def _engine(self, info: EngineInfo) -> Any:
        if info.file in self._engines:
            return self._engines[info.file]
        plan = info.read(self._bundle)
        if self.set.weights == "embedded":
            self.cuda.require(len(plan), f"the weights of {info.file}")
        self._logger.lines.clear()
        engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise BundleError(f"TensorRT refuses {info.file}: {self._reason()}; run `{self._command()}`")
        self._check_tensors(info, engine)
        if self.set.weights == "embedded":
            self.weight_bytes += len(plan)
        self._engines[info.file] = engine
        return engine

    def _check_tensors(self, info: EngineInfo, engine: Any) -> None:
        """The engine has the tensors of the manifest, and writes its caches where it reads them.

        It may lack inputs: TensorRT drops those that change nothing.
        """
        found = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
        outputs = {tensor.name for tensor in info.outputs}
        differ = (outputs - found) | (
            found - outputs - {tensor.name for tensor in info.inputs} - {weight.name for weight in info.weights}
        )
        if differ:
            raise BundleError(
                f"{info.file} and the manifest differ in the tensor {min(differ)}; run `{self._command()}`"
            )
        for name in sorted(found):
            if engine.get_tensor_location(name) != self._trt.TensorLocation.DEVICE:
                raise BundleError(f"{info.file} wants {name} in host memory; run `{self._command()}`")
        for tensor in info.outputs:
            if tensor.name.startswith(PRESENT):
                cache = past_of(tensor.name)
                if engine.get_aliased_input_tensor(tensor.name) != cache:
                    raise BundleError(f"{info.file} does not update {cache} in place; run `{self._command()}`")

    def _context(self, phase: EnginePhase, bucket: int | None) -> _Context:
        info, index = self.set.find(phase, bucket)
        engine = self._engine(info)
        self._provide_activations(int(engine.device_memory_size_v2))
        context = self._contexts.get((info.file, index))
        if context is not None:
            return context
        self._logger.lines.clear()
        made = self._create_context(engine)
        if made is None:
            raise EngineError(f"TensorRT makes no context for the {phase}: {self._reason()}")
        names = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
        context = _Context(made, info, names)
        if engine.num_optimization_profiles > 1 and not made.set_optimization_profile_async(index, self.cuda.stream):
            raise BundleError(f"{info.file} has no profile {index}; run `{self._command()}`")
        for tensor in info.inputs:
            if tensor.name in names and -1 in tuple(engine.get_tensor_shape(tensor.name)):
                context.set_shape(tensor, self._shape(tensor, info.profiles[index]))
        context.bind_weights(self._weights)
        if self._activation_bytes:
            made.set_device_memory(self._activations, self._activation_bytes)
        self._contexts[info.file, index] = context
        return context

    def _create_context(self, engine: Any) -> Any:
        """A context without activation memory of its own."""
        managed = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        specialisation = getattr(self._trt, "DynamicShapesKernelSpecializationStrategy", None)
        if specialisation is None:
            return engine.create_execution_context(managed)
        # TensorRT for RTX compiles kernels for the shapes that it meets. It must not do so later, beside the run: a
        # CUDA graph would keep the kernels that it stands in with.
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(managed)
        config.dynamic_shapes_kernel_specialization_strategy = specialisation.EAGER
        return engine.create_execution_context(config)

    def _provide_activations(self, size: int) -> None:
        """Makes the memory that all contexts share large enough; they run one after the other."""
        if size <= self._activation_bytes:
            return
        old = self._activation_bytes
        if old:
            self.cuda.free(self._activations)
            self._activation_bytes = 0
        try:
            self._place_activations(size)
        except MesaError:
            if old:
                self._place_activations(old)
            raise

    def _place_activations(self, size: int) -> None:
        self._activations = self.cuda.allocate(size, "the activations")
        self._activation_bytes = size
        self.generation += 1
        for context in self._contexts.values():
            context.trt.set_device_memory(self._activations, size)

    def _shape(self, tensor: TensorInfo, profile: ProfileInfo) -> tuple[int, ...]:
        """The shape of an input in a profile; only the length of keys and values differs between those of an engine."""
        if tensor.name == ATTENDED:
            return (profile.kv_length,)
        return tuple(int(extent) for extent in tensor.shape)

    def _reason(self) -> str:
        lines: list[str] = self._logger.lines
        return first_line(Exception(lines[0])) if lines else "it gave no reason"


@dataclass
class _Context:
    """An engine in one of its profiles."""

    trt: Any
    info: EngineInfo
    names: set[str]
    """Of its inputs and outputs."""
    bound: dict[str, int] = field(default_factory=dict)

    def bind(self, addresses: Mapping[str, int]) -> None:
        for tensors in (self.info.inputs, self.info.outputs):
            for tensor in tensors:
                self._bind(tensor.name, addresses[tensor.name])

    def bind_weights(self, addresses: Mapping[_Weight, int]) -> None:
        for weight in self.info.weights:
            self._bind(weight.name, addresses[_weight(weight)])

    def set_shape(self, tensor: TensorInfo, shape: tuple[int, ...]) -> None:
        if not self.trt.set_input_shape(tensor.name, shape):
            raise BundleError(f"{self.info.file} does not take {tensor.name} of shape {list(shape)}; build it again")

    def _bind(self, name: str, address: int) -> None:
        if name not in self.names or self.bound.get(name) == address:
            return
        if not self.trt.set_tensor_address(name, address):
            raise EngineError(f"{self.info.file} does not take {name} at address {address:#x}")
        self.bound[name] = address


def choose(bundle: Path, manifest: Manifest, flavour: Flavour, version: str, capability: str) -> EngineSet:
    """The engines of a flavour that run with this version of TensorRT on a GPU of this compute capability.

    Raises:
        MesaError: there are none; says how to build them.
    """
    command = f"run `{build_command(bundle, flavour, capability)}`"
    sets = [engines for engines in manifest.engines if engines.flavour == flavour]
    if not sets:
        raise BundleError(f"{bundle} holds no engines of {flavour}; {command}")
    same = [engines for engines in sets if engines.version == version]
    if not same:
        built = ", ".join(dict.fromkeys(engines.version for engines in sets))
        raise BundleError(
            f"the engines of {bundle} were built with {flavour} {built}, installed is {version}; {command}"
        )
    for engines in same:
        if capability in engines.compute_capabilities:
            return engines
    names = ", ".join(dict.fromkeys(name for engines in same for name in engines.compute_capabilities))
    raise BundleError(f"the engines of {bundle} run on {names}, this GPU is {capability}; {command}")


def build_command(bundle: Path, flavour: Flavour, capability: str) -> str:
    """The command that builds engines for this machine's GPU."""
    gpu = f" --gpu {capability}" if flavour == "tensorrt-rtx" else ""  # the other builds for the GPU that it runs on
    return f"mesart build {bundle} --engine {flavour}{gpu}"


def usable_flavour(bundle: Path, manifest: Manifest) -> tuple[Flavour | None, str]:
    """The flavour whose engines in the bundle run on this machine; if there is none, why: empty without engines."""
    reason = ""
    for flavour in dict.fromkeys(engines.flavour for engines in manifest.engines):
        try:
            cuda = Cuda()
            try:
                choose(bundle, manifest, flavour, str(_import(flavour).__version__), cuda.capability)
            finally:
                cuda.close()
        except MesaError as error:
            reason = reason or str(error)
        else:
            return flavour, ""
    return None, reason


def _import(flavour: Flavour) -> Any:
    package = PACKAGES[flavour]
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise InputError(f"backend {flavour!r} needs the package {package}: pip install 'mesart[{flavour}]'") from error


def _require_half(manifest: Manifest) -> None:
    if manifest.dtype == "float32":
        raise InputError(
            "TensorRT's attention kernels compute float16 and bfloat16, this bundle is float32; export again with "
            "--dtype bfloat16 or float16, then run `mesart build`"
        )


_loggers: dict[str, Any] = {}


def _logger(trt: Any) -> Any:
    """Keeps the errors that TensorRT reports; one for the whole process, because TensorRT keeps the first."""
    if trt.__name__ not in _loggers:

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.lines: list[str] = []

            def log(self, severity: Any, msg: str) -> None:
                if severity <= trt.ILogger.ERROR:
                    self.lines.append(msg)

        _loggers[trt.__name__] = Logger()
    return _loggers[trt.__name__]


__all__ = ["PACKAGES", "Engines", "build_command", "choose", "usable_flavour"]
