"""What every source of training data yields."""

from __future__ import annotations

from dataclasses import dataclass, field

from .styles import Pixels


@dataclass(frozen=True)
class Sample:
    """A picture with the captions that a person might give it in each language.

    ``picture`` is (height, width, 3) uint8 RGB. ``key`` is unique within a source and has no dot
    (webdataset takes what follows the first dot for the kind of file). ``facts`` go into the
    sample's .json unchanged: licence, author, and what the source knows of the picture.
    """

    key: str
    picture: Pixels
    japanese: tuple[str, ...]
    english: tuple[str, ...]
    facts: dict[str, str] = field(default_factory=dict)
