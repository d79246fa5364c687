"""What a runner is: new tokens of many texts in, their logits out, their keys and values into the store."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mesart.graphs.bundle.manifest import Manifest
from mesart.graphs.bundle.names import Phase
from mesart.graphs.errors import BundleError, EngineError, MesaError
from mesart.runtime.kv.store import Array, Kv, Positions

Logits: TypeAlias = NDArray[np.float32]

_INFINITE_FLOAT16, _HUGE_BFLOAT16 = 0x7C00, 0x5F80
"""The bits of infinity, and of 2**64."""


@dataclass(frozen=True)
class Segment:
    """New tokens of one text: each sees all that is in ``kv``, and those of them before it."""

    phase: Phase
    kv: Kv
    """Has room for them."""
    ids: NDArray[np.int64]
    """``[S]``."""
    positions: Positions
    """Of the tokens, int64 ``[S]``."""
    scales: NDArray[np.float32]
    """Of their queries (log-n scaling), ``[S]``."""
    wanted: int
    """Of how many of the last of them the logits are wanted."""

    def __len__(self) -> int:
        return len(self.ids)


class Runner(Protocol):
    """Computes segments on the store that it was made for."""

    last_logits_only: bool
    """Whether a segment gives the logits of its last token only."""
    whole_slices: bool
    """Whether graphs compute slices of just the length that :meth:`slice_length` says: shorter ones save no time.

    Heads and chunks have to be whole.
    """

    def slice_length(self, phase: Phase, past: int) -> int:
        """The most tokens of a segment behind ``past`` others: more at a time gain nothing, or do not fit."""
        ...

    def run(self, segments: Sequence[Segment]) -> list[Logits]:
        """Logits ``[wanted, V]`` of each segment, whose texts go on by its tokens: all of them, or if it fails none.

        Raises:
            MesaError: the engine failed, or gave no numbers.
        """
        ...

    def close(self) -> None:
        """Frees what the engine holds."""
        ...


def require_numbers(logits: Logits, phase: str, manifest: Manifest) -> None:
    """Raises an :class:`EngineError` if logits are no numbers."""
    largest = logits.max(initial=-math.inf)
    if logits.size and not math.isfinite(largest):  # any NaN makes it one
        raise broken_numbers(f"{'NaN' if np.isnan(largest) else 'infinite numbers'} in the logits", phase, manifest)


def require_keys(arrays: Iterable[Array], phase: str, manifest: Manifest, kept: str | None = None) -> None:
    """Raises an :class:`EngineError` if new keys or values are no numbers to go on with.

    Args:
        kept: the dtype that was asked for to keep them in, if it is not the bundle's.

    In float32 and bfloat16 numbers of 2**64 or more are refused too: the score of such a key overflows.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        usable = all(map(_usable, arrays))
    if not usable:
        if kept is not None:
            raise EngineError(
                f"NaN or infinite numbers in the keys or values of the {phase}: probably {kept} overflows; leave "
                "kv_dtype out"
            )
        raise broken_numbers("NaN or infinite numbers in the keys or values", phase, manifest)


def _usable(array: Array) -> bool:
    if array.dtype == np.float32:
        flat = array.reshape(-1)
        return math.isfinite(flat.dot(flat))  # one call, and one pass at the speed of memory
    bits = array.view(np.uint16) & 0x7FFF
    return bool(bits.max(initial=0) < (_INFINITE_FLOAT16 if array.dtype == np.float16 else _HUGE_BFLOAT16))


def broken_numbers(what: str, phase: str, manifest: Manifest) -> MesaError:
    return EngineError(
        f"{what} of the {phase}: the weights are broken, or {manifest.dtype} overflows "
        "(export with another --dtype); `mesart validate` names the layer"
    )


def of_shape(array: Array | None, shape: tuple[int, ...], name: str, phase: str) -> Array:
    """An engine's output, if there is one of that shape: its word alone is not enough."""
    if array is None:
        raise BundleError(f"the graph of the {phase} has no output {name!r}; export the bundle again")
    if array.shape != shape:
        raise EngineError(
            f"the engine gave {name} of the {phase} as {list(array.shape)} where {list(shape)} was asked for: the "
            "graph is not this bundle's, or the engine is out of memory; export again, or use fewer rows or shorter "
            "prompts"
        )
    return array


__all__ = ["Logits", "Runner", "Segment", "broken_numbers", "of_shape", "require_keys", "require_numbers"]
