"""The adapter to lm-evaluation-harness: its arithmetic, and the harness itself where it is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mesart.evaluation import lm_harness
from mesart.evaluation.lm_harness import MesaLM, generate_text, next_logits, sampling_config, score_continuations
from mesart.evaluation.passkey import QUESTION
from mesart.evaluation.systems import System, open_systems
from mesart.graphs import MesaError, Plan
from mesart.runtime.sampling import Sampler, SamplingConfig
from tests.evaluation.conftest import DEMO_MODEL, Scripted

PROMPT = np.random.default_rng(0).integers(2, 300, 1500).tolist()
GREEDY = Sampler(SamplingConfig())


class Remembering(System):
    """Its logits depend on every token so far, and on nothing else: prompts and steps must come to the same."""

    engine = "none"
    vocabulary = 5

    def __init__(self, tails: Sequence[int]) -> None:
        self._tails = tails
        self.prompts = 0

    @classmethod
    def logits(cls, tokens: Sequence[int]) -> NDArray[np.float32]:
        return np.random.default_rng(list(tokens)).normal(size=cls.vocabulary).astype(np.float32)

    def prefill(self, input_ids: Sequence[int], last: int) -> NDArray[np.float32]:
        assert last <= self.logits_of(len(input_ids))
        self.prompts += 1
        self._tokens = list(input_ids)
        return np.stack([self.logits(input_ids[: len(input_ids) - back]) for back in reversed(range(last))])

    def step(self, token: int) -> NDArray[np.float32]:
        self._tokens.append(token)
        return self.logits(self._tokens)

    def logits_of(self, tokens: int) -> int:
        return min(tokens, self._tails[tokens % len(self._tails)])


def expected_score(context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
    total, greedy, tokens = 0.0, True, list(context)
    for token in continuation:
        logits = Remembering.logits(tokens).astype(np.float64)
        total += logits[token] - np.log(np.exp(logits).sum())
        greedy &= bool(logits.argmax() == token)
        tokens.append(token)
    return total, greedy


token_ids = st.lists(st.integers(0, Remembering.vocabulary - 1), min_size=1, max_size=8)


@given(pairs=st.lists(st.tuples(token_ids, token_ids), max_size=6), tails=st.lists(st.integers(1, 9), min_size=1))
def test_scores_do_not_depend_on_how_many_logits_a_prompt_gives(pairs, tails) -> None:
    found = dict(score_continuations(Remembering(tails), pairs))
    assert sorted(found) == list(range(len(pairs)))
    for index, pair in enumerate(pairs):
        score, greedy = expected_score(*pair)
        assert found[index][0] == pytest.approx(score)
        assert found[index][1] == greedy


def test_choices_of_one_token_share_a_prompt() -> None:
    system = Remembering([1])
    found = dict(score_continuations(system, [([1, 2, 3], [choice]) for choice in range(5)]))
    assert system.prompts == 1
    assert np.exp([score for score, _ in found.values()]).sum() == pytest.approx(1)
    assert sum(greedy for _, greedy in found.values()) == 1


@pytest.mark.parametrize("pair", [([], [1]), ([1], [])])
def test_nothing_to_score(pair) -> None:
    with pytest.raises(MesaError, match="at least one token each"):
        list(score_continuations(Remembering([9]), [pair]))


def test_logits_that_are_no_numbers() -> None:
    class Broken(Remembering):
        @classmethod
        def logits(cls, tokens: Sequence[int]) -> NDArray[np.float32]:
            return np.full(5, np.nan, dtype=np.float32)

    with pytest.raises(MesaError, match="not finite"):
        list(score_continuations(Broken([9]), [([1], [2])]))


@pytest.mark.parametrize(("context", "continuation"), [(1, 40), (40, 10), (1, 120), (100, 60), (250, 8), (250, 90)])
def test_a_bundle_scores_as_the_reference(bundle, checkpoint, mesa_config, context: int, continuation: int) -> None:
    """In the trained window of 64 tokens and past it; continuations within a plan's tail, and longer ones."""
    tokens = PROMPT[: context + continuation - 1]
    prompt = max(n for n in range(context, len(tokens) + 1) if Plan.of(mesa_config, n).tail.start < context)
    assert (prompt < len(tokens)) == (continuation in (120, 60, 90)), "both ways are to be tested"
    with open_systems(bundle(), ["mesa"]) as exported:
        rows = np.stack(list(next_logits(exported.systems["mesa"], tokens, continuation)))
    with open_systems(checkpoint("llama"), ["mesa"], config=mesa_config) as plain:
        reference = plain.systems["mesa"]
        expected = [*reference.prefill(tokens[:prompt], prompt - context + 1), *map(reference.step, tokens[prompt:])]
    assert len(rows) == continuation
    np.testing.assert_allclose(rows, np.stack(expected), atol=1e-3)


def test_a_prompt_longer_than_the_largest_bucket(bundle) -> None:
    with open_systems(bundle(), ["mesa"]) as opened, pytest.raises(MesaError, match="344 tokens; .*--max-tokens 345"):
        list(score_continuations(opened.systems["mesa"], [(PROMPT[:345], [1])]))


@pytest.mark.parametrize(
    ("count", "stop", "expected"),
    [
        (99, [], "one two. three"),  # to the end of text
        (99, ["."], "one two"),
        (99, ["w", "e t"], "on"),
        (99, ["none"], "one two. three"),
        (2, ["none"], None),
        (0, [], ""),
    ],
)
def test_generated_text_ends(tokenizer, count: int, stop: list[str], expected: str | None) -> None:
    ids = tokenizer.encode("one two. three", add_special_tokens=False)
    if expected is None:
        expected = tokenizer.decode(ids[:count])
    assert generate_text(Scripted(lambda _: ids), tokenizer, [0, 5], count, stop, GREEDY) == expected


def test_sampling() -> None:
    assert sampling_config({"do_sample": False, "temperature": 0.0, "top_p": 0.9, "num_beams": 1}, 3).temperature == 0
    sampled = sampling_config({"do_sample": True, "temperature": 0.7, "top_p": 0.9}, 3)
    assert (sampled.temperature, sampled.top_p, sampled.top_k, sampled.seed) == (0.7, 0.9, 50, 3)
    with pytest.raises(MesaError, match="ask for num_beams, typical_p; there are do_sample, .*--gen_kwargs"):
        sampling_config({"do_sample": False, "typical_p": 0.5, "num_beams": 4}, 0)
    with pytest.raises(MesaError, match="top_p is 2"):
        sampling_config({"do_sample": True, "top_p": 2}, 0)


def test_without_the_harness(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(lm_harness, "_INSTALLED", False)
    with pytest.raises(MesaError, match=r"pip install 'mesart\[lm-eval\]'"):
        MesaLM(DEMO_MODEL)
    assert lm_harness.main() == 2
    assert capsys.readouterr().err.count("\n") == 1


# From here on with the harness.

needs_harness = pytest.mark.skipif(not lm_harness._INSTALLED, reason="lm_eval is not installed: the extra lm-eval")
TEXTS = ["def f(x):\n    return x + 1\n", "import os\nimport sys\n" * 4, "", "a"]


def instances(kind: str, *arguments: tuple) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=each, idx=i) for i, each in enumerate(arguments)]


def passkey(key: int, sentences: int) -> str:
    filler = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. " * sentences
    return f"{filler}The pass key is {key}. Remember it. {key} is the pass key. {filler}{QUESTION}"


@pytest.fixture(scope="module")
def demo():
    pytest.importorskip("lm_eval")
    with_harness = MesaLM(DEMO_MODEL)
    yield with_harness
    with_harness.close()


@pytest.fixture(scope="module")
def plain():
    """The harness's own model class, on the same checkpoint."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate", reason="the harness's own models need it")
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(DEMO_MODEL), device="cpu", dtype="float32", batch_size=1)


def test_log_likelihoods_are_those_of_the_harness(demo, plain) -> None:
    asked = instances(
        "loglikelihood",
        ("The pass key is 31415. Remember it. 31415 is the pass key. The pass key is", " 31415"),
        ("The pass key is 31415. Remember it. 31415 is the pass key. The pass key is", " 27182"),
        ("import os\nimport ", "sys"),
        ("import os\nimport", " numpy as np"),
        ("", "def f(x):"),
        ("<|begin|>class", " A:"),
        ("The grass is green. " * 30, "The sky is blue."),
    )
    found, expected = (model.loglikelihood(asked, disable_tqdm=True) for model in (demo, plain))
    np.testing.assert_allclose([score for score, _ in found], [score for score, _ in expected], atol=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert {greedy for _, greedy in found} == {True, False}


def test_texts_are_scored_as_the_harness_does(demo, plain) -> None:
    asked = instances("loglikelihood_rolling", *((text,) for text in TEXTS))
    found, expected = (model.loglikelihood_rolling(asked, disable_tqdm=True) for model in (demo, plain))
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_texts_longer_than_the_limit_are_scored_in_windows(plain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "_max_length", 20)
    asked = instances("loglikelihood_rolling", *((text,) for text in TEXTS))
    expected = plain.loglikelihood_rolling(asked, disable_tqdm=True)
    for system in ("mesa", "origin"):
        model = MesaLM(DEMO_MODEL, system, max_length=20)
        assert len(model.tok_encode(TEXTS[1])) > 20
        np.testing.assert_allclose(model.loglikelihood_rolling(asked, disable_tqdm=True), expected, atol=1e-3)
        with pytest.raises(MesaError, match="tokens is longer than max_length=20"):
            model.loglikelihood(instances("loglikelihood", ("a" + " a" * 19, " a a")), disable_tqdm=True)


def test_generations_are_those_of_the_harness(demo, plain) -> None:
    asked = instances(
        "generate_until",
        (passkey(31415, 1), {"until": ["."], "max_gen_toks": 16}),
        ("import os\nimport sys\n\ndef f(self", {"until": ["\n", ""], "max_gen_toks": 20}),
        ("class A:\n", {"until": "Author:", "max_gen_toks": 24, "do_sample": False, "temperature": 1}),
        ("class A:\n", {"max_new_tokens": 5}),
    )
    found, expected = (model.generate_until(asked, disable_tqdm=True) for model in (demo, plain))
    assert found == expected
    assert found[0] == " 31415"


def test_sampled_texts_differ_and_can_be_had_again(demo) -> None:
    asked = instances(
        "generate_until", *[("class A:\n", {"do_sample": True, "temperature": 1, "max_gen_toks": 12})] * 3
    )
    first, again = (demo.generate_until(asked, disable_tqdm=True) for _ in range(2))
    assert first == again
    assert len(set(first)) > 1


def test_chats_are_rendered_as_the_harness_does(bundle, checkpoint) -> None:
    pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate", reason="the harness's own models need it")
    from lm_eval.models.huggingface import HFLM

    model = MesaLM(bundle())
    plain = HFLM(pretrained=str(checkpoint("llama")), device="cpu", dtype="float32", batch_size=1)
    chat = [{"role": "user", "content": "What is it?"}]
    for messages, prompt in ((chat, True), ([*chat, {"role": "assistant", "content": "It is "}], False)):
        assert model.apply_chat_template(messages, prompt) == plain.apply_chat_template(messages, prompt)
    assert "/" not in model.tokenizer_name
    with pytest.raises(MesaError, match="not one named 'rag'"):
        model.chat_template("rag")


@needs_harness
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 8}, "batch_size is 8"),
        ({"batch_size": "auto"}, "batch_size is auto"),
        ({"device": "cuda:1"}, "device is 'cuda:1'"),
        ({"max_length": 0}, "max_length is 0"),
        ({"system": "magic"}, "unknown system"),
        ({"backend": "openvino"}, "export it first"),
    ],
)
def test_options_that_cannot_be_honoured(options, message: str) -> None:
    with pytest.raises(MesaError, match=message):
        MesaLM(DEMO_MODEL, **options)


@needs_harness
def test_a_limit_longer_than_the_bundle(bundle) -> None:
    with pytest.raises(MesaError, match="--max-tokens 400"):
        MesaLM(bundle(), max_length=400)


@needs_harness
def test_a_bundle_without_a_tokenizer(bundle_copy: Path) -> None:
    (bundle_copy / "tokenizer.json").unlink()
    with pytest.raises(MesaError, match=r"tokenizer\.json is missing"):
        MesaLM(bundle_copy)


def make_task(folder: Path, name: str, documents: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    """A task of the harness over a JSON file; JSON is YAML, too."""
    data = folder / f"{name}.json"
    data.write_text(json.dumps(documents))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{answer}}",
        **fields,
    }
    (folder / f"{name}.yaml").write_text(json.dumps(task))
    return task


@pytest.fixture
def tasks(tmp_path: Path) -> list[dict[str, Any]]:
    """A task of each kind, past the trained window of 256 tokens."""
    keys = [31415, 27182]
    documents = [{"text": passkey(key, 12), "answer": f" {key}", "keys": [f" {each}" for each in keys]} for key in keys]
    exact = {"metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]}
    accuracy = {"metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]}
    perplexity = {"metric_list": [{"metric": "word_perplexity"}]}
    texts = [{"text": "", "answer": (TEXTS[0] + TEXTS[1]) * 4}]
    return [
        make_task(
            tmp_path,
            "keys_chosen",
            [{**document, "answer": index} for index, document in enumerate(documents)],
            output_type="multiple_choice",
            doc_to_choice="{{keys}}",
            **accuracy,
        ),
        make_task(
            tmp_path,
            "keys_told",
            documents,
            output_type="generate_until",
            generation_kwargs={"until": ["."], "max_gen_toks": 8},
            **exact,
        ),
        make_task(tmp_path, "texts", texts, output_type="loglikelihood_rolling", **perplexity),
    ]


def test_tasks(demo, tasks) -> None:
    """With Mesa the demo model finds what is far past its window; as it is it does not."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False)  # it need not read the files of all the harness's own tasks
    mesa, origin = (
        simple_evaluate(model=model, tasks=tasks, bootstrap_iters=0, task_manager=manager)["results"]
        for model in (demo, MesaLM(DEMO_MODEL, "origin"))
    )
    assert mesa["keys_chosen"]["acc,none"] == 1
    assert mesa["keys_told"]["exact_match,none"] == 1
    assert origin["keys_told"]["exact_match,none"] == 0
    assert mesa["texts"]["word_perplexity,none"] < origin["texts"]["word_perplexity,none"]


@needs_harness
def test_command_line(bundle, checkpoint, mesa_config, tmp_path: Path) -> None:
    """A bundle through the harness's own command line; what it answers is what the reference answers."""
    documents = [{"text": "The grass is green. " * 20, "answer": 0, "keys": ["The sky", "yellow", "Here we go."]}]
    make_task(tmp_path, "chosen", documents, output_type="multiple_choice", doc_to_choice="{{keys}}")
    arguments = {
        "--model": "mesart",
        "--model_args": f"bundle={bundle()},backend=onnxruntime",
        "--tasks": "chosen",
        "--include_path": str(tmp_path),
        "--output_path": str(tmp_path / "out"),
    }
    command = [sys.executable, "-m", "mesart.evaluation.lm_harness", "--log_samples"]
    done = subprocess.run(
        [*command, *(word for pair in arguments.items() for word in pair)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "HF_HOME": str(tmp_path / "hf")},
    )
    assert done.returncode == 0, done.stderr
    (results,) = (tmp_path / "out").rglob("results_*.json")
    config = json.loads(results.read_text())["config"]
    assert config["mesart_engine"].startswith("onnxruntime on ")
    assert config["mesart_config"]["train_length"] == 64
    (samples,) = (tmp_path / "out").rglob("samples_chosen_*.jsonl")
    sample = json.loads(samples.read_text())
    found = [float(response[0]) for response in sample["filtered_resps"]]
    pairs = [(each["arg_0"], each["arg_1"]) for each in sample["arguments"].values()]
    reference = MesaLM(checkpoint("llama"), config=mesa_config)
    assert len(pairs) == 3
    assert len(reference.tok_encode(pairs[0][0])) > 64
    expected = reference.loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True)
    np.testing.assert_allclose(found, [score for score, _ in expected], atol=1e-3)


@needs_harness
def test_command_line_errors_take_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: MesaLM(DEMO_MODEL, device="tpu"))
    assert lm_harness.main() == 2
    assert (
        capsys.readouterr().err
        == "mesart: error: device is 'tpu', but the backend says where a model runs: leave it out\n"
    )
