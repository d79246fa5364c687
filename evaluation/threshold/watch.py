"""Measurement of the threshold probe: hidden states and losses of the same tokens behind longer and longer texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from mesart.evaluation.threshold.crossing import Array
from mesart.graphs.errors import InputError
from mesart.graphs.method.config import MesaConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

_BATCH: Final = 8
"""WatchedTexts that are run at a time."""


@dataclass(frozen=True)
class ProbedModel:
    """A model under some method."""

    module: nn.Module
    """What holds the layers that are watched while it runs."""
    run: Callable[[Tensor, int], Tensor]
    """Token ids ``[B, T]`` and a count to the logits of the last tokens, ``[B, count, V]``."""


@dataclass(frozen=True)
class WatchedTexts:
    """WatchedTexts that end at the same places, whatever their length."""

    stream: Sequence[int]
    ends: Sequence[int]
    prefix: Sequence[int]

    def of(self, length: int) -> list[list[int]]:
        return [[*self.prefix, *self.stream[end - length + len(self.prefix) : end]] for end in self.ends]


def mesa_runner(model: nn.Module, config: MesaConfig) -> tuple[ProbedModel, MesaConfig]:
    from mesart.graphs.model.reference import TorchReference  # noqa: PLC0415  (torch only where it is needed)

    config = config.for_model(model)
    reference = TorchReference(model, config)

    def run(ids: Tensor, last: int) -> Tensor:
        logits = reference.prefill(ids, all_logits=True)
        if logits.shape[1] < last:
            raise InputError(
                f"Mesa's tail of a text of {ids.shape[1]} tokens is {logits.shape[1]} tokens, and {last} are needed; "
                "watch fewer tokens, or raise tail_min"
            )
        return logits[:, -last:]

    return ProbedModel(reference.module.model, run), replace(config, short_length=reference.config.short_length)


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The decoder's layers: the outermost list of as many modules as the config says."""
    from torch import nn  # noqa: PLC0415

    config: Any = model.config
    count = int(config.get_text_config().num_hidden_layers)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise InputError(f"{type(model).__name__} keeps its {count} layers in no list; its hidden states cannot be watched")


@contextmanager
def _tapped(module: nn.Module, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """What the layers gave in the latest run: of a method that cuts the text, in the run of its end."""
    latest: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            latest[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    blocks = blocks_of(module)
    handles = [blocks[layer - 1].register_forward_hook(keep(layer)) for layer in layers]
    try:
        yield latest
    finally:
        for handle in handles:
            handle.remove()


def watch(
    runner: ProbedModel, texts: WatchedTexts, lengths: Sequence[int], layers: Sequence[int], tokens: int, bar: Any
) -> tuple[Array, Array]:
    """Means over the last tokens of each text: hidden states ``[N, P, L, H]``, losses ``[N, P]``."""
    import torch  # noqa: PLC0415
    from torch.nn.functional import cross_entropy  # noqa: PLC0415

    states, losses = [], []
    with torch.inference_mode(), _tapped(runner.module, layers) as latest:
        for length in lengths:
            ids = torch.tensor(texts.of(length))
            rows, costs = [], []
            for batch in torch.split(ids, _BATCH):
                logits = runner.run(batch, tokens + 1)[:, :-1].float()
                loss = cross_entropy(logits.transpose(1, 2), batch[:, -tokens:], reduction="none")
                costs.append(loss.double().mean(1))
                rows.append(torch.stack([latest[layer][:, -tokens:].double().mean(1) for layer in layers], 1))
                bar.update(batch.numel())
            states.append(torch.cat(rows).numpy())
            losses.append(torch.cat(costs).numpy())
    return np.stack(states, 1), np.stack(losses, 1)


__all__ = ["ProbedModel", "WatchedTexts", "blocks_of", "mesa_runner", "watch"]
