"""Weights of the real model's size, filled with random numbers, for measuring without the real ones."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPTextConfig, CLIPTextModel

from japanese_stable_diffusion.conversion import TYPES, Precision
from japanese_stable_diffusion.weights import WEIGHTS, Manifest, hash_files, write_manifest

UNET = {
    "sample_size": 64,
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
VAE = {
    "sample_size": 512,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
TEXT_ENCODER = {
    "vocab_size": 32_000,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
SAFETY_CHECKER = {
    "projection_dim": 768,
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
    },
}
FEATURE_EXTRACTOR = {
    "crop_size": 224,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": 224,
}
NOISE_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def make_random_weights(precision: Precision) -> Path:
    """The folder with random weights in a precision, in `weights/`; the first time it is made."""
    folder = WEIGHTS / f".random-{precision}"
    if not folder.is_dir():
        unfinished = folder.with_name(f"{folder.name}-unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        write_random_weights(unfinished, TYPES[precision], WEIGHTS / "demo" / "tokenizer")
        unfinished.rename(folder)
    return folder


def write_random_weights(folder: Path, dtype: torch.dtype, tokenizer: Path) -> None:
    """Write a folder that loads and computes like the real weights, and paints noise.

    Args:
        folder: to be made.
        dtype: of all tensors but the VAE's, which are in float32.
        tokenizer: the tokenizer folder of other weights, with at most 32,000 pieces.
    """
    shutil.copytree(tokenizer, folder / "tokenizer")
    _write_json(NOISE_SCHEDULE, folder / "scheduler" / "scheduler_config.json")
    _write_json(FEATURE_EXTRACTOR, folder / "feature_extractor" / "preprocessor_config.json")
    parts: tuple[tuple[str, str, dict[str, Any], Callable[[dict[str, Any]], torch.nn.Module]], ...] = (
        ("text_encoder", "model", TEXT_ENCODER, lambda c: CLIPTextModel(CLIPTextConfig.from_dict(c))),
        ("unet", "diffusion_pytorch_model", UNET, UNet2DConditionModel.from_config),
        ("vae", "diffusion_pytorch_model", VAE, AutoencoderKL.from_config),
        (
            "safety_checker",
            "model",
            SAFETY_CHECKER,
            lambda c: StableDiffusionSafetyChecker(CLIPConfig.from_dict(c)),
        ),
    )
    torch.manual_seed(0)
    for part, file, config, make in parts:
        with init_empty_weights():
            shapes = {name: tensor.shape for name, tensor in make(config).state_dict().items()}
        _write_json(config, folder / part / "config.json")
        part_dtype = torch.float32 if part == "vae" else dtype
        # So small that no activation overflows, whichever layer it is in.
        tensors = {n: torch.empty(shape).uniform_(-0.03, 0.03).to(part_dtype) for n, shape in shapes.items()}
        save_file(tensors, folder / part / f"{file}.safetensors")
    write_manifest(Manifest(name="random", files=hash_files(folder)), folder)


def _write_json(content: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
