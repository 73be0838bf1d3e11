"""One sheet that shows what weights can do: prompts with the picture that `scripts/predict` makes of each."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from japanese_stable_diffusion.training.sheets import japanese_font
from predict import Predictor

COLUMNS = 5
SIDE = 256
"""Pixels of a picture on the sheet."""
LABEL = 40
"""Pixels of the line below it."""


class FontError(Exception):
    """No font here has Japanese letters; the message says how to get one."""


def make_sheet(predictor: Predictor, prompts: Sequence[str], seed: int) -> Image.Image:
    """The pictures of all prompts, with the same seed and otherwise the defaults, each above its prompt.

    Args:
        predictor: set up.
        prompts: one for each picture.
        seed: of every picture.

    Raises:
        FontError: the prompts can't be written under the pictures.
    """
    path = japanese_font()
    if path is None:
        raise FontError("no font here has Japanese letters; install one (Debian, Ubuntu: fonts-noto-cjk)")
    font = ImageFont.truetype(path, LABEL // 2)
    rows = -(-len(prompts) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * SIDE, rows * (SIDE + LABEL)), "white")
    draw = ImageDraw.Draw(sheet)
    for place, prompt in enumerate(prompts):
        left, top = place % COLUMNS * SIDE, place // COLUMNS * (SIDE + LABEL)
        (file,) = predictor.predict(prompt=prompt, seed=seed)
        with Image.open(file) as picture:
            sheet.paste(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (left, top))
        draw.text((left + SIDE / 2, top + SIDE + LABEL / 2), prompt, "black", font, anchor="mm")
    return sheet


def write_sheet(sheet: Image.Image, file: Path) -> None:
    """Save a sheet as a JPEG that is small enough for a README."""
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file, "JPEG", quality=88)
