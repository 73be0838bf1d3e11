"""Which device is chosen, and how much it may hold; CUDA is faked where PyTorch meets it."""

import os
from types import SimpleNamespace

import pytest
import torch

from japanese_stable_diffusion.speed import DeviceError, choose_device, choose_dtype, memory_budget


def fail(error):
    def raise_error(*args, **kwargs):
        raise error

    return raise_error


NO_GPU = (
    AssertionError("Torch not compiled with CUDA enabled"),
    RuntimeError("Found no NVIDIA driver on your system."),
    RuntimeError("No CUDA GPUs are available"),
)


@pytest.mark.parametrize("error", NO_GPU, ids=str)
def test_without_a_gpu_the_cpu_computes_in_single_precision(monkeypatch, error):
    monkeypatch.setattr(torch, "ones", fail(error))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device() == torch.device("cpu")
    assert choose_dtype(torch.device("cpu")) == torch.float32


def test_a_gpu_computes_in_half_precision(monkeypatch):
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size, device: ones(*size))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert choose_device() == torch.device("cuda", 0)
    assert choose_dtype(torch.device("cuda", 0)) == torch.float16


def test_a_gpu_without_kernels_is_told_in_one_line(monkeypatch):
    error = "CUDA error: no kernel image is available for execution on the device\nCompile with ..."
    monkeypatch.setattr(torch, "ones", fail(RuntimeError(error)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80"])
    with pytest.raises(
        DeviceError, match=r"^GPU: Tesla V100 is not supported .*sm_75, sm_80; .*VISIBLE"
    ) as told:
        choose_device()
    assert "\n" not in str(told.value)


def test_an_old_driver_is_told_in_one_line_and_not_taken_for_no_gpu(monkeypatch):
    error = (
        "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver."
    )
    monkeypatch.setattr(torch, "ones", fail(RuntimeError(error)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=r"^GPU: the NVIDIA driver is too old .*newer driver") as told:
        choose_device()
    assert "\n" not in str(told.value)


def test_any_other_trouble_with_a_gpu_is_told_in_one_line(monkeypatch):
    monkeypatch.setattr(
        torch, "ones", fail(RuntimeError("CUDA error: out of memory\nCUDA kernel errors ..."))
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(DeviceError, match=r"^GPU: CUDA error: out of memory CUDA kernel errors"):
        choose_device()


def test_a_batch_may_take_half_of_what_the_weights_leave_of_a_gpu(monkeypatch):
    properties = SimpleNamespace(total_memory=16_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2_000)
    assert memory_budget(torch.device("cuda", 0)) == 7_000


def test_a_batch_may_take_a_quarter_of_a_machine(monkeypatch):
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4, "SC_PHYS_PAGES": 1_000}.get)
    assert memory_budget(torch.device("cpu")) == 1_000
