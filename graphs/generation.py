"""What ``generation_config.json`` says: how the next token is chosen, and which tokens end a text.

It is the checkpoint's, and reaches the bundle as it is: export names the settings that nothing here follows, the
runtime follows the others.
"""

from __future__ import annotations

import reprlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from mesart.graphs.errors import InputError, MesaError

GENERATION_FILE: Final = "generation_config.json"

_MIN_TEMPERATURE: Final = 1e-6  # below it, dividing logits by it may overflow float32
_FACTORS: Final = (1e-6, 1e6)  # what float32 logits can be multiplied with
_MOST_IDS: Final = 1 << 31

# What transformers also reads from generation_config.json, with the value that changes nothing.
_NOT_SUPPORTED: Final[Mapping[str, Any]] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1,
    "penalty_alpha": 0,
    "dola_layers": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "bad_words_ids": [],
    "force_words_ids": [],
    "constraints": [],
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
    "sequence_bias": {},
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "forced_decoder_ids": None,
    "exponential_decay_length_penalty": None,
    "guidance_scale": 1,
    "watermarking_config": None,
    "stop_strings": [],
    "max_time": None,
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
    temperature        0, or 1e-6 to 1e6                logits are divided by it; 0 is greedy
    top_k              at least 0                       keep the k most likely tokens; 0 keeps all
    top_p              0 to 1                           keep the fewest tokens whose probabilities reach it
    min_p              0 to 1                           keep tokens at least this likely, relative to the best one
    repetition_penalty 1e-6 to 1e6                      above 1, tokens of the history become less likely
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
        low, high = _FACTORS
        warm = _is_within(self.temperature, 0, 0) or _is_within(self.temperature, _MIN_TEMPERATURE, high)
        _require(
            warm, "temperature", self.temperature, f"0 (greedy) or at least {_MIN_TEMPERATURE}, and no more than {high}"
        )
        _require(_is_whole(self.top_k), "top_k", self.top_k, "a whole number, 0 (keeps every token) or more")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            _require(_is_within(value, 0, 1), name, value, "between 0 and 1")
        penalty = self.repetition_penalty
        allowed = f"more than 0, between {low} and {high}; 1 changes nothing"
        _require(_is_within(penalty, low, high), "repetition_penalty", penalty, allowed)
        _require(self.seed is None or _is_whole(self.seed), "seed", self.seed, "a whole number, 0 or more, or None")

    @classmethod
    def from_generation_config(cls, values: Mapping[str, Any], seed: int | None = None) -> SamplingConfig:
        """Read the content of a ``generation_config.json`` as transformers' ``generate`` does.

        ``do_sample`` absent or false means greedy; sampling without a ``top_k`` gets transformers' default of 50. Warns
        of an option that would change the text and that is not supported here.

        Raises:
            SamplingError: a value out of its range, or of another type.
        """
        for setting in unsupported_settings(values):
            warnings.warn(f"{setting} of the generation config is not supported", stacklevel=2)

        def value(name: str, default: float) -> Any:
            found = values.get(name)
            return default if found is None else found

        penalty = value("repetition_penalty", 1.0)
        if not _samples(values):
            return cls(repetition_penalty=penalty, seed=seed)
        return cls(
            temperature=value("temperature", 1.0),
            top_k=value("top_k", 50),
            top_p=value("top_p", 1.0),
            min_p=value("min_p", 0.0),
            repetition_penalty=penalty,
            seed=seed,
        )


def unsupported_settings(values: Mapping[str, Any]) -> list[str]:
    """Settings of a ``generation_config.json`` that would change the text and that nothing here follows, as
    ``name=value``."""
    known = {**_NOT_SUPPORTED, **(_NOT_SUPPORTED_WHEN_SAMPLING if _samples(values) else {})}
    found = [name for name, neutral in known.items() if values.get(name) not in (None, neutral)]
    return [f"{name}={_short(values[name])}" for name in found]


def eos_ids(values: Mapping[str, Any], where: str) -> tuple[int, ...]:
    """The ids of ``eos_token_id``, each once; empty if there is none.

    Raises:
        MesaError: it is something else than a token id or a list of token ids; names ``where`` it stands.
    """
    found = values.get("eos_token_id")
    if found is None:
        return ()
    ids = found if isinstance(found, list) else [found]
    if not all(type(index) is int and 0 <= index < _MOST_IDS for index in ids):
        raise InputError(f"{where}: eos_token_id is {_short(found)}; it must be a token id or a list of token ids")
    return tuple(dict.fromkeys(ids))


def _samples(values: Mapping[str, Any]) -> bool:
    sample = values.get("do_sample")
    _require(sample is None or isinstance(sample, bool), "do_sample", sample, "true or false")
    return bool(sample)


def _require(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise SamplingError(f"{name} is {_short(value)}; it must be {allowed}")


def _short(value: object) -> str:
    return value if isinstance(value, str) and len(value) < 60 else reprlib.repr(value)


def _is_whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and bool(value >= 0)


def _is_within(value: object, low: float, high: float) -> bool:
    """Whether it is a number of this range; NaN is in none, a truth value is no number."""
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and bool(low <= value <= high)


__all__ = ["GENERATION_FILE", "SamplingConfig", "SamplingError", "eos_ids", "unsupported_settings"]
