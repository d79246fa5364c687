"""From the logits of one position to the next token.

The processors and their order are those of transformers: repetition penalty, temperature, top-k, top-p, min-p, then a
draw. Each works on the tokens that are left, so that nothing sorts a whole vocabulary of 150,000 for one token.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mesart.graphs.errors import MesaError

Logits: TypeAlias = NDArray[np.float32]
TokenIds: TypeAlias = NDArray[np.int64]

_MIN_TEMPERATURE: Final = 1e-6  # below it, dividing logits by it may overflow float32
_FIRST_GUESS: Final = 1024  # how many tokens top-p sorts at first: a trained model's nucleus is seldom larger

# What transformers also reads from generation_config.json, with the value that changes nothing.
_NOT_SUPPORTED: Final[Mapping[str, Any]] = {
    "num_beams": 1,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "bad_words_ids": [],
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
    "sequence_bias": {},
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "guidance_scale": 1,
    "watermarking_config": None,
}
_NOT_SUPPORTED_WHEN_SAMPLING: Final[Mapping[str, Any]] = {
    "top_h": None,
    "typical_p": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
}


class SamplingError(MesaError, ValueError):
    """A sampling option out of range, or logits that no token can be chosen from."""


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen. The defaults choose the most likely one (greedy).

    ================== ================================ =======================================================
    field              range                            meaning
    ================== ================================ =======================================================
    temperature        0, or at least 1e-6              logits are divided by it; 0 is greedy
    top_k              at least 0                       keep the k most likely tokens; 0 keeps all
    top_p              0 to 1                           keep the fewest tokens whose probabilities reach it
    min_p              0 to 1                           keep tokens at least this likely, relative to the best one
    repetition_penalty more than 0                      above 1, tokens of the history become less likely
    seed               at least 0, or None              None: a fresh one each time
    ================== ================================ =======================================================

    Raises:
        SamplingError: a value out of its range (also a ``ValueError``).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        warm = _is_number(self.temperature) and (self.temperature == 0 or self.temperature >= _MIN_TEMPERATURE)
        _require(warm, "temperature", self.temperature, f"0 (greedy) or at least {_MIN_TEMPERATURE}")
        _require(_is_whole(self.top_k), "top_k", self.top_k, "a whole number, 0 (keeps every token) or more")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            _require(_is_number(value) and 0 <= value <= 1, name, value, "between 0 and 1")
        positive = _is_number(self.repetition_penalty) and self.repetition_penalty > 0
        _require(positive, "repetition_penalty", self.repetition_penalty, "more than 0; 1 changes nothing")
        _require(self.seed is None or _is_whole(self.seed), "seed", self.seed, "a whole number, 0 or more, or None")

    @classmethod
    def from_generation_config(cls, values: Mapping[str, Any], seed: int | None = None) -> SamplingConfig:
        """Read the content of a ``generation_config.json`` as transformers' ``generate`` does.

        ``do_sample`` absent or false means greedy; sampling without a ``top_k`` gets transformers' default of 50. Warns
        of an option that would change the text and that is not supported here.

        Raises:
            SamplingError: a value out of its range.
        """
        sample = bool(values.get("do_sample"))
        for name, neutral in {**_NOT_SUPPORTED, **(_NOT_SUPPORTED_WHEN_SAMPLING if sample else {})}.items():
            if values.get(name) not in (None, neutral):
                warnings.warn(f"{name}={values[name]!r} of the generation config is not supported", stacklevel=2)

        def value(name: str, default: float) -> Any:
            found = values.get(name)
            return default if found is None else found

        penalty = value("repetition_penalty", 1.0)
        if not sample:
            return cls(repetition_penalty=penalty, seed=seed)
        return cls(
            temperature=value("temperature", 1.0),
            top_k=value("top_k", 50),
            top_p=value("top_p", 1.0),
            min_p=value("min_p", 0.0),
            repetition_penalty=penalty,
            seed=seed,
        )


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


def _require(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise SamplingError(f"{name} is {value}; it must be {allowed}")


def _is_whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and bool(value >= 0)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.number) and bool(np.isfinite(value))
