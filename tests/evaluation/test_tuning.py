"""Tuning: that the fast way is the right one, that the best is found, and that nothing is run twice."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mesart.evaluation.pairs import needed_pairs
from mesart.evaluation.systems import MesaReference, Subject, System
from mesart.evaluation.tuning import PARAMETERS, Measured, Tried, grid, measure, sensitivity, tune
from mesart.evaluation.tuning.grid import COST_PARAMETERS
from mesart.evaluation.tuning.measure import spread
from mesart.evaluation.tuning.report import perplexity_ratio
from mesart.evaluation.tuning.search import recommend
from mesart.evaluation.tuning.subject import Tunable, open_tunable
from mesart.graphs import MesaConfig, MesaError, Plan

Quality = Callable[[MesaConfig], tuple[float, float]]
Cost = Callable[[MesaConfig, int], float]


def pairs(config: MesaConfig, tokens: int) -> float:
    """A first token that comes the later the more scores it takes."""
    return needed_pairs(config, tokens) / 1e6


class Judged(System):
    """Finds a given share of the keys, and has a given loss: both as the configuration deserves."""

    engine = "none"

    def __init__(self, tokenizer: Any, config: MesaConfig, quality: tuple[float, float], log: list[int]) -> None:
        self.config = config
        self._tokenizer, (self._share, self._loss), self._log = tokenizer, quality, log

    def prefill(self, input_ids: Sequence[int], last: int) -> NDArray[np.float32]:
        raise NotImplementedError

    def step(self, token: int) -> NDArray[np.float32]:
        raise NotImplementedError

    def logits_of(self, tokens: int) -> int:
        return tokens

    def generate(self, input_ids: Sequence[int], count: int, stop: Collection[int] = ()) -> list[int]:
        self._log.append(len(input_ids))
        text = self._tokenizer.decode(list(input_ids))
        found = re.search("The pass key is ([0-9]+)", text)
        assert found is not None
        key = found.group(1) if sum(map(int, found.group(1))) % 10 < 10 * self._share else "00000"
        return list(self._tokenizer.encode(" " + key, add_special_tokens=False))

    def log_probs(self, input_ids: Sequence[int], count: int) -> NDArray[np.float64]:
        self._log.append(len(input_ids))
        place = np.random.default_rng(list(input_ids)).normal(scale=0.3)  # hard and easy places, the same for all
        return np.full(count, -self._loss - place)


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> Callable[..., list[int]]:
    """``judged(quality)``: tuning meets systems of that quality; the list of the prompts' lengths fills as they run."""

    def use(quality: Quality, fingerprint: str = "a model", cost: Cost = pairs) -> list[int]:
        log: list[int] = []

        def run(config: MesaConfig, length: int) -> System:
            return Judged(tokenizer, config, quality(config), log)

        def opened(source: Any, start: MesaConfig | None, backend: str, **_: Any) -> Tunable:
            subject = Subject(source, "bundle", start or MesaConfig(256), {"mesa": "none"})
            return Tunable(subject, tokenizer, fingerprint, run)

        def first_token(system: Judged, prompts: Sequence[Sequence[int]]) -> tuple[float, ...]:
            log.extend(map(len, prompts))
            return (cost(system.config, len(prompts[0])),) * (len(prompts) - 1)

        monkeypatch.setattr(measure, "open_tunable", opened)
        monkeypatch.setattr(measure, "first_token", first_token)
        return log

    return use


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"{number} {'abcdefgh'[number % 8]}" for number in range(3000)))
    return path


def small(text: Path, **options: Any) -> dict[str, Any]:
    return {
        "lengths": [512, 1024],
        "prompts": 6,
        "places": 4,
        "final_prompts": 12,
        "final_places": 8,
        "text": text,
        "progress": False,
        **options,
    }


def bowl(config: MesaConfig) -> tuple[float, float]:
    """Best with log-n, F = 20, C = 192, N = 16; without log-n half of the keys are lost."""
    distance = sum(
        abs(math.log2(getattr(config, name) / best))
        for name, best in (("head_length", 20), ("chunk_length", 192), ("linear_window", 16))
    )
    return (1.0 if config.log_n else 0.5), 2.0 + 0.1 * distance


class TestSearch:
    def test_finds_the_best(self, judged, text: Path) -> None:
        judged(bowl)
        result = tune("x", start=MesaConfig(256, log_n=False), **small(text))
        assert result.recommended == MesaConfig(256, head_length=20, chunk_length=192, linear_window=16)
        assert result.complete
        assert {tried.stage for tried in result.tried} == {"search", "final"}
        finals = [tried for tried in result.tried if tried.stage == "final"]
        assert finals[0].config == MesaConfig(256, log_n=False)  # the start is always judged again
        assert all((tried.prompts, len(tried.losses)) == (24, 16) for tried in finals)
        # 40 + 216 tokens of head and chunk fill the window; with a head of 60 they are too many.
        assert any("head_length" in reason and "more than the trained 256" in reason for _, reason in result.skipped)
        assert "Recommended: head_length=20, chunk_length=192, linear_window=16, log_n=on" in result.table()

    def test_passkeys_come_before_perplexity(self, judged, text: Path) -> None:
        judged(lambda config: (1.0, 9.0) if config.log_n else (0.5, 1.0))
        assert tune("x", **small(text)).recommended.log_n

    def test_evaluations_bound_it(self, judged, text: Path) -> None:
        judged(bowl)
        result = tune("x", evaluations=4, **small(text))
        assert sum(tried.stage == "search" for tried in result.tried) == 4

    def test_seconds_bound_it(self, judged, text: Path) -> None:
        judged(bowl)
        result = tune("x", seconds=0, **small(text))
        assert not result.complete
        assert [tried.config for tried in result.tried] == [MesaConfig(256)]
        assert result.recommended == MesaConfig(256)
        assert "Not complete" in result.table()

    def test_only_what_was_asked_is_varied(self, judged, text: Path) -> None:
        judged(bowl)
        result = tune("x", parameters=["linear_window"], **small(text))
        assert {replace(t.config, linear_window=32) for t in result.tried} == {MesaConfig(256)}
        assert result.recommended.linear_window == 16

    def test_by_cost_alone(self, judged, text: Path) -> None:
        """No prompt is asked: what is found is the soonest first token, of chunks and tails."""
        asked: list[MesaConfig] = []

        def quality(config: MesaConfig) -> tuple[float, float]:
            asked.append(config)
            return 1.0, 1.0

        nothing = {"prompts": 0, "places": 0, "final_prompts": 0, "final_places": 0}
        log = judged(quality, cost=lambda config, _: abs(config.chunk_length - 64) + (config.tail_max or 999) / 1e3)
        result = tune("x", start=MesaConfig(256, tail_max=256), **small(text, lengths=[1000], **nothing))
        assert result.recommended == MesaConfig(256, chunk_length=64, tail_max=64)
        assert len(log) == (len(asked) - 4) * 4 + 4 * 8, "timed runs, and one to warm up"
        changed = {
            name for c in asked for name, value in c.to_dict().items() if value != getattr(result.subject.config, name)
        }
        assert changed == set(COST_PARAMETERS)
        assert all((tried.correct, tried.losses, tried.rate) == (0, (), 1.0) for tried in result.tried)
        assert "Recommended: chunk_length=64, tail_max=64" in result.table()
        json.loads(result.to_json())

    def test_a_limit_that_no_tail_meets_is_not_tried(self, judged, text: Path) -> None:
        judged(bowl)
        result = tune("x", parameters=["tail_max"], start=MesaConfig(256, tail_max=48), **small(text))
        tails = {tried.config.tail_max for tried in result.tried}
        assert 48 in tails
        assert len({tuple(Plan.of(t.config, n) for n in (511, 512, 1023, 1024)) for t in result.tried}) == len(tails)

    def test_the_few_prompts_are_some_of_the_many(self) -> None:
        assert list(spread(3, 12)) == [2, 6, 10]
        assert list(spread(12, 12)) == list(range(12))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"parameters": ["E"]}, "unknown parameter 'E'"),
            ({"evaluations": 0}, "at least 1 evaluation"),
            ({"lengths": [20]}, "too short"),
            ({"prompts": 40}, "more than the final's"),
            ({"start": MesaConfig(256, stair_width=2)}, "leaves the trained range"),
            ({"final_places": 0}, "more than the final's 0"),
        ],
    )
    def test_errors(self, judged, text: Path, options: dict[str, Any], message: str) -> None:
        judged(bowl)
        with pytest.raises(MesaError, match=message):
            tune("x", **small(text, **options))


class TestJournal:
    def test_nothing_is_run_twice(self, judged, text: Path, tmp_path: Path) -> None:
        log = judged(bowl)
        options = small(text, journal=tmp_path / "tune.jsonl")
        first = tune("x", **options)
        assert log
        log = judged(bowl)
        again = tune("x", **options)
        assert not log
        assert (again.recommended, again.tried) == (first.recommended, first.tried)

    def test_an_interrupted_run_goes_on(self, judged, text: Path, tmp_path: Path) -> None:
        options = small(text, journal=tmp_path / "tune.jsonl")
        whole = judged(bowl)
        expected = tune("x", **small(text))
        configs: list[MesaConfig] = []

        def until_interrupted(config: MesaConfig) -> tuple[float, float]:
            configs.append(config)
            if len(configs) > 7:
                raise KeyboardInterrupt
            return bowl(config)

        before = judged(until_interrupted)
        result = tune("x", **options)
        assert not result.complete
        assert len(result.tried) == 3  # of two lengths each; the seventh measurement is in the journal only
        after = judged(bowl)
        assert tune("x", **options).recommended == expected.recommended
        assert len(before) + len(after) == len(whole)

    @pytest.mark.parametrize(("change", "message"), [({"seed": 1}, "another seed"), ({}, "another model")])
    def test_results_of_others_are_refused(
        self, judged, text: Path, tmp_path: Path, change: dict[str, Any], message: str
    ) -> None:
        options = small(text, journal=tmp_path / "tune.jsonl", evaluations=1)
        judged(bowl)
        tune("x", **options)
        judged(bowl, "a model" if change else "some other")
        with pytest.raises(MesaError, match=message):
            tune("x", **options, **change)


class TestSensitivity:
    def test_one_parameter_at_a_time(self, judged, text: Path) -> None:
        judged(bowl)
        result = sensitivity("x", lengths=[512, 1024], prompts=10, places=6, text=text, progress=False)
        default = MesaConfig(256)
        for row in result.rows:
            changes = {} if row.parameter == "default" else {row.parameter: row.value}
            if row.measured is None:
                with pytest.raises(MesaError, match=re.escape(row.refused or "")[:40]):
                    Plan.of(replace(default, **changes), row.length)
                continue
            share, loss = bowl(replace(default, **changes))
            assert row.measured.correct == 10 if share == 1 else row.measured.correct < 10
            assert row.ratio is not None
            # All places change alike, so the interval is that one number.
            assert row.ratio == pytest.approx((math.exp(loss - bowl(default)[1]),) * 3)
        assert {row.parameter for row in result.rows} == {"default", *PARAMETERS}
        assert "Cannot be, at some length" in result.table()
        assert len(json.loads(result.to_json())["rows"]) == len(result.rows)

    def test_given_values(self, judged, text: Path) -> None:
        judged(bowl)
        values: dict[str, list[Any]] = {"stair_width": [2, 60], "log_n": [False]}
        result = sensitivity(
            "x", lengths=[512], prompts=2, places=2, parameters=list(values), values=values, text=text, progress=False
        )
        assert [(row.parameter, row.value, row.refused is None) for row in result.rows] == [
            ("default", None, True),
            ("stair_width", 2, False),
            ("stair_width", 60, True),
            ("log_n", False, True),
        ]


class TestRecommendation:
    def tried(self, width: int, correct: int, losses: Sequence[float], chunk: int = 128) -> Tried:
        config = MesaConfig(256, linear_window=width, chunk_length=chunk)
        times = tuple(needed_pairs(config, 1024) * share / 1e6 for share in (0.99, 1, 1.01))
        return Tried(config, "final", (Measured(1024, correct, 100, tuple(losses), times, 1.0),))

    def test_a_rate_that_may_be_the_best_is_as_good(self) -> None:
        # The 95% interval of 96 of 100 reaches 0.98, that of 80 of 100 does not.
        best, near, far = self.tried(8, 98, [2.0] * 9), self.tried(16, 96, [1.9] * 9), self.tried(32, 80, [1.0] * 9)
        assert recommend([best, near, far], MesaConfig(256)) is near

    def test_the_cheaper_of_equal_perplexity(self) -> None:
        noise = [0.1, -0.1, 0.2, -0.2, 0.05]
        dear = self.tried(8, 100, [2 + x for x in noise], chunk=192)
        cheap = self.tried(8, 100, [2.01 - x for x in noise], chunk=64)
        worse = self.tried(8, 100, [2.5 + x for x in noise], chunk=32)
        assert worse.scores < cheap.scores < dear.scores
        assert recommend([dear, cheap, worse], dear.config) is cheap

    def test_what_is_not_clearly_sooner_is_no_reason_to_change(self) -> None:
        config = MesaConfig(256)
        start, sooner = (
            Tried(c, "final", (Measured(1024, 0, 0, (), times, 1.0),))
            for c, times in ((config, (1.0, 1.1, 1.2)), (replace(config, chunk_length=64), (0.8, 0.9, 1.0)))
        )
        assert recommend([start, sooner], config) is start
        assert recommend([start, sooner], sooner.config) is sooner
        surely = Tried(sooner.config, "final", (Measured(1024, 0, 0, (), (0.8, 0.9, 0.95), 1.0),))
        assert recommend([start, surely], config) is surely

    def test_no_change_for_nothing(self) -> None:
        start = self.tried(32, 100, [2.0, 2.1, 1.9])
        other = self.tried(16, 100, [1.95, 2.12, 1.88])
        assert other.perplexity < start.perplexity
        assert recommend([other, start], start.config) is start


@given(st.integers(1, 3000), st.integers(8, 40), st.integers(20, 200), st.integers(1, 48))
def test_needed_pairs_are_those_of_the_mask(tokens: int, head: int, chunk: int, tail: int) -> None:
    config = MesaConfig(256, head_length=head, chunk_length=chunk, tail_min=tail)
    plan = Plan.of(config, tokens)
    seen = 0
    for token in range(tokens):
        span = next((c for c in plan.chunks if c.start <= token < c.stop), None)
        seen += token + 1 if span is None else head + token - span.start + 1
    assert needed_pairs(config, tokens) == seen


def test_perplexity_ratio() -> None:
    """Changes 0.1, 0.2, 0.3: standard deviation 0.1, of the mean 0.1 / sqrt(3)."""
    half = 1.96 * 0.1 / math.sqrt(3)
    found = perplexity_ratio([1.1, 2.2, 3.3], [1.0, 2.0, 3.0])
    assert found == pytest.approx((math.exp(0.2), math.exp(0.2 - half), math.exp(0.2 + half)), rel=1e-4)
    assert perplexity_ratio([2.0], [1.0]) == pytest.approx((math.e,) * 3)


@pytest.mark.parametrize("parameter", PARAMETERS)
def test_grids_have_what_it_is_and_more(parameter: str) -> None:
    config = MesaConfig(256)
    values = grid(config, parameter, 4096)
    assert getattr(config, parameter) in values
    assert len(set(values)) == len(values) > 1


def test_a_width_of_the_grid_fits() -> None:
    config = MesaConfig(256)
    widths = [width for width in grid(config, "stair_width", 4096) if width is not None]
    assert any(width < config.fitting_width(4096) for width in widths)
    Plan.of(replace(config, stair_width=config.fitting_width(4096)), 4096)


CONFIGS = [
    {},
    {"log_n": False},
    {"chunk_length": 24, "head_length": 12},
    {"linear_window": 20, "rho": 0.6},
    {"stair_width": 30, "tail_min": 24},
]


class TestOneBundle:
    """The llama bundle: trained on 64 tokens, exported for a head of 8, chunks of 40, and up to 344 tokens."""

    @pytest.mark.parametrize("changes", CONFIGS)
    def test_runs_other_configurations_as_the_reference(
        self, bundle, make_model, mesa_config, changes: dict[str, Any]
    ) -> None:
        opened = open_tunable(bundle(), None, "onnxruntime")
        assert opened.subject.config == mesa_config
        config = replace(mesa_config, **changes)
        reference = MesaReference(make_model("llama"), config)
        ids = np.random.default_rng(0).integers(2, 300, 500).tolist()
        for length in (50, 130, 500):  # the last is longer than what was exported
            system = opened.run(config, length)
            np.testing.assert_allclose(
                system.prefill(ids[:length], 10), reference.prefill(ids[:length], 10), atol=2e-4, rtol=1e-3
            )
            for token in (5, 6, 7):
                np.testing.assert_allclose(system.step(token), reference.step(token), atol=2e-4, rtol=1e-3)

    def test_from_end_to_end(self, bundle, text: Path) -> None:
        options = small(text, lengths=[230], evaluations=2, prompts=1, places=2, final_prompts=1, final_places=2)
        result = tune(bundle(), backend="onnxruntime", finalists=1, **options)
        assert result.subject.kind == "bundle"
        assert result.subject.engines["mesa"].startswith("onnxruntime")
        assert all(math.isfinite(tried.perplexity) for tried in result.tried)
        assert all(0 < time < 60 for tried in result.tried for time in tried.first_token)
        report = json.loads(result.to_json())
        assert report["recommended"] == result.recommended.to_dict()
        assert report["config"] == result.subject.config.to_dict()

    def test_agrees_with_the_checkpoint(self, bundle, checkpoint, mesa_config, text: Path) -> None:
        options = {"start": mesa_config, "lengths": [230], "prompts": 1, "places": 3, "parameters": ["log_n"]}
        ours = sensitivity(bundle(), backend="onnxruntime", text=text, progress=False, **options)
        theirs = sensitivity(checkpoint("llama"), text=text, progress=False, **options)
        assert theirs.subject.kind == "checkpoint"
        for our, their in zip(ours.rows, theirs.rows, strict=True):
            assert our.measured is not None
            assert their.measured is not None
            assert our.measured.losses == pytest.approx(their.measured.losses, abs=1e-3)

    def test_another_trained_length_is_refused(self, bundle, text: Path) -> None:
        with pytest.raises(MesaError, match="train_length = 64"):
            tune(bundle(), start=MesaConfig(128), **small(text))
