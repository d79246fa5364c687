"""What is written as ``model.py`` into a Triton repository: the model that clients talk to.

It is text, not a module of this package: it runs in Triton's Python process, where ``triton_python_backend_utils`` is
built in, and it imports ``mesart.runtime``, which nothing in ``export`` may. The tests execute it.
"""

from __future__ import annotations

MODEL_FILE = "model.py"
BUNDLE_FOLDER = "bundle"

MODEL = '''\
"""Text in, text out, a piece at a time: runs the bundle in the folder beside this file. Written by mesart."""

import json
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

from mesart.graphs.errors import MesaError
from mesart.runtime import MesaModel


class TritonPythonModel:
    """Triton calls ``execute`` again when it has returned, and starts one instance: one request at a time."""

    def initialize(self, args):
        settings = json.loads(args["model_config"]).get("parameters", {})
        backend = settings.get("backend", {}).get("string_value", "auto")
        self.model = MesaModel.load(Path(args["model_repository"], args["model_version"], "bundle"), backend)
        pb_utils.Logger.log_info(f"mesart: {self.model.backend} on {self.model.device}: {self.model.choice}")

    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._answer(request, sender)
            except (MesaError, ValueError) as error:  # ValueError: text that is no UTF-8, an empty stop string
                _refuse(sender, pb_utils.TritonError.INVALID_ARG, str(error))
            except Exception as error:  # noqa: BLE001  (the next request may go well)
                _refuse(sender, pb_utils.TritonError.INTERNAL, f"{type(error).__name__}: {error}")

    def finalize(self):
        self.model.close()

    def _answer(self, request, sender):
        given = {tensor.name(): tensor.as_numpy().reshape(-1).tolist() for tensor in request.inputs()}
        options = {name: given[name][0] for name in ("temperature", "top_p", "seed") if name in given}
        if "max_tokens" in given:
            options["max_new_tokens"] = given["max_tokens"][0]
        stop = [_text(value) for value in given.get("stop", [])]
        for piece in self.model.stream(_text(given["text_input"][0]), stop=stop, **options):
            if sender.is_cancelled():
                break
            sender.send(_response(piece))
        # An empty piece, not the bare flag: a client sees a response without data only if it asks for such.
        sender.send(_response(""), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _text(value):
    return value.decode() if isinstance(value, bytes) else value


def _response(text):
    return pb_utils.InferenceResponse([pb_utils.Tensor("text_output", np.array([text.encode()], dtype=np.object_))])


def _refuse(sender, code, reason):
    response = pb_utils.InferenceResponse(error=pb_utils.TritonError(reason, code))
    sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
'''

__all__ = ["BUNDLE_FOLDER", "MODEL", "MODEL_FILE"]
