import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from layout_2022 import write_2022_layout
from PIL import Image

from japanese_stable_diffusion.safety import SafetyError, choose_checker, is_flagged
from japanese_stable_diffusion.weights import SafetyChecker, Weights, load_weights
from predict import Predictor

INPUTS = {
    "prompt": "猫",
    "width": 64,
    "height": 64,
    "num_inference_steps": 2,
    "guidance_scale": 1.0,
    "seed": 5,
}


@pytest.fixture(scope="module")
def checked(tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_2022_layout(tiny_weights, tmp_path_factory.mktemp("checked") / "2022")


@pytest.fixture
def checked_weights(checked: Path) -> Weights:
    return load_weights(checked, torch.device("cpu"), torch.float32)


@pytest.fixture
def predictor(checked: Path, monkeypatch: pytest.MonkeyPatch) -> Predictor:
    monkeypatch.setenv("JSD_WEIGHTS", str(checked))
    predictor = Predictor()
    predictor.setup()
    return predictor


def embedding(picture: Image.Image, checker: SafetyChecker) -> torch.Tensor:
    """CLIP's, by the parts of the checker and the published normalisation."""
    pixels = np.asarray(picture.convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)) / 255
    mean, deviation = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    normalised = torch.tensor((pixels - mean) / deviation, dtype=torch.float32).permute(2, 0, 1)[None]
    with torch.no_grad():
        return checker.model.visual_projection(checker.model.vision_model(normalised).pooler_output)[0]


def forbid(picture: Image.Image, checker: SafetyChecker) -> None:
    """Flag what looks exactly like `picture`, and nothing else."""
    checker.model.concept_embeds.data[3] = embedding(picture, checker)
    checker.model.concept_embeds_weights.data[3] = 0.99


def test_what_is_near_a_concept_is_flagged(checked_weights: Weights) -> None:
    checker = checked_weights.safety
    assert checker
    red, noise = Image.new("RGB", (64, 64), "red"), Image.effect_noise((64, 64), 99).convert("RGB")
    assert not is_flagged(red, checker) and not is_flagged(noise, checker)
    forbid(red, checker)
    assert is_flagged(red, checker) and not is_flagged(noise, checker)


def test_special_care_lowers_the_threshold(checked_weights: Weights) -> None:
    checker = checked_weights.safety
    assert checker
    red = Image.new("RGB", (64, 64), "red")
    forbid(red, checker)
    checker.model.concept_embeds_weights.data[3] = 1.005
    assert not is_flagged(red, checker)
    checker.model.special_care_embeds.data[0] = embedding(red, checker)
    checker.model.special_care_embeds_weights.data[0] = 0.9
    assert is_flagged(red, checker)


def test_flagged_pictures_are_left_out(predictor: Predictor, caplog: pytest.LogCaptureFixture) -> None:
    alone = [Image.open(predictor.predict(**{**INPUTS, "seed": 5 + i})[0]) for i in range(3)]
    forbid(alone[1], predictor.pipeline.weights.safety)
    with caplog.at_level(logging.INFO, "japanese_stable_diffusion"):
        left = predictor.predict(**INPUTS, num_outputs=3)
    assert [path.name for path in left] == ["output.0.png", "output.2.png"]
    for path, expected in zip(left, (alone[0], alone[2]), strict=True):
        assert np.abs(np.asarray(Image.open(path), int) - np.asarray(expected, int)).max() <= 2
    assert "safety checker: left out 1 of 3 pictures" in caplog.messages
    assert not any("black" in message for message in caplog.messages)


def test_prediction_fails_only_if_none_is_left(predictor: Predictor) -> None:
    predictor.pipeline.weights.safety.model.concept_embeds_weights.data.fill_(-2)
    with pytest.raises(SafetyError, match="flagged all 2 pictures; another prompt or another seed may pass"):
        predictor.predict(**INPUTS, num_outputs=2)
    with pytest.raises(SafetyError, match="flagged the picture"):
        predictor.predict(**INPUTS)


def test_operator_can_turn_it_off(
    checked: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("JSD_WEIGHTS", str(checked))
    monkeypatch.setenv("JSD_SAFETY_CHECKER", "off")
    predictor = Predictor()
    with caplog.at_level(logging.INFO, "japanese_stable_diffusion"):
        predictor.setup()
    assert "safety checker: off" in caplog.messages
    predictor.pipeline.weights.safety.model.concept_embeds_weights.data.fill_(-2)
    assert len(predictor.predict(**INPUTS)) == 1


def test_choice_is_said(
    weights: Weights,
    checked_weights: Weights,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "japanese_stable_diffusion")
    assert choose_checker(checked_weights) is checked_weights.safety
    assert caplog.messages[-1] == "safety checker: on"
    assert choose_checker(weights) is None
    assert caplog.messages[-1] == f"safety checker: none, {weights.manifest.name} has none"
    monkeypatch.setenv("JSD_SAFETY_CHECKER", "no")
    with pytest.raises(SafetyError, match="JSD_SAFETY_CHECKER: 'no' is unknown; on or off is allowed"):
        choose_checker(replace(checked_weights, safety=None))
