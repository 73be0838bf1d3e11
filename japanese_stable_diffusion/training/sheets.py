"""Contact sheets: many small pictures on one page, each with what was asked for and what the judge saw."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from .styles import Pixels

SIDE = 128
LINE = 16
COLUMNS = 10
ROWS = 8
RIGHT, WRONG = (20, 110, 50), (190, 30, 30)


@dataclass(frozen=True)
class Tile:
    """One or more pictures that belong together, with a line of text below.

    ``plain`` is said in place of ``label`` where no font has Japanese letters.
    """

    pictures: tuple[Pixels, ...]
    label: str
    plain: str
    right: bool


@cache
def japanese_font() -> Path | None:
    """A font with Japanese letters, if this machine has one."""
    if not shutil.which("fc-match"):
        return None
    command = ["fc-match", "--format=%{file}\n%{lang}", "Noto Sans CJK JP:lang=ja"]
    file, _, languages = subprocess.run(command, capture_output=True, text=True).stdout.partition("\n")
    return Path(file) if "ja" in languages.split("|") and Path(file).is_file() else None


def write_sheets(tiles: Sequence[Tile], folder: Path, name: str) -> list[Path]:
    """Lay tiles out on pages ``name-1.jpg``, ``name-2.jpg`` …; returns their paths."""
    path = japanese_font()
    font = ImageFont.truetype(str(path), LINE - 4) if path else ImageFont.load_default(LINE - 5)
    folder.mkdir(parents=True, exist_ok=True)
    columns = max(1, COLUMNS // len(tiles[0].pictures)) if tiles else 1
    pages: list[Path] = []
    for first in range(0, len(tiles), columns * ROWS):
        page = tiles[first : first + columns * ROWS]
        width = SIDE * len(tiles[0].pictures) + 4
        rows = -(-len(page) // columns)
        sheet = Image.new("RGB", (columns * width, rows * (SIDE + LINE + 4)), (255, 255, 255))
        draw = ImageDraw.Draw(sheet)
        for number, tile in enumerate(page):
            left, top = number % columns * width, number // columns * (SIDE + LINE + 4)
            for place, picture in enumerate(tile.pictures):
                shown = Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
                sheet.paste(shown, (left + place * SIDE, top))
            text = tile.label if path else tile.plain
            while text and draw.textlength(text, font) > width - 4:
                text = text[:-1]
            draw.text((left + 2, top + SIDE + 1), text, RIGHT if tile.right else WRONG, font)
        pages.append(folder / f"{name}-{len(pages) + 1}.jpg")
        sheet.save(pages[-1], quality=88)
    return pages
