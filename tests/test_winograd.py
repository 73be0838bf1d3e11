"""Convolutions with fewer products are the same convolutions."""

import pytest
import torch
from torch.nn.functional import conv2d
from torch.utils.flop_counter import FlopCounterMode

from japanese_stable_diffusion import onednn, winograd
from japanese_stable_diffusion.winograd import (
    FEW_CHANNELS,
    MANY_CHANNELS,
    POINTS,
    WinogradConv2d,
    convolve,
    fits,
    kernel_bytes,
    pack_kernels,
    tile_of,
    transform_kernels,
)

SIZES = [(1, 8, 8), (2, 4, 4), (2, 9, 13), (3, 17, 31), (1, 1, 6)]
"""Pictures, height and width; squares of 2 and of 4 cover some of them exactly, and others not."""


def make(in_channels: int, out_channels: int, **options) -> torch.nn.Conv2d:
    torch.manual_seed(0)
    return torch.nn.Conv2d(in_channels, out_channels, **{"kernel_size": 3, "padding": 1, **options}).eval()


@pytest.mark.parametrize("tile", POINTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.inference_mode()
def test_it_is_the_convolution(tile, size):
    plain = make(5, 7).double()
    pictures = torch.randn(size[0], 5, *size[1:], dtype=torch.float64)
    output = convolve(pictures, transform_kernels(plain.weight, tile), plain.bias, tile)
    assert torch.allclose(output, plain(pictures), rtol=0, atol=1e-12)
    assert output.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("tile", POINTS)
@torch.inference_mode()
def test_strips_fit_together(monkeypatch, tile):
    plain = make(5, 7, bias=False).double()
    pictures = torch.randn(2, 5, 21, 10, dtype=torch.float64)
    kernels = transform_kernels(plain.weight, tile)
    whole = convolve(pictures, kernels, None, tile)
    monkeypatch.setattr(winograd, "WORKSPACE", 1)
    assert torch.allclose(convolve(pictures, kernels, None, tile), whole, rtol=0, atol=1e-12)
    assert torch.allclose(whole, plain(pictures), rtol=0, atol=1e-12)


@pytest.mark.parametrize("tile", POINTS)
@torch.inference_mode()
def test_packed_kernels_are_the_same_kernels(tile):
    plain = make(24, 40)
    pictures = torch.randn(2, 24, 12, 10)
    kernels = transform_kernels(plain.weight, tile)
    output = convolve(pictures, pack_kernels(kernels), plain.bias, tile)
    assert torch.allclose(output, convolve(pictures, kernels, plain.bias, tile), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("tile", "times_plain"), [(2, 8), (4, 20)])
@torch.inference_mode()
def test_it_rounds_little_more_coarsely_than_a_plain_convolution(tile, times_plain):
    torch.manual_seed(1)
    pictures, weight = torch.randn(2, 256, 16, 16), torch.randn(64, 256, 3, 3) / (9 * 256) ** 0.5
    exact = conv2d(pictures.double(), weight.double(), padding=1)

    def error(output):
        return (output - exact).pow(2).mean().sqrt().item()

    plain = error(conv2d(pictures, weight, padding=1))
    assert error(convolve(pictures, transform_kernels(weight, tile), None, tile)) < times_plain * plain


@torch.inference_mode()
def test_a_layer_of_many_channels_takes_fewer_products(monkeypatch):
    # PyTorch's counter sees its own products, not oneDNN's.
    monkeypatch.setattr(onednn, "computes", lambda tensor: False)
    pictures, plain = torch.randn(1, MANY_CHANNELS, 16, 16), make(MANY_CHANNELS, MANY_CHANNELS)
    with FlopCounterMode(display=False) as before:
        expected = plain(pictures)
    plain.__class__ = WinogradConv2d
    plain(pictures)  # transforms the kernels
    with FlopCounterMode(display=False) as after:
        output = plain(pictures)
    assert after.get_total_flops() < 0.6 * before.get_total_flops()
    assert torch.allclose(output, expected, rtol=0, atol=2e-5)


@torch.inference_mode()
def test_small_pictures_and_half_precision_are_left_to_the_plain_one():
    layer = make(4, 4)
    plain = make(4, 4)
    layer.__class__ = WinogradConv2d
    small = torch.randn(1, 4, 3, 3)
    assert torch.equal(layer(small), plain(small))
    half = torch.randn(1, 4, 8, 8).half()
    assert torch.equal(layer.half()(half), plain.half()(half))
    assert layer._kernels is None


def test_only_layers_that_it_can_stand_for_are_taken():
    many = MANY_CHANNELS
    assert fits(make(many, many))
    assert not fits(make(many, many - 1)) and not fits(make(many - 1, many))
    for other in ({"stride": 2}, {"padding": 0}, {"dilation": 2}, {"kernel_size": 1}, {"groups": 2}):
        assert not fits(make(many, many, **other)), other
    assert not fits(make(many, many, padding_mode="circular"))
    assert not fits(torch.nn.Linear(many, many))


@torch.inference_mode()
def test_kernels_of_many_channels_grow_less_than_twofold():
    few, many = make(320, 320), torch.nn.Conv2d(1280, 1280, 3, device="meta")
    assert tile_of(few) == 4 and few.weight.numel() <= 9 * FEW_CHANNELS
    assert tile_of(many) == 2 and kernel_bytes(many) < 2 * 4 * many.weight.numel()
    kernels = transform_kernels(few.weight, tile_of(few))
    assert kernels.nbytes == kernel_bytes(few)
