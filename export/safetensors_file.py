"""safetensors files by their headers: where each tensor lies, and a writer that holds one tensor at a time."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mesart.graphs.errors import MesaError, first_line

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
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    file: Path
    name: str
    offset: int
    """From the beginning of the file, bytes."""
    bytes: int
    dtype: torch.dtype
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

    Raises:
        MesaError: the file is truncated, or not of this format.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size:
                raise ValueError("its header ends behind the file")
            header: dict[str, Any] = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        tensors = {}
        for name, info in sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]):
            start, stop = info["data_offsets"]
            tensors[name] = Stored(
                file, name, 8 + length + start, stop - start, DTYPES[info["dtype"]], tuple(info["shape"])
            )
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MesaError(f"{file} is truncated or no safetensors file: {first_line(error)}") from error
    end = max((stored.offset + stored.bytes for stored in tensors.values()), default=8 + length)
    if end != size:
        raise MesaError(f"{file} is truncated or no safetensors file: it has {size} bytes instead of {end}")
    return tensors


def write_file(path: Path, tensors: Mapping[str, Pending], progress: Callable[[int], None] = lambda _: None) -> None:
    """Writes a safetensors file tensor by tensor.

    Args:
        path: the file.
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
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            made = tensors[name].make().detach().to(tensors[name].dtype).contiguous()
            assert tuple(made.shape) == tensors[name].shape, name
            stream.write(made.reshape(-1).view(torch.uint8).numpy().data)
            progress(tensors[name].bytes)


__all__ = ["DTYPES", "Pending", "Stored", "read_header", "write_file"]
