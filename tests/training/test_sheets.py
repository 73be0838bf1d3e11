from pathlib import Path

import numpy as np
from PIL import Image

from japanese_stable_diffusion.training import sheets
from japanese_stable_diffusion.training.sheets import COLUMNS, ROWS, SIDE, Tile, write_sheets


def tile(colour: tuple[int, int, int], right: bool = True) -> Tile:
    return Tile(
        (np.full((32, 32, 3), colour, np.uint8),), "富士山 浮世絵", "mount fuji, ukiyo-e print", right
    )


def test_tiles_lie_side_by_side_and_go_on_with_the_next_page(tmp_path: Path) -> None:
    tiles = [tile((200, 0, 0)), tile((0, 0, 200))] + [tile((0, 200, 0))] * (COLUMNS * ROWS)
    pages = write_sheets(tiles, tmp_path / "sheets", "row")
    assert [page.name for page in pages] == ["row-1.jpg", "row-2.jpg"]
    page = np.asarray(Image.open(pages[0])).astype(int)
    for place, channel in ((0, 0), (1, 2), (2, 1)):
        centre = page[SIDE // 2, place * (SIDE + 4) + SIDE // 2]
        assert centre[channel] > 180 and centre.sum() < 230
    assert Image.open(pages[1]).height < Image.open(pages[0]).height


def test_right_and_wrong_are_told_by_colour(tmp_path: Path) -> None:
    def text_colour(right: bool) -> np.ndarray:
        (page,) = write_sheets([tile((255, 255, 255), right)], tmp_path, f"row-{right}")
        below = np.asarray(Image.open(page))[SIDE:, :SIDE].astype(int)
        return below.reshape(-1, 3)[below.sum(-1).argmin()]

    right, wrong = text_colour(True), text_colour(False)
    assert right[1] > right[0] and wrong[0] > wrong[1]


def test_pictures_of_a_pair_stay_together(tmp_path: Path) -> None:
    pair = Tile(
        (tile((200, 0, 0)).pictures[0], tile((0, 0, 200)).pictures[0]), "山 0.50", "mountain 0.50", True
    )
    (page,) = write_sheets([pair] * 6, tmp_path, "pairs")
    pixels = np.asarray(Image.open(page)).astype(int)
    assert pixels.shape[1] == 5 * (2 * SIDE + 4)
    assert pixels[64, 64, 0] > 180 and pixels[64, SIDE + 64, 2] > 180


def test_a_font_that_is_found_has_japanese_letters() -> None:
    font = sheets.japanese_font()
    assert font is None or font.is_file()
