"""The weights that the repository carries are whole, small and safe, and paint by themselves."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from japanese_stable_diffusion.training.evaluation import Ask, Settings, generate
from japanese_stable_diffusion.training.judge import Judge
from japanese_stable_diffusion.weights import WEIGHTS, load_weights, read_manifest, verify_weights

DEMO = WEIGHTS / "demo"


def test_they_are_whole_and_say_where_they_come_from() -> None:
    manifest = read_manifest(DEMO)
    verify_weights(DEMO, manifest, hashes=True)
    assert manifest.native_size >= 64
    assert manifest.training and len(manifest.training.commit) == 40
    assert {source.licence for source in manifest.sources} and all(s.licence for s in manifest.sources)


def test_they_are_small_and_hold_no_pickle() -> None:
    files = [path for path in DEMO.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 40_000_000
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pkl", ".ckpt")]
    for part in ("text_encoder", "unet", "vae"):
        (path,) = (DEMO / part).glob("*.safetensors")
        with safe_open(path, framework="pt") as tensors:
            assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"F16"}  # noqa: SIM118 (a safetensors file is no dict)


def test_the_judge_is_one_and_sees_what_the_demo_draws() -> None:
    judge = Judge(WEIGHTS / "judge")
    assert judge.about.held_out.is_a_judge
    weights = load_weights(DEMO, torch.device("cpu"), torch.float32)
    asks = [
        Ask(prompt, "", 1, (concept,), None) for prompt, concept in (("パンダ", "🐼"), ("だるま", "daruma"))
    ]
    verdicts = judge.look(generate(weights, asks, Settings()))
    assert all(ask.concepts[0] in seen for ask, seen in zip(asks, verdicts.concepts, strict=True))


def test_the_first_picture_of_the_readme_is_the_same_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    from predict import Predictor

    monkeypatch.setenv("JSD_WEIGHTS", str(DEMO))
    predictor = Predictor()
    predictor.setup()
    pictures = []
    for _ in range(2):
        (file,) = predictor.predict(prompt="サラリーマン 油絵", seed=1)
        pictures.append(np.asarray(Image.open(file).convert("RGB")))
    assert pictures[0].shape == (512, 512, 3)
    assert np.array_equal(*pictures)
    assert pictures[0].std() > 20
