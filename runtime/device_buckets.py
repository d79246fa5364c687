"""How large the buffers of texts are on a device, and whose engines run on them: shapes are fixed for each bucket."""

from __future__ import annotations

from mesart.graphs.bundle.manifest import Manifest
from mesart.graphs.errors import InputError
from mesart.graphs.method.plan import Bucket
from mesart.runtime.engines import Engines


class DeviceBuckets:
    """The buckets that there are engines for.

    With layout ``bucket`` each has buffers of its own; with ``profile`` all have those of the largest.
    """

    def __init__(self, manifest: Manifest, engines: Engines) -> None:
        self._engines, self._buckets = engines, engines.buckets(manifest)
        self._one_size = engines.layout == "profile"
        profiles = [profile for engine in engines.set.engines for profile in engine.profiles]
        self.chunk_slots = next((x.slots for x in profiles if x.phase == "chunk"), 0)
        """Slots of the buffers in which heads and chunks are computed; 0: there are no engines for them."""

    @property
    def most_tokens(self) -> int:
        """The longest text."""
        return self._buckets[-1].max_tokens

    def room(self, tokens: int) -> int:
        """Tokens for which the smallest buffer has room that holds ``tokens`` tokens.

        Raises:
            InputError: they are more than the largest bucket holds.
        """
        bucket = self._smallest(tokens)
        return self.most_tokens if self._one_size else bucket.max_tokens

    def slots(self, room: int) -> int:
        """Slots of the buffer that has room for just so many tokens; some are behind them, for what fills up a run."""
        return self._engines.profile("tail", self._smallest(room).chunks).slots

    def running(self, room: int, tokens: int) -> int:
        """The bucket, by its number of chunks, whose engines run a text of ``tokens`` tokens in such a buffer."""
        return self._smallest(tokens if self._one_size else room).chunks

    def _smallest(self, tokens: int) -> Bucket:
        for bucket in self._buckets:
            if bucket.max_tokens >= tokens:
                return bucket
        raise InputError(
            f"prompt and generated text reach {tokens} tokens, more than the largest bucket's {self.most_tokens}; "
            "export and build again with a larger --max-tokens"
        )


__all__ = ["DeviceBuckets"]
