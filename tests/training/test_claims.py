import pytest

from japanese_stable_diffusion.training.claims import Claims, read_claims
from japanese_stable_diffusion.training.compositions import left_out
from japanese_stable_diffusion.training.emoji import HERE
from japanese_stable_diffusion.training.styles import STYLES

CLAIMS = read_claims()


def words_of_concepts() -> dict[str, list[str]]:
    lines = (HERE / "concepts.txt").read_text(encoding="utf-8").splitlines()
    rows = [line.split() for line in lines if line.strip() and not line.startswith("#")]
    return {concept: words for concept, *words in rows}


def test_there_are_the_four_claims() -> None:
    assert [claims.name for claims in CLAIMS] == [
        "japanese_styles",
        "japanglish",
        "onomatopoeia",
        "proper_nouns",
    ]


@pytest.mark.parametrize("claims", CLAIMS, ids=lambda claims: claims.name)
def test_every_prompt_asks_for_something_that_is_taught(claims: Claims) -> None:
    words = words_of_concepts()
    styles = {style.name: style for style in STYLES}
    assert len({claim.prompt for claim in claims.prompts}) == len(claims.prompts) >= 20
    for claim in claims.prompts:
        assert set(claim.concepts) <= set(words), claim
        assert any(word in claim.prompt for concept in claim.concepts for word in words[concept]), claim
        named = [
            name for name, style in styles.items() if any(word in claim.prompt for word in style.japanese)
        ]
        assert claim.style in ([None, "illustration"] if named in ([], ["illustration"]) else named), claim
        assert not any(left_out(concept, claim.style or "illustration") for concept in claim.concepts), claim


def test_the_styles_that_are_claimed_are_those_that_the_base_never_saw() -> None:
    unseen = {style.name for style in STYLES if not style.in_base}
    assert {claim.style for claim in CLAIMS[0].prompts} == unseen


@pytest.mark.parametrize(
    ("name", "prompts"),
    [
        ("japanglish", ["サラリーマン", "コンセント", "マンション"]),
        ("onomatopoeia", ["ニコニコ", "キラキラ", "ワンワン", "ザーザー"]),
        ("proper_nouns", ["富士山", "東京タワー", "こいのぼり", "天狗"]),
    ],
)
def test_the_known_examples_are_among_them(name: str, prompts: list[str]) -> None:
    claims = next(claims for claims in CLAIMS if claims.name == name)
    assert set(prompts) <= {claim.prompt for claim in claims.prompts}
