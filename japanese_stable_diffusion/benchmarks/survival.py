"""How often the watermark is read back, what it costs, and how often it is seen in vain."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import skimage.data
from PIL import Image
from tqdm import tqdm

from japanese_stable_diffusion import watermark

ENCODINGS: dict[str, dict[str, Any]] = {
    "PNG": {"format": "PNG"},
    "JPEG 90": {"format": "JPEG", "quality": 90},
    "JPEG 75": {"format": "JPEG", "quality": 75},
    "WebP 90": {"format": "WEBP", "quality": 90},
}
_PHOTOGRAPHS = (
    "astronaut",
    "brick",
    "camera",
    "cat",
    "coffee",
    "coins",
    "grass",
    "gravel",
    "hubble_deep_field",
    "moon",
    "retina",
    "rocket",
)
_PROMPTS = (
    "サラリーマン 油絵",
    "富士山 浮世絵",
    "猫 水墨画",
    "りんご ドット絵",
    "寿司",
    "東京タワー",
    "鯉のぼり",
    "達磨",
)
_SIDE = 256


@dataclass(frozen=True)
class Survival:
    """What became of the mark in a set of pictures.

    Attributes:
        pictures: how many.
        found: for each encoding, the share in which the mark was found again.
        whole: for each encoding, the share in which every bit of it was right.
        psnr: of marked pictures, in dB: the mean and the least.
    """

    pictures: int
    found: dict[str, float]
    whole: dict[str, float]
    psnr: tuple[float, float]


def photographs() -> Iterator[Image.Image]:
    """Pieces of 256 x 256 pixels, side by side, of the photographs that scikit-image ships: 48 in all."""
    for name in _PHOTOGRAPHS:
        photograph = Image.fromarray(getattr(skimage.data, name)()).convert("RGB")
        # No photograph may outweigh the others.
        columns, rows = (min(3, side // _SIDE) for side in photograph.size)
        for left in range(columns):
            for top in range(rows):
                box = (left * _SIDE, top * _SIDE, (left + 1) * _SIDE, (top + 1) * _SIDE)
                yield photograph.crop(box)


def generated(count: int) -> Iterator[Image.Image]:
    """Pictures of 512 x 512 pixels that the weights in use make, without the mark."""
    # Whoever only measures photographs needs neither PyTorch nor weights.
    from japanese_stable_diffusion.pipeline import Picture, Pipeline
    from japanese_stable_diffusion.request import Request
    from japanese_stable_diffusion.speed import choose_device, choose_dtype
    from japanese_stable_diffusion.weights import find_weights, load_weights

    device = choose_device()
    pipeline = Pipeline(load_weights(find_weights(), device, choose_dtype(device)))
    for seed in tqdm(range(count), unit="picture"):
        request = Request(_PROMPTS[seed % len(_PROMPTS)], seed=seed)
        yield from (event.image for event in pipeline.generate(request) if isinstance(event, Picture))


def report(generated_count: int, unmarked_count: int) -> str:
    """A table of survival in photographs and generated pictures, and of false alarms."""
    sets = {"photographs": list(photographs())}
    if generated_count:
        sets["generated"] = list(generated(generated_count))
    rows = [f"{'':22}" + "".join(f"{encoding:>9}" for encoding in ENCODINGS) + "   PSNR mean, least"]
    for name, pictures in sets.items():
        survival = measure_survival(pictures)
        for title, shares in (
            (f"{survival.pictures} {name}, found", survival.found),
            ("  every bit", survival.whole),
        ):
            rows.append(f"{title:22}" + "".join(f"{share:9.1%}" for share in shares.values()))
        rows[-2] += "{:13.1f}, {:.1f} dB".format(*survival.psnr)
    everything = [picture for pictures in sets.values() for picture in pictures]
    alarms, highest = count_false_alarms(everything, unmarked_count)
    rows.append(
        f"{alarms} false alarms in {unmarked_count:,} unmarked pictures; highest score {highest:.2f}, "
        f"a mark is found from {watermark.THRESHOLD}"
    )
    return "\n".join(rows)


def measure_survival(pictures: list[Image.Image]) -> Survival:
    """Mark every picture, save it in every encoding, and look for the mark."""
    found: dict[str, list[bool]] = {encoding: [] for encoding in ENCODINGS}
    whole: dict[str, list[bool]] = {encoding: [] for encoding in ENCODINGS}
    psnr = []
    for picture in tqdm(pictures, unit="picture"):
        marked = watermark.embed(picture)
        psnr.append(_psnr(picture, marked))
        for encoding, options in ENCODINGS.items():
            detection = watermark.detect(_encoded(marked, options))
            found[encoding].append(detection.found)
            whole[encoding].append(detection.bits == 1)
    return Survival(
        len(pictures),
        {encoding: float(np.mean(of)) for encoding, of in found.items()},
        {encoding: float(np.mean(of)) for encoding, of in whole.items()},
        (float(np.mean(psnr)), min(psnr)),
    )


def count_false_alarms(pictures: list[Image.Image], count: int) -> tuple[int, float]:
    """Look for the mark in `count` unmarked pictures: pieces of `pictures`, turned, scaled and compressed.

    Returns:
        How often it was seen, and the highest score.
    """
    draw = np.random.default_rng(0)
    alarms, highest = 0, 0.0
    for _ in tqdm(range(count), unit="picture"):
        picture = pictures[draw.integers(len(pictures))]
        side = int(draw.integers(_SIDE // 2, min(picture.size) + 1))
        left, top = (int(draw.integers(0, whole - side + 1)) for whole in picture.size)
        size = int(draw.choice([_SIDE, 320, 512]))
        piece = picture.crop((left, top, left + side, top + side)).resize((size, size))
        piece = piece.transpose(Image.Transpose(int(draw.integers(7))))
        options = ENCODINGS[str(draw.choice(list(ENCODINGS)))]
        detection = watermark.detect(_encoded(piece, options))
        alarms += detection.found
        highest = max(highest, detection.score)
    return alarms, highest


def _encoded(picture: Image.Image, options: dict[str, Any]) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, **options)
    return Image.open(file)


def _psnr(one: Image.Image, other: Image.Image) -> float:
    difference = np.asarray(one, np.float64) - np.asarray(other, np.float64)
    return float(10 * np.log10(255**2 / np.mean(difference**2)))
