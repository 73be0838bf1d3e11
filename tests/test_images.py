"""What strangers send is read or refused; pictures are written with their mark and how they were made."""

import io
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from japanese_stable_diffusion import watermark
from japanese_stable_diffusion.images import fitted_size, open_start, read_image, write_image
from japanese_stable_diffusion.provenance import Parameters, read_parameters
from japanese_stable_diffusion.request import PICTURE_BYTES, PIXELS, SIDES, Request, RequestError

FUZZER = Path(__file__).with_name("fuzzed_pictures.py")

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


def colours(width=48, height=32):
    """A picture whose sides and corners can be told apart."""
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([across, down, 255 - across], axis=-1).astype(np.uint8))


def saved(picture, path, file_format="PNG", **options):
    picture.save(path, file_format, **options)
    return path


def pixels(picture):
    return np.asarray(picture, dtype=int)


@pytest.mark.parametrize(
    ("file_format", "options", "loss"),
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("JPEG", {"quality": 100, "subsampling": 0}, 3),
        ("AVIF", {"quality": 100, "subsampling": "4:4:4"}, 3),
        ("GIF", {}, 60),
    ],
)
def test_every_format_is_read_whatever_the_file_is_called(file_format, options, loss, tmp_path):
    picture, _ = read_image("image", saved(colours(), tmp_path / "a.txt", file_format, **options))
    assert picture.mode == "RGB"
    assert np.abs(pixels(picture) - pixels(colours())).max() <= loss


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK"])
def test_every_mode_becomes_rgb(mode, tmp_path):
    picture, _ = read_image("image", saved(colours().convert(mode), tmp_path / "a", "TIFF"))
    assert np.array_equal(picture, colours().convert(mode).convert("RGB"))


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_16_bits_become_8_from_black_to_white(file_format, tmp_path):
    grey = Image.fromarray(np.array([[0, 255, 256, 32768, 65535]], np.uint16))
    picture, _ = read_image("image", saved(grey, tmp_path / "a", file_format))
    assert pixels(picture)[0, :, 0].tolist() == [0, 0, 1, 128, 255]


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "TIFF"])
def test_transparency_is_laid_on_white(file_format, tmp_path):
    clear = Image.new("RGBA", (3, 1), (200, 0, 0, 255))
    clear.putpixel((1, 0), (0, 0, 0, 0))
    clear.putpixel((2, 0), (0, 0, 0, 128))
    options = {"lossless": True, "exact": True} if file_format == "WEBP" else {}
    picture, _ = read_image("image", saved(clear, tmp_path / "a", file_format, **options))
    assert pixels(picture)[0].tolist() == [[200, 0, 0], [255] * 3, [127] * 3]


def test_a_transparent_colour_of_a_palette_is_white_too(tmp_path):
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([200, 0, 0, 0, 0, 200])
    palette.putpixel((1, 0), 1)
    picture, _ = read_image("image", saved(palette, tmp_path / "a", transparency=1))
    assert pixels(picture)[0].tolist() == [[200, 0, 0], [255] * 3]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "TIFF"])
def test_pictures_are_turned_upright(orientation, file_format, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if file_format == "WEBP" else {}
    file = saved(colours(), tmp_path / "a", file_format, exif=exif, **options)
    picture, _ = read_image("image", file)
    # EXIF 2.3: where the first row and the first column of the file belong.
    turned = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: a.transpose(1, 0, 2)[:, ::-1],
        7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
        8: lambda a: a.transpose(1, 0, 2)[::-1],
    }
    assert np.array_equal(picture, turned[orientation](np.asarray(colours())))


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, rows):
    """An RGBA picture of this size by its header, with so many bytes of rows."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(bytes(rows), 1))
    return b"\x89PNG\r\n\x1a\n" + header + body + chunk(b"IEND", b"")


def in_memory(picture, file_format, **options):
    file = io.BytesIO()
    picture.save(file, file_format, **options)
    return file.getvalue()


def many_scans():
    """A progressive JPEG whose last scan comes 200 times."""
    data = in_memory(colours(), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * 200 + data[-2:]


FRAMES = {"save_all": True, "append_images": [Image.new("RGB", (48, 32))]}
FLOATS = Image.fromarray(np.zeros((2, 2), np.float32))


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "is not a picture"),
        (b"\x89PNG\r\n\x1a\n", "is not a picture"),
        (b"<!DOCTYPE html><html></html>", "is not a picture"),
        (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "is not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not a picture"),
        (in_memory(colours(), "PNG")[:-60], "is truncated or damaged"),
        (in_memory(colours(), "JPEG")[:-60], "is truncated or damaged"),
        (in_memory(colours(), "WEBP")[:-60], "is truncated or damaged"),
        (png(64, 64, 1), "is truncated or damaged"),
        (png(10_000, 10_001, 1), "has 10000 × 10001 pixels; up to 50,000,000 are allowed"),
        (png(20_000, 20_000, 1), "has too many pixels; up to 50,000,000 are allowed"),
        (png(2**31 - 1, 2**31 - 1, 1), "has too many pixels"),
        (in_memory(colours(), "GIF", **FRAMES), "is animated or holds several"),
        (in_memory(colours(), "PNG", **FRAMES), "is animated or holds several"),
        (in_memory(colours(), "WEBP", **FRAMES), "is animated or holds several"),
        (in_memory(colours(), "TIFF", **FRAMES), "is animated or holds several"),
        (in_memory(FLOATS, "TIFF"), "has 32 bits per channel"),
        (many_scans(), "is a JPEG of more than 100 scans"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_what_is_no_harmless_picture_is_refused_in_one_line(data, told, tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(data)
    for name in ("image", "mask"):
        with pytest.raises(RequestError) as error:
            read_image(name, file)
        assert str(error.value).startswith(f"{name}: {told}")
        assert str(error.value).isprintable() and str(tmp_path) not in str(error.value)


def test_files_that_are_not_there_or_too_large_are_refused(tmp_path):
    large = tmp_path / "large.png"
    with large.open("wb") as file:
        file.truncate(PICTURE_BYTES + 1)
    for path, told in [
        (large, "is too large a file; up to 50,000,000 bytes"),
        (Path("/dev/zero"), "is too large a file"),
        (tmp_path / "none.png", "can't be read (No such file or directory)"),
        (tmp_path, "can't be read (Is a directory)"),
        (Path("\0"), "can't be read (embedded null byte)"),
    ]:
        with pytest.raises(RequestError) as error:
            read_image("image", path)
        assert str(error.value).startswith(f"image: {told}")


def test_a_photograph_with_a_second_picture_behind_it_is_read(tmp_path):
    file = saved(colours(), tmp_path / "phone.jpg", "MPO", quality=95, **FRAMES)
    picture, _ = read_image("image", file)
    assert np.abs(pixels(picture) - pixels(colours())).max() < 60


def fuzz(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(FUZZER.parents[1])}
    command = [sys.executable, FUZZER, *map(str, arguments)]
    told = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr[-2000:]
    return json.loads(told.stdout)


def test_2000_damaged_files_are_read_or_refused():
    result = fuzz(2000)
    assert result["read"] + result["refused"] == 2000
    assert min(result["read"], result["refused"]) > 100
    assert result["bytes"] < 1e9


@pytest.mark.slow
def test_the_largest_pictures_take_less_than_a_gigabyte(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    clear = Image.new("RGBA", (16_000, 3_000), (10, 20, 30, 40))
    clear.save(tmp_path / "a.png", compress_level=1, exif=exif)
    clear.save(tmp_path / "a.webp", lossless=True, quality=0, method=0, exif=exif)
    clear.convert("CMYK").save(tmp_path / "a.jpg", progressive=True, exif=exif)
    for file in sorted(tmp_path.iterdir()):
        result = fuzz(0, file)
        assert (result["read"], result["refused"]) == (1, 0)
        assert 1e8 < result["bytes"] < 1e9


@pytest.mark.parametrize(
    ("sent", "made"),
    [
        ((512, 512), (512, 512)),
        ((500, 700), (512, 704)),
        ((1, 1), (64, 64)),
        ((4032, 3024), (1024, 768)),
        ((3024, 4032), (768, 1024)),
        ((6000, 4000), (1024, 704)),
        ((1000, 1000), (832, 832)),
        ((10_000, 10), (1024, 64)),
    ],
)
def test_without_a_size_the_picture_keeps_its_own(sent, made):
    assert fitted_size(Request(), sent) == made
    assert fitted_size(Request(width=512, height=512), sent) == made


def test_every_size_of_its_own_can_be_asked_for_and_has_nearly_its_shape():
    for width in range(60, 3000, 37):
        for height in range(60, 3000, 41):
            made = fitted_size(Request(), (width, height))
            assert set(made) <= set(SIDES) and made[0] * made[1] <= PIXELS
            scale = min(1, SIDES[-1] / max(width, height), (PIXELS / (width * height)) ** 0.5)
            assert all(
                abs(side - max(64, sent * scale)) <= 96
                for side, sent in zip(made, (width, height), strict=True)
            )


def test_a_size_that_is_asked_for_is_made():
    assert fitted_size(Request(width=64), (3000, 2000)) == (64, 512)
    assert fitted_size(Request(width=1024, height=768), (30, 20)) == (1024, 768)


def test_pictures_cover_the_size_and_are_cropped_in_the_middle(tmp_path):
    file = saved(colours(300, 100), tmp_path / "wide.png")
    start = open_start(Request(image=file, width=64, height=64))
    whole = colours(300, 100).crop((100, 0, 200, 100)).resize((64, 64), Image.Resampling.LANCZOS)
    assert start.repainted is None
    assert np.abs(pixels(start.picture) - pixels(whole)).max() <= 1
    exact = open_start(Request(image=saved(colours(128, 64), tmp_path / "exact.png")))
    assert np.array_equal(exact.picture, colours(128, 64))
    assert open_start(Request()) is None


def half(width, height):
    """White on the right."""
    mask = Image.new("L", (width, height))
    mask.paste(255, (width // 2, 0, width, height))
    return mask


@pytest.mark.parametrize("mask", [half(300, 100), half(150, 50), half(600, 200).convert("RGB")])
def test_a_mask_is_cropped_as_its_picture_and_has_no_greys(mask, tmp_path):
    image, file = saved(colours(300, 100), tmp_path / "image"), saved(mask, tmp_path / "mask")
    start = open_start(Request(image=image, mask=file, width=64, height=64))
    assert np.array_equal(start.repainted, half(64, 64))


def test_a_mask_with_loss_keeps_black_and_white(tmp_path):
    image = saved(colours(64, 64), tmp_path / "image")
    drawn = Image.new("L", (64, 64))
    drawn.paste(255, (0, 0, 29, 64))
    mask = saved(drawn, tmp_path / "mask", "JPEG", quality=30)
    assert set(np.unique(Image.open(mask))) - {0, 255}
    start = open_start(Request(image=image, mask=mask))
    assert np.array_equal(start.repainted, drawn)


def test_a_transparent_part_of_a_mask_is_repainted(tmp_path):
    hole = Image.new("RGBA", (64, 64), "black")
    hole.paste((0, 0, 0, 0), (32, 0, 64, 64))
    image = saved(colours(64, 64), tmp_path / "image")
    start = open_start(Request(image=image, mask=saved(hole, tmp_path / "mask")))
    assert np.array_equal(start.repainted, half(64, 64))


@pytest.mark.parametrize(
    ("mask", "told"),
    [
        (Image.new("L", (300, 110), 255), "is 300 × 110, another shape than the picture's 300 × 100"),
        (Image.new("L", (100, 300), 255), "is 100 × 300, another shape"),
        (Image.new("L", (300, 100), 0), "has nothing white"),
    ],
)
def test_a_mask_that_can_not_be_meant_is_refused(mask, told, tmp_path):
    image, file = saved(colours(300, 100), tmp_path / "image"), saved(mask, tmp_path / "mask")
    with pytest.raises(RequestError) as error:
        open_start(Request(image=image, mask=file))
    assert str(error.value).startswith(f"mask: {told}")


def test_kept_pixels_carry_no_mark_and_the_file_says_what_it_was_made_from(tmp_path):
    image, mask = saved(gradient(512), tmp_path / "image"), saved(half(512, 512), tmp_path / "mask")
    start = open_start(Request(image=image, mask=mask))
    write_image(gradient(512), tmp_path / "made.png", PARAMETERS, start)
    made = Image.open(tmp_path / "made.png")
    kept = pixels(half(512, 512)) == 0
    assert np.array_equal(pixels(made)[kept], pixels(gradient(512))[kept])
    assert not np.array_equal(pixels(made)[~kept], pixels(gradient(512))[~kept])
    assert watermark.detect(made).found
    parameters = read_parameters(tmp_path / "made.png")
    assert (parameters.image_hash, parameters.mask_hash) == (start.image_hash, start.mask_hash)
    assert len({start.image_hash, start.mask_hash}) == 2
