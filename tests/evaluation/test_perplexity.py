"""The perplexity evaluation: which tokens are scored, and what becomes of the scores."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mesart.evaluation import PerplexityResult, run_perplexity
from mesart.evaluation.held_out import Text
from mesart.evaluation.perplexity import PerplexityCell
from mesart.evaluation.systems import Subject
from mesart.graphs import MesaConfig, MesaError
from mesart.runtime.text import Tokenizer
from tests.evaluation.conftest import VOCABULARY, Scripted

losses = st.lists(st.floats(0, 20), min_size=1, max_size=12)


def made(*cells: PerplexityCell) -> PerplexityResult:
    subject = Subject("x", "bundle", MesaConfig(256), {cell.system: "none" for cell in cells})
    return PerplexityResult(subject, 0, 32, len(cells[0].losses), Text("t", "text"), cells, True, 1.0)


def test_all_contexts_end_alike(use, tokenizer, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(str(number) for number in range(5000)))
    stream = tokenizer.encode(text.read_text(), add_special_tokens=False)
    mesa, origin = Scripted(), Scripted()
    use(mesa=mesa, origin=origin)
    result = run_perplexity("x", lengths=[512, 64], places=5, tokens=8, text=text, progress=False)
    assert [(cell.system, cell.length) for cell in result.cells] == [
        (system, length) for length in (64, 512) for system in ("mesa", "origin")
    ]
    assert mesa.prompts == origin.prompts
    begin = tokenizer.encode("")
    for short, long in zip(mesa.prompts[:5], mesa.prompts[5:], strict=True):
        # The last token of a text is scored and never given.
        assert (len(short), len(long)) == (63, 511)
        assert short[: len(begin)] == long[: len(begin)] == begin
        assert short[len(begin) :] == long[-(63 - len(begin)) :]
        assert any(long[len(begin) :] == stream[i : i + 511 - len(begin)] for i in range(len(stream)))
    assert len({tuple(prompt) for prompt in mesa.prompts}) == 10


def test_places_depend_on_the_seed(use) -> None:
    def asked(seed: int) -> list[list[int]]:
        system = Scripted()
        use(mesa=system)
        run_perplexity("x", systems=["mesa"], lengths=[64], places=4, tokens=8, seed=seed, progress=False)
        return system.prompts

    assert asked(0) == asked(0) != asked(1)


def test_indifference_has_the_perplexity_of_the_vocabulary(use, monkeypatch: pytest.MonkeyPatch) -> None:
    use(mesa=Scripted())
    monkeypatch.setattr(Scripted, "_logits", lambda self: torch.zeros(VOCABULARY).numpy())
    result = run_perplexity("x", systems=["mesa"], lengths=[64, 128], places=3, tokens=8, progress=False)
    for cell in result.cells:
        assert cell.perplexity == pytest.approx(VOCABULARY)
        assert result.ratio(cell) == pytest.approx(1)


def test_origin_of_a_checkpoint(checkpoint, make_model, tmp_path: Path) -> None:
    """Against transformers' own loss, at whichever place was drawn."""
    text = tmp_path / "text.txt"
    text.write_text("The grass is green. The sky is blue. " * 30)
    result = run_perplexity(
        checkpoint("llama"), systems=["origin"], lengths=[50], places=1, tokens=16, text=text, progress=False
    )
    stream = Tokenizer(checkpoint("llama")).encode(text.read_text(), add_special_tokens=False)
    model = make_model("llama")

    def loss(end: int) -> float:
        ids = torch.tensor([stream[end - 50 : end]])
        with torch.no_grad():
            return float(model(ids, labels=torch.where(torch.arange(50) < 34, -100, ids)).loss)

    (cell,) = result.cells
    assert min(abs(cell.losses[0] - loss(end)) for end in range(50, len(stream) + 1)) < 1e-4


@given(losses, st.floats(-3, 3))
def test_places_are_compared_each_with_itself(base: list[float], change: float) -> None:
    """What all places have in common is no uncertainty of the change."""
    result = made(
        PerplexityCell("mesa", 256, tuple(base)), PerplexityCell("mesa", 512, tuple(x + change for x in base))
    )
    first, second = result.cells
    assert result.ratio(first) == 1
    assert result.ratio_interval(first) == (1, 1)
    assert result.ratio(second) == pytest.approx(math.exp(change))
    assert result.ratio_interval(second) == pytest.approx((math.exp(change),) * 2)


def test_interval_of_a_change() -> None:
    """Changes 0.1, 0.2, 0.3: standard deviation 0.1, of the mean 0.1 / sqrt(3)."""
    result = made(PerplexityCell("mesa", 256, (1.0, 2.0, 3.0)), PerplexityCell("mesa", 512, (1.1, 2.2, 3.3)))
    half = 1.96 * 0.1 / math.sqrt(3)
    assert result.ratio_interval(result.cells[1]) == pytest.approx((math.exp(0.2 - half), math.exp(0.2 + half)), 1e-4)


def test_an_interrupt_keeps_what_was_finished(use) -> None:
    count = 0

    def until_interrupted(_: Sequence[int]) -> list[int]:
        nonlocal count
        count += 1
        if count > 5:
            raise KeyboardInterrupt
        return []

    use(mesa=Scripted(until_interrupted))
    result = run_perplexity("x", systems=["mesa"], lengths=[64, 128], places=4, tokens=8, progress=False)
    assert [cell.length for cell in result.cells] == [64]
    assert "Interrupted" in result.table()
    assert json.loads(result.to_json())["complete"] is False


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": [256, 9]}, "a context of 9 tokens is too short to score 8; it takes at least 10"),
        ({"lengths": []}, "name a length"),
        ({"places": 0}, "number of places is 0"),
        ({"tokens": 0}, "number of tokens is 0"),
        ({"tokens": 21}, "the last 20 can be scored, the tail of its plan, not 21"),
        ({"lengths": [10**7]}, "the text has .* tokens; 3 places .* at least 10000001: give a longer text"),
        ({"text": "/nowhere/text"}, "cannot read the text /nowhere/text: No such file"),
    ],
)
def test_bad_options(use, options: dict[str, Any], message: str) -> None:
    system = Scripted(tail=20)
    use(mesa=system)
    with pytest.raises(MesaError, match=message):
        run_perplexity("x", **{"systems": ["mesa"], "places": 3, "tokens": 8, "progress": False, **options})
    assert not system.prompts


def test_a_bundle(bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_perplexity(bundle(), places=2, tokens=8)
    assert "perplexity: 100%" in capsys.readouterr().err
    assert len(result.table().splitlines()) == 2 + 2 + 3  # title, header, lengths
    report = json.loads(result.to_json())
    assert (report["task"], report["tokens"], report["places"]) == ("perplexity", 8, 2)
    assert sorted({cell["length"] for cell in report["cells"]}) == [64, 128, 256]
    shortest = {cell["system"]: cell["perplexity"] for cell in report["cells"] if cell["length"] == 64}
    assert shortest["mesa"] == pytest.approx(shortest["origin"], rel=1e-3)  # T <= T_r: the plain model
    for cell in report["cells"]:
        assert cell["perplexity"] == pytest.approx(math.exp(sum(cell["losses"]) / 2), rel=1e-4)
    result.plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")

    with pytest.raises(MesaError, match=r"largest bucket .* 344 tokens; .*--max-tokens 400"):
        run_perplexity(bundle(), lengths=[401], places=1, tokens=8)
