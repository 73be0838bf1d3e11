"""Faithfulness after conversion: the pictures of the upstream code, from the converted weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_reference import EXPECTED, REFERENCE, WEIGHTS

from japanese_stable_diffusion.conversion import convert
from japanese_stable_diffusion.pipeline import Picture, Pipeline
from japanese_stable_diffusion.request import Request
from japanese_stable_diffusion.weights import load_weights


def differences(pipeline: Pipeline, case: dict) -> np.ndarray:
    """Of every pixel from the upstream picture, in 1/255."""
    request = Request(
        prompt=case["prompt"],
        negative_prompt=case.get("negative_prompt", ""),
        width=case["width"],
        height=case["height"],
        num_inference_steps=case["steps"],
        guidance_scale=case["guidance"],
        scheduler=case["scheduler"],
        seed=case["seed"],
        **(
            {"image": REFERENCE / case["init"], "prompt_strength": case["strength"]} if "init" in case else {}
        ),
    )
    [made] = [event.image for event in pipeline.generate(request) if isinstance(event, Picture)]
    expected = Image.open(REFERENCE / case["file"]).convert("RGB")
    return np.abs(np.asarray(made, dtype=int) - np.asarray(expected, dtype=int))


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pipeline]:
    loaded = {}
    for precision in ("fp32", "fp16"):
        folder: Path = tmp_path_factory.mktemp("converted") / precision
        convert(WEIGHTS, folder, precision, precision, "1", [])
        loaded[precision] = Pipeline(load_weights(folder, torch.device("cpu"), torch.float32))
    return loaded


@pytest.mark.parametrize("case", EXPECTED["cases"], ids=lambda case: case["file"])
def test_fp32_is_within_1_of_255(pipelines, case):
    assert differences(pipelines["fp32"], case).max() <= 1


@pytest.mark.parametrize("case", EXPECTED["cases"], ids=lambda case: case["file"])
def test_fp16_is_within_2_of_255_on_average(pipelines, case):
    found = differences(pipelines["fp16"], case)
    assert 0 < found.mean() <= 2
