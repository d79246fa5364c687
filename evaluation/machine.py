"""What a machine can do, measured with PyTorch: the peaks that measurements are compared with."""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Machine:
    """What the machine can do, measured with PyTorch just before."""

    cpu: str
    threads: int
    flops: dict[str, float]
    """Peak of a product of 2048 x 2048 matrices, FLOP/s, by dtype."""
    bandwidth: float
    """Reading 1 GiB, bytes/s."""


def measure_machine(threads: int) -> Machine:
    """The peaks that results are compared with."""
    import torch  # noqa: PLC0415  (slow to import)

    torch.set_num_threads(threads)
    flops = {}
    for dtype in ("float32", "bfloat16"):
        for size in (512, 2048):
            left = torch.randn(size, size).to(getattr(torch, dtype))
            # As a product, and as a convolution over one point: torch gives the two to different libraries, of which
            # either may be slow on a given CPU.
            signal, kernel = left[None], left[:, :, None]
            product = _best_time(lambda left=left: left @ left)
            convolution = _best_time(lambda signal=signal, kernel=kernel: torch.conv1d(signal, kernel))
            best = min(product, convolution)
            flops[dtype] = 2 * size**3 / best
            if best > 0.05:  # a CPU without bfloat16 would take minutes for the larger one
                break
    flops["float16"] = flops["float32"]  # CPU engines compute float16 in float32
    block = torch.ones(1 << 28)
    bandwidth = block.numel() * 4 / _best_time(block.sum)
    return Machine(cpu_name(), threads, flops, bandwidth)


def measure_gpu() -> dict[str, Any]:
    """The same of the first GPU: ``flops`` of products of 8192 x 8192 matrices, ``bandwidth`` of a copy on the device,
    which reads and writes each byte."""
    import torch  # noqa: PLC0415  (slow to import)

    event: Any = torch.cuda.Event

    def timed(function: Any) -> float:
        function()
        times = []
        for _ in range(3):
            start, end = event(enable_timing=True), event(enable_timing=True)
            start.record()
            for _ in range(10):
                function()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1e4)  # ms, of ten
        return float(min(times))

    flops = {}
    for dtype in ("bfloat16", "float16"):
        left, right = (torch.randn(8192, 8192, device="cuda", dtype=getattr(torch, dtype)) for _ in range(2))
        flops[dtype] = 2 * 8192**3 / timed(lambda left=left, right=right: left @ right)
    source = torch.ones(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return {"flops": flops, "bandwidth": 2 * source.numel() / timed(lambda: target.copy_(source))}


def _best_time(function: Any, runs: int = 5) -> float:
    function()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


__all__ = ["Machine", "cpu_name", "measure_gpu", "measure_machine"]
