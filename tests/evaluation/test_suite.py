"""The suite: which cells run, what is kept of them, what a report makes of it."""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mesart.evaluation import suite
from mesart.evaluation.cells import Cell, Outcome, Settings, run_cell
from mesart.evaluation.cost import CostResult, run_cost
from mesart.evaluation.held_out import held_out_text
from mesart.evaluation.measure import places_in
from mesart.evaluation.methods import make_method, open_method, parse_method
from mesart.evaluation.report import wilson_interval
from mesart.evaluation.suite import JOURNAL_FILE, run_suite
from mesart.evaluation.suite_report import SuiteResult, depth_grid, interval, value, write_report
from mesart.evaluation.systems import CheckpointModel
from mesart.graphs import MesaError
from mesart.graphs.bundle.manifest import Manifest
from tests.evaluation.conftest import DEMO_MODEL

MODELS = {"demo": DEMO_MODEL}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Few prompts; and a short text, for a long one takes seconds to encode."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(held_out_text().content[:20_000])
    return Settings(prompts=3, places=2, scored=8, text=str(file))


def run(output: Path, settings: Settings, **changes: Any) -> SuiteResult:
    options: dict[str, Any] = {
        "methods": ["origin", "streaming-llm"],
        "tasks": ["passkey", "perplexity"],
        "lengths": [200, 400],
        "progress": False,
    }
    return run_suite(changes.pop("models", MODELS), output, settings=settings, **{**options, **changes})


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory, settings: Settings) -> SuiteResult:
    return run(tmp_path_factory.mktemp("suite"), settings)


def test_cells_are_those_of_the_grid(result: SuiteResult) -> None:
    assert result.complete
    assert set(result.outcomes) == {
        Cell("demo", method, task, length)
        for method in ("origin", "streaming-llm")
        for task in ("passkey", "perplexity")
        for length in (200, 400)
    }
    inside, beyond = (result.outcomes[Cell("demo", "origin", "passkey", n)] for n in (200, 400))
    assert statistics.fmean(inside.scores) == 1, "the demo model knows its task"
    assert len(beyond.scores) == len(beyond.depths) == 3
    assert inside.depths == pytest.approx([1 / 6, 0.5, 5 / 6], abs=0.1)


def test_losses_are_the_methods_own(result: SuiteResult) -> None:
    """Scored once more, by hand: the same tokens at the same places."""
    model = CheckpointModel.load(DEMO_MODEL)
    stream = model.encode(result.text.content)
    for length in (200, 400):
        system = open_method("streaming-llm", model.module, 256, 400)
        outcome = result.outcomes[Cell("demo", "streaming-llm", "perplexity", length)]
        ends = places_in(len(stream), 400 - 1, 2, 0)
        for end, loss in zip(ends, outcome.scores, strict=True):
            ids = [*model.prefix_ids, *stream[end - length + 1 : end]]
            logits = system.prefill(ids[:-1], 8).astype(np.float64)
            found = [np.log(np.exp(row).sum()) - row[token] for row, token in zip(logits, ids[-8:], strict=True)]
            assert loss == pytest.approx(statistics.fmean(found), abs=1e-4)


def test_an_interrupted_run_goes_on(
    result: SuiteResult, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Cell] = []
    real = run_cell

    def interrupted(job: Any) -> Outcome:
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append(job.cell)
        return real(job)

    monkeypatch.setattr(suite, "run_cell", interrupted)
    first = run(tmp_path, settings)
    assert not first.complete
    assert set(first.outcomes) == set(ran)
    assert "Interrupted" in first.table()

    def counted(job: Any) -> Outcome:
        ran.append(job.cell)
        return real(job)

    monkeypatch.setattr(suite, "run_cell", counted)
    second = run(tmp_path, settings)
    assert second.complete
    assert len(ran) == len(set(ran)) == 8, "no cell runs twice"
    assert {c: o.scores for c, o in second.outcomes.items()} == {c: o.scores for c, o in result.outcomes.items()}


def test_an_interrupt_reaches_the_processes(settings: Settings, tmp_path: Path) -> None:
    """As Ctrl-C does it: to all of them. What was finished is reported, and nothing else is printed."""
    code = f"""
import signal
from mesart.evaluation import Settings, run_suite
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's child would ignore it
    print("started", flush=True)
    result = run_suite({{"demo": {str(DEMO_MODEL)!r}}}, {str(tmp_path)!r}, methods=["origin"], tasks=["passkey"],
        lengths=[*range(200, 1200)], settings=Settings(prompts=1, text={settings.text!r}), jobs=2, progress=False)
    print(len(result.outcomes), result.complete)
"""
    script = tmp_path / "run.py"
    script.write_text(code)
    pipe = subprocess.PIPE
    command = [sys.executable, str(script)]
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as process:
        journal = tmp_path / JOURNAL_FILE
        while process.poll() is None and not (journal.exists() and journal.read_text().count("\n") >= 2):
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        out, error = process.communicate(timeout=120)
    assert error == ""
    count, complete = out.splitlines()[-1].split()
    assert complete == "False"
    kept = journal.read_text().count("\n")
    assert kept - 1 <= int(count) <= kept < 1000, "the last may have been written and not yet counted"


def test_processes_change_nothing(result: SuiteResult, settings: Settings, tmp_path: Path) -> None:
    parallel = run(tmp_path, settings, jobs=2, lengths=[200], tasks=["passkey"])
    for cell, outcome in parallel.outcomes.items():
        assert outcome.scores == result.outcomes[cell].scores


def test_results_of_other_runs_are_refused(settings: Settings, tmp_path: Path) -> None:
    one: dict[str, Any] = {"lengths": [200], "tasks": ["passkey"], "methods": ["origin"]}
    run(tmp_path, settings, **one)
    with pytest.raises(MesaError, match=r"has demo origin passkey 200 from a run with another settings \(seed: 0, now"):
        run(tmp_path, replace(settings, seed=1), **one)
    journal = tmp_path / JOURNAL_FILE
    line = json.loads(journal.read_text())
    line["conditions"]["versions"]["torch"] = "1.0"
    journal.write_text(json.dumps(line) + "\n")
    with pytest.raises(MesaError, match=r"another versions \(torch: 1.0, now"):
        run(tmp_path, settings, **one)


def test_a_method_that_a_model_cannot_take_is_named(checkpoint: Any, settings: Settings, tmp_path: Path) -> None:
    found = run(
        tmp_path,
        settings,
        models={"bloom": checkpoint("bloom")},
        methods=["yarn", "origin"],
        tasks=["perplexity"],
        lengths=[40],
    )
    outcome = found.outcomes[Cell("bloom", "yarn", "perplexity", 40)]
    assert outcome.refused is not None
    assert "has none (ALiBi or NoPE)" in outcome.refused
    assert f"- yarn left out: {outcome.refused}" in found.table()
    assert found.outcomes[Cell("bloom", "origin", "perplexity", 40)].scores


def test_bundles_are_models_too(bundle: Any, checkpoint: Any, settings: Settings, tmp_path: Path) -> None:
    """What a bundle gives is what its checkpoint gives; beyond its largest bucket it says why there is nothing."""
    models = {"bundle": bundle(), "checkpoint": checkpoint("llama")}
    options: dict[str, Any] = {"tasks": ["perplexity", "passkey"], "lengths": [300, 400]}
    method = "mesa:" + ",".join(f"{k}={json.dumps(v)}" for k, v in _parameters(bundle()).items())
    found = run(tmp_path, settings, models=models, methods=["mesa", method, "origin"], **options)

    def losses(model: str, method: str, length: int = 300) -> tuple[float, ...]:
        return found.outcomes[Cell(model, method, "perplexity", length)].scores

    assert losses("bundle", "mesa") == pytest.approx(losses("checkpoint", method), abs=1e-3)
    assert losses("bundle", method) == pytest.approx(losses("checkpoint", method), abs=1e-5)
    assert losses("bundle", "origin", 400) == pytest.approx(losses("checkpoint", "origin", 400), abs=1e-5)
    assert len(found.outcomes[Cell("bundle", "mesa", "passkey", 300)].scores) == 3
    beyond = [found.outcomes[Cell("bundle", "mesa", task, 400)].refused or "" for task in options["tasks"]]
    assert all("longer than the largest bucket of this bundle, 344 tokens" in reason for reason in beyond)
    assert found.parameters["bundle", "mesa"] == _parameters(bundle())
    with pytest.raises(MesaError, match=r"another backend \(auto, now onnxruntime\)"):
        run(tmp_path, replace(settings, backend="onnxruntime"), models=models, methods=["mesa"], **options)


def _parameters(folder: Path) -> dict[str, Any]:
    config = Manifest.read(folder).config.to_dict()
    return {name: value for name, value in config.items() if name != "train_length"}


def test_a_cell_that_a_method_has_no_logits_for_is_left_out(settings: Settings, tmp_path: Path) -> None:
    method = "star-attention:block=256,query=4"
    found = run(tmp_path, settings, methods=[method, "origin"], tasks=["perplexity"])
    inside, beyond = (found.outcomes[Cell("demo", method, "perplexity", n)] for n in (200, 400))
    assert inside.scores
    assert beyond.refused == "of a text of 400 tokens only the last 4 can be scored, the tail of its plan, not 8"
    assert f"- {method} left out: {beyond.refused}" in found.table()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["rope"]}, "unknown method 'rope'; there are origin, dynamic-ntk"),
        ({"methods": ["rerope:width=3"]}, "rerope has no parameter 'width'; it has"),
        ({"methods": ["rerope:window"]}, "'window' is not PARAMETER=VALUE"),
        ({"tasks": ["chess"]}, "there is no task 'chess'; there are passkey"),
        ({"tasks": []}, "name at least one model, one method and one task"),
        ({"lengths": []}, "name a length"),
        ({"lengths": [30]}, "task passkey needs at least [0-9]+ tokens of the tokenizer of .*, not 30"),
        ({"lengths": [5], "tasks": ["perplexity"]}, "task perplexity needs at least 10 tokens"),
    ],
)
def test_bad_options(settings: Settings, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MesaError, match=message):
        run(tmp_path / "new", settings, **changes)
    assert not (tmp_path / "new").exists()


def test_a_backend_without_a_bundle(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(MesaError, match="'openvino' runs the graphs of bundles, and no model here is one"):
        run(tmp_path, replace(settings, backend="openvino"))


def test_parameters_come_with_the_name() -> None:
    assert parse_method("rerope:window=64,log_n=true", 256, 1024) == make_method(
        "rerope", 256, 1024, window=64, log_n=True
    )


def test_values_and_intervals() -> None:
    accuracy, loss = Cell("m", "mesa", "passkey", 9), Cell("m", "mesa", "perplexity", 9)
    found = Outcome(scores=(1.0, 0.5, 0.0, 1.0))
    assert value(accuracy, found) == 0.625
    assert interval(accuracy, found) == wilson_interval(2.5, 4)
    low, high = interval(loss, found)
    assert value(loss, found) == pytest.approx(math.exp(0.625))
    assert low * high == pytest.approx(value(loss, found) ** 2)


def test_depths(result: SuiteResult) -> None:
    grid = depth_grid(result, "demo", "origin", "passkey", depths=3)
    assert grid is not None
    assert [row[0] for row in grid] == [1, 1, 1]
    assert len(grid) == 3
    assert len(grid[0]) == 2
    assert depth_grid(result, "demo", "mesa", "passkey") is None
    with pytest.raises(ValueError, match="no single depth"):
        depth_grid(result, "demo", "origin", "perplexity")


def test_the_report(result: SuiteResult, tmp_path: Path) -> None:
    write_report(result, tmp_path / "results")
    text = (tmp_path / "results" / "README.md").read_text()
    assert "### passkey" in text
    assert "|    200 | 0.781x |" in text
    assert "1.00 [0.44, 1.00]" in text
    pictures = {file.name for file in (tmp_path / "results").glob("*.png")}
    assert pictures == {"passkey.png", "perplexity.png", "passkey-depths-demo.png"}
    assert all(f"({name})" in text for name in pictures)
    data = json.loads((tmp_path / "results" / "results.json").read_text())
    assert data == json.loads(result.to_json())
    assert len(data["cells"]) == 8
    assert data["versions"]["torch"]


def test_cost_is_measured_apart(tmp_path: Path) -> None:
    options: dict[str, Any] = {"lengths": [600], "repeat": 1, "new_tokens": 1, "threads": 1, "progress": False}

    def measured() -> CostResult:
        return run_cost(DEMO_MODEL, tmp_path / "journal.jsonl", methods=["mesa"], **options)

    found = measured()
    (row,) = found.rows
    method = make_method("mesa", 256, 600)
    assert (row.pairs, row.kept) == (method.pairs(600), method.kept(600))
    assert row.first_token[0] > 0
    assert row.per_token > 0
    assert "mesa" in found.table()
    assert json.loads(found.to_json())["rows"][0]["pairs"] == row.pairs
    assert measured().rows == found.rows, "from the journal"


def test_what_takes_too_long_is_said(tmp_path: Path) -> None:
    found = run_cost(
        DEMO_MODEL, tmp_path / "journal.jsonl", methods=["origin"], lengths=[300], limit=0.01, progress=False
    )
    assert found.rows[0].failed == "time limit: took longer than 0 s"
    assert "time limit" in found.table()
