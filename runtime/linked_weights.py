"""ONNX files whose weight files are links that lead out of their folder, as the Hugging Face hub's cache keeps them.

OpenVINO opens no weight file outside the folder of its ONNX file, links followed. It does take weights at an address in
memory: the files are mapped here, and the graph, which is small, is handed over with addresses in place of file names.
Nothing is copied, nothing is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mesart.graphs.errors import BundleError

IN_MEMORY: Final = b"*/_ORT_MEM_ADDR_/*"
"""In place of a file name: the offset is an address."""

# Of the ONNX format (onnx.proto): numbers of the fields on the way to a weight's file.
_GRAPH, _INITIALIZER, _EXTERNAL_DATA, _KEY, _VALUE = 7, 5, 13, 1, 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types of protocol buffers


def has_links(folder: Path) -> bool:
    """Whether weights of a folder may lie elsewhere."""
    return any(path.is_symlink() for path in folder.glob("*.safetensors"))


@dataclass
class MappedGraph:
    """An ONNX file with its weight files in memory; both have to stay while the graph is in use."""

    path: Path
    files: dict[str, NDArray[Any]] = field(default_factory=dict)
    """What is mapped, by name."""

    def serialised(self) -> bytes:
        """The graph with addresses in place of file names.

        Raises:
            MesaError: it is no ONNX file, or wants more of a weight file than there is.
        """
        try:
            return self._model(memoryview(self.path.read_bytes()))
        except (IndexError, ValueError, UnicodeDecodeError) as error:
            raise BundleError(
                f"{self.path} is damaged: it is no ONNX graph; copy or export the bundle again"
            ) from error

    def _model(self, model: memoryview) -> bytes:
        return _replaced(model, _GRAPH, lambda graph: _replaced(graph, _INITIALIZER, self._tensor))

    def _tensor(self, tensor: memoryview) -> bytes:
        entries: dict[str, str] = {}
        for number, _, value in _fields(tensor):
            if number == _EXTERNAL_DATA:
                pair = {key: bytes(text).decode() for key, _, text in _fields(value)}
                entries[pair.get(_KEY, "")] = pair.get(_VALUE, "")
        if not entries:
            return bytes(tensor)
        length = int(entries["length"]) if "length" in entries else -1
        address = str(self._address(entries.get("location", ""), int(entries.get("offset", "0")), length))
        kept = b"".join(bytes(whole) for number, whole, _ in _fields(tensor) if number != _EXTERNAL_DATA)
        now = {"location": IN_MEMORY.decode(), "offset": address, "length": str(length)}
        return kept + b"".join(_delimited(_EXTERNAL_DATA, _entry(key, value)) for key, value in now.items())

    def _address(self, name: str, offset: int, length: int) -> int:
        if Path(name).name != name:
            raise BundleError(f"{self.path} refers to the weights {name!r}: no file of its folder; export again")
        if name not in self.files:
            try:
                self.files[name] = np.memmap(self.path.parent / name, np.uint8, "r")
            except (OSError, ValueError) as error:
                raise BundleError(
                    f"{self.path.parent / name} cannot be opened: {error}; copy the bundle again"
                ) from error
        mapped = self.files[name]
        if offset < 0 or length < 0 or offset + length > mapped.size:
            raise BundleError(
                f"{self.path} wants bytes {offset} to {offset + length} of {name}, which has {mapped.size}; "
                "copy or export the bundle again"
            )
        return int(mapped.ctypes.data) + offset


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview, memoryview]]:
    """The fields of a message: number, all its bytes, and its value where that is bytes itself."""
    at = 0
    while at < len(message):
        start = at
        tag, at = _varint(message, at)
        content = at
        kind = tag & 7
        if kind == _VARINT:
            _, at = _varint(message, at)
        elif kind == _BYTES:
            size, content = _varint(message, at)
            at = content + size
        elif kind in (_FIXED32, _FIXED64):
            at += 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {kind}")
        if at > len(message):
            raise ValueError("cut short")
        yield tag >> 3, message[start:at], message[content:at]


def _replaced(message: memoryview, number: int, change: Any) -> bytes:
    """A message with ``change`` applied to the values of one field."""
    return b"".join(
        _delimited(number, change(value)) if found == number else bytes(whole)
        for found, whole, value in _fields(message)
    )


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """A number, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number of more than 64 bits")


def _delimited(number: int, value: bytes) -> bytes:
    return _number(number << 3 | _BYTES) + _number(len(value)) + value


def _entry(key: str, value: str) -> bytes:
    return _delimited(_KEY, key.encode()) + _delimited(_VALUE, value.encode())


def _number(value: int) -> bytes:
    result = bytearray()
    while value > 0x7F:
        result.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*result, value])


__all__ = ["IN_MEMORY", "MappedGraph", "has_links"]
