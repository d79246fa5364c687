"""What names a chunk's keys and values: all that they follow from, and nothing else.

A chunk sees the head and itself, at local positions. So neither the chunk's place in a prompt nor the numbers of the
method (C, E, N, log-n) are part of its name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from mesart.graphs.bundle.manifest import Manifest

_FORMAT = 1
"""Changes whenever entries of older versions may not be used any more."""


def fingerprint(manifest: Manifest, graphs: Iterable[str], computed_by: Sequence[str]) -> str:
    """Names whatever computes keys and values: weights and position table, graphs, and what runs them.

    Args:
        manifest: of the bundle.
        graphs: hashes of the graphs, or engines, that compute heads and chunks.
        computed_by: what else their last bits depend on: backend, rounding of activations.
    """
    parts = {
        "format": _FORMAT,
        "dtype": manifest.dtype,
        "quantisation": None if manifest.quantisation is None else asdict(manifest.quantisation),
        "weights": sorted(manifest.files[name].sha256 for name in manifest.weight_files),
        "graphs": sorted(graphs),
        "computed_by": list(computed_by),
    }
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=32).hexdigest()


def head_key(fingerprint: str, head: NDArray[np.int64], salt: str = "") -> str:
    """The name of a head's keys and values, 64 hexadecimal digits. ``salt`` keeps what users store apart."""
    return _key(fingerprint, salt, "head", head)


def chunk_key(fingerprint: str, head: NDArray[np.int64], chunk: NDArray[np.int64], salt: str = "") -> str:
    """The name of a chunk's keys and values behind a head, 64 hexadecimal digits."""
    return _key(fingerprint, salt, "chunk", head, chunk)


def _key(*parts: str | NDArray[np.int64]) -> str:
    name = hashlib.blake2b(digest_size=32)
    for part in parts:
        content = (
            part.encode("utf-8", "surrogatepass")
            if isinstance(part, str)
            else np.ascontiguousarray(part, "<i8").tobytes()
        )
        name.update(len(content).to_bytes(8, "little"))  # so that no two lists of parts run together to the same bytes
        name.update(content)
    return name.hexdigest()


__all__ = ["chunk_key", "fingerprint", "head_key"]
