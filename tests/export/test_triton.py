"""Triton repositories: configs against Triton's own schema and the graphs, graphs run, the text model run by a stub."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from mesart.export.tensorrt_builder import NoKernelError, TensorRtBuilder
from mesart.export.triton import MARKER_FILE, export_triton_repository
from mesart.graphs import MesaError
from mesart.graphs.bundle.manifest import WEIGHTS_FILE, Manifest
from mesart.runtime import MesaModel

pytest.importorskip("tritonclient")
text_format = pytest.importorskip("google.protobuf.text_format")
json_format = pytest.importorskip("google.protobuf.json_format")

TYPES = {  # of ONNX, and how Triton calls them
    onnx.TensorProto.INT64: "TYPE_INT64",
    onnx.TensorProto.FLOAT: "TYPE_FP32",
    onnx.TensorProto.BFLOAT16: "TYPE_BF16",
}
ONNXRUNTIME_TYPES = {"TYPE_INT64": "tensor(int64)", "TYPE_FP32": "tensor(float)"}
SIZES = {"B": 1, "S": 40}  # of a place in a plan: one row, a chunk
MAX_TOKENS = 80  # takes two buckets, of 0 and 2 chunks
GRAPHS = ["prefix", "chunk", "rerotate", "tail-0", "tail-2", "decode-0", "decode-2"]


@pytest.fixture(scope="session")
def schema() -> Any:
    """Triton's protobuf module; by its path, because the package around it wants gRPC."""
    spec = importlib.util.find_spec("tritonclient")
    assert spec is not None
    (folder,) = spec.submodule_search_locations or []
    path = Path(folder, "grpc", "model_config_pb2.py")
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def config(schema):
    """``config(model)``: the config of a model's folder, if Triton's schema knows all of it."""

    def read(model: Path) -> Any:
        found = text_format.Parse((model / "config.pbtxt").read_text(), schema.ModelConfig())
        assert found.name == model.name
        assert found.max_batch_size == 0
        assert found.version_policy.latest.num_versions == 1
        assert (model / "1" / found.default_model_filename).is_file()
        return found

    return read


@pytest.fixture(scope="session")
def wide(bundle) -> Path:
    return bundle("wide_llama", "bfloat16")


@pytest.fixture(scope="session")
def plans(wide, shared_folder) -> Path:
    """A repository of plans that TensorRT for RTX has built."""
    pytest.importorskip("tensorrt_rtx")
    return shared_folder(
        "triton-plans",
        lambda folder: export_triton_repository(
            wide, folder, engine="tensorrt-rtx", gpus="sm89,sm120", name="wide", max_tokens=MAX_TOKENS, progress=False
        ),
    )


@pytest.fixture(scope="session")
def graphs(bundle, shared_folder) -> Path:
    """A repository for onnxruntime."""
    return shared_folder(
        "triton-graphs",
        lambda folder: export_triton_repository(
            bundle(), folder, engine="onnxruntime", max_tokens=MAX_TOKENS, progress=False
        ),
    )


def names(repository: Path) -> set[str]:
    return {path.name for path in repository.iterdir() if path.is_dir()}


def model_name(graph: str, name: str = "mesart") -> str:
    return f"{name}_{graph.replace('-', '_')}"


def tensors(schema: Any, found: Any) -> list[tuple[str, str, list[int]]]:
    """Name, type and dims of all inputs and outputs of a config."""
    return [(x.name, schema.DataType.Name(x.data_type), list(x.dims)) for x in (*found.input, *found.output)]


class TestPlans:
    def test_there_is_one_for_each_phase_and_bucket(self, plans, wide):
        assert names(plans) == {"wide", *(model_name(graph, "wide") for graph in GRAPHS)}
        assert not (plans / "timing").exists()
        weights = Manifest.read(wide).files[WEIGHTS_FILE].bytes
        for graph in GRAPHS:
            size = (plans / model_name(graph, "wide") / "1" / "model.plan").stat().st_size
            assert size > (0 if graph == "rerotate" else 0.8 * weights), "the weights are in it"

    @pytest.mark.parametrize("graph", GRAPHS)
    def test_the_config_is_the_graph(self, plans, wide, config, schema, graph):
        found = config(plans / model_name(graph, "wide"))
        assert (found.platform, found.default_model_filename) == ("tensorrt_plan", "model.plan")
        (group,) = found.instance_group
        assert (group.kind, group.count) == (schema.ModelInstanceGroup.KIND_GPU, 1)
        source = onnx.load(wide / f"{graph}.onnx", load_external_data=False).graph
        expected = [
            (
                value.name,
                TYPES[value.type.tensor_type.elem_type],
                [dim.dim_value or SIZES[dim.dim_param] for dim in value.type.tensor_type.shape.dim],
            )
            for value in (*source.input, *source.output)
        ]
        assert tensors(schema, found) == expected

    def test_no_cache_is_updated_in_place_and_nothing_is_free(self, wide, tmp_path, monkeypatch):
        """What Triton could not run; and what it would have to be told of, a shape tensor."""
        trt = pytest.importorskip("tensorrt_rtx")
        built = []

        def build(self: TensorRtBuilder, graph: bytes, folder: Path, *_: Any) -> None:
            network = trt.Builder(self._logger).create_network()
            parser = trt.OnnxParser(network, self._logger)
            assert parser.parse(graph, str(folder / "x.onnx"))
            ends = [network.get_input(i) for i in range(network.num_inputs)]
            assert not any(end.is_shape_tensor or -1 in end.shape for end in ends)
            layers = [network.get_layer(i).type for i in range(network.num_layers)]
            assert trt.LayerType.KV_CACHE_UPDATE not in layers
            built.append(layers.count(trt.LayerType.ATTENTION_INPUT))
            raise MesaError("enough")

        monkeypatch.setattr(TensorRtBuilder, "build", build)
        with pytest.raises(MesaError, match="mesart_rerotate: enough"):
            export(wide, tmp_path / "out", "tensorrt-rtx", gpus="sm89")
        monkeypatch.setattr("mesart.export.triton._graphs", lambda manifest, _: [manifest.graph("decode", 2)])
        with pytest.raises(MesaError, match="mesart_decode_2: enough"):
            export(wide, tmp_path / "out", "tensorrt-rtx", gpus="sm89")
        assert built == [0, 1]


class TestGraphs:
    def test_there_is_one_for_each_phase_and_bucket(self, graphs):
        assert names(graphs) == {"mesart", *map(model_name, GRAPHS)}

    @pytest.mark.parametrize("graph", GRAPHS)
    def test_onnxruntime_finds_what_the_config_says(self, graphs, config, schema, graph):
        onnxruntime = pytest.importorskip("onnxruntime")
        model = graphs / model_name(graph)
        found = config(model)
        assert (found.platform, found.default_model_filename) == ("onnxruntime_onnx", "model.onnx")
        assert found.instance_group[0].kind == schema.ModelInstanceGroup.KIND_AUTO
        session = onnxruntime.InferenceSession(model / "1" / "model.onnx")
        real = [
            (value.name, value.type, [dim if isinstance(dim, int) else -1 for dim in value.shape])
            for value in (*session.get_inputs(), *session.get_outputs())
        ]
        assert [(n, ONNXRUNTIME_TYPES[kind], dims) for n, kind, dims in tensors(schema, found)] == real

    def test_a_head_computes_what_the_bundle_does(self, graphs, bundle, config):
        onnxruntime = pytest.importorskip("onnxruntime")
        model = graphs / model_name("prefix")
        sizes = {value.name: list(value.dims) for value in config(model).input}
        new = sizes["input_ids"][1]
        feeds = {
            "input_ids": np.arange(2, new + 2)[None],
            "position_ids": np.arange(new)[None],
            "query_scale": np.ones(sizes["query_scale"], np.float32),
            "new_mask": np.triu(np.full((new, new), -1e9, np.float32), 1)[None, None],
            "logits_at": np.array([new - 1]),
        }
        assert set(feeds) == set(sizes)
        (logits,) = onnxruntime.InferenceSession(model / "1" / "model.onnx").run(["logits"], feeds)
        with MesaModel.load(bundle(), "onnxruntime") as reference:
            assert np.abs(logits - reference.prefill(feeds["input_ids"])).max() < 1e-4

    def test_the_weights_are_on_the_disk_once(self, graphs, bundle):
        files = [bundle() / WEIGHTS_FILE, *graphs.rglob(WEIGHTS_FILE)]
        assert len(files) == 2 + len(GRAPHS)
        assert len({path.stat().st_ino for path in files}) == 1

    def test_they_are_copied_where_files_cannot_be_linked(self, bundle, tmp_path, monkeypatch):
        def refuse(*_: object) -> None:
            raise OSError(errno.EXDEV, "Invalid cross-device link")

        monkeypatch.setattr(os, "link", refuse)
        made = export(bundle(), tmp_path / "out", max_tokens=10)
        assert names(made) == {"mesart", "mesart_rerotate", "mesart_tail_0", "mesart_decode_0"}
        Manifest.read(made / "mesart" / "1" / "bundle").verify(made / "mesart" / "1" / "bundle")
        assert (made / "mesart_tail_0" / "1" / WEIGHTS_FILE).stat().st_nlink == 1

    def test_bfloat16_asks_for_a_gpu(self, wide, tmp_path, config, schema):
        made = export(wide, tmp_path / "out")
        found = config(made / "mesart_prefix")
        assert found.instance_group[0].kind == schema.ModelInstanceGroup.KIND_GPU
        assert found.output[1].data_type == schema.TYPE_BF16

    def test_the_readme_says_how_to_start(self, graphs, plans):
        lines = (graphs / "README.txt").read_text().splitlines()
        assert len(lines) == 3
        assert "--load-model=mesart" in lines[0]
        assert all(model_name(graph) in lines[2] for graph in GRAPHS)
        assert "plans of tensorrt-rtx 1." in (plans / "README.txt").read_text()


class Tensor:
    """Of Triton's ``pb_utils``; strings are bytes there."""

    def __init__(self, name: str, array: Any) -> None:
        self._name, self._array = name, np.asarray(array)

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> Any:
        return self._array


class Sender:
    """Keeps what it is sent, and refuses to go on after the final flag, as Triton does."""

    def __init__(self, patience: int) -> None:
        self.sent: list[tuple[Any, int]] = []
        self._patience = patience

    def send(self, response: Any = None, flags: int = 0) -> None:
        assert not any(flag for _, flag in self.sent), "Response sender has been closed."
        self.sent.append((response, flags))

    def is_cancelled(self) -> bool:
        return len(self.sent) >= self._patience

    @property
    def texts(self) -> list[str]:
        assert [flag for _, flag in self.sent] == [0] * (len(self.sent) - 1) + [1]
        return [tensor.as_numpy()[0].decode() for response, _ in self.sent for tensor in response.output_tensors]

    @property
    def error(self) -> Any:
        ((response, flag),) = self.sent
        assert flag == 1
        return response.error


class Request:
    def __init__(self, patience: int = 1000, **inputs: Any) -> None:
        self.sender = Sender(patience)
        self._inputs = [Tensor(name, value) for name, value in inputs.items()]

    def inputs(self) -> list[Tensor]:
        return self._inputs

    def get_response_sender(self) -> Sender:
        return self.sender


class Response:
    def __init__(self, output_tensors: Any = (), error: Any = None) -> None:
        self.output_tensors, self.error = output_tensors, error


class Error:
    INVALID_ARG, INTERNAL = "invalid", "internal"

    def __init__(self, message: str, code: str = INTERNAL) -> None:
        self.message, self.code = message, code


def strings(*texts: str) -> Any:
    return np.array([text.encode() for text in texts], dtype=np.object_)


@pytest.fixture
def served(graphs, config, monkeypatch):
    """The text model, as Triton's Python process would start it."""
    utils: Any = types.ModuleType("triton_python_backend_utils")
    utils.Tensor, utils.InferenceResponse, utils.TritonError = Tensor, Response, Error
    utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
    utils.Logger = types.SimpleNamespace(log_info=lambda message: None)
    monkeypatch.setitem(sys.modules, utils.__name__, utils)
    folder = graphs / "mesart"
    spec = importlib.util.spec_from_file_location("served_model", folder / "1" / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    fields = json_format.MessageToDict(config(folder), preserving_proto_field_name=True)
    fields["parameters"]["backend"]["string_value"] = "onnxruntime"
    model = module.TritonPythonModel()
    model.initialize({"model_config": json.dumps(fields), "model_repository": os.fspath(folder), "model_version": "1"})
    yield model
    model.finalize()


class TestText:
    PROMPT = "The grass is green. The sky is"

    def test_the_config_streams(self, graphs, config, schema):
        found = config(graphs / "mesart")
        assert (found.backend, found.platform) == ("python", "")
        assert found.model_transaction_policy.decoupled
        assert found.parameters["backend"].string_value == "auto"
        assert {value.name for value in found.input if not value.optional} == {"text_input"}
        assert tensors(schema, found) == [
            ("text_input", "TYPE_STRING", [1]),
            ("max_tokens", "TYPE_INT32", [1]),
            ("temperature", "TYPE_FP32", [1]),
            ("top_p", "TYPE_FP32", [1]),
            ("seed", "TYPE_INT64", [1]),
            ("stop", "TYPE_STRING", [-1]),
            ("text_output", "TYPE_STRING", [1]),
        ]

    def test_it_says_what_the_model_says(self, served, bundle):
        requests = [
            Request(text_input=strings(self.PROMPT), max_tokens=np.array([12], np.int32)),
            Request(
                text_input=strings(self.PROMPT),
                max_tokens=np.array([12], np.int32),
                temperature=np.array([1.5], np.float32),
                top_p=np.array([0.75], np.float32),
                seed=np.array([3], np.int64),
            ),
        ]
        assert served.execute(requests) is None
        greedy, drawn = (request.sender.texts for request in requests)
        with MesaModel.load(bundle(), "onnxruntime") as model:
            assert greedy == [*model.stream(self.PROMPT, 12), ""]
            assert drawn == [*model.stream(self.PROMPT, 12, temperature=1.5, top_p=0.75, seed=3), ""]
        assert greedy != drawn
        assert len(greedy) > 3

    def test_stop_strings(self, served):
        def ask(*stop: str) -> str:
            options = {"stop": strings(*stop)} if stop else {}
            request = Request(text_input=strings(self.PROMPT), max_tokens=np.array([12], np.int32), **options)
            served.execute([request])
            return "".join(request.sender.texts)

        text = ask()
        assert ask("\0", text[3:5]) == text[: text.index(text[3:5])]

    def test_it_ends_when_nobody_listens_any_more(self, served):
        request = Request(2, text_input=strings(self.PROMPT), max_tokens=np.array([100], np.int32))
        served.execute([request])
        assert len(request.sender.texts) == 3, "two pieces and the end"

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"text_input": strings("")}, "the prompt is empty"),
            ({"text_input": strings("The sky is blue. " * 200)}, "344 tokens"),
            ({"text_input": np.array([b"\xff"], dtype=np.object_)}, "utf-8"),
            ({"max_tokens": np.array([0], np.int32)}, "max_new_tokens is 0"),
            ({"temperature": np.array([-1], np.float32)}, "temperature is -1.0"),
            ({"stop": strings("")}, "a stop string is empty"),
        ],
        ids=lambda x: x if isinstance(x, str) else None,
    )
    def test_a_bad_request_is_answered_and_the_next_one_served(self, served, changes, reason):
        good = {"text_input": strings(self.PROMPT), "max_tokens": np.array([2], np.int32)}
        bad, next_one = Request(**{**good, **changes}), Request(**good)
        served.execute([bad, next_one])
        assert reason in bad.sender.error.message
        assert bad.sender.error.code == Error.INVALID_ARG
        assert next_one.sender.texts

    def test_so_is_an_engine_that_fails(self, served, monkeypatch):
        def fail(*_: object, **__: object) -> None:
            raise RuntimeError("out of memory")

        monkeypatch.setattr(served.model, "stream", fail)
        request = Request(text_input=strings(self.PROMPT))
        served.execute([request])
        assert request.sender.error.message == "RuntimeError: out of memory"
        assert request.sender.error.code == Error.INTERNAL

    def test_engines_of_the_bundle_come_along(self, wide, tmp_path):
        from mesart.export import build_engines

        folder = Path(shutil.copytree(wide, tmp_path / "bundle"))
        pytest.importorskip("tensorrt_rtx")
        built = build_engines(folder, gpus="sm89", max_tokens=10, progress=False)
        made = export(folder, tmp_path / "out", max_tokens=10)
        copy = made / "mesart" / "1" / "bundle"
        assert Manifest.read(copy).engines == [built]
        assert all(info.read(copy) for info in built.engines)
        (folder / built.engines[0].file).unlink()
        with pytest.raises(MesaError, match="is missing; run `mesart build` again"):
            export(folder, tmp_path / "other", max_tokens=10)


def export(bundle: Path, output: Path, engine: Any = "onnxruntime", **options: Any) -> Path:
    return export_triton_repository(bundle, output, engine=engine, progress=False, **options)


class TestRefusals:
    @pytest.fixture(autouse=True)
    def _nothing_half_written(self, tmp_path):
        before = sorted(tmp_path.rglob("*"))
        yield
        assert sorted(tmp_path.rglob("*")) == before

    def refused(self, bundle: Path, tmp_path: Path, engine: str = "onnxruntime", **options: Any) -> str:
        with pytest.raises(MesaError) as error:
            export(bundle, tmp_path / "out", engine, **options)
        assert "\n" not in str(error.value)
        return str(error.value)

    def test_an_unknown_engine(self, bundle, tmp_path):
        text = self.refused(bundle(), tmp_path, "openvino")
        assert "unknown engine 'openvino'; there are tensorrt, tensorrt-rtx, onnxruntime" in text

    @pytest.mark.parametrize("engine", ["tensorrt", "tensorrt-rtx"])
    def test_float32(self, bundle, tmp_path, engine):
        text = self.refused(bundle(), tmp_path, engine, gpus="sm89")
        assert "this bundle is float32; export again with --dtype bfloat16" in text

    def test_no_gpu(self, wide, tmp_path, monkeypatch):
        monkeypatch.setattr("mesart.export.triton.local_gpu", lambda: None)
        monkeypatch.setattr("mesart.export.engines.local_gpu", lambda: None)
        assert "there is none here" in (text := self.refused(wide, tmp_path, "tensorrt"))
        assert "--engine onnxruntime needs none" in text
        assert "--gpu sm89,sm120" in self.refused(wide, tmp_path, "tensorrt-rtx")

    def test_gpus_that_cannot_be(self, wide, bundle, tmp_path):
        assert "unknown GPU 'voodoo2'" in self.refused(wide, tmp_path, "tensorrt-rtx", gpus="voodoo2")
        assert "t4 computes no bfloat16" in self.refused(wide, tmp_path, "tensorrt-rtx", gpus="t4")
        assert "leave it out with --engine onnxruntime" in self.refused(bundle(), tmp_path, gpus="sm89")

    def test_no_bundle(self, tmp_path):
        assert "is no bundle" in self.refused(tmp_path, tmp_path)

    def test_more_tokens_than_the_bundle_has(self, bundle, tmp_path):
        assert "export again with --max-tokens 100000" in self.refused(bundle(), tmp_path, max_tokens=100_000)

    @pytest.mark.parametrize("name", ["", "../mesart", "my model", ".hidden"])
    def test_a_name_that_is_no_folder(self, bundle, tmp_path, name):
        assert "cannot name a model" in self.refused(bundle(), tmp_path, name=name)

    def test_a_step_without_a_kernel(self, wide, tmp_path, monkeypatch):
        def build(*_: object) -> None:
            raise NoKernelError("no kernel")

        monkeypatch.setattr(TensorRtBuilder, "build", build)
        monkeypatch.setattr("mesart.export.triton._graphs", lambda manifest, _: [manifest.graph("decode", 2)])
        text = self.refused(wide, tmp_path, "tensorrt-rtx", gpus="sm89")
        assert "mesart_decode_2: " in text
        assert "one query behind 104 tokens" in text
        assert "smaller --max-tokens" in text

    def test_too_little_space_is_noticed_before_the_work(self, wide, tmp_path, monkeypatch):
        usage = types.SimpleNamespace(free=1 << 10)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        text = self.refused(wide, tmp_path, "tensorrt-rtx", gpus="sm89")
        assert "has 0 MiB free, the repository needs about 1 MiB" in text

    def test_a_full_disk(self, wide, tmp_path, monkeypatch):
        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("mesart.export.triton.write_new", full)
        assert "the disk is full" in self.refused(wide, tmp_path, "tensorrt-rtx", gpus="sm89")


class TestOutput:
    def test_only_a_repository_of_ours_is_replaced(self, bundle, tmp_path):
        output = tmp_path / "out"
        output.mkdir()
        (output / "thesis.txt").write_text("ten years")
        with pytest.raises(MesaError, match="exists and is no Triton repository of mesart; .*--force"):
            export(bundle(), output, max_tokens=10)
        assert (output / "thesis.txt").read_text() == "ten years"
        export(bundle(), output, max_tokens=10, force=True)
        assert not (output / "thesis.txt").exists()
        assert (output / MARKER_FILE).is_file()
        export(bundle(), output, max_tokens=10, name="again")
        assert "again" in names(output)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        (output / "again" / "notes").write_text("a day")
        with pytest.raises(MesaError, match="holds again/notes, which is not the Triton repository of mesart's"):
            export(bundle(), output, max_tokens=10)
        assert (output / "again" / "notes").is_file()

    def test_the_bundle_is_never_replaced(self, bundle_copy):
        with pytest.raises(MesaError, match="is the source, .*, itself"):
            export(bundle_copy, bundle_copy, force=True)
        Manifest.read(bundle_copy).verify(bundle_copy)
