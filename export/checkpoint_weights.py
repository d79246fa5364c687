"""The weights of a checkpoint: which files they are in, and what those hold, read off their headers once.

The files are those that transformers 5 would load: one that ``transformers_weights`` of the config names, else
``model.safetensors``, else those of its index, else the same of ``pytorch_model.bin``. An index comes from elsewhere,
and names files: only ones inside of the checkpoint count. As in transformers, what the files hold counts, whatever the
index says of where it lies; but where that would be a guess, it is refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final
from zipfile import is_zipfile

import torch
from safetensors import safe_open
from torch import Tensor

from mesart.export.file_kinds import mistaken
from mesart.export.safetensors_file import Stored, read_header
from mesart.graphs.errors import InputError, MesaError
from mesart.graphs.json_file import described, read_object
from mesart.graphs.user_data import reason

_INDEX_BYTES: Final = 256 << 20
_BLOCK: Final = 1 << 24


@dataclass(frozen=True)
class CheckpointWeights:
    """What the files of a checkpoint hold."""

    files: list[Path]
    pickled: bool
    """Files of ``torch.save``, not safetensors."""
    tensors: dict[str, Stored]
    read: Callable[[Stored], Tensor]


def open_weights(folder: Path, config: Any = None) -> CheckpointWeights:
    """The weights of a checkpoint, without reading them.

    Args:
        folder: the checkpoint's.
        config: the model's, which may name the file.

    Raises:
        MesaError: there are none, a file is missing, damaged or not what its name says, the index is broken, names what
            is not there or files outside of the checkpoint, or two files disagree.
    """
    files, index, where = _files(folder, getattr(config, "transformers_weights", None))
    for file in files:
        if not file.is_file():
            named = f", which {index.name} names" if index is not None else ""
            raise InputError(f"{folder} has no {file.relative_to(folder)}{named}; is the download complete?")
    pickled = files[0].suffix == ".bin"
    tensors, read = _open_pickles(files) if pickled else _open_safetensors(files)
    for name, file_name in where.items():
        if name not in tensors:
            raise InputError(f"{index} names {name} in {file_name}, which does not hold it; is the download complete?")
    return CheckpointWeights(files, pickled, tensors, read)


def _files(folder: Path, named: Any) -> tuple[list[Path], Path | None, Mapping[str, str]]:
    """The files, and the index with its ``weight_map`` if there is one."""
    if named is not None:
        _check_entry(folder / "config.json", folder, "transformers_weights", named, (".safetensors", ".index.json"))
        path = folder / named
        if path.name.endswith(".index.json"):
            where = index_entries(path, folder)
            return _paths(folder, where), path, where
        return [path], None, {}
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        single, index = folder / f"{stem}{suffix}", folder / f"{stem}{suffix}.index.json"
        if single.is_file():
            return [single], None, {}
        if index.is_file():
            where = index_entries(index, folder)
            return _paths(folder, where), index, where
    others = sorted(path.name for path in folder.glob("*") if path.suffix in (".gguf", ".safetensors", ".bin", ".pth"))
    found = f"; {others[0]} is no name that transformers looks for" if others else ""
    raise InputError(f"{folder} has no model.safetensors and no pytorch_model.bin{found}")


def _paths(folder: Path, where: Mapping[str, str]) -> list[Path]:
    return [folder / name for name in sorted(set(where.values()))]


def index_entries(path: Path, folder: Path) -> dict[str, str]:
    """The file of each tensor, by an index.

    Args:
        path: the index, ``*.safetensors.index.json`` or ``*.bin.index.json``.
        folder: the checkpoint's.

    Raises:
        MesaError: it is no index, or names files outside of the checkpoint.
    """
    suffix = Path(path.name.removesuffix(".index.json")).suffix
    try:
        index = read_object(path, _INDEX_BYTES)
    except MesaError as error:
        raise InputError(f"{path} is not a valid index of weights: {error}") from error
    where, metadata = index.get("weight_map"), index.get("metadata", {})
    if not isinstance(metadata, dict):
        raise InputError(
            f"{path} is not a valid index of weights: metadata is {described(metadata)}; it must be an object"
        )
    if not isinstance(where, dict) or not where:
        raise InputError(
            f"{path} is not a valid index of weights: weight_map is {described(where)}; it must be an object "
            "that names the file of each tensor"
        )
    for name, entry in where.items():
        if not isinstance(entry, str):
            raise InputError(
                f"{path} is not a valid index of weights: {name!r:.80} is in {described(entry)}; expected a file's name"
            )
    for entry in set(where.values()):
        _check_entry(path, folder, "an entry", entry, (suffix,))
    return where


def _check_entry(source: Path, folder: Path, what: str, entry: Any, suffixes: tuple[str, ...]) -> None:
    """Refuses a file's name that leads out of the checkpoint; links of the hub's cache lead to its blobs."""
    plain = isinstance(entry, str) and entry.isprintable() and "\\" not in entry and len(entry) <= 255
    parts = PurePosixPath(entry).parts if plain else ("..",)
    if not plain or entry.startswith("/") or ".." in parts or not entry.endswith(suffixes):
        raise InputError(
            f"{source}: {what} is {entry!r:.80}; expected a file inside of the checkpoint that ends in {suffixes[0]}"
        )
    # Not Path.resolve: it has a RuntimeError for links that lead to themselves.
    home, path = Path(os.path.realpath(folder)), Path(os.path.realpath(folder / entry))
    if not path.is_relative_to(home) and path.parent != home.parent.parent / "blobs":
        raise InputError(
            f"{source}: {what}, {entry!r}, is a link to {path}, outside of the checkpoint; put the file itself there"
        )


def _open_safetensors(files: list[Path]) -> tuple[dict[str, Stored], Callable[[Stored], Tensor]]:
    tensors: dict[str, Stored] = {}
    for file in files:
        for name, stored in read_header(file).items():
            known = tensors.setdefault(name, stored)
            if known is not stored and not _equal(known, stored):
                raise _in_two_files(name, known.file, file)

    def read(stored: Stored) -> Tensor:
        with safe_open(stored.file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(stored.name)
        return tensor

    return tensors, read


def _in_two_files(name: str, one: Path, other: Path) -> MesaError:
    return InputError(f"{name} is in {one} and in {other}, and differs; one of them is not of this model")


def _equal(one: Stored, other: Stored) -> bool:
    if (one.dtype, one.shape, one.bytes) != (other.dtype, other.shape, other.bytes):
        return False
    with one.file.open("rb") as first, other.file.open("rb") as second:
        first.seek(one.offset)
        second.seek(other.offset)
        for at in range(0, one.bytes, _BLOCK):
            count = min(_BLOCK, one.bytes - at)
            if first.read(count) != second.read(count):
                return False
    return True


def _open_pickles(files: list[Path]) -> tuple[dict[str, Stored], Callable[[Stored], Tensor]]:
    """Tensors only, mapped from the file: a pickle could run any code otherwise."""
    loaded: dict[str, Tensor] = {}
    tensors: dict[str, Stored] = {}
    for file in files:
        for name, tensor in _load_pickle(file).items():
            if name in loaded and not (tensor.dtype == loaded[name].dtype and torch.equal(tensor, loaded[name])):
                raise _in_two_files(name, tensors[name].file, file)
            loaded[name] = tensor
            tensors[name] = Stored(file, name, -1, tensor.nbytes, tensor.dtype, tuple(tensor.shape))
    return tensors, lambda stored: loaded[stored.name]


def _load_pickle(file: Path) -> dict[str, Tensor]:
    try:
        # The format before torch 1.6 is no zip archive, and cannot be mapped.
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file))
    except Exception as error:  # unpickling can fail in any way
        what = mistaken(file, pickles=True)
        why = f"it {what}" if what is not None else reason(error)
        raise InputError(f"{file} is no file of tensors that is safe to load: {why}") from error
    if not isinstance(state, dict):
        raise InputError(f"{file} holds a {type(state).__name__}; expected tensors by their names (model.state_dict())")
    found = {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not found:
        inner = next((name for name, value in state.items() if isinstance(value, dict) and value), None)
        nested = f"; its weights may be under {inner!r:.40}: save that part alone" if inner is not None else ""
        raise InputError(f"{file} holds no tensors by their names{nested}")
    for name, tensor in found.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            kind = "quantised" if tensor.is_quantized else str(tensor.layout).removeprefix("torch.")
            kind = kind if tensor.device.type == "cpu" else f"on the device {tensor.device}, without numbers"
            raise InputError(f"{file}: {name} is {kind}; expected a plain (strided) tensor")
    return found


__all__ = ["CheckpointWeights", "index_entries", "open_weights"]
