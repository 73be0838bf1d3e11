import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from drawn_shards import CONCEPTS, HANDS, STYLES, draw

from japanese_stable_diffusion.training import judge as judging
from japanese_stable_diffusion.training.judge import (
    Classifier,
    HeldOut,
    Judge,
    JudgeError,
    is_held_out,
    spoil,
)
from japanese_stable_diffusion.training.shards import Shards
from japanese_stable_diffusion.training.styles import Pixels


def test_a_judge_names_concept_and_style(judge_folder: Path) -> None:
    asked = [(concept, style) for concept in CONCEPTS for style in STYLES]
    pictures = [draw(concept, "emojione", style, 1) for concept, style in asked]
    # Pictures of another size show the same.
    pictures[0] = cv2.resize(pictures[0], (128, 128))
    verdicts = Judge(judge_folder).look(pictures)
    assert [(seen[0], style) for seen, style in zip(verdicts.concepts, verdicts.styles, strict=True)] == asked
    assert all(set(seen) == set(CONCEPTS) for seen in verdicts.concepts)


def test_a_judge_says_how_often_it_is_right_on_what_it_never_saw(judge_folder: Path, drawn: Shards) -> None:
    held_out = Judge(judge_folder).about.held_out
    members = [about for about in drawn.about if is_held_out(about)]
    assert held_out.pictures == len(members) > 0
    assert held_out.renderings == len(
        {tuple(about[k] for k in ("concept", "hand", "style")) for about in members}
    )
    assert held_out.concept_top1 >= 0.95 and held_out.style_top1 >= 0.98


def test_whole_renderings_are_held_out_one_in_twelve() -> None:
    samples = [
        {"concept": chr(0x1F300 + number), "hand": hand, "style": style}
        for number in range(400)
        for hand in HANDS
        for style in STYLES
    ]
    held_out = [is_held_out(about) for about in samples]
    assert np.mean(held_out) == pytest.approx(1 / 12, abs=0.01)
    assert held_out == [is_held_out({**about, "licence": "MIT"}) for about in samples]


def test_what_is_wrong_too_often_is_no_judge(judge_folder: Path, tmp_path: Path) -> None:
    for file in ("judge.json", "judge.safetensors"):
        (tmp_path / file).write_bytes((judge_folder / file).read_bytes())
    about = json.loads((tmp_path / "judge.json").read_text(encoding="utf-8"))
    for wrong in ({"concept_top1": 0.949}, {"style_top1": 0.979}):
        changed = {
            **about,
            "held_out": {**about["held_out"], "concept_top1": 0.95, "style_top1": 0.98, **wrong},
        }
        (tmp_path / "judge.json").write_text(json.dumps(changed), encoding="utf-8")
        with pytest.raises(JudgeError, match="is no judge"):
            Judge(tmp_path)
    changed["held_out"] |= {"concept_top1": 0.95, "style_top1": 0.98}
    (tmp_path / "judge.json").write_text(json.dumps(changed), encoding="utf-8")
    Judge(tmp_path)


def test_a_folder_without_a_judge_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(
        JudgeError, match=r"judge\.json: there is no judge here; train one with scripts/train-judge"
    ):
        Judge(tmp_path)
    (tmp_path / "judge.json").write_text("[]")
    with pytest.raises(JudgeError, match="does not describe a judge"):
        Judge(tmp_path)


def test_figures_count_only_what_is_held_out(drawn: Shards) -> None:
    """A classifier that knows nothing but one class is right exactly as often as that class comes up."""
    concepts, styles = sorted(CONCEPTS), sorted(STYLES)
    classifier = Classifier(len(concepts), len(styles))
    for head, likeliest in ((classifier.concept, 1), (classifier.style, 2)):
        torch.nn.init.zeros_(head.weight)
        head.bias.data[:] = torch.arange(len(head.bias)) == likeliest
    labels = torch.tensor([(concepts.index(a["concept"]), styles.index(a["style"])) for a in drawn.about])
    members = np.array([i for i, a in enumerate(drawn.about) if a["hand"] == "noto"])
    pictures = np.stack([drawn.picture(i) for i in range(len(drawn))])
    figures = judging._measure(classifier, pictures, labels, members, 12, concepts, styles)
    assert figures.concept_top1 == pytest.approx(1 / 4) and figures.concept_top5 == 1
    assert figures.style_top1 == pytest.approx(2 / 8)
    assert figures.pictures == 32 and sum(times for _, _, times in figures.confusions) == 24
    assert {seen for _, seen, _ in figures.confusions} == {concepts[1]}


class BreaksOff(np.ndarray[Any, Any]):
    """Pictures that can be read so many times, as if the machine went away then."""

    reads = 0

    def __getitem__(self, index: Any) -> Any:
        if self.reads == 0:
            raise KeyboardInterrupt
        self.reads -= 1
        return np.asarray(self)[index]


def test_a_training_that_was_broken_off_ends_as_one_that_was_not(drawn: Shards, tmp_path: Path) -> None:
    pictures = np.stack([drawn.picture(i) for i in range(len(drawn))])
    labels = torch.tensor([(i % 4, i % 3) for i in range(len(drawn))])
    members = np.arange(128)

    def fit(pictures: Pixels, checkpoint: Path) -> Classifier:
        torch.manual_seed(0)
        classifier = Classifier(4, 3)
        judging._fit(classifier, pictures, labels, members, 3, checkpoint)
        return classifier

    whole = fit(pictures, tmp_path / "whole.pt").state_dict()
    broken = pictures.view(BreaksOff)
    broken.reads = 2
    with pytest.raises(KeyboardInterrupt):
        fit(broken, tmp_path / "broken.pt")
    resumed = fit(pictures, tmp_path / "broken.pt").state_dict()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_spoilt_pictures_keep_their_sides() -> None:
    pixels = torch.zeros(64, 3, 64, 64)
    pixels[..., :32] = 1
    spoilt = spoil(pixels, 40, torch.Generator().manual_seed(0))
    assert spoilt.shape == (64, 3, 40, 40) and spoilt.min() >= 0 and spoilt.max() <= 1
    assert (spoilt[..., :10].mean((1, 2, 3)) > spoilt[..., -10:].mean((1, 2, 3)) + 0.5).all()
    assert len({float(picture.sum()) for picture in spoilt}) == 64


def test_the_lines_that_are_shown_name_figures_and_confusions() -> None:
    held_out = HeldOut(200, 100, 0.96, 0.995, 0.99, {"ukiyoe": 0.9}, [("🙂", "😊", 3)])
    text = judging.describe(held_out)
    for part in (
        "200 pictures of 100 renderings",
        "96.0%",
        "99.5%",
        "style 99.0%",
        "ukiyoe 90.0%",
        "🙂→😊 3×",
    ):
        assert part in text
