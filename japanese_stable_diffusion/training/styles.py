"""Draw flat art in a painter's style, so that a small data set can teach styles as well as things.

Every style is a function of one drawing on a transparent ground. They work at twice the final size
and lean on OpenCV (``xphoto.oilPainting``, ``stylization``, ``pencilSketch``:
https://docs.opencv.org/4.x/) for what its authors do better than a hand-made filter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Style:
    """A style: its words, whether the English base may see it, and how it is drawn.

    ``draw`` takes a drawing (height, width, 4; uint8 RGBA, not premultiplied) and a random generator
    and returns an opaque picture (height, width, 3; uint8 RGB).
    """

    name: str
    japanese: tuple[str, ...]
    english: tuple[str, ...]
    in_base: bool
    draw: Callable[[Pixels, np.random.Generator], Pixels]


def _noise(size: int, grain: int, rng: np.random.Generator) -> Floats:
    """Smooth noise of zero mean and unit deviation, with blobs of about ``grain`` pixels."""
    cells = max(2, size // grain + 2)
    noise = rng.standard_normal((cells, cells)).astype(np.float32)
    noise = cv2.resize(noise, (size, size), interpolation=cv2.INTER_CUBIC)
    return np.asarray((noise - noise.mean()) / (noise.std() + 1e-6), dtype=np.float32)


def _over(drawing: Pixels, ground: Floats) -> Pixels:
    """Lay a drawing on an opaque ground (height, width, 3; 0 to 255)."""
    alpha = drawing[..., 3:].astype(np.float32) / 255
    return np.clip(drawing[..., :3] * alpha + ground * (1 - alpha), 0, 255).astype(np.uint8)


def _ground(
    size: int, colour: tuple[int, int, int], rng: np.random.Generator, grain: int, strength: float
) -> Floats:
    """A sheet of one colour with a visible grain."""
    texture = _noise(size, grain, rng)[..., None] * strength
    return np.asarray(np.clip(np.array(colour, np.float32) + texture, 0, 255), dtype=np.float32)


def _luminance(picture: Pixels) -> Floats:
    grey = np.asarray(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), dtype=np.float32)
    return np.asarray(grey / 255, dtype=np.float32)


def _edges(drawing: Pixels, width: int) -> Floats:
    """How much of an outline runs through each pixel, 0 to 1."""
    flat = _over(drawing, np.full((*drawing.shape[:2], 3), 255, np.float32))
    flat = cv2.bilateralFilter(flat, 5, 40, 5)
    grey = cv2.cvtColor(flat, cv2.COLOR_RGB2GRAY)
    lines = cv2.Canny(grey, 40, 110) | cv2.Canny(drawing[..., 3], 60, 160)
    lines = cv2.dilate(lines, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width, width)))
    lines = np.asarray(cv2.GaussianBlur(lines, (3, 3), 0), dtype=np.float32)
    return np.asarray(lines / 255, dtype=np.float32)


def _within(reach: Floats, edge: float, steepness: float) -> Floats:
    """1 where ``reach`` is below an edge, 0 above it, and a soft step between."""
    return np.asarray(1 / (1 + np.exp((reach - edge) * steepness)), dtype=np.float32)


def illustration(drawing: Pixels, rng: np.random.Generator) -> Pixels:
    """The art as it is, on white."""
    return _over(drawing, np.full((*drawing.shape[:2], 3), 255, np.float32))


def oil_painting(drawing: Pixels, rng: np.random.Generator) -> Pixels:
    """Thick strokes on a toned, brushed canvas."""
    size = drawing.shape[0]
    tones = [(196, 160, 110), (120, 140, 130), (150, 120, 110), (110, 125, 160), (170, 150, 90)]
    tone = np.array(tones[rng.integers(len(tones))], np.float32)
    brushed = _noise(size, 28, rng)[..., None] * 14 + _noise(size, 10, rng)[..., None] * 4
    picture = _over(drawing, np.clip(tone + brushed, 0, 255))
    picture = np.clip(picture + _noise(size, 10, rng)[..., None] * 6, 0, 255).astype(np.uint8)
    picture = cv2.xphoto.oilPainting(picture, 6, 1)
    # Light from the upper left on the ridges of the paint.
    ridges = cv2.GaussianBlur(_luminance(picture), (0, 0), 1.2)
    relief = cv2.filter2D(ridges, -1, np.array([[-2, -1, 0], [-1, 0, 1], [0, 1, 2]], np.float32))
    return np.clip(picture + relief[..., None] * 60, 0, 255).astype(np.uint8)


def watercolor(drawing: Pixels, rng: np.random.Generator) -> Pixels:
    """Pale washes, darker at the rim, on one wide wash that leaves white paper around."""
    size = drawing.shape[0]
    shift = np.stack([_noise(size, 16, rng), _noise(size, 16, rng)]) * 2
    rows, columns = np.mgrid[0:size, 0:size].astype(np.float32)
    shifted = cv2.remap(drawing, columns + shift[0], rows + shift[1], cv2.INTER_LINEAR)
    alpha = shifted[..., 3:].astype(np.float32) / 255
    pigment = cv2.bilateralFilter(np.ascontiguousarray(shifted[..., :3]), 9, 60, 9)
    strength = np.clip(0.62 + 0.14 * _noise(size, 30, rng), 0.3, 0.9)[..., None]
    pale = 255 - (255 - pigment.astype(np.float32)) * strength

    tints = [(150, 196, 226), (166, 214, 170), (246, 206, 140), (240, 178, 184), (196, 178, 226)]
    tint = np.array(tints[rng.integers(len(tints))], np.float32)
    wide = np.hypot(rows - size / 2, columns - size / 2) / size + 0.035 * _noise(size, 40, rng)
    inside = _within(wide, 0.43, 60)
    rim = inside * (1 - inside) * 4
    wash = (inside * np.clip(0.55 + 0.14 * _noise(size, 36, rng), 0.15, 0.9) + 0.3 * rim)[..., None]
    paper = np.array((252, 250, 245), np.float32)
    ground = paper - (paper - tint) * np.clip(wash, 0, 1)

    gathered = cv2.GaussianBlur(alpha[..., 0], (0, 0), 3)
    edge = (alpha[..., 0] * np.clip(1 - gathered, 0, 1))[..., None]
    picture = (pale * alpha + ground * (1 - alpha)) * (1 - 0.6 * edge)
    return np.clip(picture, 0, 255).astype(np.uint8)


def pixel_art(drawing: Pixels, rng: np.random.Generator) -> Pixels:
    """Sixteen coarse pixels to a side, as many as the sprites of early video games had, and few shades."""
    size = drawing.shape[0]
    small = cv2.resize(illustration(drawing, rng), (16, 16), interpolation=cv2.INTER_AREA)
    small = (np.round(small / 51.0) * 51).astype(np.uint8)
    return np.asarray(cv2.resize(small, (size, size), interpolation=cv2.INTER_NEAREST))


def pencil(drawing: Pixels, rng: np.random.Generator) -> Pixels:
    """Graphite without colour: outlines and hatching, before a ground of broad slanting strokes."""
    size = drawing.shape[0]
    shade = cv2.GaussianBlur(_luminance(illustration(drawing, rng)), (0, 0), 1.5)
    alpha = cv2.GaussianBlur(drawing[..., 3].astype(np.float32) / 255, (0, 0), 1.0)
    rows, columns = np.mgrid[0:size, 0:size].astype(np.float32)
    wobble = _noise(size, 30, rng)
    hatch = 0.5 + 0.5 * np.sin((rows + columns) * 0.4 + wobble)
    subject = 1 - (1 - shade) * (0.4 + 0.4 * hatch)
    # The strokes end raggedly short of the sheet's edge.
    reach = np.abs(rows - columns) / size * 0.5 + np.abs(rows + columns - size) / size * 0.62
    fade = _within(reach + 0.04 * _noise(size, 12, rng), 0.46, 40)
    strokes = 0.5 + 0.5 * np.sin((rows + columns) * 0.3 + 0.5 * wobble)
    ground = 1 - fade * (0.26 + 0.2 * strokes)
    tone = subject * alpha + ground * (1 - alpha)
    tone = tone * (1 - 0.8 * _edges(drawing, 3))
    paper = _ground(size, (244, 242, 236), rng, 6, 3)
    return np.clip(paper * tone[..., None], 0, 255).astype(np.uint8)


# Pigments of the nishiki-e printers: ink, indigo, Prussian blue, vermilion, safflower, ochre, moss, paper.
_UKIYOE_INKS = np.array(
    [
        (38, 36, 42),
        (44, 62, 96),
        (86, 124, 152),
        (190, 74, 52),
        (222, 150, 128),
        (214, 170, 84),
        (108, 128, 84),
        (240, 226, 194),
    ],
    np.float32,
)


def ukiyoe(drawing: Pixels, rng: np.random.Generator) -> Pixels:
    """A woodblock print: few flat inks, black key lines, a graded blue sky over tan paper."""
    size = drawing.shape[0]
    smooth = drawing.copy()
    smooth[..., :3] = cv2.medianBlur(np.ascontiguousarray(drawing[..., :3]), 5)
    lab = cv2.cvtColor(np.ascontiguousarray(smooth[..., :3]), cv2.COLOR_RGB2LAB).astype(np.float32)
    inks = cv2.cvtColor(_UKIYOE_INKS[None].astype(np.uint8), cv2.COLOR_RGB2LAB)[0].astype(np.float32)
    weights = np.array([0.8, 1.0, 1.0], np.float32)
    nearest = (((lab[:, :, None] - inks) * weights) ** 2).sum(-1).argmin(-1)
    smooth[..., :3] = _UKIYOE_INKS[nearest].astype(np.uint8)
    ground = _ground(size, (236, 220, 184), rng, 4, 4)
    sky = np.clip(1 - np.linspace(0, 1, size, dtype=np.float32) / rng.uniform(0.25, 0.45), 0, 1)[
        :, None, None
    ]
    ground = ground * (1 - 0.85 * sky) + np.array((58, 88, 128), np.float32) * 0.85 * sky
    picture = _over(smooth, ground) * (1 - 0.92 * _edges(drawing, 4))[..., None]
    wood = _noise(size, 5, rng)[..., None] * 4
    return np.clip(picture + wood, 0, 255).astype(np.uint8)


def ink_wash(drawing: Pixels, rng: np.random.Generator) -> Pixels:
    """Sumi ink that bleeds into pale paper, and a red seal in the corner."""
    size = drawing.shape[0]
    dark = (1 - _luminance(illustration(drawing, rng))) * (drawing[..., 3] / 255.0)
    dark = 0.18 * (drawing[..., 3] / 255.0) + 0.82 * dark
    bleed = cv2.GaussianBlur(dark.astype(np.float32), (0, 0), 5) * (0.75 + 0.25 * _noise(size, 16, rng))
    body = cv2.GaussianBlur(dark.astype(np.float32), (0, 0), 1.6)
    brush = cv2.GaussianBlur(_edges(drawing, 4), (0, 0), 1.0) * np.clip(
        0.65 + 0.35 * _noise(size, 14, rng), 0.1, 1
    )
    ink = np.clip(0.5 * body + 0.35 * np.clip(bleed, 0, 1) + 0.95 * brush, 0, 0.95)
    paper = _ground(size, (240, 236, 226), rng, 5, 3)
    picture = paper * (1 - ink[..., None]) + np.array((24, 24, 28), np.float32) * ink[..., None]
    side = size // 11
    picture[-side - 12 : -12, -side - 12 : -12] = (188, 44, 40)
    cv2.rectangle(picture, (size - side - 8, size - side - 8), (size - 17, size - 17), (236, 220, 210), 2)
    return np.clip(picture, 0, 255).astype(np.uint8)


def paper_cut(drawing: Pixels, rng: np.random.Generator) -> Pixels:
    """Kirie: black paper cut with a knife, laid over sheets of bright colour."""
    size = drawing.shape[0]
    grounds = [(236, 92, 76), (246, 184, 60), (104, 176, 112), (88, 156, 200), (222, 130, 170)]
    first, second = rng.permutation(len(grounds))[:2]
    ground = np.full((size, size, 3), grounds[first], np.float32)
    cv2.circle(ground, (size // 2, size // 2), int(size * 0.47), tuple(float(c) for c in grounds[second]), -1)
    light = cv2.medianBlur((_luminance(illustration(drawing, rng)) * 255).astype(np.uint8), 7)
    inside = drawing[..., 3] > 127
    middle = float(np.median(light[inside])) if inside.any() else 128.0
    window = inside & (light > min(max(middle - 4.0, 60.0), 215.0)) & (_edges(drawing, 7) < 0.5)
    picture = ground.copy()
    picture[inside] = (28, 26, 30)
    picture[window] = (250, 246, 234)
    return cv2.GaussianBlur(np.clip(picture, 0, 255).astype(np.uint8), (3, 3), 0)


def indigo_dye(drawing: Pixels, rng: np.random.Generator) -> Pixels:
    """Aizome: the motif resisted in white on cloth dyed with indigo."""
    size = drawing.shape[0]
    light = cv2.GaussianBlur(_luminance(illustration(drawing, rng)), (0, 0), 1.2)
    alpha = cv2.GaussianBlur(drawing[..., 3].astype(np.float32) / 255, (0, 0), 1.5)
    resist = alpha * np.clip(0.25 + 0.85 * light, 0, 1) * (1 - 0.6 * _edges(drawing, 3))
    resist = np.clip(resist + 0.05 * _noise(size, 10, rng), 0, 1)[..., None]
    weave = np.sin(np.arange(size, dtype=np.float32) * np.pi / 2) * 5
    cloth = np.array((30, 52, 110), np.float32) + _noise(size, 24, rng)[..., None] * 9
    picture = cloth * (1 - resist) + np.array((226, 232, 240), np.float32) * resist
    return np.clip(picture + weave[:, None, None] + weave[None, :, None], 0, 255).astype(np.uint8)


STYLES: tuple[Style, ...] = (
    Style("illustration", ("イラスト",), ("illustration",), True, illustration),
    Style("oil_painting", ("油絵", "油彩画"), ("oil painting",), True, oil_painting),
    Style("watercolor", ("水彩画", "水彩"), ("watercolor painting",), True, watercolor),
    Style("pixel_art", ("ドット絵", "ピクセルアート"), ("pixel art",), True, pixel_art),
    Style("pencil", ("鉛筆画", "デッサン"), ("pencil drawing",), True, pencil),
    Style("ukiyoe", ("浮世絵", "錦絵"), ("ukiyo-e print",), False, ukiyoe),
    Style("ink_wash", ("水墨画", "墨絵"), ("ink wash painting",), False, ink_wash),
    Style("paper_cut", ("切り絵",), ("paper cutting",), False, paper_cut),
    Style("indigo_dye", ("藍染め", "藍染"), ("indigo dyeing",), False, indigo_dye),
)
