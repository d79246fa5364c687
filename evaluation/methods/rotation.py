"""Rotary embeddings at real-valued positions: the frequencies of a model's table, and the rotation itself."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mesart.evaluation.methods.method import Positions
from mesart.graphs.method.frequencies import table_frequencies
from mesart.graphs.model.rotary import LayerSpec

Angles = tuple[Tensor, Tensor]
"""cos and sin, float32 ``[N, R / 2]``."""


def frequencies(table: tuple[Tensor, Tensor], layer: LayerSpec) -> Positions:
    """Radians a position by which the pairs of a layer's rotary dimensions rotate, float64 ``[R / 2]``.

    Read off the model's own table, so that whatever scaling the model was tuned with (llama3, YaRN, LongRoPE) is in
    them. A scale of the table needs no care: it is in the queries and keys that the model hands over.

    Raises:
        MesaError: the angles of the table are not proportional to the position.
    """
    cos, sin = (x.double().numpy() for x in table)
    half = layer.rotary_dim // 2
    if cos.shape[-1] != half:
        # Each angle twice: as halves, or (and that only for interleaved pairs) next to each other.
        neighbours = layer.layout == "interleaved" and np.array_equal(cos[:, 0::2], cos[:, 1::2])
        cos, sin = (x[:, 0::2] if neighbours else x[:, :half] for x in (cos, sin))
    scale = np.hypot(cos, sin)
    angles = table_frequencies(cos / scale, sin / scale)
    return -angles if layer.backwards else angles


def angles_of(positions: Positions, radians: Positions, device: torch.device, scale: float = 1.0) -> Angles:
    """cos and sin of real-valued positions, computed in float64, times ``scale``."""
    turns = torch.from_numpy(np.outer(positions, radians))
    return (turns.cos() * scale).float().to(device), (turns.sin() * scale).float().to(device)


def turn(x: Tensor, angles: Angles, layer: LayerSpec) -> Tensor:
    """Queries or keys ``[1, H, N, D]``, turned by a row of angles each; computed in float32, in the dtype of ``x``."""
    cos, sin = angles
    first, stop = layer.first, layer.first + layer.rotary_dim
    rotary = x[..., first:stop].float()
    if layer.layout == "half":
        left, right = rotary.chunk(2, dim=-1)
        turned = torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
    else:
        left, right = rotary[..., 0::2], rotary[..., 1::2]
        turned = torch.stack((left * cos - right * sin, right * cos + left * sin), dim=-1).flatten(-2)
    if layer.rotary_dim == x.shape[-1]:
        return turned.to(x.dtype)
    return torch.cat((x[..., :first], turned.to(x.dtype), x[..., stop:]), dim=-1)
