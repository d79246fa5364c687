"""Rotary embeddings as data: tables of the trained positions, and how each layer applies them to its keys.

Swapping a model's rotary module for a table of ``train_length`` rows puts Stair PE into the graph as plain integers,
and removes what the module would decide from its data: a LongRoPE model rotates short texts by other frequencies than
long ones, so its table has a second part for them, and the plan says which part a text is in. A key rotated to
position p is re-rotated to position q by a further rotation by q - p (:class:`Rerotation`), for which the layout of
the rotary dimensions has to be known: it is found by probing the model's own attention layer, not by a list of
families.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from mesart.graphs.errors import InputError
from mesart.graphs.model.attention import AttentionInputs, attention_inputs

SharedKeys: TypeAlias = "dict[Any, tuple[Tensor, Tensor]]"
CosSin: TypeAlias = "dict[str | None, tuple[Tensor, Tensor]]"
"""cos and sin by layer type, ``[S, R]`` each."""

Layout = Literal["half", "interleaved"]
"""``half``: dimension d rotates with d + R/2; ``interleaved``: 2d rotates with 2d + 1."""


class RotaryTable(nn.Module):
    """Takes the place of a model's rotary module: looks cos and sin up.

    Args:
        tables: by layer type, float32 ``[train_length + short_length, R]`` each.
        short_length: see :class:`~mesart.graphs.method.config.MesaConfig`; the last rows are those of short texts.
    """

    def __init__(self, tables: CosSin, short_length: int = 0) -> None:
        super().__init__()
        self.short_length = short_length
        self.names = list(tables)
        self.values = tables  # with numbers, even where the buffers lie on the meta device
        for index, (cos, sin) in enumerate(tables.values()):
            self.register_buffer(f"cos_{index}", cos, persistent=False)
            self.register_buffer(f"sin_{index}", sin, persistent=False)

    def replace(self, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        """Changes the numbers of each table, cos and sin, in place."""
        for index, name in enumerate(self.names):
            cos, sin = self.values[name] = change(*self.values[name])
            self.register_buffer(f"cos_{index}", cos, persistent=False)
            self.register_buffer(f"sin_{index}", sin, persistent=False)

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor]:
        index = self.names.index(layer_type)
        cos, sin = self.get_buffer(f"cos_{index}"), self.get_buffer(f"sin_{index}")
        return nn.functional.embedding(position_ids, cos).to(x.dtype), nn.functional.embedding(position_ids, sin).to(
            x.dtype
        )


@dataclass(frozen=True)
class LayerSpec:
    """The keys and values of one layer, and how it rotates the keys."""

    kv_heads: int
    key_size: int
    value_size: int
    layout: Layout | None
    """``None``: the layer does not rotate its keys (NoPE, ALiBi)."""
    table: str | None
    """The layer type whose table it uses, where the model has several."""
    first: int = 0
    """The first dimension of a key that rotates."""
    rotary_dim: int = 0
    """R, the number of dimensions that rotate."""
    backwards: bool = False
    """Whether they rotate by the negative angle (nanochat)."""


def install_rotary_table(model: nn.Module, train_length: int) -> RotaryTable:
    """Replaces the model's rotary module by its table, in place; the table lies where the model's weights lie.

    Raises:
        MesaError: the model has no such module, or several, or one whose numbers change with every length of a text.
    """
    found = _rotary_modules(model)
    if len(found) != 1:
        raise InputError(
            f"{type(model).__name__} has {len(found) or 'no'} rotary embedding module{'s' * (len(found) > 1)}; exactly "
            "one that the whole model shares can be traced (RoPE models, and ALiBi models that are known; keys with "
            "learned positions cannot be moved)"
        )
    parent, name, rotary = found[0]
    table = rotary_table(functools.partial(_cos_sin, rotary), train_length, type(rotary).__name__)
    setattr(parent, name, table)
    return table


def rotary_table(cos_sin: Callable[[Tensor], CosSin], train_length: int, name: str) -> RotaryTable:
    """The table of a rotary module, with a second part if it rotates short texts by other frequencies.

    Args:
        cos_sin: what the module gives for the tokens of one text at some positions, int64 ``[S]``.
        train_length: T_r.
        name: of the module, for errors.

    Raises:
        MesaError: there are more than two sets of frequencies within ``train_length``.
    """
    short, tables = _short_length(cos_sin, train_length, name), cos_sin(torch.arange(train_length))
    if short:
        of_short = cos_sin(torch.arange(short))
        tables = {
            kind: (torch.cat((cos, of_short[kind][0])), torch.cat((sin, of_short[kind][1])))
            for kind, (cos, sin) in tables.items()
        }
    return RotaryTable(tables, short)


def short_length(model: nn.Module, train_length: int) -> int:
    """The longest text that a model rotates by short frequencies of its own; 0 if all up to T_r rotate alike."""
    found = _rotary_modules(model)
    if len(found) != 1:
        return 0  # no rotary model, or none that could be traced
    rotary = found[0][2]
    return _short_length(functools.partial(_cos_sin, rotary), train_length, type(rotary).__name__)


def _short_length(cos_sin: Callable[[Tensor], CosSin], train_length: int, name: str) -> int:
    """Found by asking how a text's first two tokens rotate, which follows from its last position (LongRoPE)."""

    def first_two(tokens: int) -> list[Tensor]:
        rows = cos_sin(torch.tensor([0, 1, tokens - 1]))
        return [x[:2] for pair in rows.values() for x in pair]

    def alike(one: list[Tensor], other: list[Tensor]) -> bool:
        return all(map(torch.equal, one, other))

    shortest, longest = first_two(2), first_two(train_length)
    if alike(shortest, longest):
        return 0
    low, high = 2, train_length  # a text of ``low`` tokens rotates as the shortest, one of ``high`` does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if alike(first_two(middle), shortest) else (low, middle)
    if not alike(first_two(high), longest):
        raise InputError(
            f"{name} rotates texts of more than {low} tokens by frequencies that change with their length; export with "
            f"train_length <= {low}"
        )
    return low


def _rotary_modules(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Parent, name and module of each rotary embedding."""
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child).__name__.endswith("RotaryEmbedding") and hasattr(child, "config")
    ]


def _cos_sin(rotary: nn.Module, positions: Tensor) -> CosSin:
    """cos and sin of a text's tokens at positions int64 ``[S]``, float32.

    Computed by a new module: on the meta device the original has no numbers, and some remember earlier texts.
    """
    config: Any = rotary.config
    real: Any = type(rotary)(config=config).to("cpu")
    layer_types: list[str | None] = [None]
    if hasattr(real, "layer_types"):
        kinds = getattr(real, "rope_type", None)  # by layer type; some types have no rotary embedding
        layer_types = [name for name in real.layer_types if not isinstance(kinds, dict) or name in kinds]
    tables: CosSin = {}
    for layer_type in layer_types:
        arguments = () if layer_type is None else (layer_type,)
        found = real(torch.zeros(1, dtype=torch.float32), positions[None], *arguments)
        if not isinstance(found, tuple):
            raise InputError(f"{type(rotary).__name__} gives complex numbers, not cos and sin; ONNX has none")
        cos, sin = found
        tables[layer_type] = (cos[0].float(), sin[0].float())
    return tables


def probe_layers(model: nn.Module, table: RotaryTable) -> list[LayerSpec]:
    """The layers' keys and values; found by running one attention layer of each kind with random weights.

    Raises:
        MesaError: a layer cannot be run alone, or rotates its keys in a way that is not known here.
    """
    config: Any = model.config
    layer_types = getattr(config, "layer_types", None)
    attention = [m for m in model.modules() if isinstance(getattr(m, "layer_idx", None), int) and _is_attention(m)]
    known: dict[Any, LayerSpec] = {}
    result: list[LayerSpec] = []
    shared: tuple[SharedKeys, SharedKeys] = ({}, {})
    sizes = {name: cos.shape[-1] for name, (cos, _) in table.values.items()}
    for layer in sorted(attention, key=lambda m: int(m.layer_idx)):  # type: ignore[arg-type]
        name = None if layer_types is None or None in sizes else layer_types[int(layer.layer_idx)]  # type: ignore[arg-type]
        kind = (type(layer), name, _shape_key(layer), *_switches(layer))
        if kind not in known:
            known[kind] = _probe(layer, name, sizes.get(name), shared)
        result.append(known[kind])
    return result


def _is_attention(module: nn.Module) -> bool:
    return "Attention" in type(module).__name__ and any(True for _ in module.parameters())


def _shape_key(layer: nn.Module) -> tuple[Any, ...]:
    return tuple((name, tuple(parameter.shape)) for name, parameter in layer.named_parameters())


def _switches(layer: nn.Module) -> tuple[tuple[str, Any], ...]:
    """Plain attributes that may change what a layer does (such as SmolLM3's ``use_rope``)."""
    return tuple(
        (name, value)
        for name, value in sorted(vars(layer).items())
        if isinstance(value, (bool, int, float, str)) and name not in ("layer_idx", "training")
    )


def _probe(layer: nn.Module, table: str | None, size: int | None, shared: tuple[SharedKeys, SharedKeys]) -> LayerSpec:
    """``size``: of a table's row; none for a layer that has no table, to which models hand no rotation."""
    still = quarter = None
    if size is not None:
        still = torch.ones(1, 1, size), torch.zeros(1, 1, size)
        quarter = torch.zeros(1, 1, size), torch.ones(1, 1, size)
    real = _with_random_weights(layer)
    plain, value = _keys(real, still, shared[0])
    rotated, _ = _keys(real, quarter, shared[1])
    kv_heads, key_size, value_size = plain.shape[1], plain.shape[3], value.shape[3]
    differing = (plain - rotated).abs().amax(dim=(0, 1, 2)).gt(1e-6).nonzero().flatten().tolist()
    if not differing or size is None:
        return LayerSpec(kv_heads, key_size, value_size, None, table)
    first, rotary_dim = differing[0], len(differing)
    if differing == list(range(first, first + rotary_dim)) and rotary_dim in (size, 2 * size):
        part = slice(first, first + rotary_dim)
        for layout, backwards in product(get_args(Layout), (False, True)):
            expected = rotate_quarter(plain[..., part], layout) * (-1 if backwards else 1)
            if torch.allclose(rotated[..., part], expected, atol=1e-5):
                return LayerSpec(kv_heads, key_size, value_size, layout, table, first, rotary_dim, backwards)
    raise InputError(
        f"{type(layer).__name__} rotates its keys in a way that is not known here (neither halves nor interleaved "
        f"pairs of {size} neighbouring dimensions)"
    )


def _with_random_weights(layer: nn.Module) -> nn.Module:
    """A copy of a layer in float32; a scale is drawn around 1."""
    real = copy.deepcopy(layer).to_empty(device="cpu").float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in real.parameters():
            parameter.normal_(float(parameter.dim() == 1), 0.1, generator=generator)
    return real


def _keys(real: nn.Module, rotation: tuple[Tensor, Tensor] | None, shared: SharedKeys) -> tuple[Tensor, Tensor]:
    """Keys and values ``[1, K, 1, D]`` that one attention layer makes of a random hidden state and a given rotation.

    ``shared``: what layers have made before it, and some take over (Gemma 3n and 4).
    """
    width = next(p.shape[1] for p in real.parameters() if p.dim() == 2)  # a projection's input
    hidden = torch.randn(1, 1, width, generator=torch.Generator().manual_seed(1))
    index = int(real.layer_idx)  # type: ignore[arg-type]
    empty = torch.zeros(1, 1, 1, 0)
    zero = torch.zeros(1, 1, dtype=torch.int64)
    inputs = AttentionInputs("unfused", empty, empty, torch.ones(1, 1, 1, 1), [], [], 0, zero, zero)
    known = {"position_ids": zero, "shared_kv_states": shared}
    wanted = {name: known[name] for name in inspect.signature(real.forward).parameters if name in known}
    with torch.no_grad(), attention_inputs(inputs):
        try:
            # There is no past to attend to; the keys are recorded before that is noticed.
            with contextlib.suppress(IndexError):
                real(hidden_states=hidden, position_embeddings=rotation, attention_mask=None, **wanted)
        except TypeError as error:
            raise InputError(
                f"{type(real).__name__} cannot be run alone to see how it rotates its keys: {error}"
            ) from error
    if index not in inputs.new_keys:
        raise InputError(f"{type(real).__name__} does not call transformers' attention interface; it cannot be traced")
    return inputs.new_keys[index], inputs.new_values[index]


def rotate_quarter(x: Tensor, layout: Layout) -> Tensor:
    """Each pair of dimensions rotated by 90 degrees, ``[..., R]``."""
    if layout == "half":
        first, second = x.chunk(2, dim=-1)
        return torch.cat((-second, first), dim=-1)
    return torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)


class Rerotation(nn.Module):
    """Moves rotated keys from old to new positions; a rotation by the difference (rotations compose).

    A scale inside the table (YaRN) is divided out: it is in the key already.
    """

    def __init__(self, table: tuple[Tensor, Tensor], layer: LayerSpec) -> None:
        super().__init__()
        cos, sin = table
        half = layer.rotary_dim // 2
        if layer.layout == "half" and cos.shape[-1] == half:
            cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)
        elif layer.layout == "interleaved" and (cos.shape[-1] == half or not torch.equal(cos[:, 0::2], cos[:, 1::2])):
            # Kept as halves in the table and spread over the pairs by the model.
            cos, sin = (x[:, :half].repeat_interleave(2, -1) for x in (cos, sin))
        scale = (cos.square() + sin.square()).sqrt()
        self.register_buffer("cos", cos / scale, persistent=False)
        self.register_buffer("sin", (-sin if layer.backwards else sin) / scale, persistent=False)
        self.layer = layer

    def forward(self, key: Tensor, from_ids: Tensor, to_ids: Tensor) -> Tensor:
        """Keys ``[B, K, S, D]`` at positions ``from_ids`` to ``to_ids``, int64 ``[B, S]`` both."""
        cos_table, sin_table = self.get_buffer("cos"), self.get_buffer("sin")
        cos_from, cos_to = (nn.functional.embedding(ids, cos_table).unsqueeze(1) for ids in (from_ids, to_ids))
        sin_from, sin_to = (nn.functional.embedding(ids, sin_table).unsqueeze(1) for ids in (from_ids, to_ids))
        cos = cos_to * cos_from + sin_to * sin_from
        sin = sin_to * cos_from - cos_to * sin_from
        assert self.layer.layout is not None
        first, stop = self.layer.first, self.layer.first + self.layer.rotary_dim
        rotary = key[..., first:stop].float()
        rotated = (rotary * cos + rotate_quarter(rotary, self.layer.layout) * sin).to(key.dtype)
        parts = [part for part in (key[..., :first], rotated, key[..., stop:]) if part.shape[-1]]
        return torch.cat(parts, dim=-1) if len(parts) > 1 else rotated
