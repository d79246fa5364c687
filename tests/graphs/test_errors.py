"""One line of another library's error: the one that says what is wrong."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from mesart.graphs import errors
from mesart.graphs.errors import MesaError, first_line, telling_line

# Of OpenVINO 2026.4, as they come.
OPENVINO = {
    """Exception from src/inference/src/cpp/core.cpp:84:
Exception from src/inference/src/model_reader.cpp:148:
Unable to read the model: "b/g.onnx" Please check that the model is correct.

""": 'Unable to read the model: "b/g.onnx" Please check that the model is correct.',
    """Exception from src/inference/src/cpp/core.cpp:84:
Check 'util::directory_exists(path) || util::file_exists(path)' failed at src/frontends/common/src/frontend.cpp:117:
FrontEnd API failed with GeneralFailure:
onnx: Could not open the file: "b/nope.onnx"
""": 'onnx: Could not open the file: "b/nope.onnx"',
    """Exception from src/inference/src/cpp/core.cpp:84:
Check 'false' failed at src/frontends/common_translators/src/unconverted_ops_report.cpp:151:
FrontEnd API failed with OpConversionFailure:
Model wasn't fully converted.
Summary:
-- No conversion rule found for operations: Nope-23
""": "No conversion rule found for operations: Nope-23",
    """Exception from src/inference/src/cpp/core.cpp:84:
Check 'false' failed at src/frontends/common/src/frontend.cpp:47:
Loading input model
Path 'weights.safetensors' resolves to '/blobs/3f' which is outside the base directory '/snapshots/main'
""": "Path 'weights.safetensors' resolves to '/blobs/3f' which is outside the base directory '/snapshots/main'",
    """Exception from src/inference/src/cpp/infer_request.cpp:224:
Exception from src/plugins/intel_cpu/src/node.cpp:794:
[CPU] Concat node with name 'a' Check 'merge_into(output_shape, in_copy)' failed at src/core/concat.hpp:43:
While validating node 'opset1::Concat a (opset1::Multiply b[0]:f32[?,1,?,?]) -> (f32[?,1,?,?])':
Shape inference input shapes {{3,1,5,3},{1,1,5,5}}
Argument shapes are inconsistent; they must have equal dimension everywhere except on the concatenation axis.
""": "Argument shapes are inconsistent; they must have equal dimension everywhere except on the concatenation axis.",
    """Exception from src/inference/src/cpp/core.cpp:117:
Exception from src/inference/src/dev/plugin.cpp:54:
Exception from src/plugins/intel_cpu/src/config.cpp:505:
NotFound: Unsupported property NOPE by CPU plugin.
""": "NotFound: Unsupported property NOPE by CPU plugin.",
    "std::bad_alloc": "std::bad_alloc",
    "Exception from src/inference/src/cpp/core.cpp:84:\n": "Exception from src/inference/src/cpp/core.cpp:84:",
    "": "RuntimeError",
}


@pytest.mark.parametrize(("message", "reason"), OPENVINO.items(), ids=range(len(OPENVINO)))
def test_the_telling_line_of_openvino(message, reason):
    assert telling_line(RuntimeError(message)) == reason


def test_the_first_line_of_others():
    assert first_line(ValueError("\n  the reason\nand pages\n")) == "the reason"
    assert first_line(ValueError()) == "ValueError"


def test_every_error_is_of_a_kind() -> None:
    """A server answers them differently: 400, 500, 503."""
    root = Path(errors.__file__).parents[1]
    folders = [root / name for name in ("export", "graphs", "runtime", "scripts", "evaluation")]
    made = [
        f"{path.relative_to(root)}:{node.lineno}"
        for folder in folders
        for path in folder.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "MesaError"
    ]
    assert made == []


def test_an_error_is_one_printable_line() -> None:
    assert str(MesaError("token '\x00\x1b[2J' of\nüñ \ud800 文")) == "token '\\x00\\x1b[2J' of üñ \\ud800 文"
