"""Open what a stranger sent, write what we made."""

import hashlib
import io
import math
import tempfile
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from japanese_stable_diffusion import provenance, watermark
from japanese_stable_diffusion.request import (
    PICTURE_BYTES,
    PICTURE_PIXELS,
    PIXELS,
    SIDES,
    Request,
    RequestError,
)

READABLE = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""Formats that pictures may be sent in, as Pillow calls them; it knows others that nobody sends."""
JPEG_SCANS = 100
"""Most passes over a JPEG picture. Each of a few bytes can make the decoder go over all its pixels."""

_ALLOWED = "a still picture as PNG, JPEG, WebP, GIF, BMP, TIFF or AVIF is allowed"
_FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}
"""Our output formats → Pillow's names."""


@dataclass(frozen=True)
class Start:
    """What a request starts from, at the size that it asks for.

    Attributes:
        picture: RGB.
        repainted: L, 255 where the picture is painted anew and 0 where it is kept; None to paint all of it.
        image_hash: of the file that was sent, the first 16 hexadecimal digits of its SHA-256.
        mask_hash: likewise; empty without a mask.
    """

    picture: Image.Image
    repainted: Image.Image | None
    image_hash: str
    mask_hash: str


def open_start(request: Request) -> Start | None:
    """Read the picture and the mask of a request and fit them to its size; None if it has no picture.

    Raises:
        RequestError: one of them can't be read, or they don't belong together; the message names the input.
    """
    if request.image is None:
        return None
    picture, image_hash = read_image("image", request.image)
    sent = picture.size
    size = fitted_size(request, sent)
    picture = ImageOps.fit(picture, size, Image.Resampling.LANCZOS)
    if request.mask is None:
        return Start(picture, None, image_hash, "")
    mask, mask_hash = read_image("mask", request.mask)
    if not _have_one_shape(mask.size, sent):
        raise RequestError(
            f"mask: is {mask.width} × {mask.height}, another shape than the picture's {sent[0]} × {sent[1]}; "
            "a mask of the picture's size is allowed, or the same smaller or larger"
        )
    grey = ImageOps.fit(mask.convert("L"), size, Image.Resampling.BILINEAR)
    repainted = grey.point([0] * 128 + [255] * 128)
    if not repainted.getbbox():
        raise RequestError("mask: has nothing white; white is repainted, black is kept")
    return Start(picture, repainted, image_hash, mask_hash)


def read_image(name: str, file: Path) -> tuple[Image.Image, str]:
    """Read a picture file that anybody may have sent.

    Its size is checked before any of its pixels are decoded, so that a small file can't ask for much memory.

    Args:
        name: of the input, for messages; the file's own name says nothing to a caller over HTTP.
        file: read as a picture whatever it is called.

    Returns:
        The picture in RGB, upright as its EXIF orientation says and with transparency laid on white, and the
        first 16 hexadecimal digits of the file's SHA-256.

    Raises:
        RequestError: it isn't a whole still picture within the limits.
    """
    data = _read(name, file)
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            Image.open(io.BytesIO(data), formats=READABLE) as opened,
        ):
            _check(name, opened, data)
            ImageOps.exif_transpose(opened, in_place=True)
            return _on_white(opened), hashlib.sha256(data).hexdigest()[:16]
    except RequestError:
        raise
    except UnidentifiedImageError:
        raise RequestError(f"{name}: is not a picture that can be read; {_ALLOWED}") from None
    except Image.DecompressionBombError:
        raise RequestError(f"{name}: has too many pixels; up to {PICTURE_PIXELS:,} are allowed") from None
    except Exception:  # whatever Pillow's decoders stumble over in damaged data
        raise RequestError(f"{name}: is truncated or damaged; {_ALLOWED}") from None


def fitted_size(request: Request, picture: tuple[int, int]) -> tuple[int, int]:
    """Width and height that a request makes of a picture of this width and height, all in pixels.

    A request for the default size, which is also what one without a size looks like, means the picture's own:
    rounded to multiples of 64, and scaled down if that is more than can be asked for.
    """
    if (request.width, request.height) != (Request.width, Request.height):
        return request.width, request.height
    scale = min(1.0, SIDES[-1] / max(picture), math.sqrt(PIXELS / math.prod(picture)))
    unit = SIDES[0]
    while True:
        width, height = (max(unit, round(side * scale / unit) * unit) for side in picture)
        if width * height <= PIXELS:
            return width, height
        # Rounding up went over the limit.
        scale *= 0.99


def output_folder() -> "tempfile.TemporaryDirectory[str]":
    """A new folder for pictures; `cleanup()` or the end of the process removes it."""
    return tempfile.TemporaryDirectory(prefix="japanese-stable-diffusion-")


def empty(folder: str) -> None:
    """Remove a folder's files, but not the folder: were this cancelled half-way, the next one would go on.

    A folder that is gone is made again, for machines clean up temporary files that lie unused.
    """
    Path(folder).mkdir(mode=0o700, exist_ok=True)
    for path in Path(folder).iterdir():
        path.unlink()


def write_image(
    image: Image.Image, path: Path, parameters: provenance.Parameters, start: Start | None = None
) -> None:
    """Write a picture in the format asked for, with the invisible watermark and what it was made with.

    Pixels that a mask kept carry no watermark: they stay as they were sent.

    Args:
        image: RGB.
        path: of the new file.
        parameters: with which the picture can be made again.
        start: what it was made from, if from a picture.
    """
    marked = watermark.embed(image)
    if start:
        parameters = replace(parameters, image_hash=start.image_hash, mask_hash=start.mask_hash)
        if start.repainted:
            marked = Image.composite(marked, image, start.repainted)
    file_format = _FORMATS[parameters.request.output_format]
    options = provenance.save_options(file_format, parameters)
    if file_format != "PNG":
        options["quality"] = parameters.request.output_quality
    marked.save(path, format=file_format, **options)


def _read(name: str, file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            data = opened.read(PICTURE_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise RequestError(f"{name}: can't be read ({reason}); {_ALLOWED}") from None
    if len(data) > PICTURE_BYTES:
        raise RequestError(f"{name}: is too large a file; up to {PICTURE_BYTES:,} bytes are allowed")
    return data


def _check(name: str, opened: Image.Image, data: bytes) -> None:
    if opened.width * opened.height > PICTURE_PIXELS:
        raise RequestError(
            f"{name}: has {opened.width} × {opened.height} pixels; up to {PICTURE_PIXELS:,} are allowed"
        )
    # MPO is a JPEG of a phone or camera, with a depth map or a preview behind the picture.
    if getattr(opened, "is_animated", False) and opened.format != "MPO":
        raise RequestError(f"{name}: is animated or holds several pictures; {_ALLOWED}")
    if opened.format in ("JPEG", "MPO") and data.count(b"\xff\xda") > JPEG_SCANS:
        raise RequestError(f"{name}: is a JPEG of more than {JPEG_SCANS} scans; {_ALLOWED}")
    if opened.mode in ("I", "F"):
        raise RequestError(f"{name}: has 32 bits per channel; up to 16 are allowed")


def _on_white(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16"):
        # Pillow's own conversion makes white of everything above 255.
        picture = picture.convert("I").point(lambda value: value * (1 / 256)).convert("L")
        picture.info.pop("transparency", None)
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    # Pillow copies a picture that is asked to become what it is: hundreds of megabytes of a large one.
    layer = picture if picture.mode == "RGBA" else picture.convert("RGBA")
    laid = Image.new("RGB", picture.size, "white")
    laid.paste(layer, mask=layer)
    return laid


def _have_one_shape(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether one of two sizes, in pixels, is the other scaled and rounded."""
    return any(
        abs(height - other_height * width / other_width) < 1
        for (width, height), (other_width, other_height) in ((one, other), (one[::-1], other[::-1]))
    )
