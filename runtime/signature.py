"""Whether a graph that an engine has opened has the inputs and outputs that its manifest says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from mesart.graphs.bundle.manifest import GraphInfo, TensorInfo
from mesart.graphs.errors import BundleError, MesaError

_DTYPES = {
    "float": "float32",  # of ONNX and onnxruntime
    "f32": "float32",  # of OpenVINO
    "i32": "int32",
    "f16": "float16",
    "bf16": "bfloat16",
    "i64": "int64",
    "boolean": "bool",
}


class Tensor(NamedTuple):
    """An input or output as an engine knows it."""

    names: frozenset[str]
    dtype: str
    shape: list[int | None]
    """``None``: a free axis."""


Signature: TypeAlias = Sequence[Tensor]


def check_signature(path: Path, info: GraphInfo | None, inputs: Signature, outputs: Signature) -> None:
    """Compares a graph's inputs and outputs with its record; no record, nothing to compare.

    Raises:
        MesaError: names the first tensor that is missing, or of another dtype or shape.
    """
    if info is None:
        return
    for kind, recorded, found in (("input", info.inputs, inputs), ("output", info.outputs, outputs)):
        by_name = {name: tensor for tensor in found for name in tensor.names}
        for tensor in recorded:
            if tensor.name not in by_name:
                raise _differ(path, f"has no {kind} {tensor.name}")
            _check(path, kind, tensor, by_name[tensor.name])
    known = {tensor.name for tensor in info.inputs}
    for extra in inputs:
        if not extra.names & known:
            raise _differ(path, f"has an input {min(extra.names, default='')!r}, which the manifest does not list")


def onnxruntime_signature(session: Any) -> tuple[Signature, Signature]:
    """Inputs and outputs of an onnxruntime session."""

    def read(values: Sequence[Any]) -> Signature:
        return [
            Tensor(
                frozenset([value.name]),
                _dtype(value.type.removeprefix("tensor(").removesuffix(")")),
                [extent if isinstance(extent, int) and extent >= 0 else None for extent in value.shape],
            )
            for value in values
        ]

    return read(session.get_inputs()), read(session.get_outputs())


def openvino_signature(compiled: Any) -> tuple[Signature, Signature]:
    """Inputs and outputs of an OpenVINO model, under each of their names."""

    def read(ports: Sequence[Any]) -> Signature:
        found = []
        for port in ports:
            shape = [extent.get_length() if extent.is_static else None for extent in port.get_partial_shape()]
            found.append(Tensor(frozenset(port.get_names()), _dtype(port.get_element_type().get_type_name()), shape))
        return found

    return read(compiled.inputs), read(compiled.outputs)


def _dtype(name: str) -> str:
    return _DTYPES.get(name, name)


def _check(path: Path, kind: str, recorded: TensorInfo, found: Tensor) -> None:
    if found.dtype != _dtype(recorded.dtype):
        raise _differ(path, f"has an {kind} {recorded.name} of {found.dtype}, the manifest says {recorded.dtype}")
    shape = [extent if isinstance(extent, int) else None for extent in recorded.shape]
    free = kind == "output"  # of whose axes an engine may know more, or less
    same = len(shape) == len(found.shape) and all(
        a == b or (free and None in (a, b)) for a, b in zip(shape, found.shape, strict=True)
    )
    if not same:
        says = ", ".join("?" if extent is None else str(extent) for extent in found.shape)
        raise _differ(
            path,
            f"has an {kind} {recorded.name} of shape [{says}], the manifest says {recorded.shape}".replace("'", ""),
        )


def _differ(path: Path, how: str) -> MesaError:
    return BundleError(f"{path} {how}; export the model again")


__all__ = ["Signature", "Tensor", "check_signature", "onnxruntime_signature", "openvino_signature"]
