"""Engines: real ones, built by TensorRT for RTX without a GPU; what they take and give, and every way to be refused."""

from __future__ import annotations

import errno
import importlib.util
import io
import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from tqdm import tqdm

from mesart.export import build_engines, engines, export_model, gpus
from mesart.export.engine_graphs import engine_graph, engine_shapes
from mesart.export.engine_memory import estimate
from mesart.export.tensorrt_builder import TensorRtBuilder
from mesart.graphs import MesaError
from mesart.graphs.bundle.manifest import ENGINES_FOLDER, EngineInfo, EngineSet, Layout, Manifest, ProfileInfo
from mesart.runtime import MesaModel

pytest.importorskip("tensorrt_rtx")

ROOT = Path(__file__).resolve().parents[2]
LAYOUTS: list[Layout] = ["bucket", "profile"]


@pytest.fixture(scope="session")
def demo(shared_folder) -> Path:
    """The demo model in float16, with the buckets of 0 and 2 chunks."""
    model = ROOT / "evaluation" / "demo_model"
    return shared_folder("demo-float16", lambda folder: export_model(model, folder, max_tokens=300, dtype="float16"))


@pytest.fixture(scope="session")
def wide(bundle) -> Path:
    """Head size 128, grouped queries, bfloat16, buckets of 0, 1 and 2 chunks."""
    return bundle("wide_llama", "bfloat16")


@pytest.fixture(scope="session", params=["demo", "wide"])
def source(request) -> Path:
    folder: Path = request.getfixturevalue(request.param)
    return folder


@pytest.fixture(scope="session", params=LAYOUTS)
def built(request, source, tmp_path_factory) -> tuple[Path, EngineSet]:
    """A bundle with engines of one layout."""
    folder = tmp_path_factory.mktemp("built") / "bundle"
    shutil.copytree(source, folder)
    return folder, build_engines(folder, gpus="sm89,sm120", layout=request.param, progress=False)


@pytest.fixture
def copy(bundle, tmp_path) -> Path:
    """A bundle to build in."""
    return Path(shutil.copytree(bundle("wide_llama", "bfloat16"), tmp_path / "bundle"))


def test_every_phase_and_bucket_has_an_engine(built):
    folder, made = built
    manifest = Manifest.read(folder)
    assert manifest.engines == [made]
    assert made.flavour == "tensorrt-rtx"
    assert made.compute_capabilities == ["sm89", "sm120"]
    for phase in ("prefix", "chunk", "rerotate"):
        made.find(phase)
    for bucket in manifest.buckets:
        for phase in ("tail", "decode"):
            info, index = made.find(phase, bucket.chunks)
            profile = info.profiles[index]
            tail = min(256, manifest.config.train_length)
            assert profile.kv_length >= bucket.max_tokens + tail - 1, "a whole slice fits behind the last token"
            assert profile.kv_length <= bucket.max_tokens + tail + 64
    count = 5 if made.layout == "profile" else 3 + 2 * len(manifest.buckets)
    assert len(made.engines) == count
    for info in made.engines:
        assert len(info.read(folder)) == info.unpacked > info.bytes == (folder / info.file).stat().st_size


def test_inputs_and_outputs(built):
    folder, made = built
    manifest = Manifest.read(folder)
    config, dtype = manifest.config, manifest.dtype
    for phase, bucket in [("prefix", None), ("chunk", None), ("tail", 0), ("tail", 2), ("decode", 0), ("decode", 2)]:
        info, index = made.find(phase, bucket)
        profile = info.profiles[index]
        new = {"prefix": config.head_length, "chunk": config.chunk_length, "decode": 1}.get(phase, config.train_length)
        assert profile.new == min(new, 256)
        inputs = {tensor.name: (tensor.dtype, tensor.shape) for tensor in info.inputs}
        outputs = {tensor.name: (tensor.dtype, tensor.shape) for tensor in info.outputs}
        expected = {
            "input_ids": ("int64", [1, profile.new]),
            "position_ids": ("int64", [1, profile.new]),
            "query_scale": ("float32", [1, 1, profile.new, 1]),
            "write_at": ("int64", [1]),
        }
        if phase in ("tail", "decode"):
            expected["logits_at"] = ("int64", [1])
            assert outputs.pop("logits") == ("float32", [1, 1, manifest.model["vocab_size"]])
        if made.layout == "profile" and phase in ("tail", "decode"):
            expected["attended"] = ("int64", [info.profiles[0].kv_length])
        for number, layer in enumerate(manifest.layers):
            for kind, size in (("key", layer.key_size), ("value", layer.value_size)):
                cache = (dtype, [1, layer.kv_heads, profile.slots, size])
                expected[f"past_key_values.{number}.{kind}"] = cache
                assert outputs.pop(f"present.{number}.{kind}") == cache
        # The last layer of a head or chunk leaves keys and values only, so its queries may be gone.
        assert {name: value for name, value in expected.items() if name in inputs or name != "query_scale"} == inputs
        assert not outputs
    rerotate, _ = made.find("rerotate")
    turned = [i for i, layer in enumerate(manifest.layers) if layer.rerotate]
    assert [t.name for t in rerotate.inputs] == [*(f"key.{i}" for i in turned), "from_ids", "to_ids"]
    assert [t.name for t in rerotate.outputs] == [f"rotated.{i}" for i in turned]


def test_weights_are_not_in_the_engines(built):
    """Each is an input, and lies where the weight file says; what is left in the engines is small."""
    folder, made = built
    manifest = Manifest.read(folder)
    stored = manifest.weight_bytes
    step, _ = made.find("decode", 0)
    assert sum(weight.bytes for weight in step.weights) > 0.9 * stored - 2**17
    for info in made.engines:
        for weight in info.weights:
            assert weight.bytes >= 2**14
            assert weight.offset + weight.bytes <= manifest.files[weight.file].bytes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_graphs_that_engines_are_built_from_equal_the_symbolic_one(bundle, layout):
    """In float32, run by onnxruntime: a tail and a step behind a random cache."""
    onnxruntime = pytest.importorskip("onnxruntime")
    folder = bundle("tied_llama")
    manifest = Manifest.read(folder)
    layer, vocabulary = manifest.layers[0], manifest.model["vocab_size"]
    rng = np.random.default_rng(0)
    symbolic = onnxruntime.InferenceSession(folder / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    for shapes in engine_shapes(manifest, layout, manifest.buckets):
        if shapes.name == "rerotate":
            continue
        model, _ = engine_graph(folder, shapes, "embedded")
        path = folder / f"test-{layout}-{shapes.name}.onnx"
        ir.save(model, path)
        session = onnxruntime.InferenceSession(path, options)
        path.unlink()
        for profile in shapes.profiles:
            new, start = profile.new, min(8, profile.kv_length - profile.new)
            shape = (1, layer.kv_heads, profile.slots, layer.key_size)
            key, value = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
            feeds = {
                "input_ids": rng.integers(0, vocabulary, (1, new)),
                "position_ids": np.arange(start, start + new)[None] % manifest.config.train_length,
                "query_scale": np.full((1, 1, new, 1), 1.2, np.float32),
                "logits_at": np.array([new - 1]),
            }
            past = {"past_key_values.0.key": key[:, :, :start], "past_key_values.0.value": value[:, :, :start]}
            masks = {
                "past_mask": np.zeros((1, 1, 1, start), np.float32),
                "new_mask": np.triu(np.full((new, new), -1e9, np.float32), 1)[None, None],
            }
            names = ["logits", "present.0.key", "present.0.value"]
            logits, new_key, new_value = symbolic.run(names, feeds | past | masks)
            own = {
                **feeds,
                "write_at": np.array([start]),
                "attended": np.arange(profile.kv_length),
                "past_key_values.0.key": key,
                "past_key_values.0.value": value,
            }
            known = {entry.name for entry in session.get_inputs()}
            outputs = [entry.name for entry in session.get_outputs()]
            got = dict(zip(outputs, session.run(outputs, {n: v for n, v in own.items() if n in known}), strict=True))
            assert ("logits" in got) == (profile.phase in ("tail", "decode"))
            if "logits" in got:
                assert np.abs(got["logits"] - logits).max() < 1e-4
            for name, old, written in (("key", key, new_key), ("value", value, new_value)):
                cache = got[f"present.0.{name}"]
                assert np.abs(cache[:, :, start : start + new] - written).max() < 1e-5
                untouched = np.delete(np.arange(profile.slots), np.arange(start, start + new))
                assert np.array_equal(cache[:, :, untouched], old[:, :, untouched])


class TestBuildingAgain:
    def test_builds_only_what_changed(self, copy):
        first = build_engines(copy, gpus="sm89", progress=False)
        lines: list[str] = []
        assert build_engines(copy, gpus="sm89", progress=False, report=lines.append) == first
        assert sum("unchanged" in line for line in lines) == len(first.engines)
        damaged = copy / first.engines[2].file
        damaged.write_bytes(b"\0" + damaged.read_bytes()[1:])
        lines.clear()
        again = build_engines(copy, gpus="sm89", progress=False, report=lines.append)
        assert sum("unchanged" in line for line in lines) == len(first.engines) - 1
        assert [info.key for info in again.engines] == [info.key for info in first.engines]
        again.engines[2].read(copy)

    def test_another_target_is_another_build(self, copy):
        first = build_engines(copy, gpus="sm89", progress=False, max_tokens=10)
        second = build_engines(copy, gpus="sm120", progress=False, max_tokens=10)
        assert {info.key for info in first.engines}.isdisjoint(info.key for info in second.engines)
        assert Manifest.read(copy).engines == [second, first]

    def test_a_killed_build_leaves_the_bundle_and_goes_on(self, copy, monkeypatch):
        build, seen = TensorRtBuilder.build, []

        def dies(self, *arguments):
            seen.append(arguments)
            if len(seen) == 3:
                raise KeyboardInterrupt
            return build(self, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(TensorRtBuilder, "build", dies)
            with pytest.raises(KeyboardInterrupt):
                build_engines(copy, gpus="sm89", progress=False)
        assert Manifest.read(copy).engines == []
        with MesaModel.load(copy, "torch") as model:
            model.prefill([1, 2, 3])
        with (copy / ENGINES_FOLDER / "build.jsonl").open("a") as log:
            log.write('{"time": "2026-')  # the line that it was writing
        lines: list[str] = []
        build_engines(copy, gpus="sm89", progress=False, report=lines.append)
        assert sum("unchanged" in line for line in lines) == 2

    def test_the_log_says_what_was_built(self, copy):
        made = build_engines(copy, gpus="sm89", progress=False, max_tokens=10)
        entries = [json.loads(line) for line in (copy / ENGINES_FOLDER / "build.jsonl").read_text().splitlines()]
        assert [entry["engine"]["file"] for entry in entries] == [info.file for info in made.engines]
        assert all(entry["tensorrt"] == made.version and entry["engine"]["seconds"] > 0 for entry in entries)

    def test_only_the_buckets_that_are_needed(self, copy):
        made = build_engines(copy, gpus="sm89", progress=False, max_tokens=10)
        assert {p.bucket for info in made.engines for p in info.profiles if p.phase == "decode"} == {0}


def test_progress_is_reported_phase_by_phase(copy):
    manifest = Manifest.read(copy)
    shapes = next(s for s in engine_shapes(manifest, "bucket", manifest.buckets) if s.name == "decode-0")
    model, _ = engine_graph(copy, shapes, "shared")
    phases: list[tuple[str, int, int]] = []
    builder = TensorRtBuilder("tensorrt-rtx", ["sm89"], copy / "timing")
    onnx = ir.to_proto(model).SerializeToString()
    builder.build(onnx, copy, [], lambda *phase: phases.append(phase))
    assert len({name for name, _, _ in phases}) > 3

    def interrupt(*phase: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        builder.build(onnx, copy, [], interrupt)


def test_embedded_weights_are_paid_for_in_every_engine(demo, tmp_path):
    folder = Path(shutil.copytree(demo, tmp_path / "bundle"))
    shared = build_engines(folder, gpus="sm89", progress=False, max_tokens=10)
    embedded = build_engines(folder, gpus="sm89", progress=False, max_tokens=10, weights="embedded")
    assert all(not info.weights for info in embedded.engines)
    for phase in ("tail", "decode"):
        assert embedded.find(phase, 0)[0].bytes > shared.find(phase, 0)[0].bytes


def test_memory_grows_by_the_cache(bundle):
    folder = bundle()
    manifest = Manifest.read(folder)
    memory = estimate(folder, manifest, engine_shapes(manifest, "bucket", manifest.buckets), "shared")
    assert [need.chunks for need in memory] == [bucket.chunks for bucket in manifest.buckets]
    slot = sum(2 * x.kv_heads * (x.key_size + x.value_size) for x in manifest.layers)
    for need, bucket in zip(memory, manifest.buckets, strict=True):
        assert 0 <= need.cache - slot * bucket.max_tokens <= slot * (64 + manifest.config.train_length)
        assert need.weights == manifest.weight_bytes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_behind_a_long_cache_is_computed_with_a_second_token(copy, monkeypatch, layout):
    """TensorRT for RTX has no kernel for one query and more than 24 thousand keys."""
    manifest = Manifest.read(copy)
    *_, step = engine_shapes(manifest, layout, manifest.buckets[:1])
    assert step.profiles[0].new == 1
    longer = tuple(replace(profile, slots=2**15, kv_length=2**15) for profile in step.profiles)
    monkeypatch.setattr("mesart.export.engines.engine_shapes", lambda *_: [replace(step, profiles=longer)])
    made = build_engines(copy, gpus="sm89", layout=layout, progress=False)
    (info,) = made.engines
    assert info.profiles == [replace(longer[0], new=2)]
    assert next(tensor.shape for tensor in info.inputs if tensor.name == "input_ids") == [1, 2]
    lines: list[str] = []
    assert build_engines(copy, gpus="sm89", layout=layout, progress=False, report=lines.append) == made
    assert "decode-0: unchanged" in lines or "decode: unchanged" in lines


def test_attention_that_tensorrt_would_take_apart_is_refused(copy, monkeypatch):
    """What is counted is the built network; here one in which TensorRT was allowed to."""
    import onnx

    manifest = Manifest.read(copy)
    shapes = engine_shapes(manifest, "bucket", manifest.buckets)[0]
    model, _ = engine_graph(copy, shapes, "shared")
    builder = TensorRtBuilder("tensorrt-rtx", ["sm89"], copy / "timing")
    load = onnx.load_model_from_string

    def one_more(kind: str) -> None:
        def count(graph: bytes) -> onnx.ModelProto:
            loaded = load(graph)
            loaded.graph.node.add(op_type=kind)
            return loaded

        monkeypatch.setattr("mesart.export.tensorrt_builder.onnx.load_model_from_string", count)

    graph = ir.to_proto(model).SerializeToString()
    one_more("Attention")
    with pytest.raises(MesaError, match="runs 0 of the graph's 1 attention layers in its own kernel"):
        builder.build(graph, copy, [], lambda *phase: None)
    one_more("TensorScatter")
    with pytest.raises(MesaError, match="updates 2 of 3 caches in place"):
        builder.build(graph, copy, [], lambda *phase: None)


class TestRefusals:
    def refused(self, folder: Path, *arguments: str, **options: object) -> str:
        before = (folder / "manifest.json").read_bytes()
        with pytest.raises(MesaError) as error:
            build_engines(folder, *arguments, progress=False, **options)  # type: ignore[arg-type]
        assert "\n" not in str(error.value)
        assert (folder / "manifest.json").read_bytes() == before
        return str(error.value)

    def test_float32(self, bundle):
        text = self.refused(bundle(), gpus="sm89")
        assert "compute float16 and bfloat16, this bundle is float32; export again with --dtype bfloat16" in text

    def test_an_unknown_gpu(self, copy):
        text = self.refused(copy, gpus="sm89,voodoo2")
        assert "unknown GPU 'voodoo2'; give a compute capability such as sm89, or t4" in text

    def test_a_gpu_that_this_flavour_does_not_build_for(self, copy):
        text = self.refused(copy, gpus="h100")
        assert "builds for sm75, sm80" in text
        assert "not for sm90; use --engine tensorrt" in text

    def test_bfloat16_on_a_gpu_without_it(self, wide):
        assert "t4 computes no bfloat16; export again with --dtype float16" in self.refused(wide, gpus="t4")

    def test_no_gpu(self, copy, monkeypatch):
        monkeypatch.setattr("mesart.export.engines.local_gpu", lambda: None)
        assert "name those that the engines are for, as --gpu sm89,sm120" in self.refused(copy)
        assert "--engine tensorrt-rtx --gpu ... builds without one" in self.refused(copy, "tensorrt")

    def test_another_gpu_than_this_machine_has(self, copy, monkeypatch):
        here = gpus.Gpu("NVIDIA H200", "sm90", 141 << 30)
        monkeypatch.setattr("mesart.export.engines.local_gpu", lambda: here)
        text = self.refused(copy, "tensorrt", gpus="sm100")
        assert "this machine's GPU only, NVIDIA H200 (sm90), not for sm100" in text

    @pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt-rtx"])
    def test_a_missing_package_names_the_extra(self, copy, monkeypatch, flavour):
        here = gpus.Gpu("NVIDIA L4", "sm89", 24 << 30)
        monkeypatch.setattr("mesart.export.engines.local_gpu", lambda: here)
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n.startswith("tensorrt") else find(n))
        assert f"pip install 'mesart[{flavour}]'" in self.refused(copy, flavour)

    def test_a_bucket_that_does_not_fit_says_by_how_much(self, copy, monkeypatch):
        monkeypatch.setitem(gpus._CARDS, "voodoo2", ("sm89", 0))
        text = self.refused(copy, gpus="voodoo2")
        assert "voodoo2 has 0.0 GiB, the bucket of 0 chunks needs 0.4 GiB more" in text
        assert "smaller --max-tokens" in text

    def test_more_tokens_than_the_bundle_has(self, copy):
        assert "export again with --max-tokens 100000" in self.refused(copy, gpus="sm89", max_tokens=100_000)

    def test_a_full_disk(self, copy, monkeypatch):
        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("mesart.export.engines.replace_file", full)
        assert "the disk is full" in self.refused(copy, gpus="sm89")
        assert not list(copy.rglob("*.partial"))

    @pytest.mark.parametrize("place", ["engines", "engines/build.jsonl", "engines/tensorrt-rtx.timing", "set"])
    def test_links_that_a_bundle_brings(self, copy, tmp_path, place):
        """They could lead to any file of the user's."""
        version = pytest.importorskip("tensorrt_rtx").__version__
        name = f"engines/tensorrt-rtx-{version}-sm89-bucket-shared" if place == "set" else place
        victims = tmp_path / "victims"
        victims.mkdir()
        (victims / "file").write_text("ten years")
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).symlink_to(victims if place in ("engines", "set") else victims / "file")
        text = self.refused(copy, gpus="sm89")
        assert f"{copy / name} is a link" in text
        assert "cp -rL" in text
        assert [path.name for path in victims.iterdir()] == ["file"]
        assert (victims / "file").read_text() == "ten years"

    def test_a_head_size_without_a_kernel(self, bundle, tmp_path):
        narrow = Path(shutil.copytree(bundle("tied_llama", "bfloat16"), tmp_path / "narrow"))
        text = self.refused(narrow, gpus="sm89")
        assert "has no attention kernel for this model's head size and dtype; use another backend" in text

    def test_a_graph_that_tensorrt_cannot_read(self, copy):
        manifest = Manifest.read(copy)
        shapes = engine_shapes(manifest, "bucket", manifest.buckets)[0]
        model, _ = engine_graph(copy, shapes, "shared")
        next(node for node in model.graph if node.op_type == "MatMul").op_type = "Abracadabra"
        builder = TensorRtBuilder("tensorrt-rtx", ["sm89"], copy / "timing")
        with pytest.raises(MesaError, match="cannot read the graph: .*Abracadabra") as error:
            builder.build(ir.to_proto(model).SerializeToString(), copy, [], lambda *phase: None)
        assert "\n" not in str(error.value)


def test_cards_are_known_by_name():
    (card,) = gpus.parse_gpus("RTX 4090")
    assert (card.capability, card.memory) == ("sm89", 24 << 30)
    assert [gpu.capability for gpu in gpus.parse_gpus("sm89,rtx_5090,h200")] == ["sm89", "sm120", "sm90"]


def test_a_missing_engine_names_the_command():
    empty = EngineSet("tensorrt-rtx", "1.7", ["sm89"], "bucket", "shared", list[EngineInfo]())
    with pytest.raises(MesaError, match="no engine for the tail of 4 chunks; run `mesart build`"):
        empty.find("tail", 4)


class TestLog:
    """The log of a build, which a full disk or a killed build may leave torn."""

    @pytest.fixture
    def info(self) -> EngineInfo:
        return EngineInfo(
            "engines/a/head.plan.gz", 1, "0" * 64, 1, "0" * 64, [], [], [], [ProfileInfo("prefix", None, 8, 8, 8)], 0.1
        )

    def test_torn_lines(self, tmp_path, info):
        path = tmp_path / "build.jsonl"
        path.write_bytes(
            b'[1]\n{"engine": []}\n{"engine": {"file": "x"}}\n\xff\xfe\n' + b"[" * 100_000 + b'\n{"time": "20'
        )
        log = engines._Log(path)
        assert log.find(info.file, info.key) is None
        log.append(info, "1")
        log.append(info, "1")
        assert log.find(info.file, info.key) == info
        assert len(path.read_bytes().splitlines()) == 8
        assert log.find(info.file, "another") is None

    def test_it_is_a_file_of_the_bundles_own(self, tmp_path, info):
        (tmp_path / "victim").write_text("ten years")
        os.link(tmp_path / "victim", tmp_path / "hard")
        (tmp_path / "link").symlink_to("victim")
        os.mkfifo(tmp_path / "pipe")
        for name in ("hard", "link", "pipe"):
            assert engines._Log(tmp_path / name).find(info.file, "key") is None
            with pytest.raises((MesaError, OSError)):
                engines._Log(tmp_path / name).append(info, "1")
        assert (tmp_path / "victim").read_text() == "ten years"


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_no_flood(monkeypatch, terminal):
    """A file gets a line now and then, a terminal a line that changes."""
    now = 0.0
    text = io.StringIO()
    monkeypatch.setattr(text, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with tqdm(total=1, file=text) as bar:
        show = engines.ticker(bar, "tail-0")
        for step in range(1000):
            now += 0.03
            show("phase", step, 1000)
    shown = text.getvalue().count("tail-0")
    assert shown == pytest.approx(250, abs=2) if terminal else shown <= 2
