"""The sizes in a model's config, checked before anything is built of them: with a wrong one that takes for ever."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from mesart.export.safetensors_file import Stored
from mesart.graphs.checks import check_whole
from mesart.graphs.errors import InputError

_MOST_LAYERS: Final = 10_000

_SIZES: Final = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), (1, _MOST_LAYERS)),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "vocab_size"), (1, 1 << 28)),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), (1, 1 << 16)),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), (0, 1 << 16)),
    **dict.fromkeys(("num_local_experts", "n_routed_experts", "num_experts"), (0, 1 << 16)),
    "sliding_window": (-1, 1 << 40),
    "num_labels": (0, 1 << 20),  # transformers names each
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "n_inner", "head_dim"), (0, 1 << 28)),
}
"""The least and the most that a field may be."""

_LAYER: Final = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d{1,9})\.")


def check_sizes(source: object, fields: Mapping[str, Any]) -> None:
    """Refuses sizes that no model has.

    Args:
        source: the file, for messages.
        fields: of its config.json; those of a ``text_config`` are checked too.

    Raises:
        MesaError: names the field.
    """
    for part in (fields, fields.get("text_config")):
        if not isinstance(part, Mapping):
            continue
        for name, (least, most) in _SIZES.items():
            value = part.get(name)
            if value is not None and not isinstance(value, list):  # a list: of each layer
                check_whole(f"{source}: {name}", value, least, most)
        for name, value in part.items():
            if "layers" in name and type(value) is int:  # other parts that are built in a loop
                check_whole(f"{source}: {name:.80}", value, least=-_MOST_LAYERS, most=_MOST_LAYERS)


def check_sizes_against(source: object, config: Any, tensors: Mapping[str, Stored]) -> None:
    """Refuses a config that says far more than the weights hold, before memory and time are spent on building that.

    Args:
        source: the checkpoint, for messages.
        config: transformers' object.
        tensors: what the checkpoint holds, by name.

    Raises:
        MesaError: names the field.
    """
    text = config.get_text_config()
    layers = [int(found[1]) + 1 for name in tensors if (found := _LAYER.search(name))]
    stored = max(layers) if layers else len(tensors)  # a layer has a tensor at least
    asked = getattr(text, "num_hidden_layers", None)
    if isinstance(asked, int) and asked > stored:
        raise InputError(
            f"{source}: num_hidden_layers is {asked}, but the weights have {stored}; is it of this config?"
        )
    longest = max((max(tensor.shape, default=0) for tensor in tensors.values()), default=0)
    for name in ("vocab_size", "hidden_size"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > longest:
            raise InputError(
                f"{source}: {name} is {value}, but the longest axis of a weight is {longest}; is it of this config?"
            )


__all__ = ["check_sizes", "check_sizes_against"]
