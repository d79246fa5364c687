"""Decoding on the CPU: bundles beside onnxruntime-genai and OpenVINO GenAI, the same random model, in one run.

Each system is a process of its own, with a context, that waits; they decode in turns, some tokens each round, so that a
change in the machine's speed meets all of them. The peers live in an environment of their own:

    python -m venv peers && peers/bin/pip install torch==2.13.0 onnxruntime-genai openvino-genai optimum-intel
    python scripts/make_random_model.py llama-1b -o model --window 131072
    mesart export model -o bfloat16 --dtype bfloat16 --quantise int4 --train-length 2048 --max-tokens 32768
    mesart export model -o float32 --quantise int4 --train-length 2048 --max-tokens 32768
    python scripts/bench_decode.py make model --python peers/bin/python -o peer-models
    python scripts/bench_decode.py run peer-models bfloat16:openvino float32:onnxruntime --python peers/bin/python

`--random-cache` spares the prompt where it would take long. Whole numbers of 4 bits, groups of 32, symmetric, the
language head among them, in all systems.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mesart.graphs.bundle.names import (
    BLOCK_INDICES,
    BLOCK_INDICES_BEGINS,
    INPUT_IDS,
    MAX_CONTEXT_LEN,
    PAST_LENS,
    POSITION_IDS,
    SUBSEQUENCE_BEGINS,
)

VOCABULARY = 128_000

PIECE = 256
"""Prompt tokens that onnxruntime-genai takes at a time: the scores of all at once would not fit into memory."""

ROOM = 512
"""Slots behind the context, for what is decoded."""

BLOCK = 32
"""Tokens of a block of OpenVINO's paged cache on CPUs."""

GROUP = "32"

Step = Callable[[], object]
Start = Callable[["Job"], Step]


@dataclass(frozen=True)
class Job:
    """What a worker is to set up."""

    model: str
    length: int
    threads: int
    settings: dict[str, Any]

    @property
    def ids(self) -> Any:
        """The prompt, int64 ``[length]``."""
        return np.random.default_rng(0).integers(3, VOCABULARY, self.length)


def mesart(job: Job, *, random_cache: bool = False) -> Step:
    from mesart.runtime import MesaModel  # noqa: PLC0415  (each system's packages only where it runs)

    model = MesaModel.load(job.model, threads=job.threads, verify=False, **job.settings)
    if random_cache:
        _fill(model, job.length)
    else:
        model.prefill([job.ids.tolist()])
    return lambda: model.step(7)


def _fill(model: Any, length: int) -> None:
    """Puts random keys and values where a prompt's would stand."""
    from mesart.graphs.method.plan import Plan  # noqa: PLC0415
    from mesart.graphs.method.stairs import ORDINARY  # noqa: PLC0415
    from mesart.runtime.kv.paged import PagedStore  # noqa: PLC0415

    model.prefill([7])
    (text,), store = model.texts, model.engine.store
    kv: Any = text.require_kv()
    store.reserve(kv, length + ROOM)
    paged = isinstance(store, PagedStore)
    arrays = [pool.array for pool in (*store.keys, *store.values)] if paged else [*kv.slab.keys, *kv.slab.values]
    for array in arrays:
        numbers = np.random.default_rng(0).standard_normal(array.shape[-2:], np.float32)
        # uint16: the bits of bfloat16
        array[kv.blocks if paged else kv.row] = numbers.view(np.uint32) >> 16 if array.dtype == np.uint16 else numbers
    plan = Plan.extend(model.manifest.config, ORDINARY, 0, length)
    kv.length = 0
    kv.append(plan.stairs.positions(0, length))
    text.append(np.full(length - 1, 7))
    text.stairs = plan.stairs


def onnxruntime_genai(job: Job) -> Step:
    import onnxruntime_genai  # type: ignore[import-not-found]  # noqa: PLC0415

    config = onnxruntime_genai.Config(job.model)
    session = {"intra_op_num_threads": job.threads, **job.settings}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
    model = onnxruntime_genai.Model(config)
    parameters = onnxruntime_genai.GeneratorParams(model)
    room = job.length + ROOM
    parameters.set_search_options(max_length=room, min_length=room)  # no end of text
    generator = onnxruntime_genai.Generator(model, parameters)
    for at in range(0, job.length, PIECE):
        generator.append_tokens(job.ids[at : at + PIECE].astype(np.int32))
    generator.generate_next_token()  # chooses from the prompt's logits; each further call runs the model

    def step() -> object:
        return generator.generate_next_token()

    return step


def onnxruntime_direct(job: Job) -> Step:
    """The peer's graph as the package runs it, past and present in the same buffers, which hold random numbers."""
    import onnxruntime  # noqa: PLC0415

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job.threads
    session = onnxruntime.InferenceSession(f"{job.model}/model.onnx", options, providers=["CPUExecutionProvider"])
    binding, length = session.io_binding(), job.length
    config = json.loads(Path(job.model, "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]
    shape = (1, config["num_key_value_heads"], length + ROOM, config["head_size"])
    for value in session.get_inputs():
        if value.name.startswith("past_key_values"):
            numbers = np.random.default_rng(0).standard_normal(shape[-2:], np.float32)
            buffer = onnxruntime.OrtValue.ortvalue_from_numpy(np.broadcast_to(numbers, shape).copy())
            binding.bind_ortvalue_input(value.name, buffer)
            binding.bind_ortvalue_output(value.name.replace("past_key_values", "present"), buffer)
    binding.bind_output("logits", "cpu")
    binding.bind_cpu_input("input_ids", np.full((1, 1), 7, np.int64))

    def step() -> object:
        nonlocal length
        length += 1
        binding.bind_cpu_input("attention_mask", np.ones((1, length), np.int64))
        session.run_with_iobinding(binding)
        return binding.get_outputs()[-1].numpy().argmax()  # the logits, bound last; the caches stay where they are

    return step


def openvino_genai(job: Job) -> Step:
    import openvino  # noqa: PLC0415
    import openvino_genai  # type: ignore[import-not-found]  # noqa: PLC0415

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = 3  # GB
    scheduler.max_num_batched_tokens = 2048
    # What LLMPipeline is on CPUs, with a method for each step.
    pipeline = openvino_genai.ContinuousBatchingPipeline(
        job.model, scheduler, "CPU", {"INFERENCE_NUM_THREADS": job.threads, **job.settings}
    )
    generation = openvino_genai.GenerationConfig()
    generation.max_new_tokens, generation.ignore_eos = ROOM, True
    handle = pipeline.add_request(0, openvino.Tensor(job.ids[None]), generation)
    while not handle.can_read():
        pipeline.step()

    def step() -> object:
        pipeline.step()
        return handle.read()

    return step


def openvino_direct(job: Job) -> Step:
    """The peer's graph as the package runs it, with paged attention over a cache of its own making."""
    import openvino  # noqa: PLC0415
    from openvino._offline_transformations import paged_attention_transformation  # noqa: PLC0415

    core = openvino.Core()
    model = core.read_model(f"{job.model}/openvino_model.xml")
    paged_attention_transformation(model)
    compiled = core.compile_model(
        model, "CPU", {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": job.threads, **job.settings}
    )
    request, length = compiled.create_infer_request(), job.length
    blocks = -(-(length + ROOM) // BLOCK)
    for port in compiled.inputs:
        if "cache" in port.get_any_name():
            shape = [blocks, *(size.get_length() for size in list(port.get_partial_shape())[1:])]
            cache = openvino.Tensor(port.get_element_type(), openvino.Shape(shape))
            cache.data.view(np.uint8)[:] = 60  # small positive numbers in every type, scales among them
            request.set_tensor(port, cache)

    def ints(*values: int) -> Any:
        return openvino.Tensor(np.array(values, np.int32))

    def step() -> object:
        nonlocal length
        used = length // BLOCK + 1
        for name, tensor in {
            INPUT_IDS: openvino.Tensor(np.array([7], np.int64)),
            POSITION_IDS: openvino.Tensor(np.array([length], np.int64)),
            PAST_LENS: ints(length),
            SUBSEQUENCE_BEGINS: ints(0, 1),
            BLOCK_INDICES: ints(*range(used)),
            BLOCK_INDICES_BEGINS: ints(0, used),
            MAX_CONTEXT_LEN: openvino.Tensor(np.array(length + 1, np.int32)),
        }.items():
            request.set_tensor(name, tensor)
        request.infer()
        length += 1
        return request.get_output_tensor(0).data.argmax()

    return step


STARTS: dict[tuple[str, bool], Start] = {
    ("mesart", False): mesart,
    ("mesart", True): lambda job: mesart(job, random_cache=True),
    ("onnxruntime-genai", False): onnxruntime_genai,
    ("onnxruntime-genai", True): onnxruntime_direct,
    ("openvino-genai", False): openvino_genai,
    ("openvino-genai", True): openvino_direct,
}


def worker(options: argparse.Namespace) -> int:
    """Sets a system up, then decodes as many tokens as each line of its input asks for. Times in seconds, as JSON."""
    job = Job(options.model, options.length, options.threads, json.loads(options.settings))
    began = time.perf_counter()
    step = STARTS[options.system, options.random_cache](job)
    step()  # engines compile on their first run
    print(json.dumps({"start": time.perf_counter() - began}), flush=True)
    for line in sys.stdin:
        times, busy = [], time.process_time()
        for _ in range(int(line)):
            at = time.perf_counter()
            step()
            times.append(time.perf_counter() - at)
        print(json.dumps({"times": times, "cpu": time.process_time() - busy}), flush=True)
    return 0


@dataclass
class System:
    """A system under measurement."""

    label: str
    process: subprocess.Popen[str]
    start: float = 0.0
    times: list[float] = field(default_factory=list)
    cpu: float = 0.0

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise SystemExit(f"{self.label} ended without an answer; its messages are above")

    def decode(self, tokens: int, *, count: bool) -> None:
        assert self.process.stdin is not None
        print(tokens, file=self.process.stdin, flush=True)
        answer = self.answer()
        if count:
            self.times += answer["times"]
            self.cpu += answer["cpu"]


def run(options: argparse.Namespace) -> int:
    """Prints a table for each length, and a line of JSON for machines."""
    peers = Path(options.peer_models)
    plan: list[tuple[str, str, str, str, dict[str, Any]]] = []
    for bundle, _, backend in (named.rpartition(":") for named in options.bundles):
        dtype = json.loads(Path(bundle, "manifest.json").read_text(encoding="utf-8"))["dtype"]
        label, exact = f"mesart, {backend}, {dtype}", {"backend": backend}
        plan.append((label, sys.executable, "mesart", bundle, exact))
        plan.append((f"{label}, int8 activations", sys.executable, "mesart", bundle, {**exact, "activations": "int8"}))
    plan.append(("onnxruntime-genai", options.python, "onnxruntime-genai", str(peers / "onnxruntime"), {}))
    plan.append(("OpenVINO GenAI", options.python, "openvino-genai", str(peers / "openvino"), {}))
    for length in options.lengths:
        systems = [_start(*planned, length, options) for planned in plan]
        for system in systems:
            system.decode(2, count=False)
        for _ in range(options.rounds):
            for system in systems:
                system.decode(options.tokens, count=True)
        for system in systems:
            assert system.process.stdin is not None
            system.process.stdin.close()
            system.process.wait()
        print(table(length, systems, random_cache=options.random_cache))
        record = {s.label: {"times": s.times, "cpu": s.cpu, "start": s.start} for s in systems}
        print(json.dumps({"length": length, "random_cache": options.random_cache, "systems": record}))
    return 0


def _start(
    label: str,
    python: str,
    system: str,
    model: str,
    settings: dict[str, Any],
    length: int,
    options: argparse.Namespace,
) -> System:
    """Starts one and waits until it has its context, so that no two compute prompts at once."""
    command = [python, __file__, "worker", system, model, str(length), str(options.threads), json.dumps(settings)]
    command += ["--random-cache"] * options.random_cache
    started = System(label, subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    started.start = started.answer()["start"]
    print(f"{label} is ready behind {length} tokens, after {started.start:.0f} s", file=sys.stderr, flush=True)
    return started


def table(length: int, systems: Sequence[System], *, random_cache: bool) -> str:
    """A Markdown table; ratios are those of the medians: above 1, a system is slower than the faster peer."""
    context = "a random cache" if random_cache else "a prompt"
    faster = min(statistics.median(system.times) for system in systems[-2:])
    rows = [
        f"{len(systems[0].times)} tokens behind {context} of {length:,} tokens",
        "",
        "| system | median | best | CPU time | start | / faster peer |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for system in systems:
        median = statistics.median(system.times)
        cells = [
            system.label,
            *(f"{1e3 * seconds:.0f} ms" for seconds in (median, min(system.times), system.cpu / len(system.times))),
            f"{system.start:.0f} s",
            f"{median / faster:.2f}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def make(options: argparse.Namespace) -> int:
    """Converts a checkpoint with the peers' own tools. Its vocabulary needs no text: a tokenizer of bytes will do."""
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    _add_tokenizer(Path(options.checkpoint))
    builder = [options.python, "-m", "onnxruntime_genai.models.builder", "-p", "int4", "-e", "cpu"]
    builder += ["-i", options.checkpoint, "-o", str(folder / "onnxruntime"), "-c", str(folder / "cache")]
    builder += ["--extra_options", f"int4_block_size={GROUP}", "int4_accuracy_level=4"]
    exporter = [str(Path(options.python).with_name("optimum-cli")), "export", "openvino", "-m", options.checkpoint]
    exporter += ["--task", "text-generation-with-past", "--weight-format", "int4", "--group-size", GROUP]
    exporter += ["--sym", "--ratio", "1.0", "--all-layers", str(folder / "openvino")]
    for command in (builder, exporter):
        subprocess.run(command, check=True)
    return 0


def _add_tokenizer(checkpoint: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: PLC0415
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

    if (checkpoint / "tokenizer.json").exists():
        return
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token=letters[0], eos_token=letters[1]
    )
    fast.save_pretrained(checkpoint)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)

    making = commands.add_parser("make", help="convert a checkpoint for the peers")
    making.add_argument("checkpoint")
    making.add_argument("--python", required=True, help="the interpreter of the peers' environment")
    making.add_argument("-o", "--output", required=True)
    making.set_defaults(action=make)

    running = commands.add_parser("run", help="measure")
    running.add_argument("peer_models", help="the folder that `make` wrote")
    running.add_argument("bundles", nargs="+", metavar="BUNDLE:BACKEND", help="and what runs it")
    running.add_argument("--python", required=True, help="the interpreter of the peers' environment")
    running.add_argument("--lengths", type=int, nargs="+", default=[1024, 16384])
    running.add_argument("--random-cache", action="store_true", help="random keys and values; no prompt is computed")
    running.add_argument("--rounds", type=int, default=4)
    running.add_argument("--tokens", type=int, default=8, help="decoded by each system in each round")
    running.add_argument("--threads", type=int, default=2)
    running.set_defaults(action=run)

    working = commands.add_parser("worker", help="one system; started by `run`")
    working.add_argument("system", choices=sorted({system for system, _ in STARTS}))
    working.add_argument("model")
    working.add_argument("length", type=int)
    working.add_argument("threads", type=int)
    working.add_argument("settings", help="JSON")
    working.add_argument("--random-cache", action="store_true")
    working.set_defaults(action=worker)

    options = parser.parse_args()
    status: int = options.action(options)
    return status


if __name__ == "__main__":
    sys.exit(main())
