"""torch -> bundle: reads checkpoints, writes ONNX graphs and the manifest, validates them."""

from mesart.export.bundle import export_model

__all__ = ["export_model"]
