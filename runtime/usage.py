"""What became of a prompt's tokens: which were computed, and which were found somewhere."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class CachedTokens:
    """Tokens whose keys and values were there, by where they were."""

    live: int = 0
    """In the live text that the prompt was appended to."""
    memory: int = 0
    """In the store's memory."""
    disk: int = 0
    """In the store's folder."""

    @property
    def total(self) -> int:
        return self.live + self.memory + self.disk

    def __add__(self, other: CachedTokens) -> CachedTokens:
        return CachedTokens(self.live + other.live, self.memory + other.memory, self.disk + other.disk)


@dataclass(frozen=True)
class Usage:
    """Of the last prompt of a text."""

    prompt_tokens: int = 0
    """All tokens of the text up to the prompt's end, whatever the head was filled up with included."""
    computed_tokens: int = 0
    cached_tokens: CachedTokens = field(default_factory=CachedTokens)

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.computed_tokens + other.computed_tokens,
            self.cached_tokens + other.cached_tokens,
        )


@dataclass(frozen=True)
class WarmReport:
    """What it took to have documents in a store, and under which keys they are there."""

    computed_tokens: int
    reused_tokens: int
    """Those of chunks that were in the store already."""
    document_tokens: int
    """Tokens of the documents, and of whatever stands between two of them."""
    head_key: str = field(repr=False)
    chunk_keys: tuple[str, ...] = field(repr=False)
    """Keys of the chunks of the documents, and of those of the lead behind the head; each once."""


__all__ = ["CachedTokens", "Usage", "WarmReport"]
