"""The inputs of linear layers in 8-bit floating point, as PyTorch computes them: what an fp8 bundle's graphs say.

E4M3 (arXiv 2209.05433) has 4 bits of exponent, 3 of mantissa, and 448 as its largest number. A token's inputs are
divided by the largest of them, and the quotients, -1 .. 1, are rounded to multiples of :data:`UNIT`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

FP8 = torch.float8_e4m3fn

UNIT = 2.0**-8
"""What 1 in E4M3 stands for: a power of two is exact in all dtypes, and 256 is E4M3's largest."""


def rounded(inputs: Tensor) -> Tensor:
    """Inputs ``[..., in]`` as a product in 8 bits reads them, in their own dtype; a scale for each row."""
    peaks = inputs.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(inputs.dtype).tiny)
    return (inputs / peaks / UNIT).to(FP8).to(inputs.dtype) * UNIT * peaks


def round_inputs(model: nn.Module, names: Iterable[str]) -> None:
    """Makes the layers that multiply with the parameters ``names`` round what they are given, in place.

    A table of embeddings that is tied to one of them gathers its rows as before.
    """
    parameters = dict(model.named_parameters())
    weights = {id(parameters[name]) for name in names}
    for module in model.modules():
        if id(getattr(module, "weight", None)) in weights and not isinstance(module, nn.Embedding):
            module.register_forward_pre_hook(_round_first)


def _round_first(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    del module
    return (rounded(inputs[0]), *inputs[1:])


__all__ = ["FP8", "UNIT", "round_inputs", "rounded"]
