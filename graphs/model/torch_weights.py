"""Which stored tensor is which parameter of a model: by name, where tied parameters and prefixes leave a choice.

A quantised parameter ``W`` is stored as ``W.quantised``, ``W.scales`` and, if it is asymmetric, ``W.zero_points``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from mesart.graphs.bundle.manifest import Manifest, Quantisation
from mesart.graphs.errors import BundleError
from mesart.graphs.model.torch_fp8 import round_inputs

QUANTISED, SCALES, ZERO_POINTS = ".quantised", ".scales", ".zero_points"
"""What follows a parameter's name in the names of its parts."""


@dataclass(frozen=True)
class Packed:
    """A quantised weight of a linear layer ``[out, in]``, as it is stored; of experts, ``[E, out, in]``, E of each."""

    numbers: Tensor
    """Of 8 bits: ``[in, out]``, int8 if symmetric, else uint8. Of 4 bits: uint8, flat, two in a byte, the first low."""
    scales: Tensor
    """``[in / group, out]``, or ``[out]`` without groups."""
    zero_points: Tensor | None
    """As the scales, packed as the numbers; ``None`` if symmetric."""


def dequantise(packed: Packed, shape: tuple[int, ...], how: Quantisation) -> Tensor:
    """The weight ``[out, in]`` or ``[E, out, in]`` that a quantised one stands for, in the dtype of its scales."""
    if len(shape) == 3:
        zeros = [None] * shape[0] if packed.zero_points is None else [*packed.zero_points]
        experts = map(Packed, packed.numbers, packed.scales, zeros)
        return torch.stack([dequantise(expert, shape[1:], how) for expert in experts])
    if how.scheme == "fp8":
        return (packed.numbers.float() * packed.scales.float()).t().to(packed.scales.dtype)
    outputs, inputs = shape
    groups = inputs // (how.group_size or inputs)
    blocks = _unpack(packed.numbers, inputs * outputs, how).view(groups, -1, outputs)
    if packed.zero_points is not None:
        blocks -= _unpack(packed.zero_points, groups * outputs, how).view(groups, 1, outputs)
    blocks *= packed.scales.float().view(groups, 1, outputs)
    return blocks.view(inputs, outputs).t().to(packed.scales.dtype)


def _unpack(stored: Tensor, count: int, how: Quantisation) -> Tensor:
    """float32, flat."""
    if how.bits == 8:
        return stored.reshape(-1).float()
    numbers = torch.stack((stored & 15, stored >> 4), -1).reshape(-1)[:count].float()
    return torch.where(numbers > 7, numbers - 16, numbers) if how.symmetric else numbers


def expert_weights(model: nn.Module) -> dict[str, bool]:
    """The weights of experts, by name, and whether they lie ``[E, in, out]`` instead of ``[E, out, in]``.

    Those that :mod:`mesart.graphs.model.experts` multiplies with, which transformers marks so.
    """
    found = {}
    for name, parameter in model.named_parameters():
        module: Any = model.get_submodule(name.rpartition(".")[0])
        if parameter.dim() == 3 and hasattr(module, "is_transposed"):
            found[name] = bool(module.is_transposed)
    return found


def match_weights(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str] | None:
    """The stored tensor of each parameter and persistent buffer.

    Args:
        model: the model; parameters that are tied count once, under the name that ``named_parameters`` gives them.
        shapes: of the stored tensors, by name.

    Returns:
        Names of stored tensors by names in the model. A buffer that is not stored is left out; ``None`` if a parameter
        is not stored, or in another shape.
    """
    names: dict[int, list[str]] = {id(p): [] for p in model.parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."  # a checkpoint of the model without its head has none
    found: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        aliases = [*names[id(parameter)], *(alias.removeprefix(prefix) for alias in names[id(parameter)])]
        match = next((alias for alias in aliases if alias in shapes), None)
        if match is None or tuple(shapes[match]) != tuple(parameter.shape):
            return None
        found[name] = match
    stored_buffers = set(model.state_dict()) & {name for name, _ in model.named_buffers()} & set(shapes)
    return found | {name: name for name in stored_buffers}


def fill_weights(model: nn.Module, bundle: Path, manifest: Manifest) -> None:
    """Copies a bundle's weights into its model, converting them to the model's dtype; quantised ones dequantised.

    A language head that is tied to the embeddings, and quantised for the product only, becomes a weight of its own.

    Raises:
        MesaError: a weight is missing, or of another shape.
    """
    opening: Any = safe_open
    files = [opening(bundle / name, framework="pt") for name in manifest.weight_files]
    where = {name: file for file in files for name in file.keys()}  # noqa: SIM118  (no mapping)
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name, file in where.items()}
    targets = dict(model.named_parameters()) | dict(model.named_buffers())
    quantised = _quantised(shapes)
    for name in quantised:
        if name in targets:
            shapes.setdefault(name, tuple(targets[name].shape))
    names = match_weights(model, shapes)
    if names is None:
        raise BundleError(
            f"{bundle} lacks weights of {type(model).__name__}, or has them in other shapes; export again"
        )

    def read(name: str) -> Tensor:
        tensor: Tensor = where[name].get_tensor(name)
        return tensor

    with torch.no_grad():
        for name, stored in names.items():
            if stored in where:
                targets[name].copy_(read(stored))
        if manifest.quantisation is not None:
            how = manifest.quantisation

            def dequantised(name: str, weight: Tensor) -> Tensor:
                zeros = read(name + ZERO_POINTS) if name + ZERO_POINTS in where else None
                packed = Packed(read(name + QUANTISED), read(name + SCALES), zeros)
                return dequantise(packed, tuple(weight.shape), how)

            if how.scheme == "fp8":
                round_inputs(model, quantised)
            replace_products(model, quantised, dequantised)


def _quantised(stored: Iterable[str]) -> list[str]:
    return [name.removesuffix(QUANTISED) for name in stored if name.endswith(QUANTISED)]


def read_quantised_names(bundle: Path) -> list[str]:
    """The parameters of which a bundle holds a quantised form."""
    opening: Any = safe_open
    return [
        name
        for file in Manifest.read(bundle).weight_files
        for name in _quantised(opening(bundle / file, framework="pt").keys())
    ]


def replace_products(model: nn.Module, names: list[str], make: Callable[[str, Tensor], Tensor]) -> None:
    """Gives linear layers and experts other weights, in place; tables of embeddings that are tied to them keep theirs.

    Args:
        model: the model.
        names: of parameters.
        make: the new weight, from the name and the old weight: ``[out, in]`` or ``[E, out, in]``.
    """
    experts = expert_weights(model)
    parameters = dict(model.named_parameters())
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name in names:
        weight = parameters[name]
        if id(weight) not in tables:
            matrices = weight.transpose(-1, -2) if experts.get(name) else weight
            matrices.copy_(make(name, matrices))
            continue
        untied = nn.Parameter(make(name, weight).to(weight.dtype), requires_grad=weight.requires_grad)
        for module in model.modules():
            if not isinstance(module, nn.Embedding) and getattr(module, "weight", None) is weight:
                module.weight = untied


__all__ = [
    "QUANTISED",
    "SCALES",
    "ZERO_POINTS",
    "Packed",
    "dequantise",
    "expert_weights",
    "fill_weights",
    "match_weights",
    "read_quantised_names",
    "replace_products",
]
