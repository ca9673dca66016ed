"""The machine: its devices, their precision, their FLOP/s, and memory."""

import contextlib
import os
import re
import time
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

# Devices


class Device(NamedTuple):
    """A device that a run can use."""

    name: str
    """Torch's name of a GPU, or `CPU`."""
    kind: str
    """`cuda` or `cpu`."""
    memory_bytes: int


DEVICES = {
    short: Device(name, "cuda", gigabytes * 10**9)
    for short, name, gigabytes in (
        ("h200", "NVIDIA H200", 141),
        ("b200", "NVIDIA B200", 180),
        ("h100", "NVIDIA H100 80GB HBM3", 80),
        ("a100-80", "NVIDIA A100-SXM4-80GB", 80),
        ("a100-40", "NVIDIA A100-SXM4-40GB", 40),
        ("l40s", "NVIDIA L40S", 48),
        ("l4", "NVIDIA L4", 24),
        ("rtx4090", "NVIDIA GeForce RTX 4090", 24),
        ("rtx3090", "NVIDIA GeForce RTX 3090", 24),
    )
}
"""GPUs to plan for, by the names of `--device`; with the memory that they are sold with."""


def find_device() -> Device:
    """Describes the device that a run on this machine would use."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return Device(properties.name, "cuda", int(properties.total_memory))
    return Device("CPU", "cpu", int(psutil.virtual_memory().total))


def choose_precision(precision: str, device: torch.device) -> str:
    """Resolves `auto`: bf16 on a GPU that has it in hardware, else fp32.

    A CPU always gets fp32, though some have bf16: on the others it is hundreds of times slower, and
    a run should not depend on the CPU that it happens to get.
    """
    if precision != "auto":
        return precision
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if has_bf16 else "fp32"


def use_deterministic_kernels() -> None:
    """Makes torch refuse kernels whose result varies from call to call."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


# FLOP/s

# Dense bf16 with fp32 accumulation, in TFLOP/s, from NVIDIA's data sheets and architecture white
# papers; figures "with sparsity" are halved. By a part of torch's name; the first match counts.
_PEAK_TERAFLOPS = {
    "B200": 2250.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "RTX 6000 Ada": 364.0,
    "RTX 4090": 165.0,
    "RTX A6000": 155.0,
    "RTX 3090": 71.0,
}

_PRODUCT_SIZES = (256, 512, 1024, 2048, 4096, 8192)
_MEASURING_SECONDS = 0.2


def peak_flops(device_name: str) -> float | None:
    """Returns the data-sheet FLOP/s in dense bf16 of a GPU, by torch's name; None if unknown."""
    found = (peak * 1e12 for name, peak in _PEAK_TERAFLOPS.items() if name in device_name)
    return next(found, None)


def measure_matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Measures the FLOP/s of square matrix products: the best of increasing sizes.

    It stops before a size whose products would take longer than a fifth of a second, so that a CPU
    that is hundreds of times slower in bf16 does not delay a run. The start-up of a GPU's library,
    which takes longer than that, does not count.
    """
    generator = torch.Generator(device).manual_seed(0)  # leaves the run's random numbers alone
    best = 0.0
    for size in _PRODUCT_SIZES:
        matrix = torch.randn(size, size, generator=generator, device=device).to(dtype)
        # The first product of a size chooses its kernel.
        seconds = min(_time_product(matrix) for _ in range(3))
        best = max(best, 2 * size**3 / seconds)
        if 3 * 8 * seconds > _MEASURING_SECONDS:
            break
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return best


def _time_product(matrix: torch.Tensor) -> float:
    def read_clock() -> float:
        if matrix.is_cuda:
            torch.cuda.synchronize(matrix.device)
        return time.perf_counter()

    started = read_clock()
    torch.mm(matrix, matrix)
    return read_clock() - started


# Memory


class Memory(NamedTuple):
    """Bytes in use by this process on a device."""

    now: int
    peak: int
    reserved: int


def measure_memory(device: torch.device) -> Memory:
    """Measures what torch holds on a GPU, or the resident memory of this process."""
    if device.type == "cuda":
        stats = torch.cuda.memory_stats(device)  # empty before the GPU's first use
        names = ("allocated_bytes.all.current", "allocated_bytes.all.peak")
        return Memory(*(stats.get(name, 0) for name in (*names, "reserved_bytes.all.current")))
    resident = int(psutil.Process().memory_info().rss)
    return Memory(resident, max(resident, _read_peak_memory()), resident)


def _read_peak_memory() -> int:
    """Returns the peak in bytes, 0 without /proc; getrusage would include the launcher's."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else 0


def count_free_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Returns the bytes of host memory that this process can allocate under its cgroup v2 limit."""
    free = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError, KeyError):  # no container, or one without a limit
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
        lines = (cgroup / "memory.stat").read_text().splitlines()
        cached = int(dict(line.split() for line in lines)["inactive_file"])  # can be reclaimed
        free = min(free, limit - used + cached)
    return free
