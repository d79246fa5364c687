"""From the logits of one position to the next token.

The processors and their order are those of transformers: repetition penalty, temperature, top-k, top-p, min-p, then a
draw. Each works on the tokens that are left, so that nothing sorts a whole vocabulary of 150,000 for one token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mesart.graphs.generation import SamplingConfig, SamplingError

Logits: TypeAlias = NDArray[np.float32]
TokenIds: TypeAlias = NDArray[np.int64]

_FIRST_GUESS: Final = 1024  # how many tokens top-p sorts at first: a trained model's nucleus is seldom larger


class Sampler:
    """Chooses tokens. Holds the random state: two samplers with the same config and seed choose the same tokens."""

    def __init__(self, config: SamplingConfig) -> None:
        self.config = config
        self._random = np.random.Generator(np.random.PCG64(config.seed))

    def __call__(self, logits: Logits, history: Sequence[int] | TokenIds = ()) -> int:
        """Choose the next token.

        Args:
            logits: float32 ``[V]``; ``-inf`` excludes a token.
            history: ids of the tokens so far, the prompt's included; read for the repetition penalty only. An array is
                cheaper than a list when it is long.

        Raises:
            SamplingError: NaN or infinity in the logits, or no token left to choose.
        """
        ids, scores = self.candidates(logits, history)
        if self.config.temperature == 0:
            return int(ids[np.argmax(scores)])
        cumulative = np.cumsum(_softmax(scores))
        drawn = cumulative[-1] * (1 - self._random.random())  # above 0 and up to the sum: no impossible token is hit
        return int(ids[np.searchsorted(cumulative, drawn)])

    def candidates(self, logits: Logits, history: Sequence[int] | TokenIds = ()) -> tuple[TokenIds, Logits]:
        """The tokens that may be chosen, in order of their ids, and their processed logits.

        Args:
            logits: float32 ``[V]``.
            history: as for a call.

        Returns:
            Token ids, int64 ``[K]``, and scores, float32 ``[K]``; the tokens left out have a probability of zero.
        """
        config = self.config
        scores = np.asarray(logits, dtype=np.float32)
        if scores.ndim != 1 or scores.size == 0:
            raise ValueError(f"logits have the shape {list(scores.shape)}; one position's, [vocabulary], are expected")
        _check_finite(scores)
        if config.repetition_penalty != 1:
            scores = _penalise(scores, np.asarray(history, dtype=np.int64), config.repetition_penalty)
        if config.temperature == 0:
            return np.arange(scores.size), scores
        if config.temperature != 1:
            scores = scores / np.float32(config.temperature)
        ids = np.flatnonzero(_top_k(scores, config.top_k))
        ids = ids[_top_p(scores[ids], config.top_p)]
        ids = ids[_min_p(scores[ids], config.min_p)]
        return ids, scores[ids]


def _penalise(scores: Logits, history: TokenIds, penalty: float) -> Logits:
    """Scores ``[V]`` with the history's tokens, each once, made less likely."""
    if history.size and history.min() < 0:
        raise ValueError(f"the history holds the token id {history.min()}; ids start at 0")
    history = history[history < scores.size]  # an embedding may be padded past the vocabulary
    seen = scores[history]
    penalised: Logits = scores.copy()
    penalised[history] = np.where(seen < 0, seen * np.float32(penalty), seen / np.float32(penalty))
    return penalised


def _top_k(scores: Logits, k: int) -> NDArray[np.bool_]:
    """Which of ``[V]`` stay: as transformers, all that tie with the k-th best."""
    if k == 0 or k >= scores.size:
        return np.ones(scores.size, dtype=bool)
    kth_best = np.partition(scores, scores.size - k)[scores.size - k]
    keep: NDArray[np.bool_] = scores >= kth_best
    return keep


def _top_p(scores: Logits, p: float) -> NDArray[np.bool_]:
    """Which of ``[K]`` stay: those that have less than ``p`` of probability before them, best first; at least one."""
    keep = np.ones(scores.size, dtype=bool)
    if p == 1:
        return keep
    probabilities = _softmax(scores)
    best = _best(scores, probabilities, p)
    before = np.cumsum(probabilities[best]) - probabilities[best]
    keep[:] = False
    keep[best[: max(1, int(np.count_nonzero(before < p)))]] = True
    return keep


def _best(scores: Logits, probabilities: NDArray[np.float64], mass: float) -> NDArray[np.int64]:
    """Indices of the most likely tokens of ``[K]``, best first: enough of them to hold ``mass``."""
    count = _FIRST_GUESS
    while count < scores.size:
        top = np.argpartition(scores, scores.size - count)[-count:]
        if probabilities[top].sum() >= mass:
            return top[np.argsort(-scores[top])]
        count *= 4
    return np.argsort(-scores)


def _min_p(scores: Logits, p: float) -> NDArray[np.bool_]:
    """Which of ``[K]`` stay: those at least ``p`` times as likely as the best one."""
    if p == 0:
        return np.ones(scores.size, dtype=bool)
    probabilities = _softmax(scores)
    keep: NDArray[np.bool_] = probabilities >= p * probabilities.max()
    return keep


def _softmax(scores: Logits) -> NDArray[np.float64]:
    """Probabilities ``[K]``, in float64: their sums decide which tokens stay."""
    weights = np.exp(scores.astype(np.float64) - scores.max())
    probabilities: NDArray[np.float64] = weights / weights.sum()
    return probabilities


def _check_finite(scores: Logits) -> None:
    best = scores.max()  # one pass: NaN wins every comparison of max
    if np.isfinite(best):
        return
    if np.isnan(best):
        count = int(np.isnan(scores).sum())
        raise SamplingError(f"{count} of the {scores.size} logits are NaN: did the model overflow its precision?")
    if best > 0:
        raise SamplingError(f"the logit of token {scores.argmax()} is infinite: did the model overflow its precision?")
    raise SamplingError("every logit is -inf: no token is left to choose")


__all__ = ["Sampler", "SamplingConfig", "SamplingError"]
