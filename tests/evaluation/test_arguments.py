"""What evaluations are asked for is checked by the functions too, before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mesart.evaluation import run_cost, run_passkey, run_perplexity, run_suite, run_threshold, sensitivity, tune
from mesart.evaluation.arguments import require_device, require_lengths, require_number, require_seed, require_whole
from mesart.evaluation.bench import run_bench
from mesart.evaluation.cells import Settings
from mesart.evaluation.validate import validate
from mesart.graphs import MesaError

HUGE = 10**5000


@pytest.mark.parametrize(
    "value", [0, -1, 1.0, 1.5, "2", None, True, float("nan"), 2**31, 2**70, pytest.param(HUGE, id="huge")]
)
def test_whole_numbers(value: Any) -> None:
    with pytest.raises(MesaError, match="the number of prompts is .*; it must be a whole number, at least 1"):
        require_whole("prompts", value)
    for fine in (1, np.int64(3), 2**31 - 1):
        require_whole("prompts", fine)
    require_whole("steps", 0, least=0)
    with pytest.raises(MesaError, match="it must be a whole number, 1 to 8"):
        require_whole("threads", 9, most=8)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -0.1, 1.1, "1", None])
def test_numbers(value: Any) -> None:
    with pytest.raises(MesaError, match="rho is .*; it must be a finite number, at least 0, at most 1"):
        require_number("rho", value, least=0, most=1)
    for fine in (0, 1, 0.5, np.float32(0.25)):
        require_number("rho", fine, least=0, most=1)
    with pytest.raises(MesaError, match="above 0"):
        require_number("the margin", 0, above=0)


def test_seeds_and_lengths() -> None:
    for seed in (0, 2**100, np.int64(3), HUGE):
        require_seed(seed)
    for wrong in (-1, 1.5, None, True):
        with pytest.raises(MesaError, match="the seed is"):
            require_seed(wrong)
    require_lengths(None)
    require_lengths([1, 2])
    for lengths in ([], [0], [1, -3], [1.5]):
        with pytest.raises(MesaError, match="length"):
            require_lengths(lengths)


@pytest.mark.parametrize("name", ["nope", "cuda:99", "meta", "cpu:0:1", ""])
def test_devices(name: str) -> None:
    require_device("cpu")
    with pytest.raises(MesaError, match="PyTorch has no device .* here: "):
        require_device(name)


def suite(_: object, **options: Any) -> object:
    settings = {k: options.pop(k) for k in list(options) if k in Settings.__dataclass_fields__}
    options = {"tasks": ["passkey"], "methods": ["origin"], "settings": Settings(**settings), **options}
    return run_suite({"m": "nowhere"}, "/nowhere", **options)


def cost(source: Any, **options: Any) -> object:
    return run_cost(source, "/nowhere/x", **{"lengths": [64], **options})


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (run_passkey, {"prompts": 0}),
        (run_passkey, {"prompts": 1.5}),
        (run_passkey, {"lengths": [0]}),
        (run_passkey, {"seed": -1}),
        (run_passkey, {"depths": [float("nan")]}),
        (run_passkey, {"digits": 0}),
        (run_passkey, {"digits": 10**6}),
        (run_perplexity, {"places": 0}),
        (run_perplexity, {"tokens": 0}),
        (run_perplexity, {"lengths": []}),
        (suite, {"jobs": 0}),
        (suite, {"prompts": 0}),
        (suite, {"places": -1}),
        (suite, {"seed": -1}),
        (suite, {"device": "nope"}),
        (suite, {"lengths": [0]}),
        (cost, {"repeat": 0}),
        (cost, {"new_tokens": 0}),
        (cost, {"threads": 10**6}),
        (cost, {"lengths": []}),
        (cost, {"limit": 0}),
        (run_bench, {"repeat": 0}),
        (run_bench, {"new_tokens": 0}),
        (run_bench, {"lengths": [0]}),
        (run_bench, {"threads": 0}),
        (validate, {"steps": -1}),
        (validate, {"seed": -1}),
        (tune, {"seconds": float("nan")}),
        (tune, {"prompts": -1}),
        (tune, {"places": 9, "final_places": 8}),
        (tune, {"finalists": 1.5}),
        (tune, {"seed": -1}),
        (sensitivity, {"prompts": -1}),
        (sensitivity, {"lengths": [0]}),
        (run_threshold, {"places": 1}),
        (run_threshold, {"factor": float("nan")}),
        (run_threshold, {"margin": float("inf")}),
        (run_threshold, {"max_tokens": 0}),
        (run_threshold, {"passkey_prompts": -1}),
    ],
)
def test_functions(function: Callable[..., object], options: dict[str, Any], tmp_path: Path) -> None:
    """Of a source that is not there: the numbers are looked at first."""
    with pytest.raises(MesaError) as caught:
        function(tmp_path, **options)
    assert str(tmp_path) not in str(caught.value)
    assert "/nowhere" not in str(caught.value)
