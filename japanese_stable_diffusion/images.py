"""Write what we made."""

import tempfile
from pathlib import Path

from PIL import Image

from japanese_stable_diffusion import provenance, watermark

_FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}
"""Our output formats → Pillow's names."""


def output_folder() -> "tempfile.TemporaryDirectory[str]":
    """A new folder for the pictures of one prediction; `cleanup()` or the end of the process removes it."""
    return tempfile.TemporaryDirectory(prefix="japanese-stable-diffusion-")


def write_image(image: Image.Image, path: Path, parameters: provenance.Parameters) -> None:
    """Write a picture in the format asked for, with the invisible watermark and what it was made with.

    Args:
        image: RGB.
        path: of the new file.
        parameters: with which the picture can be made again.
    """
    file_format = _FORMATS[parameters.request.output_format]
    options = provenance.save_options(file_format, parameters)
    if file_format != "PNG":
        options["quality"] = parameters.request.output_quality
    watermark.embed(image).save(path, format=file_format, **options)
