"""The passkey evaluation: which answers count, which prompts are asked, what is reported."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from mesart.evaluation import run_passkey
from mesart.evaluation.passkey import prompt_rng
from mesart.evaluation.tasks import passkey
from mesart.graphs import MesaError
from mesart.runtime.text import Tokenizer
from tests.evaluation.conftest import DEMO_MODEL, Scripted


def reader(tokenizer: Tokenizer, form: str = " {key}") -> Callable[[Sequence[int]], list[int]]:
    """Answers with what the prompt says after 'The pass key is', put into ``form``."""

    def answer(prompt: Sequence[int]) -> list[int]:
        found = re.search(r"The pass key is ([0-9]+)\.", tokenizer.decode(prompt))
        assert found is not None
        return tokenizer.encode(form.format(key=found.group(1)), add_special_tokens=False)

    return answer


@pytest.mark.parametrize(
    ("form", "rate"),
    [
        (" {key}", 1),
        ("{key}.", 1),
        (" {key}9", 0),  # a number that goes on is another number
        (" 9{key}", 0),
        (" 7", 0),
        ("", 0),
        (" no idea", 0),
    ],
)
def test_which_answers_count(use, tokenizer, form: str, rate: float) -> None:
    use(mesa=Scripted(reader(tokenizer, form)))
    result = run_passkey("x", systems=["mesa"], lengths=[256], prompts=3, progress=False)
    assert [(cell.filler, cell.rate, len(cell.wrong)) for cell in result.cells] == [
        ("standard", rate, 3 * (1 - rate)),
        ("random", rate, 3 * (1 - rate)),
    ]
    for cell in result.cells:
        for wrong in cell.wrong:
            assert re.fullmatch("[0-9]{5}", wrong.expected)
            assert wrong.expected != wrong.got.strip()


def test_all_systems_get_the_same_unseen_prompts(use, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: set[str] = set()

    def record(split: Any, seed: int, index: int) -> Any:
        drawn.add(split)
        return prompt_rng(split, seed, index)

    monkeypatch.setattr(passkey, "prompt_rng", record)

    def asked(**options: Any) -> list[list[int]]:
        mesa, origin = Scripted(), Scripted()
        use(mesa=mesa, origin=origin)
        run_passkey("x", prompts=4, progress=False, **options)
        assert mesa.prompts == origin.prompts
        return mesa.prompts

    prompts = asked(lengths=[300, 256])
    assert len({tuple(prompt) for prompt in prompts}) == 4 * 4
    keys = [re.search("[0-9]{5}", tokenizer.decode(prompt)) for prompt in prompts]
    assert len({key.group() for key in keys if key}) == 4 * 4
    assert [len(prompt) for prompt in prompts] == sorted(len(prompt) for prompt in prompts)
    assert all(0 <= 256 - len(prompt) < 16 for prompt in prompts[:8])
    # A length's prompts are the same whatever else is asked for; another seed's are others.
    assert asked(lengths=[256]) == prompts[:8]
    assert not {tuple(prompt) for prompt in asked(lengths=[256], seed=1)} & {tuple(prompt) for prompt in prompts}
    assert drawn == {"eval"}


def test_depths(use, tokenizer) -> None:
    system = Scripted(reader(tokenizer))
    use(mesa=system)

    def places(depths: Sequence[float] | None) -> list[float]:
        system.prompts.clear()
        result = run_passkey(
            "x", systems=["mesa"], lengths=[500], fillers=["standard"], prompts=2, depths=depths, progress=False
        )
        assert [cell.depth for cell in result.cells] == (list(depths) if depths else [None])
        assert sum(cell.prompts for cell in result.cells) == result.pooled()[0].prompts == len(system.prompts)
        if depths:
            assert "depth" in result.table()
        texts = [tokenizer.decode(prompt) for prompt in system.prompts]
        return [text.index("Remember it.") / len(text) for text in texts]

    spread = places(None)
    assert spread[0] < 0.4
    assert spread[1] > 0.6
    first, second, third, fourth = places([0, 1])
    assert first == second < 0.3
    assert third > 0.7
    assert third == pytest.approx(fourth, abs=0.02)


def test_own_text_is_the_filler(use, tokenizer, tmp_path: Path) -> None:
    system, text = Scripted(), tmp_path / "text.txt"
    text.write_text("wombat " * 300)
    use(mesa=system)
    result = run_passkey("x", systems=["mesa"], lengths=[256], fillers=["random"], prompts=1, text=text, progress=False)
    assert tokenizer.decode(system.prompts[0]).count("wombat") > 20
    assert json.loads(result.to_json())["text"]["name"] == str(text)


def test_an_interrupt_keeps_what_was_finished(use, tokenizer, tmp_path: Path) -> None:
    answer = reader(tokenizer)
    count = 0

    def until_interrupted(prompt: Sequence[int]) -> list[int]:
        nonlocal count
        count += 1
        if count > 5:
            raise KeyboardInterrupt
        return answer(prompt)

    use(mesa=Scripted(until_interrupted))
    result = run_passkey("x", systems=["mesa"], lengths=[256, 300], prompts=2, progress=False)
    assert not result.complete
    assert [(cell.length, cell.filler, cell.correct) for cell in result.cells] == [
        (256, "standard", 2),
        (256, "random", 2),
    ]
    assert "Interrupted" in result.table()
    assert json.loads(result.to_json())["complete"] is False
    result.plot(tmp_path / "plot.png")

    count = 5  # at once
    nothing = run_passkey("x", systems=["mesa"], lengths=[256], prompts=2, progress=False)
    assert (nothing.cells, nothing.complete) == ((), False)
    assert "Interrupted" in nothing.table()
    with pytest.raises(MesaError, match="nothing to draw"):
        nothing.plot(tmp_path / "plot.png")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": [256, 20]}, "a length of 20 tokens is too short: a passkey prompt takes at least 65 tokens"),
        ({"lengths": []}, "name a length"),
        ({"fillers": ["standard", "lorem"]}, "unknown filler 'lorem'; there are standard, random"),
        ({"fillers": []}, "name a filler"),
        ({"prompts": 0}, "number of prompts is 0"),
        ({"depths": [0.5, 1.5]}, "a depth is a share between 0 and 1, not 1.5"),
        ({"digits": 0}, "a key of 0 digits"),
        ({"text": DEMO_MODEL / "config.json"}, "holds .* words"),
        ({"text": "/nowhere/text", "fillers": ["standard"]}, "ask for that filler too"),
    ],
)
def test_bad_options(use, options: dict[str, Any], message: str) -> None:
    system = Scripted()
    use(mesa=system)
    with pytest.raises(MesaError, match=message):
        run_passkey("x", **{"systems": ["mesa"], "progress": False, **options})
    assert not system.prompts


def test_a_bundle(bundle, mesa_config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_passkey(bundle(), lengths=[256, 230], prompts=2)
    assert "passkey: 100%" in capsys.readouterr().err
    assert result.complete
    assert len(result.table().splitlines()) == 2 + 2 + 2  # title, header, lengths
    report = json.loads(result.to_json())
    assert (report["task"], report["seed"], report["digits"]) == ("passkey", 0, 5)
    assert report["source"] == {"path": str(bundle()), "kind": "bundle"}
    assert report["config"] == mesa_config.to_dict()
    assert set(report["systems"]) == {"mesa", "origin"}
    assert {"python", "mesart", "torch"} <= set(report["versions"])
    assert [(c["length"], c["filler"], c["system"]) for c in report["cells"]] == [
        (length, filler, system)
        for length in (230, 256)
        for filler in ("standard", "random")
        for system in ("mesa", "origin")
    ]
    for cell in report["cells"]:
        assert cell["prompts"] == 2
        assert cell["correct"] + len(cell["wrong"]) == 2
        assert cell["interval95"][0] <= cell["rate"] <= cell["interval95"][1]
    result.plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")

    with pytest.raises(MesaError, match=r"largest bucket .* 344 tokens; .*--max-tokens 512"):
        run_passkey(bundle(), lengths=[256, 512], prompts=1)


def test_the_demo_model_finds_keys_past_its_window() -> None:
    """The shipped weights; the one test here that depends on what they have learned. At 4x T_r, from the checkpoint."""
    result = run_passkey(DEMO_MODEL, lengths=[1024], fillers=["standard"], prompts=6, progress=False)
    rates = {cell.system: cell.rate for cell in result.cells}
    assert rates["mesa"] >= 5 / 6
    assert rates["origin"] <= 2 / 6
