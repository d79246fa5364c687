"""The GPUs that engines are built for: by compute capability (``sm89``), or by a card's name, which says its memory."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mesart.graphs.errors import InputError
from mesart.graphs.memory_size import GIB

_CARDS = {
    "t4": ("sm75", 16),
    "a100-40gb": ("sm80", 40),
    "a100-80gb": ("sm80", 80),
    "a10": ("sm86", 24),
    "a40": ("sm86", 48),
    "rtx3090": ("sm86", 24),
    "rtxa6000": ("sm86", 48),
    "l4": ("sm89", 24),
    "l40s": ("sm89", 48),
    "rtx4080": ("sm89", 16),
    "rtx4090": ("sm89", 24),
    "rtx6000ada": ("sm89", 48),
    "h100": ("sm90", 80),
    "h200": ("sm90", 141),
    "b200": ("sm100", 180),
    "rtx5080": ("sm120", 16),
    "rtx5090": ("sm120", 32),
    "rtxpro6000": ("sm120", 96),
    "gb10": ("sm121", 128),
}
"""Compute capability and memory in GiB, of NVIDIA's data sheets."""


@dataclass(frozen=True)
class Gpu:
    """What an engine is built for."""

    name: str
    capability: str
    """Such as ``sm89``."""
    memory: int | None
    """Bytes, if known."""

    @property
    def generation(self) -> int:
        """The compute capability as a number: 89, 120."""
        return int(self.capability.removeprefix("sm"))


def parse_gpus(names: str) -> list[Gpu]:
    """GPUs of a list such as ``sm89,rtx5090``.

    Raises:
        MesaError: a name that is neither a compute capability nor a known card.
    """
    return [_parse(name) for name in names.split(",")]


def _parse(text: str) -> Gpu:
    name = re.sub(r"[\s_]", "", text.lower())
    if re.fullmatch(r"sm\d{2,3}", name):
        return Gpu(name, name, None)
    if name not in _CARDS:
        raise InputError(
            f"unknown GPU {text.strip()!r}; give a compute capability such as sm89, or {', '.join(_CARDS)}"
        )
    capability, memory = _CARDS[name]
    return Gpu(name, capability, memory * GIB)


def local_gpu() -> Gpu | None:
    """The first GPU of this machine; ``None`` without one, without its driver or without cuda-python."""
    try:
        from cuda.bindings import runtime  # noqa: PLC0415  (only where engines are built)
    except ImportError:
        return None
    error, properties = runtime.cudaGetDeviceProperties(0)
    if int(error) != 0:
        return None
    name = properties.name.decode() if isinstance(properties.name, bytes) else str(properties.name)
    return Gpu(name.strip("\0"), f"sm{properties.major}{properties.minor}", int(properties.totalGlobalMem))


__all__ = ["Gpu", "local_gpu", "parse_gpus"]
