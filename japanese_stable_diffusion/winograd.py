"""Convolutions of 3×3 with fewer products: Winograd's minimal filtering.

A square of outputs is a polynomial product in disguise, and that can be computed at a few points instead of
coefficient by coefficient (Lavin & Gray 2015, arXiv:1509.09308). 2×2 outputs take 16 products per pair of
channels where a plain convolution takes 36, and 4×4 outputs 36 instead of 144. The sums around them cost
little where there are many channels. The results are the same up to rounding.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from japanese_stable_diffusion import onednn

TAPS = 3
"""Width of the kernels that this is for."""
POINTS = {2: (0.0, 1.0, -1.0), 4: (0.0, 0.75, -0.75, 1.5, -1.5)}
"""The finite points at which polynomials are computed, by the side of the square of outputs, beside infinity.

All are exact in binary. With the usual ±1 and ±2 the numbers in between grow larger, and are rounded more
coarsely (Barabasz et al. 2018, arXiv:1803.10986).
"""
LARGE_TILE, SMALL_TILE = 4, 2
FEW_CHANNELS = 1_250_000
"""Pairs of channels up to which squares are large. Beyond, their kernels would take four times the memory of
the plain ones instead of less than two, and pictures so deep in the model have few squares to share them."""
MANY_CHANNELS = 160
"""Channels from which there is something to gain."""
SMALLEST = 4
"""Side in pixels below which a plain convolution is as fast."""
WORKSPACE = 32 * 2**20
"""Bytes of transformed inputs and outputs at a time, so that they stay in the processor's cache."""

Kernels = Tensor | tuple[Tensor, ...]
"""Transformed: ((tile + 2)², in_channels, out_channels), or each (out_channels, in_channels) for oneDNN."""


class WinogradConv2d(torch.nn.Conv2d):
    """A convolution of 3×3 that keeps the size, on a CPU in single precision; else it is a plain one.

    Its kernels are transformed when it computes for the first time, and kept.
    """

    _kernels: Kernels | None = None

    def forward(self, input: Tensor) -> Tensor:
        """(pictures, in_channels, height, width) → (pictures, out_channels, height, width), channels last."""
        if input.device.type != "cpu" or input.dtype != torch.float32 or min(input.shape[2:]) < SMALLEST:
            return super().forward(input)
        tile = tile_of(self)
        if self._kernels is None:
            kernels = transform_kernels(self.weight, tile)
            self._kernels = pack_kernels(kernels) if onednn.computes(input) else kernels
        return convolve(input, self._kernels, self.bias, tile)


def fits(module: torch.nn.Module) -> bool:
    """Whether a layer is one that a `WinogradConv2d` can stand for, with enough channels to gain by it."""
    return (
        type(module) is torch.nn.Conv2d
        and module.kernel_size == (TAPS, TAPS)
        and module.stride == module.padding == module.dilation == (1, 1)
        and module.groups == 1
        and module.padding_mode == "zeros"
        and min(module.in_channels, module.out_channels) >= MANY_CHANNELS
    )


def tile_of(module: torch.nn.Conv2d) -> int:
    """Side of the squares of outputs that a layer computes at once."""
    return LARGE_TILE if module.in_channels * module.out_channels <= FEW_CHANNELS else SMALL_TILE


def kernel_bytes(module: torch.nn.Conv2d) -> int:
    """Memory that a layer's transformed kernels take."""
    return (tile_of(module) + TAPS - 1) ** 2 * module.in_channels * module.out_channels * 4


@cache
def transforms(tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """The matrices G, Bᵀ and Aᵀ of Lavin & Gray's equation 6, float64, made as Cook and Toom did.

    Args:
        tile: outputs in a row, n.

    Returns:
        Of kernels (n + 2, 3), of inputs (n + 2, n + 2), and of outputs (n, n + 2).
    """
    points = POINTS[tile]
    size = tile + TAPS - 1
    kernels, inputs, outputs = (
        torch.zeros(rows, columns, dtype=torch.float64)
        for rows, columns in ((size, TAPS), (size, size), (tile, size))
    )
    for row, point in enumerate(points):
        others = [other for other in points if other != point]
        scale = torch.tensor([point - other for other in others], dtype=torch.float64).prod()
        powers = torch.tensor([point**power for power in range(size)], dtype=torch.float64)
        kernels[row] = powers[:TAPS] / scale
        inputs[row, :-1] = _polynomial(others)
        outputs[:, row] = powers[:tile]
    kernels[-1, -1] = outputs[-1, -1] = 1
    inputs[-1] = _polynomial(points)
    return kernels, inputs, outputs


def _polynomial(roots: Sequence[float]) -> Tensor:
    """Coefficients of the polynomial with these roots, the constant first."""
    coefficients = torch.ones(1, dtype=torch.float64)
    for root in roots:
        coefficients = pad(coefficients, (1, 0)) - root * pad(coefficients, (0, 1))
    return coefficients


@cache
def _square_transforms(tile: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """`transforms` of both dimensions at once: (size², taps²), (size², size²) and (tile², size²)."""
    kernels, inputs, outputs = (torch.kron(matrix, matrix).to(dtype) for matrix in transforms(tile))
    return kernels, inputs, outputs


def transform_kernels(weight: Tensor, tile: int) -> Tensor:
    """(out_channels, in_channels, 3, 3) → ((tile + 2)², in_channels, out_channels)."""
    matrix, _, _ = _square_transforms(tile, weight.dtype)
    taps = weight.permute(2, 3, 1, 0).reshape(TAPS**2, -1)
    kernels = weight.new_empty((tile + TAPS - 1) ** 2, *weight.shape[1::-1])
    torch.mm(matrix, taps, out=kernels.flatten(1))
    return kernels


def pack_kernels(kernels: Tensor) -> Kernels:
    """What `transform_kernels` makes, as oneDNN takes it."""
    return tuple(onednn.pack(kernel.T.contiguous()) for kernel in kernels)


def convolve(input: Tensor, kernels: Kernels, bias: Tensor | None, tile: int) -> Tensor:
    """The convolution, a strip of squares after the other.

    Args:
        input: (pictures, in_channels, height, width).
        kernels: from `transform_kernels` or `pack_kernels`.
        bias: (out_channels,), or None.
        tile: side of the squares, as for the kernels.

    Returns:
        (pictures, out_channels, height, width), channels last.
    """
    pictures, channels, height, width = input.shape
    out_channels = kernels.shape[2] if isinstance(kernels, Tensor) else kernels[0].shape[0]
    size = tile + TAPS - 1
    down, across = -(-height // tile), -(-width // tile)
    _, gather, scatter = _square_transforms(tile, input.dtype)
    pixels = input.permute(0, 2, 3, 1)
    result = input.new_empty(pictures, down * tile, across * tile, out_channels)
    row_bytes = size**2 * pictures * across * (channels + out_channels) * input.itemsize
    strip = max(1, WORKSPACE // row_bytes)
    for first in range(0, down, strip):
        rows = min(strip, down - first)
        top, bottom = first * tile - 1, (first + rows) * tile + 1
        seen = pixels[:, max(0, top) : bottom]
        missing = (0, 0, 1, across * tile + 1 - width, max(0, -top), bottom - max(0, top) - seen.shape[1])
        seen = pad(seen, missing).contiguous()
        by_picture, by_row, by_pixel, _ = seen.stride()
        squares = seen.as_strided(
            (size, size, pictures, rows, across, channels),
            (by_row, by_pixel, by_picture, tile * by_row, tile * by_pixel, 1),
        )
        points = torch.mm(gather, squares.reshape(size**2, -1)).view(size**2, -1, channels)
        products = _multiply(points, kernels)
        squares = torch.mm(scatter, products.view(size**2, -1)).view(
            tile, tile, pictures, rows, across, out_channels
        )
        part = result[:, first * tile : (first + rows) * tile]
        part = part.view(pictures, rows, tile, across, tile, out_channels)
        torch.add(squares.permute(2, 3, 0, 4, 1, 5), 0 if bias is None else bias, out=part)
    return result[:, :height, :width].contiguous().permute(0, 3, 1, 2)


def _multiply(points: Tensor, kernels: Kernels) -> Tensor:
    return torch.bmm(points, kernels) if isinstance(kernels, Tensor) else onednn.products(points, kernels)
