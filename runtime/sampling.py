"""From the logits of one position to the next token; of a batch's positions, to one token a row.

The processors and their order are those of transformers: repetition penalty, temperature, top-k, top-p, min-p, then a
draw. Each works on the tokens that are left, so that nothing sorts a whole vocabulary of 150,000 for one token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mesart.graphs.generation import SamplingConfig, SamplingError

Logits: TypeAlias = NDArray[np.float32]
TokenIds: TypeAlias = NDArray[np.int64]

_FIRST_GUESS: Final = 1024  # how many tokens top-p sorts at first: a trained model's nucleus is seldom larger
_FOLDS: Final = 16  # top-k looks at the best of so many tokens first
_BLOCK: Final = 512  # a draw finds the block of tokens before the token


class Sampler:
    """Chooses the tokens of one text. Holds its random state, and which tokens the text has.

    Two samplers with the same config and seed, told of the same tokens, choose the same tokens.
    """

    def __init__(self, config: SamplingConfig) -> None:
        self.config = config
        self._random = np.random.Generator(np.random.PCG64(config.seed))
        self._known: set[int] = set()
        self._seen: TokenIds = np.empty(0, dtype=np.int64)  # the same ids, as an index

    @property
    def takes_argmax(self) -> bool:
        """Whether the largest logit wins as it is: greedy, and no tokens are penalised."""
        return self.config.temperature == 0 and self.config.repetition_penalty == 1

    def note(self, ids: Iterable[int] | TokenIds) -> None:
        """Tell of tokens that the text has got: its prompt once, then each token that joins it, chosen ones included.

        Only a repetition penalty reads them; without one this does nothing.

        Args:
            ids: token ids, in any order; ids that were noted before change nothing.

        Raises:
            ValueError: a negative id. None of ``ids`` is noted then.
        """
        if self.config.repetition_penalty == 1:
            return
        given: Iterable[int] = ids.tolist() if isinstance(ids, np.ndarray) else ids
        fresh = set(given) - self._known
        if not fresh:
            return
        if min(fresh) < 0:
            raise ValueError(f"the text holds the token id {min(fresh)}; ids start at 0")
        self._known |= fresh
        self._seen = np.append(self._seen, np.fromiter(fresh, dtype=np.int64, count=len(fresh)))

    def __call__(self, logits: Logits) -> int:
        """Choose the next token. It is not noted: the caller decides whether it joins the text.

        Args:
            logits: float32 ``[V]``; ``-inf`` excludes a token.

        Raises:
            SamplingError: NaN or infinity in the logits, or no token left to choose; the random state stays as it was.
        """
        scores = self._processed(logits)
        best = _argmax(scores)
        if self.config.temperature == 0:
            return best
        ids, scores = self._filtered(scores)
        index = _draw(_weights(scores), self._random.random())
        return index if ids is None else int(ids[index])

    def candidates(self, logits: Logits) -> tuple[TokenIds, Logits]:
        """The tokens that may be chosen, in order of their ids, and their processed logits.

        Args:
            logits: float32 ``[V]``.

        Returns:
            Token ids, int64 ``[K]``, and scores, float32 ``[K]``; the tokens left out have a probability of zero.

        Raises:
            SamplingError: as a call.
        """
        scores = self._processed(logits)
        _argmax(scores)
        ids, scores = (None, scores) if self.config.temperature == 0 else self._filtered(scores)
        return (np.arange(scores.size) if ids is None else ids), scores

    def _processed(self, logits: Logits) -> Logits:
        """Scores ``[V]``: the logits after repetition penalty and temperature, which leave every token in."""
        scores = np.asarray(logits, dtype=np.float32)
        if scores.ndim != 1 or scores.size == 0:
            raise ValueError(f"logits have the shape {list(scores.shape)}; one position's, [vocabulary], are expected")
        with np.errstate(over="ignore"):  # -inf excludes a token, as it should; _argmax refuses infinity
            if self._seen.size:
                scores = _penalise(scores, self._seen, self.config.repetition_penalty)
            if self.config.temperature not in (0, 1):
                scores = scores / np.float32(self.config.temperature)
        return scores

    def _filtered(self, scores: Logits) -> tuple[TokenIds | None, Logits]:
        """Token ids ``[K]``, in order, and scores ``[K]`` of the tokens that the filters keep; ``None``: all ids."""
        config = self.config
        ids: TokenIds | None = None
        if 0 < config.top_k < scores.size:
            ids = _top_k(scores, config.top_k)
            scores = scores[ids]
        if config.top_p < 1:
            kept = _top_p(scores, config.top_p)
            ids, scores = kept if ids is None else ids[kept], scores[kept]
        if config.min_p > 0:
            kept = np.flatnonzero(_weights(scores) >= config.min_p)  # the best token's weight is 1
            ids, scores = kept if ids is None else ids[kept], scores[kept]
        return ids, scores


@dataclass(frozen=True)
class Choices:
    """What :func:`choose_tokens` found: each row has a token or an error, or had no sampler."""

    tokens: TokenIds
    """int64 ``[B]``; -1 in rows that have none."""
    errors: Mapping[int, SamplingError]
    """Why a row has no token, by row: one text's logits may be broken while the others go on."""


def choose_tokens(logits: Logits, samplers: Sequence[Sampler | None]) -> Choices:
    """Choose the next token of each row: the one that the row's sampler chooses alone.

    Args:
        logits: float32 ``[B, V]``.
        samplers: of each row; ``None`` for a row that gets no token. They advance as by calls of their own.

    Raises:
        ValueError: another shape, or not one sampler a row.
    """
    logits = np.asarray(logits, dtype=np.float32)
    if logits.ndim != 2 or logits.shape[1] == 0 or logits.shape[0] != len(samplers):
        raise ValueError(
            f"logits have the shape {list(logits.shape)}; [{len(samplers)}, vocabulary] is expected, a row a sampler"
        )
    tokens = np.full(len(samplers), -1, dtype=np.int64)
    errors: dict[int, SamplingError] = {}
    waiting = {row: sampler for row, sampler in enumerate(samplers) if sampler is not None}
    # Other rows take their turns one by one: a partition or exp of the whole array is no faster than of its rows.
    if all(sampler.takes_argmax for sampler in waiting.values()):
        best = logits.argmax(axis=1)
        sound = np.isfinite(logits[np.arange(len(samplers)), best])  # as in _argmax
        for row in [row for row in waiting if sound[row]]:
            tokens[row] = best[row]
            del waiting[row]
    for row, sampler in waiting.items():
        try:
            tokens[row] = sampler(logits[row])
        except SamplingError as error:
            errors[row] = error
    return Choices(tokens, errors)


def _argmax(scores: Logits) -> int:
    """The index of the best of ``[V]``, the first of those that tie.

    Raises:
        SamplingError: NaN or infinity among them, or all are -inf.
    """
    best = int(scores.argmax())  # one pass that also checks: NaN wins every comparison of argmax
    value = scores[best]
    if np.isfinite(value):
        return best
    if np.isnan(value):
        count = int(np.isnan(scores).sum())
        raise SamplingError(f"{count} of the {scores.size} logits are NaN: did the model overflow its precision?")
    if value > 0:
        raise SamplingError(f"the logit of token {best} is infinite: did the model overflow its precision?")
    raise SamplingError("every logit is -inf: no token is left to choose")


def _penalise(scores: Logits, seen: TokenIds, penalty: float) -> Logits:
    """Scores ``[V]`` with the seen tokens, each once in ``seen``, made less likely."""
    seen = seen[seen < scores.size]  # an embedding may be padded past the vocabulary
    before = scores[seen]
    penalised: Logits = scores.copy()
    penalised[seen] = np.where(before < 0, before * np.float32(penalty), before / np.float32(penalty))
    return penalised


def _top_k(scores: Logits, k: int) -> TokenIds:
    """Indices of those of ``[V]`` that stay, in order: as transformers, all that tie with the k-th best."""
    if k >= scores.size:
        return np.arange(scores.size)
    columns = scores.size // _FOLDS
    if k > columns:
        return np.flatnonzero(scores >= _kth_best(scores, k))
    # The k best columns hold a token each that reaches the k-th best column's best: no token below it can stay.
    folded = scores[: _FOLDS * columns].reshape(_FOLDS, columns).max(axis=0)
    near = np.flatnonzero(scores >= _kth_best(folded, k))
    return near[scores[near] >= _kth_best(scores[near], k)]


def _kth_best(scores: Logits, k: int) -> np.float32:
    best: np.float32 = np.partition(scores, scores.size - k)[scores.size - k]
    return best


def _top_p(scores: Logits, p: float) -> TokenIds:
    """Indices of those of ``[K]`` that stay, in order: those with less than ``p`` of probability before them, best
    first; at least one."""
    weights = _weights(scores)
    total = weights.sum(dtype=np.float64)
    count = _FIRST_GUESS
    best = _top_k(scores, count)
    while best.size < scores.size and weights[best].sum(dtype=np.float64) < p * total:
        count *= 4
        best = _top_k(scores, count)
    best = best[np.argsort(-scores[best], kind="stable")]
    probabilities = weights[best] / total
    before = np.cumsum(probabilities) - probabilities
    return np.sort(best[: max(1, int(np.count_nonzero(before < p)))])


def _weights(scores: Logits) -> Logits:
    """Probabilities ``[K]`` relative to that of the best token. What sums them does so in float64: the sums decide."""
    weights: Logits = np.exp(scores - scores.max())
    return weights


def _draw(weights: Logits, random: float) -> int:
    """An index of ``[K]``, each as likely as its weight says.

    Args:
        weights: float32 ``[K]``, not all zero.
        random: from 0 up to, and without, 1.
    """
    blocks = np.cumsum(np.add.reduceat(weights, np.arange(0, weights.size, _BLOCK), dtype=np.float64))
    drawn = blocks[-1] * (1 - random)  # above 0 and up to the sum: no impossible token is hit
    block = int(np.searchsorted(blocks, drawn))
    inside = np.cumsum(weights[block * _BLOCK : (block + 1) * _BLOCK], dtype=np.float64)
    rest = drawn - (blocks[block - 1] if block else 0)
    # The two sums of a block may differ in rounding: what is past its last token means that token.
    return block * _BLOCK + int(np.searchsorted(inside, min(rest, inside[-1])))


__all__ = ["Choices", "Sampler", "SamplingConfig", "SamplingError", "choose_tokens"]
