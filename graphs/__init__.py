"""What is computed: plans, Stair position encoding, the module that computes every phase, the PyTorch reference.

What needs torch (``TorchReference``) is imported when first asked for, so that the runtime, which needs the config, the
plan and the manifest only, stays free of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mesart.graphs.errors import BundleError, CapacityError, EngineError, InputError, MesaError
from mesart.graphs.method.config import MesaConfig
from mesart.graphs.method.plan import Bucket, Plan, Span
from mesart.graphs.method.stairs import Stairs

if TYPE_CHECKING:
    from mesart.graphs.model.reference import TorchReference

__all__ = [
    "Bucket",
    "BundleError",
    "CapacityError",
    "EngineError",
    "InputError",
    "MesaConfig",
    "MesaError",
    "Plan",
    "Span",
    "Stairs",
    "TorchReference",
]


def __getattr__(name: str) -> Any:
    if name == "TorchReference":
        from mesart.graphs.model.reference import TorchReference  # noqa: PLC0415  (see above)

        return TorchReference
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
