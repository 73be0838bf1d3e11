"""LoRA files: every kind of key, the weights that they amount to, and what doesn't fit."""

import copy
import dataclasses
import json

import pytest
import torch
from safetensors.torch import save_file

from japanese_stable_diffusion.lora import LoRA
from japanese_stable_diffusion.request import RequestError

RANK, ALPHA = 2, 1.0
UNET = ("down_blocks.0.attentions.0.transformer_blocks.0", "down_blocks.0.resnets.0")
LAYERS = [
    ("unet", f"{UNET[0]}.attn1.to_q"),
    ("unet", f"{UNET[0]}.attn2.to_out.0"),
    ("unet", f"{UNET[0]}.ff.net.0.proj"),
    ("unet", "down_blocks.0.attentions.0.proj_in"),
    ("unet", f"{UNET[1]}.conv1"),
    ("unet", f"{UNET[1]}.time_emb_proj"),
    ("unet", "down_blocks.0.downsamplers.0.conv"),
    ("text_encoder", "encoder.layers.1.self_attn.q_proj"),
    ("text_encoder", "encoder.layers.0.mlp.fc1"),
]
"""Of every kind: linear, convolution over single pixels, over neighbours, and over every other pixel."""
ATTENTION = LAYERS[:2]


def matrices(weights, layers, generator_seed=0):
    """Random A and B for each layer."""
    generator = torch.Generator().manual_seed(generator_seed)
    made = {}
    for part, name in layers:
        weight = getattr(weights, part).get_submodule(name).weight
        kernel = (1, 1)[: weight.ndim - 2]
        made[part, name] = (
            torch.randn(RANK, *weight.shape[1:], generator=generator) / 2,
            torch.randn(weight.shape[0], RANK, *kernel, generator=generator) / 2,
        )
    return made


def kohya(weights, layers=LAYERS):
    tensors = {}
    for (part, name), (down, up) in matrices(weights, layers).items():
        stem = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}[part] + name.replace(".", "_")
        tensors |= {
            f"{stem}.lora_down.weight": down,
            f"{stem}.lora_up.weight": up,
            f"{stem}.alpha": torch.tensor(ALPHA),
        }
    return tensors


def diffusers(weights, layers=LAYERS, kinds=("lora_A", "lora_B")):
    tensors = {}
    for (part, name), pair in matrices(weights, layers).items():
        inside = "text_model." if part == "text_encoder" else ""
        tensors |= {
            f"{part}.{inside}{name}.{kind}.weight": tensor for kind, tensor in zip(kinds, pair, strict=True)
        }
    return tensors


def peft(weights, layers=LAYERS):
    return {
        f"base_model.model.{key.split('.', 1)[1]}": tensor
        for key, tensor in diffusers(weights, layers).items()
    }


def attention_processors(weights, layers=ATTENTION):
    tensors = {}
    for (part, name), pair in matrices(weights, layers).items():
        parent, _, layer = name.removesuffix(".0").rpartition(".")
        for kind, tensor in zip(("down", "up"), pair, strict=True):
            tensors[f"{part}.{parent}.processor.{layer}_lora.{kind}.weight"] = tensor
    return tensors


def merged(weights, layers, factor):
    """The same weights with the changes added to them."""
    changed = dataclasses.replace(
        weights, unet=copy.deepcopy(weights.unet), text_encoder=copy.deepcopy(weights.text_encoder)
    )
    for (part, name), (down, up) in matrices(weights, layers).items():
        weight = getattr(changed, part).get_submodule(name).weight
        weight.data += factor * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    return changed


@torch.inference_mode()
def outputs(weights):
    """What the UNet and the text encoder make of something."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    embeddings = torch.randn(2, 77, 32, generator=generator)
    ids = torch.tensor([weights.tokenizer("猫と寿司").ids])
    return (
        weights.unet(latents, torch.tensor(500), embeddings).sample,
        weights.text_encoder(ids).last_hidden_state,
    )


def applied(path, tensors, weights, scale=1.0, metadata=None):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    lora = LoRA(path, scale, weights)
    with lora:
        return outputs(weights)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.safetensors"


@pytest.mark.parametrize(
    ("make", "layers", "factor"),
    [
        (kohya, LAYERS, ALPHA / RANK),
        (diffusers, LAYERS, 1),
        (lambda weights, layers: diffusers(weights, layers, ("lora.down", "lora.up")), LAYERS, 1),
        (
            lambda weights, layers: diffusers(
                weights, layers, ("lora_linear_layer.down", "lora_linear_layer.up")
            ),
            LAYERS,
            1,
        ),
        (peft, LAYERS, 1),
        (attention_processors, ATTENTION, 1),
    ],
    ids=["kohya", "diffusers", "diffusers of old", "linear layers", "PEFT", "attention processors"],
)
@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_applied_it_is_as_if_the_weights_were_changed(make, layers, factor, scale, weights, path):
    bare = outputs(weights)
    found = applied(path, make(weights, layers), weights, scale)
    expected = outputs(merged(weights, layers, scale * factor))
    for one, other, plain, part in zip(found, expected, bare, ("unet", "text_encoder"), strict=True):
        assert torch.allclose(one, other, atol=1e-4)
        assert (not torch.allclose(one, plain, atol=1e-2)) == any(part == layer[0] for layer in layers)


def test_outside_of_with_the_weights_are_bare(weights, path):
    bare = outputs(weights)
    before = [module for module in weights.unet.modules() if module._forward_hooks]
    save_file(kohya(weights), path)
    lora = LoRA(path, 1.0, weights)
    assert all(map(torch.equal, outputs(weights), bare))
    with pytest.raises(KeyboardInterrupt), lora:
        raise KeyboardInterrupt
    assert all(map(torch.equal, outputs(weights), bare))
    made = lora.during(outputs(weights)[1] for _ in range(2))
    for one in made:
        assert not torch.allclose(one, bare[1], atol=1e-2)
        assert all(map(torch.equal, outputs(weights), bare))
    assert [module for module in weights.unet.modules() if module._forward_hooks] == before


def test_a_convolution_over_single_pixels_is_a_linear_layer_too(weights, path):
    layers = [LAYERS[3], LAYERS[0]]
    convolution, linear = matrices(weights, layers).values()
    assert convolution[0].ndim == 4 and linear[0].ndim == 2
    tensors = kohya(weights, layers)
    swapped = {
        name: tensor
        if not tensor.ndim
        else tensor.flatten(1)
        if tensor.ndim == 4
        else tensor[..., None, None]
        for name, tensor in tensors.items()
    }
    for one, other in zip(
        applied(path, swapped, weights), outputs(merged(weights, layers, ALPHA / RANK)), strict=True
    ):
        assert torch.allclose(one, other, atol=1e-4)


def test_the_alpha_that_diffusers_writes_beside_the_tensors_counts(weights, path):
    metadata = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 6, "unet.r": RANK})}
    found = applied(path, diffusers(weights), weights, metadata=metadata)
    assert torch.allclose(found[0], outputs(merged(weights, LAYERS, 3))[0], atol=1e-3)
    assert torch.allclose(found[1], outputs(merged(weights, LAYERS, 1))[1], atol=1e-3)


@pytest.mark.parametrize(
    "metadata",
    ["{", "[]", '{"unet.lora_alpha": "x"}', '{"unet.lora_alpha": NaN}', '{"unet.alpha_pattern": {"a": 1}}'],
)
def test_metadata_that_says_something_else_is_refused(metadata, weights, path):
    with pytest.raises(RequestError, match=r"^lora: has (metadata that|no single alpha)"):
        applied(path, diffusers(weights), weights, metadata={"lora_adapter_metadata": metadata})


FIRST = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {f"{FIRST}.lora_down.weight": torch.ones(2, 17)},
            "down.weight is [2, 17] where [rank, 16] is needed",
        ),
        (
            {f"{FIRST}.lora_down.weight": torch.ones(0, 16)},
            "down.weight is [0, 16] where [rank, 16] is needed",
        ),
        ({f"{FIRST}.lora_down.weight": torch.tensor(1.0)}, "down.weight is [] where [rank, 16] is needed"),
        ({f"{FIRST}.lora_up.weight": torch.ones(16, 3)}, "up.weight is [16, 3] where [16, 2] is needed"),
        ({f"{FIRST}.lora_up.weight": torch.ones(16, 2, 3, 3)}, "where [16, 2] is needed"),
        ({f"{FIRST}.alpha": torch.ones(2)}, "alpha is [2] where one number is needed"),
        ({f"{FIRST}.lora_up.weight": torch.full((16, 2), torch.nan)}, "are not finite"),
        ({f"{FIRST}.alpha": torch.tensor(torch.inf)}, "are not finite"),
        ({f"{FIRST}.dora_scale": torch.ones(16)}, "dora_scale has no place in them"),
        ({f"{FIRST}.hada_w1_a": torch.ones(16)}, "hada_w1_a has no place in them"),
        ({"lora_te2_text_model_encoder.lora_up.weight": torch.ones(1)}, "has no place in them"),
        ({"lora_unet_mid_block_x.lora_up.weight": torch.ones(1)}, "mid_block_x.lora_up.weight has no place"),
        ({f"{FIRST}.lora_A.weight": torch.ones(2, 16)}, "is there twice"),
        ({f"{FIRST[:-1]}k.lora_up.weight": torch.ones(16, 2)}, "to_k.lora_up.weight has no down part"),
        ({f"{FIRST[:-1]}k.alpha": torch.ones(1)}, "to_k.alpha has no down part"),
        ({"": torch.ones(1)}, " has no place"),
        ({"model\n.weight": torch.ones(1)}, "'model\\n.weight' has no place"),
        ({"k" * 9999: torch.ones(1)}, "kkk... has no place"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_told_in_one_line(change, told, weights, path):
    bare = outputs(weights)
    with pytest.raises(RequestError) as error:
        applied(path, kohya(weights) | change, weights)
    message = str(error.value)
    assert message.startswith("lora: ") and told in message and message.isprintable()
    assert all(map(torch.equal, outputs(weights), bare))


def test_of_much_that_does_not_fit_the_first_and_the_number_are_told(weights, path):
    with pytest.raises(
        RequestError, match=r"some\.100 .*some\.104 .*; and 95 more; a safetensors file"
    ) as error:
        applied(path, {f"some.{i}": torch.ones(1) for i in range(100, 200)}, weights)
    assert "some.105" not in str(error.value)


def test_another_kind_of_file_is_told_in_one_line(weights, path, tmp_path):
    torch.save(kohya(weights), tmp_path / "pickle.pt")
    (tmp_path / "empty").touch()
    save_file({}, tmp_path / "nothing")
    save_file(kohya(weights), path)
    (tmp_path / "short").write_bytes(path.read_bytes()[:-1])
    for name, told in [
        ("pickle.pt", "is not a safetensors file"),
        ("empty", "is not a safetensors file"),
        ("short", "is not a safetensors file"),
        ("nothing", "holds no tensors"),
        ("missing", "can't be read (No such file or directory)"),
        (".", "can't be read (Is a directory)"),
    ]:
        with pytest.raises(RequestError) as error:
            LoRA(tmp_path / name, 1.0, weights)
        assert str(error.value).startswith(f"lora: {told}"), name
        assert str(error.value).isprintable()


def test_a_damaged_header_is_never_another_error(weights, path):
    save_file(kohya(weights, ATTENTION), path)
    whole = path.read_bytes()
    for position in range(0, int.from_bytes(whole[:8], "little") + 8, 3):
        damaged = bytearray(whole)
        damaged[position] ^= 0x55
        path.write_bytes(damaged)
        try:
            LoRA(path, 1.0, weights)
        except RequestError as error:
            assert str(error).isprintable()


def test_a_file_of_more_bytes_than_allowed_is_not_read(weights, path, monkeypatch):
    monkeypatch.setattr("japanese_stable_diffusion.lora.LORA_BYTES", 1000)
    save_file(kohya(weights), path)
    with pytest.raises(RequestError, match=r"^lora: is [\d,]+ bytes large; up to 1,000 are allowed"):
        LoRA(path, 1.0, weights)
