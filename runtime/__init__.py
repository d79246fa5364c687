"""From a bundle to tokens: runners, keys and values, many texts at a time. Imports neither torch nor transformers."""

from mesart.runtime.backends import backend_names, present_backends
from mesart.runtime.chunk_store.store import ChunkStore
from mesart.runtime.model import MesaModel
from mesart.runtime.sampling import SamplingConfig

__all__ = ["ChunkStore", "MesaModel", "SamplingConfig", "backend_names", "present_backends"]
