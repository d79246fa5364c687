"""Reads a transformers checkpoint, with one clear error for each way in which it can be unusable."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.hub import cached_file

from mesart.export.checkpoint_weights import index_entries, open_weights
from mesart.export.model_sizes import check_sizes
from mesart.export.quantised_checkpoint import read_scheme
from mesart.graphs.bundle.manifest import DTYPES
from mesart.graphs.errors import InputError
from mesart.graphs.json_file import described
from mesart.graphs.model_config import read_config_file
from mesart.graphs.user_data import user_data

_HUB_TEXTS: Final = (
    *("config.json", "generation_config.json", "adapter_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tekken.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
)
_HUB_WEIGHTS: Final = (
    ("model.safetensors", "model.safetensors.index.json", "model-*.safetensors"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin"),
)
"""The file, else the index, and names of shards; the first row that a repository has."""

_HUB_FILES: Final = (*_HUB_TEXTS, *(name for row in _HUB_WEIGHTS for name in row))
"""What may be wanted of a repository whose files cannot be listed, because it is only in the cache."""

_RUNNING: Final = (
    *("_attn_implementation", "attn_implementation", "_attn_implementation_internal", "_flash_attn_2_enabled"),
    *("_experts_implementation", "experts_implementation", "_experts_implementation_internal"),
    *("output_attentions", "output_hidden_states", "return_dict", "use_return_dict", "torchscript", "device_map"),
)
"""Fields of a config that say how somebody ran the model, not what it computes. transformers obeys some of them: it
wants a package that is not there, or fetches a kernel from the hub."""


def check_checkpoint(checkpoint: str | os.PathLike[str], *, trust_remote_code: bool = False) -> Any:
    """The config of a checkpoint that looks usable; its weights, which may be quantised, are not looked at.

    Args:
        checkpoint: a folder or hub id.
        trust_remote_code: run the Python code that the checkpoint brings, if it does.

    Raises:
        MesaError: no checkpoint, no causal language model, code that is not trusted, an adapter, or weights that are
            quantised in a way that export cannot read.
    """
    source = os.fspath(checkpoint)
    config = load_config(source, trust_remote_code=trust_remote_code)
    read_scheme(source, config)
    return config


def load_model(
    checkpoint: str | os.PathLike[str], dtype: str, config: Any = None, *, trust_remote_code: bool = False
) -> nn.Module:
    """A causal language model with its weights in ``dtype``, in eval mode; ``config`` if it was checked already.

    Raises:
        MesaError: no checkpoint, no causal language model, no safetensors, quantised, truncated or missing weights.
    """
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}; there are {', '.join(DTYPES)}")
    source = os.fspath(checkpoint)
    if config is None:
        config = check_checkpoint(checkpoint, trust_remote_code=trust_remote_code)
        if Path(source).is_dir():
            open_weights(Path(source), config)
    scheme = read_scheme(source, config)
    if scheme is not None:
        raise InputError(f"{source} is quantised ({scheme.name}); export it, and use the bundle")
    loaded: Any
    with user_data(f"{source} cannot be loaded"):
        loaded = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=getattr(torch, dtype),
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
        )
    model, report = loaded
    missing = sorted(map(str, report.get("missing_keys") or ()))
    if missing:
        raise InputError(f"{source} lacks the weight {_first(missing)}; is it complete, and of this config?")
    mismatched = sorted(report.get("mismatched_keys") or (), key=str)
    if mismatched:
        name, *shapes = mismatched[0] if isinstance(mismatched[0], tuple) else (mismatched[0],)
        as_what = " instead of ".join(str([*shape]) for shape in shapes)
        raise InputError(
            f"{source} has the wrong shape for the weight {_first([name, *mismatched[1:]])}"
            f"{f': {as_what}' if as_what else ''}; is it complete, and of this config?"
        )
    note_untied(model)
    network: nn.Module = model.eval()
    return network


def _first(names: list[str]) -> str:
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]


def note_untied(model: Any) -> None:
    """Lets the config say that the language head has weights of its own, where transformers found that it has.

    A checkpoint may hold both tables although its config ties them: then they are only tied if they are equal.
    """
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and getattr(head, "weight", None) is not getattr(table, "weight", None):
        for config in (model.config, model.config.get_text_config()):
            if getattr(config, "tie_word_embeddings", False):
                config.tie_word_embeddings = False


def load_config(source: str, *, trust_remote_code: bool = False) -> Any:
    """The model's config; a causal language model's.

    Raises:
        MesaError: see :func:`check_checkpoint`.
    """
    path = Path(source)
    if path.exists():
        refuse_adapter(path)
        if not (path / "config.json").is_file():
            raise InputError(f"{source} holds no config.json; give the folder of a transformers checkpoint")
    elif source.count("/") != 1:
        raise InputError(f"{source} does not exist; give the folder of a transformers checkpoint or a hub id")
    file = path / "config.json"
    if not path.exists():
        with user_data(f"{source} has no readable model config"):
            file = Path(str(cached_file(source, "config.json")))
    fields = read_config_file(file)
    named = f"{source}/config.json"
    check_sizes(named, fields)
    quantised = fields.get("quantization_config")
    if quantised is not None and not isinstance(quantised, dict):
        raise InputError(f"{named}: quantization_config is {described(quantised)}; it must be an object")
    if fields.get("auto_map") and not trust_remote_code and fields.get("model_type") not in CONFIG_MAPPING:
        raise InputError(f"{source} brings Python code of its own; read it, and pass --trust-remote-code to run it")
    with user_data(f"{named} is no model config that transformers can read"):
        with _without_running_settings(source, fields) as cleaned:
            config: Any = AutoConfig.from_pretrained(cleaned, trust_remote_code=trust_remote_code)
        config.name_or_path = source
        config._attn_implementation = None
        own = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}) and trust_remote_code
        causal = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        text = config.get_text_config()
    if not isinstance(text, PreTrainedConfig):
        raise InputError(f"{named}: text_config is {described(text)}, which model_type {config.model_type!r} has not")
    if (not causal and not own) or config.is_encoder_decoder:
        raise InputError(f"{source} is no causal language model (model_type {config.model_type!r})")
    return config


@contextmanager
def _without_running_settings(source: str, fields: dict[str, Any]) -> Iterator[str]:
    """The checkpoint, or a folder with its config.json where that holds settings that are to be ignored.

    Code that a checkpoint brings is looked for beside its config.json, so that one stays as it is.
    """
    cleaned = _cleaned(fields)
    if cleaned == fields or fields.get("auto_map"):
        yield source
        return
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(cleaned), encoding="utf-8")
        yield folder


def _cleaned(fields: dict[str, Any]) -> dict[str, Any]:
    cleaned = {name: value for name, value in fields.items() if name not in _RUNNING}
    for name in ("dtype", "torch_dtype"):
        if name in cleaned:
            dtype = str(cleaned[name]).removeprefix("torch.")
            if isinstance(getattr(torch, dtype, None), torch.dtype):
                cleaned[name] = dtype
            else:  # "auto", a dtype each part, ...; an export is told its dtype
                del cleaned[name]
    for name, value in cleaned.items():
        if isinstance(value, dict) and name.endswith("_config") and name != "quantization_config":
            cleaned[name] = _cleaned(value)
    if cleaned.get("quantization_config", "") is None:
        del cleaned["quantization_config"]
    return cleaned


def refuse_adapter(folder: Path) -> None:
    """Refuses weights that an adapter beside them changes; transformers applies it if peft is installed.

    Raises:
        MesaError: there is one.
    """
    for name in ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"):
        if (folder / name).exists():
            raise InputError(
                f"{folder} holds an adapter ({name}), which export cannot apply; merge it into the model first (peft: "
                "model.merge_and_unload().save_pretrained(folder)), or take its files away"
            )


def local_folder(source: str | os.PathLike[str]) -> Path:
    """The folder of a checkpoint; a hub id is downloaded, each weight once, or found in the hub's cache.

    Raises:
        MesaError: the hub does not have it, or cannot be reached.
    """
    if Path(source).is_dir():
        return Path(source)
    name = os.fspath(source)
    with user_data(f"{name} cannot be downloaded"):
        revision, wanted = _wanted(name)
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    refuse_adapter(folder)
    return folder


def _wanted(name: str) -> tuple[str | None, list[str]]:
    """The revision of a repository and the files that are needed of it."""
    try:
        info = HfApi().model_info(name)
        files = {file.rfilename for file in info.siblings or ()}
    except Exception:  # noqa: BLE001  (no network or none wanted, in the client's many words: the cache is asked then)
        return None, list(_HUB_FILES)
    for single, index, _ in _HUB_WEIGHTS:
        if single in files:
            weights = [single]
            break
        if index in files:
            path = Path(hf_hub_download(name, index, revision=info.sha))
            weights = [index, *sorted(set(index_entries(path, path.parent).values()))]
            break
    else:
        weights = []  # which is said when they are opened
    return info.sha, [*_HUB_TEXTS, *map(glob.escape, weights)]


__all__ = ["check_checkpoint", "load_config", "load_model", "local_folder", "note_untied"]
