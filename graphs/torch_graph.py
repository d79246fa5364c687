"""A bundle's graphs run by PyTorch: the model's own code with the bundle's weights, fed and read as any engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from mesart.graphs.manifest import Manifest
from mesart.graphs.role import RoleModule
from mesart.graphs.torch_weights import fill_weights

Feeds = Mapping[str, NDArray[Any]]
Run = Callable[[Feeds], dict[str, NDArray[Any]]]


def load_bundle_model(bundle: Path, manifest: Manifest) -> nn.Module:
    """The transformers model of a bundle, with the bundle's weights in the bundle's dtype."""
    return load_plain_model(bundle, getattr(torch, manifest.dtype))


def load_plain_model(bundle: Path, dtype: torch.dtype, **options: Any) -> nn.Module:
    """The transformers model of a bundle in any dtype; ``options`` go to ``from_config``, as the attention to use."""
    config = AutoConfig.from_pretrained(bundle)
    auto: Any = AutoModelForCausalLM
    with no_init_weights():  # random numbers for weights that are filled right away
        model: Any = auto.from_config(config, dtype=dtype, **options).eval()
    model.tie_weights()
    fill_weights(model, bundle, Manifest.read(bundle))
    plain: nn.Module = model
    return plain


def open_torch(path: Path, opened: dict[str, RoleModule]) -> Run:
    """The function of a bundle's ONNX file, computed by PyTorch.

    Args:
        path: a graph's file in its bundle.
        opened: modules by bundle, so that all graphs of one bundle share their weights.
    """
    bundle, manifest = path.parent, Manifest.read(path.parent)
    if str(bundle) not in opened:
        opened[str(bundle)] = RoleModule(load_bundle_model(bundle, manifest), manifest.config)
    module = opened[str(bundle)]
    role = next(graph.role for graph in manifest.graphs if graph.file == path.name)
    if role == "place":
        index = next(i for i, layer in enumerate(manifest.layers) if layer.place == path.name)
        place = module.place(module.layers[index])

        def run_place(feeds: Feeds) -> dict[str, NDArray[Any]]:
            ids = (torch.from_numpy(np.ascontiguousarray(feeds[name])) for name in ("from_ids", "to_ids"))
            with torch.no_grad():
                return {"moved": _to_numpy(place(_to_torch(feeds["key"], manifest.dtype), *ids))}

        return run_place

    count = range(len(module.layers))

    def run(feeds: Feeds) -> dict[str, NDArray[Any]]:
        plain = ["input_ids", "position_ids", "past_mask", "new_mask", "query_scale", "logits_at"]
        plain += ["past_position_ids"] * manifest.looks_at_positions
        arguments = {name: torch.from_numpy(np.ascontiguousarray(feeds[name])) for name in plain}
        past = {
            kind: [_to_torch(feeds[f"past_key_values.{i}.{kind}"], manifest.dtype) for i in count]
            for kind in ("key", "value")
        }
        with torch.no_grad():
            output = module(**arguments, past_keys=past["key"], past_values=past["value"])
        results = {"logits": _to_numpy(output.logits)}
        for i in count:
            results[f"present.{i}.key"] = _to_numpy(output.keys[i])
            results[f"present.{i}.value"] = _to_numpy(output.values[i])
        return results

    return run


def _to_torch(array: NDArray[Any], dtype: str) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


def _to_numpy(tensor: Tensor) -> NDArray[Any]:
    tensor = tensor.contiguous()
    array: NDArray[Any] = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array
