"""Edits of a manifest, with a hash that is right again, that the rest of it contradicts."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from mesart.graphs import MesaError
from mesart.graphs.bundle.manifest import MANIFEST_FILE, Manifest

Fields = dict[str, Any]


@pytest.fixture(scope="module")
def fields(bundle) -> Fields:
    """Of the llama bundle."""
    read: Fields = json.loads((bundle() / MANIFEST_FILE).read_text())
    return read


def refused(folder: Path, fields: Fields, reseal: Any) -> str:
    (folder / MANIFEST_FILE).write_text(json.dumps(fields))
    reseal(folder)
    with pytest.raises(MesaError) as error:
        Manifest.read(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def graph(fields: Fields, kind: str) -> Fields:
    return next(info for info in fields["graphs"] if info["kind"] == kind)


def tensor(fields: Fields, kind: str, name: str) -> Fields:
    info = graph(fields, kind)
    return next(found for found in (*info["inputs"], *info["outputs"]) if found["name"] == name)


def shape(kind: str, name: str, axis: int, extent: Any) -> Any:
    def edit(fields: Fields) -> None:
        tensor(fields, kind, name)["shape"][axis] = extent

    return edit


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (shape("prefix", "input_ids", 1, 9), ".shape[1] is 9, input_ids has 8 there"),
        (shape("chunk", "past_mask", 3, 9), ".shape[3] is 9, past_mask has 8 there"),
        (shape("decode", "past_mask", 3, 63), ".shape[3] is 63, past_mask has 64 there"),
        (shape("tail", "input_ids", 1, 65), "has 65 new tokens, expected 1 to 64"),
        (shape("tail", "input_ids", 1, "S"), "has 'S' new tokens, expected 1 to 64"),
        (shape("symbolic", "logits", 2, 321), ".shape[2] is 321, logits has 320 there"),
        (shape("symbolic", "past_key_values.1.key", 1, 3), ".shape[1] is 3, past_key_values.1.key has 2 there"),
        (shape("symbolic", "input_ids", 0, 1), ".shape[0] is 1, input_ids has a free axis there"),
        (
            lambda m: tensor(m, "symbolic", "input_ids").update(dtype="int32"),
            ".dtype is 'int32', input_ids has 'int64'",
        ),
        (lambda m: tensor(m, "symbolic", "input_ids").update(name="ids"), "].inputs lack input_ids"),
        (
            lambda m: tensor(m, "symbolic", "logits").update(name="present.0.key"),
            "].outputs have 'present.0.key' twice",
        ),
        (lambda m: m["model"].update(vocab_size=300), "logits has 300 there"),
        (lambda m: m["layers"][1].update(value_size=4), "past_key_values.1.value has 4 there"),
        (
            lambda m: m["layers"][1].update(rerotate=None),
            "layers[1].rerotate is null, and the graph engine_rerotate",
        ),
        (
            lambda m: m["layers"][1].update(rerotate="prefix.onnx"),
            "layers[1].rerotate is 'prefix.onnx', which is no graph",
        ),
        (lambda m: m["layers"].pop(), ", of a layer that is not among the layers"),
        (lambda m: m["graphs"].remove(graph(m, "chunk")), "graphs have no chunk"),
        (lambda m: m["graphs"].append({**graph(m, "prefix"), "file": "model.safetensors"}), "is none of the files for"),
        (lambda m: m["graphs"].append(graph(m, "prefix")), "graphs have 'prefix.onnx' twice"),
        (lambda m: graph(m, "chunk").update(kind="prefix"), "graphs have 'prefix' twice"),
        (lambda m: graph(m, "tail").update(bucket=7), "graphs have no tail for 0 chunks"),
        (lambda m: m["files"].pop("prefix.onnx"), "is 'prefix.onnx', which is none of the files for this"),
        (lambda m: m["config"].update(linear_window=9), "buckets["),
        (lambda m: m.update(dtype="float16"), "past_key_values"),
    ],
    ids=range(24),
)
def test_a_contradiction(fields, tmp_path, reseal, edit, says):
    changed = copy.deepcopy(fields)
    edit(changed)
    message = refused(tmp_path, changed, reseal)
    assert says in message or (says == "past_key_values" and "has 'float16'" in message), message


def test_the_manifest_itself_is_read(fields, tmp_path, reseal):
    (tmp_path / MANIFEST_FILE).write_text(json.dumps(fields))
    reseal(tmp_path)
    assert Manifest.read(tmp_path).model["vocab_size"] == 320
