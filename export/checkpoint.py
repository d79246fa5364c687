"""Reads a transformers checkpoint, with one clear error for each way in which it can be unusable."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mesart.export.quantised_checkpoint import read_scheme
from mesart.export.safetensors_file import read_header
from mesart.graphs.errors import MesaError, first_line
from mesart.graphs.manifest import DTYPES

_HUB_FILES = ("*.safetensors", "*.json", "pytorch_model*.bin", "*.model", "*.txt", "*.jinja")

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")
"""A checkpoint that has one of these has a tokenizer."""


def check_checkpoint(checkpoint: str | os.PathLike[str], *, trust_remote_code: bool = False) -> Any:
    """The config of a checkpoint that looks usable: checked without reading its weights, which may be quantised.

    Args:
        checkpoint: a folder or hub id.
        trust_remote_code: run the Python code that the checkpoint brings, if it does.

    Raises:
        MesaError: no checkpoint, no causal language model, code that is not trusted, no weights, a truncated file, or
            weights that are quantised in a way that export cannot read.
    """
    source = os.fspath(checkpoint)
    config = load_config(source, trust_remote_code=trust_remote_code)
    read_scheme(source, config)
    if Path(source).is_dir():
        weight_files(Path(source))
    return config


def load_model(checkpoint: str | os.PathLike[str], dtype: str, config: Any = None) -> nn.Module:
    """A causal language model with its weights in ``dtype``, in eval mode; ``config`` if it was checked already.

    Raises:
        MesaError: no checkpoint, no causal language model, no safetensors, quantised, truncated or missing weights.
    """
    if dtype not in DTYPES:
        raise MesaError(f"unknown dtype {dtype!r}; there are {', '.join(DTYPES)}")
    source = os.fspath(checkpoint)
    config = config or check_checkpoint(checkpoint)
    scheme = read_scheme(source, config)
    if scheme is not None:
        raise MesaError(f"{source} is quantised ({scheme.name}); export it, and use the bundle")
    loaded: Any
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=getattr(torch, dtype),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise MesaError(f"{source} cannot be loaded: {first_line(error)}") from error
    model, report = loaded
    for kind, what in (("missing_keys", "lacks"), ("mismatched_keys", "has the wrong shape for")):
        names = sorted(map(str, report.get(kind) or ()))
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise MesaError(f"{source} {what} the weight {names[0]}{more}; is it complete, and of this config?")
    network: nn.Module = model.eval()
    return network


def load_config(source: str, *, trust_remote_code: bool = False) -> Any:
    """The model's config; a causal language model's."""
    path = Path(source)
    if path.exists() and not (path / "config.json").is_file():
        raise MesaError(f"{source} holds no config.json; give the folder of a transformers checkpoint")
    if not path.exists() and source.count("/") != 1:
        raise MesaError(f"{source} does not exist; give the folder of a transformers checkpoint or a hub id")
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        if "trust_remote_code" in str(error):
            raise MesaError(
                f"{source} brings Python code of its own; read it, and pass --trust-remote-code to run it"
            ) from error
        raise MesaError(f"{source} has no readable model config: {first_line(error)}") from error
    own = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}) and trust_remote_code
    if (config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not own) or config.is_encoder_decoder:
        raise MesaError(f"{source} is no causal language model (model_type {config.model_type!r})")
    return config


def local_folder(source: str | os.PathLike[str]) -> Path:
    """The folder of a checkpoint; a hub id is downloaded, or found in the hub's cache.

    Raises:
        MesaError: the hub does not have it, or cannot be reached.
    """
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(os.fspath(source), allow_patterns=list(_HUB_FILES)))
    except (OSError, ValueError) as error:
        raise MesaError(f"{source} cannot be downloaded: {first_line(error)}") from error


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a checkpoint's weights, safetensors before pickles; checked without reading their tensors.

    Raises:
        MesaError: there are none, one is missing or truncated, or the index is broken.
    """
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index, single = folder / f"{stem}.{suffix}.index.json", folder / f"{stem}.{suffix}"
        if index.is_file():
            files = [folder / name for name in _index(index)]
            break
        if single.is_file():
            files = [single]
            break
    else:
        raise MesaError(f"{folder} has no model.safetensors and no pytorch_model.bin")
    for file in files:
        if not file.is_file():
            raise MesaError(f"{folder} has no {file.name}, which {index.name} names; is the download complete?")
        if file.suffix == ".safetensors":
            read_header(file)
    return files


def _index(path: Path) -> list[str]:
    try:
        return sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MesaError(f"{path} is not a valid index of weights: {error}") from error
