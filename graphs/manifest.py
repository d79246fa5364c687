"""The bundle's manifest: the contract between export and runtime. No torch, no ONNX."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from mesart.graphs.baseline import BaselineConfig
from mesart.graphs.config import MesaConfig
from mesart.graphs.errors import MesaError
from mesart.graphs.plan import Bucket

SCHEMA_VERSION = 1
MANIFEST_FILE = "manifest.json"
WEIGHTS_FILE = "weights.safetensors"
SYMBOLIC_FILE = "model.onnx"
ONNXRUNTIME_FILE = "model-onnxruntime.onnx"
ENGINE_FILE = "engine.onnx"
ENGINE_PLACE_FILE = "engine-place.onnx"
ENGINES_FOLDER = "engines"

Role = Literal["any", "onnxruntime", "head", "chunk", "tail", "step", "place", "engine", "engine_place"]
"""What a graph computes.

``any``: the symbolic graph that serves head, chunk, tail and step; ``onnxruntime``: the same, for onnxruntime on CPUs.
``engine``: the same with the cache updated in place, from which TensorRT engines are built; ``engine_place``: the place
of all layers at once, for them.
"""

Flavour = Literal["tensorrt", "tensorrt-rtx"]
Layout = Literal["bucket", "profile"]
"""``bucket``: an engine for each role and bucket. ``profile``: an engine for each role, a profile for each bucket."""
Weights = Literal["shared", "embedded"]
"""``shared``: weights are inputs of every engine, one copy on the device. ``embedded``: each engine holds its own."""

_BLOCK_BYTES = 16 << 20
"""Read at a time: a thread that hashes while another computes waits for its turn after each block."""

Plan: TypeAlias = bytes
"""A serialised TensorRT engine."""

DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class TensorInfo:
    """An input or output of a graph; a symbolic axis is a string."""

    name: str
    dtype: str
    shape: list[int | str]


@dataclass(frozen=True)
class GraphInfo:
    """One ONNX file."""

    file: str
    role: Role
    bucket: int | None
    """Number of chunks that a tail or step graph is specialised for."""
    inputs: list[TensorInfo]
    outputs: list[TensorInfo]

    def size(self, name: str, axis: int) -> int | str:
        """The extent of one axis of the input ``name``."""
        return next(tensor for tensor in self.inputs if tensor.name == name).shape[axis]


@dataclass(frozen=True)
class LayerInfo:
    """Keys and values of one layer, as they lie in the cache."""

    kv_heads: int
    key_size: int
    value_size: int
    place: str | None
    """The graph that moves its keys; ``None`` for a layer that does not rotate them."""


@dataclass(frozen=True)
class FileInfo:
    bytes: int
    sha256: str


@dataclass(frozen=True)
class WeightInfo:
    """An input of an engine that is a weight: bytes of one of the bundle's weight files."""

    name: str
    offset: int
    bytes: int
    file: str = WEIGHTS_FILE


@dataclass(frozen=True)
class ProfileInfo:
    """The fixed shapes that one optimisation profile of an engine runs, in tokens."""

    role: Role
    """head, chunk, tail, step or place."""
    bucket: int | None
    """Number of chunks, of a tail or step."""
    new: int
    """S, new tokens of a run; fewer are filled up at the end."""
    slots: int
    """P, slots of the cache buffers; for head and chunk of scratch buffers, head_length + chunk_length; 0 for place."""
    columns: int
    """A, the first slots of them, which attention looks at."""


@dataclass(frozen=True)
class EngineInfo:
    """One TensorRT plan, compressed by gzip (a plan is mostly code that repeats itself)."""

    file: str
    bytes: int
    sha256: str
    """Of the file."""
    unpacked: int
    """Bytes of the plan itself."""
    key: str
    """SHA-256 of all that the plan follows from; another key means that it has to be built again."""
    inputs: list[TensorInfo]
    """Without the weights; the shapes of the first profile. Only what the network kept: a head has no ``logits_at``."""
    outputs: list[TensorInfo]
    weights: list[WeightInfo]
    profiles: list[ProfileInfo]
    """In the engine's order."""
    seconds: float
    """That building took."""

    def read(self, bundle: Path) -> Plan:
        """The plan, if its file is the one that was built: a plan is code, so no other may be loaded.

        Raises:
            MesaError: it is missing or altered.
        """
        path = bundle / self.file
        if not path.is_file():
            raise MesaError(f"{bundle}: {self.file} is missing; run `mesart build` again")
        packed = path.read_bytes()
        if hashlib.sha256(packed).hexdigest() != self.sha256:
            raise MesaError(f"{bundle}: {self.file} was altered (its SHA-256 differs); run `mesart build` again")
        return gzip.decompress(packed)


@dataclass(frozen=True)
class EngineSet:
    """What one ``mesart build`` made: engines for every role and bucket."""

    flavour: Flavour
    version: str
    """Of TensorRT; engines run with this one only."""
    compute_capabilities: list[str]
    """Of the GPUs that they run on, such as ``sm89``."""
    layout: Layout
    weights: Weights
    engines: list[EngineInfo]

    def find(self, role: Role, bucket: int | None = None) -> tuple[EngineInfo, int]:
        """The engine for a role and bucket, and the index of its profile."""
        for engine in self.engines:
            for index, profile in enumerate(engine.profiles):
                if (profile.role, profile.bucket) == (role, bucket):
                    return engine, index
        raise MesaError(
            f"no engine for the {role}{'' if bucket is None else f' of {bucket} chunks'}; run `mesart build`"
        )


@dataclass(frozen=True)
class Quantisation:
    """How the weights of linear layers are stored: whole numbers, a scale for each block of them."""

    scheme: str
    """``int8``, ``int4`` or ``fp8``."""
    bits: int
    group_size: int | None
    """Inputs of a layer that share a scale; ``None``: all inputs of an output do."""
    symmetric: bool
    """Without zero points."""

    def __str__(self) -> str:
        if self.scheme == "fp8":
            return "fp8, a scale for a weight; their inputs in fp8 too, a scale for a token"
        blocks = "an output" if self.group_size is None else f"{self.group_size} inputs"
        return f"{self.scheme}, a scale{'' if self.symmetric else ' and a zero point'} for {blocks}"


@dataclass(frozen=True)
class Manifest:
    """What a bundle holds."""

    model: dict[str, Any]
    """``architecture``, ``model_type``, ``vocab_size``, ``parameters``."""
    dtype: str
    config: MesaConfig
    max_tokens: int
    buckets: list[Bucket]
    layers: list[LayerInfo]
    graphs: list[GraphInfo]
    tools: dict[str, str]
    """Versions that made the bundle."""
    files: dict[str, FileInfo] = field(default_factory=dict)
    """What the export wrote."""
    engines: list[EngineSet] = field(default_factory=list)
    """What ``mesart build`` added."""
    weight_files: list[str] = field(default_factory=lambda: [WEIGHTS_FILE])
    """safetensors; those of the checkpoint, if they are linked, and one of the bundle's own."""
    quantisation: Quantisation | None = None
    """Of the weights of linear layers; the others have ``dtype``."""
    schema_version: int = SCHEMA_VERSION

    @property
    def weight_bytes(self) -> int:
        """Of all weight files."""
        return sum(self.files[name].bytes for name in self.weight_files)

    def has(self, role: Role) -> bool:
        return any(graph.role == role for graph in self.graphs)

    def graph(self, role: Role, bucket: int | None = None) -> GraphInfo:
        for graph in self.graphs:
            if graph.role == role and graph.bucket == bucket:
                return graph
        raise MesaError(f"the bundle holds no {role} graph{'' if bucket is None else f' for {bucket} chunks'}")

    @property
    def looks_at_positions(self) -> bool:
        """Whether graphs take ``past_position_ids``: where the past keys stand, for windows and ALiBi."""
        return any(tensor.name == "past_position_ids" for graph in self.graphs for tensor in graph.inputs)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def read(cls, bundle: Path) -> Manifest:
        """The manifest of a bundle folder.

        Raises:
            MesaError: no bundle, a broken manifest, or one of a newer schema.
        """
        path = bundle / MANIFEST_FILE
        if not path.is_file():
            raise MesaError(f"{bundle} is no bundle: it holds no {MANIFEST_FILE}; make one with `mesart export`")
        try:
            fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            version = fields["schema_version"]
            if version != SCHEMA_VERSION:
                raise MesaError(
                    f"{path} has schema {version}, this version of mesart reads {SCHEMA_VERSION}; "
                    + ("upgrade mesart" if version > SCHEMA_VERSION else "export the model again")
                )
            return cls(
                model=fields["model"],
                dtype=fields["dtype"],
                config=(BaselineConfig if "method" in fields["config"] else MesaConfig).from_dict(fields["config"]),
                max_tokens=fields["max_tokens"],
                buckets=[Bucket(**bucket) for bucket in fields["buckets"]],
                layers=[LayerInfo(**layer) for layer in fields["layers"]],
                graphs=[_graph(graph) for graph in fields["graphs"]],
                tools=fields["tools"],
                files={name: FileInfo(**info) for name, info in fields["files"].items()},
                engines=[_engine_set(engines) for engines in fields.get("engines", [])],
                weight_files=fields.get("weight_files", [WEIGHTS_FILE]),
                quantisation=Quantisation(**quantised) if (quantised := fields.get("quantisation")) else None,
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise MesaError(
                f"{path} cannot be read ({type(error).__name__}: {error}); export the model again"
            ) from error

    def verify(self, bundle: Path, *, contents: bool = True) -> None:
        """Checks that every file is there and whole; ``contents``: also that its SHA-256 is the recorded one.

        Raises:
            MesaError: names the first file that is missing, truncated or altered.
        """
        for name, info in self.files.items():
            path = bundle / name
            if not path.is_file():
                raise MesaError(f"{bundle}: {name} is missing; export the model again")
            size = path.stat().st_size
            if size != info.bytes:
                raise MesaError(f"{bundle}: {name} has {size} bytes instead of {info.bytes}; export the model again")
            if contents and sha256(path) != info.sha256:
                raise MesaError(f"{bundle}: {name} was altered (its SHA-256 differs); export the model again")

    def write(self, bundle: Path) -> None:
        """Replaces the manifest of a bundle; whoever reads it meanwhile finds the old one or the new one, whole."""
        path = bundle / MANIFEST_FILE
        partial = path.with_suffix(".partial")
        partial.write_text(self.to_json(), encoding="utf-8")
        partial.replace(path)


def _graph(fields: dict[str, Any]) -> GraphInfo:
    return GraphInfo(
        fields["file"],
        fields["role"],
        fields["bucket"],
        [TensorInfo(**tensor) for tensor in fields["inputs"]],
        [TensorInfo(**tensor) for tensor in fields["outputs"]],
    )


def _engine_set(fields: dict[str, Any]) -> EngineSet:
    return EngineSet(**{**fields, "engines": [engine_info(engine) for engine in fields["engines"]]})


def engine_info(fields: dict[str, Any]) -> EngineInfo:
    """An engine's record as it stands in JSON."""
    return EngineInfo(
        **{
            **fields,
            "inputs": [TensorInfo(**tensor) for tensor in fields["inputs"]],
            "outputs": [TensorInfo(**tensor) for tensor in fields["outputs"]],
            "weights": [WeightInfo(**weight) for weight in fields["weights"]],
            "profiles": [ProfileInfo(**profile) for profile in fields["profiles"]],
        }
    )


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        size = path.stat().st_size
        block = memoryview(bytearray(min(size, _BLOCK_BYTES) or 1))
        drop = _is_larger_than_memory(size)
        start = 0
        while count := file.readinto(block):
            digest.update(block[:count])
            if drop:
                os.posix_fadvise(file.fileno(), start, count, os.POSIX_FADV_DONTNEED)
            start += count
    return digest.hexdigest()


def _is_larger_than_memory(size: int) -> bool:
    """Whether a file cannot stay in the system's cache: what was read of it would only push out all the rest."""
    if not hasattr(os, "posix_fadvise"):
        return False
    return size > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
