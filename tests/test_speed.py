"""Which device is chosen, how much it may hold, how layers compute; CUDA is faked where PyTorch meets it."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch.utils.flop_counter import FlopCounterMode

from japanese_stable_diffusion import speed, winograd
from japanese_stable_diffusion.speed import (
    SWITCHES,
    DeviceError,
    FoldedUpsample,
    RememberingLinear,
    choose_device,
    choose_dtype,
    filter_minimally,
    fold_upsampling,
    limit_threads,
    memory_budget,
    multiply_by_onednn,
    put_channels_last,
    remember_keys,
    speed_up,
)
from japanese_stable_diffusion.weights import Weights, load_weights
from japanese_stable_diffusion.winograd import WinogradConv2d

ROUNDING = 5e-5
"""Of pixels and latents with values around 1, where sums are computed in another order."""


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


@pytest.fixture
def fresh_weights(tiny_weights: Path) -> Weights:
    return load_weights(tiny_weights, torch.device("cpu"), torch.float32)


def evaluate(weights: Weights) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 8, 16, generator=generator)
    text = torch.randn(2, 77, 32, generator=generator)
    return weights.unet(latents, torch.tensor(500), text).sample


def decode(weights: Weights) -> torch.Tensor:
    latents = torch.randn(1, 4, 8, 16, generator=torch.Generator().manual_seed(2))
    return weights.vae.decode(latents).sample


@pytest.mark.parametrize("switch", SWITCHES)
@torch.inference_mode()
def test_every_switch_leaves_what_is_computed_as_it_is(weights, fresh_weights, switch):
    speed_up(fresh_weights, [switch])
    assert (evaluate(fresh_weights) - evaluate(weights)).abs().max() < ROUNDING
    assert (decode(fresh_weights) - decode(weights)).abs().max() < ROUNDING


@torch.inference_mode()
def test_all_switches_together_leave_it_too_and_a_second_time(weights, fresh_weights):
    speed_up(fresh_weights)
    for _ in range(2):
        assert (evaluate(fresh_weights) - evaluate(weights)).abs().max() < ROUNDING
    assert (decode(fresh_weights) - decode(weights)).abs().max() < ROUNDING


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ("max 100000\n", 5),
        ("200000 100000\n", 2),
        ("250000 100000\n", 3),
        ("1000 100000\n", 1),
        ("900000 100000", 5),
    ],
)
def test_a_container_uses_as_many_threads_as_it_may(monkeypatch, tmp_path, weights, told, expected):
    set_to = []
    monkeypatch.setattr(speed, "CPU_MAX", tmp_path / "cpu.max")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    limit_threads(weights)
    assert set_to == []
    (tmp_path / "cpu.max").write_text(told)
    limit_threads(weights)
    assert (set_to or [5]) == [expected]


@torch.inference_mode()
def test_channels_stay_last_through_the_unet(fresh_weights):
    put_channels_last(fresh_weights)
    orders = []
    for module in (*fresh_weights.unet.modules(), *fresh_weights.vae.decoder.modules()):
        if isinstance(module, ResnetBlock2D):
            module.register_forward_hook(lambda _, inputs, output: orders.append(output))
    evaluate(fresh_weights), decode(fresh_weights)
    assert orders and all(output.is_contiguous(memory_format=torch.channels_last) for output in orders)


def test_putting_channels_last_copies_next_to_nothing(fresh_weights):
    models = torch.nn.ModuleDict({"unet": fresh_weights.unet, "vae": fresh_weights.vae})
    before = {name: weight.data_ptr() for name, weight in models.named_parameters()}
    put_channels_last(fresh_weights)
    moved = {name for name, weight in models.named_parameters() if weight.data_ptr() != before[name]}
    assert all(".conv_in." in name for name in moved)


@torch.inference_mode()
def test_products_go_to_onednn(fresh_weights):
    multiply_by_onednn(fresh_weights)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        evaluate(fresh_weights)
    called = {event.key for event in profile.key_averages()}
    assert "mkldnn::_linear_pointwise" in called
    assert "aten::addmm" not in called


@torch.inference_mode()
def test_keys_of_the_text_are_computed_once(fresh_weights):
    remember_keys(fresh_weights)
    layer = next(m for m in fresh_weights.unet.modules() if isinstance(m, RememberingLinear))
    text = torch.randn(1, 77, 32)
    keys = layer(text)
    assert layer(text) is keys
    assert not torch.equal(layer(text + 1), keys)
    assert torch.equal(layer(text.clone()), keys)


@torch.inference_mode()
def test_folded_upsampling_computes_four_products_for_nine():
    torch.manual_seed(3)
    plain = Upsample2D(6, use_conv=True, out_channels=5)
    hidden_states = torch.randn(2, 6, 4, 8)
    with FlopCounterMode(display=False) as flops:
        expected = plain(hidden_states)
    folded = copy.deepcopy(plain)
    folded.__class__ = FoldedUpsample
    with FlopCounterMode(display=False) as fewer:
        assert torch.allclose(folded(hidden_states), expected, atol=1e-5)
    assert fewer.get_total_flops() * 9 == flops.get_total_flops() * 4
    assert torch.equal(folded(hidden_states, (9, 16)), plain(hidden_states, (9, 16)))


@torch.inference_mode()
def test_a_change_to_what_an_upsampling_convolution_puts_out_is_heard(fresh_weights):
    fold_upsampling(fresh_weights)
    upsample = next(m for m in fresh_weights.unet.modules() if isinstance(m, FoldedUpsample))
    hidden_states = torch.randn(1, upsample.channels, 4, 4)
    before = upsample(hidden_states)
    handle = upsample.conv.register_forward_hook(lambda _, inputs, output: output + 1)
    assert torch.allclose(upsample(hidden_states), before + 1, atol=1e-5)
    handle.remove()
    assert torch.equal(upsample(hidden_states), before)


def test_memory_that_was_freed_is_there_for_the_next_layer():
    # In a process of its own: what glibc is told can't be taken back.
    code = """
import resource, sys, torch
from japanese_stable_diffusion.speed import keep_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
unkept = faults()
keep_memory(None)
faults()
print(unkept, faults())
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    unkept, kept = map(int, done.stdout.split())
    assert kept * 20 < unkept


@pytest.fixture
def wide_weights(fresh_weights: Weights) -> Weights:
    """Some layers with enough channels to be filtered minimally."""
    torch.manual_seed(5)
    resnets = [ResnetBlock2D(in_channels=192, out_channels=width, temb_channels=None) for width in (192, 256)]
    fresh_weights.unet.wide = torch.nn.ModuleList(resnets).eval()
    return fresh_weights


@torch.inference_mode()
def test_convolutions_of_many_channels_are_filtered_minimally(wide_weights):
    hidden = torch.randn(2, 192, 12, 10)
    expected = [resnet(hidden, None) for resnet in wide_weights.unet.wide]
    filter_minimally(wide_weights)
    wide = [module for module in wide_weights.unet.modules() if isinstance(module, WinogradConv2d)]
    assert len(wide) == 4
    for resnet, output in zip(wide_weights.unet.wide, expected, strict=True):
        assert (resnet(hidden, None) - output).abs().max() < ROUNDING
    assert all(isinstance(layer._kernels, tuple) for layer in wide)


@torch.inference_mode()
def test_a_model_of_nothing_but_minimal_filtering_leaves_what_is_computed_as_it_is(
    weights, fresh_weights, monkeypatch
):
    monkeypatch.setattr(winograd, "MANY_CHANNELS", 1)
    speed_up(fresh_weights)
    for model in (fresh_weights.unet, fresh_weights.vae):
        assert not any(winograd.fits(module) for module in model.modules())
    assert (evaluate(fresh_weights) - evaluate(weights)).abs().max() < ROUNDING
    # A written picture's values are 2 / 255 apart.
    assert (decode(fresh_weights) - decode(weights)).abs().max() < 2 / 255 / 50


def test_their_kernels_take_no_more_memory_than_there_is(wide_weights, monkeypatch):
    first, *_, last = sorted(
        (module for module in wide_weights.unet.wide.modules() if winograd.fits(module)),
        key=winograd.kernel_bytes,
    )
    models = (wide_weights.text_encoder, wide_weights.unet, wide_weights.vae)
    held = 4 * sum(tensor.numel() for model in models for tensor in model.parameters())
    monkeypatch.setattr(speed, "memory_budget", lambda device: held // 2)
    filter_minimally(wide_weights)
    assert not any(isinstance(module, WinogradConv2d) for module in wide_weights.unet.modules())
    monkeypatch.setattr(speed, "memory_budget", lambda device: held // 2 + winograd.kernel_bytes(first))
    filter_minimally(wide_weights)
    assert isinstance(first, WinogradConv2d) and not isinstance(last, WinogradConv2d)
