"""Turn a weights folder of 2022 into today's layout: safetensors, today's key names, and a manifest."""

import shutil
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file

from japanese_stable_diffusion.pipeline import vae_factor
from japanese_stable_diffusion.weights import Manifest, Source, hash_files, load_weights, write_manifest

Precision = Literal["fp16", "fp32"]

TYPES = {"fp16": torch.float16, "fp32": torch.float32}


def convert(
    source: Path, destination: Path, precision: Precision, name: str, version: str, sources: list[Source]
) -> None:
    """Write the weights in `source` to `destination`, which is made anew.

    Args:
        source: a weights folder in either layout. Pickles in it are read as tensors and nothing else.
        destination: the new folder; what was there goes.
        precision: of all tensors but the VAE's. Those stay in fp32, in which they are computed: in fp16,
            activations of Stable Diffusion's VAE can overflow, and the picture comes out black.
        name, version, sources: for the manifest.

    Raises:
        WeightsError: `source` can't be used; the message names the file.
    """
    weights = load_weights(source, torch.device("cpu"), TYPES[precision])
    shutil.rmtree(destination, ignore_errors=True)
    for part in ("tokenizer", "scheduler"):
        shutil.copytree(source / part, destination / part)
    models: list[tuple[str, str, torch.nn.Module]] = [
        ("text_encoder", "model", weights.text_encoder),
        ("unet", "diffusion_pytorch_model", weights.unet),
        ("vae", "diffusion_pytorch_model", weights.vae),
    ]
    if weights.safety:
        shutil.copytree(source / "feature_extractor", destination / "feature_extractor")
        models.append(("safety_checker", "model", weights.safety.model))
    for part, file, model in models:
        (destination / part).mkdir()
        shutil.copy(source / part / "config.json", destination / part)
        tensors = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
        path = destination / part / f"{file}.safetensors"
        save_file(tensors, path, metadata={"format": "pt"})
        # safetensors lets nobody but the owner read what it writes, and containers seldom run as that.
        path.chmod((destination / part / "config.json").stat().st_mode & 0o666)
    native_size = weights.unet.config["sample_size"] * vae_factor(weights.vae)
    write_manifest(
        Manifest(name, version, native_size, files=hash_files(destination), sources=sources), destination
    )
