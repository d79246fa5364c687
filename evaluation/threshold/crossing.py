"""Statistics of the threshold probe: how surely a value moves, and where it passes a limit for good."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from mesart.evaluation.report import Z95
from mesart.evaluation.threshold.report import Crossing, Curve, PasskeyRate

Array: TypeAlias = NDArray[np.float64]


def slope_t(states: Array, lengths: Sequence[int]) -> Array:
    """How surely each dimension moves with the length: t of the places' slopes, ``[layers, H]``."""
    x = np.asarray(lengths[-states.shape[1] :], np.float64)
    x -= x.mean()
    slopes = np.einsum("nplh,p->nlh", states, x) / (x**2).sum()
    error = slopes.std(axis=0, ddof=1) / math.sqrt(len(slopes))
    t: Array = np.divide(slopes.mean(axis=0), error, out=np.zeros_like(error), where=error > 0)
    return t


def curve_of(lengths: Sequence[int], changes: Array, start: float = 0.0) -> Curve:
    mean = start + changes.mean(axis=0)
    half = Z95 * changes.std(axis=0, ddof=1) / math.sqrt(len(changes))
    return Curve(tuple(lengths), tuple(mean.tolist()), tuple((mean - half).tolist()), tuple((mean + half).tolist()))


def crossing_of(
    positions: Array, changes: Array, limits: Array, resamples: NDArray[np.int64], *, either_side: bool = False
) -> Crossing:
    """Where the mean of ``changes``, ``[N, positions]``, passes the mean of ``limits`` for good."""

    def point(rows: NDArray[np.int64]) -> float:
        mean, limit = changes[rows].mean(axis=0), abs(limits[rows].mean())
        return passes_at(positions, np.abs(mean) if either_side else mean, limit)

    at = point(np.arange(len(changes)))
    # Ends are points that were found, never between one that was and "never".
    low, high = np.quantile([point(rows) for rows in resamples], (0.025, 0.975), method="nearest")
    return Crossing(_found(at), _found(low), _found(high))


def passes_at(positions: Array, values: Array, limit: float) -> float:
    """Where ``values`` pass ``limit`` and do not come back, between two positions by a straight line; else infinity."""
    within = np.flatnonzero(values <= limit)
    if len(within) == 0:
        return float(positions[0])
    last = int(within[-1])
    if last + 1 == len(values):
        return math.inf
    share = (limit - values[last]) / (values[last + 1] - values[last])
    return float(positions[last] + share * (positions[last + 1] - positions[last]))


def all_dimensions(
    positions: Array, changes: Array, ways: Array
) -> tuple[float, tuple[float | None, float | None, float | None]]:
    """Share that passes and quartiles of where: ``changes`` is ``[N, P, L, H]``, ``ways`` ``[N, L, H]``."""
    means, limits = np.abs(changes).mean(axis=0).reshape(len(positions), -1), np.abs(ways).mean(axis=0).ravel()
    points = np.asarray([passes_at(positions, means[:, i], limit) for i, limit in enumerate(limits)])
    low, middle, high = (_found(point) for point in np.quantile(points, (0.25, 0.5, 0.75), method="nearest"))
    return float(np.isfinite(points).mean()), (low, middle, high)


def _found(point: float) -> float | None:
    return float(point) if math.isfinite(point) else None


def passkey_failure(rates: Sequence[PasskeyRate]) -> Crossing:
    """Where the rate falls below a half for good; the interval ends where all intervals are on one side of it."""
    lengths = np.asarray([rate.length for rate in rates], np.float64)
    at = passes_at(lengths, -np.asarray([rate.correct / rate.prompts for rate in rates]), -0.5)
    intervals = np.asarray([rate.interval for rate in rates])
    surely_below = passes_at(lengths, -intervals[:, 1], -0.5)
    surely_above = next((rate.length for rate in rates if rate.interval[0] <= 0.5), math.inf)
    return Crossing(_found(at), _found(surely_above), _found(surely_below))


__all__ = ["Array", "all_dimensions", "crossing_of", "curve_of", "passes_at", "passkey_failure", "slope_t"]
