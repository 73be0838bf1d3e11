import json

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from japanese_stable_diffusion.benchmarks import random_weights
from japanese_stable_diffusion.weights import load_weights, read_manifest, verify_weights


@pytest.mark.parametrize(
    ("make", "config", "millions"),
    [(UNet2DConditionModel, random_weights.UNET, 859.5), (AutoencoderKL, random_weights.VAE, 83.7)],
)
def test_models_have_the_real_size(make, config, millions) -> None:
    with torch.device("meta"):
        model = make.from_config(config)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1) == millions


def test_a_folder_loads_like_any_other(tiny_weights, tmp_path, monkeypatch) -> None:
    """At a small size: the real one takes gigabytes."""
    for name, part in (("UNET", "unet"), ("VAE", "vae"), ("TEXT_ENCODER", "text_encoder")):
        monkeypatch.setattr(
            random_weights, name, json.loads((tiny_weights / part / "config.json").read_text())
        )
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    monkeypatch.setattr(random_weights, "SAFETY_CHECKER", {"projection_dim": 16, "vision_config": vision})
    folder = tmp_path / "random"
    random_weights.write_random_weights(folder, torch.float16, tiny_weights / "tokenizer")
    verify_weights(folder, read_manifest(folder), hashes=True)
    weights = load_weights(folder, torch.device("cpu"), torch.float32)
    assert weights.safety and weights.unet.conv_in.weight.std() > 0
