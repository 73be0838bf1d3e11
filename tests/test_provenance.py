import contextlib
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from japanese_stable_diffusion import provenance, watermark
from japanese_stable_diffusion.provenance import Parameters, ProvenanceError
from japanese_stable_diffusion.request import SCHEDULERS, Request

PARAMETERS = Parameters(
    Request(
        prompt="サラリーマン 油絵",
        negative_prompt="文字, 枠",
        width=768,
        height=640,
        num_inference_steps=31,
        guidance_scale=6.25,
        scheduler="K_EULER_ANCESTRAL",
        seed=4294967295,
    ),
    weights="japanese-stable-diffusion",
    weights_version="0765551",
)

AWKWARD_PROMPTS = [
    "",
    "plain ASCII",
    "naïve café",
    "  spaces around  ",
    "二行\nの文\n",
    "\r\n改行",
    "絵文字🐟と𠮷",
    "Steps: 3, Sampler: DDIM, Seed: 4, Size: 64x64",
    "猫\nNegative prompt: 犬",
    "Negative prompt: 犬",
    '"quoted, with: marks\\"',
    "あ" * 1000,
]


def saved(parameters: Parameters, file_format: str, path: Path) -> Path:
    Image.new("RGB", (64, 64), "white").save(
        path, file_format, **provenance.save_options(file_format, parameters)
    )
    return path


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
def test_parameters_come_back_from_a_file(file_format, tmp_path):
    path = saved(PARAMETERS, file_format, tmp_path / "picture")
    assert provenance.read_parameters(path) == PARAMETERS


@pytest.mark.parametrize("file_format", ["PNG", "JPEG"])
@pytest.mark.parametrize("prompt", AWKWARD_PROMPTS)
def test_any_prompt_comes_back_exactly(prompt, file_format, tmp_path):
    for negative in AWKWARD_PROMPTS:
        request = replace(PARAMETERS.request, prompt=prompt, negative_prompt=negative)
        parameters = replace(PARAMETERS, request=request, weights=prompt[:40].strip())
        assert provenance.read_parameters(saved(parameters, file_format, tmp_path / "picture")) == parameters


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_comes_back(scheduler):
    parameters = replace(PARAMETERS, request=replace(PARAMETERS.request, scheduler=scheduler))
    assert provenance.parse(str(parameters)) == parameters


def test_a_format_with_loss_comes_back_with_its_quality():
    request = replace(PARAMETERS.request, output_format="webp", output_quality=35)
    parameters = replace(PARAMETERS, request=request)
    assert "Output format: webp, Output quality: 35" in str(parameters)
    assert provenance.parse(str(parameters)) == parameters


def test_what_it_was_made_from_comes_back_as_strength_and_hashes():
    request = replace(PARAMETERS.request, image=Path("/tmp/secret-name.png"), prompt_strength=0.35)
    made = replace(PARAMETERS, request=request, image_hash="0123456789abcdef", mask_hash="fedcba9876543210")
    assert "Denoising strength: 0.35, Init image hash: 0123456789abcdef, Mask hash: fedcba9876543210" in str(
        made
    )
    assert "secret" not in str(made)
    assert provenance.parse(str(made)) == replace(made, request=replace(request, image=None))


def test_variations_and_loras_come_back():
    request = replace(PARAMETERS.request, variation_seed=7, variation_strength=0.25, lora_scale=0.5)
    parameters = replace(PARAMETERS, request=request, lora_hash="0123456789abcdef")
    assert provenance.parse(str(parameters)) == parameters
    without = replace(parameters, request=replace(request, second_pass=False))
    assert provenance.parse(str(without)) == without
    fast = replace(parameters, request=replace(request, go_fast=True))
    assert provenance.parse(str(fast)) == fast
    assert "Variation seed: 7, Variation seed strength: 0.25, Lora hash: 0123456789abcdef" in str(parameters)


def test_text_has_the_form_that_other_tools_read():
    assert str(PARAMETERS) == (
        "サラリーマン 油絵\n"
        "Negative prompt: 文字, 枠\n"
        "Steps: 31, Sampler: Euler a, CFG scale: 6.25, Seed: 4294967295, Size: 768x640, "
        "Model: japanese-stable-diffusion, Model version: 0765551, Version: japanese-stable-diffusion"
    )


def test_files_carry_the_text_where_other_tools_look(tmp_path):
    with Image.open(saved(PARAMETERS, "PNG", tmp_path / "a.png")) as png:
        assert png.info["parameters"] == str(PARAMETERS)
    jpeg = saved(PARAMETERS, "JPEG", tmp_path / "a.jpg").read_bytes()
    assert b"UNICODE\0" + str(PARAMETERS).encode("utf-16-be") in jpeg
    webp = saved(PARAMETERS, "WEBP", tmp_path / "a.webp").read_bytes()
    assert b"UNICODE\0" + str(PARAMETERS).encode("utf-16-be") in webp


def test_parameters_of_another_tool_are_understood():
    parameters = provenance.parse(
        "a cat\nNegative prompt: dog\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: 42, Size: 512x768, "
        'Model hash: 6ce0161689, Model: v1-5, Lora hashes: "a: 1, b: 2", Version: v1.10.1'
    )
    assert parameters.request == Request(
        "a cat", "dog", 512, 768, num_inference_steps=20, guidance_scale=7, scheduler="K_EULER", seed=42
    )
    assert parameters.weights == "v1-5"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("Steps: 20, CFG scale: 7, Seed: 42, Size: 512x768", "Sampler is missing"),
        ("Steps: 20, Sampler: Heun, CFG scale: 7, Seed: 42, Size: 512x768", "Sampler 'Heun' is not offered"),
        ("Steps: 20, Sampler: Euler, CFG scale: x, Seed: 42, Size: 512x768", "CFG scale 'x' is not a number"),
        ("Steps: 20, Sampler: Euler, CFG scale: 7, Seed: 42, Size: huge", "Size 'huge' is not"),
        ("Steps: 20, Sampler: Euler, CFG scale: 7, Seed: 42, Size: 500x768", "width: 500 is not possible"),
        (
            "Steps: 20, Sampler: Euler, CFG scale: 7, Seed: 1, Size: 64x64, Output format: jpg",
            "Output quality is missing",
        ),
        (
            "Steps: 20, Sampler: Euler, CFG scale: 7, Seed: 1, Size: 64x64, Init image hash: 12",
            "Denoising strength is missing",
        ),
        ("no settings at all", "Sampler is missing"),
        ("", "Sampler is missing"),
    ],
)
def test_foreign_parameters_are_refused_in_one_line(line, reason):
    with pytest.raises(ProvenanceError, match=reason) as caught:
        provenance.parse(f"a cat\n{line}")
    assert "\n" not in str(caught.value)


def test_files_without_parameters_are_refused_by_name(tmp_path):
    plain = tmp_path / "plain.jpg"
    Image.new("RGB", (8, 8)).save(plain)
    text = tmp_path / "text.png"
    text.write_text("no picture")
    for path, reason in [
        (plain, "carries no parameters"),
        (text, "is not a PNG, JPEG or WebP picture"),
        (tmp_path, "is not a PNG, JPEG or WebP picture"),
        (tmp_path / "missing.png", "is not there"),
    ]:
        with pytest.raises(ProvenanceError, match=reason) as caught:
            provenance.read_parameters(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)


def test_damaged_files_never_end_in_another_error(tmp_path):
    """Every byte of the metadata, one after the other, turned around."""
    parameters = replace(PARAMETERS, request=Request("猫", seed=1), weights="demo", weights_version="")
    for file_format in ("PNG", "JPEG", "WEBP"):
        whole = saved(parameters, file_format, tmp_path / "whole").read_bytes()
        whole = bytearray(whole[:500] if file_format == "JPEG" else whole)
        for position in range(len(whole)):
            damaged = whole.copy()
            damaged[position] ^= 0xFF
            path = tmp_path / "damaged"
            path.write_bytes(damaged)
            with contextlib.suppress(ProvenanceError):
                provenance.read_parameters(path)


def test_a_file_is_examined_for_text_and_mark(tmp_path):
    marked = watermark.embed(Image.new("RGB", (256, 256), "orange"))
    path = tmp_path / "marked.png"
    marked.save(path, **provenance.save_options("PNG", PARAMETERS))
    text, mark = provenance.examine(path)
    assert text == str(PARAMETERS) and mark.found
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ProvenanceError, match="is truncated or damaged"):
        provenance.examine(path)
    Image.new("L", (256, 256)).save(path)
    text, mark = provenance.examine(path)
    assert text is None and not mark.found
    with pytest.raises(ProvenanceError, match="none: is not there"):
        provenance.examine(tmp_path / "none")
