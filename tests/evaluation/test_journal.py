"""A journal gives back what was put in, survives interrupts, and refuses what was found under other conditions."""

from __future__ import annotations

from pathlib import Path

import pytest

from mesart.evaluation.journal import Journal
from mesart.graphs import MesaError

KEY = ("model", "mesa", "passkey", 256)
CONDITIONS = {"seed": 0, "versions": {"torch": "2.13.0"}, "text": None}


def test_what_was_added_is_found_by_the_next_run(tmp_path: Path) -> None:
    path = tmp_path / "new" / "journal.jsonl"
    first = Journal(path)
    assert first.find(KEY, CONDITIONS) is None
    first.add(KEY, CONDITIONS, {"scores": (1.0, 0.5)})
    first.add((*KEY[:3], 512), CONDITIONS, {"scores": ()})
    assert first.find(KEY, CONDITIONS) == {"scores": [1.0, 0.5]}
    second = Journal(path)
    assert second.find(KEY, CONDITIONS) == {"scores": [1.0, 0.5]}
    assert second.find((*KEY[:3], 512), CONDITIONS) == {"scores": []}
    assert second.find((*KEY[:3], 1024), CONDITIONS) is None


def test_a_line_that_was_cut_short_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.add(KEY, CONDITIONS, 1)
    journal.add((*KEY[:3], 512), CONDITIONS, 2)
    whole = path.read_bytes()
    for cut in range(1, len(whole) // 2):
        path.write_bytes(whole[:-cut])
        resumed = Journal(path)
        assert resumed.find(KEY, CONDITIONS) == 1
        assert resumed.find((*KEY[:3], 512), CONDITIONS) is None
        resumed.add((*KEY[:3], 512), CONDITIONS, 2)
        assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({**CONDITIONS, "seed": 1}, r"another seed \(0, now 1\)"),
        ({**CONDITIONS, "versions": {"torch": "2.14.0"}}, r"another versions \(torch: 2.13.0, now 2.14.0\)"),
        ({**CONDITIONS, "places": 5}, r"another places \(None, now 5\)"),
        ({"seed": 0, "text": None}, "another versions"),
    ],
)
def test_other_conditions_are_refused(tmp_path: Path, conditions: dict[str, object], message: str) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.add(KEY, CONDITIONS, 1)
    with pytest.raises(MesaError, match=f"has model mesa passkey 256 from a run with {message}"):
        journal.find(KEY, conditions)


def test_files_that_are_no_journal_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.md"
    path.write_text("# Notes\nkept\n")
    with pytest.raises(MesaError, match=r"line 1 of .*notes.md is no result of an evaluation"):
        Journal(path)
    assert path.read_text() == "# Notes\nkept\n"
    path.write_text("one line")
    with pytest.raises(MesaError, match="line 1 of"):
        Journal(path)
    assert path.read_text() == "one line"
    with pytest.raises(MesaError, match="cannot be read"):
        Journal(tmp_path)
