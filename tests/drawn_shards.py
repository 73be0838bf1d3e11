"""Shards of a few simple shapes in a few simple styles, made in a moment and easily told apart."""

from pathlib import Path

import cv2
import numpy as np

from japanese_stable_diffusion.training.samples import Sample
from japanese_stable_diffusion.training.shards import write_shard
from japanese_stable_diffusion.training.styles import Pixels

CONCEPTS = {
    "🐶": ("犬", "dog"),
    "🍣": ("寿司", "sushi"),
    "🗻": ("富士山", "mount fuji"),
    "daruma": ("達磨", "daruma"),
}
STYLES = {
    "illustration": ("", "", (255, 255, 255), 4),
    "oil_painting": (" 油絵", ", oil painting", (150, 90, 40), 2),
    "ukiyoe": (" 浮世絵", ", ukiyo-e print", (40, 80, 160), 2),
}
HANDS = ("noto", "twemoji", "fluent", "emojione", "noto-v1", "fxemoji")
SIZE = 64


def draw(concept: str, hand: str, style: str, variant: int) -> Pixels:
    """A shape for the concept, its tint for the hand, its ground for the style, its place for the variant."""
    ground = STYLES[style][2]
    picture = np.full((SIZE, SIZE, 3), ground, np.uint8)
    tint = (230, 40 * HANDS.index(hand), 30)
    x, y = 32 + (variant % 2) * 8 - 4, 32 + (variant // 2) * 8 - 4
    if concept == "🐶":
        cv2.circle(picture, (x, y), 18, tint, -1)
    elif concept == "🍣":
        cv2.rectangle(picture, (x - 24, y - 6), (x + 24, y + 6), tint, -1)
    elif concept == "🗻":
        cv2.fillPoly(picture, [np.array([(x, y - 20), (x - 22, y + 18), (x + 22, y + 18)])], tint)
    else:
        cv2.line(picture, (x - 18, y - 18), (x + 18, y + 18), tint, 7)
        cv2.line(picture, (x + 18, y - 18), (x - 18, y + 18), tint, 7)
    return picture


def write_drawn_shards(folder: Path) -> None:
    """All concepts by all hands in all styles, as one shard."""
    folder.mkdir(parents=True)
    samples = [
        Sample(
            key=f"{number}_{hand}_{style}_{variant}",
            picture=draw(concept, hand, style, variant),
            japanese=(japanese + in_japanese,),
            english=(english + in_english,),
            facts={"concept": concept, "hand": hand, "style": style},
        )
        for number, (concept, (japanese, english)) in enumerate(CONCEPTS.items())
        for hand in HANDS
        for style, (in_japanese, in_english, _, variants) in STYLES.items()
        for variant in range(variants)
    ]
    write_shard(folder / "drawn-00000.tar", samples)
