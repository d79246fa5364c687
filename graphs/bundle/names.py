"""Names and sizes that the graphs of a bundle and what runs them agree on."""

from __future__ import annotations

BLOCK = 32
"""Slots of a block of the paged graph's cache."""

PAGED_DOMAIN = "mesart"
"""Of the operator ``PagedAttention``: queries ``[T, H * D]``, new keys and values ``[T, K * D]``, those of the cache,
and :data:`PAGED_INPUTS`; attributes ``kv_num_heads`` (K) and ``head_size`` (D)."""

PAGED_INPUTS = {
    "past_lens": "texts",
    "subsequence_begins": "text_edges",
    "block_indices": "blocks",
    "block_indices_begins": "text_edges",
    "max_context_len": "",
}
"""The int32 inputs of the paged graph, and their axes, in the order of the operator's."""

__all__ = ["BLOCK", "PAGED_DOMAIN", "PAGED_INPUTS"]
