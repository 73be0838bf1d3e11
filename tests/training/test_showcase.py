"""The README's picture: prompts, each with what the Predictor makes of it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from japanese_stable_diffusion.training.sheets import japanese_font
from japanese_stable_diffusion.training.showcase import LABEL, SIDE, FontError, make_sheet, write_sheet
from predict import Predictor


@pytest.fixture
def predictor(tmp_path: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch) -> Predictor:
    """Set up with the tiny model as one that works at 64 pixels, which is fast."""
    folder = tmp_path / "weights"
    shutil.copytree(tiny_weights, folder)
    (folder / "manifest.json").write_text(json.dumps({"name": "tiny", "native_size": 64, "enlarge": 8}))
    monkeypatch.setenv("JSD_WEIGHTS", str(folder))
    predictor = Predictor()
    predictor.setup()
    return predictor


@pytest.mark.slow
def test_each_picture_stands_above_its_prompt(predictor: Predictor, tmp_path: Path) -> None:
    prompts = ["猫", "富士山 浮世絵", "寿司", "桜", "鬼", "達磨"]
    if japanese_font() is None:
        with pytest.raises(FontError, match="fonts-noto-cjk"):
            make_sheet(predictor, prompts, seed=1)
        return
    sheet = make_sheet(predictor, prompts, seed=1)
    assert sheet.size == (5 * SIDE, 2 * (SIDE + LABEL))

    (alone,) = predictor.predict(prompt="達磨", seed=1)
    expected = Image.open(alone).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    top = SIDE + LABEL
    assert np.array_equal(sheet.crop((0, top, SIDE, top + SIDE)), expected)
    labels = [sheet.crop((place * SIDE, SIDE, (place + 1) * SIDE, SIDE + LABEL)) for place in range(5)]
    assert all(label.getextrema()[0] == (0, 255) for label in labels)
    assert len({label.tobytes() for label in labels}) == 5
    assert sheet.crop((SIDE, top, 5 * SIDE, 2 * top)).getextrema() == ((255, 255),) * 3

    write_sheet(sheet, tmp_path / "new" / "sheet.jpg")
    with Image.open(tmp_path / "new" / "sheet.jpg") as written:
        assert (written.format, written.size) == ("JPEG", sheet.size)
