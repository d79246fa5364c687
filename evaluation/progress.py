"""The progress bars of evaluations, which say little where nobody watches."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

from tqdm import tqdm

_SECONDS_IN_A_LOG = 30.0
"""Between two lines where standard error is no terminal: hours of work make a log that can still be read."""


def progress_bar(**options: Any) -> Any:
    """A bar of tqdm on standard error; ``options`` are tqdm's."""
    if sys.stderr.isatty():
        return tqdm(**options)
    bar = tqdm(**options, mininterval=_SECONDS_IN_A_LOG)
    bar.set_postfix_str = partial(bar.set_postfix_str, refresh=False)  # else each text is a line at once
    return bar


__all__ = ["progress_bar"]
