"""The names of what the graphs of a bundle take and give, and the sizes that are agreed on beside.

Axes: B batch, S new tokens, P past tokens or slots of the cache, M tokens whose logits are wanted, A slots that
attention looks at, K key-value heads, D head size, V vocabulary.
"""

from __future__ import annotations

from typing import Final, Literal, get_args

Phase = Literal["prefix", "chunk", "tail", "decode"]
"""What part of a text is computed: its head, a chunk behind the head, the tail, one more token."""

EnginePhase = Literal[Phase, "rerotate"]
"""What an engine computes: a phase, or keys at other positions."""

GraphKind = Literal[Phase, "symbolic", "onnxruntime", "paged", "grouped", "engine", "rerotate", "engine_rerotate"]
"""What an ONNX file is.

A phase: a graph of fixed shapes for it. ``symbolic``: the one that serves all phases; ``onnxruntime``: the same for
onnxruntime on CPUs; ``paged``, ``grouped``: the same with keys and values written in place by operators made for it.
``engine``: the same with the cache updated in place, from which TensorRT engines are built. ``rerotate``: keys of a
layer at other positions; ``engine_rerotate``: those of all layers at once, for engines.
"""

Kind = Literal["key", "value"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
"""What a cache holds of a layer."""

INPUT_IDS: Final = "input_ids"
"""int64 ``[B, S]``."""
POSITION_IDS: Final = "position_ids"
"""Positions of the new tokens, int64 ``[B, S]``."""
QUERY_SCALE: Final = "query_scale"
"""Multiplies the queries (log-n scaling), float32 ``[B, 1, S, 1]``."""
LOGITS_AT: Final = "logits_at"
"""Which of the new tokens logits are wanted of, int64 ``[M]``."""
PAST_MASK: Final = "past_mask"
"""Added to the scores of past keys, float32 ``[B, 1, 1, P]``."""
NEW_MASK: Final = "new_mask"
"""Added to the scores of new keys, float32 ``[B, 1, S, S]``."""
MASKED: Final = -1e9
"""What masks hold where nothing may be seen: far below any score, and finite, so that no row becomes NaN."""
PAST_POSITION_IDS: Final = "past_position_ids"
"""Positions of the past keys, int64 ``[B, P]``; of graphs with layers that look at positions."""
LOGITS: Final = "logits"
"""float32 ``[B, M, V]``."""

PAST: Final = "past_key_values."
PRESENT: Final = "present."

WRITE_AT: Final = "write_at"
"""The slot of the first new token, int64 ``[B]``; of graphs that write the cache in place."""
ATTENDED: Final = "attended"
"""The numbers of the slots that attention looks at, int64 ``[A]``: 0 .. A - 1."""

SEQLENS_K: Final = "seqlens_k"
"""Tokens of each row with its new ones, less one, int32 ``[B]``; of the grouped graph."""
TOTAL_SEQUENCE_LENGTH: Final = "total_sequence_length"
"""The most tokens of a row with its new ones, int32; of the grouped graph."""

PAST_LENS: Final = "past_lens"
SUBSEQUENCE_BEGINS: Final = "subsequence_begins"
BLOCK_INDICES: Final = "block_indices"
BLOCK_INDICES_BEGINS: Final = "block_indices_begins"
MAX_CONTEXT_LEN: Final = "max_context_len"
PAGED_INPUTS: Final = {
    PAST_LENS: "texts",
    SUBSEQUENCE_BEGINS: "text_edges",
    BLOCK_INDICES: "blocks",
    BLOCK_INDICES_BEGINS: "text_edges",
    MAX_CONTEXT_LEN: "",
}
"""The int32 inputs of the paged graph, and their axes, in the order of the operator's."""
BLOCK: Final = 32
"""Slots of a block of the paged graph's cache."""
PAGED_DOMAIN: Final = "mesart"
"""Of the operator ``PagedAttention``: queries ``[T, H * D]``, new keys and values ``[T, K * D]``, those of the cache,
and :data:`PAGED_INPUTS`; attributes ``kv_num_heads`` (K) and ``head_size`` (D)."""

KEY: Final = "key"
"""Keys of a layer that are to be rotated to other positions, ``[B, K, S, D]``."""
FROM_IDS: Final = "from_ids"
"""The positions they have, int64 ``[B, S]``."""
TO_IDS: Final = "to_ids"
"""The positions they get, int64 ``[B, S]``."""
ROTATED: Final = "rotated"
"""The keys there."""


def past_name(layer: int, kind: Kind) -> str:
    """Keys or values of a layer's past, ``[B, K, P, D]``."""
    return f"{PAST}{layer}.{kind}"


def present_name(layer: int, kind: Kind) -> str:
    """New keys or values of a layer, ``[B, K, S, D]``, or where the graph writes them in place the whole cache."""
    return f"{PRESENT}{layer}.{kind}"


def past_of(present: str) -> str:
    """The name of the cache that a graph which writes in place gives as ``present``."""
    return PAST + present.removeprefix(PRESENT)


def key_name(layer: int) -> str:
    """:data:`KEY` of one layer, where a graph rotates the keys of all of them."""
    return f"{KEY}.{layer}"


def rotated_name(layer: int) -> str:
    """:data:`ROTATED` of one layer, where a graph rotates the keys of all of them."""
    return f"{ROTATED}.{layer}"
