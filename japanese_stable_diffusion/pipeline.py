"""Loaded weights + Request → pictures, a step at a time.

Latent diffusion (Rombach et al. 2022, arXiv:2112.10752) with classifier-free guidance (Ho & Salimans 2022,
arXiv:2207.12598).
"""

import inspect
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel

from japanese_stable_diffusion import emphasis, speed
from japanese_stable_diffusion.request import Request, RequestError
from japanese_stable_diffusion.schedulers import make_scheduler
from japanese_stable_diffusion.tokenizer import MAX_LENGTH
from japanese_stable_diffusion.weights import Weights

log = logging.getLogger(__name__)

ACTIVATIONS_PER_CHANNEL = 32
"""Values alive at once in the UNet, per latent pixel and channel of its first block.

Measured at the full size: 26, and some room.
"""


@dataclass(frozen=True)
class Step:
    """One denoising step of the pictures that are made together.

    Attributes:
        index: steps done so far, counted per picture and over all pictures of the request.
        total: steps that the request takes in all, counted likewise.
        latents: after this step; (pictures, channels, height / factor, width / factor), noise still in it.
    """

    index: int
    total: int
    latents: torch.Tensor


@dataclass(frozen=True)
class Picture:
    """A finished picture.

    Attributes:
        index: its place in the request, from 0.
        request: that makes this picture alone, with its own seed.
        image: RGB.
    """

    index: int
    request: Request
    image: Image.Image


@dataclass
class Figures:
    """What a request took: seconds, and passes through the UNet (one for a guided step of a whole batch)."""

    text_seconds: float = 0.0
    denoising_seconds: float = 0.0
    decoding_seconds: float = 0.0
    unet_evaluations: int = 0


class Pipeline:
    """Makes pictures with one set of weights.

    Args:
        weights: loaded, on the device that is to compute.
    """

    def __init__(self, weights: Weights) -> None:
        self.weights = weights

    @torch.inference_mode()
    def can_compute(self) -> bool:
        """Whether the device still makes finite numbers of the weights: the first layer of the UNet, on 8×8.

        Cheap enough to be asked every second. A device that is lost or broken raises what PyTorch raises.
        """
        first = self.weights.unet.conv_in
        latents = torch.ones(1, first.in_channels, 8, 8, device=self.weights.device, dtype=first.weight.dtype)
        return bool(first(latents).isfinite().all())

    @cached_property
    def _no_prompt(self) -> torch.Tensor:
        return encode(self.weights.tokenizer("").ids, self.weights.text_encoder)

    @torch.inference_mode()
    def generate(self, request: Request, figures: Figures | None = None) -> Iterator[Step | Picture]:
        """Make the pictures of a request: every step as it is done, and every picture as it is finished.

        Pictures that don't fit into memory together are made in smaller batches, with the same result.
        Dropping the iterator cancels the request.

        Args:
            request: what to make.
            figures: is filled in meanwhile.

        Raises:
            RequestError: not even one picture of this size fits into the memory of the device.
        """
        weights, figures, request = self.weights, figures or Figures(), request.with_seed()

        started = time.perf_counter()
        prompt = self._encode("prompt", request.prompt)
        guided = request.guidance_scale > 1
        negative_prompt = None
        if guided:
            negative_prompt = self._encode("negative_prompt", request.negative_prompt)
            length = max(prompt.shape[1], negative_prompt.shape[1])
            prompt, negative_prompt = self._extend(prompt, length), self._extend(negative_prompt, length)
        speed.synchronize(weights.device)
        figures.text_seconds = time.perf_counter() - started

        width, height = generated_size(weights, request.width, request.height)
        factor = vae_factor(weights.vae)
        shape = (weights.unet.config["in_channels"], height // factor, width // factor)
        seeds = request.seeds
        limit = largest_batch(weights.unet, shape)
        done = 0
        while done < len(seeds):
            batch = seeds[done : done + limit]
            scheduler = make_scheduler(request.scheduler, weights.scheduler_config)
            scheduler.set_timesteps(request.num_inference_steps, device=weights.device)
            steps = len(scheduler.timesteps)
            denoising = denoise(
                weights.unet, scheduler, batch, shape, prompt, negative_prompt, request.guidance_scale
            )
            try:
                started = time.perf_counter()
                for index, latents in enumerate(denoising, start=1):
                    speed.synchronize(weights.device)
                    figures.denoising_seconds += time.perf_counter() - started
                    figures.unet_evaluations += 1
                    yield Step(done * steps + index * len(batch), len(seeds) * steps, latents)
                    started = time.perf_counter()
                for index, seed in enumerate(batch):
                    started = time.perf_counter()
                    image = decode(weights.vae, latents[index : index + 1])
                    if image.size != (request.width, request.height):
                        image = image.resize((request.width, request.height), Image.Resampling.LANCZOS)
                    figures.decoding_seconds += time.perf_counter() - started
                    yield Picture(done, replace(request, seed=seed, num_outputs=1), image)
                    done += 1
            except torch.OutOfMemoryError:
                limit = len(batch) // 2
                if not limit:
                    raise RequestError(
                        f"width, height: not even one picture of {request.width} × {request.height} fits "
                        f"into the memory of the {weights.device.type} device; fewer pixels may"
                    ) from None
                log.info("%d pictures at once do not fit into memory: making %d at once", len(batch), limit)
            speed.free_memory(weights.device)

    def _encode(self, name: str, text: str) -> torch.Tensor:
        if not text:
            return self._no_prompt
        windows = self.weights.tokenizer.windows(emphasis.parse(text))
        if len(windows) > 1:
            log.info("%s: is encoded in %d windows of %d tokens", name, len(windows), MAX_LENGTH)
        encoded = [encode(window.ids, self.weights.text_encoder, window.weights) for window in windows]
        return torch.cat(encoded, dim=1)

    def _extend(self, embedding: torch.Tensor, length: int) -> torch.Tensor:
        """The embedding followed by windows of the empty prompt, until it is so many tokens long."""
        missing = (length - embedding.shape[1]) // MAX_LENGTH
        return torch.cat([embedding] + [self._no_prompt] * missing, dim=1)


def vae_factor(vae: AutoencoderKL) -> int:
    """Pixels of a picture per latent, along each side."""
    return int(2 ** (len(vae.config["block_out_channels"]) - 1))


def generated_size(weights: Weights, width: int, height: int) -> tuple[int, int]:
    """Width and height in pixels at which a picture is generated, before it is enlarged to the asked size.

    Weights that enlarge make about as many pixels as they were trained on, in the asked shape.
    """
    manifest = weights.manifest
    if manifest.enlarge == 1:
        return width, height
    unit = 2 * vae_factor(weights.vae)
    scale = manifest.native_size / math.sqrt(width * height)
    return max(unit, round(width * scale / unit) * unit), max(unit, round(height * scale / unit) * unit)


def largest_batch(unet: UNet2DConditionModel, shape: tuple[int, int, int]) -> int:
    """How many pictures with latents of this shape the device can denoise together; at least 1."""
    channels = unet.config["block_out_channels"][0] * ACTIVATIONS_PER_CHANNEL
    guided_picture: int = 2 * channels * shape[1] * shape[2] * unet.dtype.itemsize
    return max(1, speed.memory_budget(unet.device) // guided_picture)


def encode(
    ids: list[int], text_encoder: CLIPTextModel, weights: Sequence[float] | None = None
) -> torch.Tensor:
    """Text embedding of a window of token ids: (1, 77, width). No position is masked, as in training.

    Weights multiply the embedding token by token, and then all of it is scaled so that its mean is again what
    it was, as the web UI of AUTOMATIC1111 does it.

    Args:
        ids: of the window.
        text_encoder: embeds them.
        weights: one per token, some of them 1; None for 1 everywhere.
    """
    embedding: torch.Tensor = text_encoder(torch.tensor([ids], device=text_encoder.device)).last_hidden_state
    if weights is None or set(weights) == {1.0}:
        return embedding
    plain = embedding.float()
    weighted = plain * torch.tensor(weights, device=plain.device)[:, None]
    # Tokens whose means agree in sign keep the ratio within these bounds. Where they don't, a mean may lie
    # near zero, and the ratio could be any number.
    low, high = 1 / max(weights), 1 / max(min(weights), 0.1)
    ratio = (plain.mean() / weighted.mean()).nan_to_num(nan=1.0).clamp(low, high)
    return (weighted * ratio).to(embedding.dtype)


def denoise(
    unet: UNet2DConditionModel,
    scheduler: SchedulerMixin,
    seeds: Sequence[int],
    shape: tuple[int, int, int],
    prompt: torch.Tensor,
    negative_prompt: torch.Tensor | None,
    guidance_scale: float,
) -> Iterator[torch.Tensor]:
    """Denoise from pure noise and yield the latents after every step: (pictures, *shape), in float32.

    All noise of a picture comes from its own generator on the CPU, so it is the same on every device and in
    every batch.

    Args:
        unet: predicts the noise.
        scheduler: with its timesteps set.
        seeds: one per picture.
        shape: of one picture's latents: (channels, height / factor, width / factor).
        prompt: text embedding, (1, 77 × windows, width).
        negative_prompt: text embedding to steer away from, of the same shape; None for no guidance.
        guidance_scale: w + 1 of equation 6 in Ho & Salimans 2022, as Stable Diffusion counts it; not used
            without a negative prompt.
    """
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    latents = noise.to(unet.device) * scheduler.init_noise_sigma
    embeddings = prompt if negative_prompt is None else torch.cat([negative_prompt, prompt])
    embeddings = embeddings.repeat_interleave(len(seeds), dim=0)
    draws_noise = "generator" in inspect.signature(scheduler.step).parameters
    step_options = {"generator": generators} if draws_noise else {}
    for timestep in scheduler.timesteps:
        model_input = scheduler.scale_model_input(latents, timestep).to(unet.dtype)
        if negative_prompt is None:
            predicted = unet(model_input, timestep, embeddings).sample.float()
        else:
            away, towards = unet(torch.cat([model_input] * 2), timestep, embeddings).sample.float().chunk(2)
            predicted = away + guidance_scale * (towards - away)
        latents = scheduler.step(predicted, timestep, latents, **step_options).prev_sample
        yield latents


def decode(vae: AutoencoderKL, latents: torch.Tensor) -> Image.Image:
    """The RGB picture of one picture's latents, (1, channels, height / factor, width / factor)."""
    pixels = vae.decode(latents.to(vae.dtype) / vae.config["scaling_factor"]).sample[0]
    pixels = (pixels / 2 + 0.5).clamp(0, 1) * 255
    return Image.fromarray(pixels.round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())
