"""What every source of training data yields."""

from __future__ import annotations

import io
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from .styles import Pixels


@dataclass(frozen=True)
class File:
    """A picture as a file: its bytes, and the ending (``png``, ``jpg``) that says how to read them."""

    kind: str
    content: bytes

    def pixels(self) -> Pixels:
        """The picture: (height, width, 3), uint8 RGB."""
        with Image.open(io.BytesIO(self.content)) as picture:
            return np.asarray(picture.convert("RGB"))


@dataclass(frozen=True)
class Sample:
    """A picture with the captions that a person might give it in each language.

    ``picture`` is (height, width, 3) uint8 RGB, or a file that goes into the shard as it is. ``key``
    is unique within a source and has no dot (webdataset takes what follows the first dot for the
    kind of file). ``facts`` go into the sample's .json unchanged: licence, author, and what the
    source knows of the picture; ``width`` and ``height`` among them are those that the picture had
    before it was made to fit.
    """

    key: str
    picture: Pixels | File
    japanese: tuple[str, ...]
    english: tuple[str, ...]
    facts: dict[str, str | int | float] = field(default_factory=dict)

    def pixels(self) -> Pixels:
        """The picture: (height, width, 3), uint8 RGB."""
        return self.picture.pixels() if isinstance(self.picture, File) else self.picture

    def file(self) -> File:
        """The picture as a file; one that isn't a file yet becomes a PNG."""
        if isinstance(self.picture, File):
            return self.picture
        encoded = io.BytesIO()
        Image.fromarray(self.picture).save(encoded, "PNG")
        return File("png", encoded.getvalue())
