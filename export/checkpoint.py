"""Reads a transformers checkpoint, with one clear error for each way in which it can be unusable."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mesart.graphs.errors import MesaError, first_line
from mesart.graphs.manifest import DTYPES

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")
"""A checkpoint that has one of these has a tokenizer."""


def check_checkpoint(checkpoint: str | os.PathLike[str]) -> Any:
    """The config of a checkpoint that looks usable: checked without reading its weights.

    Raises:
        MesaError: no checkpoint, no causal language model, no safetensors, or a truncated file.
    """
    source = os.fspath(checkpoint)
    config = load_config(source)
    if Path(source).is_dir():
        check_weights(Path(source))
    return config


def load_model(checkpoint: str | os.PathLike[str], dtype: str, config: Any = None) -> nn.Module:
    """A causal language model with its weights in ``dtype``, in eval mode; ``config`` if it was checked already.

    Raises:
        MesaError: no checkpoint, no causal language model, no safetensors, or truncated or missing weights.
    """
    if dtype not in DTYPES:
        raise MesaError(f"unknown dtype {dtype!r}; there are {', '.join(DTYPES)}")
    source = os.fspath(checkpoint)
    config = config or check_checkpoint(checkpoint)
    loaded: Any
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
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


def load_config(source: str) -> Any:
    """The model's config; a causal language model's."""
    path = Path(source)
    if path.exists() and not (path / "config.json").is_file():
        raise MesaError(f"{source} holds no config.json; give the folder of a transformers checkpoint")
    if not path.exists() and source.count("/") != 1:
        raise MesaError(f"{source} does not exist; give the folder of a transformers checkpoint or a hub id")
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise MesaError(f"{source} has no readable model config: {first_line(error)}") from error
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or config.is_encoder_decoder:
        raise MesaError(f"{source} is no causal language model (model_type {config.model_type!r})")
    return config


def check_weights(folder: Path) -> None:
    """Checks that all safetensors files of a checkpoint are there and whole, without reading their tensors."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise MesaError(f"{index} is not a valid index of weights: {error}") from error
        files = [folder / name for name in names]
    else:
        files = [folder / "model.safetensors"]
    for file in files:
        if not file.is_file():
            others = sorted(p.name for p in folder.glob("*.bin"))
            hint = f"; it has {others[0]}, save it with save_pretrained to get safetensors" if others else ""
            raise MesaError(f"{folder} has no {file.name}{hint}")
        try:
            with safe_open(file, framework="pt") as tensors:
                tensors.keys()
        except (SafetensorError, OSError) as error:
            raise MesaError(f"{file} is truncated or no safetensors file: {first_line(error)}") from error


def tensor_offsets(file: Path) -> dict[str, tuple[int, int]]:
    """Where each tensor of a safetensors file lies: offset and length in bytes."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header: dict[str, Any] = json.loads(stream.read(length))
    return {
        name: (8 + length + info["data_offsets"][0], info["data_offsets"][1] - info["data_offsets"][0])
        for name, info in header.items()
        if name != "__metadata__"
    }
