"""Styles: each draws the same picture from the same numbers, and none looks like another."""

from itertools import combinations

import numpy as np
import pytest

from japanese_stable_diffusion.training.emoji import rasterize
from japanese_stable_diffusion.training.styles import STYLES, Pixels, Style

SIZE = 128
CIRCLE = '<circle cx="16" cy="16" r="10" fill="#e53"/>'


@pytest.fixture(scope="module")
def drawing() -> Pixels:
    return rasterize(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">{CIRCLE}</svg>', SIZE)


def draw(style: Style, drawing: Pixels, seed: int = 0) -> Pixels:
    return style.draw(drawing, np.random.default_rng(seed))


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.name)
def test_a_style_is_a_function_of_the_drawing_and_the_seed(style: Style, drawing: Pixels) -> None:
    before = drawing.copy()
    picture = draw(style, drawing)
    assert picture.shape == (SIZE, SIZE, 3) and picture.dtype == np.uint8
    assert np.array_equal(picture, draw(style, drawing))
    assert np.array_equal(drawing, before)


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.name)
def test_a_style_shows_the_drawing(style: Style, drawing: Pixels) -> None:
    nothing = draw(style, np.zeros_like(drawing))
    changed = np.abs(draw(style, drawing).astype(int) - nothing).max(-1) > 40
    assert changed[drawing[..., 3] > 0].mean() > 0.1
    outside = np.zeros((SIZE, SIZE), bool)
    outside[:10] = outside[:, :10] = True
    assert changed[outside].mean() < 0.05


def test_styles_differ_more_than_seeds_do(drawing: Pixels) -> None:
    def distance(one: Pixels, other: Pixels) -> float:
        return float(np.abs(one.astype(int) - other).mean())

    pictures = [draw(style, drawing) for style in STYLES]
    between = min(distance(one, other) for one, other in combinations(pictures, 2))
    assert between > 5


def test_a_word_stands_for_one_style() -> None:
    words = [word for style in STYLES for word in (*style.japanese, *style.english)]
    assert len(words) == len(set(words))
    assert 0 < sum(style.in_base for style in STYLES) < len(STYLES)
