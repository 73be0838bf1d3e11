"""Write trained models as a weights folder."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, ModelMixin, UNet2DConditionModel
from transformers import CLIPTextModel

from japanese_stable_diffusion.weights import WEIGHTS, Manifest, Source, Training, hash_files, write_manifest

from .configuration import Configuration
from .emoji import HANDS, NAMES_PACKAGE

PARTS = ("tokenizer", "text_encoder", "unet", "vae", "scheduler")
MODELS = {"text_encoder": CLIPTextModel, "unet": UNet2DConditionModel, "vae": AutoencoderKL}


def save_models(
    folder: Path, models: dict[str, Any], configuration: Configuration, tokenizer: Path | None
) -> None:
    """Write models, noise schedule and tokenizer, each into its subfolder, in single precision."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    for name, model in models.items():
        model.save_pretrained(folder / name)
    DDPMScheduler(**configuration.scheduler).save_pretrained(folder / "scheduler")
    if tokenizer:
        shutil.copytree(tokenizer, folder / "tokenizer")


def publish(trained: Path, folder: Path, configuration: Configuration, stage: str, version: str) -> None:
    """Make a weights folder that can be carried about: half precision, with a manifest.

    ``trained`` is what a stage left (``<stage>/weights``); ``folder`` keeps whatever else lies in it.
    The manifest names the commit, configuration, seed and data that made the weights, and whose art
    and words they learnt from.
    """
    commit = _commit()  # before what is checked out differs from it by these very weights
    partial = folder.with_name(folder.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    for name, kind in MODELS.items():
        model = kind.from_pretrained(trained / name, torch_dtype=torch.float16)
        if isinstance(model, ModelMixin):
            # diffusers notes where it read a model, which is a folder of the machine that trained it.
            model.register_to_config(_name_or_path="")
        model.save_pretrained(partial / name)
        for tensors in (partial / name).glob("*.safetensors"):
            # safetensors lets nobody but the owner read what it writes, and containers seldom run as that.
            tensors.chmod((partial / name / "config.json").stat().st_mode & 0o666)
    for name in ("tokenizer", "scheduler"):
        shutil.copytree(trained / name, partial / name)
    folder.mkdir(exist_ok=True)
    for name in PARTS:
        shutil.rmtree(folder / name, ignore_errors=True)
        (partial / name).rename(folder / name)
    partial.rmdir()
    listed = {name: file for name, file in hash_files(folder).items() if name.split("/")[0] in PARTS}
    manifest = Manifest(
        name=folder.name,
        version=version,
        native_size=configuration.resolution,
        enlarge=configuration.enlarge,
        few_steps=configuration.stage(stage).few_steps,
        guidance_scale=configuration.guidance_scale,
        files=listed,
        sources=sources(),
        training=Training(commit, f"{configuration.name}, stage {stage}", configuration.seed, _data()),
    )
    write_manifest(manifest, folder)


def sources() -> list[Source]:
    """Whose art and words the emoji data is made of."""
    words = "names and tags in Japanese and English (Unicode CLDR)"
    return [
        *(
            Source(hand.author, hand.licence, f"npm:{hand.package}@{hand.version}", "drawings")
            for hand in HANDS
        ),
        Source("emojibase-data", "MIT", f"npm:{NAMES_PACKAGE[0]}@{NAMES_PACKAGE[1]}", words),
        Source("this project", "CC0-1.0", "", "drawings of a daruma, and Japanese words in concepts.txt"),
    ]


def _data() -> str:
    return "emoji art of " + ", ".join(f"{hand.package}@{hand.version}" for hand in HANDS)


def _commit() -> str:
    """The commit that is checked out, marked where files differ from it."""
    root = WEIGHTS.parent
    done = subprocess.run(
        ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip() or "unknown"
