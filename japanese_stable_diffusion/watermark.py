"""The invisible watermark: a fixed message in a picture's colour, to tell viewers that a machine made it.

The method is `dwtDctSvd` of the invisible-watermark library (github.com/ShieldMnt/invisible-watermark), which
can read our marks; the message is the one that Stable Diffusion v1 embeds. The library itself is not used: it
requires opencv-python, which cannot be installed beside the headless build, and where a colour cannot take
the mark (white cannot get bluer) it writes what the 8-bit picture then cuts off.

A picture is cut into blocks of 8 x 8 pixels. Block n carries bit n modulo 136 of the message in its strength:
the largest singular value of the blue-difference channel (U) after a Haar low-pass. Quantization index
modulation (Chen and Wornell 2001) sets the strength to 9 (bit 0) or 27 (bit 1) modulo 36.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

MESSAGE = b"StableDiffusionV1"
MINIMUM_AREA = 256 * 256
"""Pixels; in a smaller picture each bit would be repeated too seldom."""

_BLOCK = 8
_STEP = 36.0
_BITS = np.unpackbits(np.frombuffer(MESSAGE, np.uint8))

# BT.601, full range. Adding `_PER_U` to a pixel's red, green and blue raises U by 1 and leaves Y and V alone.
_U_OF_RGB = 0.492 * np.array([-0.299, -0.587, 1 - 0.114], np.float32)
_PER_U = np.array([0, -0.114 / 0.587, 1], np.float32) / 0.492

_CORRECTIONS = 3
THRESHOLD = 5.3
# Votes of a picture without any colour differ by rounding errors only, which are no votes.
_WEAKEST_VOTES = 0.3

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.floating]


@dataclass(frozen=True)
class Detection:
    """What was found of the message.

    `score` correlates the message with the blocks' votes, in standard deviations of an unmarked picture.
    Where votes lean either way with equal chance, P(score >= t) <= exp(-t^2 / 2) (Hoeffding 1963,
    theorem 2). `bits` is the share of the 136 bits that are right: about 0.5 without a mark, 1 in an
    untouched one.
    """

    score: float
    bits: float

    @property
    def found(self) -> bool:
        """Whether the mark is there; by the bound above, one unmarked picture in a million says so too."""
        return self.score >= THRESHOLD


def is_large_enough(picture: Image.Image) -> bool:
    """Whether `picture` has the pixels to carry the mark: 256 x 256, or as many in another shape."""
    return picture.width * picture.height >= MINIMUM_AREA


def embed(picture: Image.Image) -> Image.Image:
    """`picture` as RGB with the mark in it, at a PSNR of about 44 dB; as it is if it isn't large enough."""
    if not is_large_enough(picture):
        return picture
    original = np.asarray(picture.convert("RGB"))
    strength = _strength(original)
    offset = np.where(np.resize(_BITS, strength.shape) == 1, 0.75, 0.25)
    target = (np.round(strength / _STEP - offset) + offset) * _STEP
    # In a block of one colour, U + 1 is strength + 8.
    shift = (target - strength) / _BLOCK
    missing = target - _strength(_shift_u(original, shift))
    # Colours at the edge of the gamut may move one way only: those aim at the next level on the other side.
    stuck = np.abs(missing) > _STEP / 4
    target[stuck] -= np.sign(missing[stuck]) * _STEP
    shift[stuck] = (target - strength)[stuck] / _BLOCK
    # Textures and rounding to 8 bits add to what was asked for.
    for _ in range(_CORRECTIONS):
        shift += (target - _strength(_shift_u(original, shift))) / _BLOCK
    return Image.fromarray(_shift_u(original, shift))


def detect(picture: Image.Image) -> Detection:
    """Look for the mark in `picture`, which may have been compressed since, but not scaled or cropped."""
    if not is_large_enough(picture):
        return Detection(score=0.0, bits=0.5)
    strength = _strength(np.asarray(picture.convert("RGB"))).ravel()
    bit = np.arange(strength.size) % _BITS.size
    votes = np.bincount(bit, -np.sin(2 * np.pi * strength / _STEP)) / np.bincount(bit)
    # All letters begin with the same bits, so a motif repeated every 8 blocks would look like the message:
    # only what tells the letters apart is compared.
    message, seen = _beside_mean_letter(_BITS * 2.0 - 1), _beside_mean_letter(votes)
    score = float(message @ seen / max(float(np.linalg.norm(seen)), _WEAKEST_VOTES))
    return Detection(score=score, bits=float(np.mean((votes > 0) == (_BITS == 1))))


def _beside_mean_letter(values: Floats) -> Floats:
    letters = values.reshape(-1, 8)
    return np.ravel(letters - letters.mean(axis=0))


def _strength(rgb: Pixels) -> Floats:
    """What carries the bit in each block of `rgb` (height, width, 3): (height // 8, width // 8).

    The library's discrete cosine transform is left out: it is orthonormal and changes no singular value.
    """
    rows, columns = rgb.shape[0] // _BLOCK, rgb.shape[1] // _BLOCK
    u = rgb[: rows * _BLOCK, : columns * _BLOCK].astype(np.float32) @ _U_OF_RGB + 128
    low_pass = u.reshape(rows, 4, 2, columns, 4, 2).sum(axis=(2, 5)) / 2
    return np.asarray(np.linalg.svd(low_pass.transpose(0, 2, 1, 3), compute_uv=False)[..., 0])


def _shift_u(rgb: Pixels, shift: Floats) -> Pixels:
    """`rgb` with U raised by `shift`, a value a block; darkened or lightened where that leaves the gamut."""
    whole_blocks = np.kron(shift, np.ones((_BLOCK, _BLOCK), np.float32))[..., None]
    moved = rgb.astype(np.float32)
    moved[: whole_blocks.shape[0], : whole_blocks.shape[1]] += whole_blocks * _PER_U
    # The same grey added to red, green and blue leaves U as it is.
    moved -= np.maximum(moved.max(axis=2, keepdims=True) - 255, 0)
    moved += np.maximum(-moved.min(axis=2, keepdims=True), 0)
    return np.asarray(np.clip(np.round(moved), 0, 255).astype(np.uint8))
