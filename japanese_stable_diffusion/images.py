"""Write what we made."""

from pathlib import Path

from PIL import Image


def write_image(image: Image.Image, folder: Path, index: int) -> Path:
    """Write a picture as `output.<index>.png` into a folder, and return its path."""
    path = folder / f"output.{index}.png"
    image.save(path)
    return path
