"""Generation: the same text by whatever road it is made, and turns that continue where the last one ended."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from mesart.graphs import TorchReference
from mesart.runtime import MesaModel, SamplingConfig, present_backends

PROMPT = "The grass is green. The sky is blue. " * 8  # past the window
GREEDY = SamplingConfig()


@pytest.fixture(scope="module")
def model(bundle) -> Iterator[MesaModel]:
    with MesaModel.load(bundle(), "torch", verify=False) as loaded:
        assert len(loaded.tokenizer.encode(PROMPT)) > loaded.manifest.config.train_length
        yield loaded


def generated_ids(model: MesaModel, prompts: list[list[int]], count: int, **options) -> list[list[int]]:
    """New tokens of each row."""
    steps = list(model.generate_ids(prompts, count, **options))
    return [[token for token in row if token is not None] for row in zip(*steps, strict=True)]


def test_greedy_takes_the_likeliest_token_of_the_reference(model, checkpoint, mesa_config):
    reference = TorchReference(checkpoint("llama"), mesa_config)
    ids = model.tokenizer.encode(PROMPT)
    expected = [int(reference.prefill(ids).argmax())]
    while len(expected) < 40 and expected[-1] not in model.eos_token_ids:
        expected.append(int(reference.step(expected[-1]).argmax()))
    assert generated_ids(model, [ids], 40, sampling=GREEDY) == [expected]


def test_streamed_pieces_are_the_generated_text(model):
    for prompt in (PROMPT, "Here we go.", model.tokenizer.encode(PROMPT)):
        pieces = list(model.stream(prompt, 40))
        assert len(pieces) > 3
        assert "".join(pieces) == model.generate(prompt, 40)


def test_the_seed_decides(model):
    def sample(seed: int | None) -> str:
        text = model.generate(PROMPT, 30, temperature=1.0, seed=seed)
        assert isinstance(text, str)
        return text

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) == 4
    assert len({sample(None) for _ in range(4)}) == 4
    assert sample(1) != model.generate(PROMPT, 30)


def test_max_new_tokens(model):
    assert [len(row) for row in generated_ids(model, [[3, 4, 5]], 7)] == [7]


def test_a_stop_string_ends_the_text_before_it(model):
    whole = model.generate(PROMPT, 40)
    assert isinstance(whole, str)
    stop = whole[10:13]
    cut = model.generate(PROMPT, 40, stop=stop)
    assert cut == whole[: whole.index(stop)]
    assert "".join(model.stream(PROMPT, 40, stop=["never to be seen", stop])) == cut


class TestEndOfText:
    @pytest.fixture
    def ends_early(self, model, monkeypatch) -> list[int]:
        """A token that greedy generation comes to is made the one that ends the text; the tokens before it."""
        ids = generated_ids(model, [model.tokenizer.encode(PROMPT)], 12)[0]
        end = next(index for index in range(3, 12) if ids[index] not in ids[:index])
        monkeypatch.setattr(model, "eos_token_ids", (ids[end],))
        return ids[:end]

    def test_it_ends_the_text_and_is_not_part_of_it(self, model, ends_early):
        assert model.generate(PROMPT, 40) == model.tokenizer.decode(ends_early)
        (row,) = generated_ids(model, [model.tokenizer.encode(PROMPT)], 40)
        assert row == [*ends_early, *model.eos_token_ids]

    def test_rows_of_a_batch_end_on_their_own(self, model, ends_early):
        prompts = [PROMPT, "Here we go."]
        texts = model.generate(prompts, 20)
        assert texts == [model.generate(prompt, 20) for prompt in prompts]
        assert texts[0] == model.tokenizer.decode(ends_early)


def test_a_batch_gives_the_texts_of_its_prompts(model):
    prompts = [PROMPT, "Here we go.", PROMPT[:200] + "There and back again."]
    assert model.generate(prompts, 30) == [model.generate(prompt, 30) for prompt in prompts]
    assert model.generate(prompts[:1], 30) == [model.generate(prompts[0], 30)]


def test_a_batch_stops_row_by_row(model):
    prompts = [PROMPT, "Here we go."]
    first = model.generate(PROMPT, 30)
    assert isinstance(first, str)
    stop = first[5:8]
    assert model.generate(prompts, 30, stop=stop) == [model.generate(prompt, 30, stop=stop) for prompt in prompts]


class TestAppend:
    def test_a_second_turn_continues_the_first(self, model):
        """As if prompt, answer and second prompt had been fed one after the other."""
        first, second = model.tokenizer.encode(PROMPT), model.tokenizer.encode("Find it and memorize it.")
        (answer,) = generated_ids(model, [first], 20)
        (follow_up,) = generated_ids(model, [second], 20, append=True)

        model.prefill(first)
        for token in answer[:-1]:
            model.step(token)
        logits = model.extend([answer[-1], *second])
        expected = []
        for _ in range(20):
            expected.append(int(logits[0, -1].argmax()))
            if expected[-1] in model.eos_token_ids:
                break
            logits = model.step(expected[-1])
        assert follow_up == expected
        assert follow_up != generated_ids(model, [second], 20)[0]

    def test_a_generation_that_was_left_can_be_continued(self, model):
        """Within the window, where turns and one long prompt are the same, so that the prompt can be written out."""
        first, second = model.tokenizer.encode("Here we go."), model.tokenizer.encode("Find it.")
        seen = [row[0] for row in itertools.islice(model.generate_ids([first], 20), 5)]
        (continued,) = generated_ids(model, [second], 10, append=True)
        assert model.lengths[0] < 64
        assert continued == generated_ids(model, [[*first, *seen, *second]], 10)[0]

    def test_a_second_turn_of_a_batch_continues_its_rows(self, model):
        """With all that each row generated, the last token included, and no more than that."""
        prompts = [model.tokenizer.encode(text) for text in (PROMPT, "Here we go.")]
        turns = [model.tokenizer.encode(text) for text in ("Find it.", "The sun is yellow.")]
        generated_ids(model, prompts, 6)
        together = generated_ids(model, turns, 6, append=True)
        for row in range(2):
            generated_ids(model, [prompts[row]], 6)
            assert generated_ids(model, [turns[row]], 6, append=True) == [together[row]]

    def test_a_step_after_a_generation_is_the_next_token(self, model):
        """The last generated token was shown but not fed; it must not be fed later, out of its order."""
        ids = model.tokenizer.encode(PROMPT)
        model.prefill(ids)
        length = model.lengths[0]
        (answer,) = generated_ids(model, [ids], 5)
        model.step(answer[-1])
        assert model.lengths == [length + 5]
        generated_ids(model, [[7, 8]], 1, append=True)
        assert model.lengths == [length + 7]

    def test_appending_to_nothing_is_a_first_turn(self, bundle):
        with MesaModel.load(bundle(), "torch", verify=False) as fresh:
            text = fresh.generate(PROMPT, 10, append=True)
            assert text == fresh.generate(PROMPT, 10)


def test_chat_puts_the_template_around_the_messages(model):
    messages = [{"role": "user", "content": "Find it."}]
    expected = model.generate(model.tokenizer.encode("<|user|>Find it.<|assistant|>"), 10)
    assert "".join(model.chat(messages, 10)) == expected


def test_limits_and_buckets(model):
    assert model.max_tokens == 344
    assert [model.bucket(count) for count in (1, 64, 65, 104, 105, 344)] == [0, 0, 2, 2, 3, 8]


@pytest.mark.parametrize("backend", [name for name in present_backends() if name != "torch"])
def test_the_runtime_imports_neither_torch_nor_transformers(bundle, backend):
    """They are made impossible to import, as where they are not installed."""
    code = """
import sys
for name in ("torch", "transformers", "onnx", "onnxscript", "safetensors"):
    sys.modules[name] = None
from mesart.runtime import MesaModel
with MesaModel.load(sys.argv[1], sys.argv[2]) as model:
    print(len(model.prefill([3] * 200)), model.generate("The grass is green. " * 20, 5))
    print("".join(model.stream("Here we go.", 5, append=True, temperature=1.0, seed=1)))
"""
    command = [sys.executable, "-c", code, os.fspath(bundle()), backend]
    done = subprocess.run(command, check=False, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()


def test_prompts_may_be_lists_or_arrays(model):
    """One prompt, a batch of one length, or of different lengths."""
    first, second = [3, 4, 5], [6, 7, 8, 9]
    expected = np.concatenate([model.prefill(first), model.prefill(second)])
    for batch in ([first, second], (tuple(first), second), [np.array(first), np.array(second)]):
        assert np.abs(model.prefill(batch) - expected).max() < 1e-5
    for one in (np.array(first), np.array([first]), [first], tuple(first)):
        assert np.array_equal(model.prefill(one), expected[:1])
