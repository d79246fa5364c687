"""safetensors files by their headers: where each tensor lies, and a writer that holds one tensor at a time."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

import torch
from safetensors import safe_open
from torch import Tensor

from mesart.export.file_kinds import mistaken
from mesart.graphs.errors import InputError
from mesart.graphs.user_data import reason

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""Those of weights that we read and write, as the format calls them."""

_BITS: Final = {
    **{name: dtype.itemsize * 8 for name, dtype in DTYPES.items()},
    "U64": 64,
    "U32": 32,
    "U16": 16,
    "C64": 64,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F8_E8M0": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}
"""Bits of a number of each dtype that the format knows."""

_LONGEST_HEADER: Final = 100_000_000
"""Bytes; the safetensors library's limit."""

_LARGEST: Final = (1 << 63) - 1
"""Of sizes and offsets, bytes."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    file: Path
    name: str
    offset: int
    """From the beginning of the file, bytes."""
    bytes: int
    dtype: torch.dtype | None
    """``None``: one that we do not read."""
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Pending:
    """A tensor that is made when it is written."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * int(torch.Size(self.shape).numel())


def read_header(file: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, by name, in the order of the file; no byte of them is read or mapped.

    As strict as the safetensors library, which has the last word: what it refuses, an engine may read as other numbers,
    for it is given offsets only.

    Raises:
        MesaError: the file is truncated, or not of this format.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > size - 8:
                _refuse(file, "its header ends behind the file")
            if length > _LONGEST_HEADER:
                _refuse(file, f"its header has {length} bytes, {_LONGEST_HEADER} at most are allowed")
            text = stream.read(length)
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from error
    header = _parse(file, text)
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        _refuse(file, "its __metadata__ must be an object of texts")
    tensors = sorted((_stored(file, name, info, 8 + length) for name, info in header.items()), key=_by_place)
    end = 8 + length
    for tensor in tensors:
        if tensor.offset != end:
            kind = "a hole before" if tensor.offset > end else "an overlap at"
            _refuse(file, f"{kind} {tensor.name!r:.200}, which begins at {tensor.offset - 8 - length} of the data")
        end += tensor.bytes
    if end != size:
        _refuse(file, f"it has {size} bytes instead of {end}")
    try:
        with safe_open(file, framework="pt"):
            pass
    except Exception as error:  # noqa: BLE001  (Rust's; the library is asked for its opinion, whatever kind it is of)
        _refuse(file, reason(error), error)
    return {tensor.name: tensor for tensor in tensors}


def _refuse(file: Path, why: str, cause: BaseException | None = None) -> NoReturn:
    what = mistaken(file)
    if what is not None:
        why = f"it {what}"
    raise InputError(f"{file} is truncated or no safetensors file: {why}") from cause


def _parse(file: Path, text: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, value in pairs:
            if name in values:
                raise ValueError(f"{name!r:.80} is there twice")
            values[name] = value
        return values

    def no_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is no number of JSON")

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=once, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        _refuse(file, f"its header is not valid: {reason(error)}", error)
    if not isinstance(header, dict):
        _refuse(file, "its header is no JSON object")
    return header


def _stored(file: Path, name: str, info: Any, begin: int) -> Stored:
    """A tensor, from its entry in the header; ``begin``: where the data begins in the file."""
    if not isinstance(info, dict) or set(info) != {"dtype", "shape", "data_offsets"}:
        _refuse(file, f"{name!r:.200} must have a dtype, a shape and data_offsets")
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        _refuse(file, f"{name!r:.200} has the unknown dtype {dtype!r:.40}")
    if not _whole_numbers(shape):
        _refuse(file, f"{name!r:.200} has the shape {shape!r:.80}")
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _refuse(file, f"{name!r:.200} has the data_offsets {offsets!r:.80}")
    bits, (start, stop) = _BITS[dtype] * math.prod(shape), offsets
    if bits % 8 or bits // 8 != stop - start:
        _refuse(file, f"{name!r:.200} takes {stop - start} bytes, which its shape {shape!r:.80} of {dtype} does not")
    return Stored(file, name, begin + start, stop - start, DTYPES.get(dtype), tuple(shape))


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= _LARGEST for value in values)


def _by_place(tensor: Stored) -> tuple[int, int]:
    """Where it begins and ends: empty tensors before the one that begins at the same place."""
    return tensor.offset, tensor.offset + tensor.bytes


def write_file(path: Path, tensors: Mapping[str, Pending], progress: Callable[[int], None] = lambda _: None) -> None:
    """Writes a safetensors file tensor by tensor.

    Args:
        path: the file, which is not there yet.
        tensors: by name.
        progress: called with the bytes of each tensor once it is written.
    """
    # Wide types first, so that each tensor begins at a multiple of its item's size.
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        tensor = tensors[name]
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.bytes],
        }
        offset += tensor.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            made = tensors[name].make().detach().to(tensors[name].dtype).contiguous()
            assert tuple(made.shape) == tensors[name].shape, name
            stream.write(made.reshape(-1).view(torch.uint8).numpy().data)
            progress(tensors[name].bytes)


__all__ = ["DTYPES", "Pending", "Stored", "read_header", "write_file"]
