import io

import cv2
import numpy as np
import pytest
import skimage.data
from PIL import Image, ImageDraw

from japanese_stable_diffusion import watermark

ENCODINGS = {
    "png": {"format": "PNG"},
    "jpeg-90": {"format": "JPEG", "quality": 90},
    "jpeg-75": {"format": "JPEG", "quality": 75},
    "webp-90": {"format": "WEBP", "quality": 90},
}


def photographs() -> list[Image.Image]:
    astronaut, coffee, camera = skimage.data.astronaut(), skimage.data.coffee(), skimage.data.camera()
    return [
        Image.fromarray(astronaut[:256, :256]),
        Image.fromarray(coffee[:280, :420]),
        Image.fromarray(camera[:256, :256]),
    ]


def flat_art() -> list[Image.Image]:
    white = Image.new("RGB", (256, 256), "white")
    drawing = white.copy()
    draw = ImageDraw.Draw(drawing)
    draw.ellipse((30, 30, 200, 200), fill=(255, 204, 77))
    draw.rectangle((100, 150, 240, 250), fill=(255, 255, 0))
    return [white, Image.new("RGB", (256, 256), "black"), drawing]


def encoded(picture: Image.Image, encoding: str) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, **ENCODINGS[encoding])
    return Image.open(file)


def psnr(one: Image.Image, other: Image.Image) -> float:
    difference = np.asarray(one.convert("RGB"), np.float64) - np.asarray(other.convert("RGB"), np.float64)
    return float(10 * np.log10(255**2 / np.mean(difference**2)))


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("pictures", [photographs, flat_art])
def test_mark_is_found_again(pictures, encoding):
    for picture in pictures():
        assert watermark.detect(encoded(watermark.embed(picture), encoding)).found


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("pictures", [photographs, flat_art])
def test_unmarked_pictures_raise_no_alarm(pictures, encoding):
    for picture in pictures():
        assert not watermark.detect(encoded(picture.convert("RGB"), encoding)).found


def test_mark_is_invisible():
    for picture in [*photographs(), *flat_art()]:
        marked = watermark.embed(picture)
        assert marked.size == picture.size
        assert psnr(picture, marked) > 41
        difference = np.asarray(marked, np.int16) - np.asarray(picture.convert("RGB"), np.int16)
        assert abs(difference).max() <= 20


def test_repeated_letters_do_not_look_like_the_message():
    """Stripes that repeat every 8 blocks, each of the colour that most letters have there, if they agree."""
    ones = np.unpackbits(np.frombuffer(watermark.MESSAGE, np.uint8)).reshape(-1, 8).mean(axis=0)
    blue = np.resize(np.select([ones > 0.8, ones < 0.4], [131, 136], 134), 64)
    stripes = np.full((512, 512, 3), 128, np.uint8)
    stripes[..., 2] = np.repeat(blue, 8)
    assert not watermark.detect(Image.fromarray(stripes)).found


def test_small_pictures_are_left_alone():
    picture = Image.new("RGB", (192, 256), "white")
    assert watermark.embed(picture) is picture
    assert not watermark.detect(picture).found


def test_mark_is_read_by_the_published_method():
    """`dwtDctSvd` as invisible-watermark describes it, with OpenCV's colours and cosine transform."""
    marked = encoded(watermark.embed(photographs()[1]), "jpeg-90").convert("RGB")
    u = cv2.cvtColor(np.asarray(marked), cv2.COLOR_RGB2YUV)[..., 1].astype(np.float32)
    low_pass = (u[0::2, 0::2] + u[1::2, 0::2] + u[0::2, 1::2] + u[1::2, 1::2]) / 2
    rows, columns = low_pass.shape[0] // 4, low_pass.shape[1] // 4
    votes = [[] for _ in range(8 * len(watermark.MESSAGE))]
    for n in range(rows * columns):
        top, left = 4 * (n // columns), 4 * (n % columns)
        block = cv2.dct(np.ascontiguousarray(low_pass[top : top + 4, left : left + 4]))
        votes[n % len(votes)].append(np.linalg.svd(block, compute_uv=False)[0] % 36 > 18)
    assert np.packbits([np.mean(bit) > 0.5 for bit in votes]).tobytes() == watermark.MESSAGE
