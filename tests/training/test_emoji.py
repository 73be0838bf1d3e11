"""Emoji art: what a concept is called, who drew it, and what its pictures look like."""

from pathlib import Path

import numpy as np
import pytest
from small_art import GRIN, WINK, write_art

from japanese_stable_diffusion.training import emoji
from japanese_stable_diffusion.training.samples import Sample
from japanese_stable_diffusion.training.styles import STYLES, Pixels

SIZE = 64
STYLE = {style.name: style for style in STYLES}
PER_DRAWING = sum(emoji.VARIANTS.get(style.name, 1) for style in STYLES)


@pytest.fixture(scope="module")
def art(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_art(tmp_path_factory.mktemp("art"))


@pytest.fixture(scope="module")
def samples(art: Path) -> list[Sample]:
    return list(emoji.samples(art, SIZE, 0, 1))


def test_our_own_names_come_first_and_shared_tags_not_at_all(art: Path) -> None:
    concepts = {concept.emoji: concept for concept in emoji.read_concepts(art)}
    assert concepts[GRIN].japanese == ("笑顔", "にっこり", "えがお", "晴れ晴れ")
    assert concepts[GRIN].english == ("grin", "cheer")
    assert concepts[WINK].japanese == ("まばたき",)
    assert concepts["daruma"].english and concepts["daruma"].english[0].isascii()


def test_no_two_concepts_share_a_name(art: Path) -> None:
    names = [name for concept in emoji.read_concepts(art) for name in concept.japanese]
    assert len(names) == len(set(names))


def test_every_hand_and_style_draws_a_concept(samples: list[Sample]) -> None:
    assert len({sample.key for sample in samples}) == len(samples) == 2 * PER_DRAWING
    assert all("." not in sample.key for sample in samples)
    drawn = {(sample.facts["hand"], sample.facts["style"]) for sample in samples}
    assert drawn == {(hand, style) for hand in ("noto", "fxemoji") for style in STYLE}
    assert {sample.facts["licence"] for sample in samples} == {"Apache-2.0"}
    assert {sample.facts["author"] for sample in samples} == {"Google, Noto Emoji", "Mozilla, FxEmojis"}
    assert {sample.pixels().shape for sample in samples} == {(SIZE, SIZE, 3)}


def test_variants_of_a_drawing_are_placed_differently(samples: list[Sample]) -> None:
    variants = [s.pixels() for s in samples if s.key.startswith("1f600_noto_illustration")]
    assert len(variants) == emoji.VARIANTS["illustration"]
    for number, variant in enumerate(variants):
        assert not any(np.array_equal(variant, other) for other in variants[:number])


def test_the_same_arguments_give_the_same_pictures(art: Path, samples: list[Sample]) -> None:
    again = list(emoji.samples(art, SIZE, 0, 1))
    assert [sample.key for sample in again] == [sample.key for sample in samples]
    assert all(np.array_equal(a.pixels(), b.pixels()) for a, b in zip(again, samples, strict=True))


def test_our_own_drawings_are_ours(art: Path) -> None:
    concepts = emoji.read_concepts(art)
    daruma = next(concept for concept in concepts if concept.emoji == "daruma")
    hands = [hand for hand, svg in emoji.Drawings(art).of(daruma)]
    assert [hand.licence for hand in hands] == ["CC0-1.0"] * 4


def test_captions_name_concept_and_style() -> None:
    japanese = emoji.captions(("猫", "ねこ"), STYLE["ukiyoe"], "ja")
    assert {"猫 浮世絵", "浮世絵の猫", "ねこ、錦絵"} <= set(japanese)
    assert all(("猫" in c or "ねこ" in c) and ("浮世絵" in c or "錦絵" in c) for c in japanese)
    assert emoji.captions(("cat",), STYLE["ukiyoe"], "en") == ("cat, ukiyo-e print", "ukiyo-e print of cat")


def test_the_first_name_comes_up_as_often_as_the_others_together() -> None:
    captions = emoji.captions(("猫", "ねこ", "ネコ"), STYLE["illustration"], "ja")
    assert sum("猫" in caption for caption in captions) * 2 == len(captions)
    assert "猫" in captions and "猫のイラスト" in captions


def test_a_drawing_that_is_not_square_is_centred() -> None:
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 16"><rect width="32" height="16"/></svg>'
    drawing = emoji.rasterize(svg, 64)
    assert drawing.shape == (64, 64, 4)
    rows = np.flatnonzero(drawing[..., 3].any(1))
    assert (rows[0], rows[-1]) == (16, 47)


def test_a_placed_drawing_keeps_its_colours_and_stays_in_the_frame() -> None:
    circle = '<circle cx="4" cy="4" r="4" fill="#e53"/>'
    drawing = emoji.rasterize(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8">{circle}</svg>', 64)
    whole = (drawing[..., 3] > 127).sum()
    for seed in range(20):
        placed: Pixels = emoji.place(drawing, np.random.default_rng(seed))
        alpha = placed[..., 3]
        # Scaled to 0.74 to 0.92 of its side, and not cut off.
        assert 0.53 < (alpha > 127).sum() / whole < 0.87
        assert np.abs(placed[alpha > 200][:, :3].astype(int) - (0xEE, 0x55, 0x33)).max() <= 3


def test_without_npm_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(emoji.ArtError, match=r"^npm: not found; install Node\.js"):
        emoji.read_concepts(tmp_path / "art")
