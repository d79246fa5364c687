"""Checkpoints whose weights a library has quantised: its whole numbers, one by one, in a bundle's layout.

A packed weight ``[out, in]`` is whole numbers from 0 to ``2 ** bits - 1``, n of them in an int32, the lowest bits
first. It stands for ``(number - zero) * scale``. The schemes differ in what lies along which axis:

- GPTQ: ``qweight [in / n, out]``, ``scales [groups, out]``, ``qzeros [groups, out / n]``, which the first of its two
  formats stores less 1.
- AWQ, "gemm": ``qweight [in, out / n]``, ``scales [groups, out]``, ``qzeros [groups, out / n]``, outputs interleaved.
- compressed-tensors, "pack-quantized": ``weight_packed [out, in / n]``, ``weight_scale [out, groups]``,
  ``weight_zero_point [out / n, groups]``, or else the zero is in the middle.

AutoRound writes the first two under a name of its own as well, and GPTQ there also in the second format. Weights that
are not packed stay as they are; all packed ones of a checkpoint have the same bits and groups.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from mesart.export.quantise import GROUP_SIZES, SCHEMES, pack, scales_shape
from mesart.export.safetensors_file import Stored
from mesart.graphs.bundle.manifest import Quantisation
from mesart.graphs.errors import InputError, MesaError
from mesart.graphs.model.torch_weights import Packed, dequantise

_AWQ_COLUMNS = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in an int32 of AWQ each of its eight columns lies: even ones in the lower half, odd ones in the upper."""


@dataclass(frozen=True)
class Scheme:
    """How a checkpoint says that its weights are packed."""

    name: str
    """As the checkpoint calls it."""
    layout: type[_Layout]
    bits: int
    group_size: int | None
    """``None``: all inputs of an output share a scale."""
    less_one: bool = False
    """Zeros are stored less 1."""


def read_scheme(source: str, config: Any) -> Scheme | None:
    """The scheme of a checkpoint, ``None`` if it is not quantised.

    Args:
        source: the checkpoint, for messages.
        config: the model's; its ``quantization_config`` counts.

    Raises:
        MesaError: a scheme that export cannot read, by its name, or a field of another kind than it must be.
    """
    given = getattr(config, "quantization_config", None)
    if given is None:
        return None
    if hasattr(given, "to_dict"):
        given = given.to_dict()
    fields = _object(source, "quantization_config", given)
    name = f"{fields.get('quant_method')!s:.40}"
    layout: type[_Layout] | None = None
    less_one = False
    if name == "compressed-tensors":
        return _read_compressed_tensors(source, fields)
    if name in ("gptq", "awq"):
        known = {"gptq": ("gptq", "gptq_v2"), "awq": ("gemm",)}[name]
        given_form = next((fields[k] for k in ("checkpoint_format", "format", "version") if fields.get(k)), known[0])
        form = f"{given_form!s:.40}".lower()
        if form in known:
            layout, less_one = (_Gptq, form == "gptq") if name == "gptq" else (_Awq, False)
        name = f"{name}, {form}"
    elif name == "auto-round":
        form = f"{fields.get('packing_format')!s:.40}"
        layout = {
            "auto_round": _Gptq,
            "auto_round:gptqmodel": _Gptq,
            "auto_round:auto_gptq": _Gptq,
            "auto_round:auto_awq": _Awq,
        }.get(form)
        less_one = form == "auto_round:auto_gptq"
        name = f"{name}, {form}"
    if layout is None:
        raise _unreadable(source, name)
    return _scheme(source, name, layout, fields.get("bits"), fields.get("group_size"), less_one=less_one)


def _read_compressed_tensors(source: str, fields: dict[str, Any]) -> Scheme:
    named = _object(source, "quantization_config.config_groups", fields.get("config_groups") or {})
    groups = [_object(source, f"quantization_config.config_groups.{key}", group) for key, group in named.items()]
    form = fields.get("format")
    name = f"compressed-tensors, {form!s:.40}"
    if form != "pack-quantized":
        raise _unreadable(source, name)
    for part in ("kv_cache_scheme", "transform_config"):
        if fields.get(part):
            raise _unreadable(source, f"{name} with a {part}")
    if any(group.get(part) for group in groups for part in ("input_activations", "output_activations")):
        raise _unreadable(source, f"{name} with activations")
    weights = [_object(source, "the weights of a group", group.get("weights") or {}) for group in groups]
    kinds = [[w.get(field) for field in ("type", "num_bits", "strategy", "group_size")] for w in weights]
    if not kinds or any(kind != kinds[0] for kind in kinds):
        raise _unreadable(source, f"{name}, {'several' if kinds else '0'} kinds of weights")
    kind, bits, strategy, group_size = kinds[0]
    if kind != "int" or strategy not in ("group", "channel"):
        raise _unreadable(source, f"{name}, {kind!s:.40}, a scale for each {strategy!s:.40}")
    return _scheme(source, name, _CompressedTensors, bits, group_size if strategy == "group" else None)


def _scheme(
    source: str, name: str, layout: type[_Layout], bits: Any, group_size: Any, *, less_one: bool = False
) -> Scheme:
    if type(bits) is not int or bits not in SCHEMES.values() or (layout is _Awq and bits != 4):
        raise _unreadable(source, f"{name}, {bits!s:.40} bits")
    group_size = None if group_size is None or group_size == -1 else group_size
    if group_size is not None and (type(group_size) is not int or group_size not in GROUP_SIZES):
        raise InputError(
            f"{source} is quantised in groups of {group_size!s:.40} inputs; engines take "
            f"{', '.join(map(str, GROUP_SIZES))}"
        )
    return Scheme(name, layout, bits, group_size, less_one)


def _object(source: str, name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{source}/config.json: {name} is {value!r:.40}; it must be an object")
    return value


def _unreadable(source: str, name: str) -> MesaError:
    return InputError(
        f"{source} is quantised ({name}), which export cannot read: it reads gptq, awq (gemm), auto-round and "
        "compressed-tensors (pack-quantized) of 4 or 8 bits; give the checkpoint that it was made from"
    )


class _Layout(ABC):
    """A packed weight as a scheme lays it out.

    Args:
        name: the layer's.
        scheme: of the checkpoint.
        parts: what is stored of it, by the last part of the name.
        read: gives a stored tensor.
    """

    PARTS: ClassVar[tuple[str, ...]]
    """Last parts of the names of tensors; those that must be there, the numbers first."""
    OPTIONAL: ClassVar[tuple[str, ...]] = ()
    GROUP_INDEX: ClassVar[str]
    SCALES: ClassVar[str] = "scales"
    """The part of floating point numbers; the others are whole ones, int32 where several are in one."""
    VECTORS: ClassVar[tuple[str, ...]] = ("g_idx", "weight_g_idx", "weight_shape")
    """Parts of one axis, of any whole numbers; the others have two."""

    def __init__(
        self, name: str, scheme: Scheme, parts: Mapping[str, Stored], read: Callable[[Stored], Tensor]
    ) -> None:
        self.name, self._scheme, self.parts, self._read = name, scheme, parts, read

    def contradiction(self) -> str:
        """What is wrong with parts that contradict each other, where :attr:`shape` does not follow from one of them."""
        return ""

    def _part(self, name: str) -> Tensor:
        return self._read(self.parts[name])

    def _unpack(self, packed: Tensor) -> Tensor:
        """int32 ``[..., k]`` to uint8 ``[..., k * n]``."""
        octets = packed.contiguous().view(torch.uint8)
        return octets if self._scheme.bits == 8 else torch.stack((octets & 15, octets >> 4), -1).flatten(-2)

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """``[out, in]``."""

    @abstractmethod
    def numbers(self) -> Tensor:
        """uint8 ``[in, out]``."""

    @abstractmethod
    def scales(self) -> Tensor:
        """``[groups, out]``."""

    @abstractmethod
    def zeros(self) -> Tensor:
        """uint8 ``[groups, out]``."""

    def group_index(self) -> Tensor | None:
        """The group of each input, ``[in]``, if it is stored."""
        return self._part(self.GROUP_INDEX) if self.GROUP_INDEX in self.parts else None


class _Gptq(_Layout):
    """As AutoGPTQ, GPTQModel and AutoRound write it."""

    PARTS = ("qweight", "qzeros", "scales")
    OPTIONAL = ("g_idx",)
    GROUP_INDEX = "g_idx"

    @property
    def shape(self) -> tuple[int, int]:
        words, outputs = self.parts["qweight"].shape
        return outputs, words * 32 // self._scheme.bits

    def numbers(self) -> Tensor:
        return self._unpack(self._part("qweight").t()).t()

    def scales(self) -> Tensor:
        return self._part("scales")

    def zeros(self) -> Tensor:
        words = self._part("qzeros")
        if self._scheme.less_one:  # 1 was taken from all numbers of a word at once: a 0 borrowed from the next number
            ones = sum(1 << bit for bit in range(0, 32, self._scheme.bits))
            words = (words.long() + ones).to(torch.int32)
        return self._unpack(words)


class _Awq(_Layout):
    """As AutoAWQ and AutoRound write it for kernels of the kind "gemm"."""

    PARTS = ("qweight", "qzeros", "scales")
    GROUP_INDEX = "g_idx"  # there is none

    @property
    def shape(self) -> tuple[int, int]:
        inputs, words = self.parts["qweight"].shape
        return words * 8, inputs

    def numbers(self) -> Tensor:
        return self._in_order(self._part("qweight"))

    def scales(self) -> Tensor:
        return self._part("scales")

    def zeros(self) -> Tensor:
        return self._in_order(self._part("qzeros"))

    def _in_order(self, packed: Tensor) -> Tensor:
        numbers = self._unpack(packed)
        return numbers.view(len(numbers), -1, 8)[..., _AWQ_COLUMNS].flatten(1)


class _CompressedTensors(_Layout):
    """As compressed-tensors and llm-compressor write it; its numbers have a sign, and are packed with it added."""

    PARTS = ("weight_packed", "weight_scale", "weight_shape")
    SCALES = "weight_scale"
    OPTIONAL = ("weight_zero_point", "weight_g_idx")
    GROUP_INDEX = "weight_g_idx"

    def contradiction(self) -> str:
        packed, bits = self.parts["weight_packed"].shape, self._scheme.bits
        shape = self._part("weight_shape").tolist()
        if len(shape) != 2 or min(shape) < 1 or packed != (shape[0], -(-shape[1] * bits // 32)):
            return f"weight_packed is {[*packed]}, which is no weight of {shape} (weight_shape) in {bits} bits"
        return ""

    @property
    def shape(self) -> tuple[int, int]:
        outputs, inputs = self._part("weight_shape").tolist()
        return outputs, inputs

    def numbers(self) -> Tensor:
        return self._unpack(self._part("weight_packed"))[:, : self.shape[1]].t()

    def scales(self) -> Tensor:
        return self._part("weight_scale").t()

    def zeros(self) -> Tensor:
        if "weight_zero_point" not in self.parts:
            middle = 1 << (self._scheme.bits - 1)
            return torch.full(self.parts["weight_scale"].shape[::-1], middle, dtype=torch.uint8)
        return self._unpack(self._part("weight_zero_point").t())[:, : self.shape[0]]


@dataclass(frozen=True)
class Repacked:
    """A packed weight in a bundle's layout: each part is read when it is asked for, and nothing is kept."""

    _weight: _Layout
    _how: Quantisation

    @property
    def shape(self) -> tuple[int, int]:
        """``[out, in]``."""
        return self._weight.shape

    @property
    def numbers(self) -> Tensor:
        return self._packed(self._weight.numbers())

    @property
    def scales(self) -> Tensor:
        return self._weight.scales().reshape(scales_shape(self.shape, self._how))

    @property
    def zero_points(self) -> Tensor | None:
        if self._how.symmetric:
            return None
        return self._packed(self._weight.zeros().reshape(scales_shape(self.shape, self._how)))

    def whole(self) -> Tensor:
        """The weight that it stands for, float32 ``[out, in]``."""
        return dequantise(Packed(self.numbers, self.scales.float(), self.zero_points), self.shape, self._how)

    def _packed(self, numbers: Tensor) -> Tensor:
        """With the zero in the middle taken off, if that is what all zeros are."""
        middle = 1 << (self._how.bits - 1) if self._how.symmetric else 0
        return pack(numbers.to(torch.int16) - middle, self._how)


def open_packed(
    source: Path, scheme: Scheme, tensors: Mapping[str, Stored], read: Callable[[Stored], Tensor]
) -> tuple[Quantisation, dict[str, Repacked]]:
    """The packed weights of a checkpoint, by the names that they have unpacked; their zeros are read, not more.

    Args:
        source: the checkpoint, for messages.
        scheme: of it.
        tensors: all that it holds, by name.
        read: gives one of them.

    Returns:
        How all of them are stored, symmetric if the zeros of all are in the middle, and the weights.

    Raises:
        MesaError: parts that are missing or do not fit each other, groups other than the config's, or inputs that are
            grouped out of order.
    """
    layout = scheme.layout
    names = [name.removesuffix(f".{layout.PARTS[0]}") for name in tensors if name.endswith(f".{layout.PARTS[0]}")]
    if not names:
        raise InputError(f"{source} says that it is quantised ({scheme.name}), but holds no {layout.PARTS[0]}")
    for name in tensors:
        layer, _, part = name.rpartition(".")
        if part in (*layout.PARTS, *layout.OPTIONAL) and layer not in names:
            raise InputError(f"{source} has {name} without {layer}.{layout.PARTS[0]}, which export cannot read")
    weights = {}
    for name in names:
        parts = {part: f"{name}.{part}" for part in (*layout.PARTS, *layout.OPTIONAL)}
        for part in layout.PARTS:
            if parts[part] not in tensors:
                raise InputError(f"{source} lacks {parts[part]}; is the download complete?")
        weight = layout(name, scheme, {k: tensors[full] for k, full in parts.items() if full in tensors}, read)
        _check_parts(source, weight)
        _check(source, weight, scheme)
        weights[f"{name}.weight"] = weight
    symmetric = all(bool((weight.zeros() == 1 << (scheme.bits - 1)).all()) for weight in weights.values())
    how = Quantisation(f"int{scheme.bits}", scheme.bits, scheme.group_size, symmetric)
    return how, {name: Repacked(weight, how) for name, weight in weights.items()}


def _check_parts(source: Path, weight: _Layout) -> None:
    """Refuses parts of another dtype or number of axes than the scheme writes."""
    for part, stored in weight.parts.items():
        dtype, axes = stored.dtype, 1 if part in weight.VECTORS else 2
        if part == weight.SCALES:
            fits, wanted = dtype is not None and dtype.is_floating_point, "floating point numbers"
        elif part in weight.VECTORS:
            fits, wanted = dtype in (torch.int32, torch.int64), "whole numbers"
        else:
            fits, wanted = dtype == torch.int32, "int32"
        if not fits or len(stored.shape) != axes or 0 in stored.shape:
            kind = f"{str(dtype).removeprefix('torch.')} {[*stored.shape]}"
            raise InputError(
                f"{source}: {weight.name}.{part} is {kind}; it must be {wanted} of {axes} ax{'e' if axes > 1 else 'i'}s"
            )
    if wrong := weight.contradiction():
        raise InputError(f"{source}: {weight.name}: {wrong}")


def _check(source: Path, weight: _Layout, scheme: Scheme) -> None:
    outputs, inputs = weight.shape
    if scheme.group_size is not None and inputs % scheme.group_size:
        raise InputError(
            f"{source}: groups of {scheme.group_size} do not divide the {inputs} inputs of {weight.name}, so that "
            "engines cannot take them; quantise again in other groups"
        )
    groups = inputs // (scheme.group_size or inputs)
    found = tuple(weight.scales().shape), tuple(weight.zeros().shape)
    if found != ((groups, outputs), (groups, outputs)):
        raise InputError(
            f"{source}: the scales and zeros of {weight.name} are {found[0]} and {found[1]} instead of "
            f"{(groups, outputs)}; all packed layers must have {scheme.bits} bits and the groups of the config"
        )
    index = weight.group_index()
    if index is not None and groups > 1 and bool((index >= 0).all()):
        in_order = torch.arange(inputs) // (inputs // groups)
        if not torch.equal(index.long(), in_order):
            raise InputError(
                f"{source} groups the inputs of {weight.name} out of order (act-order), which no engine takes; "
                "quantise again without it (desc_act=False)"
            )


__all__ = ["Repacked", "Scheme", "open_packed", "read_scheme"]
