"""One training loop for every stage, on Accelerate (https://huggingface.co/docs/accelerate).

A step is a function of the models' state, the seed and the step's number, so a run that was killed
and resumed ends with the same weights as one that was not, and several processes see the same
samples and noise as one would.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel
from pytorch_optimizer import Muon
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel

from japanese_stable_diffusion.speed import keep_memory
from japanese_stable_diffusion.tokenizer import Tokenizer
from japanese_stable_diffusion.weights import WEIGHTS, Manifest, Weights

from .batches import Draws, Steps, cached_moments, fingerprint, loader, noise_for, shift_timesteps, to_tensor
from .configuration import Configuration, ConfigurationError, Precision, Stage
from .deepening import deepen
from .evaluation import Ask, Settings, generate, through_autoencoder
from .export import save_models
from .objectives import (
    Aligning,
    Autoencoding,
    Consistency,
    Denoising,
    Guess,
    Picturing,
    Wording,
)
from .shards import Shards
from .styles import Pixels
from .tokenizer import train_tokenizer

log = logging.getLogger(__name__)

Models = dict[str, Any]
"""Models by the names of their folders; diffusers publishes no types."""

MODELS: Models = {
    "vae": AutoencoderKL,
    "unet": UNet2DConditionModel,
    "text_encoder": CLIPTextModel,
    "guess": Guess,
    "teacher": UNet2DConditionModel,
    "english": CLIPTextModel,
}
FOLDERS = {"teacher": "unet", "english": "text_encoder"}
"""Where models are found in a weights folder, if not under their own names."""
KEPT_CHECKPOINTS = 2


def make_model(name: str, configuration: Configuration, **others: Any) -> Any:
    """A model of the configuration's size, and of ``others`` that it doesn't name, with random weights."""
    options = configuration.models[name] | others
    if name == "text_encoder":
        return CLIPTextModel(CLIPTextConfig(**options))
    return MODELS[name].from_config(options)


def origin_folder(origin: str, runs: Path) -> Path:
    """Where a stage finds what it starts from: an earlier stage's weights, or any folder.

    A folder has a slash, and is looked for in the repository if its path is relative.
    """
    return WEIGHTS.parent / origin if "/" in origin else runs / origin / "weights"


def start_models(configuration: Configuration, stage: Stage, runs: Path) -> Models:
    """The stage's models at step 0: new, from an earlier stage of this run, or from a weights folder."""
    torch.manual_seed(configuration.seed)
    models = {}
    for name, origin in stage.start.items():
        if not origin:
            others = {"hands": stage.hands} if name == "guess" else {}
            models[name] = make_model(name, configuration, **others)
            continue
        folder = origin_folder(origin, runs) / FOLDERS.get(name, name)
        if not (folder / "config.json").is_file():
            raise ConfigurationError(
                f"stage {stage.name}: {name} starts from {origin}, but there is no {folder}; "
                f"train that stage first, or put that folder there"
            )
        models[name] = MODELS[name].from_pretrained(folder, torch_dtype=torch.float32)
    if stage.deepen:
        if "unet" not in models:
            raise ConfigurationError(f"stage {stage.name}: deepen is for a stage with a unet")
        try:
            models["unet"] = deepen(models["unet"], stage.deepen)
        except ValueError as error:
            raise ConfigurationError(f"stage {stage.name}: {error}") from None
    return models


def _suit_to_cpu(models: Models) -> None:
    """Make a step take less than half of the time on a CPU; but for rounding, it is the same."""
    keep_memory()
    for name in ("unet", "teacher"):
        if name in models:
            # PyTorch's fused attention takes a third of a training step, nearly all of it backwards.
            models[name].set_attn_processor(AttnProcessor())
    for name in ("text_encoder", "english"):
        if name in models:
            models[name].set_attn_implementation("eager")


def computed_precision(stage: Stage, device: torch.device) -> Precision:
    """The stage's precision, or "no" (single) where a CPU has no instructions for bfloat16.

    PyTorch would imitate them there, and a step would take 15 times as long as in single precision.
    """
    if device.type != "cpu" or stage.precision != "bf16":
        return stage.precision
    capabilities = torch.cpu.get_capabilities()
    if any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")):
        return stage.precision
    log.warning("stage %s: in single precision, for this CPU doesn't compute in bf16", stage.name)
    return "no"


def learning_rate(stage: Stage, step: int) -> float:
    """Linear warm-up, then linear decay to a hundredth."""
    warm = min(1.0, (step + 1) / max(1, stage.warmup_steps))
    return stage.learning_rate * warm * max(0.01, 1 - step / stage.steps)


def _is_trained(name: str, stage: Stage) -> bool:
    """Whether any weights of the model move."""
    return any(part.split(".")[0] == name for part in stage.train)


def _objective(
    configuration: Configuration, stage: Stage, models: Models, tokenizer: Tokenizer | None
) -> nn.Module:
    for name, model in models.items():
        model.requires_grad_(False)
        model.train(_is_trained(name, stage))
    for part in stage.train:
        model, _, below = part.partition(".")
        try:
            models[model].get_submodule(below).requires_grad_(True)
        except (KeyError, AttributeError):
            raise ConfigurationError(f"stage {stage.name}: train names {part}, which isn't there") from None
    if stage.objective == "autoencoding":
        return Autoencoding(models["vae"], stage.kl_weight)
    if stage.objective == "wording":
        return Wording(models["text_encoder"])
    if stage.objective == "aligning":
        return Aligning(models["text_encoder"], models["english"])
    if stage.objective == "picturing":
        return Picturing(models["text_encoder"], models["guess"])
    if stage.objective == "consistency":
        assert tokenizer, "every stage but an autoencoder's has one"
        return Consistency(
            models["unet"],
            models["teacher"],
            models["text_encoder"],
            configuration.scheduler,
            configuration.guidance_scale,
            torch.tensor(tokenizer("").ids),
            stage.skip,
        )
    return Denoising(
        models["unet"],
        models["text_encoder"],
        configuration.scheduler,
        stage.weight_limit,
        models.get("guess"),
        stage.contrast_floor,
    )


OUTER_LAYERS = frozenset({"conv_in", "conv_out", "guess"})


def _optimizer(objective: nn.Module, trained: list[nn.Parameter], stage: Stage) -> torch.optim.Optimizer:
    """The stage's optimizer of the objective's weights that move.

    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) makes each step of a matrix
    orthogonal, so that it moves as far in directions that gradients seldom point to. It is for matrices
    between others, convolutions among them; what is next to pixels, latents or tokens, and vectors, is left
    to AdamW. Steps are as long as AdamW's would be (Liu et al. 2025, arXiv:2502.16982, eq. 4), so both have
    one learning rate.
    """
    rate, decay = stage.learning_rate, stage.weight_decay
    if stage.optimizer == "adamw":
        return torch.optim.AdamW(trained, lr=rate, weight_decay=decay, fused=True)
    inner = {
        id(module.weight)
        for name, module in objective.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and OUTER_LAYERS.isdisjoint(name.split("."))
    }
    matrices = [weight for weight in trained if id(weight) in inner]
    others = [weight for weight in trained if id(weight) not in inner]
    return Muon(
        [
            {"params": matrices, "lr": rate, "weight_decay": decay, "use_muon": True},
            {"params": others, "lr": rate, "weight_decay": decay, "use_muon": False, "betas": (0.9, 0.999)},
        ],
        use_adjusted_lr=True,
    )


def _tokenizer_folder(
    configuration: Configuration, stage: Stage, shards: Shards, runs: Path, model: str, language: str
) -> Path:
    """The tokenizer of the weights folder that a text encoder comes from.

    Else that of its language, trained when it is first met.
    """
    origin = stage.start[model]
    if "/" in origin:
        carried = origin_folder(origin, runs) / "tokenizer"
        if not (carried / "spiece.model").is_file():
            raise ConfigurationError(
                f"stage {stage.name}: {model} starts from {origin}, but there is no "
                f"{carried}/spiece.model; start from a folder with a sentencepiece tokenizer, "
                f"or from an earlier stage"
            )
        return carried
    folder = runs / f"tokenizer-{language}"
    if not (folder / "tokenizer_config.json").is_file():
        texts = (text for about in shards.about for text in about[language])
        train_tokenizer(texts, configuration.vocabulary, folder)
    return folder


def _encoder(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    return lambda text: tokenizer(text).ids


def _latest(folder: Path) -> Path | None:
    return max(folder.glob("step-*"), default=None)


def _checkpoint(accelerator: Accelerator, folder: Path, step: int) -> None:
    """Save everything under a temporary name and rename it, so that a checkpoint is whole or not there."""
    partial = folder / "partial"
    if accelerator.is_main_process and partial.exists():
        shutil.rmtree(partial)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        os.sync()
        partial.rename(folder / f"step-{step:09d}")
        for old in sorted(folder.glob("step-*"))[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old)


def train(
    configuration: Configuration,
    stage: Stage,
    data: Path,
    runs: Path,
    cpu: bool = False,
) -> Path:
    """Run or resume one stage; return the folder with its weights.

    ``data`` holds shards, ``runs`` the stages' folders: ``<stage>/checkpoints`` to resume from,
    ``<stage>/logs`` for TensorBoard and, at the end, ``<stage>/weights`` (the average of the weights,
    single precision).

    Raises ConfigurationError, ShardError.
    """
    folder = runs / stage.name
    weights = folder / "weights"
    if weights.is_dir():
        return weights
    share = stage.batch_size // stage.micro_batch_size
    precision = computed_precision(stage, PartialState(cpu=cpu).device)
    # Stages that run in one process may differ in precision, which Accelerate remembers of the first.
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision=precision, cpu=cpu)
    if stage.batch_size % (stage.micro_batch_size * accelerator.num_processes):
        raise ConfigurationError(
            f"stage {stage.name}: batch_size {stage.batch_size} is not a multiple of micro_batch_size "
            f"{stage.micro_batch_size} × {accelerator.num_processes} processes"
        )
    if "guess" in stage.start and not stage.cache_latents:
        raise ConfigurationError(
            f"stage {stage.name}: a guess is of cached latents; set cache_latents = true"
        )
    accelerator.gradient_accumulation_steps = share // accelerator.num_processes
    shards = Shards(data)
    runs.mkdir(parents=True, exist_ok=True)
    models = start_models(configuration, stage, runs)
    if accelerator.device.type == "cpu":
        _suit_to_cpu(models)
    tokenizer_folder: Path | None = None
    tokenizer: Tokenizer | None = None
    encode: Callable[[str], list[int]] | None = None
    encode_english: Callable[[str], list[int]] | None = None
    moments = None
    if stage.objective != "autoencoding":
        with accelerator.main_process_first():
            tokenizer_folder = _tokenizer_folder(
                configuration, stage, shards, runs, "text_encoder", stage.language
            )
        tokenizer = Tokenizer(tokenizer_folder)
        encode = _encoder(tokenizer)
    if "english" in models:
        with accelerator.main_process_first():
            english_folder = _tokenizer_folder(configuration, stage, shards, runs, "english", "en")
        encode_english = _encoder(Tokenizer(english_folder))

    if stage.objective in ("picturing", "denoising", "consistency"):
        models["vae"].to(accelerator.device).requires_grad_(False).eval()
        if stage.cache_latents:
            origin = origin_folder(stage.start["vae"], runs) / "vae" / "diffusion_pytorch_model.safetensors"
            path = runs / f"latents-{fingerprint(shards, origin, stage.without_hands)}.npy"
            with accelerator.autocast():
                moments = cached_moments(shards, models["vae"], path, accelerator, stage.without_hands)
    objective = _objective(configuration, stage, models, tokenizer)
    trained = [p for p in objective.parameters() if p.requires_grad]
    optimizer = _optimizer(objective, trained, stage)
    ema = EMAModel(trained, decay=stage.ema_decay, foreach=True)
    ema.to(accelerator.device)
    objective, optimizer = accelerator.prepare(objective, optimizer)
    accelerator.register_for_checkpointing(ema)

    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    step = 0
    resumed = _latest(checkpoints)
    if resumed:
        accelerator.load_state(str(resumed))
        step = int(resumed.name.removeprefix("step-"))
    try:
        draws = Draws(
            shards,
            stage.language,
            configuration.seed,
            stage.only_styles_of_base,
            encode,
            stage.caption_dropout,
            moments,
            stage.crop,
            partners=stage.objective in ("wording", "aligning"),
            without_hands=stage.without_hands,
            hands=stage.hands if "guess" in models else 0,
            styles_evenly=stage.styles_evenly,
            style_frequency=stage.style_frequency,
            encode_english=encode_english,
        )
    except ValueError as error:
        raise ConfigurationError(f"stage {stage.name}: {error}") from None
    rank, processes = accelerator.process_index, accelerator.num_processes
    order = Steps(step, stage.last_step, stage.batch_size, stage.micro_batch_size, rank, processes)
    micro_batches = iter(loader(draws, order, stage.workers))
    writer = SummaryWriter(str(folder / "logs"), purge_step=step) if accelerator.is_main_process else None
    curve = folder / "loss.jsonl"
    bar = tqdm(
        initial=step,
        total=stage.last_step,
        desc=stage.name,
        unit="step",
        disable=not accelerator.is_main_process,
    )
    batch_share = stage.batch_size // processes
    timesteps = configuration.scheduler["num_train_timesteps"]
    scaling = float(models["vae"].config["scaling_factor"]) if "vae" in models else 1.0
    while step < stage.last_step:
        rate = learning_rate(stage, step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        totals: dict[str, Tensor] = {}
        start = step * stage.batch_size + rank * batch_share
        for first in range(start, start + batch_share, stage.micro_batch_size):
            item = next(micro_batches)
            positions = range(first, first + stage.micro_batch_size)
            with accelerator.accumulate(objective):
                losses = _losses(
                    objective,
                    models,
                    item,
                    positions,
                    configuration.seed,
                    scaling,
                    timesteps,
                    stage.objective == "picturing",
                    stage.timestep_shift,
                )
                accelerator.backward(losses["loss"])
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(trained, stage.gradient_clip)
                optimizer.step()
                optimizer.zero_grad()
            for name, value in losses.items():
                totals[name] = totals.get(name, torch.zeros((), device=value.device)) + value.detach()
        ema.step(trained)
        step += 1
        means = {
            name: float(accelerator.reduce(value, "mean")) * stage.micro_batch_size / batch_share
            for name, value in totals.items()
        }
        bar.update()
        bar.set_postfix(loss=f"{means['loss']:.4f}")
        if writer:
            with curve.open("a") as stream:
                stream.write(json.dumps({"step": step, "learning_rate": rate, **means}) + "\n")
            for name, value in means.items():
                writer.add_scalar(name, value, step)
            writer.add_scalar("learning_rate", rate, step)
        if step % stage.checkpoint_steps == 0 or step == stage.last_step:
            _checkpoint(accelerator, checkpoints, step)
        if (
            writer
            and stage.objective in ("autoencoding", "denoising", "consistency")
            and (step % stage.picture_steps == 0 or step == stage.last_step)
        ):
            ema.store(trained)
            ema.copy_to(trained)
            writer.add_images(
                "pictures", _sample(configuration, stage, models, tokenizer, shards, folder), step
            )
            ema.restore(trained)
    bar.close()
    if writer:
        writer.close()
    if accelerator.is_main_process:
        ema.copy_to(trained)
        # What an encoder that stays as it is says of pictures keeps its scale.
        if "vae" in stage.train:
            _set_scaling(models["vae"], shards, accelerator.device)
        partial = folder / "partial"
        kept = {name: model for name, model in models.items() if name not in FOLDERS}
        save_models(partial, kept, configuration, tokenizer_folder)
        partial.rename(weights)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return weights


def _losses(
    objective: nn.Module,
    models: Models,
    item: dict[str, Tensor],
    positions: range,
    seed: int,
    scaling: float,
    timesteps: int,
    picturing: bool,
    timestep_shift: float,
) -> dict[str, Tensor]:
    device = next(objective.parameters()).device
    if "partner_ids" in item:
        found: dict[str, Tensor] = objective(item["ids"].to(device), item["partner_ids"].to(device))
        return found
    vae = models["vae"]
    drawings = {}
    if "drawings" in item:
        drawings = {
            "drawings": item["drawings"].to(device).chunk(2, dim=2)[0] * scaling,
            "drawn": item["drawn"].to(device),
        }
    if picturing:
        pictured: dict[str, Tensor] = objective(ids=item["ids"].to(device), **drawings)
        return pictured
    if "moments" in item:
        mean, logvar = item["moments"].to(device).chunk(2, dim=1)
    elif "ids" in item:
        with torch.no_grad():
            mean, logvar = vae.encode(item["picture"].to(device)).latent_dist.parameters.chunk(2, dim=1)
    else:
        pixels = item["picture"].to(device)
        factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
        shape = (vae.config["latent_channels"], pixels.shape[2] // factor, pixels.shape[3] // factor)
        losses: dict[str, Tensor] = objective(
            pixels, noise_for(seed, positions, shape, timesteps)[0].to(device)
        )
        return losses
    posterior, noise, steps = (
        t.to(device) for t in noise_for(seed, positions, tuple(mean.shape[1:]), timesteps)
    )
    steps = shift_timesteps(steps, timestep_shift, timesteps)
    latents = (mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * posterior) * scaling
    denoised: dict[str, Tensor] = objective(latents, noise, steps, item["ids"].to(device), **drawings)
    return denoised


@torch.inference_mode()
def _sample(
    configuration: Configuration,
    stage: Stage,
    models: Models,
    tokenizer: Tokenizer | None,
    shards: Shards,
    folder: Path,
) -> Pixels:
    """Pictures for the log, (count, 3, height, width), uint8.

    Of the configuration's prompts, or originals beside what the autoencoder makes of them.
    """
    for model in models.values():
        model.eval()
    if tokenizer is None:
        originals = [shards.picture(index) for index in range(0, len(shards), max(1, len(shards) // 8))]
        restored = through_autoencoder(models["vae"], originals)
        pictures = np.concatenate([np.stack(originals), restored])
    else:
        about = Manifest(folder.name, native_size=configuration.resolution, enlarge=configuration.enlarge)
        parts = models["text_encoder"], models["unet"], models["vae"]
        weights = Weights(
            folder, about, tokenizer, *parts, configuration.scheduler, safety=None, dtype=torch.float32
        )
        prompts = configuration.prompts[stage.language]
        asks = [Ask(prompt, "", seed, (), None) for seed, prompt in enumerate(prompts)]
        settings = Settings()
        if stage.few_steps:
            settings = Settings(stage.few_steps, guidance_scale=1.0, scheduler="LCM")
        pictures = generate(weights, asks, settings)
    for name, model in models.items():
        model.train(_is_trained(name, stage))
    return pictures.transpose(0, 3, 1, 2)


@torch.inference_mode()
def _set_scaling(vae: AutoencoderKL, shards: Shards, device: torch.device, count: int = 512) -> None:
    """Scale latents to unit variance (Rombach et al. 2022, appendix G), measured on ``count`` pictures."""
    vae.eval()
    indices = range(0, len(shards), max(1, len(shards) // count))
    latents = [
        vae.encode(to_tensor(shards.picture(index))[None].to(device)).latent_dist.mean for index in indices
    ]
    vae.register_to_config(scaling_factor=float(1 / torch.cat(latents).std()))
