"""Which device is chosen and why, clocks, seeds and memory of the CPU."""

from __future__ import annotations

import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import fluid_npu.device as device_package
from fluid_npu.device import Choice, DeviceUnavailable, device_of, get_device, kernels_of
from fluid_npu.device.cpu import CpuDevice


def pretend(monkeypatch, npu: bool, cuda: bool) -> None:
    monkeypatch.setattr(device_package, "probe_npu", lambda: Choice(npu, f"npu is {npu}"))
    monkeypatch.setattr(device_package, "_probe_cuda", lambda: Choice(cuda, f"cuda is {cuda}"))


@pytest.mark.parametrize(
    "npu, cuda, name, backend",
    [(True, True, "npu", "hccl"), (False, True, "cuda", "nccl"), (False, False, "cpu", "gloo")],
)
def test_auto_takes_the_best_that_is_here_and_says_why(monkeypatch, npu, cuda, name, backend):
    pretend(monkeypatch, npu, cuda)
    device, reason = get_device("auto")
    assert (device.name, device.backend) == (name, backend)
    assert (f"{name} is True" if name != "cpu" else "npu is False; cuda is False") in reason


@pytest.mark.parametrize("name", ["npu", "cuda"])
def test_a_device_that_is_not_here_is_refused_with_the_flag_and_the_fix(monkeypatch, name):
    pretend(monkeypatch, npu=False, cuda=False)
    with pytest.raises(DeviceUnavailable, match=f"--device {name}: {name} is False; install"):
        get_device(name)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="--device 'tpu': allowed are auto, cpu, cuda, npu"):
        get_device("tpu")


def test_a_tensor_finds_its_device_and_kernels():
    assert device_of(torch.zeros(1)).name == "cpu"
    assert kernels_of(torch.zeros(1)) is kernels_of(torch.ones(2))
    with pytest.raises(DeviceUnavailable, match="tensor.device is meta"):
        kernels_of(torch.zeros(1, device="meta"))
    with pytest.raises(DeviceUnavailable, match="tensor.device is meta"):
        device_of(torch.zeros(1, device="meta"))


def test_cpu_events_measure_the_host_clock():
    device = CpuDevice()
    start, end = device.event(), device.event()
    with pytest.raises(RuntimeError, match="record"):
        end.elapsed_ms(start)
    start.record()
    time.sleep(0.01)
    end.record()
    assert 9 < end.elapsed_ms(start) < 1000


def test_cpu_seed_and_rng_state_repeat_the_same_numbers():
    device = CpuDevice()
    device.manual_seed(3)
    first = torch.rand(4)
    state = device.get_rng_state()
    second = torch.rand(4)
    device.set_rng_state(state)
    assert torch.equal(torch.rand(4), second)
    device.manual_seed(3)
    assert torch.equal(torch.rand(4), first)


def test_cpu_describes_itself_and_counts_memory():
    device = CpuDevice()
    before = device.peak_memory_mb()
    held = torch.ones(40 * 2**18)  # 40 MiB
    assert device.peak_memory_mb() >= before > 1 and held.numel()
    assert "cores usable" in device.describe()
    assert device.torch_device(3) == torch.device("cpu")


def test_a_choice_is_announced_once_and_by_rank_0_only(monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    for _ in range(2):
        Choice("plain", "EP is 1").announce("overlap of this test")
    monkeypatch.setenv("RANK", "1")
    Choice("full", "EP is 2").announce("overlap of this test")
    assert capsys.readouterr().out == "overlap of this test: plain (EP is 1)\n"


def test_an_npu_package_without_an_npu_is_reported(monkeypatch):
    from fluid_npu.device import npu

    monkeypatch.setattr(npu.importlib.util, "find_spec", lambda name: object())
    asleep = SimpleNamespace(npu=SimpleNamespace(is_available=lambda: False))
    monkeypatch.setattr(npu.importlib, "import_module", lambda name: asleep)
    assert npu.probe_npu() == Choice(False, "torch_npu is installed but torch.npu.is_available() is False")

    def broken(name: str) -> None:
        raise OSError("libascendcl.so: cannot open shared object file")

    monkeypatch.setattr(npu.importlib, "import_module", broken)
    assert "libascendcl.so" in npu.probe_npu().reason
    with pytest.raises(DeviceUnavailable, match="--device npu.*libascendcl"):
        npu.load_torch_npu()


def test_importing_the_package_does_not_import_torch_npu():
    code = "import sys, fluid_npu.device; assert 'torch_npu' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=280)
