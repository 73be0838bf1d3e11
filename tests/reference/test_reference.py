"""Faithfulness: the ids and pictures of the upstream code of 2022, made again from the same weights."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from japanese_stable_diffusion import winograd

REFERENCE = Path(os.environ.get("JSD_REFERENCE") or Path(__file__).parents[3] / "shared" / "reference")
if not REFERENCE.is_dir():
    pytest.skip(f"{REFERENCE} is not there", allow_module_level=True)

WEIGHTS = REFERENCE / "weights-2022-layout"
EXPECTED = json.loads((REFERENCE / "reference.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def predictor():
    from predict import Predictor

    with pytest.MonkeyPatch.context() as patch:
        # The reference model has few channels; every way to compute the real one shall be proven here.
        patch.setattr(winograd, "MANY_CHANNELS", 1)
        patch.setenv("JSD_WEIGHTS", str(WEIGHTS))
        predictor = Predictor()
        predictor.setup()
    return predictor


@pytest.mark.parametrize("prompt", EXPECTED["token_ids"])
def test_token_ids_are_equal(prompt):
    from japanese_stable_diffusion.tokenizer import Tokenizer

    assert Tokenizer(WEIGHTS / "tokenizer")(prompt).ids == EXPECTED["token_ids"][prompt]


@pytest.mark.parametrize("case", EXPECTED["cases"], ids=lambda case: case["file"])
def test_pictures_are_within_1_of_255(predictor, case):
    start = {"image": REFERENCE / case["init"], "prompt_strength": case["strength"]} if "init" in case else {}
    [path] = predictor.predict(
        prompt=case["prompt"],
        negative_prompt=case.get("negative_prompt", ""),
        width=case["width"],
        height=case["height"],
        num_outputs=1,
        num_inference_steps=case["steps"],
        guidance_scale=case["guidance"],
        scheduler=case["scheduler"],
        seed=case["seed"],
        **start,
    )
    made = np.asarray(Image.open(path).convert("RGB"), dtype=int)
    expected = np.asarray(Image.open(REFERENCE / case["file"]).convert("RGB"), dtype=int)
    assert made.shape == expected.shape
    assert np.abs(made - expected).max() <= 1
