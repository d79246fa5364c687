"""A bundle on an engine, as its users run it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mesart.evaluation.systems.system import System
from mesart.graphs.errors import InputError
from mesart.graphs.method.plan import Plan
from mesart.runtime.model import MesaModel


class BundleSystem(System):
    """The method that a bundle holds; Mesa, unless it was exported to be compared with."""

    def __init__(self, model: MesaModel) -> None:
        self._model = model
        self.engine = f"{model.backend} on {model.device}, {model.manifest.dtype}"

    def prefill(self, input_ids: Sequence[int], last: int) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = self._model.prefill(input_ids, all_logits=last > 1)
        return logits[0, -last:]

    def step(self, token: int) -> NDArray[np.float32]:
        row: NDArray[np.float32] = self._model.step(token)[0, -1]
        return row

    def logits_of(self, tokens: int) -> int:
        limit = self._model.max_tokens
        if tokens > limit:
            raise InputError(
                f"a prompt of {tokens} tokens is longer than the largest bucket of this bundle, {limit} tokens; "
                f"stay below, or export again with --max-tokens {tokens}"
            )
        return len(Plan.of(self._model.manifest.config, tokens).tail)

    def close(self) -> None:
        self._model.close()


__all__ = ["BundleSystem"]
