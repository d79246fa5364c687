"""Systems that need no model, so that what an evaluation makes of their answers can be told exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mesart.evaluation import passkey_eval, perplexity
from mesart.evaluation.systems import OpenSystems, Subject, System
from mesart.graphs import MesaConfig
from mesart.runtime.text import Tokenizer

DEMO_MODEL = Path(__file__).resolve().parents[2] / "evaluation" / "demo_model"
VOCABULARY = 2048


class Scripted(System):
    """Says what ``answer(prompt)`` tells it to, then ends the text; keeps the prompts that it was given."""

    engine = "none"

    def __init__(
        self, answer: Callable[[Sequence[int]], Sequence[int]] = lambda _: (), end: int = 1, tail: int = 10**9
    ) -> None:
        self._answer, self._end, self._tail = answer, end, tail
        self.prompts: list[list[int]] = []

    def prefill(self, input_ids: Sequence[int], last: int) -> NDArray[np.float32]:
        self.prompts.append(list(input_ids))
        self._rest = [*self._answer(input_ids), self._end]
        return np.stack([self._logits()] * last)

    def step(self, token: int) -> NDArray[np.float32]:
        assert token == self._rest.pop(0)
        return self._logits()

    def logits_of(self, tokens: int) -> int:
        return min(tokens, self._tail)

    def _logits(self) -> NDArray[np.float32]:
        return np.eye(VOCABULARY, dtype=np.float32)[self._rest[0]]


@pytest.fixture
def tokenizer() -> Tokenizer:
    """One with single digits, whose texts begin with a special token."""
    return Tokenizer(DEMO_MODEL)


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> Callable[..., None]:
    """``use(mesa=system, ...)``: evaluations run these systems whatever source they are given."""

    def replace(**systems: System) -> None:
        def open_systems(source: str, names: Any, backend: str, config: Any, **_: Any) -> OpenSystems:
            chosen = {name: systems[name] for name in names}
            subject = Subject(source, "bundle", MesaConfig(256), dict.fromkeys(names, "none"))
            return OpenSystems(subject, tokenizer, 1024, chosen)

        for module in (passkey_eval, perplexity):
            monkeypatch.setattr(module, "open_systems", open_systems)

    return replace
