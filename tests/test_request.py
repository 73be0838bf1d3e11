"""What may be asked for, and what every other value gets."""

import math
from pathlib import Path

import pytest

from japanese_stable_diffusion.request import SCHEDULERS, Request, RequestError


def test_the_defaults_are_a_request():
    request = Request()
    assert request.prompt == "サラリーマン 油絵"
    assert (request.width, request.height, request.num_outputs, request.seed) == (512, 512, 1, None)


@pytest.mark.parametrize(
    "inputs",
    [
        {"prompt": "", "negative_prompt": "犬" * 1000},
        {"prompt": "(猫:10)(犬:0)", "negative_prompt": r"\(8:15\)"},
        {"prompt": "あ" * 1000},
        {"width": 64, "height": 1024},
        {"width": 1024, "height": 768},
        {"num_outputs": 8, "num_inference_steps": 500, "guidance_scale": 20},
        {"num_inference_steps": 1, "guidance_scale": 1, "seed": 0},
        {"seed": 2**32 - 1},
        {"image": Path("a"), "mask": Path("b"), "prompt_strength": 0},
        {"image": Path("a"), "prompt_strength": 1},
        *({"scheduler": name} for name in SCHEDULERS),
    ],
)
def test_the_limits_themselves_are_allowed(inputs):
    request = Request(**inputs)
    assert {name: getattr(request, name) for name in inputs} == inputs


@pytest.mark.parametrize(
    ("inputs", "told"),
    [
        ({"prompt": "あ" * 1001}, ["prompt", "1,001", "1,000"]),
        ({"prompt": None}, ["prompt", "None", "text"]),
        ({"prompt": b"\xff"}, ["prompt", "text"]),
        ({"prompt": ["猫"]}, ["prompt", "猫", "text"]),
        ({"prompt": "a\0b"}, ["prompt", "NUL", "position 1"]),
        ({"prompt": "\ud83d"}, ["prompt", "surrogate"]),
        ({"prompt": "((猫と)(犬:10))"}, ["prompt", "'犬'", "weight 11", "0 to 10", r"\( and \)"]),
        ({"negative_prompt": "猫（犬：-1）"}, ["negative_prompt", "'犬'", "weight -1", "0 to 10"]),
        ({"prompt": f"(猫:{'9' * 900})"}, ["prompt", "'猫'", "weight inf", "0 to 10"]),
        ({"negative_prompt": 5}, ["negative_prompt", "5", "text"]),
        ({"negative_prompt": "x" * 2000}, ["negative_prompt", "2,000"]),
        ({"width": 63}, ["width", "63", "multiple of 64 from 64 to 1024"]),
        ({"width": 0}, ["width", "0", "64"]),
        ({"width": 1088}, ["width", "1088", "1024"]),
        ({"height": -64}, ["height", "-64", "64"]),
        ({"height": 512.0}, ["height", "512.0", "whole number"]),
        ({"height": "512"}, ["height", "'512'", "whole number"]),
        ({"height": True}, ["height", "True", "whole number"]),
        ({"width": 1024, "height": 832}, ["width, height", "851,968", "786,432"]),
        ({"num_outputs": 0}, ["num_outputs", "0", "1 to 8"]),
        ({"num_outputs": 9}, ["num_outputs", "9", "1 to 8"]),
        ({"num_outputs": True}, ["num_outputs", "True", "whole number"]),
        ({"num_inference_steps": 501}, ["num_inference_steps", "501", "1 to 500"]),
        ({"num_inference_steps": 20.5}, ["num_inference_steps", "20.5", "whole number"]),
        ({"guidance_scale": 0.99}, ["guidance_scale", "0.99", "1 to 20"]),
        ({"guidance_scale": 20.1}, ["guidance_scale", "20.1", "1 to 20"]),
        ({"guidance_scale": math.nan}, ["guidance_scale", "nan", "1 to 20"]),
        ({"guidance_scale": math.inf}, ["guidance_scale", "inf", "1 to 20"]),
        ({"guidance_scale": 10**400}, ["guidance_scale", "1000", "1 to 20"]),
        ({"guidance_scale": "7.5"}, ["guidance_scale", "'7.5'", "number"]),
        ({"guidance_scale": True}, ["guidance_scale", "True", "number"]),
        ({"scheduler": "EULER"}, ["scheduler", "EULER", "K_EULER, K_EULER_ANCESTRAL"]),
        ({"scheduler": "LCM", "num_inference_steps": 51}, ["num_inference_steps", "51", "LCM", "1 to 50"]),
        ({"scheduler": ["PNDM"]}, ["scheduler", "PNDM", "DDIM"]),
        ({"image": "/etc/passwd"}, ["image", "'/etc/passwd'", "http, https or data URL"]),
        ({"image": "file:///etc/passwd"}, ["image", "'file:///etc/passwd'", "http, https or data URL"]),
        ({"image": ""}, ["image", "''", "http, https or data URL"]),
        ({"image": ["a.png"]}, ["image", "a.png", "http, https or data URL"]),
        ({"image": Path("a"), "mask": "b"}, ["mask", "'b'", "http, https or data URL"]),
        ({"mask": Path("b")}, ["mask", "without a picture", "image"]),
        ({"prompt_strength": 1.1}, ["prompt_strength", "1.1", "0 to 1"]),
        ({"prompt_strength": math.nan}, ["prompt_strength", "nan", "0 to 1"]),
        ({"output_format": "JPG"}, ["output_format", "'JPG'", "png, jpg, webp"]),
        ({"output_format": None}, ["output_format", "None", "png, jpg, webp"]),
        ({"output_quality": 101}, ["output_quality", "101", "0 to 100"]),
        ({"output_quality": 90.0}, ["output_quality", "90.0", "whole number"]),
        ({"variation_seed": 2**32}, ["variation_seed", "4294967296", "0 to 4294967295"]),
        ({"variation_strength": 1.01}, ["variation_strength", "1.01", "0 to 1"]),
        ({"variation_strength": None}, ["variation_strength", "None", "0 to 1"]),
        ({"lora": "/etc/passwd"}, ["lora", "'/etc/passwd'", "URL"]),
        ({"lora_scale": -0.5}, ["lora_scale", "-0.5", "0 to 5"]),
        ({"second_pass": 1}, ["second_pass", "1", "true", "false"]),
        ({"second_pass": "no"}, ["second_pass", "'no'", "true", "false"]),
        ({"go_fast": None}, ["go_fast", "None", "true", "false"]),
        ({"lora_scale": math.nan}, ["lora_scale", "nan", "0 to 5"]),
        ({"seed": -1}, ["seed", "-1", "0 to 4294967295"]),
        ({"seed": 2**32}, ["seed", "4294967296", "0 to 4294967295"]),
        ({"seed": 10**5000}, ["seed", "thousands of digits", "0 to 4294967295"]),
        ({"seed": 1.0}, ["seed", "1.0", "whole number"]),
        ({"seed": False}, ["seed", "False", "whole number"]),
        ({"seed": "1\n2"}, ["seed", "1\\n2", "whole number"]),
    ],
)
def test_what_is_not_allowed_is_told_in_one_short_line(inputs, told):
    with pytest.raises(RequestError) as error:
        Request(**inputs)
    message = str(error.value)
    assert message.startswith(f"{told[0]}: ")
    assert all(part in message for part in told)
    assert message.isprintable()
    assert len(message) < 250


def test_picture_i_has_seed_plus_i_and_after_the_last_seed_comes_0():
    assert Request(seed=2**32 - 2, num_outputs=4).seeds == (2**32 - 2, 2**32 - 1, 0, 1)


def test_a_seed_is_drawn_once_and_only_if_none_was_asked_for():
    assert Request(seed=0).with_seed() == Request(seed=0)
    drawn = {Request().with_seed().seed for _ in range(20)}
    assert len(drawn) == 20
    assert all(0 <= seed < 2**32 for seed in drawn)


def test_a_variation_seed_is_drawn_only_if_it_is_needed():
    assert Request(seed=0, variation_strength=0).with_seed().variation_seed is None
    assert Request(variation_seed=3, variation_strength=0.5).with_seed().variation_seed == 3
    assert len({Request(variation_strength=0.5).with_seed().variation_seed for _ in range(20)}) == 20


def test_picture_i_by_itself_has_both_seeds_plus_i():
    request = Request(seed=2**32 - 1, variation_seed=2**32 - 2, variation_strength=0.1, num_outputs=4)
    assert request.alone(1) == Request(seed=0, variation_seed=2**32 - 1, variation_strength=0.1)
    assert request.alone(3) == Request(seed=2, variation_seed=1, variation_strength=0.1)
    assert Request(seed=1, num_outputs=2).alone(1) == Request(seed=2)


def test_without_a_seed_there_are_no_seeds_of_pictures():
    with pytest.raises(ValueError, match="no seed"):
        _ = Request().seeds
