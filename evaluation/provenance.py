"""What a number depends on beside what was asked: versions of packages, the revision, the model's fingerprint."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from mesart.graphs.bundle.manifest import MANIFEST_FILE, sha256

_PACKAGES: Final = ("mesart", "numpy", "tokenizers", "onnxruntime", "openvino", "torch", "transformers")

_FINGERPRINTED: Final = 1 << 20
"""Bytes of the beginning of each weight file that tell models apart."""


def versions(packages: Iterable[str] = _PACKAGES) -> dict[str, str]:
    """Versions of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def revision() -> str | None:
    """The git revision of this code, where it lies in a repository."""
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).resolve().parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def fingerprint(source: str) -> str:
    """Tells models apart without reading all weights.

    A bundle by its manifest, which has the hash of every file; a checkpoint by its config, and size and beginning of
    each weight file.
    """
    folder = Path(source)
    if (folder / MANIFEST_FILE).is_file():
        return sha256(folder / MANIFEST_FILE)
    if not folder.is_dir():
        return source  # a hub id
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        digest.update(f"{file.name} {file.stat().st_size}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(_FINGERPRINTED))
    return digest.hexdigest()


__all__ = ["fingerprint", "revision", "versions"]
