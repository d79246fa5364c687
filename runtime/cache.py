"""What a live cache is: the keys and values of a batch of prompts, and what computes on them.

The executor knows the plan and no memory; a live cache knows the memory and no plan. One lies in numpy arrays
(:mod:`mesart.runtime.host_cache`), one on a GPU (:mod:`mesart.runtime.device_cache`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mesart.graphs.errors import EngineError, MesaError
from mesart.graphs.manifest import Manifest
from mesart.graphs.plan import Span
from mesart.runtime.backends import Array

Positions = NDArray[np.int64]

_INFINITE_FLOAT16, _HUGE_BFLOAT16 = 0x7C00, 0x5F80
"""The bits of infinity, and of 2**64."""


@dataclass(frozen=True)
class NextToken:
    """One decoding step of one row."""

    token: int
    slot: int
    """The number of tokens before it."""
    position: int
    scale: float
    """Of its query (log-n scaling)."""


class LiveCache(Protocol):
    """Keys and values of the rows of a batch; slot ``i`` of a row holds its token ``i``.

    What computes writes its new keys and values in place. When a call fails, the slots that it does not write are as
    they were. ``tokens`` are always all tokens of the row, of which the spans are parts.
    """

    last_logits_only: bool
    """Whether the tail gives the logits of its last token only."""

    @property
    def capacity(self) -> int:
        """Tokens for which the longest row has room."""
        ...

    def begin(self, lengths: Sequence[int]) -> None:
        """Forgets all rows; makes empty ones, with room for so many tokens each. Fails: leaves one empty row."""
        ...

    def clear(self) -> None:
        """Forgets all rows, and leaves one empty row."""
        ...

    def make_room(self, row: int, tokens: int) -> None:
        """Makes room for ``tokens`` tokens in a row; what is there stays."""
        ...

    def head(self, row: int, tokens: Sequence[int], span: Span) -> None:
        """Computes the head, at its ordinary positions."""
        ...

    def chunks(self, row: int, tokens: Sequence[int], spans: Sequence[Span], head: Positions) -> None:
        """Computes chunks at their local positions, behind the head, whose keys stand at ``head``, int64 ``[F]``."""
        ...

    def tail(
        self,
        row: int,
        tokens: Sequence[int],
        span: Span,
        positions: Positions,
        scales: NDArray[np.float32],
        *,
        all_logits: bool,
    ) -> NDArray[np.float32]:
        """Computes the tail, a slice at a time: each sees all before it, so that slicing changes nothing.

        Args:
            positions: of the tail's tokens, int64 ``[len(span)]``.
            scales: of their queries, float32 ``[len(span)]``.
            all_logits: of all its tokens, float32 ``[len(span), V]``, not only of the last, ``[1, V]``.
        """
        ...

    def step(self, tokens: Sequence[NextToken | None]) -> NDArray[np.float32]:
        """Appends a token to each row that has one; logits ``[B, V]``, without meaning where there is none."""
        ...

    def keep(self, row: int, tokens: int) -> Callable[[], None]:
        """To be called before ``tokens`` tokens are computed: the result brings back what they overwrite of the row."""
        ...

    def move(self, row: int, old: Positions, new: Positions) -> None:
        """Turns the keys of slots ``0 .. len(old) - 1`` from their old positions to new ones; all of them, or none."""
        ...

    def forget(self, row: int, start: int) -> None:
        """Tokens of a row from ``start`` on may be seen no more.

        Raises:
            MesaError: what was interrupted left a key half written: the row cannot be used any more.
        """
        ...

    def snapshot(self, row: int) -> tuple[list[Array], list[Array]]:
        """Copies of a row's keys and values, ``[K, at least its tokens, D]``, a layer each, in the bundle's dtype."""
        ...

    def close(self) -> None:
        """Frees the memory."""
        ...


def require_numbers(logits: NDArray[np.float32], role: str, manifest: Manifest) -> None:
    """Raises a :class:`MesaError` if the logits of a role are no numbers."""
    largest = logits.max()
    if not math.isfinite(largest):  # any NaN makes it one
        raise broken_numbers(f"{'NaN' if np.isnan(largest) else 'infinite numbers'} in the logits", role, manifest)


def require_keys(arrays: Iterable[Array], role: str, manifest: Manifest) -> None:
    """Raises a :class:`MesaError` if new keys or values, in the bundle's dtype, are no numbers to go on with.

    In float32 and bfloat16 numbers of 2**64 or more are refused too: the score of such a key overflows.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        usable = all(map(_usable, arrays))
    if not usable:
        raise broken_numbers("NaN or infinite numbers in the keys or values", role, manifest)


def _usable(array: Array) -> bool:
    if array.dtype == np.float32:
        flat = array.reshape(-1)
        return math.isfinite(flat.dot(flat))  # one call, and one pass at the speed of memory
    bits = array.view(np.uint16) & 0x7FFF
    return bool(bits.max(initial=0) < (_INFINITE_FLOAT16 if array.dtype == np.float16 else _HUGE_BFLOAT16))


def broken_numbers(what: str, role: str, manifest: Manifest) -> MesaError:
    return EngineError(
        f"{what} of the {role}: the weights are broken, or {manifest.dtype} overflows "
        "(export with another --dtype); `mesart validate` names the layer"
    )
