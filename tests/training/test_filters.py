"""Filters: what each refuses, that it is counted, and that nothing else is."""

import io
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
)

from japanese_stable_diffusion.training.filters import (
    BATCH,
    FilterError,
    Filters,
    Limits,
    Scorer,
    Seen,
    is_japanese,
    perceptual_hash,
    wrong_size,
)
from japanese_stable_diffusion.training.samples import Sample
from japanese_stable_diffusion.training.styles import Pixels

ANYTHING = Limits(japanese=0, min_side=0, max_ratio=100, duplicates=-1)


def photograph(number: int, size: int = 96) -> Pixels:
    """Coloured clouds: different numbers look different, as different photographs do."""
    colours = np.random.default_rng(number).integers(0, 256, (7, 7, 3), np.uint8)
    return np.asarray(Image.fromarray(colours).resize((size, size), Image.Resampling.BICUBIC))


def sample(number: int, caption: str = "写真です", picture: Pixels | None = None) -> Sample:
    return Sample(str(number), photograph(number) if picture is None else picture, (caption,), ())


def passing(limits: Limits, samples: list[Sample], folder: Path) -> tuple[list[str], Counter[str]]:
    filters, refused = Filters(limits, folder / "seen.sqlite", 0), Counter[str]()
    kept = [sample.key for sample in filters.passing(samples, 0, refused)]
    filters.close()
    return kept, refused


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        ("富士山の写真", "", True),
        ("ｶﾀｶﾅ", "", True),
        ("SF映画「Cyberpunk」のポスター", "", True),
        ("髙島屋", "", True),
        ("富士山", "", True),
        ("富士山", "ja", True),
        ("富士山", "zh", False),
        ("ラーメン", "zh", True),
        ("苹果手机图片", "", False),
        ("Mount Fuji in winter", "", False),
        ("Nikon D750 digital camera の body", "", False),
        ("서울의 사진", "", False),
        ("2022 / 12", "", False),
        ("", "", False),
    ],
)
def test_is_japanese(text: str, language: str, expected: bool) -> None:
    assert is_japanese(text, 0.3, language) is expected


def test_no_share_takes_any_caption() -> None:
    assert is_japanese("Mount Fuji", 0) and is_japanese("", 0)


def test_the_share_counts_letters_only() -> None:
    assert is_japanese("abc 日本語 123!?", 0.5) and not is_japanese("abc 日本語 123!?", 0.51)


@pytest.mark.parametrize(
    ("width", "height", "wrong"),
    [
        (64, 64, None),
        (63, 200, "size"),
        (200, 63, "size"),
        (64, 128, None),
        (64, 129, "shape"),
        (129, 64, "shape"),
    ],
)
def test_size_and_shape(width: int, height: int, wrong: str | None) -> None:
    assert wrong_size(width, height, replace(ANYTHING, min_side=64, max_ratio=2)) == wrong


def test_a_hash_hardly_changes_when_a_picture_is_scaled_and_compressed() -> None:
    hashes = []
    for number in range(12):
        picture = Image.fromarray(photograph(number))
        encoded = io.BytesIO()
        picture.resize((70, 70)).save(encoded, "JPEG", quality=60)
        again = np.asarray(Image.open(encoded).convert("RGB"))
        hashes.append(perceptual_hash(photograph(number)))
        assert (hashes[-1] ^ perceptual_hash(again)).bit_count() <= 3
    apart = [(one ^ other).bit_count() for i, one in enumerate(hashes) for other in hashes[:i]]
    assert min(apart) > 10


@pytest.mark.parametrize("distance", range(4))
def test_near_pictures_are_found_as_by_comparing_with_all(distance: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(distance)
    values: list[int] = []
    for _ in range(40):
        value = int(rng.integers(0, 1 << 63))
        flips = rng.permutation(64)[: rng.integers(0, 6)]
        values += [value, value ^ sum(1 << int(flip) for flip in flips)]
    seen = Seen(tmp_path / "seen.sqlite", distance)
    kept: list[int] = []
    for value in values:
        new = all((value ^ other).bit_count() > distance for other in kept)
        assert seen.add(value, 0) is new
        if new:
            kept.append(value)
    assert 40 <= len(kept) < len(values)
    seen.close()


def test_each_reason_is_counted(tmp_path: Path) -> None:
    wide = Sample("w", photograph(1)[:30], ("横長",), ())
    samples = [sample(0), sample(1, "no Japanese"), sample(2, picture=photograph(2, 20)), wide, sample(0)]
    limits = Limits(japanese=0.3, min_side=24, max_ratio=2, duplicates=0)
    kept, refused = passing(limits, samples, tmp_path)
    assert kept == ["0"]
    assert refused == {"caption": 1, "size": 1, "shape": 1, "duplicate": 1}


def test_the_size_is_that_of_the_picture_as_it_was_found(tmp_path: Path) -> None:
    small = replace(sample(0), facts={"width": 40, "height": 500})
    assert passing(replace(ANYTHING, min_side=64), [small], tmp_path)[1] == {"size": 1}


def test_one_japanese_caption_among_several_is_enough(tmp_path: Path) -> None:
    several = replace(sample(0), japanese=("OK", "了解です"))
    assert passing(replace(ANYTHING, japanese=0.5), [several], tmp_path)[0] == ["0"]


def test_order_is_kept_over_many_batches(tmp_path: Path) -> None:
    samples = [sample(number, picture=photograph(number, 8)) for number in range(2 * BATCH + 5)]
    kept, refused = passing(ANYTHING, samples, tmp_path)
    assert kept == [sample.key for sample in samples] and not refused


def test_duplicates_are_known_over_shards_and_runs(tmp_path: Path) -> None:
    limits, refused = replace(ANYTHING, duplicates=2), Counter[str]()

    def run(first: int, shard: int, numbers: list[int]) -> list[str]:
        filters = Filters(limits, tmp_path / "seen.sqlite", first)
        kept = [found.key for found in filters.passing(map(sample, numbers), shard, refused)]
        filters.close()
        return kept

    assert run(0, 0, [0, 1]) == ["0", "1"]
    assert run(1, 1, [1, 2]) == ["2"]
    # Shard 1 is made again, so it isn't a duplicate of itself.
    assert run(1, 1, [1, 2]) == ["2"]
    assert refused == {"duplicate": 2}


def test_duplicates_that_are_forgotten_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(FilterError, match=r"seen\.sqlite: missing"):
        Filters(replace(ANYTHING, duplicates=0), tmp_path / "seen.sqlite", 1)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("japanese", 1.1, "japanese: 1.1 .* 0 to 1 is allowed"),
        ("min_side", -1, "min-side: -1 .* 0 and more are allowed"),
        ("max_ratio", 0.9, "max-ratio: 0.9 .* 1 and more are allowed"),
        ("max_ratio", float("nan"), "max-ratio: nan"),
        ("duplicates", 4, r"duplicates: 4 bits; -1 \(all stay\) to 3 is allowed"),
        ("min_similarity", 2.0, "min-similarity: 2.0 .* -1 to 1 is allowed"),
        ("scorer", Path("clip"), "scorer: .* give both"),
    ],
)
def test_limits_that_make_no_sense_are_refused(name: str, value: object, message: str) -> None:
    with pytest.raises(FilterError, match=message):
        replace(ANYTHING, **{name: value})  # type: ignore[arg-type]


TEXT = {
    "vocab_size": 5,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
VISION = {"image_size": 32, "patch_size": 16} | {
    name: size for name, size in TEXT.items() if name != "vocab_size"
}


def save_scorer(folder: Path, kind: str) -> Path:
    """A tiny random CLIP or SigLIP, with a tokenizer that knows three words."""
    torch.manual_seed(0)
    text = TEXT | {"max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    model: CLIPModel | SiglipModel
    if kind == "clip":
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8))
        CLIPImageProcessorPil(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        ).save_pretrained(folder)
    else:
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=VISION))
        SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    # As initialised, everything looks alike to these models.
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.5
    model.save_pretrained(folder)
    words = {"<pad>": 0, "</s>": 1, "猫": 2, "犬": 3, "富士山": 4}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="</s>", eos_token="</s>", model_max_length=8
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_scorer(tmp_path_factory.mktemp("clip"), "clip")


def test_similarity_is_the_cosine_of_clip_s_features(clip: Path) -> None:
    pictures, captions = [photograph(n) for n in range(3)], ["猫", "犬", "富士山"]
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPImageProcessorPil.from_pretrained(clip)
    pixels = processor([Image.fromarray(picture) for picture in pictures], return_tensors="pt")[
        "pixel_values"
    ]
    ids = torch.tensor([[word] + [1] * 7 for word in (2, 3, 4)])
    mask = (torch.arange(8) < 1).long().expand(3, 8)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits_per_image
        expected = (logits / model.logit_scale.exp()).diagonal().numpy()
    similarities = Scorer(clip).similarities(pictures, captions)
    assert similarities == pytest.approx(expected, abs=1e-5)
    assert np.ptp(similarities) > 0.01


def test_siglip_scores_too(tmp_path: Path) -> None:
    scorer = Scorer(save_scorer(tmp_path, "siglip"))
    similarities = scorer.similarities([photograph(0), photograph(0)], ["猫", "富士山"])
    assert similarities.shape == (2,) and abs(similarities[0] - similarities[1]) > 1e-3
    assert (np.abs(similarities) <= 1).all()


def test_pictures_unlike_their_captions_are_refused(clip: Path, tmp_path: Path) -> None:
    words = ("猫", "犬", "富士山")
    samples = [sample(number, words[number % 3]) for number in range(6)]
    scores = Scorer(clip).similarities([s.pixels() for s in samples], [s.japanese[0] for s in samples])
    threshold = float(np.median(scores))
    limits = replace(ANYTHING, scorer=clip, min_similarity=threshold)
    refused = Counter[str]()
    kept = list(Filters(limits, tmp_path / "seen.sqlite", 0).passing(samples, 0, refused))
    assert [int(s.key) for s in kept] == [n for n, score in enumerate(scores) if score >= threshold]
    assert refused == {"similarity": 3}
    assert [s.facts["similarity"] for s in kept] == [round(float(scores[int(s.key)]), 4) for s in kept]


def test_a_refused_picture_may_come_again_with_a_better_caption(clip: Path, tmp_path: Path) -> None:
    words = ("猫", "犬", "富士山")
    scores = Scorer(clip).similarities([photograph(0)] * 3, list(words))
    worst, best = words[int(scores.argmin())], words[int(scores.argmax())]
    limits = replace(ANYTHING, scorer=clip, min_similarity=float(scores.max()) - 1e-4, duplicates=0)
    kept, refused = passing(limits, [sample(0, worst), replace(sample(0, best), key="again")], tmp_path)
    assert kept == ["again"] and refused == {"similarity": 1}


def test_a_folder_without_a_scorer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FilterError, match=r"no config\.json; a scorer is a folder with a CLIP-like model"):
        Scorer(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FilterError, match="transformers can't load this scorer"):
        Scorer(tmp_path)


def test_a_model_that_only_reads_is_no_scorer(clip: Path, tmp_path: Path) -> None:
    for file in clip.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    BertModel(BertConfig(**TEXT)).save_pretrained(tmp_path)
    with pytest.raises(FilterError, match="BertModel can't score pictures; give a CLIP-like model"):
        Scorer(tmp_path)
