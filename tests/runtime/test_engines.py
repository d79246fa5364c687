"""The TensorRT backend, all but the kernels: onnxruntime runs the engines' graphs in the memory of a fake GPU."""

from __future__ import annotations

import dataclasses
import gzip
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mesart.graphs import MesaError, TorchReference
from mesart.graphs.bundle.manifest import WEIGHTS_FILE, EngineInfo, FileInfo, Manifest, TensorInfo, sha256
from mesart.graphs.errors import EngineError
from mesart.runtime import ChunkStore, MesaModel, SamplingConfig
from mesart.runtime.documents import DocumentPrompt, Reuse
from mesart.runtime.engine import Turn
from mesart.runtime.usage import CachedTokens
from tests.runtime.fake_cuda import FakeBuilder, FakeGpu, Fault, Location, Status

CLOSE = 0.05
"""Twice what float16 loses here: PyTorch's own logits in float16 are off by up to 0.021, of up to 4.3."""

KINDS = [("profile", "shared"), ("bucket", "embedded"), ("bucket", "shared")]


def tokens(count: int, seed: int = 0) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(2, 320, count).tolist()
    return ids


def difference(ours: Any, theirs: Any) -> float:
    theirs = np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert ours.dtype == np.float32
    return float(np.abs(ours - theirs).max())


@pytest.fixture(scope="session")
def engine_bundle(bundle, shared_folder) -> Callable[..., Path]:
    """``engine_bundle(layout, weights)``: a float16 bundle with engines for ``sm89`` of the fake builder.

    With shared weights all weights are, also small ones. Layout ``bucket`` has tails of 24 tokens, which run in slices.
    Its steps, with shared weights, take a second token, as those do for which there is no kernel of one query.
    """

    def make(layout: str, weights: str, family: str = "llama", max_tokens: int | None = None) -> Path:
        def build(folder: Path) -> None:
            from mesart.export import engine_graphs, engines

            shutil.copytree(bundle(family, "float16"), folder)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(engines, "TensorRtBuilder", FakeBuilder)
                patch.setattr(FakeBuilder, "single", (layout, weights) != ("bucket", "shared"))
                patch.setattr(engine_graphs, "SHARED_BYTES", 0)
                patch.setattr(engine_graphs, "TAIL_SLICE", 24 if layout == "bucket" else 256)
                options: Any = {"layout": layout, "weights": weights, "max_tokens": max_tokens}
                engines.build_engines(folder, "tensorrt-rtx", "sm89", **options, progress=False)

        return shared_folder(f"{family}-{layout}-{weights}-{max_tokens}-engines", build)

    return make


@pytest.fixture
def gpu(monkeypatch) -> Iterator[FakeGpu]:
    """A fake GPU in place of the real one; nothing may be left on it at the end."""
    fake = FakeGpu()
    for name, module in fake.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    yield fake
    fake.require_clean()


@pytest.fixture(params=KINDS, ids="-".join)
def model(request, engine_bundle, gpu) -> Iterator[MesaModel]:
    with MesaModel.load(engine_bundle(*request.param), "tensorrt-rtx", verify=False) as loaded:
        yield loaded


@pytest.fixture
def one(engine_bundle, gpu) -> Iterator[MesaModel]:
    """A model of one kind, for what is the same for all."""
    with MesaModel.load(engine_bundle("bucket", "shared"), "tensorrt-rtx", verify=False) as loaded:
        yield loaded


@pytest.fixture
def copied(engine_bundle, tmp_path) -> Path:
    """A bundle with engines, to be damaged."""
    return Path(shutil.copytree(engine_bundle("bucket", "shared"), tmp_path / "bundle"))


@pytest.fixture(scope="module")
def reference(checkpoint, mesa_config) -> TorchReference:
    return TorchReference(checkpoint("llama"), mesa_config)


def test_validation_judges_engines_by_the_noise_floor(engine_bundle, gpu):
    from mesart.evaluation.validate import validate

    result = validate(
        engine_bundle("bucket", "shared"), backend="tensorrt-rtx", buckets=[0, 2], steps=3, progress=False
    )
    assert result.passed, result.table()
    assert {check.graphs for check in result.checks} == {"engines"}
    assert {check.phase for check in result.checks} == {"prefix", "chunk", "tail", "decode"}


class TestEqualsTheReference:
    @pytest.mark.parametrize("count", [1, 40, 63, 64, 65, 66, 104, 105, 144, 145, 184, 185, 264, 265, 343])
    def test_prefill(self, model, reference, count):
        ids = tokens(count, seed=count)
        assert difference(model.prefill(ids), reference.prefill(ids)) < CLOSE
        assert difference(model.step(7), reference.step(7)) < CLOSE

    @pytest.mark.parametrize("count", [10, 100])
    def test_200_steps(self, model, reference, gpu, count):
        """Across buckets and anchors; nearly all of them replayed as CUDA graphs, with no memory taken but to grow."""
        ids = tokens(count)
        model.prefill(ids)
        reference.prefill(ids)
        anchors, worst = set(), 0.0
        for token in tokens(200, seed=1):
            worst = max(worst, difference(model.step(token), reference.step(token)))
            anchors.add(reference.stairs)
        assert len(anchors) > 5, "the generation must move its anchor"
        assert worst < CLOSE
        assert model.lengths == [count + 200]
        assert gpu.counts["cudaGraphLaunch"] > 185
        assert gpu.counts["cudaGraphInstantiate"] < 10

    @pytest.mark.parametrize("first", [20, 100])
    @pytest.mark.parametrize("second", [1, 5, 30, 150])
    def test_a_second_turn(self, model, reference, first, second):
        """Behind the cache, with a moved anchor, and cut into chunks of its own (150 tokens)."""
        ids, turn = tokens(first), tokens(second, seed=1)
        model.prefill(ids)
        reference.prefill(ids)
        assert difference(model.extend(turn), reference.extend(turn)) < CLOSE
        for token in tokens(20, seed=2):
            assert difference(model.step(token), reference.step(token)) < CLOSE

    def test_a_third_turn_of_chunks(self, model, reference):
        """The head stands on stairs then, and is turned back for the chunks."""
        for start, count in enumerate((100, 90, 120)):
            turn = tokens(count, seed=start)
            ours, theirs = (side.extend(turn) if start else side.prefill(turn) for side in (model, reference))
            assert difference(ours, theirs) < CLOSE
            assert difference(model.step(3), reference.step(3)) < CLOSE

    def test_a_batch_of_prompts_of_different_lengths(self, model, reference):
        prompts = [tokens(count, seed=count) for count in (5, 150, 64, 90)]
        turns = [tokens(count, seed=count) for count in (3, 40, 80, 1)]
        chosen = [tokens(30, seed=row) for row in range(4)]
        got = [model.prefill(prompts)]
        got += [model.step([row[index] for row in chosen]) for index in range(30)]
        got += [model.extend(turns), model.step([9, 8, 7, 6])]
        for row in range(4):
            expected = [reference.prefill(prompts[row]), *map(reference.step, chosen[row])]
            expected += [reference.extend(turns[row]), reference.step(9 - row)]
            for ours, theirs in zip(got, expected, strict=True):
                assert difference(ours[row : row + 1], theirs) < CLOSE

    def test_a_row_that_grows_disturbs_no_other(self, model, reference):
        """Its next engine needs more activation memory: what was captured with the old one must not be replayed."""
        prompts, chosen = [tokens(20), tokens(60, seed=1)], [tokens(10, seed=row) for row in range(2)]
        model.prefill(prompts)
        got = [model.step([row[index] for row in chosen]) for index in range(10)]
        for row in range(2):
            reference.prefill(prompts[row])
            for ours, token in zip(got, chosen[row], strict=True):
                assert difference(ours[row : row + 1], reference.step(token)) < CLOSE

    @pytest.mark.parametrize(("family", "lengths"), [("llama", (40, 200, 300)), ("gpt_oss", (40, 75, 80))])
    def test_texts_that_read_beside_one_that_decodes(
        self, engine_bundle, gpu, checkpoint, mesa_config, family, lengths
    ):
        """Chunks of several texts are under way at a time, each in a buffer of its own."""
        reference = TorchReference(checkpoint(family), mesa_config)
        prompts = [tokens(count, seed=count) for count in lengths]
        chosen = tokens(20, seed=3)
        with MesaModel.load(engine_bundle("bucket", "shared", family), "tensorrt-rtx") as model:
            engine = model.engine
            texts = [engine.open_text() for _ in prompts]

            def add(row: int, ids: list[int]) -> Turn:
                return engine.add(Turn(texts[row], np.array(ids)))

            def run(turn: Turn) -> Any:
                while not turn.is_finished:
                    engine.step()
                assert turn.error is None
                return turn.logits

            got = [run(add(0, prompts[0]))]
            reading = [add(row, prompts[row]) for row in (1, 2)]
            got += [run(add(0, [token])) for token in chosen]
            read = [run(turn) for turn in reading]
            again = [run(add(row, chosen)) for row in (2, 1)]
            expected = [reference.prefill(prompts[0]), *map(reference.step, chosen)]
            assert all(difference(x[None], y) < CLOSE for x, y in zip(got, expected, strict=True))
            for row in (1, 2):
                assert difference(read[row - 1][None], reference.prefill(prompts[row])) < CLOSE
                assert difference(again[2 - row][None], reference.extend(chosen)) < CLOSE
            for text in texts:
                engine.close_text(text)

    def test_a_row_that_has_ended_stays(self, model, reference):
        model.prefill([tokens(70), tokens(40, seed=1)])
        for token in (5, 6, 7):
            turn = model.engine.add(Turn(model.texts[0], np.array([token])))
            while not turn.is_finished:
                model.engine.step()
        assert model.lengths == [73, 40]
        reference.prefill(tokens(40, seed=1))
        assert difference(model.step([8, 9])[1:], reference.step(9)) < CLOSE

    def test_what_lies_in_the_cache(self, model, reference):
        ids = tokens(150)
        model.prefill(ids)
        reference.prefill(ids)
        for ours, theirs in zip(model.snapshot(0), (reference.keys, reference.values), strict=True):
            for layer, expected in enumerate(theirs):
                assert ours[layer].dtype == np.float16
                assert np.abs(ours[layer] - expected[0].numpy()).max() < 0.02

    def test_a_prefill_forgets_what_was_before(self, model):
        first = model.prefill(tokens(150))
        model.prefill([tokens(300, seed=1), tokens(20)])
        for token in tokens(20):
            model.step([token, token])
        assert np.array_equal(model.prefill(tokens(150)), first)

    def test_what_was_returned_stays_as_it_is(self, model):
        kept = [model.prefill(tokens(100)), model.step(3), model.extend(tokens(5)), model.step(4)]
        copies = [logits.copy() for logits in kept]
        model.prefill(tokens(100, seed=1))
        model.step(9)
        assert all(np.array_equal(logits, copy) for logits, copy in zip(kept, copies, strict=True))

    def test_layers_that_do_not_turn_their_keys(self, engine_bundle, gpu, checkpoint, mesa_config):
        reference = TorchReference(checkpoint("smollm3"), mesa_config)
        with MesaModel.load(engine_bundle("profile", "shared", "smollm3"), "tensorrt-rtx") as model:
            assert [layer.rerotate is None for layer in model.manifest.layers].count(True) == 1
            for count in (20, 100):
                assert difference(model.prefill(tokens(count)), reference.prefill(tokens(count))) < CLOSE
            model.prefill(tokens(66))
            reference.prefill(tokens(66))
            for token in tokens(38, seed=1):
                assert difference(model.step(token), reference.step(token)) < CLOSE

    @pytest.mark.parametrize(("family", "layout"), [("gpt_oss", "bucket"), ("mpt", "profile")])
    def test_layers_that_look_at_positions(self, engine_bundle, gpu, checkpoint, mesa_config, family, layout):
        """A window and ALiBi, also behind keys that were moved."""
        reference = TorchReference(checkpoint(family), mesa_config)
        with MesaModel.load(engine_bundle(layout, "shared", family), "tensorrt-rtx") as model:
            assert model.manifest.looks_at_positions
            for count in (20, 66, 100):
                assert difference(model.prefill(tokens(count)), reference.prefill(tokens(count))) < CLOSE
            model.prefill(tokens(50))
            reference.prefill(tokens(50))
            for token in tokens(30, seed=1):
                assert difference(model.step(token), reference.step(token)) < CLOSE
            turn = tokens(20, seed=2)
            assert difference(model.extend(turn), reference.extend(turn)) < CLOSE

    def test_texts_that_outgrow_short_frequencies(self, engine_bundle, gpu, checkpoint, mesa_config):
        """LongRoPE: one row passes 32 tokens in a step, which fails at first, and then another in a turn."""
        reference = TorchReference(checkpoint("longrope"), mesa_config)
        rows = [tokens(31), tokens(10, seed=1)]
        with MesaModel.load(engine_bundle("bucket", "shared", "longrope", 64), "tensorrt-rtx") as model:
            model.prefill(rows)
            for token in (3, 4, 5):
                rows = [[*row, token] for row in rows]
                if len(rows[0]) == 33:
                    gpu.refuse = lambda phase: phase == "tail"
                    with pytest.raises(MesaError, match="the kernel gave up"):
                        model.step([token, token])
                    gpu.refuse = lambda phase: False
                logits = model.step([token, token])
                for row, text in enumerate(rows):
                    assert difference(logits[row : row + 1], reference.prefill(text)) < CLOSE
            turns = [tokens(5, seed=2), tokens(40, seed=3)]
            last = model.extend(turns)
            for row, (text, turn) in enumerate(zip(rows, turns, strict=True)):
                assert difference(last[row : row + 1], reference.prefill([*text, *turn])) < CLOSE

    def test_the_other_flavour(self, copied, gpu, reference):
        change(copied, flavour="tensorrt")
        with MesaModel.load(copied, "tensorrt") as model:
            assert model.backend == "tensorrt"
            assert difference(model.prefill(tokens(100)), reference.prefill(tokens(100))) < CLOSE
            assert [difference(model.step(token), reference.step(token)) < CLOSE for token in (3, 4, 5)] == [True] * 3


class TestStoredChunks:
    """Blocks that are copied from the device, kept on the host, and copied to other texts' buffers."""

    DOCUMENTS = (tokens(40, seed=11), tokens(7, seed=12), tokens(70, seed=13))

    @staticmethod
    def ask(model: MesaModel, documents: Sequence[list[int]], reuse: Reuse = "always", question: int = 9) -> Any:
        """Tokens, and keys and values, of what was generated."""
        prompt = DocumentPrompt([], documents, tokens(question, seed=9)).joined(model.manifest, reuse)
        model.clear()
        how = model._options(reuse, "", None)
        greedy = SamplingConfig(temperature=0)
        ids = [token for (token,) in model._tokens([prompt], 4, greedy, how, append=False)]
        keys, values = model.snapshot(0)
        return ids, [*keys, *values]

    @pytest.mark.parametrize("kind", KINDS, ids="-".join)
    def test_equal_computed_ones_to_the_last_bit(self, engine_bundle, gpu, tmp_path, kind):
        """In any order, from memory, from the disk, and after a restart."""
        orders = [self.DOCUMENTS, self.DOCUMENTS[::-1], (self.DOCUMENTS[1], *self.DOCUMENTS[1:])]
        found = []
        for _ in range(2):
            with (
                ChunkStore("64MiB", tmp_path / "store") as store,
                MesaModel.load(engine_bundle(*kind), "tensorrt-rtx", verify=False, store=store) as model,
            ):
                for order in orders:
                    found.append(self.ask(model, order))
                assert model.usage is not None
                assert model.usage.computed_tokens == 9
                if len(found) > len(orders):
                    expected = [self.ask(model, order, "off") for order in orders]
                    assert model.usage.cached_tokens == CachedTokens()
        for index, (ids, arrays) in enumerate(found):
            right_ids, right_arrays = expected[index % len(orders)]
            assert ids == right_ids
            for ours, theirs in zip(arrays, right_arrays, strict=True):
                assert ours.dtype == np.float16
                assert np.array_equal(ours.view(np.uint16), theirs.view(np.uint16))

    def test_equal_the_hosts(self, engine_bundle, gpu, bundle):
        """Of the same bundle on a CPU, as nearly as float16 lets them; their entries are no one else's."""
        with ChunkStore("64MiB") as store:
            results = []
            for folder, backend in (
                (engine_bundle("bucket", "shared"), "tensorrt-rtx"),
                (bundle("llama", "float16"), "torch"),
            ):
                with MesaModel.load(folder, backend, verify=False, store=store) as model:
                    self.ask(model, self.DOCUMENTS[::-1])
                    assert model.usage is not None
                    assert model.usage.cached_tokens == CachedTokens()
                    results.append(self.ask(model, self.DOCUMENTS)[1])
                    assert model.usage.cached_tokens.memory == 8 + 117
            for ours, theirs in zip(*results, strict=True):
                asked = 8 + 117 + 9
                assert np.abs(ours[:, :asked].astype(np.float32) - theirs[:, :asked]).max() < 0.02

    def test_later_turns_share_them(self, engine_bundle, gpu):
        with (
            ChunkStore("64MiB") as store,
            MesaModel.load(engine_bundle("bucket", "shared"), "tensorrt-rtx", verify=False, store=store) as model,
        ):
            first, turn = tokens(150), tokens(150, seed=1)
            expected = []
            for _ in range(2):
                model.prefill(first)
                expected.append(model.extend(turn))
            assert model.usage is not None
            assert model.usage.cached_tokens.memory >= 80
            assert np.array_equal(expected[0], expected[1])

    def test_a_copy_that_fails_leaves_nothing(self, engine_bundle, gpu):
        """Neither on the way to the store nor back: no memory, no text, no pin."""
        with (
            ChunkStore("64MiB") as store,
            MesaModel.load(engine_bundle("bucket", "shared"), "tensorrt-rtx", verify=False, store=store) as model,
        ):
            expected = self.ask(model, self.DOCUMENTS, "off")
            host = sorted(block.size for block in gpu.host.values())
            for call in ("download_rows", "upload_rows", "download_rows"):
                cuda: Any = model.engine.store._cuda  # type: ignore[attr-defined]
                for nth in (1, 3, 11):
                    count = 0
                    inner = getattr(cuda, call)

                    def fail(*arguments: Any, inner: Any = inner, nth: int = nth) -> None:
                        nonlocal count
                        count += 1
                        if count == nth:
                            raise EngineError("the copy gave up")
                        inner(*arguments)

                    with pytest.MonkeyPatch.context() as patch:
                        if call == "download_rows":
                            store.clear_memory()
                        else:
                            self.ask(model, self.DOCUMENTS)
                        patch.setattr(cuda, call, fail)
                        with pytest.raises(MesaError, match="the copy gave up"):
                            self.ask(model, self.DOCUMENTS)
                    assert model.lengths == [0]
                    assert not store._cache._pins
                    assert sorted(block.size for block in gpu.host.values()) == host
                    ids, arrays = self.ask(model, self.DOCUMENTS)
                    assert ids == expected[0]
                    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(arrays, expected[1], strict=True))


class TestWork:
    """What is put on the GPU, and what not."""

    def test_a_step_waits_once_and_takes_no_memory(self, one, gpu):
        one.prefill(tokens(70))
        for token in (3, 4, 5):
            one.step(token)
        before = dict(gpu.counts)
        for token in (6, 7, 8):
            one.step(token)
        spent = {name: count - before.get(name, 0) for name, count in gpu.counts.items()}
        assert {name: count for name, count in spent.items() if count} == {
            "cudaGraphLaunch": 3,
            "cudaStreamSynchronize": 3,
        }

    def test_a_long_prompt_waits_for_the_logits_only(self, one, gpu):
        one.prefill(tokens(200))
        before = gpu.counts["cudaStreamSynchronize"]
        one.prefill(tokens(200, seed=1))
        assert gpu.counts["cudaStreamSynchronize"] == before + 1

    def test_memory_is_used_again(self, one, gpu):
        one.prefill([tokens(100), tokens(20)])
        before = gpu.counts["cudaMalloc"]
        one.prefill([tokens(30), tokens(90), tokens(64)])
        assert gpu.counts["cudaMalloc"] == before + 1  # of the third row

    def test_chunks_use_their_memory_again(self, one, gpu):
        one.prefill(tokens(343))
        before = gpu.counts["cudaMalloc"]
        one.prefill(tokens(343, seed=1))
        assert gpu.counts["cudaMalloc"] == before

    def test_the_next_text_replays_the_graphs_of_the_last(self, one, gpu):
        for seed in range(2):
            one.prefill(tokens(70, seed))
            for token in (3, 4, 5):
                one.step(token)
            assert gpu.counts["cudaGraphInstantiate"] == 1

    def test_memory_that_no_text_has_gives_way(self, one, gpu):
        one.prefill([tokens(100)] * 6)
        one.prefill(tokens(100))
        gpu.total = gpu.used + 100
        one.prefill(tokens(340))  # larger buffers, and more activations
        assert one.lengths == [340]

    def test_clearing_frees_what_texts_have_left(self, one, gpu):
        one.prefill(tokens(100))
        one.clear()
        memory, before = one.device_memory, gpu.used
        assert memory.cache == 0
        one.prefill(tokens(100))
        assert gpu.used >= before + one.device_memory.cache

    def test_memory_is_reported(self, one, gpu):
        weights = {(w.offset, w.bytes) for engine in one.manifest.engines[0].engines for w in engine.weights}
        bytes_of = one.device_memory
        assert bytes_of.cache == bytes_of.activations == 0
        assert sum(size for _, size in weights) <= bytes_of.weights <= sum(size + 255 for _, size in weights)
        assert len(weights) > 20
        one.prefill(tokens(100))
        slots = one.manifest.engines[0].find("tail", 2)[0].profiles[0].slots
        assert one.device_memory.cache == slots * 2 * 2 * 2 * 8 * 2  # layers, keys and values, heads, size, bytes
        assert dataclasses.astuple(one.device_memory) > dataclasses.astuple(bytes_of)
        assert sum(dataclasses.astuple(one.device_memory)) == gpu.used
        one.close()
        assert gpu.used == 0

    def test_a_model_on_the_cpu_takes_none(self, bundle):
        with MesaModel.load(bundle(), "torch", verify=False) as model:
            assert model.device_memory is None


class TestFailures:
    @pytest.mark.parametrize("cached", [100, 5])  # 5 are fewer than the head: the turn starts again at the first token
    @pytest.mark.parametrize(
        ("phase", "nth"),
        [
            ("prefix or chunk", 1),
            ("prefix or chunk", 2),
            ("rerotate", 1),
            ("rerotate", 2),
            ("rerotate", 3),
            ("tail", 1),
            ("tail", 2),
        ],
    )
    def test_a_turn_that_fails_leaves_the_cache(self, one, gpu, phase, cached, nth):
        turn = tokens(150, seed=1)
        one.prefill(tokens(cached))
        expected = one.extend(turn)
        one.prefill(tokens(cached))
        seen: list[str] = []

        def refuse(found: str) -> bool:
            seen.append(found)
            return seen.count(phase) == nth and found == phase

        gpu.refuse = refuse
        with pytest.raises(MesaError, match="TensorRT failed in the .*: the kernel gave up$") as error:
            one.extend(turn)
        one_line(error)
        gpu.refuse = lambda found: False
        assert one.lengths == [cached]
        assert difference(one.extend(turn), expected) < CLOSE

    @pytest.mark.parametrize("phase", ["prefix or chunk", "tail"])
    def test_nan_is_said_and_does_not_stay(self, one, gpu, phase):
        """A slot that is not seen has weight 0, and 0 times NaN is NaN."""
        turn = tokens(150, seed=1)
        one.prefill(tokens(100))
        expected = one.extend(turn)
        one.prefill(tokens(100))
        gpu.poison, gpu.allows_nan = [phase], True
        with pytest.raises(MesaError, match="NaN in the logits of the tail: .*float16 overflows.*`mesart validate`"):
            one.extend(turn)
        gpu.allows_nan = False
        assert one.lengths == [100]
        assert difference(one.extend(turn), expected) < CLOSE

    def test_nan_in_a_first_prompt_does_not_reach_the_next(self, one, gpu):
        expected = one.prefill(tokens(150))
        gpu.poison, gpu.allows_nan = ["prefix or chunk"], True
        with pytest.raises(MesaError, match="NaN in the logits of the tail"):
            one.prefill(tokens(150))
        gpu.allows_nan = False
        assert one.lengths == [0]
        assert np.array_equal(one.prefill(tokens(150)), expected)

    @pytest.mark.parametrize("nth", [1, 3, 5, 7, 9])
    def test_a_batch_of_turns_that_fails_leaves_every_row(self, one, gpu, nth):
        prompts, turns = [tokens(100), tokens(20, seed=1)], [tokens(90, seed=2), tokens(60, seed=3)]
        one.prefill(prompts)
        expected = one.extend(turns)
        one.prefill(prompts)
        seen: list[str] = []

        def refuse(found: str) -> bool:
            seen.append(found)
            return len(seen) >= nth and found != "rerotate"  # which brings keys back

        gpu.refuse = refuse
        with pytest.raises(MesaError, match="the kernel gave up$"):
            one.extend(turns)
        gpu.refuse = lambda found: False
        assert one.lengths == [100, 20]
        assert difference(one.extend(turns), expected) < CLOSE

    def test_a_prefill_that_fails_leaves_an_empty_cache(self, one, gpu):
        expected = one.prefill(tokens(30))
        one.prefill([tokens(100), tokens(20)])
        gpu.refuse = lambda found: found == "tail"
        with pytest.raises(MesaError, match="the kernel gave up$"):
            one.prefill([tokens(100), tokens(20)])
        gpu.refuse = lambda found: False
        assert one.lengths == [0]
        with pytest.raises(MesaError, match="call prefill first"):
            one.step([3, 4])
        assert difference(one.prefill(tokens(30)), expected) < CLOSE

    def test_a_run_that_fails_is_tried_again_text_by_text(self, one, gpu):
        prompts = [tokens(70), tokens(30, seed=1)]
        one.prefill(prompts)
        expected = one.step([3, 4])
        one.prefill(prompts)
        gpu.poison = ["decode"]
        assert difference(one.step([3, 4]), expected) < CLOSE

    def test_a_step_that_fails_changes_no_row(self, one, gpu):
        prompts = [tokens(70), tokens(30, seed=1)]
        one.prefill(prompts)
        expected = one.step([3, 4])
        one.prefill(prompts)
        gpu.poison = ["decode"] * 4  # together, and each text on its own
        with pytest.raises(MesaError, match="NaN in the logits of the decode"):
            one.step([3, 4])
        assert one.lengths == [70, 30]
        assert difference(one.step([3, 4]), expected) < CLOSE

    def test_a_device_that_is_lost(self, one, gpu):
        one.prefill(tokens(100))
        gpu.broken = Status.cudaErrorIllegalAddress
        with pytest.raises(MesaError, match="an illegal memory access was encountered") as error:
            one.step(3)
        one_line(error)
        one.close()  # frees what can be freed, without an error
        with pytest.raises(MesaError, match="the model was closed"):
            one.step(3)


class TestOutOfMemory:
    def test_weights(self, engine_bundle, gpu):
        for weights in ("shared", "embedded"):
            gpu.total = 20_000
            with pytest.raises(MesaError, match="out of memory: the weights take .* are free") as error:
                MesaModel.load(engine_bundle("bucket", weights), "tensorrt-rtx", verify=False)
            one_line(error)
            assert gpu.counts.get("cudaMalloc", 0) == 0, "checked before anything is allocated"

    def test_a_prompt_that_is_too_long_leaves_a_model_for_shorter_ones(self, one, gpu):
        first = one.prefill(tokens(30))
        gpu.total = gpu.used + 30_000
        with pytest.raises(MesaError, match="the keys and values take .* GiB are free; use fewer rows") as error:
            one.prefill([tokens(340)] * 3)
        one_line(error)
        assert one.lengths == [0]
        assert np.array_equal(one.prefill(tokens(30)), first)

    @pytest.mark.parametrize("count", [10, 60, 200])
    def test_a_turn_that_does_not_fit_leaves_the_cache(self, one, gpu, count):
        """Wherever memory runs out: buffers, scratch, activations of another engine."""
        one.prefill(tokens(30))
        turn = tokens(count, seed=1)
        expected = one.extend(turn)
        one.close()
        for spare in (-20_000, 100, 2_000, 6_000, 12_000, 25_000, 30_000, 40_000):
            with MesaModel.load(one.bundle, "tensorrt-rtx", verify=False) as model:
                model.prefill(tokens(30))
                gpu.total = gpu.used + spare
                try:
                    model.extend(turn)
                except MesaError as error:
                    assert "out of memory" in str(error)  # noqa: PT017  (some do fit)
                    assert model.lengths == [30]
                gpu.total = 1 << 30
                if model.lengths == [30]:
                    assert difference(model.extend(turn), expected) < CLOSE

    def test_chunks_are_computed_one_by_one_where_memory_is_short(self, engine_bundle, gpu):
        logits, needed = [], 0
        for spare in (0, 3):  # of the four chunks that would be under way at a time
            with MesaModel.load(engine_bundle("bucket", "shared"), "tensorrt-rtx", verify=False) as model:
                chunk = model.manifest.engines[0].find("chunk", None)[0].profiles[0]
                gpu.total = needed - spare * chunk.slots * model.engine.store.bytes_per_token if needed else 1 << 30
                logits.append(model.prefill(tokens(200)))
                needed = gpu.used
        assert np.array_equal(logits[0], logits[1])

    def test_a_step_that_cannot_grow(self, one, gpu):
        one.prefill(tokens(64))
        gpu.total = gpu.used + 100
        for _ in range(2):
            with pytest.raises(MesaError, match="out of memory: the keys and values take"):
                one.step(3)
            assert one.lengths == [64]
        gpu.total = 1 << 30
        one.step(3)
        assert one.lengths == [65]


class TestLimits:
    def test_the_largest_bucket_is_the_end(self, one):
        one.prefill(tokens(343))
        one.step(3)
        with pytest.raises(MesaError, match="345 tokens, more than the largest bucket's 344") as error:
            one.step(3)
        one_line(error)
        assert one.lengths == [344]

    def test_a_text_may_be_asked_for_more_than_there_is_room_for(self, one):
        """Most end before; one that does not is refused at the end of the bucket, and stays."""
        asked = one.generate_ids([tokens(340)], 100, SamplingConfig())
        for _ in range(5):
            next(asked)
        with pytest.raises(MesaError, match="345 tokens, more than the largest bucket's 344"):
            next(asked)
        assert one.lengths == [344]
        assert one.snapshot(0)[0][0].shape[1] == 344

    def test_engines_for_some_buckets(self, engine_bundle, gpu, reference):
        with MesaModel.load(engine_bundle("profile", "shared", max_tokens=100), "tensorrt-rtx") as model:
            assert model.max_tokens == 104
            assert difference(model.prefill(tokens(104)), reference.prefill(tokens(104))) < CLOSE
            with pytest.raises(
                MesaError,
                match="longer than the largest bucket that engines were built for, 104 tokens; run `mesart build`",
            ):
                model.prefill(tokens(105))

    def test_all_logits(self, one):
        with pytest.raises(MesaError, match="all_logits"):
            one.prefill(tokens(10), all_logits=True)

    def test_specialised(self, engine_bundle, gpu):
        with pytest.raises(MesaError, match="leave specialised out") as error:
            MesaModel.load(engine_bundle("bucket", "shared"), "tensorrt-rtx", specialised=True)
        one_line(error)


def with_slots(info: EngineInfo, slots: int) -> EngineInfo:
    """An engine that writes caches of so many slots, as its record has it."""

    def cut(tensor: TensorInfo) -> TensorInfo:
        cache = tensor.name.startswith(("past_key_values.", "present."))
        return dataclasses.replace(tensor, shape=[*tensor.shape[:2], slots, tensor.shape[3]]) if cache else tensor

    return dataclasses.replace(
        info,
        inputs=[cut(tensor) for tensor in info.inputs],
        outputs=[cut(tensor) for tensor in info.outputs],
        profiles=[dataclasses.replace(x, slots=slots, kv_length=min(slots, x.kv_length)) for x in info.profiles],
    )


class TestRefusals:
    """One line each, with the command to run."""

    def refused(self, bundle: Path, reason: str, backend: str = "tensorrt-rtx", **options: Any) -> None:
        with pytest.raises(MesaError, match=reason) as error:
            MesaModel.load(bundle, backend, **options)
        one_line(error)

    def test_no_engines(self, bundle, gpu):
        command = "run `mesart build .* --engine tensorrt-rtx --gpu sm89`"
        self.refused(bundle("llama", "float16"), f"holds no engines of tensorrt-rtx; {command}")

    def test_engines_of_the_other_flavour(self, copied, gpu):
        self.refused(copied, "holds no engines of tensorrt; run `mesart build .* --engine tensorrt`$", "tensorrt")

    def test_another_version(self, copied, gpu):
        change(copied, version="1.6.0.1")
        self.refused(copied, "built with tensorrt-rtx 1.6.0.1, installed is 1.7.1.116; run `mesart build")

    def test_another_gpu(self, copied, gpu):
        gpu.capability = (12, 0)
        self.refused(copied, "run on sm89, this GPU is sm120; run `mesart build .* --gpu sm120`")

    def test_the_set_that_fits_is_taken(self, copied, gpu):
        manifest = Manifest.read(copied)
        old = dataclasses.replace(manifest.engines[0], version="1.6")
        other = dataclasses.replace(manifest.engines[0], compute_capabilities=["sm120"])
        dataclasses.replace(manifest, engines=[old, other, *manifest.engines]).write(copied)
        with MesaModel.load(copied, "tensorrt-rtx", verify=False) as model:
            assert model.prefill([3, 4]).shape == (1, 1, 320)

    def test_float32(self, bundle, gpu):
        self.refused(bundle(), "this bundle is float32; export again with --dtype bfloat16 or float16")

    def test_no_gpu(self, copied, gpu):
        gpu.devices = 0
        self.refused(
            copied, r"there is no GPU here, or no driver for it \(CUDA driver version is .*\); use another backend"
        )

    @pytest.mark.parametrize(
        ("package", "reason"),
        [
            ("tensorrt_rtx", r"needs the package tensorrt_rtx: pip install 'mesart\[tensorrt-rtx\]'"),
            ("cuda.bindings.runtime", "engines need the package cuda-python: pip install"),
        ],
    )
    def test_a_missing_package(self, copied, gpu, monkeypatch, package, reason):
        monkeypatch.setitem(sys.modules, package, None)
        self.refused(copied, reason)

    @pytest.mark.parametrize("verify", [True, False])
    def test_a_plan_that_is_missing_or_shorter(self, copied, gpu, verify):
        path = copied / Manifest.read(copied).engines[0].engines[0].file
        path.write_bytes(path.read_bytes()[:-1])
        self.refused(copied, f"{path.name} has .* bytes instead of .*; run `mesart build", verify=verify)
        path.unlink()
        self.refused(copied, f"{path.name} is missing; run `mesart build", verify=verify)

    def test_a_plan_that_was_altered_is_not_opened(self, copied, gpu):
        """Also where nothing else is verified: a plan is code."""
        path = copied / Manifest.read(copied).engines[0].find("tail", 0)[0].file
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        self.refused(copied, f"{path.name} was altered .*its SHA-256 differs.*; run `mesart build")
        with MesaModel.load(copied, "tensorrt-rtx", verify=False) as model:
            with pytest.raises(MesaError, match="was altered") as error:
                model.prefill([3, 4])
            one_line(error)
            assert model.lengths == [0]

    def test_a_plan_that_tensorrt_refuses(self, copied, gpu):
        info = Manifest.read(copied).engines[0].find("tail", 0)[0]
        path = copied / info.file
        path.write_bytes(gzip.compress(b"no plan" * 1000))
        manifest = Manifest.read(copied)
        infos = [
            dataclasses.replace(x, bytes=path.stat().st_size, sha256=sha256(path), unpacked=7000)
            if x.file == info.file
            else x
            for x in manifest.engines[0].engines
        ]
        change(copied, engines=infos)
        with MesaModel.load(copied, "tensorrt-rtx") as model:
            with pytest.raises(MesaError, match="TensorRT refuses .*magic tag.*; run `mesart build") as error:
                model.prefill([3, 4])
            one_line(error)

    def test_a_plan_that_is_not_the_manifests(self, copied, gpu):
        manifest = Manifest.read(copied)
        infos = [dataclasses.replace(x, inputs=x.inputs[1:]) for x in manifest.engines[0].engines]
        change(copied, engines=infos)
        with (
            MesaModel.load(copied, "tensorrt-rtx", verify=False) as model,
            pytest.raises(MesaError, match="and the manifest differ in the tensor input_ids; run `mesart build"),
        ):
            model.prefill([3, 4])

    def test_an_engine_that_copies_its_cache(self, copied, gpu):
        gpu.aliases = False
        with (
            MesaModel.load(copied, "tensorrt-rtx", verify=False) as model,
            pytest.raises(MesaError, match=r"does not update past_key_values.*key in place; run `mesart build"),
        ):
            model.prefill([3, 4])

    def test_an_engine_that_wants_host_memory(self, copied, gpu):
        gpu.location = Location.HOST
        with (
            MesaModel.load(copied, "tensorrt-rtx", verify=False) as model,
            pytest.raises(MesaError, match="wants .* in host memory; run `mesart build"),
        ):
            model.prefill([3, 4])

    @pytest.mark.parametrize(
        ("phase", "cached", "message"), [("tail", 0, "tokens 0 to 23"), ("decode", 20, "20 to 21")]
    )
    def test_too_few_slots(self, copied, gpu, phase, cached, message):
        """Never written by the builder: an engine that would write behind its cache."""
        infos = [
            with_slots(x, 20) if x.profiles[0].phase == phase else x for x in Manifest.read(copied).engines[0].engines
        ]
        change(copied, engines=infos)
        with MesaModel.load(copied, "tensorrt-rtx", verify=False) as model:
            with pytest.raises(
                MesaError, match=f"the {phase} engine of 0 chunks has 20 slots, .*{message}; run"
            ) as error:
                model.prefill(tokens(cached or 1))
                model.step(3)
            one_line(error)
            assert model.lengths == [cached]

    def test_a_shorter_weight_file(self, copied, gpu):
        manifest = Manifest.read(copied)
        path = copied / WEIGHTS_FILE
        path.write_bytes(path.read_bytes()[:-4000])
        manifest.files[WEIGHTS_FILE] = FileInfo(path.stat().st_size, sha256(path))
        manifest.write(copied)
        self.refused(copied, rf"engines\[0\].*weights\[.*\] ends behind the end of {WEIGHTS_FILE}", verify=False)


class TestAuto:
    def test_takes_the_engines(self, copied, gpu):
        with MesaModel.load(copied) as model:
            assert (model.backend, model.device) == ("tensorrt-rtx", "cuda")
            assert model.choice == "the fastest: the bundle has engines for this GPU"

    def test_without_a_gpu_says_why_it_does_not(self, copied, gpu):
        gpu.devices = 0
        with MesaModel.load(copied) as model:
            assert model.backend not in ("tensorrt", "tensorrt-rtx")
            assert "the bundle's engines do not run here: there is no GPU here" in model.choice

    def test_without_engines_nobody_asks_for_a_gpu(self, bundle, gpu):
        with MesaModel.load(bundle("llama", "float16")) as model:
            assert "engines" not in model.choice
        assert not gpu.counts

    def test_specialised_graphs_are_no_engines(self, copied, gpu):
        with MesaModel.load(copied, specialised=True) as model:
            assert model.backend not in ("tensorrt", "tensorrt-rtx")


class TestTheFake:
    """It notices what a GPU would punish with wrong numbers."""

    def test_memory(self, monkeypatch):
        gpu = FakeGpu(total=1000)
        for name, module in gpu.modules().items():
            monkeypatch.setitem(sys.modules, name, module)
        from mesart.runtime.cuda import Cuda

        cuda = Cuda()
        block, other = cuda.allocate(512, "a"), cuda.allocate(300, "b")
        cuda.copy_rows(block, 256, other, 100, 100, 2)
        for call in (
            lambda: cuda.copy_rows(block + 300, 256, other, 100, 100, 2),
            lambda: cuda.copy_rows(block, 256, 12345, 100, 100, 2),
            lambda: cuda.zero_rows(other, 150, 160, 1),
            lambda: cuda.capture(cuda.synchronize),
            lambda: cuda.capture(lambda: cuda.free(block)),
        ):
            with pytest.raises(Fault):
                call()
        graph = cuda.capture(lambda: cuda.zero_rows(other, 300, 300, 1))
        cuda.free(other)
        cuda.launch(graph)
        with pytest.raises(Fault, match="no device memory"):
            cuda.synchronize()
        with pytest.raises(MesaError, match="out of memory: c take"):
            cuda.allocate(600, "c")
        with pytest.raises(Fault, match="not freed: device memory, graphs, streams"):
            gpu.require_clean()
        cuda.close()
        gpu.require_clean()


def change(bundle: Path, **fields: Any) -> None:
    """Changes the record of the bundle's engines."""
    manifest = Manifest.read(bundle)
    dataclasses.replace(manifest, engines=[dataclasses.replace(manifest.engines[0], **fields)]).write(bundle)


def one_line(error: pytest.ExceptionInfo[MesaError]) -> None:
    assert "\n" not in str(error.value)
