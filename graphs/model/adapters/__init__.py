"""Models that do not use transformers' attention interface, or not as ONNX can say it: an adapter for each.

An adapter is a module of this folder named after the model type. Its ``install(model, train_length)`` changes the given
model only (which is the phase module's own copy) and returns the table of its rotary embeddings, without entries if it
has none (ALiBi).
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from mesart.graphs.errors import InputError
from mesart.graphs.model.attention import ATTENTION
from mesart.graphs.model.experts import EXPERTS
from mesart.graphs.model.rotary import RotaryTable, install_rotary_table

ADAPTED = ("bloom", "codegen", "deepseek_v2", "falcon", "gpt_neox_japanese", "gptj", "mpt")


def prepare(model: Any, train_length: int, extent: int) -> RotaryTable:
    """Makes all layers of a model call Mesa attention, with positions from a table; changes the model in place.

    The table has ``train_length`` rows, and more if it has a part for short texts; ``extent`` is how many the longest
    part will have.

    Raises:
        MesaError: the model has no rotary embedding that is known here, nor ALiBi.
    """
    kind = model.config.model_type
    if model._is_stateful:
        raise InputError(
            f"{type(model).__name__} has layers with a recurrent state; keys and values are all that is kept"
        )
    chunk = getattr(model.config, "attention_chunk_size", None)
    if chunk is not None and chunk < extent:
        more = "train_length" if extent == train_length else "max_tokens, by another method than Mesa,"
        raise InputError(
            f"{type(model).__name__} attends within pieces of {chunk} tokens, less than {more} = {extent}; "
            f"export with train_length <= {chunk}"
        )
    # A layer that an adapter replaces does not look at the mask that its model makes.
    model.set_attn_implementation("eager" if kind in ADAPTED else ATTENTION)
    model.set_experts_implementation(EXPERTS)
    if kind not in ADAPTED:
        return install_rotary_table(model, train_length)
    table: RotaryTable = importlib.import_module(f"{__name__}.{kind}").install(model, train_length)
    return table


def become(model: nn.Module, old: type[nn.Module], new: type[nn.Module], **attributes: Any) -> None:
    """Gives the layers of class ``old`` the code of its subclass ``new``, and attributes that it needs.

    Their weights stay where they are, under their names.
    """
    for module in model.modules():
        if type(module) is old:
            module.__class__ = new
            for name, value in attributes.items():
                setattr(module, name, value)


__all__ = ["ADAPTED", "become", "prepare"]
