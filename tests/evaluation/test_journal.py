"""A journal gives back what was put in, survives interrupts, and refuses what was found under other conditions."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from mesart.evaluation.journal import Journal
from mesart.evaluation.output import WriteError
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


def test_a_full_disk_keeps_what_was_found(tmp_path: Path) -> None:
    """And the next line, of the same process or another, does not end up in one with the torn one."""
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.add(KEY, CONDITIONS, 1)
    whole = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 20, hard))
    try:
        with pytest.raises(
            WriteError, match=r"cannot write .*journal\.jsonl: .*; what was found before is kept"
        ) as caught:
            journal.add((*KEY[:3], 512), CONDITIONS, "x" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert isinstance(caught.value, OSError)
    assert path.read_bytes() == whole
    assert journal.find((*KEY[:3], 512), CONDITIONS) is None
    journal.add((*KEY[:3], 1024), CONDITIONS, 3)
    resumed = Journal(path)
    assert [resumed.find((*KEY[:3], n), CONDITIONS) for n in (256, 512, 1024)] == [1, None, 3]


def test_a_line_that_was_torn_meanwhile_is_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.add(KEY, CONDITIONS, 1)
    with path.open("a") as file:
        file.write('{"key": ["torn' + "x" * 200_000)
    journal.add((*KEY[:3], 512), CONDITIONS, 2)
    assert [Journal(path).find((*KEY[:3], n), CONDITIONS) for n in (256, 512)] == [1, 2]


def test_an_interrupt_leaves_no_torn_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.add(KEY, CONDITIONS, 1)
    whole = path.read_bytes()

    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        journal.add((*KEY[:3], 512), CONDITIONS, 2)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "line",
    [
        '{"key": 1, "conditions": {}, "result": 1}',
        '{"key": [[1]], "conditions": {}, "result": 1}',
        '{"key": ["a"], "conditions": [], "result": 1}',
        '{"key": ["a"], "conditions": {}}',
        "[" * 100_000,
        "3",
        '{"key": ["a"], "conditions": {}, "result": ' + "9" * 5000 + "}",
        "",
    ],
)
def test_lines_that_are_none_are_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text(f"{line}\n")
    with pytest.raises(MesaError, match="line 1 of .* is no result of an evaluation"):
        Journal(path)
    assert path.read_text() == f"{line}\n"


def test_places_where_no_journal_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b'{"key": "\xff"}\n')
    for path in (tmp_path / "file", "/dev/null", "/dev/zero", tmp_path / "file" / "x", "/dev/null/x", "x" * 300):
        with pytest.raises(MesaError):
            Journal(path)


def test_results_of_another_kind_are_refused(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.add(KEY, CONDITIONS, {"scores": 1})
    with pytest.raises(MesaError, match="has a result of model mesa passkey 256 that is none"):
        journal.find(KEY, CONDITIONS, lambda result: tuple(result["scores"]))
