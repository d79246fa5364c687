"""`mesart inspect`: what a bundle holds."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mesart.graphs.bundle.manifest import Manifest
from mesart.scripts import streams
from mesart.scripts.options import add_command, filled


def add(commands: Any) -> None:
    parser = add_command(commands, "inspect", _run, "Print what a bundle holds.")
    parser.add_argument("bundle", type=filled)
    parser.add_argument("--json", action="store_true", help="the manifest itself")
    parser.add_argument("--verify", action="store_true", help="check the SHA-256 of every file")
    parser.add_argument(
        "--digest", action="store_true", help="one line that names this bundle and no other, for `generate --digest`"
    )


def _run(options: argparse.Namespace) -> int:
    bundle = Path(options.bundle)
    manifest = Manifest.read(bundle)
    manifest.verify(bundle, contents=options.verify or options.digest)
    if options.verify or options.digest:
        for engine in (engine for built in manifest.engines for engine in built.engines):
            engine.read(bundle)
    if options.digest:
        streams.write(f"{manifest.digest}\n")
        return 0
    streams.write(manifest.to_json() if options.json else f"{summary(bundle, manifest)}\n")
    return 0


def summary(bundle: Path, manifest: Manifest) -> str:
    """A bundle in a few readable lines."""
    config, size = manifest.config, sum(info.bytes for info in manifest.files.values())
    layer, stairs = manifest.layers[0], config.chunk_length > 0  # it is chunks that are placed on stairs
    lines = [
        f"{bundle}: {manifest.model['architecture']}, {manifest.model['parameters']:,} parameters, {manifest.dtype}",
        f"  trained on {config.train_length} tokens, exported for {manifest.max_tokens}; {size / 1e6:.1f} MB on disk",
        *([f"  linear layers in {manifest.quantisation}"] if manifest.quantisation else []),
        *_shared_files(bundle, manifest),
        f"  {len(manifest.layers)} layers, {layer.kv_heads} key-value heads of {layer.key_size}, "
        f"vocabulary {manifest.model['vocab_size']:,}",
        f"  {config.described()}",
        f"  {len(manifest.graphs)} graphs: " + ", ".join(sorted({graph.kind for graph in manifest.graphs})),
        "",
        f"  {'chunks':>6}  {'up to tokens':>12}" + "  stair width" * stairs,
    ]
    lines += [f"  {b.chunks:>6}  {b.max_tokens:>12,}" + f"  {b.stair_width:>11}" * stairs for b in manifest.buckets]
    if manifest.engines:
        lines.append("")
    for built in manifest.engines:
        size = sum(engine.bytes for engine in built.engines)
        lines.append(
            f"  {built.flavour} {built.version} for {', '.join(built.compute_capabilities)}: {len(built.engines)} "
            f"engines, layout {built.layout}, weights {built.weights}, {size / 1e6:.1f} MB"
        )
    made = ", ".join(f"{name} {version}" for name, version in manifest.tools.items())
    return "\n".join([*lines, "", f"  made by {made}"])


def _shared_files(bundle: Path, manifest: Manifest) -> list[str]:
    """Weight files that are the checkpoint's too: whoever writes into those changes the bundle."""
    paths = [bundle / name for name in manifest.weight_files]
    shared = [path.name for path in paths if path.is_file() and path.stat().st_nlink > 1]
    return [f"  shared with another folder (hard links): {', '.join(shared)}"] if shared else []


__all__ = ["add", "summary"]
