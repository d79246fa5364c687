"""Intervals, tables, texts and pictures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mesart.evaluation
from mesart.evaluation import PasskeyResult
from mesart.evaluation.bench import BenchResult
from mesart.evaluation.corpus import library_documents
from mesart.evaluation.held_out import held_out_text
from mesart.evaluation.passkey_eval import PasskeyCell
from mesart.evaluation.report import table, wilson_interval
from mesart.evaluation.result import Result
from mesart.evaluation.systems import Subject
from mesart.evaluation.tasks.passkey import FILLERS
from mesart.evaluation.validate import Validation
from mesart.graphs import MesaConfig, MesaError


@pytest.mark.parametrize(  # R. G. Newcombe, Statistics in Medicine 17 (1998), table I, method 3
    ("correct", "count", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_published_intervals(correct: int, count: int, low: float, high: float) -> None:
    assert wilson_interval(correct, count) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 10_000).flatmap(lambda count: st.tuples(st.integers(0, count), st.just(count))))
def test_intervals_hold_the_rate(seen: tuple[int, int]) -> None:
    correct, count = seen
    low, high = wilson_interval(correct, count)
    assert 0 <= low <= correct / count <= high <= 1
    assert wilson_interval(count - correct, count) == pytest.approx((1 - high, 1 - low))


@given(st.integers(1, 5).flatmap(lambda n: st.lists(st.lists(st.text("ab1", max_size=9), min_size=n, max_size=n))))
def test_tables_are_aligned_markdown(rows: list[list[str]]) -> None:
    header = [f"h{i}" for i in range(len(rows[0]) if rows else 2)]
    lines = table(header, rows).splitlines()
    assert len({len(line) for line in lines}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [cells[0], *cells[2:]] == [header, *rows]
    assert all(set(cell) == {"-", ":"} for cell in cells[1])


def test_held_out_text() -> None:
    text = held_out_text()
    assert library_documents("held_out")[0] in text.content
    assert library_documents("train")[0] not in text.content
    assert text.record()["characters"] == len(text.content)


def test_bad_texts(tmp_path: Path) -> None:
    file = tmp_path / "text"
    with pytest.raises(MesaError, match="No such file"):
        held_out_text(file)
    with pytest.raises(MesaError, match="Is a directory"):
        held_out_text(tmp_path)
    file.write_bytes(b"word " * 300 + b"\xff")
    with pytest.raises(MesaError, match="no UTF-8 text .*byte 1500"):
        held_out_text(file)
    file.write_text("word " * 199)
    with pytest.raises(MesaError, match="holds 199 words .* at least 200"):
        held_out_text(file)


def test_plots(tmp_path: Path) -> None:
    """Any number of lengths and fillers, lengths on both sides of the window."""
    subject = Subject("x", "bundle", MesaConfig(256), {"mesa": "none", "origin": "none"})
    for fillers in (FILLERS, FILLERS[:1]):
        cells = tuple(
            PasskeyCell(system, length, filler, None, 10, 7, ())
            for system in subject.engines
            for length in range(100, 4000, 100)
            for filler in fillers
        )
        result = PasskeyResult(subject, 0, 10, 5, None, cells, True, 1.0)
        result.plot(tmp_path / "plot.png")
        assert (tmp_path / "plot.png").stat().st_size > 10_000
    with pytest.raises(MesaError, match=r"cannot write the picture .*plot\.sound"):
        result.plot(tmp_path / "plot.sound")
    with pytest.raises(MesaError, match=r"cannot write the picture .*No such file"):
        result.plot(tmp_path / "missing" / "plot.png")


def test_results_have_one_base() -> None:
    names = [name for name in mesart.evaluation.__all__ if name.endswith("Result")]
    assert len(names) == 7
    for kind in (*(getattr(mesart.evaluation, name) for name in names), BenchResult, Validation):
        assert issubclass(kind, Result)
        assert not kind.__abstractmethods__


def test_light_to_import() -> None:
    code = "import sys, mesart.evaluation; sys.exit(str({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.stderr.strip() == "set()"
