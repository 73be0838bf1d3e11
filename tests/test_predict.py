"""predict.py: what Cog reads of it, what it logs, reports and returns, and that it agrees with request.py."""

import ast
import ctypes
import dataclasses
import hashlib
import logging
import math
import operator
import os
import shutil
import threading
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
from cog.input import FieldInfo
from coglet import CancelationException
from PIL import Image

from japanese_stable_diffusion import request as limits
from japanese_stable_diffusion.provenance import read_parameters
from japanese_stable_diffusion.request import Request, RequestError
from japanese_stable_diffusion.weights import WeightsError
from predict import Predictor

SOURCE = Path(__file__).parents[1] / "predict.py"
SMALL = {"width": 64, "height": 64, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def predictor(tiny_weights):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JSD_WEIGHTS", str(tiny_weights))
        predictor = Predictor()
        predictor.setup()
    return predictor


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, "japanese_stable_diffusion")
    return caplog


def pixels(path):
    return np.asarray(Image.open(path), dtype=int)


@pytest.fixture(scope="module")
def arguments():
    """The inputs of predict() as Cog's static reader sees them: name → (annotation, keywords of Input)."""
    [predictor] = [node for node in ast.parse(SOURCE.read_text()).body if isinstance(node, ast.ClassDef)]
    [predict] = [node for node in predictor.body if getattr(node, "name", "") == "predict"]
    inputs = predict.args.args[1:]
    assert len(inputs) == len(predict.args.defaults), "every input has an Input(...)"
    return {
        argument.arg: (ast.unparse(argument.annotation), {k.arg: k.value for k in call.keywords}, call)
        for argument, call in zip(inputs, predict.args.defaults, strict=True)
    }


def test_inputs_are_the_fields_of_a_request_in_the_same_order(arguments):
    assert list(arguments) == [field.name for field in dataclasses.fields(Request)]


def test_types_are_those_of_a_request(arguments):
    written = {
        "str": str,
        "int": int,
        "float": float,
        "bool": bool,
        "Optional[int]": int | None,
        "Optional[Path]": Path | None,
    }
    hints = typing.get_type_hints(Request)
    assert {name: written[annotation] for name, (annotation, _, _) in arguments.items()} == hints


def test_defaults_are_those_of_a_request(arguments):
    for name, (_, keywords, _) in arguments.items():
        assert ast.literal_eval(keywords["default"]) == getattr(Request(), name), name


def test_limits_are_those_of_a_request(arguments):
    said = {
        name: {
            key: ast.literal_eval(value)
            for key, value in keywords.items()
            if key not in ("default", "description")
        }
        for name, (_, keywords, _) in arguments.items()
    }

    def between(bounds):
        return {"ge": bounds[0], "le": bounds[1]}

    assert said == {
        "prompt": {"max_length": limits.PROMPT_LENGTH},
        "negative_prompt": {"max_length": limits.PROMPT_LENGTH},
        "width": {"choices": list(limits.SIDES)},
        "height": {"choices": list(limits.SIDES)},
        "num_outputs": between(limits.NUM_OUTPUTS),
        "num_inference_steps": between(limits.NUM_INFERENCE_STEPS),
        "guidance_scale": between(limits.GUIDANCE_SCALE),
        "scheduler": {"choices": list(limits.SCHEDULERS)},
        "seed": between(limits.SEEDS),
        "image": {},
        "prompt_strength": between(limits.PROMPT_STRENGTH),
        "mask": {},
        "output_format": {"choices": list(limits.OUTPUT_FORMATS)},
        "output_quality": between(limits.OUTPUT_QUALITY),
        "variation_seed": between(limits.SEEDS),
        "variation_strength": between(limits.VARIATION_STRENGTH),
        "lora": {},
        "lora_scale": between(limits.LORA_SCALE),
        "second_pass": {},
        "go_fast": {},
    }


def test_descriptions_are_in_japanese_and_english_and_name_the_limits_that_cog_does_not_check(arguments):
    for _, keywords, _ in arguments.values():
        japanese, english = ast.literal_eval(keywords["description"]).split(" / ")
        assert any("ぁ" <= letter <= "ん" for letter in japanese)
        assert english.isascii() or "×" in english
    for name in ("width", "height"):
        assert str(limits.PIXELS) in ast.literal_eval(arguments[name][1]["description"])


def test_everything_in_an_input_is_a_plain_literal(arguments):
    """Cog reads names, calls and f-strings wrongly or not at all, and garbles escapes and joined strings."""
    source = SOURCE.read_text()
    for _, keywords, call in arguments.values():
        assert ast.unparse(call.func) == "Input"
        assert not call.args
        for value in keywords.values():
            ast.literal_eval(value)
            for node in ast.walk(value):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    assert ast.get_source_segment(source, node) == f'"{node.value}"'


def test_optional_inputs_say_so(arguments):
    for annotation, keywords, _ in arguments.values():
        is_none = ast.literal_eval(keywords["default"]) is None
        assert is_none == annotation.startswith("Optional[")


def test_a_prediction_is_a_list_of_png_files(predictor):
    paths = predictor.predict(prompt="猫", num_outputs=3, seed=5, **SMALL)
    assert [path.name for path in paths] == ["output.0.png", "output.1.png", "output.2.png"]
    for i, path in enumerate(paths):
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "RGB", (64, 64))
        parameters = read_parameters(path)
        assert parameters.weights == "tiny"
        assert parameters.request == Request(prompt="猫", seed=5 + i, **SMALL)


@pytest.mark.parametrize("output_format", ["jpg", "webp"])
def test_pictures_come_in_the_format_and_quality_asked_for(predictor, output_format):
    sizes = []
    for output_quality in (0, 50, 90, 100):
        asked = {"seed": 5, "output_format": output_format, "output_quality": output_quality, **SMALL}
        [path] = predictor.predict(**asked)
        assert path.name == f"output.0.{output_format}"
        with Image.open(path) as image:
            assert image.format == {"jpg": "JPEG", "webp": "WEBP"}[output_format]
        assert read_parameters(path).request == Request(**asked)
        sizes.append(path.stat().st_size)
    assert sizes == sorted(set(sizes))


PHOTOGRAPH = Image.radial_gradient("L").convert("RGB").rotate(30, fillcolor="orange")
FORMATS = {
    "PNG": {},
    "JPEG": {"quality": 60},
    "WEBP": {"quality": 60},
    "GIF": {},
    "BMP": {},
    "TIFF": {"compression": "tiff_lzw"},
    "AVIF": {"speed": 10},
}


@pytest.mark.parametrize("file_format", FORMATS)
def test_what_a_mask_keeps_is_in_the_file_to_the_pixel(predictor, file_format, tmp_path):
    image, mask = tmp_path / "image", tmp_path / "mask"
    PHOTOGRAPH.save(image, file_format, **FORMATS[file_format])
    repainted = Image.new("L", PHOTOGRAPH.size)
    repainted.paste(255, (64, 64, 256, 256))
    repainted.save(mask, file_format, **FORMATS[file_format])
    [path] = predictor.predict(
        image=image, mask=mask, prompt_strength=1, width=256, height=256, num_inference_steps=2, seed=1
    )
    sent = np.asarray(Image.open(image).convert("RGB"))
    made = np.asarray(Image.open(path))
    kept = np.asarray(repainted) == 0
    assert np.array_equal(made[kept], sent[kept])
    assert (made[~kept] != sent[~kept]).any(axis=1).mean() > 0.9


def test_a_picture_is_made_from_a_picture_at_its_size(predictor, tmp_path, log):
    image = tmp_path / "image.png"
    PHOTOGRAPH.resize((130, 70)).save(image)
    [path] = predictor.predict(image=image, num_inference_steps=2, seed=1)
    picture = np.asarray(Image.open(path))
    assert picture.shape[:2] == (64, 128)
    assert "size: 128 × 64" in log.messages
    parameters = read_parameters(path)
    assert (parameters.request.width, parameters.request.height) == (128, 64)
    assert parameters.image_hash == hashlib.sha256(image.read_bytes()).hexdigest()[:16]
    [again] = predictor.predict(**{**dataclasses.asdict(parameters.request), "image": image})
    assert np.array_equal(picture, Image.open(again))


def test_the_parameters_in_a_file_make_its_picture_again(predictor):
    _, path = predictor.predict(
        prompt="猫", num_outputs=2, seed=2**32 - 1, scheduler="K_EULER_ANCESTRAL", **SMALL
    )
    first = pixels(path)
    [again] = predictor.predict(**dataclasses.asdict(read_parameters(path).request))
    assert np.abs(first - pixels(again)).max() <= 2
    assert np.ptp(first) > 100


def test_inputs_left_out_have_their_defaults(predictor):
    [path] = predictor.predict(seed=1, **SMALL)
    assert read_parameters(path).request == Request(seed=1, **SMALL)
    assert not isinstance(read_parameters(path).request.guidance_scale, FieldInfo)


def test_a_drawn_seed_is_logged_and_gives_the_same_picture_again(predictor, log):
    first = pixels(*predictor.predict(**SMALL))
    [message] = [record.getMessage() for record in log.records if record.getMessage().startswith("seed: ")]
    seed = int(message.removeprefix("seed: "))
    second = pixels(*predictor.predict(seed=seed, **SMALL))
    assert np.array_equal(first, second)


def test_the_log_names_weights_and_device(tiny_weights, monkeypatch, log):
    monkeypatch.setenv("JSD_WEIGHTS", str(tiny_weights))
    Predictor().setup()
    assert f"weights: tiny ({tiny_weights})" in log.messages
    assert any(message.startswith("device: c") for message in log.messages)


def test_the_log_tells_that_a_prompt_is_long(predictor, log):
    predictor.predict(prompt="猫" * 200, **SMALL)
    assert "prompt: is encoded in 3 windows of 77 tokens" in log.messages


def test_the_pictures_of_a_prediction_go_when_the_next_is_made(predictor):
    [path, _] = predictor.predict(num_outputs=2, **SMALL)
    assert len(os.listdir(path.parent)) == 2
    [following] = predictor.predict(**SMALL)
    assert following.parent == path.parent
    assert os.listdir(path.parent) == ["output.0.png"]


def test_pictures_go_though_their_removal_was_cancelled(predictor, monkeypatch):
    predictor.predict(num_outputs=2, **SMALL)

    def cancel(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", cancel)
        predictor.predict(**SMALL)
    [following] = predictor.predict(**SMALL)
    assert os.listdir(following.parent) == ["output.0.png"]


def test_the_machine_may_clean_up_temporary_folders(predictor):
    [path] = predictor.predict(**SMALL)
    shutil.rmtree(path.parent)
    [following] = predictor.predict(**SMALL)
    assert os.listdir(following.parent) == ["output.0.png"]


@pytest.mark.parametrize(("part", "calls"), [("text_encoder", 1), ("unet", 3), ("vae.decoder", 2)])
def test_cancelling_stops_at_once_and_leaves_the_next_prediction_as_it_was(predictor, part, calls):
    """Cog cancels by raising an exception of its own in the thread that predicts, wherever that is."""
    inputs = {
        "prompt": "猫",
        "num_outputs": 2,
        "seed": 1,
        "width": 64,
        "height": 64,
        "num_inference_steps": 4,
    }
    before = [pixels(path) for path in predictor.predict(**inputs)]
    called = []

    def cancel(*_):
        called.append(part)
        if len(called) == calls:
            thread = ctypes.c_ulong(threading.get_ident())
            ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(CancelationException))

    module = operator.attrgetter(part)(predictor.pipeline.weights)
    hook = module.register_forward_hook(cancel)
    with pytest.raises(CancelationException):
        predictor.predict(**inputs)
    hook.remove()
    assert len(called) == calls
    after = [pixels(path) for path in predictor.predict(**inputs)]
    assert np.array_equal(before, after)


def test_it_is_healthy_while_its_weights_are_numbers(predictor):
    assert predictor.healthcheck() is True
    bias = predictor.pipeline.weights.unet.conv_in.bias
    kept = bias[0].item()
    with torch.no_grad():
        bias[0] = math.nan
        assert predictor.healthcheck() is False
        bias[0] = kept
    assert predictor.healthcheck() is True


def test_progress_goes_to_the_end_with_the_time_left(predictor, capsys):
    predictor.predict(num_outputs=2, width=64, height=64, num_inference_steps=30)
    shown = capsys.readouterr().err.replace("\r", "\n").splitlines()
    bars = [line for line in shown if "%|" in line]
    assert bars[-1].startswith("100%")
    assert "60/60" in bars[-1]
    assert all("<" in bar for bar in bars), "elapsed<left"
    assert not any("?step" in line for line in shown)


def test_figures_are_reported_as_metrics(tiny_weights, monkeypatch):
    reported = {}

    class Reporting(Predictor):
        def record_metric(self, key, value, mode="replace"):
            reported[key] = value

    monkeypatch.setenv("JSD_WEIGHTS", str(tiny_weights))
    predictor = Reporting()
    predictor.setup()
    predictor.predict(scheduler="PNDM", width=64, height=64, num_inference_steps=4)
    assert reported.pop("unet_evaluations") == 5
    assert set(reported) == {"text_seconds", "denoising_seconds", "decoding_seconds"}
    assert all(isinstance(value, float) and value > 0 for value in reported.values())


@pytest.mark.parametrize(
    ("inputs", "told"),
    [
        ({"num_inference_steps": 99999}, "num_inference_steps: 99999"),
        ({"width": 1024, "height": 1024}, "width, height: "),
        ({"guidance_scale": math.nan}, "guidance_scale: nan"),
        ({"scheduler": "DDPM"}, "scheduler: 'DDPM'"),
        ({"lora": "/etc/passwd"}, "lora: '/etc/passwd' is not a file that was sent"),
        ({"lora": Path(__file__)}, "lora: is not a safetensors file"),
        ({"image": "photo.png"}, "image: 'photo.png' is not a file that was sent"),
        ({"image": Path(__file__)}, "image: is not a picture that can be read"),
    ],
)
def test_what_cog_lets_through_is_refused_and_the_next_prediction_works(predictor, inputs, told):
    with pytest.raises(RequestError, match=f"^{told}"):
        predictor.predict(**inputs)
    assert len(predictor.predict(**SMALL)) == 1


def test_setup_without_weights_fails_with_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("JSD_WEIGHTS", str(tmp_path))
    with pytest.raises(WeightsError) as error:
        Predictor().setup()
    assert str(error.value).startswith(str(tmp_path))
    assert "\n" not in str(error.value)
