"""A bundle's graphs run by PyTorch: the model's own code with the bundle's weights, fed and read as any engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from mesart.graphs.bundle.manifest import Manifest
from mesart.graphs.bundle.names import (
    FROM_IDS,
    INPUT_IDS,
    KEY,
    KINDS,
    LOGITS,
    LOGITS_AT,
    NEW_MASK,
    PAST_MASK,
    PAST_POSITION_IDS,
    POSITION_IDS,
    QUERY_SCALE,
    ROTATED,
    TO_IDS,
    past_name,
    present_name,
)
from mesart.graphs.bundle.records import shown
from mesart.graphs.errors import BundleError, InputError
from mesart.graphs.model.phase_module import PhaseModule
from mesart.graphs.model.torch_weights import fill_weights
from mesart.graphs.model_config import read_config_file
from mesart.graphs.user_data import user_data

Feeds = Mapping[str, NDArray[Any]]
Run = Callable[[Feeds], dict[str, NDArray[Any]]]


def load_bundle_model(bundle: Path, manifest: Manifest, *, trust_remote_code: bool = False) -> nn.Module:
    """The transformers model of a bundle in the bundle's dtype; see :func:`load_plain_model`."""
    return load_plain_model(bundle, getattr(torch, manifest.dtype), manifest, trust_remote_code=trust_remote_code)


def load_plain_model(
    bundle: Path,
    dtype: torch.dtype,
    manifest: Manifest | None = None,
    *,
    trust_remote_code: bool = False,
    **options: Any,
) -> nn.Module:
    """The transformers model of a bundle in any dtype.

    Args:
        bundle: the bundle, verified.
        dtype: of the weights.
        manifest: the bundle's, if it was read already.
        trust_remote_code: run the Python code that the bundle brings, if it does.
        options: of ``from_config``, as the attention to use.

    Raises:
        MesaError: the config or the weights are damaged, or not of this model, or code is needed and not trusted.
    """
    manifest = manifest or Manifest.read(bundle)
    config = _load_config(bundle, manifest, trust_remote_code=trust_remote_code)
    auto: Any = AutoModelForCausalLM
    with user_data(f"{bundle}: its config.json makes no model in PyTorch", "export the model again"):
        with no_init_weights():  # random numbers for weights that are filled right away
            model: Any = auto.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code, **options).eval()
        model.tie_weights()
    with user_data(f"{bundle}: its weights cannot be read", "export the model again"):
        fill_weights(model, bundle, manifest)
    plain: nn.Module = model
    return plain


def _load_config(bundle: Path, manifest: Manifest, *, trust_remote_code: bool) -> Any:
    """The bundle's config; its code runs only if it is trusted, and is part of the bundle."""
    fields = read_config_file(bundle / "config.json")
    if fields.get("auto_map") and trust_remote_code:
        _require_own_code(bundle, manifest, fields["auto_map"])
    if fields.get("auto_map") and not trust_remote_code and fields.get("model_type") not in CONFIG_MAPPING:
        raise InputError(
            f"{bundle} brings Python code of its own, which PyTorch needs and no other backend; read it, and pass "
            "--trust-remote-code to run it"
        )
    with user_data(f"{bundle}: its config.json is none that transformers can read", "export the model again"):
        # Never left out: transformers would ask on standard input, where an answer may wait.
        config: Any = AutoConfig.from_pretrained(bundle, trust_remote_code=trust_remote_code)
        text = config.get_text_config()
        found = text.num_hidden_layers, text.vocab_size
    if found != (len(manifest.layers), manifest.model["vocab_size"]):
        raise BundleError(
            f"{bundle}: config.json has {found[0]} layers and a vocabulary of {found[1]}, the manifest "
            f"{len(manifest.layers)} and {manifest.model['vocab_size']}; export the model again"
        )
    return config


def _require_own_code(bundle: Path, manifest: Manifest, auto_map: Any) -> None:
    """All Python code that could run is among the bundle's files, which were verified.

    The config names the code; what that imports in turn is found beside it, or in another repository.
    """
    for name in auto_map.values() if isinstance(auto_map, dict) else ():
        if "--" in str(name):
            raise BundleError(f"{bundle}: config.json names code of another repository, {shown(name)}; export again")
    for path in bundle.rglob("*.py"):
        name = path.relative_to(bundle).as_posix()
        if name not in manifest.files:
            raise BundleError(f"{bundle}: {name} is none of the bundle's files, and could run; remove it")


def open_torch(path: Path, opened: dict[str, tuple[PhaseModule, Manifest]], *, trust_remote_code: bool = False) -> Run:
    """The function of a bundle's ONNX file, computed by PyTorch.

    Args:
        path: a graph's file in its bundle.
        opened: modules by bundle, so that all graphs of one bundle share their weights.
        trust_remote_code: run the Python code that the bundle brings, if it does.
    """
    bundle = path.parent
    if str(bundle) not in opened:
        manifest = Manifest.read(bundle)
        plain = load_bundle_model(bundle, manifest, trust_remote_code=trust_remote_code)
        opened[str(bundle)] = _phase_module(bundle, plain, manifest), manifest
    module, manifest = opened[str(bundle)]
    kind = next(graph.kind for graph in manifest.graphs if graph.file == path.name)
    if kind == "rerotate":
        index = next(i for i, layer in enumerate(manifest.layers) if layer.rerotate == path.name)
        rerotation = module.rerotation(module.layers[index])

        def run_rerotation(feeds: Feeds) -> dict[str, NDArray[Any]]:
            ids = (torch.from_numpy(np.ascontiguousarray(feeds[name])) for name in (FROM_IDS, TO_IDS))
            with torch.no_grad():
                return {ROTATED: _to_numpy(rerotation(_to_torch(feeds[KEY], manifest.dtype), *ids))}

        return run_rerotation

    count = range(len(module.layers))

    def run(feeds: Feeds) -> dict[str, NDArray[Any]]:
        plain = [INPUT_IDS, POSITION_IDS, PAST_MASK, NEW_MASK, QUERY_SCALE, LOGITS_AT]
        plain += [PAST_POSITION_IDS] * manifest.looks_at_positions
        arguments = {name: torch.from_numpy(np.ascontiguousarray(feeds[name])) for name in plain}
        past = {kind: [_to_torch(feeds[past_name(i, kind)], manifest.dtype) for i in count] for kind in KINDS}
        with torch.no_grad():
            output = module(**arguments, past_keys=past["key"], past_values=past["value"])
        results = {LOGITS: _to_numpy(output.logits)}
        for i in count:
            results[present_name(i, "key")] = _to_numpy(output.keys[i])
            results[present_name(i, "value")] = _to_numpy(output.values[i])
        return results

    return run


def _phase_module(bundle: Path, model: nn.Module, manifest: Manifest) -> PhaseModule:
    with user_data(f"{bundle}: its config.json makes another model than was exported", "export the model again"):
        module = PhaseModule(model, manifest.config)
    found = [(spec.kv_heads, spec.key_size, spec.value_size) for spec in module.layers]
    if found != [(layer.kv_heads, layer.key_size, layer.value_size) for layer in manifest.layers]:
        raise BundleError(f"{bundle}: config.json has other layers than the manifest; export the model again")
    return module


def _to_torch(array: NDArray[Any], dtype: str) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


def _to_numpy(tensor: Tensor) -> NDArray[Any]:
    tensor = tensor.contiguous()
    array: NDArray[Any] = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array
