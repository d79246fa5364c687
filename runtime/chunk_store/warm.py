"""Computes the chunks of documents, for the store alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Tokens
from typing import TypeAlias

import numpy as np

from mesart.graphs.errors import InputError
from mesart.runtime.chunk_store.stored import StoredChunks
from mesart.runtime.documents import DocumentPrompt
from mesart.runtime.engine import Engine, Turn
from mesart.runtime.reading import plan_of_turn
from mesart.runtime.usage import WarmReport

Part: TypeAlias = "Tokens[int]"

_TOGETHER = 8
"""Chunks of small documents that are computed side by side: more fill no CPU better, and their memory adds up."""


def warm(
    engine: Engine, stored: StoredChunks, prompt: DocumentPrompt, progress: Callable[[int, int], None] | None = None
) -> WarmReport:
    """Has head and documents of a prompt in the store; some at a time, so that it takes no more memory than these.

    Raises:
        MesaError: the method has no chunks, or a document is longer than the largest bucket.
    """
    manifest = engine.manifest
    config = manifest.config
    head = config.head_length
    if not config.chunk_length:
        raise InputError(f"the method {config.name} has no chunks: there is nothing to keep for other prompts")
    lead = [*prompt.lead, *manifest.filler[: max(0, head - len(prompt.lead))]]
    for part in prompt.documents:
        if head + len(part) + 1 > manifest.buckets[-1].max_tokens:
            raise InputError(
                f"a document has {len(part)} tokens, more than the largest bucket holds beside the head, "
                f"{manifest.buckets[-1].max_tokens - head - 1}; split it, or export again with a larger --max-tokens"
            )
    # Of the lead too, what makes chunks of its own; and there may be nothing between two documents.
    parts = [part for part in (lead[head:], *prompt.documents) if part]
    done, total = 0, sum(map(len, parts))
    computed = reused = 0
    chunks = stored.behind(np.array(lead[:head], np.int64))
    keys: list[str] = []
    most = min(_TOGETHER * config.chunk_length, manifest.buckets[-1].max_tokens - head - 1)
    for group in _groups(parts, most):
        turn = _turn(engine, stored, lead[:head], group)
        try:
            while not turn.is_finished:
                engine.step()
                if progress is not None:
                    progress(min(total, done + max(0, turn.progress[0] - head)), total)
            if turn.error is not None:
                raise turn.error
            plan = plan_of_turn(manifest, None, len(turn.ids), turn.edges)
            keys += (chunks.chunk_key(turn.ids[chunk.start : chunk.stop]) for chunk in plan.chunks)
        finally:
            engine.close_text(turn.text)
        done += sum(map(len, group))
        assert turn.usage is not None
        cached = turn.usage.cached_tokens
        computed += turn.usage.computed_tokens
        reused += cached.memory + cached.disk
    tokens = sum(map(len, prompt.documents))
    return WarmReport(computed, reused, tokens, chunks.head_key(), tuple(dict.fromkeys(keys)))


def _groups(parts: Tokens[Part], most: int) -> Iterator[list[Part]]:
    """Neighbours together, as far as they have at most so many tokens."""
    group: list[Part] = []
    for part in parts:
        if group and sum(map(len, group)) + len(part) > most:
            yield group
            group = []
        group.append(part)
    if group:
        yield group


def _turn(engine: Engine, stored: StoredChunks, head: Part, parts: Tokens[Part]) -> Turn:
    edges = np.cumsum([len(head), *map(len, parts)]).tolist()
    tail = head[:1]  # is not read
    ids = np.array([*head, *(token for part in parts for token in part), *tail], np.int64)
    text = engine.open_text()
    try:
        return engine.add(Turn(text, ids, wanted=0, edges=edges, stored=stored))
    except BaseException:
        engine.close_text(text)
        raise


__all__ = ["warm"]
