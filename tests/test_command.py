"""What a person types at scripts/predict, and what comes back."""

import base64
import io
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from japanese_stable_diffusion.command import choose_target, predict, read_inputs, read_json
from japanese_stable_diffusion.request import Request, RequestError
from japanese_stable_diffusion.weights import Weights

SMALL = ["width=64", "height=128", "num_inference_steps=1"]


@pytest.fixture
def folder(tmp_path: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder with a space in its name, where predictions use the tiny model."""
    folder = tmp_path / "my pictures"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("JSD_WEIGHTS", str(tiny_weights))
    return folder


def test_texts_stay_texts_and_the_rest_is_parsed(folder: Path) -> None:
    typed = ["prompt=1 + 1 = 2", "negative_prompt=", "width=64", "guidance_scale=2", "seed=0", "scheduler=7"]
    inputs = {"prompt": "1 + 1 = 2", "negative_prompt": "", "width": 64, "guidance_scale": 2, "seed": 0}
    assert read_inputs(typed) == {**inputs, "scheduler": "7"}


def test_a_value_is_read_from_a_file(folder: Path) -> None:
    Path("my prompt.txt").write_text("\ufeff富士山\n浮世絵\r\n", encoding="utf-8")
    Path("seed").write_text("7\n")
    assert read_inputs(["prompt=@my prompt.txt", "seed=@seed"]) == {"prompt": "富士山\n浮世絵", "seed": 7}


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        (["seed=abc"], "seed: 'abc' is not a whole number"),
        (["seed="], "seed: '' is not a whole number"),
        (["seed=1.5"], "seed: 1.5 is not a whole number"),
        (["seed=" + "9" * 5000], "seed: "),
        (["seed=" + "[" * 99999], "seed: "),
        (["width=500"], "width: 500"),
        (["guidance_scale=NaN"], "guidance_scale: "),
        (["scheduler=ddim"], "scheduler: 'ddim'"),
        (["prompt=\udcff"], "prompt: "),
        (["steps=20"], "'steps': is not an input; the inputs are prompt, negative_prompt, width"),
        (["=1"], "'': is not an input"),
        (["サラリーマン"], "-i 'サラリーマン': has no value"),
        (["seed=1", "seed=1"], "seed: is given twice"),
        (["prompt=@nowhere.txt"], "prompt: can't read 'nowhere.txt' (No such file or directory)"),
        (["prompt=@."], "prompt: can't read '.' (Is a directory)"),
        (["prompt=@binary"], "prompt: 'binary' is not UTF-8 text"),
        (["prompt=@/dev/zero"], "prompt: is 1,000,000 characters long"),
        (["prompt=@\0"], "prompt: can't read '\\x00'"),
    ],
)
def test_a_wrong_input_is_told_in_one_line(
    typed: list[str], told: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("binary").write_bytes(b"\xff\xfe\x00")
    assert predict(typed) == 2
    out, error = capsys.readouterr()
    assert error.startswith(told) and error.count("\n") == 1 and error.endswith("\n")
    assert out == ""


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "--json: is not JSON"),
        ("[" * 99999, "--json: is not JSON"),
        ("[1]", "--json: is not an object"),
        ("@nowhere.json", "--json: can't read 'nowhere.json'"),
        ('{"steps": 1}', "'steps': is not an input"),
        ('{"seed": "1"}', "seed: '1' is not a whole number"),
        ('{"num_outputs": true}', "num_outputs: True is not a whole number"),
    ],
)
def test_wrong_json_is_told_in_one_line(
    text: str, told: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict([], text) == 2
    out, error = capsys.readouterr()
    assert error.startswith(told) and error.count("\n") == 1
    assert json.loads(out) == {"status": "failed", "output": [], "error": error.removesuffix("\n")}


def test_json_values_are_taken_as_they_are(folder: Path) -> None:
    Path("inputs.json").write_text('{"prompt": "@猫", "seed": null}', encoding="utf-8")
    assert read_json("@inputs.json") == {"prompt": "@猫", "seed": None}


def test_pictures_go_where_they_should(folder: Path) -> None:
    (folder / "there.png").mkdir()
    assert choose_target(None, Request(num_outputs=2)) == Path(".")
    assert choose_target("new/deeper", Request(num_outputs=8)) == Path("new/deeper")
    assert choose_target("v1.5/", Request()) == Path("v1.5")
    assert choose_target("there.png", Request(num_outputs=2)) == Path("there.png")
    assert choose_target("other/cat.PNG", Request()) == Path("other/cat.PNG")
    assert choose_target("cat.jpeg", Request(output_format="jpg")) == Path("cat.jpeg")
    assert all(Path(made).is_dir() for made in ("new/deeper", "v1.5", "other"))


@pytest.mark.parametrize(
    ("output", "inputs", "told"),
    [
        ("cat.gif", {}, "--output: 'cat.gif' is neither a folder nor a file that ends in .png, .jpg"),
        ("cat.png", {"output_format": "webp"}, "--output: 'cat.png' is no name for output_format webp"),
        ("cats.png", {"num_outputs": 2}, "--output: 'cats.png' is one file for 2 pictures"),
        ("file/inside", {}, "--output: 'file/inside' can't be made (Not a directory)"),
        ("nul\0", {}, "--output: 'nul\\x00' can't be made"),
    ],
)
def test_a_wrong_output_is_told_before_anything_is_computed(
    output: str, inputs: dict[str, Any], told: str, folder: Path
) -> None:
    Path("file").touch()
    with pytest.raises(RequestError) as error:
        choose_target(output, Request(**inputs))
    assert str(error.value).startswith(told)


def test_the_ending_of_the_file_is_the_format(folder: Path) -> None:
    assert predict([*SMALL, "seed=5", "output_quality=40"], output="cat.jpg") == 0
    assert predict([*SMALL, "seed=5", "output_format=webp"], output="folder") == 0
    assert [Image.open(name).format for name in ("cat.jpg", "folder/output.0.webp")] == ["JPEG", "WEBP"]
    assert predict([*SMALL, "seed=5", "output_format=jpg"], output="cat.png") == 2

    assert predict([], again="cat.jpg") == 0
    assert Path("output.0.jpg").read_bytes() == Path("cat.jpg").read_bytes()
    assert predict([], output="cat.png", again="cat.jpg") == 0
    assert predict([*SMALL, "seed=5"], output="same.png") == 0
    assert Image.open("cat.png").format == "PNG"
    assert largest_difference("cat.png", "same.png") == 0


def test_a_folder_in_the_way_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("output.0.png").mkdir()
    assert predict(SMALL) == 2
    assert capsys.readouterr().err.endswith(
        "--output: 'output.0.png' is a folder where the picture should go; name another\n"
    )
    assert os.listdir("output.0.png") == []


def test_pictures_are_written_and_named_on_stdout(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict([*SMALL, "seed=1", "num_outputs=2"]) == 0
    assert capsys.readouterr().out == "output.0.png\noutput.1.png\n"
    assert [Image.open(f"output.{i}.png").size for i in range(2)] == [(64, 128)] * 2

    assert predict([*SMALL, "seed=2"], None, "again.png") == 0
    # A batch may round otherwise than one picture alone.
    assert (
        largest_difference("again.png", "output.1.png") <= 2 < largest_difference("again.png", "output.0.png")
    )


def test_json_in_is_json_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": 1, "prompt": "@猫"}
    assert predict([], json.dumps(inputs), "pictures") == 0
    written = {"status": "succeeded", "output": ["pictures/output.0.png"], "error": ""}
    assert json.loads(capsys.readouterr().out) == written
    assert Image.open("pictures/output.0.png").size == (64, 64)


def test_a_picture_is_made_again_from_its_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict([*SMALL, "seed=5", "prompt=猫", "scheduler=DDIM"], output="cat.png") == 0
    assert predict([], output="again.png", again="cat.png") == 0
    assert largest_difference("cat.png", "again.png") == 0
    assert predict(["prompt=犬"], output="dog.png", again="cat.png") == 0
    assert Image.open("dog.png").size == (64, 128)
    assert largest_difference("cat.png", "dog.png") > 0
    assert "others than those" not in capsys.readouterr().err


def test_a_picture_of_other_weights_is_made_with_a_warning(
    folder: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict([*SMALL, "seed=5"], output="cat.png") == 0
    shutil.copytree(tiny_weights, "copy")
    Path("copy/manifest.json").write_text('{"name": "another", "version": "2"}')
    monkeypatch.setenv("JSD_WEIGHTS", "copy")
    assert predict([], output="again.png", again="cat.png") == 0
    assert "others than those it was made with (tiny)" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["nowhere.png", "plain.png", "text.png", "."])
def test_a_file_without_parameters_is_told_in_one_line(
    file: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (8, 8)).save("plain.png")
    Path("text.png").write_text("no picture")
    assert predict([], again=file) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{file}: ") and error.count("\n") == 1


def test_a_picture_is_made_from_a_file_and_made_again_with_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.linear_gradient("L").resize((64, 64)).save("photo.png")
    Image.linear_gradient("L").resize((64, 64)).save("mask.png")
    Image.new("L", (64, 64), 255).save("other.png")
    made = ["seed=5", "num_inference_steps=4", "prompt_strength=0.5", "mask=mask.png"]
    assert predict([*made, "image=photo.png"], output="a.png") == 0
    assert predict([*made, "image=@photo.png"], output="b.png") == 0
    data = "data:image/png;base64," + base64.b64encode(Path("photo.png").read_bytes()).decode()
    inputs = {"seed": 5, "num_inference_steps": 4, "prompt_strength": 0.5, "mask": "mask.png", "image": data}
    assert predict([], json.dumps(inputs), output="c.png") == 0
    assert Image.open("a.png").size == (64, 64)
    assert largest_difference("a.png", "b.png") == largest_difference("a.png", "c.png") == 0
    capsys.readouterr()

    assert predict([], again="a.png") == 2
    assert capsys.readouterr().err.startswith("image: a.png was made from a picture that it doesn't hold; ")
    assert predict(["image=photo.png"], again="a.png") == 2
    assert capsys.readouterr().err.startswith("mask: a.png was made from a picture that it doesn't hold; ")
    assert predict(["image=photo.png", "mask=mask.png"], output="again.png", again="a.png") == 0
    assert largest_difference("a.png", "again.png") == 0
    assert "will look different" not in capsys.readouterr().err
    assert predict(["image=other.png", "mask=mask.png"], output="else.png", again="a.png") == 0
    assert "made from other pictures than those given" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        (["image=nowhere.png"], "image: can't be read (No such file or directory)"),
        (["image="], "image: can't be read (Is a directory)"),
        (["image=text.png"], "image: is not a picture that can be read"),
        (["image=http://127.0.0.1:1/a.png"], "image: can't be fetched (ConnectionError: "),
        (["image=data:image/png;base64,AAAA"], "image: is not a picture that can be read"),
        (["image=http://["], "image: can't be fetched (ValueError: "),
        (["mask=text.png"], "mask: is given without a picture"),
        (["image=white.png", "mask=text.png"], "mask: is not a picture that can be read"),
    ],
)
def test_a_wrong_picture_is_told_in_one_line(
    typed: list[str], told: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("text.png").write_text("<html></html>")
    Image.new("RGB", (64, 64), "white").save("white.png")
    assert predict(typed) == 2
    error = capsys.readouterr().err
    assert error.startswith(told) and error.count("\n") == 1


def test_nothing_is_left_behind_but_the_pictures(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = folder.parent / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "PNG")
    data = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    assert predict([*SMALL, f"image={data}"]) == 0
    assert os.listdir(scratch) == []


def test_missing_weights_are_told_in_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JSD_WEIGHTS", "nowhere")
    assert predict(SMALL) == 1
    error = capsys.readouterr().err
    assert error.startswith("JSD_WEIGHTS: nowhere is not a folder") and error.count("\n") == 1


def test_a_wrong_input_is_told_before_pytorch_is_loaded() -> None:
    code = (
        "import sys\nfrom japanese_stable_diffusion.command import predict\n"
        "assert predict(['seed=x']) == 2\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


def largest_difference(one: str, other: str) -> int:
    pictures = (np.asarray(Image.open(file), dtype=int) for file in (one, other))
    return int(abs(np.subtract(*pictures)).max())


def test_a_picture_made_with_a_lora_and_a_variation_is_made_again(
    folder: Path, weights: Weights, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "japanese_stable_diffusion")
    for name, factor in (("style.safetensors", 1.0), ("other.safetensors", 2.0)):
        generator = torch.Generator().manual_seed(0)
        tensors = {
            f"lora_unet_{layer.replace('.', '_')}.lora_{kind}.weight": factor
            * torch.randn(shape, generator=generator)
            for layer, module in weights.unet.named_modules()
            if isinstance(module, torch.nn.Linear)
            for kind, shape in (("down", (2, module.in_features)), ("up", (module.out_features, 2)))
        }
        save_file(tensors, name)
    typed = [*SMALL, "seed=5", "lora=style.safetensors", "lora_scale=0.5", "variation_strength=0.5"]
    assert predict(typed, output="styled.png") == 0
    assert any(message.startswith("variation_seed: ") for message in caplog.messages)
    assert predict([*SMALL, "seed=5"], output="plain.png") == 0
    assert largest_difference("styled.png", "plain.png") > 5

    assert predict(["lora=style.safetensors"], output="again.png", again="styled.png") == 0
    assert largest_difference("styled.png", "again.png") == 0
    assert "another LoRA" not in capsys.readouterr().err
    assert predict(["lora=other.safetensors"], output="again.png", again="styled.png") == 0
    assert "it was made with another LoRA than the one given" in capsys.readouterr().err
    assert largest_difference("styled.png", "again.png") > 5

    for missing, told in (
        ([], "lora: styled.png was made with a LoRA that it doesn't hold; give that with -i lora=FILE"),
        (["lora=nowhere"], "lora: can't be read (No such file or directory)"),
        (["lora=styled.png"], "lora: is not a safetensors file"),
    ):
        assert predict(missing, output="again.png", again="styled.png") == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith(told)
