"""Changes of ONNX graphs that know what a graph is, and of the safetensors files that they refer to."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.fuzz.values import HOSTILE_NAMES, dump, mutate_bytes, mutate_tree, odd_value, once_more

_OPERATORS = (
    "Add",
    "MatMul",
    "Softmax",
    "Identity",
    "Nope",
    "",
    "Loop",
    "If",
    "Gather",
    "Reshape",
    "TensorScatter",
    "Relu",
)
_SIZES = (-1, 0, 1, 2, 7, 2**31 - 1, 2**31, 2**40, 2**63 - 1, -(2**63))


def mutate_graph(rng: Random, folder: Path, file: str) -> tuple[str, bool]:
    """Changes one graph; says what, and whether its weights now lie outside the bundle."""
    path = folder / file
    if rng.random() < 0.2:
        data, said = mutate_bytes(rng, path.read_bytes())
        path.write_bytes(data)
        return f"{file}: {said}", False
    model = onnx.load(path, load_external_data=False)
    said, outside = "", False
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if rng.random() < 0.2:
            what, leaves = _external(rng, model, folder)
            outside = outside or leaves
        else:
            what = rng.choice(_CHANGES)(rng, model)
        said += f" {what};"
    path.write_bytes(model.SerializeToString())
    return f"{file}:{said}", outside


def _value(rng: Random, model: onnx.ModelProto) -> str:
    """An input or output: its name, type, shape."""
    graph = model.graph
    values = rng.choice((graph.input, graph.output, graph.input, graph.output, graph.value_info))
    if not values:
        return "nothing"
    at = rng.randrange(len(values))
    value = values[at]
    way = rng.randrange(7)
    name = value.name
    if way == 0:
        value.name = rng.choice(("x", "", "logits", "input_ids", name + "x", "present.0.key", "\0"))
        return f"value {name} -> {value.name!r}"
    if way == 1:
        del values[at]
        return f"value {name} deleted"
    if way == 2:
        values.add().CopyFrom(value)
        return f"value {name} twice"
    if way == 3:
        value.type.tensor_type.elem_type = rng.choice((0, 1, 2, 6, 7, 8, 9, 10, 11, 14, 16, 99))
        return f"type of {name}"
    if way == 4 and len(values) > 1:
        other = values[rng.randrange(len(values))]
        value.name, other.name = other.name, value.name
        return f"names of {name} and {value.name} exchanged"
    dims = value.type.tensor_type.shape.dim
    if way == 5 and dims:
        del dims[rng.randrange(len(dims))]
        return f"axis of {name} deleted"
    if dims:
        dim = dims[rng.randrange(len(dims))]
        if rng.random() < 0.3:
            dim.dim_param = rng.choice(("B", "S", "P", "M", "x", ""))
        else:
            dim.dim_value = rng.choice((*_SIZES, dim.dim_value + 1))
        return f"shape of {name}"
    value.type.tensor_type.shape.dim.add().dim_value = rng.choice(_SIZES)
    return f"axis of {name} added"


def _versions(rng: Random, model: onnx.ModelProto) -> str:
    if rng.random() < 0.3:
        model.ir_version = rng.choice((0, 1, 3, 13, 99, 2**31, 2**63 - 1, -1))
        return f"IR version {model.ir_version}"
    if rng.random() < 0.2:
        del model.opset_import[:]
        return "no opset"
    if rng.random() < 0.2:
        model.opset_import.add(
            domain=rng.choice(("nope", "", "com.microsoft", "ai.onnx.ml")), version=rng.choice((0, 1, 99))
        )
        return "one more opset"
    if not model.opset_import:  # another change has taken them
        return "nothing"
    opset = model.opset_import[rng.randrange(len(model.opset_import))]
    opset.version = rng.choice((0, 1, 6, 12, 22, 26, 30, 100, 10**4, 10**6, 2**31 - 1, 2**31, 2**62, -1))
    return f"opset {opset.version}"


def _node(rng: Random, model: onnx.ModelProto) -> str:
    nodes = model.graph.node
    if not nodes:
        return "nothing"
    at = rng.randrange(len(nodes))
    node = nodes[at]
    was = f"node {at} ({node.op_type})"
    way = rng.randrange(9)
    if way == 0:
        del nodes[at]
        return f"{was} deleted"
    if way == 1:
        node.op_type = rng.choice((*_OPERATORS, rng.choice(nodes).op_type))
        return f"{was} -> {node.op_type}"
    if way == 2:
        node.domain = rng.choice(("nope", "ai.onnx.ml", "com.microsoft", "ai.onnx.training"))
        return f"{was} in {node.domain}"
    if way == 3 and node.input:
        place = rng.randrange(len(node.input))
        node.input[place] = rng.choice(("", "nope", node.output[0], rng.choice(rng.choice(nodes).output or [""])))
        return f"{was} reads {node.input[place]!r}"
    if way == 4 and len(node.input) > 1:
        node.input[0], node.input[1] = node.input[1], node.input[0]
        return f"{was} inputs exchanged"
    if way == 5 and node.input:
        del node.input[rng.randrange(len(node.input))]
        return f"{was} input deleted"
    if way == 6 and node.output:
        node.output[0] = rng.choice(("x", "", "logits", "present.0.key", node.output[0] + "x"))
        return f"{was} writes {node.output[0]!r}"
    if way == 7:
        nodes.add().CopyFrom(node)
        return f"{was} twice"
    return f"{was} {_attribute(rng, node)}"


def _attribute(rng: Random, node: onnx.NodeProto) -> str:
    if not node.attribute or rng.random() < 0.2:
        name = rng.choice(("axis", "axes", "to", "nope", "epsilon", "perm", "scale", "is_causal", "body"))
        value: Any = rng.choice((0, -1, 99, 2**62, 1.5, "x", [1, 2], [2**62], [0.5]))
        node.attribute.append(helper.make_attribute(name, value))
        return f"attribute {name} = {value}"
    attribute = node.attribute[rng.randrange(len(node.attribute))]
    if attribute.type == onnx.AttributeProto.INT:
        attribute.i = rng.choice((*_SIZES, attribute.i + 1, -attribute.i))
    elif attribute.type == onnx.AttributeProto.INTS and attribute.ints:
        attribute.ints[rng.randrange(len(attribute.ints))] = rng.choice(_SIZES)
    elif attribute.type == onnx.AttributeProto.FLOAT:
        attribute.f = rng.choice((0.0, -1.0, float("nan"), float("inf"), 1e30))
    elif attribute.type == onnx.AttributeProto.TENSOR:
        return "tensor: " + _tensor(rng, attribute.t)
    else:
        attribute.type = rng.choice((0, 1, 2, 5, 7, 99))
    return f"attribute {attribute.name}"


def _initializer(rng: Random, model: onnx.ModelProto) -> str:
    tensors = model.graph.initializer
    if not tensors:
        return "nothing"
    at = rng.randrange(len(tensors))
    name = tensors[at].name
    way = rng.randrange(5)
    if way == 0:
        del tensors[at]
        return f"{name} deleted"
    if way == 1:
        tensors[at].name = rng.choice(("x", "", name + "x", rng.choice(tensors).name))
        return f"{name} renamed"
    if way == 2:
        tensors.add().CopyFrom(tensors[at])
        return f"{name} twice"
    return f"{name}: {_tensor(rng, tensors[at])}"


def _tensor(rng: Random, tensor: TensorProto) -> str:
    way = rng.randrange(4)
    if way == 0:
        tensor.data_type = rng.choice((0, 1, 2, 6, 7, 9, 10, 11, 16, 17, 99))
        return f"type {tensor.data_type}"
    if way == 1 and tensor.dims:
        tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(_SIZES)
        return "shape"
    if way == 2:
        tensor.dims.append(rng.choice(_SIZES))
        return "one more axis"
    if tensor.raw_data:
        tensor.raw_data = rng.choice((b"", mutate_bytes(rng, tensor.raw_data)[0], b"\xff" * len(tensor.raw_data)))
        return "data"
    shape = [abs(int(d)) for d in tensor.dims]
    if int(np.prod(shape, dtype=float)) < 10**6:
        values = np.full(shape, rng.choice((0.0, 1.0, np.nan, np.inf, 1e30)), np.float32)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return "other values"


def _metadata(rng: Random, model: onnx.ModelProto) -> str:
    way = rng.randrange(4)
    if way == 0:
        model.graph.ClearField("node")
        return "no nodes"
    if way == 1:
        model.ClearField("graph")
        return "no graph"
    if way == 2:
        model.functions.add(name="f", domain="nope")
        return "a function"
    model.producer_name = rng.choice(("x" * 10_000, "\0", "\x1b[2J"))
    return "producer"


_CHANGES: tuple[Callable[[Random, onnx.ModelProto], str], ...] = (
    *(_value, _value, _versions, _node, _node, _node, _initializer, _metadata),
)


def _external(rng: Random, model: onnx.ModelProto, folder: Path) -> tuple[str, bool]:
    """Where a weight's data lie; whether that is outside the bundle."""
    tensors = [tensor for tensor in model.graph.initializer if tensor.external_data]
    if not tensors:
        return "nothing", False
    tensor = rng.choice(tensors)
    fields = {entry.key: entry for entry in tensor.external_data}
    key = rng.choice(("location", "location", "offset", "length"))
    if key not in fields:
        return "nothing", False
    entry = fields[key]
    if key == "location":
        victim = str(folder.parents[1] / "victim" / "model.safetensors")
        name = rng.choice(
            (*HOSTILE_NAMES, victim, "manifest.json", "model.onnx", "nope.bin", "../victim/model.safetensors")
        )
        entry.value = name
        return f"location {name!a:.60}", name in (victim, "../victim/model.safetensors", "/dev/zero", "/etc/hostname")
    number = int(entry.value) if entry.value.lstrip("-").isdigit() else 0
    odd = ("x", "", "1e3", "0x10", " 8", "9" * 30, "-0", "+4", str(number) + "\0")
    near = (number + 1, number + 4, number - 4, number * 2, 0, -1, -number, 2**31, 2**63, 2**64)
    entry.value = rng.choice((*map(str, near), *odd))
    if rng.random() < 0.1:
        tensor.external_data.remove(entry)
        return f"{key} deleted", False
    return f"{key} {number} -> {entry.value!a:.40}", False


def split_safetensors(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join_safetensors(header: str, body: bytes) -> bytes:
    text = header.encode(errors="surrogatepass")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def _offsets(rng: Random, header: dict[str, Any]) -> str:
    """Offsets that are shifted, equal, overlapping, negative, too short; shapes and types that do not fit."""
    names = [name for name in header if name != "__metadata__"]
    name, other = rng.choice(names), rng.choice(names)
    entry = header[name]
    start, stop = entry["data_offsets"]
    offsets: tuple[Any, ...] = (
        [start + 4, stop + 4], [start - 4, stop - 4], [start, stop - 4], [start, stop + 4], [stop, start],
        list(header[other]["data_offsets"]),
        [-1000, stop - start - 1000], [float(start), float(stop)], [start, 2**63], [2**64, 2**64 + 4], [start],
        [start, stop, stop], [True, stop],
        [start, start], None, "0", {}, [str(start), str(stop)],
    )  # fmt: skip
    shape = entry["shape"]
    shapes: tuple[Any, ...] = (
        shape[::-1],
        [*shape, 1],
        shape[1:],
        [*shape, 0],
        [-s for s in shape],
        [2**63],
        [2**32, 2**32],
        [1.0 * s for s in shape],
        [],
        None,
        [True],
        "x",
        [[1]],
    )
    way = rng.randrange(6)
    if way < 3:
        entry["data_offsets"] = rng.choice(offsets)
        return f"{name}: offsets {start, stop} -> {entry['data_offsets']!a:.50}"
    if way == 3:
        entry["shape"] = rng.choice(shapes)
        return f"{name}: shape {shape} -> {entry['shape']!a:.50}"
    if way == 4:
        entry["dtype"] = rng.choice(
            ("F16", "BF16", "F64", "I32", "U8", "NOPE", "f32", "F8_E4M3", "F4", "C64", "", 3, None)
        )
        return f"{name}: dtype {entry['dtype']!a}"
    if rng.random() < 0.5:
        del header[name]
        return f"{name} deleted"
    header[rng.choice(("x", "", name + ".x", "model.layers.9.mlp.up_proj.weight", "\0", "__metadata__"))] = header.pop(
        name
    )
    return f"{name} renamed"


def mutate_weights(rng: Random, path: Path) -> str:
    """Changes a safetensors file: its header, the header's length, its data."""
    data = path.read_bytes()
    way = rng.randrange(10)
    if way == 0:
        data, said = mutate_bytes(rng, data)
    elif way == 1:
        size = rng.choice(
            (0, 1, 2, len(data), 2**31, 2**62, 2**64 - 1, int.from_bytes(data[:8], "little") + rng.choice((-1, 1, 8)))
        )
        data, said = struct.pack("<Q", size) + data[8:], f"length of the header {size}"
    elif way == 2:
        header, body = split_safetensors(data)
        header["__metadata__"] = rng.choice(
            ({"format": "tf"}, {"format": 3}, {}, [], 3, {"a": {"b": 1}}, None, {"x": "y" * 10**5})
        )
        data, said = join_safetensors(json.dumps(header), body), f"metadata {header['__metadata__']!a:.50}"
    elif way == 3:
        changed = bytearray(data)
        count = min(rng.choice((4, 4000, 40_000)), len(data) // 2)
        at = rng.randrange(len(data) // 2, len(data) - count + 1) // 4 * 4
        number = rng.choice((float("nan"), float("inf"), 0.0, 1e30))
        changed[at : at + count] = np.full(count // 4 + 1, number, np.float32).tobytes()[:count]
        data, said = bytes(changed), f"{count} bytes of {number}"
    elif way == 4:
        header, body = split_safetensors(data)
        text = json.dumps(header)
        text = rng.choice(
            (
                text.replace("{", "{" + text[1 : text.index("}") + 1] + ",", 1),
                mutate_bytes(rng, text.encode())[0].decode("latin-1"),
                "",
                "[]",
                "null",
                "{" * 100_000,
            )
        )
        data, said = join_safetensors(text, body), "text of the header"
    else:
        header, body = split_safetensors(data)
        changes: list[str] = []
        for _ in range(rng.choice((1, 1, 2))):
            change = _offsets if rng.random() < 0.8 and len(header) > 2 else _header
            changes.append(once_more(partial(change, rng, header), bool(changes)))
        said = "; ".join(changes)
        data = join_safetensors(dump(header), body)
    path.write_bytes(data)
    return f"{path.name}: {said}"


def _header(rng: Random, header: dict[str, Any]) -> str:
    if rng.random() < 0.2:
        header[rng.choice(("x", "__metadata__"))] = odd_value(rng)
        return "an odd field"
    return mutate_tree(rng, header)
