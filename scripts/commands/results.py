"""What all measuring commands do with a result: a table for people, JSON for machines, a picture."""

from __future__ import annotations

import argparse
from typing import Any

from mesart.graphs.errors import InputError
from mesart.scripts import streams


def require_outputs(options: argparse.Namespace) -> None:
    """Finds out before hours of work, not after, that a file cannot be written or a package is missing.

    Raises:
        MesaError: says which and why.
    """
    from mesart.evaluation.output import require_file  # noqa: PLC0415  (numpy and more come with it)

    plot = getattr(options, "plot", None)
    if plot is not None:
        from mesart.evaluation.plots import picture_format  # noqa: PLC0415  (needs matplotlib)

        picture_format(plot)
        if plot == options.json:
            raise InputError(f"--json and --plot both name {plot}; each needs a file of its own")
    for path in (options.json, plot):
        if path not in (None, "-"):
            require_file(path)


def write_result(options: argparse.Namespace, result: Any) -> None:
    """The table and, where asked for, JSON; one of them on standard output."""
    if options.json == "-":
        streams.write(result.to_json())
        return
    streams.write(result.table() + "\n", flush=True)
    if options.json is not None:
        from mesart.evaluation.output import write_file  # noqa: PLC0415

        write_file(options.json, result.to_json())


__all__ = ["require_outputs", "write_result"]
