"""Progress without a terminal: a log that stays short."""

from __future__ import annotations

import io
import sys

import pytest

from mesart.evaluation.progress import progress_bar


@pytest.mark.parametrize(("terminal", "fewest", "most"), [(True, 1000, 10**6), (False, 0, 500)])
def test_output(terminal: bool, fewest: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    stream.isatty = lambda: terminal  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar(total=1000, desc="work") as bar:
        for index in range(1000):
            bar.set_postfix_str(f"cell {index}")
            bar.update()
    assert fewest <= len(stream.getvalue()) <= most
    assert "work: 100%" in stream.getvalue()


def test_none() -> None:
    with progress_bar(total=2, disable=True) as bar:
        bar.set_postfix_str("x")
        bar.update()
