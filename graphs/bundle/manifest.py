"""The bundle's manifest: the contract between export and runtime. No torch, no ONNX."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import secrets
import stat
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, TypedDict, TypeVar

from mesart.graphs.bundle.agreement import check_agreement
from mesart.graphs.bundle.files import BundleFiles, FileInfo, Hash, reason, sha256
from mesart.graphs.bundle.names import PAST_POSITION_IDS, EnginePhase, GraphKind
from mesart.graphs.bundle.records import Mismatch, Must, Tagged, parse_json, read_record, shown
from mesart.graphs.errors import BundleError, CapacityError
from mesart.graphs.method.plan import Bucket
from mesart.graphs.method.protocol import StaticMethod
from mesart.graphs.method.registry import METHOD_FIELD, STATIC_METHODS, method_to_json

SCHEMA_VERSION = 3
MANIFEST_FILE = "manifest.json"
WEIGHTS_FILE = "weights.safetensors"
SYMBOLIC_FILE = "model.onnx"
ONNXRUNTIME_FILE = "model-onnxruntime.onnx"
PAGED_FILE = "model-paged.onnx"
GROUPED_FILE = "model-grouped.onnx"
ENGINE_FILE = "engine.onnx"
ENGINE_REROTATE_FILE = "engine-rerotate.onnx"
ENGINES_FOLDER = "engines"

Flavour = Literal["tensorrt", "tensorrt-rtx"]
Layout = Literal["bucket", "profile"]
"""``bucket``: an engine for each phase and bucket. ``profile``: an engine for each phase, a profile for each bucket."""
Weights = Literal["shared", "embedded"]
"""``shared``: weights are inputs of every engine, one copy on the device. ``embedded``: each engine holds its own."""

EngineBytes: TypeAlias = bytes
"""A serialised TensorRT engine."""

DTYPES = ("float32", "float16", "bfloat16")

_MOST_BYTES = 256 << 20
"""Of a manifest; those of large models with many engines have some MB."""

_PACKED = 1100
"""Bytes that gzip makes of one, at most (1032)."""


def is_plain(name: str) -> bool:
    """Whether a file of that name lies in its bundle's folder, on any system."""
    return name not in ("", ".", "..") and not set(name) & set("/\\:\0") and len(name.encode()) <= 255


def _is_engine(name: str) -> bool:
    folder, *parts = name.split("/")
    return folder == ENGINES_FOLDER and len(parts) == 2 and all(map(is_plain, parts)) and name.endswith(".plan.gz")


T = TypeVar("T")
Text: TypeAlias = Annotated[str, Must("a text that is not empty", bool)]
Size: TypeAlias = Annotated[int, Must("a whole number of at least 1", range(1, 2**63).__contains__)]
Count: TypeAlias = Annotated[int, Must("a whole number of at least 0", range(2**63).__contains__)]
Some: TypeAlias = Annotated[list[T], Must("a list that is not empty", bool)]
FileName: TypeAlias = Annotated[str, Must("the plain name of a file in the bundle, without folders", is_plain)]
EngineName: TypeAlias = Annotated[str, Must(f"the name of an engine, {ENGINES_FOLDER}/FOLDER/NAME.plan.gz", _is_engine)]
ListedName: TypeAlias = Annotated[
    FileName, Must(f"a file other than {MANIFEST_FILE}, which has its own hash", lambda name: name != MANIFEST_FILE)
]
Digest: TypeAlias = str
"""``sha256:`` and the manifest's own hash, which covers all files of a bundle."""


@dataclass(frozen=True)
class TensorInfo:
    """An input or output of a graph; a symbolic axis is a string."""

    name: Text
    dtype: Text
    shape: list[Annotated[int, Must("an extent", range(-1, 2**63).__contains__)] | Text]


@dataclass(frozen=True)
class GraphInfo:
    """One ONNX file."""

    file: FileName
    kind: GraphKind
    bucket: Count | None
    """Number of chunks that a tail or decode graph is specialised for."""
    inputs: list[TensorInfo]
    outputs: list[TensorInfo]

    def size(self, name: str, axis: int) -> int | str:
        """The extent of one axis of the input ``name``."""
        return next(tensor for tensor in self.inputs if tensor.name == name).shape[axis]


@dataclass(frozen=True)
class LayerInfo:
    """Keys and values of one layer, as they lie in the cache."""

    kv_heads: Size
    key_size: Size
    value_size: Size
    rerotate: FileName | None
    """The graph that rotates its keys to other positions; ``None`` for a layer that does not rotate them."""


@dataclass(frozen=True)
class WeightInfo:
    """An input of an engine that is a weight: bytes of one of the bundle's weight files."""

    name: Text
    offset: Count
    bytes: Size
    file: FileName = WEIGHTS_FILE


@dataclass(frozen=True)
class ProfileInfo:
    """The fixed shapes that one optimisation profile of an engine runs, in tokens."""

    phase: EnginePhase
    bucket: Count | None
    """Number of chunks, of a tail or decode."""
    new: Size
    """S, new tokens of a run; fewer are filled up at the end."""
    slots: Count
    """P, slots of the cache buffers; of prefix and chunk those of scratch buffers, head_length + chunk_length; of
    rerotate 0."""
    kv_length: Count
    """A, the first slots of them, which attention looks at."""


@dataclass(frozen=True)
class EngineInfo:
    """One TensorRT plan, compressed by gzip (a plan is mostly code that repeats itself)."""

    file: EngineName
    bytes: Size
    sha256: Hash
    """Of the file."""
    unpacked: Size
    """Bytes of the plan itself."""
    key: Text
    """SHA-256 of all that the plan follows from; another key means that it has to be built again."""
    inputs: list[TensorInfo]
    """Without the weights; the shapes of the first profile. Only what the network kept: a head has no ``logits_at``."""
    outputs: list[TensorInfo]
    weights: list[WeightInfo]
    profiles: Some[ProfileInfo]
    """In the engine's order."""
    seconds: Annotated[float, Must("a number of at least 0", lambda value: value >= 0)]
    """That building took."""

    def read(self, bundle: Path) -> EngineBytes:
        """The plan, if its file is the one that was built: a plan is code, so no other may be loaded.

        Raises:
            MesaError: it is missing or altered, or unpacks to something else than the manifest says.
        """
        files = BundleFiles(bundle, {self.file: FileInfo(self.bytes, self.sha256)}, "run `mesart build` again")
        files.verify(keep=[self.file])
        packed = files.read(self.file)
        unpacker = zlib.decompressobj(zlib.MAX_WBITS | 16)
        try:
            plan = unpacker.decompress(packed, self.unpacked)
            whole = len(plan) == self.unpacked and not unpacker.decompress(unpacker.unconsumed_tail, 1)
        except zlib.error as error:
            raise BundleError(f"{bundle}: {self.file} is no gzip file ({error}); run `mesart build` again") from error
        except MemoryError as error:
            raise CapacityError(f"{bundle}: {self.file} unpacks to {self.unpacked} bytes, more than is free") from error
        if not whole or not unpacker.eof or unpacker.unused_data:
            raise BundleError(
                f"{bundle}: {self.file} does not unpack to the {self.unpacked} bytes that the manifest says; "
                "run `mesart build` again"
            )
        return plan


@dataclass(frozen=True)
class EngineSet:
    """What one ``mesart build`` made: engines for every phase and bucket."""

    flavour: Flavour
    version: Text
    """Of TensorRT; engines run with this one only."""
    compute_capabilities: Some[Text]
    """Of the GPUs that they run on, such as ``sm89``."""
    layout: Layout
    weights: Weights
    engines: Some[EngineInfo]

    def find(self, phase: EnginePhase, bucket: int | None = None) -> tuple[EngineInfo, int]:
        """The engine for a phase and bucket, and the index of its profile."""
        for engine in self.engines:
            for index, profile in enumerate(engine.profiles):
                if (profile.phase, profile.bucket) == (phase, bucket):
                    return engine, index
        raise BundleError(
            f"no engine for the {phase}{'' if bucket is None else f' of {bucket} chunks'}; run `mesart build`"
        )


@dataclass(frozen=True)
class Quantisation:
    """How the weights of linear layers are stored: whole numbers, a scale for each block of them."""

    scheme: Annotated[str, Must("one of int8, int4, fp8", ("int8", "int4", "fp8").__contains__)]
    bits: Annotated[int, Must("4 or 8", (4, 8).__contains__)]
    group_size: Size | None
    """Inputs of a layer that share a scale; ``None``: all inputs of an output do."""
    symmetric: bool
    """Without zero points."""

    def __str__(self) -> str:
        if self.scheme == "fp8":
            return "fp8, a scale for a weight; their inputs in fp8 too, a scale for a token"
        blocks = "an output" if self.group_size is None else f"{self.group_size} inputs"
        return f"{self.scheme}, a scale{'' if self.symmetric else ' and a zero point'} for {blocks}"


class ModelInfo(TypedDict):
    """The model that a bundle was made of."""

    architecture: Text
    """The name of its class."""
    model_type: str
    vocab_size: Size
    parameters: Size
    """The number of its weights."""


@dataclass(frozen=True)
class Manifest:
    """What a bundle holds."""

    model: ModelInfo
    dtype: Annotated[str, Must(f"one of {', '.join(DTYPES)}", DTYPES.__contains__)]
    config: Annotated[StaticMethod, Tagged(METHOD_FIELD, STATIC_METHODS)]
    """The method; its JSON names it."""
    max_tokens: Size
    buckets: Some[Bucket]
    layers: Some[LayerInfo]
    graphs: list[GraphInfo]
    tools: dict[Text, str]
    """Versions that made the bundle."""
    files: dict[ListedName, FileInfo] = field(default_factory=dict)
    """What the export wrote."""
    engines: list[EngineSet] = field(default_factory=list)
    """What ``mesart build`` added."""
    weight_files: Some[FileName] = field(default_factory=lambda: [WEIGHTS_FILE])
    """safetensors; those of the checkpoint, if they are linked, and one of the bundle's own."""
    quantisation: Quantisation | None = None
    """Of the weights of linear layers; the others have ``dtype``."""
    filler: list[Count] = field(default_factory=list)
    """Token ids, ``head_length`` of them: what a head is filled up with, where documents begin before its end."""
    schema_version: int = SCHEMA_VERSION

    @property
    def weight_bytes(self) -> int:
        """Of all weight files."""
        return sum(self.files[name].bytes for name in self.weight_files)

    def has(self, kind: GraphKind) -> bool:
        return any(graph.kind == kind for graph in self.graphs)

    def graph(self, kind: GraphKind, bucket: int | None = None) -> GraphInfo:
        for graph in self.graphs:
            if graph.kind == kind and graph.bucket == bucket:
                return graph
        raise BundleError(f"the bundle holds no {kind} graph{'' if bucket is None else f' for {bucket} chunks'}")

    @property
    def looks_at_positions(self) -> bool:
        """Whether graphs take ``past_position_ids``: the positions of the past keys, for windows and ALiBi."""
        return any(tensor.name == PAST_POSITION_IDS for graph in self.graphs for tensor in graph.inputs)

    @property
    def digest(self) -> Digest:
        """Names this bundle and no other: whoever knows it can tell that all of its files are those that were meant."""
        return f"sha256:{json.loads(self.to_json())['sha256']}"

    def to_json(self) -> str:
        return sealed(dataclasses.asdict(self) | {"config": method_to_json(self.config)})

    @classmethod
    def read(cls, bundle: Path) -> Manifest:
        """The manifest of a bundle folder, checked completely: its types and ranges, its parts against one another.

        Raises:
            MesaError: no bundle, a manifest that is broken or was altered, or one of another schema.
        """
        path = bundle / MANIFEST_FILE
        try:
            content = _content(path)
            fields = parse_json(content)
            if not isinstance(fields, dict):
                raise Mismatch(f"is {shown(fields)}, expected an object")
            if "schema_version" not in fields:
                raise Mismatch("lacks the field 'schema_version'")
            version = fields["schema_version"]
            if type(version) is not int or version != SCHEMA_VERSION:
                newer = type(version) is int and version > SCHEMA_VERSION
                raise BundleError(
                    f"{path} has schema {shown(version)}, this version of mesart reads {SCHEMA_VERSION}; "
                    + ("upgrade mesart" if newer else "export the model again")
                )
            fields.pop("sha256", None)
            manifest = read_record(cls, fields)
            check_agreement(manifest)
        except (Mismatch, ValueError) as error:
            raise BundleError(f"{path} cannot be read ({error}); export the model again") from error
        if content[-_SEAL_BYTES:] != _seal(content[:-_SEAL_BYTES]):
            raise BundleError(f"{path} was altered (its SHA-256 differs); export the model again")
        return manifest

    def open_files(self, bundle: Path) -> BundleFiles:
        """The files of the bundle, none of them checked so far."""
        return BundleFiles(bundle, self.files)

    def verify(self, bundle: Path, *, contents: bool = True) -> None:
        """Checks that every file is there and whole; ``contents``: also that its SHA-256 is the recorded one.

        Raises:
            MesaError: names the first file that is missing, truncated, altered or no regular file.
        """
        self.open_files(bundle).verify(contents=contents)

    def write(self, bundle: Path) -> None:
        """Replaces the manifest of a bundle; whoever reads it meanwhile finds the old one or the new one, whole."""
        path = bundle / MANIFEST_FILE
        partial = path.with_name(f".{MANIFEST_FILE}.{secrets.token_hex(4)}.partial")
        # A new file, of a name that nobody knows: a link that waits there cannot lead the writing elsewhere.
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "w", encoding="utf-8") as file:
            try:
                file.write(self.to_json())
                file.flush()
                os.fsync(file.fileno())
                partial.replace(path)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise


def sealed(fields: Mapping[str, Any]) -> str:
    """The JSON of a manifest of these fields, which ends in the SHA-256 of all that stands before it."""
    others = {name: value for name, value in fields.items() if name != "sha256"}
    body = json.dumps(others, indent=1, sort_keys=True).removesuffix("\n}")
    return body + _seal(body.encode()).decode()


def _seal(body: bytes) -> bytes:
    return b',\n "sha256": "%s"\n}\n' % hashlib.sha256(body).hexdigest().encode()


_SEAL_BYTES = len(_seal(b""))


def _content(path: Path) -> bytes:
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        if isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise BundleError(
                f"{path.parent} is no bundle: it holds no {MANIFEST_FILE}; make one with `mesart export`"
            ) from error
        raise BundleError(f"{path} cannot be read: {reason(error)}") from error
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"{path.parent} is no bundle: its {MANIFEST_FILE} is no regular file")
    if status.st_size > _MOST_BYTES:
        raise BundleError(f"{path} has {status.st_size} bytes, more than the {_MOST_BYTES} that a manifest may have")
    try:
        with path.open("rb") as file:
            return file.read(_MOST_BYTES)
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {reason(error)}") from error


def engine_info(fields: dict[str, Any]) -> EngineInfo:
    """An engine's record as it stands in JSON.

    Raises:
        ValueError: it is none.
    """
    try:
        return read_record(EngineInfo, fields)
    except Mismatch as error:
        raise ValueError(str(error)) from error


__all__ = [
    "DTYPES",
    "ENGINES_FOLDER",
    "ENGINE_FILE",
    "ENGINE_REROTATE_FILE",
    "MANIFEST_FILE",
    "ONNXRUNTIME_FILE",
    "SCHEMA_VERSION",
    "SYMBOLIC_FILE",
    "WEIGHTS_FILE",
    "BundleFiles",
    "EngineBytes",
    "EngineInfo",
    "EngineSet",
    "FileInfo",
    "Flavour",
    "GraphInfo",
    "LayerInfo",
    "Layout",
    "Manifest",
    "ModelInfo",
    "ProfileInfo",
    "Quantisation",
    "TensorInfo",
    "WeightInfo",
    "Weights",
    "engine_info",
    "is_plain",
    "sealed",
    "sha256",
]
