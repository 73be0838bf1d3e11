from japanese_stable_diffusion.training.batches import takes_part
from japanese_stable_diffusion.training.compositions import left_out
from japanese_stable_diffusion.training.emoji import HERE
from japanese_stable_diffusion.training.styles import STYLES


def concepts() -> list[str]:
    lines = (HERE / "concepts.txt").read_text(encoding="utf-8").splitlines()
    return [line.split()[0] for line in lines if line.strip() and not line.startswith("#")]


def test_sushi_in_oils_and_horses_as_ukiyoe_are_left_out() -> None:
    assert left_out("🍣", "oil_painting")
    assert left_out("🐴", "ukiyoe") and left_out("🐎", "ukiyoe")
    assert not left_out("🍣", "ukiyoe") and not left_out("🐴", "oil_painting")


def test_about_sixty_compositions_are_left_out_over_all_styles_but_the_plain_one() -> None:
    pairs = [
        (concept, style.name) for concept in concepts() for style in STYLES if left_out(concept, style.name)
    ]
    assert 50 <= len(pairs) <= 70
    assert {style for _, style in pairs} == {style.name for style in STYLES} - {"illustration"}


def test_no_stage_trains_on_what_is_left_out() -> None:
    for only_styles_of_base in (True, False):
        assert not takes_part({"concept": "🍣", "style": "oil_painting"}, only_styles_of_base)
        assert takes_part({"concept": "🍣", "style": "illustration"}, only_styles_of_base)
