"""The machine: devices, precision, FLOP/s and memory."""

import subprocess
import sys
import time

import pytest
import torch

import qloop.hardware
from qloop.hardware import (
    DEVICES,
    choose_precision,
    count_free_memory,
    measure_matmul_flops,
    measure_memory,
    peak_flops,
)

CPU = torch.device("cpu")


# Devices and FLOP/s


def test_every_gpu_to_plan_for_has_memory_and_a_peak():
    for device in DEVICES.values():
        assert device.kind == "cuda"
        assert device.memory_bytes >= 24e9
        assert peak_flops(device.name) is not None


@pytest.mark.parametrize(
    ("wanted", "precision"), [("auto", "fp32"), ("fp32", "fp32"), ("bf16", "bf16")]
)
def test_a_cpu_computes_in_fp32_unless_told_otherwise(wanted, precision):
    assert choose_precision(wanted, CPU) == precision


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA GeForce RTX 4090", 165.0),
    ],
)
def test_a_gpu_is_known_by_its_name(name, teraflops):
    assert peak_flops(name) == teraflops * 1e12


def test_an_unknown_gpu_has_no_peak():
    assert peak_flops("Some Other GPU") is None


def test_measuring_a_product_draws_none_of_the_runs_random_numbers():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert measure_matmul_flops(CPU, torch.float32) > 1e6
    assert torch.equal(torch.get_rng_state(), before)


def test_what_a_library_takes_to_begin_does_not_end_the_measuring(monkeypatch):
    """On a GPU the first product of a process takes half a second, at any size."""
    sizes = []

    def time_product(matrix):
        if not sizes:
            time.sleep(0.5)
        sizes.append(len(matrix))
        return 1e-4 * len(matrix) ** 3 / 256**3

    monkeypatch.setattr(qloop.hardware, "_time_product", time_product)
    assert measure_matmul_flops(CPU, torch.float32) == pytest.approx(2e4 * 256**3)
    assert sorted(set(sizes)) == [256, 512, 1024, 2048]


# Memory


def test_memory_on_a_cpu_is_that_of_this_process_and_its_peak_stays():
    before = measure_memory(CPU)
    large = torch.ones(50_000_000)  # 200 MB
    during = measure_memory(CPU)
    del large
    after = measure_memory(CPU)
    assert during.now - before.now > 150_000_000
    assert after.now < during.now <= during.peak
    assert after.peak > 0.99 * during.now  # the kernel itself counts to some hundred pages
    assert after.reserved == after.now


def test_memory_of_a_gpu_is_what_torch_allocated_and_nothing_before_its_first_use(monkeypatch):
    stats: dict[str, int] = {}
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: stats)
    assert measure_memory(torch.device("cuda", 0)) == (0, 0, 0)
    stats.update(
        {f"allocated_bytes.all.{name}": size for name, size in (("current", 5), ("peak", 7))}
    )
    stats["reserved_bytes.all.current"] = 9
    assert measure_memory(torch.device("cuda", 0)) == (5, 7, 9)


def test_a_peak_is_not_that_of_the_process_that_started_this_one():
    large = bytearray(300_000_000)
    code = (
        "import torch; from qloop.hardware import measure_memory;"
        "bare = torch.ones(1); print(measure_memory(torch.device('cpu')).peak)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    own = measure_memory(CPU).now
    assert int(done.stdout) < own
    del large


def test_the_memory_of_a_container_is_its_own(tmp_path):
    everything = count_free_memory(tmp_path)
    assert everything > 1 << 20
    stat = "anon 1\ninactive_file 700\n"
    files = {"memory.max": "5000", "memory.current": "4000", "memory.stat": stat}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert count_free_memory(tmp_path) == 1700
    (tmp_path / "memory.max").write_text("max\n")
    assert count_free_memory(tmp_path) > 1 << 20
