"""Which stored tensor is which parameter of a model: by name, where tied parameters and prefixes leave a choice."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from mesart.graphs.errors import MesaError
from mesart.graphs.manifest import Manifest


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
    """Copies a bundle's weights into its model, converting them to the model's dtype.

    Raises:
        MesaError: a weight is missing, or of another shape.
    """
    opening: Any = safe_open
    files = [opening(bundle / name, framework="pt") for name in manifest.weight_files]
    where = {name: file for file in files for name in file.keys()}  # noqa: SIM118  (no mapping)
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name, file in where.items()}
    names = match_weights(model, shapes)
    if names is None:
        raise MesaError(f"{bundle} lacks weights of {type(model).__name__}, or has them in other shapes; export again")
    targets = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name, stored in names.items():
            targets[name].copy_(where[stored].get_tensor(stored))


__all__ = ["fill_weights", "match_weights"]
