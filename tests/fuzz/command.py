"""The command line of the fuzzers; status 1 if a case found a fault."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

KINDS = ("bundles", "checkpoints", "commands", "kills")


def main(arguments: Sequence[str]) -> int:
    """Runs cases of one or of several kinds, prints what came of them."""
    # Set before anything imports a library: forked processes must not miss threads, and share the machine's cores.
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    options = _parser().parse_args(arguments)
    faults = 0
    with tempfile.TemporaryDirectory(prefix="golden-") as folder:
        for target, cases in targets(options, Path(folder)):
            faults += _run(target, cases, options)
    return 1 if faults else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("kinds", nargs="+", choices=KINDS, help="of cases")
    parser.add_argument(
        "--bundle", type=Path, help="for bundles, commands: a good one (default: a small one is exported)"
    )
    parser.add_argument("--half", type=Path, help="for kills: a good float16 bundle (default: a small one is exported)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, nargs="+", default=[1000], help="of each kind")
    parser.add_argument("--only", type=int, nargs="+", metavar="INDEX", help="repeat these cases, and show them")
    parser.add_argument("--backend", default="onnxruntime", help="onnxruntime, openvino, torch; several by commas")
    parser.add_argument("--kind", default="llama", help="of bundles, see golden.KINDS; several by commas")
    parser.add_argument(
        "--traced", type=float, default=0.05, help="share of the checkpoints that are traced and compared"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="cases at a time")
    parser.add_argument("--json", type=Path, help="also write every outcome there")
    parser.add_argument(
        "--allow", nargs="+", default=[], metavar="FOLDER", help="of a case, that may be written (home)"
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="show every case")
    return parser


def targets(options: argparse.Namespace, folder: Path) -> Any:
    """The targets of a run, each with its number of cases; what needs torch is imported only then."""
    counts = dict(zip(options.kinds, options.cases + options.cases[-1:] * len(options.kinds), strict=False))
    if "bundles" in counts:
        from tests.fuzz.bundles import Bundles

        pairs = [(k, b) for k in options.kind.split(",") for b in options.backend.split(",")]
        for kind, backend in pairs:
            name = "bundles" if kind == "llama" else f"bundles of {kind}"
            yield Bundles(_good_bundle(options, folder, kind), backend, name), counts["bundles"] // len(pairs)
    if "checkpoints" in counts:
        from tests.fuzz.checkpoints import Checkpoints

        yield Checkpoints(folder / "checkpoints", options.traced), counts["checkpoints"]
    if "commands" in counts:
        from tests.fuzz.commands import Commands

        yield Commands(_good_bundle(options, folder, "llama"), folder / "commands"), counts["commands"]
    if "kills" in counts:
        from tests.fuzz.kills import Kills

        yield Kills(folder / "kills", options.half), counts["kills"]


def _good_bundle(options: argparse.Namespace, folder: Path, kind: str) -> Path:
    """One with records of engines; exported in a process of its own, which leaves no threads behind here."""
    copy = folder / kind / "with engines"
    if copy.exists():
        return copy
    bundle: Path | None = options.bundle if kind == "llama" else None
    from tests.fuzz.golden import make_bundle, with_engines
    from tests.fuzz.workers import make_in_fork

    if bundle is None:
        (folder / kind).mkdir()
        make_in_fork(lambda: make_bundle(folder / kind, kind))
        bundle = folder / kind / "bundle"
    return with_engines(bundle, copy)


def _run(target: Any, cases: int, options: argparse.Namespace) -> int:
    from tests.fuzz.workers import campaign

    target.writes = (*target.writes, *options.allow)
    target.prepare()
    indices = options.only if options.only is not None else range(cases)
    verbose = options.verbose or options.only is not None
    summary = campaign(target, options.seed, indices, options.jobs, verbose=verbose)
    print(summary.table(), flush=True)
    if options.json is not None:
        with options.json.open("a", encoding="utf-8") as file:
            file.write(summary.to_json() + "\n")
    return len(summary.faults)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
