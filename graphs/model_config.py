"""What is asked of a model's config.json: read as the user's data, and the length that the model was trained on."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias

from mesart.graphs.checks import MOST_POSITIONS
from mesart.graphs.errors import InputError
from mesart.graphs.json_file import described, read_object
from mesart.graphs.user_data import user_data

CONFIG_BYTES: Final = 16 << 20
"""A config.json beyond that is none; the largest that are known have 100 kB."""


class HasConfig(Protocol):
    """What :meth:`MesaConfig.from_model` needs of a transformers model."""

    config: Any


ModelSource: TypeAlias = "str | PathLike[str] | HasConfig"


def read_config_file(path: Path) -> dict[str, Any]:
    """The fields of a model's config.json.

    Raises:
        MesaError: it is no JSON object of reasonable size and depth, holds a number that is not finite, or names no
            kind of model.
    """
    fields = read_object(path, CONFIG_BYTES, finite=True)
    kind = fields.get("model_type", "")
    if not isinstance(kind, str):
        raise InputError(f"{path}: model_type is {described(kind)}; it must be a string")
    return fields


def _config_fields(checkpoint: ModelSource) -> dict[str, Any]:
    if not isinstance(checkpoint, (str, PathLike)):
        fields: dict[str, Any] = checkpoint.config.to_dict()
        return fields
    path = Path(checkpoint) / "config.json"
    if path.is_file():
        return read_config_file(path)
    if Path(checkpoint).exists():
        raise InputError(f"{checkpoint} holds no config.json; give a transformers checkpoint folder")
    from transformers.utils.hub import cached_file  # noqa: PLC0415  (only a hub id needs it; this module stays light)

    # The file alone: making transformers' object of it could run Python code that the repository brings.
    with user_data(f"{checkpoint} is neither a checkpoint folder nor a hub id that loads"):
        found = cached_file(str(checkpoint), "config.json")
    return read_config_file(Path(str(found)))


def trained_length(checkpoint: ModelSource) -> int:
    """T_r, the positions that a model was trained on, as its config says.

    Raises:
        MesaError: there is no config, or it says no length that can be.
    """
    fields = _config_fields(checkpoint)
    text = fields.get("text_config")
    if text is not None and not isinstance(text, dict):
        raise InputError(f"the model's config: text_config is {described(text)}; it must be an object")
    fields = text or fields
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = fields.get(name)
        if value is None:
            continue
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if isinstance(value, bool) or not whole or not 16 <= value <= MOST_POSITIONS:
            raise InputError(
                f"the model's config: {name} is {described(value)}; it must be a whole number from 16 to "
                f"{MOST_POSITIONS}. If the model is sound, pass train_length (--train-length)"
            )
        return int(value)
    raise InputError("the model's config names no trained length (max_position_embeddings); pass train_length")


__all__ = ["CONFIG_BYTES", "HasConfig", "ModelSource", "read_config_file", "trained_length"]
