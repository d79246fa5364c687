"""The `mesart` command line: thin commands over the library, and what becomes of their errors.

This module imports next to nothing: what comes later, numpy first of all, is in reach of the handlers below.
"""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mesart.scripts import streams
from mesart.scripts.signals import ending_signals

if TYPE_CHECKING:
    from mesart.graphs.bundle.manifest import Manifest

_EXTRAS = dict.fromkeys(("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors"), "export") | {
    "matplotlib": "eval",
    "auto_round": "calibrate",
}
"""The extra that installs a package which a command may lack."""

_OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|failed to allocate|bad_alloc|can't start new thread",
    re.IGNORECASE,
)
_LONGEST = 2000
"""Characters of a message; an argument may be a hundred times as long."""
_BROKEN_PIPE = 128 + 13
"""The status of a process that SIGPIPE ended, as other tools do in `mesart ... | head`."""
_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        0: done; 1: a validation failed, a store was damaged; 2: an error, told in one line; 130, 129, 143: interrupted,
        the terminal was closed, terminated; 141: the reader of its output went away.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    with streams.standard_streams(), ending_signals() as ending:
        status = _run(given)
        if ending.number is not None:
            return 128 + ending.number
    return status


def summary(bundle: Path, manifest: Manifest) -> str:
    """A bundle in a few readable lines."""
    from mesart.scripts.commands.inspection import summary  # noqa: PLC0415  (see above)

    return summary(bundle, manifest)


def _run(arguments: list[str]) -> int:
    try:
        from mesart.scripts.commands import run  # noqa: PLC0415  (see above)

        status = run(arguments)
        streams.flush()
    except BrokenPipeError:
        return _BROKEN_PIPE
    except KeyboardInterrupt:
        streams.say("mesart: interrupted")
        return _INTERRUPTED
    except Exception as error:
        reason = _reason(error)
        if reason is None:  # a fault of ours, of which all must be seen
            raise
        if len(reason) > _LONGEST:
            reason = f"{reason[: _LONGEST // 2]} ... {reason[-_LONGEST // 2 :]}"
        streams.say(f"mesart: error: {' '.join(reason.split())}")
        return 2
    return status


def _reason(error: Exception) -> str | None:
    """What to tell the user of an error; ``None`` if it is none of the user's or the machine's."""
    errors = sys.modules.get("mesart.graphs.errors")  # not imported here: that may be what failed
    if errors is not None and isinstance(error, errors.MesaError):
        return str(error)
    if isinstance(error, streams.StdoutError):
        return f"cannot write to standard output: {error.strerror}"
    no_memory = isinstance(error, OSError) and error.errno == errno.ENOMEM
    if isinstance(error, MemoryError) or no_memory or _is_out_of_memory(error):
        return f"out of memory: {str(error) or 'Python could not allocate more'}"
    if isinstance(error, ImportError):
        return _missing(error)
    if isinstance(error, OSError):
        where = "" if error.filename is None else f"{error.filename}: "
        return f"{where}{error.strerror or error}"
    return None


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, RuntimeError | ImportError) and _OUT_OF_MEMORY.search(str(error)) is not None


def _missing(error: ImportError) -> str | None:
    package = (error.name or "").partition(".")[0]
    if package == "mesart":
        return None
    if isinstance(error, ModuleNotFoundError):
        if package not in _EXTRAS:
            return None
        return f"this needs {package}: pip install 'mesart[{_EXTRAS[package]}]'"
    return f"{package or 'a package'} cannot be imported: {error}"


if __name__ == "__main__":
    sys.exit(main())
