"""What in a bundle's folder is the bundle's own; whatever else is there, a user has put there."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, get_args

from mesart.graphs.bundle.manifest import ENGINES_FOLDER, MANIFEST_FILE, SCHEMA_VERSION, Flavour, Manifest
from mesart.graphs.errors import MesaError

BUILD_LOG = f"{ENGINES_FOLDER}/build.jsonl"

_PARTIAL = re.compile(r"\..+\.[A-Za-z0-9_]{8}\.partial|manifest\.partial|.+\.plan\.partial")
"""What a killed build may leave of a file that it was writing; the last two are of earlier versions."""

_OLDER_FIELDS = {"buckets", "config", "dtype", "files", "graphs", "layers", "max_tokens", "model", "tools"}
"""Of the manifests of all earlier schemas."""


def timing_file(flavour: Flavour) -> str:
    """Where TensorRT keeps what it has measured, in a bundle."""
    return f"{ENGINES_FOLDER}/{flavour}.timing"


def bundle_entries(bundle: Path) -> Collection[str]:
    """The files of a bundle, by their paths in it: what its manifest lists, and what builds have added.

    Raises:
        MesaError: its manifest cannot be read: it is no bundle.
    """
    try:
        manifest = Manifest.read(bundle)
        files = [*manifest.files, *(info.file for built in manifest.engines for info in built.engines)]
    except MesaError:
        older = _older_files(bundle)
        if older is None:
            raise
        files = older
    timing = [timing_file(flavour) for flavour in get_args(Flavour)]
    return {MANIFEST_FILE, *files, BUILD_LOG, *timing, *_logged(bundle), *_partials(bundle)}


def _older_files(bundle: Path) -> list[str] | None:
    """The files of a bundle of an earlier schema, which can no more be run, but replaced."""
    try:
        fields = json.loads((bundle / MANIFEST_FILE).read_text(encoding="utf-8"))
        if not isinstance(fields, dict) or not fields.keys() >= _OLDER_FIELDS:
            return None
        if type(fields.get("schema_version")) is not int or not 1 <= fields["schema_version"] < SCHEMA_VERSION:
            return None
        engines = [engine["file"] for built in fields.get("engines", []) for engine in built["engines"]]
        return [str(file) for file in [*fields["files"], *engines]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _logged(bundle: Path) -> Iterator[str]:
    """Engines that a build has finished, even if it was killed before the manifest learnt of them."""
    for entry in read_log(bundle / BUILD_LOG):
        engine = entry.get("engine")
        if isinstance(engine, dict) and isinstance(engine.get("file"), str):
            yield engine["file"]


def read_log(path: Path) -> list[dict[str, Any]]:
    """The entries of a build's log, without lines that a killed build, or a full disk, has left torn."""
    if not path.is_file():
        return []
    entries = []
    for line in path.read_bytes().splitlines():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict):
            entries.append(entry)
    return entries


def _partials(bundle: Path) -> Iterator[str]:
    for root, _, files in os.walk(bundle):
        yield from (os.path.relpath(os.path.join(root, name), bundle) for name in files if _PARTIAL.fullmatch(name))


__all__ = ["BUILD_LOG", "bundle_entries", "read_log", "timing_file"]
