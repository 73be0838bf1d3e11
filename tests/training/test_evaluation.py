import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn_shards import CONCEPTS, draw
from PIL import Image
from torch import nn
from transformers import CLIPTextModel

from japanese_stable_diffusion.pipeline import Picture, Pipeline
from japanese_stable_diffusion.request import Request
from japanese_stable_diffusion.training.claims import read_claims
from japanese_stable_diffusion.training.evaluation import (
    MODELS,
    SEEDS_PER_CLAIM,
    Ask,
    Evaluation,
    EvaluationError,
    Row,
    Score,
    Settings,
    describe,
    generate,
    plan,
    same_tensors,
    score,
    shorten,
    targets,
    through_autoencoder,
)
from japanese_stable_diffusion.training.judge import Judge, Verdicts
from japanese_stable_diffusion.training.shards import Shards
from japanese_stable_diffusion.weights import Weights

QUICK = Settings(steps=1, limit=2)
GROUPS = {"🐶": "animals", "🍣": "food", "🗻": "places"}


def ask(concept: str, style: str | None = None, prompt: str = "", seed: int = 0) -> Ask:
    return Ask(prompt, prompt, seed, (concept,), style)


def test_every_model_is_asked_for_the_same_with_the_same_seeds(drawn: Shards) -> None:
    rows = {(row.model, row.name): row.asks for row in plan(drawn)}
    for name in ("things", "styles of the base", "styles new to the base"):
        base, stage1, stage2 = (rows[model, name] for model in MODELS)
        assert stage1 == stage2
        assert [(a.seed, a.concepts, a.style) for a in base] == [
            (a.seed, a.concepts, a.style) for a in stage2
        ]
        assert [a.prompt for a in base] == [a.english for a in stage2] != [a.prompt for a in stage2]
    assert {a.prompt for a in rows["base", "things"]} == {english for _, english in CONCEPTS.values()}
    assert {a.prompt for a in rows["stage2", "things"]} == {japanese for japanese, _ in CONCEPTS.values()}
    assert "富士山 浮世絵" in {a.prompt for a in rows["stage2", "styles new to the base"]}
    assert len({a.seed for a in rows["base", "things"]}) == len(CONCEPTS)


def test_what_training_leaves_out_has_a_row_of_its_own(drawn: Shards) -> None:
    rows = {row.name: row.asks for row in plan(drawn) if row.model == "stage2"}
    assert ("🍣", "oil_painting") in {(a.concepts[0], a.style) for a in rows["compositions left out"]}
    assert not any(a.concepts[0] == "🍣" for a in rows["styles of the base"])
    seeds = [a.seed for a in rows["many seeds"] if a.concepts[0] == "🗻"]
    assert len(set(seeds)) == len(seeds) == 4


def test_all_claims_are_put_to_stage_2(drawn: Shards) -> None:
    rows = {row.name: row.asks for row in plan(drawn) if row.model == "stage2"}
    for claims in read_claims():
        asks = rows[f"claim: {claims.name}"]
        assert [a.prompt for a in asks[::SEEDS_PER_CLAIM]] == [claim.prompt for claim in claims.prompts]
        assert [a.concepts for a in asks[::SEEDS_PER_CLAIM]] == [claim.concepts for claim in claims.prompts]
        assert len({a.seed for a in asks}) == len(asks)


def test_a_quick_look_is_spread_over_the_row() -> None:
    row = Row("base", "things", tuple(ask("🐶", prompt=f"犬{seed}", seed=seed) for seed in range(100)))
    assert [a.seed for a in shorten(row, 3).asks] == [0, 50, 99]
    many = Row(
        "stage2", "many seeds", tuple(ask("🐶", prompt=f"犬{seed // 4}", seed=seed) for seed in range(100))
    )
    assert [a.seed for a in shorten(many, 9).asks] == [0, 1, 2, 3, 96, 97, 98, 99]
    assert [a.seed for a in shorten(many, 2).asks] == [0, 1]
    assert shorten(row, None) == shorten(row, 100) == row


def test_scores_count_concepts_styles_and_both() -> None:
    asks = [ask("a", "oil"), ask("b", "oil"), ask("c", "ink"), Ask("", "", 0, ("d", "e"), None)]
    verdicts = Verdicts([["a", "b"], ["a", "b"], ["c", "a"], ["e", "a"]], ["oil", "ink", "oil", "ink"])
    figures = score(asks, verdicts)
    assert figures == Score(pictures=4, concept_top1=3 / 4, concept_top5=1.0, style=1 / 3, right=2 / 4)
    assert score(asks[3:], Verdicts([["x"]], ["ink"])) == Score(1, 0.0, 0.0, None, 0.0)


def test_pictures_are_those_of_the_pipeline(weights: Weights) -> None:
    """Several prompts at once give what each gives alone, through the code that serves requests."""
    asks = [
        ask("🗻", prompt="富士山と桜の浮世絵", seed=5),
        ask("🐱", prompt="猫が寿司を食べる水墨画", seed=6),
    ]
    pictures = generate(weights, asks, Settings(steps=3, guidance_scale=4.0))
    for picture, asked in zip(pictures, asks, strict=True):
        request = Request(
            prompt=asked.prompt,
            width=64,
            height=64,
            num_inference_steps=3,
            guidance_scale=4.0,
            seed=asked.seed,
        )
        (alone,) = (p.image for p in Pipeline(weights).generate(request) if isinstance(p, Picture))
        assert np.abs(picture.astype(int) - np.asarray(alone).astype(int)).max() <= 1
    assert np.abs(pictures[0].astype(int) - pictures[1]).mean() > 1


def test_the_autoencoder_gives_back_pictures_of_the_same_size(weights: Weights) -> None:
    pictures = [draw(concept, "noto", "illustration", 0) for concept in CONCEPTS]
    restored = through_autoencoder(weights.vae, pictures)
    assert restored.shape == (4, 64, 64, 3) and restored.dtype == np.uint8
    alone = through_autoencoder(weights.vae, pictures[2:3])
    assert np.abs(restored[2].astype(int) - alone[0]).max() <= 1


def test_tensors_are_compared_bit_for_bit() -> None:
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    assert not same_tensors(first, second)
    second.load_state_dict(first.state_dict())
    assert same_tensors(first, second)
    with torch.no_grad():
        second.bias[0] = torch.nextafter(second.bias[0], torch.tensor(9.0))
    assert not same_tensors(first, second)
    for model, zero in ((first, 0.0), (second, -0.0)):
        nn.init.constant_(model.bias, zero)
    assert not same_tensors(first, second)
    assert not same_tensors(first, nn.Linear(3, 2, bias=False))


@pytest.fixture(scope="module")
def folders(tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three models: stage 1 has another text encoder than the base, stage 2 another UNet as well."""
    folder = tmp_path_factory.mktemp("models")
    for model in MODELS:
        shutil.copytree(tiny_weights, folder / model)
    for number, model in enumerate(MODELS[1:], 1):
        encoder = CLIPTextModel.from_pretrained(folder / model / "text_encoder")
        encoder.get_input_embeddings().weight.data.mul_(1 + number)
        encoder.save_pretrained(folder / model / "text_encoder")
    return {model: folder / model for model in MODELS}


@pytest.fixture
def evaluation(
    folders: dict[str, Path], drawn: Shards, judge_folder: Path, tmp_path: Path
) -> Iterator[Evaluation]:
    yield Evaluation(folders, drawn, Judge(judge_folder), GROUPS, tmp_path / "report", QUICK)


def test_the_report_holds_every_row_and_every_target(evaluation: Evaluation, drawn: Shards) -> None:
    report = evaluation.report()
    assert json.loads((evaluation.folder / "report.json").read_text(encoding="utf-8")) == report
    rows = [(row.model, row.name) for row in plan(drawn)]
    assert [(model, name) for model, part in report["scores"].items() for name in part] == rows
    assert all(score["pictures"] == 2 for part in report["scores"].values() for score in part.values())
    assert report["stage 1 has the base's UNet and autoencoder"] is True
    assert len(report["targets"]) == 12
    assert report["settings"]["steps"] == 1 and report["judge"]["concept_top1"] >= 0.95
    assert 0 <= report["copies"]["share of near copies"] <= 1
    sheets = {path.name for path in (evaluation.folder / "sheets").iterdir()}
    assert {"base-things-1.jpg", "stage2-many-seeds-1.jpg", "nearest-training-picture-1.jpg"} <= sheets
    text = describe(report)
    assert all(name in text for _, name in rows) and all(
        target["what"] in text for target in report["targets"]
    )


def fill(evaluation: Evaluation, drawn: Shards, pictures_of: dict[str, str]) -> None:
    """Draw all rows, then put real pictures in their place."""
    for row in plan(drawn):
        short = shorten(row, QUICK.limit)
        before = set((evaluation.folder / "pictures").glob("*.npy"))
        evaluation.pictures(short)
        (path,) = set((evaluation.folder / "pictures").glob("*.npy")) - before
        if row.model in pictures_of:
            hand = pictures_of[row.model]
            shown = [
                draw(a.concepts[0] if a.concepts[0] in CONCEPTS else "🐶", hand, a.style or "illustration", 0)
                for a in short.asks
                if (a.style or "illustration") in ("illustration", "oil_painting", "ukiyoe")
            ]
            if len(shown) == len(short.asks):
                np.save(path, np.stack(shown))


def test_what_was_drawn_is_judged_and_not_drawn_again(evaluation: Evaluation, drawn: Shards) -> None:
    fill(evaluation, drawn, {"base": "emojione", "stage2": "emojione"})
    report = evaluation.report()
    for model in ("base", "stage2"):
        for name in ("things", "styles new to the base"):
            assert report["scores"][model][name]["right"] == 1
            assert report["details"][f"{model}, {name}"]["wrong"] == []
    assert report["scores"]["stage2"]["compositions left out"]["right"] == 1
    groups = report["details"]["stage2, things"]["by group"]
    asked = [a.concepts[0] for row in plan(drawn) for a in shorten(row, 2).asks if row.name == "things"]
    assert set(groups) == {GROUPS.get(concept, "drawings of our own") for concept in asked}
    assert report["copies"]["share of near copies"] == 1
    assert report["copies"]["seeds"]["share of pairs that are not near copies of each other"] == 0
    met = {target["what"].split(",")[0]: target["met"] for target in report["targets"]}
    assert met["base: 2 things named in English"] and met["stage 2: things named in Japanese"]


def test_other_weights_are_drawn_anew(
    evaluation: Evaluation, folders: dict[str, Path], drawn: Shards, judge_folder: Path
) -> None:
    row = Row("stage1", "things", (ask("🗻", prompt="富士山 油絵"),))
    first = evaluation.pictures(row)
    changed = Evaluation(
        {"stage1": folders["stage2"]}, drawn, Judge(judge_folder), GROUPS, evaluation.folder, QUICK
    )
    assert (changed.pictures(row) != first).any()
    again = Evaluation(folders, drawn, Judge(judge_folder), GROUPS, evaluation.folder, QUICK)
    assert (again.pictures(row) == first).all()
    other_seed = Row("stage1", "things", (ask("🗻", prompt="富士山 油絵", seed=1),))
    assert (again.pictures(other_seed) != first).any()


def test_a_carried_judge_stays_as_it_is(
    folders: dict[str, Path], drawn: Shards, judge_folder: Path, tmp_path: Path
) -> None:
    carried, report = tmp_path / "judge", tmp_path / "report"
    carried.mkdir()
    for name in ("judge.json", "judge.safetensors"):
        shutil.copy(judge_folder / name, carried)
    Evaluation({"stage2": folders["stage2"]}, drawn, Judge(carried), GROUPS, report, QUICK).report()
    assert {path.name for path in carried.iterdir()} == {"judge.json", "judge.safetensors"}
    assert list(report.glob("pictures-*.npy"))


def test_only_the_models_that_are_there_are_compared(
    folders: dict[str, Path], drawn: Shards, judge_folder: Path, tmp_path: Path
) -> None:
    only_base = {"base": folders["base"]}
    report = Evaluation(only_base, drawn, Judge(judge_folder), GROUPS, tmp_path, QUICK).report()
    assert list(report["scores"]) == ["base"] and "copies" not in report
    assert [target["what"] for target in report["targets"]] == [
        "base: 2 things named in English, concept top-1"
    ]
    with pytest.raises(EvaluationError, match="none of base, stage1 and stage2"):
        Evaluation({}, drawn, Judge(judge_folder), GROUPS, tmp_path, QUICK)
    with pytest.raises(EvaluationError, match="--limit: 1 pictures in a row"):
        Evaluation(only_base, drawn, Judge(judge_folder), GROUPS, tmp_path, Settings(limit=1))


def test_a_judge_of_other_things_is_refused(
    folders: dict[str, Path], drawn: Shards, judge_folder: Path, tmp_path: Path
) -> None:
    judge = Judge(judge_folder)
    judge.about.concepts.remove("🗻")
    with pytest.raises(EvaluationError, match="does not know 🗻"):
        Evaluation(folders, drawn, judge, GROUPS, tmp_path, QUICK)


def row(top1: float = 1.0, top5: float = 1.0, style: float = 1.0, right: float = 1.0) -> Score:
    return Score(100, top1, top5, style, right)


def good() -> dict[str, dict[str, Score]]:
    things = {"things": row(0.8), "styles of the base": row(), "styles new to the base": row()}
    return {
        "base": dict(things),
        "stage1": {**things, "things": row(0.7), "styles new to the base": row(style=0.2)},
        "stage2": {
            **things,
            "styles of the base": row(style=1.0),
            "styles new to the base": row(style=0.8),
            "claim: japanglish": row(right=0.8),
            "compositions left out": row(top5=0.7, style=0.8),
        },
    }


@pytest.mark.parametrize(
    ("model", "name", "changed", "missed"),
    [
        ("base", "things", row(0.79), "base: 100 things"),
        ("stage1", "things", row(0.69), "stage 1: things"),
        ("stage1", "styles new to the base", row(style=0.22), "stage 1: styles new"),
        ("stage2", "things", row(0.79), "stage 2: things"),
        ("stage2", "styles new to the base", row(style=0.79), "stage 2: style"),
        ("stage2", "claim: japanglish", row(right=0.79), "stage 2: claim: japanglish"),
        ("stage2", "compositions left out", row(top5=0.69), "stage 2: compositions left out, concept"),
        ("stage2", "compositions left out", row(style=0.79), "stage 2: compositions left out, style"),
    ],
)
def test_targets_are_met_by_the_figure_needed_and_by_no_less(
    model: str, name: str, changed: Score, missed: str
) -> None:
    same = {"stage 1 has the base's UNet and autoencoder": True}
    scores = good()
    assert all(target.met for target in targets(scores, same))
    scores[model][name] = changed
    assert [t.what.startswith(missed) for t in targets(scores, same) if not t.met] == [True]
    differs = {"stage 1 has the base's UNet and autoencoder": False}
    assert [t.what for t in targets(good(), differs) if not t.met] == ["stage 1: UNet and autoencoder"]


def test_sheets_show_the_pictures(evaluation: Evaluation, drawn: Shards) -> None:
    fill(evaluation, drawn, {"base": "noto"})
    evaluation.report()
    page = np.asarray(Image.open(evaluation.folder / "sheets" / "base-styles-new-to-the-base-1.jpg")).astype(
        int
    )
    assert np.abs(page[4, 4] - (40, 80, 160)).max() < 12
