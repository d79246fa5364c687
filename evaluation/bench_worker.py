"""One measurement of the benchmark, in a process of its own: `python -m mesart.evaluation.bench_worker JOB`."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mesart.graphs.bundle.manifest import Manifest
from mesart.graphs.errors import InputError

Answer = Callable[[list[int]], tuple[float, float]]
"""Runs a prompt and decodes behind it; seconds to the first logits, seconds a token."""


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Does a job: ``task`` is ``time`` if left out, ``probe`` or ``machine``; ``device`` is ``cpu`` if left out."""
    task: Callable[[dict[str, Any]], dict[str, Any]] = {"time": _time, "probe": _probe, "machine": _machine}[
        job.get("task", "time")
    ]
    return task(job)


def _time(job: dict[str, Any]) -> dict[str, Any]:
    """Loads the system, warms it up, times it; peak memory is over all of that."""
    bundle = Path(job["bundle"])
    manifest = Manifest.read(bundle)
    config = json.loads((bundle / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config") or config
    generator = np.random.default_rng(0)
    vocabulary = int(manifest.model["vocab_size"])
    prompt = generator.integers(0, vocabulary, job["tokens"]).tolist()
    transformers, cuda = job["system"] == "transformers", job.get("device") == "cuda"
    with peak_device_memory() if cuda else peak_memory() as peak:
        start = time.perf_counter()
        answer = _transformers(job) if transformers else _mesart(job)
        load = time.perf_counter() - start
        # Engines for a bucket open, and kernels compile, with the first prompt that needs them: beyond the trained
        # length all phases do.
        whole = job.get("warm_whole", False)
        answer(prompt if whole else prompt[: manifest.config.train_length + 1])
        warm_up = time.perf_counter() - start - load
        times = [answer(prompt) for _ in range(job["repeat"])]
    head = vocabulary * config["hidden_size"]
    embeddings = head if config.get("tie_word_embeddings") else 2 * head
    return {
        "first_token": [first for first, _ in times],
        "per_token": [each for _, each in times],
        "memory": peak[0] - (_torch_unused() if transformers and cuda else 0),
        "load": load,
        "warm_up": warm_up,
        "matrix_parameters": int(manifest.model["parameters"]) - embeddings,
        "head_parameters": head,
        "heads": config["num_attention_heads"],
    }


def _machine(job: dict[str, Any]) -> dict[str, Any]:
    """The machine's peaks."""
    from mesart.evaluation.machine import measure_gpu, measure_machine  # noqa: PLC0415  (needs torch)

    if job.get("device") == "cuda":
        return measure_gpu()
    machine = measure_machine(job["threads"])
    return {"flops": machine.flops, "bandwidth": machine.bandwidth}


def _probe(job: dict[str, Any]) -> dict[str, Any]:
    """Nothing, or an error that says why the system does not run on this machine's GPU."""
    system = job["system"]
    if system == "transformers":
        import torch  # noqa: PLC0415  (only where it is asked for)

        if not torch.cuda.is_available():
            raise InputError("this torch sees no GPU")
    elif system == "onnxruntime":
        require_cuda_provider()
    else:
        from mesart.runtime.cuda import Cuda  # noqa: PLC0415

        cuda = Cuda()
        if importlib.util.find_spec("torch"):  # what builds needs it; engines that are there already do not
            from mesart.export.tensorrt_builder import TensorRtBuilder  # noqa: PLC0415

            TensorRtBuilder(system, [cuda.capability], Path(os.devnull))
    return {}


_IDENTITY = (
    b'\x08\x08:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01'
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\r"
)
"""An ONNX file whose graph is one Identity."""


def require_cuda_provider() -> None:
    """Opens a graph on onnxruntime's CUDA provider, which falls back to the CPU without an error.

    Raises:
        MesaError: it is not installed, or does not load.
    """
    from mesart.runtime.engine_imports import import_onnxruntime  # noqa: PLC0415  (only where it is asked for)

    onnxruntime = import_onnxruntime()

    name = "CUDAExecutionProvider"
    if name not in onnxruntime.get_available_providers():
        raise InputError("this onnxruntime has no CUDA provider: pip install 'mesart[gpu]'")
    if name not in onnxruntime.InferenceSession(_IDENTITY, providers=[name]).get_providers():
        raise InputError("onnxruntime's CUDA provider does not load; its libraries may be missing (cuBLAS, cuDNN)")


def trusted(job: dict[str, Any]) -> bool:
    """Whether Python code of the bundle may run."""
    return bool(job.get("trust_remote_code", False))


def _mesart(job: dict[str, Any]) -> Answer:
    from mesart.runtime import MesaModel  # noqa: PLC0415  (only one of the two systems is loaded)

    # Hashing the weights would read the whole file; a benchmark's bundle was made just before.
    model = MesaModel.load(
        job["bundle"], job["system"], threads=job["threads"], verify=False, trust_remote_code=trusted(job)
    )
    if model.device != job.get("device", model.device):
        raise InputError(f"{job['system']} runs on {model.device} here, not on {job['device']}")

    def answer(prompt: list[int]) -> tuple[float, float]:
        start = time.perf_counter()
        token = int(model.prefill(prompt)[0, -1].argmax())
        first = time.perf_counter()
        for _ in range(job["new_tokens"]):
            token = int(model.step(token)[0, -1].argmax())
        return first - start, (time.perf_counter() - first) / job["new_tokens"]

    return answer


def _transformers(job: dict[str, Any]) -> Answer:
    import torch  # noqa: PLC0415  (only one of the two systems is loaded)

    from mesart.graphs.model.torch_graph import load_plain_model  # noqa: PLC0415

    torch.set_num_threads(job["threads"])
    dtype, device = getattr(torch, job["dtype"]), job.get("device", "cpu")
    with torch.device(device):
        model = load_plain_model(Path(job["bundle"]), dtype, attn_implementation="sdpa", trust_remote_code=trusted(job))
    wait: Any = torch.cuda.synchronize if device == "cuda" else lambda: None
    if job.get("compiled"):
        return _compiled(model, job, wait)

    def answer(prompt: list[int]) -> tuple[float, float]:
        with torch.inference_mode():
            start = time.perf_counter()
            output = model(torch.tensor([prompt], device=device), use_cache=True, logits_to_keep=1)
            token = output.logits[:, -1].argmax(-1, keepdim=True)
            wait()
            first = time.perf_counter()
            for _ in range(job["new_tokens"]):
                output = model(token, past_key_values=output.past_key_values, use_cache=True)
                token = output.logits[:, -1].argmax(-1, keepdim=True)
            wait()
            return first - start, (time.perf_counter() - first) / job["new_tokens"]

    return answer


def _compiled(model: Any, job: dict[str, Any], wait: Callable[[], None]) -> Answer:
    """As transformers' own generate() compiles: each token over a static cache; the prompt is not compiled."""
    import torch  # noqa: PLC0415
    from transformers import cache_utils  # noqa: PLC0415

    class Layer(cache_utils.StaticLayer):  # type: ignore[no-untyped-call]
        """A prompt sees its own keys, not the whole buffer: so it gets torch's fastest attention, without a mask."""

        def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            stored: tuple[Any, Any] = super().update(key_states, value_states, *args, **kwargs)
            return (key_states, value_states) if key_states.shape[-2] > 1 else stored

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            sizes: tuple[int, int] = super().get_mask_sizes(query_length)
            return (query_length, 0) if query_length > 1 else sizes

    room, device = job["tokens"] + job["new_tokens"], job.get("device", "cpu")
    cache: Any = cache_utils.StaticCache(model.config, room)
    cache.layers = [Layer(room) for _ in cache.layers]

    def next_token(token: Any) -> Any:
        return model(token, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)

    step = torch.compile(next_token, mode="reduce-overhead", fullgraph=True)

    def answer(prompt: list[int]) -> tuple[float, float]:
        with torch.no_grad():  # the compiler's static buffers may not be inference tensors
            cache.reset()
            start = time.perf_counter()
            ids = torch.tensor([prompt], device=device)
            output = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token = output.logits[:, -1].argmax(-1, keepdim=True)
            wait()
            first = time.perf_counter()
            for _ in range(job["new_tokens"]):
                token = step(token).clone()  # the next run overwrites its result
            wait()
            return first - start, (time.perf_counter() - first) / job["new_tokens"]

    return answer


def _torch_unused() -> int:
    """Device memory that torch has kept but not used at its peak: it would give it back under need."""
    import torch  # noqa: PLC0415

    return int(torch.cuda.max_memory_reserved() - torch.cuda.max_memory_allocated())


def peak_memory(interval: float = 0.02) -> AbstractContextManager[list[int]]:
    """Samples the process's anonymous resident memory, ``RssAnon`` of Linux; the list's one item is the peak, bytes."""
    status = Path("/proc/self/status")
    if not status.is_file():
        raise InputError("peak memory is read from /proc, which this system lacks; run the benchmark on Linux")

    def read() -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1]) * 1024

    return _peak(read, interval)


def peak_device_memory(interval: float = 0.02) -> AbstractContextManager[list[int]]:
    """The same of the memory in use on the whole first GPU, by CUDA's driver: of every engine alike, its context too.

    No package is needed. What other processes use is in it: the card must be idle.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise InputError("CUDA's driver (libcuda.so.1) is not here") from error
    device, context = ctypes.c_int(), ctypes.c_void_p()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()

    def call(name: str, *arguments: Any) -> None:
        code = getattr(driver, name)(*arguments)
        if code:
            raise InputError(f"CUDA: {name} failed with error {code}")

    call("cuInit", 0)
    call("cuDeviceGet", ctypes.byref(device), 0)
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)  # the one that all engines use

    def read() -> int:
        call("cuCtxSetCurrent", context)  # of this thread
        call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return total.value - free.value

    return _peak(read, interval)


@contextmanager
def _peak(read: Callable[[], int], interval: float) -> Iterator[list[int]]:
    peak, done = [read()], threading.Event()

    def sample() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], read())
            done.wait(interval)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
