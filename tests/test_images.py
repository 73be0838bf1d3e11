"""Pictures are written with their mark and with what they were made with."""

import numpy as np
import pytest
from PIL import Image

from japanese_stable_diffusion import watermark
from japanese_stable_diffusion.images import write_image
from japanese_stable_diffusion.provenance import Parameters, read_parameters
from japanese_stable_diffusion.request import Request

PARAMETERS = Parameters(Request(prompt="富士山 浮世絵", seed=3), "tiny", "1")


def gradient(side):
    ramp = np.linspace(40, 215, side).astype(np.uint8)
    return Image.fromarray(np.stack(np.broadcast_arrays(ramp, ramp[:, None], ramp[::-1]), axis=-1))


def test_a_file_says_how_its_picture_is_made_again(tmp_path):
    write_image(gradient(64), tmp_path / "a.png", PARAMETERS)
    assert read_parameters(tmp_path / "a.png") == PARAMETERS


def test_large_pictures_are_marked_and_small_ones_left_as_they_are(tmp_path):
    write_image(gradient(512), tmp_path / "large.png", PARAMETERS)
    assert watermark.detect(Image.open(tmp_path / "large.png")).found
    assert not watermark.detect(gradient(512)).found
    write_image(gradient(64), tmp_path / "small.png", PARAMETERS)
    assert np.array_equal(Image.open(tmp_path / "small.png"), gradient(64))


@pytest.mark.parametrize(("output_format", "name"), [("jpg", "JPEG"), ("webp", "WEBP")])
def test_a_file_with_loss_is_marked_and_says_how_it_was_made_too(output_format, name, tmp_path):
    request = Request(seed=3, output_format=output_format, output_quality=90)
    write_image(gradient(512), tmp_path / "picture", Parameters(request, "tiny", "1"))
    with Image.open(tmp_path / "picture") as image:
        assert image.format == name
        assert watermark.detect(image).found
    assert read_parameters(tmp_path / "picture").request == request


def test_the_file_is_a_png_of_the_same_size(tmp_path):
    write_image(gradient(64), tmp_path / "a.png", PARAMETERS)
    with Image.open(tmp_path / "a.png") as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (64, 64))
