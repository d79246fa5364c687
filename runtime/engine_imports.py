"""What engines do behind one's back, and how it is kept from them: at their import, and in a forked process.

They send nothing, and leave nothing in the user's home. Both engines count their users from the moment they are
imported: they write an identifier of the machine into the home folder and look for a server to send it to. A bundle may
hold what nobody else is to know of, and machines that may not call out stumble over it.
"""

from __future__ import annotations

import ctypes
import os
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

_ORT_SWITCH: Final = "ORT_DISABLE_TELEMETRY"
_OPENVINO_TELEMETRY: Final = "openvino_telemetry"


def import_onnxruntime() -> Any:
    """The package onnxruntime, its telemetry off."""
    with _variable(_ORT_SWITCH, "1"):  # read once, by the import
        import onnxruntime  # noqa: PLC0415
    switch_off = getattr(onnxruntime, "disable_telemetry_events", None)
    if switch_off is not None:  # somebody may have imported it before
        switch_off()
    return onnxruntime


def import_openvino() -> Any:
    """The package openvino, without its telemetry: as where that package, which is one of its own, is not installed."""
    with _absent(_OPENVINO_TELEMETRY):
        import openvino  # noqa: PLC0415
    return openvino


def leave_alone_in_forks(engine: object) -> None:
    """A forked process never frees this engine: it would wait for threads that only its parent has, for ever."""
    _ENGINES.add(engine)


_ENGINES: weakref.WeakSet[object] = weakref.WeakSet()


def _never_free() -> None:
    for engine in list(_ENGINES):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(engine))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_never_free)


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """An environment variable has that value meanwhile."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def _absent(module: str) -> Iterator[None]:
    """A module cannot be imported meanwhile; one that was imported before stays as it is."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]  # the import system's sign for "not to be found"
    try:
        yield
    finally:
        del sys.modules[module]


__all__ = ["import_onnxruntime", "import_openvino", "leave_alone_in_forks"]
