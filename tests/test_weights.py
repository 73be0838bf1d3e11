"""Weights folders of both layouts load alike, and everything else is refused with one line."""

import dataclasses
import json
import os
import pickle
import shutil

import pytest
import torch
from layout_2022 import write_2022_layout
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from japanese_stable_diffusion import weights as weights_module
from japanese_stable_diffusion.conversion import convert
from japanese_stable_diffusion.safety import is_flagged
from japanese_stable_diffusion.speed import speed_up
from japanese_stable_diffusion.weights import (
    File,
    Manifest,
    Source,
    Training,
    WeightsError,
    find_weights,
    hash_files,
    load_weights,
    read_manifest,
    verify_weights,
    write_manifest,
)

CPU = torch.device("cpu")
UNET = "unet/diffusion_pytorch_model.safetensors"
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def load(folder):
    return load_weights(folder, CPU, torch.float32)


@pytest.fixture
def folder(tiny_weights, tmp_path):
    """A copy of the tiny weights, to be spoilt."""
    return shutil.copytree(tiny_weights, tmp_path / "spoilt")


@pytest.fixture(scope="module")
def folder_2022(tiny_weights, tmp_path_factory):
    return write_2022_layout(tiny_weights, tmp_path_factory.mktemp("2022"))


def parts(weights):
    return (weights.text_encoder, weights.unet, weights.vae)


def test_tensors_are_those_of_the_files(tiny_weights, weights):
    loaded = weights.unet.state_dict()
    saved = load_file(tiny_weights / UNET)
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.items())
    for part in parts(weights):
        assert not part.training
        assert not any(parameter.requires_grad for parameter in part.parameters())
        assert not any(tensor.is_meta for tensor in [*part.parameters(), *part.buffers()])


def test_the_layout_of_2022_gives_the_same_tensors(weights, folder_2022):
    assert not list(folder_2022.rglob("*.safetensors"))
    loaded = load(folder_2022)
    for part, expected in zip(parts(loaded), parts(weights), strict=True):
        tensors = part.state_dict()
        assert tensors.keys() == expected.state_dict().keys()
        assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.state_dict().items())
    assert loaded.tokenizer("猫").ids == weights.tokenizer("猫").ids


def test_pickles_that_are_older_than_their_zip_form_load_too(weights, folder_2022, tmp_path):
    folder = shutil.copytree(folder_2022, tmp_path / "older")
    path = folder / "unet" / "diffusion_pytorch_model.bin"
    torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)
    assert torch.equal(load(folder).unet.conv_in.weight, weights.unet.conv_in.weight)


def test_a_safety_checker_is_loaded_where_there_is_one(weights, folder_2022):
    assert weights.safety is None
    checker = load(folder_2022).safety
    assert not checker.model.training
    assert not any(tensor.is_meta for tensor in [*checker.model.parameters(), *checker.model.buffers()])
    saved = torch.load(folder_2022 / "safety_checker" / "pytorch_model.bin", weights_only=True)
    assert torch.equal(checker.model.concept_embeds, saved["concept_embeds"])
    assert checker.image_processor.image_mean == (0.48145466, 0.4578275, 0.40821073)


def test_half_precision_spares_the_vae(tiny_weights):
    half = load_weights(tiny_weights, CPU, torch.float16)
    assert {p.dtype for p in half.text_encoder.parameters()} == {torch.float16}
    assert {p.dtype for p in half.unet.parameters()} == {torch.float16}
    assert {p.dtype for p in half.vae.parameters()} == {torch.float32}


def test_files_in_half_precision_are_computed_in_single(folder):
    save_file({name: tensor.half() for name, tensor in load_file(folder / UNET).items()}, folder / UNET)
    assert {parameter.dtype for parameter in load(folder).unet.parameters()} == {torch.float32}


def test_lazily_loaded_layers_are_converted_when_they_compute(folder_2022, folder, tmp_path):
    convert(folder_2022, tmp_path / "half", "fp16", "half", "1", [])
    whole = load_weights(tmp_path / "half", CPU, torch.float32)
    lazy = load_weights(tmp_path / "half", CPU, torch.float32, lazily=True)
    models = [(lazy.text_encoder, whole.text_encoder), (lazy.unet, whole.unet)]
    models.append((lazy.safety.model, whole.safety.model))
    for model, _ in models:
        assert {tensor.dtype for tensor in model.parameters()} == {torch.float16}
    speed_up(whole)
    speed_up(lazy)
    latents, text = torch.ones(1, 4, 8, 8), torch.tensor([[0, 5, 2]])
    picture = Image.new("RGB", (64, 64), "red")
    with torch.inference_mode():
        texts = [each.text_encoder(text).last_hidden_state for each in (lazy, whole)]
        assert torch.equal(*texts)
        assert torch.equal(*(each.unet(latents, 1, texts[0]).sample for each in (lazy, whole)))
    assert is_flagged(picture, lazy.safety) == is_flagged(picture, whole.safety)
    for model, expected in models:
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, expected.state_dict()[name]), name


def test_what_was_loaded_lazily_can_be_converted_at_once(folder, weights):
    save_file({name: tensor.half() for name, tensor in load_file(folder / UNET).items()}, folder / UNET)
    lazy = load_weights(folder, CPU, torch.float32, lazily=True)
    assert {parameter.dtype for parameter in lazy.unet.parameters()} == {torch.float16}
    lazy.convert()
    assert {parameter.dtype for parameter in lazy.unet.parameters()} == {torch.float32}


def test_safetensors_go_before_pickles(folder, weights):
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"never read")
    assert torch.equal(load(folder).unet.conv_in.weight, weights.unet.conv_in.weight)


def test_the_named_folder_goes_first(monkeypatch, tmp_path, tiny_weights):
    monkeypatch.setenv("JSD_WEIGHTS", str(tiny_weights))
    assert find_weights() == tiny_weights
    monkeypatch.setenv("JSD_WEIGHTS", str(tmp_path / "nowhere"))
    with pytest.raises(WeightsError, match=r"^JSD_WEIGHTS: .*nowhere is not a folder"):
        find_weights()


def test_without_a_named_folder_the_real_weights_go_before_the_demo(monkeypatch, tmp_path):
    monkeypatch.delenv("JSD_WEIGHTS", raising=False)
    monkeypatch.setattr(weights_module, "WEIGHTS", tmp_path)
    with pytest.raises(WeightsError, match=r"holds no weights; .*scripts/download-weights"):
        find_weights()
    (tmp_path / "demo").mkdir()
    assert find_weights() == tmp_path / "demo"
    (tmp_path / "japanese-stable-diffusion").mkdir()
    assert find_weights() == tmp_path / "japanese-stable-diffusion"


def test_weights_are_looked_for_beside_the_package_from_everywhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert weights_module.WEIGHTS.parent.joinpath("predict.py").is_file()


MANIFEST = Manifest(
    name="小さな模型",
    version="1.0",
    native_size=128,
    enlarge=4,
    files={"unet/config.json": File(12, "ab")},
    sources=[Source("Emoji", "Apache-2.0", "https://example.org", "pictures")],
    training=Training("abc", "demo", 0, "emoji"),
)


@pytest.mark.parametrize("manifest", [MANIFEST, dataclasses.replace(MANIFEST, training=None)])
def test_a_manifest_is_read_as_it_was_written(tmp_path, manifest):
    write_manifest(manifest, tmp_path)
    assert read_manifest(tmp_path) == manifest


def test_a_folder_without_a_manifest_is_full_size_and_named_as_it_is(tiny_weights):
    assert read_manifest(tiny_weights) == Manifest(name="tiny", native_size=512, enlarge=1)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[1]", "not a JSON object"),
        ("{", "JSON"),
        ("{}", "name"),
        ('{"name": "a", "colour": 1}', "colour"),
        ('{"name": "a", "files": [1]}', "files|items"),
        ('{"name": "a", "files": {"b": {"bytes": 1}}}', "sha256"),
        ('{"name": "a", "sources": [{"name": "b"}]}', "licence"),
        ('{"name": "a", "native_size": "128"}', "native_size is '128'"),
        ('{"name": "a", "enlarge": 0}', "enlarge is 0"),
        ('{"name": "a", "few_steps": 51}', "few_steps is 51, but a whole number from 0 to 50"),
        ('{"name": "a", "guidance_scale": 8}', "guidance_scale is 8, but a number above 1 and up to 7.5"),
        ('{"name": "a", "guidance_scale": true}', "guidance_scale is True"),
        (LFS_POINTER, "Git LFS pointer"),
    ],
)
def test_what_is_not_a_manifest_is_told(folder, content, told):
    (folder / "manifest.json").write_text(content)
    assert_refused(folder, "manifest.json", told)


def assert_refused(folder, name, told):
    with pytest.raises(WeightsError, match=told) as error:
        load(folder)
    message = str(error.value)
    assert message.startswith(str(folder / name))
    assert message.isprintable()
    assert "scripts/download-weights" in message
    assert "JSD_WEIGHTS" in message
    assert len(message) < len(str(folder)) + 500


def test_sizes_are_always_checked_and_hashes_when_asked(folder, monkeypatch):
    manifest = Manifest("tiny", files=hash_files(folder))
    assert set(manifest.files) == {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    }
    write_manifest(manifest, folder)
    load(folder)
    verify_weights(folder, read_manifest(folder), hashes=True)

    content = bytearray((folder / UNET).read_bytes())
    content[-1] ^= 1
    (folder / UNET).write_bytes(content)
    load(folder)
    with pytest.raises(WeightsError, match=f"{UNET}: its SHA-256 is not the one in manifest.json"):
        verify_weights(folder, manifest, hashes=True)
    monkeypatch.setenv("JSD_VERIFY_WEIGHTS", "on")
    assert_refused(folder, UNET, "its SHA-256 is not the one in manifest.json")
    monkeypatch.setenv("JSD_VERIFY_WEIGHTS", "off")
    load(folder)
    monkeypatch.setenv("JSD_VERIFY_WEIGHTS", "yes")
    with pytest.raises(WeightsError, match="JSD_VERIFY_WEIGHTS: 'yes' is unknown; on or off is allowed"):
        load(folder)
    monkeypatch.delenv("JSD_VERIFY_WEIGHTS")

    (folder / UNET).write_bytes(content + b"\0")
    assert_refused(folder, UNET, rf"has {len(content) + 1:,} bytes, manifest.json says {len(content):,}")
    (folder / UNET).write_text(LFS_POINTER)
    assert_refused(folder, UNET, "Git LFS pointer")
    (folder / UNET).unlink()
    assert_refused(folder, UNET, "is missing")


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer/spiece.model",
        "text_encoder/config.json",
        "unet/config.json",
        "vae/config.json",
        "scheduler/scheduler_config.json",
    ],
)
@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "is missing"),
        (LFS_POINTER, "Git LFS pointer"),
        ("", "JSON|sentencepiece"),
        ("[]", "JSON|sentencepiece"),
    ],
    ids=["missing", "pointer", "empty", "list"],
)
def test_missing_and_foreign_small_files_are_told(folder, name, content, told):
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    assert_refused(folder, name, told)


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_a_missing_part_is_told(folder, part):
    shutil.rmtree(folder / part)
    assert_refused(folder, f"{part}/config.json", "is missing")


def test_a_part_without_tensors_is_told(folder):
    (folder / UNET).unlink()
    assert_refused(folder, "unet", "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda content: content[:-100], "truncated or damaged"),
        (lambda content: content[:2000], "truncated or damaged"),
        (lambda content: b"", "truncated or damaged"),
        (lambda content: b"<html>Not found</html>", "truncated or damaged"),
        (lambda content: LFS_POINTER.encode(), "Git LFS pointer"),
    ],
    ids=["cut", "cut short", "empty", "html", "pointer"],
)
@pytest.mark.parametrize("layout", ["today", "2022"])
def test_spoilt_tensors_are_told(tiny_weights, folder_2022, tmp_path, spoil, told, layout):
    source, name = (
        (tiny_weights, UNET) if layout == "today" else (folder_2022, UNET.replace("safetensors", "bin"))
    )
    folder = shutil.copytree(source, tmp_path / "spoilt")
    (folder / name).write_bytes(spoil((folder / name).read_bytes()))
    if layout == "2022" and told.startswith("truncated"):
        told = "truncated or damaged|not a pickle of tensors"
    assert_refused(folder, name, told)


def test_a_hostile_pickle_is_refused_and_does_not_run(folder, tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    (folder / UNET).unlink()
    path = folder / "unet" / "diffusion_pytorch_model.bin"
    for write in (torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2))):
        write({"conv_in.weight": Hostile()}, path)
        assert_refused(folder, "unet/diffusion_pytorch_model.bin", "not a pickle of tensors and nothing else")
    assert not (tmp_path / "ran").exists()
    pickle.loads(path.read_bytes())
    assert (tmp_path / "ran").exists(), "this pickle would have run"


def test_a_pickle_of_something_else_is_told(folder):
    (folder / UNET).unlink()
    torch.save([1, 2], folder / "unet" / "diffusion_pytorch_model.bin")
    assert_refused(folder, "unet/diffusion_pytorch_model.bin", "is not a table of tensors")


def test_tensors_that_do_not_belong_to_the_config_are_told(folder):
    tensors = load_file(folder / UNET)
    save_file({**tensors, "extra.weight": torch.zeros(1)}, folder / UNET)
    assert_refused(folder, UNET, "'extra.weight'")
    save_file({name: tensor for name, tensor in tensors.items() if name != "conv_in.bias"}, folder / UNET)
    assert_refused(folder, UNET, "conv_in.bias")
    save_file({**tensors, "conv_in.bias": torch.zeros(3)}, folder / UNET)
    assert_refused(folder, UNET, "size mismatch for conv_in.bias")


def change(path, **settings):
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("unet/config.json", {"block_out_channels": "wide"}),
        ("unet/config.json", {"down_block_types": ["NoSuchBlock", "NoSuchBlock"]}),
        ("vae/config.json", {"norm_num_groups": 7}),
        ("text_encoder/config.json", {"num_attention_heads": 5}),
        ("scheduler/scheduler_config.json", {"beta_start": "low"}),
        ("scheduler/scheduler_config.json", {"beta_schedule": "no such"}),
    ],
    ids=str,
)
def test_settings_that_make_no_model_are_told(folder, name, settings):
    change(folder / name, **settings)
    assert_refused(folder, name, "does not describe the expected model|is not a noise schedule")


def test_a_vocabulary_too_small_for_the_tokenizer_is_told(folder, weights):
    tensors = load_file(folder / "text_encoder" / "model.safetensors")
    [name] = [name for name in tensors if name.endswith("token_embedding.weight")]
    change(folder / "text_encoder" / "config.json", vocab_size=20)
    save_file({**tensors, name: tensors[name][:20].clone()}, folder / "text_encoder" / "model.safetensors")
    assert_refused(folder, "", f"tokenizer has {len(weights.tokenizer)} pieces, but text_encoder takes 20")


def test_a_text_encoder_of_another_width_is_told(folder):
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    shutil.rmtree(folder / "text_encoder")
    narrow = CLIPTextConfig.from_dict({**config, "hidden_size": 16})
    CLIPTextModel(narrow).save_pretrained(folder / "text_encoder")
    assert_refused(folder, "", "text_encoder is 16 wide, but unet takes 32")
