"""Write what we made."""

from pathlib import Path

from PIL import Image

from japanese_stable_diffusion import provenance, watermark


def write_image(image: Image.Image, path: Path, parameters: provenance.Parameters) -> None:
    """Write a picture as a PNG file, with the invisible watermark and what it was made with.

    Args:
        image: RGB.
        path: ends in `.png`.
        parameters: with which the picture can be made again.
    """
    watermark.embed(image).save(path, format="PNG", **provenance.save_options("PNG", parameters))
