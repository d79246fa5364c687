"""Chunks from a store: a prompt gives to the last bit what it gives when all of it is computed."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesart.graphs import MesaError
from mesart.runtime import ChunkStore, MesaModel, SamplingConfig, present_backends
from mesart.runtime.chunk_store.stored import StoredChunks
from mesart.runtime.documents import DocumentPrompt, Reuse
from mesart.runtime.engine import Turn
from mesart.runtime.usage import CachedTokens, Usage
from tests.runtime.faults import Faults, Interruption

HEAD, CHUNK, WINDOW = 8, 40, 64
GREEDY = SamplingConfig(temperature=0)


def tokens(count: int, seed: int = 0) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(2, 320, count).tolist()
    return ids


LENGTHS = (1, 7, 33, 40, 41, 70)
DOCUMENTS = [tokens(count, seed=100 + count) for count in LENGTHS]
LEADS = [[], tokens(3, seed=1), tokens(8, seed=2), tokens(31, seed=3)]


@dataclasses.dataclass
class Answer:
    """What a prompt has given, and how."""

    tokens: list[int]
    keys: list[Any]
    values: list[Any]
    usage: Usage

    def is_that_of(self, other: Answer) -> bool:
        """To the last bit."""
        pairs = [*zip(self.keys, other.keys, strict=True), *zip(self.values, other.values, strict=True)]
        return self.tokens == other.tokens and all(np.array_equal(ours, theirs) for ours, theirs in pairs)


def parts(documents: Sequence[list[int]], lead: list[int] | None = None, question: int = 9) -> DocumentPrompt:
    return DocumentPrompt(lead or [], documents, tokens(question, seed=9))


def answer(
    model: MesaModel, prompt: DocumentPrompt, reuse: Reuse = "always", *, count: int = 4, salt: str = ""
) -> Answer:
    """Reads a prompt as ``generate`` does, in a model whose vocabulary has more ids than its tokenizer."""
    model.clear()  # a live text with the same documents would only get another tail
    row, how = prompt.joined(model.manifest, reuse), model._options(reuse, salt, None)
    ids = [token for (token,) in model._tokens([row], count, GREEDY, how, append=False)]
    keys, values = model.snapshot(0)
    assert model.usage is not None
    return Answer([token for token in ids if token is not None], keys, values, model.usage)


@contextmanager
def with_store(model: MesaModel, store: ChunkStore | None) -> Iterator[None]:
    """The model as if it had been loaded with that store, or with none."""
    old = model._stored
    assert old is not None
    model._stored = None if store is None else dataclasses.replace(old, store=store)
    try:
        yield
    finally:
        model._stored = old


def pins(store: ChunkStore) -> dict[str, int]:
    return dict(store._cache._pins)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path: Path = tmp_path_factory.mktemp("chunks")
    return path


@pytest.fixture(scope="module", params=present_backends())
def model(request, bundle, folder) -> Iterator[MesaModel]:
    """On each runner: blocks, rows that are written in place, and graphs that take a past."""
    with (
        ChunkStore("64MiB", folder / request.param) as store,
        MesaModel.load(bundle(), request.param, threads=1, verify=False, store=store) as loaded,
    ):
        yield loaded


@pytest.fixture
def store(model) -> Iterator[ChunkStore]:
    """A new one, which the model uses meanwhile."""
    with ChunkStore("64MiB") as new, with_store(model, new):
        yield new
        assert pins(new) == {}, "pins are left"


@pytest.fixture(scope="module")
def computed(model) -> Callable[..., Answer]:
    """What prompts give when all is computed."""

    def compute(prompt: DocumentPrompt, reuse: Reuse = "always", **options: Any) -> Answer:
        with with_store(model, None):
            found = answer(model, prompt, reuse, **options)
        assert found.usage.cached_tokens == CachedTokens()
        return found

    return compute


class TestExact:
    @given(st.data())
    @settings(max_examples=12)
    def test_random_documents_in_any_order(self, model, computed, data):
        """As often as they come, from memory or from the disk, whatever of them is there."""
        which = data.draw(st.lists(st.sampled_from(range(len(DOCUMENTS))), min_size=1, max_size=5))
        documents = [DOCUMENTS[index] for index in which]
        prompt = parts(documents, data.draw(st.sampled_from(LEADS)), data.draw(st.sampled_from([1, 9, 30])))
        before = data.draw(st.sampled_from(["as it is", "disk alone", "memory alone"]))
        store = model._stored.store
        if before == "memory alone":
            with ChunkStore("64MiB") as memory, with_store(model, memory):
                answer(model, parts(data.draw(st.permutations(documents)), list(prompt.lead)), count=1)
                found = answer(model, prompt)
                assert found.usage.cached_tokens.disk == 0
                assert found.usage.cached_tokens.memory == found.usage.prompt_tokens - len(prompt.question)
                assert pins(memory) == {}
        else:
            if before == "disk alone":
                store.flush()
                store.clear_memory()
            found = answer(model, prompt)
        assert found.is_that_of(computed(prompt))
        assert found.usage.prompt_tokens == found.usage.computed_tokens + found.usage.cached_tokens.total
        assert pins(store) == {}

    def test_after_a_restart(self, model, bundle, folder, computed):
        """From the folder of a store that is gone, by a model that was loaded anew."""
        path, prompt = folder / f"restart-{model.backend}", parts(DOCUMENTS)
        with ChunkStore("64MiB", path) as store, with_store(model, store):
            first = answer(model, parts(DOCUMENTS[::-1]))
            assert first.usage.cached_tokens == CachedTokens()
        with (
            ChunkStore("64MiB", path) as store,
            MesaModel.load(bundle(), model.backend, threads=1, verify=False, store=store) as again,
        ):
            found = answer(again, prompt)
            assert found.usage.cached_tokens == CachedTokens(disk=HEAD + sum(LENGTHS))
            second = answer(again, prompt)
            assert second.usage.cached_tokens == CachedTokens(memory=HEAD + sum(LENGTHS))
        assert found.is_that_of(computed(prompt))
        assert second.is_that_of(found)

    def test_logits_too(self, model, store, computed):
        """Of a prompt beyond the trained length, which every call cuts at the same tokens."""
        ids = tokens(200)
        with with_store(model, None):
            expected = model.prefill(ids, all_logits=True)
        for cached in (0, HEAD + 4 * CHUNK):
            assert np.array_equal(model.prefill(ids, all_logits=True), expected)
            assert model.usage is not None
            assert model.usage.cached_tokens == CachedTokens(memory=cached)

    def test_a_store_with_next_to_no_memory(self, model, computed):
        """Each chunk is computed again, or some are: the answer is the same."""
        size = model.engine.store.bytes_per_token
        for room in (1, HEAD * size, 60 * size):
            with ChunkStore(room) as small, with_store(model, small):
                for _ in range(2):
                    assert answer(model, parts(DOCUMENTS)).is_that_of(computed(parts(DOCUMENTS)))
                    assert small.memory_in_use <= room
                    assert pins(small) == {}

    def test_a_chunk_that_comes_twice_is_computed_once(self, model, store, computed):
        prompt = parts([DOCUMENTS[3], DOCUMENTS[2], DOCUMENTS[3], DOCUMENTS[3]])
        found = answer(model, prompt)
        assert found.usage.cached_tokens == CachedTokens(memory=2 * CHUNK)
        assert found.is_that_of(computed(prompt))

    def test_specialised_graphs(self, bundle):
        """Each of its own shape, whose chunks are no others' to use."""
        with ChunkStore("64MiB") as store:
            with MesaModel.load(bundle(), "torch", verify=False, store=store) as symbolic:
                answer(symbolic, parts(DOCUMENTS[3:5]))
            with MesaModel.load(bundle(), "torch", specialised=True, verify=False, store=store) as model:
                first = answer(model, parts(DOCUMENTS[3:5]))
                assert first.usage.cached_tokens == CachedTokens()
                found = answer(model, parts(DOCUMENTS[3:5]))
                assert found.usage.cached_tokens.memory == HEAD + 81
                assert found.is_that_of(first)


class TestLaterTurns:
    TURN = tokens(150, seed=5)

    def _turn(self, model: MesaModel, ids: list[int]) -> tuple[Any, Any, Usage]:
        logits = model.extend(ids)
        assert model.usage is not None
        return logits, model.snapshot(0), model.usage

    def test_share_the_entries(self, model, store):
        """Once computed behind the stored head, they are found, and give the same to the last bit."""
        first = tokens(200)
        model.prefill(first)
        logits, kv, usage = self._turn(model, self.TURN)
        assert usage.cached_tokens == CachedTokens(live=200)
        for cached in ("this text's own", "another text's"):
            model.prefill(first if cached == "this text's own" else [*first[:HEAD], *tokens(192, seed=6)])
            again, kv_again, usage = self._turn(model, self.TURN)
            assert usage.cached_tokens.memory == usage.prompt_tokens - 200 - usage.computed_tokens >= 3 * CHUNK
            if cached == "this text's own":
                assert np.array_equal(again, logits)
                for ours, theirs in zip([*kv[0], *kv[1]], [*kv_again[0], *kv_again[1]], strict=True):
                    assert np.array_equal(ours, theirs)

    def test_find_what_a_first_prompt_has_computed(self, model, store):
        """And the other way round: keys at local positions, behind the head as a first prompt has it."""
        head = tokens(HEAD)
        chunk = self.TURN[:CHUNK]
        document = parts([chunk], head)
        model.prefill([*head, *tokens(192, seed=6)])
        model.extend(self.TURN)
        found = answer(model, document)
        assert found.usage.cached_tokens == CachedTokens(memory=HEAD + CHUNK)
        with with_store(model, None):
            expected = answer(model, document)
        assert found.is_that_of(expected)

    def test_a_head_that_was_turned_gives_nothing_to_keep(self, model, store):
        """Its keys are rounded twice then: what is computed behind them is this text's alone."""
        model.prefill(tokens(200))
        store.clear_memory()
        model.extend(self.TURN)
        assert store.memory_in_use == 0

    def test_a_head_that_was_turned_and_brought_back_gives_nothing_to_keep(self, model, store):
        """It stands at its first positions again, and is not what it was."""
        ids = tokens(20)
        model.prefill(ids)
        with Faults(model) as faults:
            faults.in_runs(lambda segment: segment.phase == "tail")
            with pytest.raises(MesaError, match="gave up"):
                model.extend(self.TURN)
        store.clear_memory()
        model.extend(self.TURN)
        assert store.memory_in_use == 0

    def test_a_head_of_a_short_text_gives_nothing_to_keep(self, model, store):
        """It was computed with all of the text: in other shapes than a first prompt's, and so to other last bits."""
        model.prefill(tokens(20))
        model.extend(self.TURN)
        assert store.memory_in_use == 0
        answer(model, parts([tokens(30, seed=7)], tokens(HEAD)))  # now the head is there
        model.prefill(tokens(20))
        model.extend(self.TURN)
        assert store.memory_in_use > 100 * model.engine.store.bytes_per_token
        with with_store(model, None):
            expected = answer(model, parts([self.TURN[:CHUNK]], tokens(HEAD)))
        found = answer(model, parts([self.TURN[:CHUNK]], tokens(HEAD)))
        assert found.usage.cached_tokens == CachedTokens(memory=HEAD + CHUNK)
        assert found.is_that_of(expected)

    def test_behind_documents(self, model, store, computed):
        """Steps and turns behind a prompt of documents, from the store or not, are the same."""
        prompt = parts(DOCUMENTS, tokens(5))
        results = []
        for used in (None, store, store):
            with with_store(model, used):
                found = answer(model, prompt, count=30)
                logits, kv, _ = self._turn(model, tokens(20, seed=8))
                results.append([found.tokens, logits, *kv[0], *kv[1]])
        for other in results[1:]:
            assert all(np.array_equal(ours, theirs) for ours, theirs in zip(results[0], other, strict=True))


class TestReuse:
    def test_auto_changes_nothing(self, model, store, computed):
        """Within the trained length it is the plain model; beyond it the same as without a store."""
        for documents in ([DOCUMENTS[1]], [DOCUMENTS[2], DOCUMENTS[1]], DOCUMENTS):
            prompt = parts(documents)
            for _ in range(2):
                assert answer(model, prompt, "auto").is_that_of(computed(prompt, "auto"))
            if sum(map(len, documents)) + 9 <= WINDOW:
                plain = [token for document in documents for token in document] + list(prompt.question)
                assert answer(model, prompt, "auto").usage == Usage(len(plain), len(plain))
                assert model.texts[0].ids[: len(plain)].tolist() == plain
                assert store.memory_in_use == 0

    def test_off_neither_reads_nor_writes(self, model, store, computed):
        prompt = parts(DOCUMENTS)
        assert answer(model, prompt, "off").is_that_of(computed(prompt, "off"))
        assert store.memory_in_use == 0
        answer(model, prompt)
        for key in store._cache._blocks.values():
            key.buffer[:] = 255  # numbers that are none: whoever reads them shows it
        found = answer(model, prompt, "off")
        assert found.usage.cached_tokens == CachedTokens()
        assert found.is_that_of(computed(prompt, "off"))

    def test_prompts_without_documents_share_chunks(self, model, store):
        ids = tokens(300)
        model.prefill(ids)
        model.prefill([*ids[: HEAD + 2 * CHUNK], *tokens(120, seed=4)])
        assert model.usage is not None
        assert model.usage.cached_tokens == CachedTokens(memory=HEAD + 2 * CHUNK)

    def test_a_salt_keeps_apart(self, model, store):
        prompt = parts(DOCUMENTS)
        whole = HEAD + sum(LENGTHS)
        found = [answer(model, prompt, salt=salt).usage.cached_tokens.memory for salt in ("", "a", "b", "a", "")]
        assert found == [0, 0, 0, whole, whole]

    def test_another_head_is_another_chunk(self, model, store):
        answer(model, parts(DOCUMENTS, tokens(HEAD)))
        assert answer(model, parts(DOCUMENTS, tokens(HEAD - 1))).usage.cached_tokens.memory == 0

    def test_steps_count_as_computed(self, model, store):
        model.prefill(tokens(100))
        model.step(3)
        assert model.usage == Usage(101, 1, CachedTokens(live=100))


class TestTexts:
    """By way of ``generate``, ``stream``, ``chat`` and ``warm``."""

    DOCUMENTS = ("The grass is green. " * 9, "The sky is blue. The sun is yellow.", "Here we go. " * 12)

    def test_generate(self, model, store):
        expected = []
        for reuse in ("off", "always", "always", "auto"):
            model.clear()
            expected.append(
                model.generate("There?", 8, documents=self.DOCUMENTS, lead="Be brief.", reuse=reuse, temperature=0)
            )
        assert len(set(expected)) == 1
        assert model.usage is not None
        assert model.usage.cached_tokens.memory == model.usage.prompt_tokens - model.usage.computed_tokens > 100
        assert model.usage.computed_tokens == len(model.tokenizer.encode("There?"))

    def test_a_live_text_of_the_same_documents_gets_another_tail(self, model, store):
        """And answers as a new text would; with others before it, in another order or asked for off it is not used."""
        options: dict[str, Any] = {"documents": self.DOCUMENTS, "reuse": "always", "temperature": 0}
        model.clear()
        expected = {question: model.generate(question, 8, **options) for question in ("There?", "Why?")}
        for question in ("There?", "There?", "Why?"):
            assert model.generate(question, 8, **options) == expected[question]
            assert model.usage is not None
            live = model.usage.cached_tokens.live
            assert live == model.usage.prompt_tokens - model.usage.computed_tokens > 100
        for changed in ({"documents": self.DOCUMENTS[::-1]}, {"lead": "Be brief."}, {"reuse": "off"}):
            model.generate("Why?", 8, **{**options, **changed})
            assert model.usage.cached_tokens.live == 0
        model.extend(tokens(150, seed=5))  # rotates what is there
        model.generate("Why?", 8, **options)
        assert model.usage.cached_tokens.live == 0

    def test_a_batch_of_texts_shares_them(self, model, store):
        questions = ["There?", "And back again?", "Green?"]
        with with_store(model, None):
            expected = [model.generate(q, 8, documents=self.DOCUMENTS, temperature=0) for q in questions]
        for _ in range(2):
            assert model.generate(questions, 8, documents=self.DOCUMENTS, temperature=0) == expected
        assert model.usage is not None
        asked = sum(len(model.tokenizer.encode(question)) for question in questions)
        assert model.usage.computed_tokens == asked
        assert pins(store) == {}

    def test_stream(self, model, store):
        seen: list[tuple[int, int]] = []
        options: dict[str, Any] = {"documents": self.DOCUMENTS, "temperature": 0}
        whole = model.generate("There?", 8, **options)
        pieces = list(model.stream("There?", 8, progress=lambda *counts: seen.append(counts), **options))
        assert "".join(pieces) == whole
        assert seen[-1][0] == seen[-1][1]

    def test_warm_computes_what_a_prompt_asks_for(self, model, store):
        for documents, lead in ((self.DOCUMENTS, ""), (self.DOCUMENTS, "Be brief. " * 9), ([[5, 6]], "")):
            report = model.warm(documents, lead=lead)
            assert report.computed_tokens > 0
            again = model.warm(documents, lead=lead)
            assert again == dataclasses.replace(
                report, computed_tokens=0, reused_tokens=report.computed_tokens + report.reused_tokens
            )
            model.generate("There?", 2, documents=documents, lead=lead, reuse="always", temperature=0)
            assert model.usage is not None
            assert model.usage.computed_tokens == len(model.tokenizer.encode("There?"))

    def test_warm_leaves_the_live_texts(self, model, store):
        model.prefill(tokens(100))
        before, taken = model.snapshot(0), model.engine.store.bytes_in_use
        seen: list[tuple[int, int]] = []
        model.warm(self.DOCUMENTS, progress=lambda *counts: seen.append(counts))
        assert model.lengths == [100]
        assert model.engine.store.bytes_in_use == taken
        for ours, theirs in zip([*before[0], *before[1]], [*model.snapshot(0)[0], *model.snapshot(0)[1]], strict=True):
            assert np.array_equal(ours, theirs)
        assert seen == sorted(seen)
        assert seen[-1] == (seen[0][1], seen[0][1])

    @pytest.mark.parametrize("count", [1, 3])
    def test_chat(self, model, store, count):
        """Its template has no place for documents: they begin the first message, with nothing between them."""
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "There?"}]
        documents = self.DOCUMENTS[:count]
        with with_store(model, None):
            expected = "".join(model.chat(messages, 6, documents=documents, reuse="always", temperature=0))
        model.clear()
        report = model.warm(documents, messages=messages)
        assert report.computed_tokens > 50
        assert "".join(model.chat(messages, 6, documents=documents, reuse="always", temperature=0)) == expected
        assert model.usage is not None
        assert model.usage.cached_tokens.memory == report.computed_tokens
        whole = model.tokenizer.apply_chat_template(
            [messages[0], {"role": "user", "content": "".join(documents) + "\n\nThere?"}]
        )
        assert "".join(model.tokenizer.decode(model.texts[0].ids.tolist(), False).split()).startswith(
            "".join(whole.split())
        )


class TestTwoModels:
    def test_of_one_bundle_share_a_store(self, model, bundle, store, computed):
        answer(model, parts(DOCUMENTS))
        with MesaModel.load(bundle(), model.backend, threads=1, verify=False, store=store) as other:
            found = answer(other, parts(DOCUMENTS[::-1]))
            assert found.usage.cached_tokens == CachedTokens(memory=HEAD + sum(LENGTHS))
        assert found.is_that_of(computed(parts(DOCUMENTS[::-1])))
        assert store.memory_in_use > 0, "the store is not the model's to close"

    def test_of_other_weights_or_backends_see_nothing_of_one_another(self, bundle, reseal, tmp_path):
        """Every one computes its own, in memory and on the disk."""
        other = Path(shutil.copytree(bundle(), tmp_path / "other"))
        weights = other / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-200:] = bytes(200)
        weights.write_bytes(content)
        reseal(other, weights.name)
        with ChunkStore("64MiB", tmp_path / "store") as store:
            for folder, backend in [(bundle(), backend) for backend in present_backends()] + [(other, "onnxruntime")]:
                with MesaModel.load(folder, backend, verify=False, store=store) as model:
                    for clear in (False, True):
                        if clear:
                            store.flush()
                            store.clear_memory()
                        found = answer(model, parts(DOCUMENTS[:2]), salt=str(clear))
                        assert found.usage.cached_tokens == CachedTokens()


class TestFailures:
    def test_every_run_and_rotation_leaves_text_and_pins(self, model, store, computed):
        """Wherever it fails, no key of a prompt stays pinned, and the next prompt is answered."""
        prompt = parts([*DOCUMENTS, DOCUMENTS[3]])
        row = prompt.joined(model.manifest, "always")
        expected = computed(prompt)
        with Faults(model, writes=True) as faults:
            answer(model, prompt, count=1)
            runs = faults.count
            for nth in range(1, runs + 1):
                for ask in (faults.at, faults.from_on):
                    store.clear_memory()
                    ask(nth)
                    error = Interruption if ask == faults.at else MesaError
                    with pytest.raises(error, match="gave up"):
                        model.clear()
                        list(model._tokens([row], 1, GREEDY, model._options("always", "", None), append=False))
                    assert pins(store) == {}
                    assert model.lengths == [0]
                    faults.none()
                    assert answer(model, prompt).is_that_of(expected), "what was kept of it is whole"

    def test_a_later_turn_leaves_text_and_pins(self, model, store):
        ids, turn = tokens(200), tokens(150, seed=5)
        model.prefill(ids)
        expected = model.extend(turn)
        with Faults(model, writes=True) as faults:
            model.prefill(ids)
            faults.none()
            model.extend(turn)
            runs = faults.count
            for nth in range(1, runs + 1):
                for clear in (False, True):
                    faults.none()
                    if clear:
                        store.clear_memory()
                    model.prefill(ids)
                    kv = model.snapshot(0)
                    faults.at(nth)
                    try:
                        model.extend(turn)
                    except Interruption:
                        assert model.lengths == [200]
                        for ours, theirs in zip(
                            [*kv[0], *kv[1]], [*model.snapshot(0)[0], *model.snapshot(0)[1]], strict=True
                        ):
                            assert np.abs(ours - theirs).max() < 1e-5
                    assert pins(store) == {}
            faults.none()
        model.prefill(ids)
        assert np.abs(model.extend(turn) - expected).max() < 1e-4

    def test_a_store_that_fails_ends_in_an_error_once(self, model, store, monkeypatch):
        """Of memory that is not there for a block: the text is gone, no pin is left."""

        def short(*arguments: Any) -> Any:
            raise MemoryError

        prompt = parts(DOCUMENTS)
        with monkeypatch.context() as patch:
            patch.setattr(model.engine.store, "read_block", short)
            with pytest.raises(MesaError, match="out of memory"):
                answer(model, prompt)
        assert pins(store) == {}
        answer(model, prompt)
        with monkeypatch.context() as patch:
            patch.setattr(model.engine.store, "append_block", short)
            with pytest.raises(MesaError, match="out of memory"):
                answer(model, prompt)
        assert pins(store) == {}
        assert answer(model, prompt).usage.cached_tokens.memory == HEAD + sum(LENGTHS)

    def test_a_disk_that_fails_is_said_and_the_prompt_is_answered(self, model, computed, tmp_path, caplog):
        prompt = parts(DOCUMENTS)
        for what in ("removed", "damaged"):
            path = tmp_path / what
            with ChunkStore(1, path) as store, with_store(model, store):
                if what == "damaged":
                    answer(model, prompt)
                    store.flush()
                    for index, file in enumerate(sorted((path / "chunks").iterdir())):
                        content = bytearray(file.read_bytes())
                        if index % 3:
                            content[-index % len(content)] ^= 1
                            file.write_bytes(content)
                        else:
                            file.unlink()
                            file.mkdir()
                else:
                    shutil.rmtree(path)
                assert answer(model, prompt).is_that_of(computed(prompt))
                store.flush()
        assert "a chunk is not kept in" in caplog.text

    def test_a_turn_that_is_given_up_half_read(self, model, store):
        """By whoever closes its text, or the engine."""
        prompt = parts(DOCUMENTS).joined(model.manifest, "always")
        engine = model.engine
        for give_up in (engine.close_text, lambda text: engine.abort(text.turn)):
            store.clear_memory()
            text = engine.open_text()
            turn = Turn(text, np.array(prompt.ids), edges=prompt.edges, stored=model._stored)
            engine.add(turn)
            engine.step()
            assert pins(store)
            give_up(text)
            assert pins(store) == {}
            engine.close_text(text)

    def test_a_model_that_is_closed_meanwhile(self, bundle):
        """The store outlives it."""
        with ChunkStore("64MiB") as store:
            model = MesaModel.load(bundle(), "onnxruntime", verify=False, store=store)
            prompt = parts(DOCUMENTS).joined(model.manifest, "always")
            turn = Turn(model.engine.open_text(), np.array(prompt.ids), edges=prompt.edges, stored=model._stored)
            model.engine.add(turn)
            model.engine.step()
            model.close()
            assert pins(store) == {}


class TestBadInput:
    QUESTION = tokens(3)

    def test_a_document_longer_than_the_largest_bucket(self, model, store):
        long = tokens(400)
        with pytest.raises(MesaError, match="a document has 400 tokens, more than the largest bucket holds .* 335"):
            model.warm([tokens(5), long])
        with pytest.raises(MesaError, match="a prompt of 411 tokens is longer than the largest bucket"):
            model.generate(self.QUESTION, documents=[long], reuse="always")
        assert model.warm([tokens(335)]).computed_tokens == HEAD + 335
        assert store.memory_in_use > 0

    @pytest.mark.parametrize("reuse", ["auto", "always", "off"])
    def test_what_is_no_document(self, model, reuse):
        for documents, message in (
            ("text", "documents are a list of texts"),
            (["a", ""], "document 2 is empty"),
            ([5], "document 1 is int"),
        ):
            calls = (
                lambda documents=documents: model.generate("a", documents=documents, reuse=reuse),
                lambda documents=documents: model.chat([{"role": "user", "content": "a"}], documents=documents),
                lambda documents=documents: model.warm(documents),
            )
            for call in calls:
                with pytest.raises(MesaError, match=message):
                    call()

    def test_behind_a_live_text(self, model):
        model.prefill(tokens(20))
        for call in (
            lambda: model.generate("a", documents=["b"], append=True),
            lambda: model.generate("a", lead="b", append=True),
            lambda: model.chat([{"role": "user", "content": "a"}], documents=["b"], append=True),
            lambda: next(model.stream("a", documents=["b"], append=True)),
        ):
            with pytest.raises(MesaError, match="documents stand at the beginning of a text; leave append out"):
                call()
        assert model.lengths == [20]

    def test_another_way_to_reuse(self, model):
        model.prefill(tokens(20))
        for call in (
            lambda: model.generate("a", documents=["b"], reuse="sometimes"),
            lambda: model.generate("a", reuse="sometimes"),
            lambda: model.chat([{"role": "user", "content": "a"}], reuse="sometimes"),
        ):
            with pytest.raises(MesaError, match="reuse is 'sometimes'; it is one of auto, always, off"):
                call()
        assert model.lengths == [20]

    def test_no_store(self, model):
        with with_store(model, None):
            with pytest.raises(MesaError, match=r"there is no store to warm: load the model with store=ChunkStore"):
                model.warm(["a"])
            answer(model, parts(DOCUMENTS))

    @pytest.mark.parametrize("thing", ["2GiB", Path("chunks"), {}])
    def test_a_store_that_is_none(self, tmp_path, thing):
        """Said before a bundle is looked for."""
        with pytest.raises(MesaError, match=r"store is \w+; give a ChunkStore"):
            MesaModel.load(tmp_path / "nothing", store=thing)

    def test_a_bundle_without_a_tokenizer(self, bundle_copy, reseal):
        from mesart.graphs.bundle.manifest import Manifest

        (bundle_copy / "tokenizer.json").unlink()
        files = {
            name: dataclasses.asdict(info)
            for name, info in Manifest.read(bundle_copy).files.items()
            if name != "tokenizer.json"
        }
        reseal(bundle_copy, files=files)
        with ChunkStore("64MiB") as store, MesaModel.load(bundle_copy, "onnxruntime", store=store) as model:
            for call in (
                lambda: model.warm(["text"]),
                lambda: model.generate([5], documents=["text"]),
                lambda: model.generate("a", documents=[[5]]),
            ):
                with pytest.raises(MesaError, match="the bundle has no tokenizer: give documents and"):
                    call()
            report = model.warm([tokens(30)])
            assert (report.computed_tokens, report.reused_tokens, report.document_tokens) == (HEAD + 30, 0, 30)


def test_a_method_without_chunks(bundle, checkpoint, shared_folder):
    """Reads documents one behind the other; asked to reuse them it says that it cannot."""

    def export(folder: Path) -> None:
        from mesart.export import export_model
        from mesart.graphs.method.yarn import YarnConfig

        export_model(checkpoint("tied_llama"), folder, YarnConfig(WINDOW, factor=4.0), max_tokens=200)

    folder = shared_folder("tied-yarn-bundle", export)
    with ChunkStore("64MiB") as store, MesaModel.load(folder, "onnxruntime", verify=False, store=store) as model:
        documents = [tokens(60), tokens(50, seed=1)]
        prompt = parts(documents)
        joined = [*documents[0], *documents[1], *prompt.question]
        found = answer(model, prompt, "auto")
        assert model.texts[0].ids[: len(joined)].tolist() == joined
        assert found.usage == Usage(len(joined), len(joined))
        assert store.memory_in_use == 0
        with pytest.raises(MesaError, match="the method yarn has no chunks; a prompt of 119 tokens"):
            model.generate(tokens(9, seed=9), documents=documents, reuse="always")
        assert model.lengths == [len(joined) + 4 - 1]
        with pytest.raises(MesaError, match="the method yarn has no chunks: there is nothing to keep"):
            model.warm(documents)


def test_keys_are_stored_where_chunks_have_them(bundle):
    """Entries hold keys at local positions, in the bundle's dtype, the head's beside them."""
    with ChunkStore("64MiB") as store, MesaModel.load(bundle(), "torch", verify=False, store=store) as model:
        answer(model, parts([DOCUMENTS[2]]))
        stored = model._stored
        assert isinstance(stored, StoredChunks)
        behind = stored.behind(np.array(model.manifest.filler[:HEAD]))
        head = behind.find(behind.head_key(), HEAD)
        chunk = behind.find(behind.chunk_key(np.array(DOCUMENTS[2])), len(DOCUMENTS[2]))
        assert head is not None
        assert chunk is not None
        text = model.engine.open_text()
        ids = np.array([*model.manifest.filler[:HEAD], *DOCUMENTS[2], 3])
        turn = model.engine.add(Turn(text, ids))  # within the trained length: the plain model, ordinary positions
        while not turn.is_finished:
            model.engine.step()
        keys, values = model.engine.store.read(text.require_kv())
        for ours, theirs in zip([*head[0].tensors], [x[:, :HEAD] for x in (*keys, *values)], strict=True):
            assert ours.dtype == np.float32
            assert np.abs(ours - theirs).max() < 1e-5
        for ours, theirs in zip([*chunk[0].tensors], [x[:, HEAD:-1] for x in (*keys, *values)], strict=True):
            assert np.abs(ours - theirs).max() < 1e-4
        model.engine.close_text(text)
