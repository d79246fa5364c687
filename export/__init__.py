"""torch -> bundle: reads checkpoints, writes ONNX graphs and the manifest, validates them; builds engines from them."""

from mesart.export.bundle import export_model
from mesart.export.engines import build_engines
from mesart.export.triton import export_triton_repository

__all__ = ["build_engines", "export_model", "export_triton_repository"]
