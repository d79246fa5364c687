"""The options of verbs that load a bundle and keep what it computes, and the loading."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from mesart.scripts.options import add_backend, add_trust, filled, memory, threads

if TYPE_CHECKING:
    from mesart.runtime import ChunkStore, MesaModel


def add_loading(parser: argparse.ArgumentParser) -> None:
    """What :func:`load` takes."""
    add_backend(parser)
    parser.add_argument("--threads", type=threads)
    parser.add_argument(
        "--activations", choices=("int8",), help="round them before quantised weights: docs/decoding.md"
    )
    parser.add_argument(
        "--kv-memory",
        type=memory,
        metavar="SIZE",
        help="that keys and values may take, such as 2GiB; 3/4 of what is free",
    )
    parser.add_argument(
        "--kv-dtype", choices=("float16",), help="keep keys and values so, on OpenVINO: docs/decoding.md"
    )
    parser.add_argument(
        "--digest", type=filled, metavar="SHA256", help="refuse any other bundle; see `mesart inspect --digest`"
    )
    add_trust(parser, "the bundle, with --backend torch")


def add_store_sizes(parser: argparse.ArgumentParser) -> None:
    """What :func:`open_store` takes beside the folder."""
    parser.add_argument("--store-memory", type=memory, metavar="SIZE", help="of the store, in memory; 2GiB")
    parser.add_argument("--store-disk", type=memory, metavar="SIZE", help="of the store's folder; 20GiB")
    parser.add_argument("--cache-salt", type=filled, metavar="TEXT", help="only who gives the same finds what is kept")


def load(options: argparse.Namespace, store: ChunkStore | None = None) -> MesaModel:
    """The model of ``options.bundle``."""
    from mesart.runtime import MesaModel  # noqa: PLC0415  (slow to import)

    return MesaModel.load(
        options.bundle,
        options.backend,
        threads=options.threads,
        digest=options.digest,
        trust_remote_code=options.trust_remote_code,
        activations=options.activations,
        kv_memory=options.kv_memory,
        kv_dtype=options.kv_dtype,
        store=store,
    )


def open_store(options: argparse.Namespace, path: str) -> ChunkStore:
    """The store in a folder, which is made if it is not there."""
    from mesart.runtime import ChunkStore  # noqa: PLC0415  (slow to import)

    sizes = {"memory": options.store_memory, "disk": options.store_disk}
    return ChunkStore(path=path, **{name: size for name, size in sizes.items() if size is not None})


__all__ = ["add_loading", "add_store_sizes", "load", "open_store"]
