from pathlib import Path

import numpy as np
import pytest
import torch
from layout_2022 import write_2022_layout
from safetensors import safe_open
from safetensors.torch import load_file

from japanese_stable_diffusion.conversion import convert
from japanese_stable_diffusion.pipeline import Picture, Pipeline
from japanese_stable_diffusion.request import Request
from japanese_stable_diffusion.weights import (
    Source,
    WeightsError,
    load_weights,
    read_manifest,
    verify_weights,
)

SOURCE = Source("tiny", "CC0-1.0", "https://example.org", "weights")
REQUEST = Request("猫 油絵", width=64, height=64, num_inference_steps=3, seed=1)


@pytest.fixture(scope="module")
def original(tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_2022_layout(tiny_weights, tmp_path_factory.mktemp("original") / "2022")


def picture(folder: Path) -> np.ndarray:
    pipeline = Pipeline(load_weights(folder, torch.device("cpu"), torch.float32))
    (made,) = [event for event in pipeline.generate(REQUEST) if isinstance(event, Picture)]
    return np.asarray(made.image, np.int16)


def types(folder: Path, part: str, file: str) -> set[str]:
    with safe_open(folder / part / f"{file}.safetensors", "pt") as opened:
        return {opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118 (a safetensors file is no dict)


def test_fp32_changes_no_bit(original: Path, tiny_weights: Path, tmp_path: Path) -> None:
    convert(original, tmp_path / "new", "fp32", "new", "1", [SOURCE])
    for part, file in (
        ("text_encoder", "model"),
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
    ):
        old = load_file(tiny_weights / part / f"{file}.safetensors")
        new = load_file(tmp_path / "new" / part / f"{file}.safetensors")
        assert old.keys() == new.keys()
        assert all(torch.equal(old[name], new[name]) for name in old)
    assert np.array_equal(picture(original), picture(tmp_path / "new"))


def test_fp16_halves_all_but_the_vae(original: Path, tmp_path: Path) -> None:
    convert(original, tmp_path / "new", "fp16", "new", "1", [SOURCE])
    assert types(tmp_path / "new", "unet", "diffusion_pytorch_model") == {"F16"}
    assert types(tmp_path / "new", "text_encoder", "model") == {"F16"}
    assert types(tmp_path / "new", "safety_checker", "model") == {"F16"}
    assert types(tmp_path / "new", "vae", "diffusion_pytorch_model") == {"F32"}
    assert abs(picture(original) - picture(tmp_path / "new")).mean() < 2


def test_manifest_lists_every_file(original: Path, tmp_path: Path) -> None:
    convert(original, tmp_path / "new", "fp16", "new", "0765551", [SOURCE])
    manifest = read_manifest(tmp_path / "new")
    assert (manifest.name, manifest.version, manifest.native_size, manifest.enlarge) == (
        "new",
        "0765551",
        64,
        1,
    )
    assert manifest.sources == [SOURCE]
    there = {path.relative_to(tmp_path / "new").as_posix() for path in (tmp_path / "new").rglob("*.*")}
    assert set(manifest.files) == there - {"manifest.json"}
    verify_weights(tmp_path / "new", manifest, hashes=True)
    assert not list((tmp_path / "new").rglob("*.bin"))


def test_what_was_there_goes(original: Path, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "old").touch()
    convert(original, tmp_path / "new", "fp16", "new", "1", [SOURCE])
    assert not (tmp_path / "new" / "old").exists()


def test_weights_without_a_safety_checker(tiny_weights: Path, tmp_path: Path) -> None:
    convert(tiny_weights, tmp_path / "new", "fp16", "new", "1", [SOURCE])
    assert load_weights(tmp_path / "new", torch.device("cpu"), torch.float32).safety is None


def test_an_unusable_folder_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(WeightsError):
        convert(tmp_path / "none", tmp_path / "new", "fp16", "new", "1", [SOURCE])
    assert list(tmp_path.iterdir()) == []


def test_whoever_may_read_the_configuration_may_read_the_tensors(original: Path, tmp_path: Path) -> None:
    convert(original, tmp_path / "new", "fp16", "new", "1", [SOURCE])
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "new" / "unet").iterdir()}
    assert modes == {(original / "unet" / "config.json").stat().st_mode & 0o777}
