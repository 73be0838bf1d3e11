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

import numpy as np
import torch
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel

from japanese_stable_diffusion import emphasis, speed
from japanese_stable_diffusion.images import Start, open_start
from japanese_stable_diffusion.lora import LoRA
from japanese_stable_diffusion.request import Request, RequestError
from japanese_stable_diffusion.schedulers import make_scheduler, remove_noise, skip_steps
from japanese_stable_diffusion.shortcuts import GO_FAST, Savings, Shortcut
from japanese_stable_diffusion.tokenizer import MAX_LENGTH
from japanese_stable_diffusion.weights import Manifest, Weights

log = logging.getLogger(__name__)

ACTIVATIONS_PER_CHANNEL = 32
"""Values alive at once in the UNet, per latent pixel and channel of its first block.

Measured at the full size: 26, and some room.
"""

LARGE = 768
"""Pixels of the longer side up to which every picture is made in one pass, as upstream makes them."""
LARGEST = 1.5
"""How many times the weights' native size the longer side of a picture may be before its motifs repeat."""
SECOND_PASS_STRENGTH = 0.4
"""Share of the steps that a picture is repainted with once it is enlarged: finer detail, the same motifs."""


@dataclass(frozen=True)
class Step:
    """One denoising step of the pictures that are made together.

    Attributes:
        index: steps done so far, counted per picture and over all pictures of the request.
        total: steps that the request takes in all, counted likewise.
        latents: after this step; (pictures, channels, height / factor, width / factor), noise still in it.
            Those of a first pass are smaller.
        denoised: what they will be, as far as this step could tell; of the same shape.
    """

    index: int
    total: int
    latents: torch.Tensor
    denoised: torch.Tensor


@dataclass(frozen=True)
class Picture:
    """A finished picture.

    Attributes:
        index: its place in the request, from 0.
        request: that makes this picture alone, with its own seed.
        image: RGB.
        start: what it was made from, if from a picture.
        lora_hash: of the LoRA that it was made with; empty if it was made with none.
    """

    index: int
    request: Request
    image: Image.Image
    start: Start | None = None
    lora_hash: str = ""


@dataclass(frozen=True)
class Kept:
    """What in-painting keeps of a picture while the rest is painted: latents of the pictures made together.

    Attributes:
        clean: latents of the picture, (pictures, channels, height / factor, width / factor).
        noise: of the same shape; what each picture started from.
        repainted: True where latents are painted anew, (1, 1, height / factor, width / factor).
    """

    clean: torch.Tensor
    noise: torch.Tensor
    repainted: torch.Tensor


@dataclass
class Figures:
    """What a request took: seconds, and passes through the whole UNet (one for a guided step of a batch)."""

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
        latents = torch.ones(1, first.in_channels, 8, 8, device=self.weights.device, dtype=self.weights.dtype)
        return bool(first(latents).isfinite().all())

    @cached_property
    def _no_prompt(self) -> torch.Tensor:
        return self._encode_empty()

    def _encode_empty(self) -> torch.Tensor:
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
            RequestError: the picture or mask to start from or the LoRA can't be used, or not even one picture
                of this size fits into the memory of the device.
        """
        weights, figures = self.weights, figures or Figures()
        request = suited(request.with_seed(), weights.manifest)
        start = open_start(request)
        if start:
            request = replace(request, width=start.picture.width, height=start.picture.height)
            log.info("size: %d × %d", request.width, request.height)

        lora = LoRA(request.lora, request.lora_scale, weights) if request.lora else None

        started = time.perf_counter()
        if lora:
            with lora:
                prompt, negative_prompt = self._encode(request, self._encode_empty())
        else:
            prompt, negative_prompt = self._encode(request, self._no_prompt)
        speed.synchronize(weights.device)
        figures.text_seconds = time.perf_counter() - started

        width, height = generated_size(weights, request.width, request.height)
        factor = vae_factor(weights.vae)
        shape = (weights.unet.config["in_channels"], height // factor, width // factor)
        first_size = None if start else first_pass_size(weights, request)
        if first_size:
            log.info("second_pass: made at %d × %d, then enlarged to %d × %d", *first_size, width, height)
        seeds = request.seeds
        # LCM adds so much noise after every step that what inner layers said is of no use at the next.
        savings = GO_FAST if request.go_fast and request.scheduler != "LCM" else None
        limit = largest_batch(weights, shape)
        try:
            posterior = encode_picture(weights.vae, start.picture, (width, height)) if start else None
        except torch.OutOfMemoryError:
            raise _too_large(request, weights) from None
        repainted = cover(start.repainted, shape[1:]) if start and start.repainted else None
        done = 0
        while done < len(seeds):
            batch = seeds[done : done + limit]
            scheduler = self._start_schedule(request)
            generators = [torch.Generator("cpu").manual_seed(seed) for seed in batch]
            alone = [request.alone(i) for i in range(done, done + len(batch))]
            if posterior:
                latents, kept = enter(scheduler, alone, generators, posterior, repainted)
            else:
                first_width, first_height = first_size or (width, height)
                first_shape = (shape[0], first_height // factor, first_width // factor)
                latents = draw_start(alone, generators, first_shape).to(weights.device)
                latents, kept = latents * scheduler.init_noise_sigma, None
            steps = len(scheduler.timesteps)
            denoising = denoise(
                weights.unet,
                scheduler,
                generators,
                latents,
                prompt,
                negative_prompt,
                request.guidance_scale,
                figures,
                kept,
                savings,
            )
            if first_size:
                second = self._start_schedule(request)
                repaint = [
                    replace(one, prompt_strength=SECOND_PASS_STRENGTH, variation_strength=0.0)
                    for one in alone
                ]
                skip_steps(second, skipped_steps(repaint[0]))
                steps += len(second.timesteps)
                denoising = self._continue(
                    denoising, (width, height), repaint, generators, prompt, negative_prompt, figures, savings
                )
            if lora:
                denoising = lora.during(denoising)
            try:
                started = time.perf_counter()
                for index, (latents, denoised) in enumerate(denoising, start=1):
                    speed.synchronize(weights.device)
                    figures.denoising_seconds += time.perf_counter() - started
                    yield Step(done * steps + index * len(batch), len(seeds) * steps, latents, denoised)
                    started = time.perf_counter()
                for index, picture in enumerate(alone):
                    started = time.perf_counter()
                    image = decode(weights.vae, latents[index : index + 1])
                    if image.size != (request.width, request.height):
                        image = image.resize((request.width, request.height), Image.Resampling.LANCZOS)
                    if start and start.repainted:
                        image = Image.composite(image, start.picture, start.repainted)
                    figures.decoding_seconds += time.perf_counter() - started
                    yield Picture(done, picture, image, start, lora.hash if lora else "")
                    done += 1
            except torch.OutOfMemoryError:
                limit = len(batch) // 2
                if not limit:
                    raise _too_large(request, weights) from None
                log.info("%d pictures at once do not fit into memory: making %d at once", len(batch), limit)
            speed.free_memory(weights.device)

    def _start_schedule(self, request: Request) -> SchedulerMixin:
        scheduler = make_scheduler(request.scheduler, self.weights.scheduler_config)
        scheduler.set_timesteps(request.num_inference_steps, device=self.weights.device)
        return scheduler

    def _continue(
        self,
        first_pass: Iterator[tuple[torch.Tensor, torch.Tensor]],
        size: tuple[int, int],
        repaint: Sequence[Request],
        generators: Sequence[torch.Generator],
        prompt: torch.Tensor,
        negative_prompt: torch.Tensor | None,
        figures: Figures,
        savings: Savings | None,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The steps of a first pass, then of a second that repaints its pictures enlarged to `size`."""
        for latents, denoised in first_pass:
            yield latents, denoised
        vae = self.weights.vae
        posteriors = [encode_picture(vae, decode(vae, one[None]), size) for one in latents]
        posterior = torch.cat([mean for mean, _ in posteriors]), torch.cat([std for _, std in posteriors])
        scheduler = self._start_schedule(repaint[0])
        latents, _ = enter(scheduler, repaint, generators, posterior, None)
        yield from denoise(
            self.weights.unet,
            scheduler,
            generators,
            latents,
            prompt,
            negative_prompt,
            repaint[0].guidance_scale,
            figures,
            savings=savings,
        )

    def _encode(self, request: Request, no_prompt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embeddings of both prompts, equally many windows long; the negative one only where it guides."""
        prompt = self._encode_text("prompt", request.prompt, no_prompt)
        if request.guidance_scale <= 1:
            return prompt, None
        negative_prompt = self._encode_text("negative_prompt", request.negative_prompt, no_prompt)
        length = max(prompt.shape[1], negative_prompt.shape[1])
        return extend(prompt, no_prompt, length), extend(negative_prompt, no_prompt, length)

    def _encode_text(self, name: str, text: str, no_prompt: torch.Tensor) -> torch.Tensor:
        if not text:
            return no_prompt
        windows = self.weights.tokenizer.windows(emphasis.parse(text))
        if len(windows) > 1:
            log.info("%s: is encoded in %d windows of %d tokens", name, len(windows), MAX_LENGTH)
        encoded = [encode(window.ids, self.weights.text_encoder, window.weights) for window in windows]
        return torch.cat(encoded, dim=1)


def _too_large(request: Request, weights: Weights) -> RequestError:
    return RequestError(
        f"width, height: not even one picture of {request.width} × {request.height} fits "
        f"into the memory of the {weights.device.type} device; fewer pixels may"
    )


def suited(request: Request, manifest: Manifest) -> Request:
    """The request as these weights can be asked; as it is if their manifest says nothing of it.

    Those that are distilled for few steps know no guidance and no solver but LCM. How many steps that takes
    may still be asked for. Those that want less guidance get it in proportion: the default is what their
    manifest names, and 1 is no guidance.
    """
    if manifest.few_steps:
        steps = request.num_inference_steps if request.scheduler == "LCM" else manifest.few_steps
        log.info(
            "scheduler: LCM, %d steps without guidance, as these weights are distilled for few steps", steps
        )
        return replace(request, scheduler="LCM", num_inference_steps=steps, guidance_scale=1.0, go_fast=False)
    share = (manifest.guidance_scale - 1) / (Request.guidance_scale - 1)
    if share == 1 or request.guidance_scale == 1:
        return request
    scale = 1 + share * (request.guidance_scale - 1)
    log.info("guidance_scale: %g counts as %.3g with these weights", request.guidance_scale, scale)
    return replace(request, guidance_scale=scale)


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
    return scaled_size(width, height, scale, unit)


def scaled_size(width: int, height: int, scale: float, unit: int) -> tuple[int, int]:
    """Width and height times a scale, to the nearest multiples of a unit, but at least one; in pixels."""
    return max(unit, round(width * scale / unit) * unit), max(unit, round(height * scale / unit) * unit)


def first_pass_size(weights: Weights, request: Request) -> tuple[int, int] | None:
    """Width and height in pixels at which a large picture is made first, in about the asked shape.

    None where one pass does: it isn't wanted, the picture is not much larger than those that the weights were
    trained on, or they enlarge by themselves. Beyond that size, motifs would be painted once more where there
    is room.
    """
    width, height, manifest = request.width, request.height, weights.manifest
    longest = max(LARGE, LARGEST * manifest.native_size)
    if not request.second_pass or manifest.enlarge > 1 or max(width, height) <= longest:
        return None
    unit = vae_factor(weights.vae) * 2 ** (len(weights.unet.config["block_out_channels"]) - 1)
    scale = min(manifest.native_size / math.sqrt(width * height), longest / max(width, height))
    return scaled_size(width, height, scale, unit)


def largest_batch(weights: Weights, shape: tuple[int, int, int]) -> int:
    """How many pictures with latents of this shape the device can denoise together; at least 1."""
    channels = weights.unet.config["block_out_channels"][0] * ACTIVATIONS_PER_CHANNEL
    guided_picture: int = 2 * channels * shape[1] * shape[2] * weights.dtype.itemsize
    return max(1, speed.memory_budget(weights.device) // guided_picture)


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


def extend(embedding: torch.Tensor, no_prompt: torch.Tensor, length: int) -> torch.Tensor:
    """A text embedding followed by windows of the empty prompt, until it is `length` tokens long."""
    missing = (length - embedding.shape[1]) // MAX_LENGTH
    return torch.cat([embedding] + [no_prompt] * missing, dim=1)


def encode_picture(
    vae: AutoencoderKL, picture: Image.Image, size: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the latents of an RGB picture, resized to `size`, in float32.

    Both are (1, channels, height / factor, width / factor); width and height of `size` are in pixels.
    """
    pixels = torch.from_numpy(np.array(picture.resize(size, Image.Resampling.LANCZOS))).permute(2, 0, 1)
    posterior = vae.encode(pixels[None].to(vae.device, vae.dtype) / 255 * 2 - 1).latent_dist
    scale = vae.config["scaling_factor"]
    return posterior.mean * scale, posterior.std * scale


def cover(repainted: Image.Image, shape: tuple[int, int]) -> torch.Tensor:
    """True for every latent with a repainted pixel: (1, 1, *shape), from a mask of any size, 0 or 255."""
    pixels = torch.from_numpy(np.array(repainted))[None, None].float()
    return torch.nn.functional.adaptive_max_pool2d(pixels, shape) > 0


def draw(generators: Sequence[torch.Generator], shape: tuple[int, int, int]) -> torch.Tensor:
    """Normal noise for every picture, (pictures, *shape), on the CPU.

    All noise of a picture comes from its own generator on the CPU, so it is the same on every device and in
    every batch.
    """
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def draw_start(
    alone: Sequence[Request], generators: Sequence[torch.Generator], shape: tuple[int, int, int]
) -> torch.Tensor:
    """The noise that every picture starts from, (pictures, *shape), on the CPU.

    Args:
        alone: for each picture the request that makes it alone; its variation is blended in.
        generators: one per picture, from which `draw` takes the noise of its seed.
        shape: (channels, height / factor, width / factor).
    """
    noise = draw(generators, shape)
    strength = alone[0].variation_strength
    if not strength:
        return noise
    variations = [torch.Generator("cpu").manual_seed(request.variation_seed or 0) for request in alone]
    return slerp(noise, draw(variations, shape), strength)


def slerp(one: torch.Tensor, other: torch.Tensor, strength: float) -> torch.Tensor:
    """Spherical interpolation between the noises of pictures, both (pictures, ...) (Shoemake 1985).

    What is between two normal noises on a straight line has less variance than either; on this arc it has as
    much. At strength 0 it is `one`, at 1 `other`.
    """
    flat, other_flat = one.flatten(1), other.flatten(1)
    angle = torch.nn.functional.cosine_similarity(flat, other_flat).clamp(-1, 1).arccos()[:, None]
    arc = (flat * ((1 - strength) * angle).sin() + other_flat * (strength * angle).sin()) / angle.sin()
    # Of a noise and itself the angle is 0.
    return torch.where(angle > 1e-3, arc, flat).reshape(one.shape)


def add_noise(scheduler: SchedulerMixin, clean: torch.Tensor, noise: torch.Tensor, step: int) -> torch.Tensor:
    """Latents of pictures, with as much noise as they have when step `step` begins; none after the last.

    Args:
        scheduler: with its timesteps set.
        clean: without noise, (pictures, channels, height / factor, width / factor).
        noise: of the same shape, with unit variance.
        step: from 0.
    """
    timestep = scheduler.timesteps[step : step + 1]
    return scheduler.add_noise(clean, noise, timestep.repeat(len(clean))) if len(timestep) else clean


def enter(
    scheduler: SchedulerMixin,
    alone: Sequence[Request],
    generators: Sequence[torch.Generator],
    posterior: tuple[torch.Tensor, torch.Tensor],
    repainted: torch.Tensor | None,
) -> tuple[torch.Tensor, Kept | None]:
    """Latents of a picture with as much noise as the strength of a request says, and what is kept of it.

    Args:
        scheduler: with its timesteps set; those before the noise of these latents are left out.
        alone: for each picture the request that makes it alone; their strength decides the first timestep, as
            upstream's image-to-image does.
        generators: one per picture to be made.
        posterior: what `encode_picture` returns, of one picture or of as many as are made.
        repainted: what `cover` returns; None to paint everything.

    Returns:
        Latents, (pictures, channels, height / factor, width / factor); and None if everything is painted.
    """
    mean, deviation = posterior
    shape = (mean.shape[1], mean.shape[2], mean.shape[3])
    clean = mean + deviation * draw(generators, shape).to(mean.device)
    noise = draw_start(alone, generators, shape).to(mean.device)
    skip_steps(scheduler, skipped_steps(alone[0]))
    kept = None if repainted is None else Kept(clean, noise, repainted.to(mean.device))
    return add_noise(scheduler, clean, noise, 0), kept


def skipped_steps(request: Request) -> int:
    """Steps that are left out of a request for the sake of the picture that it starts from.

    As upstream, it counts whole steps only; but of the few that LCM takes, one at least is left.
    """
    taken = int(request.num_inference_steps * request.prompt_strength)
    if request.scheduler == "LCM" and request.prompt_strength:
        taken = max(1, taken)
    return request.num_inference_steps - taken


def denoise(
    unet: UNet2DConditionModel,
    scheduler: SchedulerMixin,
    generators: Sequence[torch.Generator],
    latents: torch.Tensor,
    prompt: torch.Tensor,
    negative_prompt: torch.Tensor | None,
    guidance_scale: float,
    figures: Figures,
    kept: Kept | None = None,
    savings: Savings | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Denoise and yield after every step the latents, and what it took them for without noise (float32).

    Args:
        unet: predicts the noise.
        scheduler: with its timesteps set.
        generators: one per picture, for schedulers that add noise.
        latents: (pictures, channels, height / factor, width / factor), with the noise of the first timestep.
        prompt: text embedding, (1, 77 × windows, width), or one for each picture.
        negative_prompt: text embedding to steer away from, of the same shape; None for no guidance.
        guidance_scale: w + 1 of equation 6 in Ho & Salimans 2022, as Stable Diffusion counts it; not used
            without a negative prompt.
        figures: in which evaluations of the UNet are counted.
        kept: what is put back after every step, with the noise that belongs there; None to paint everything.
        savings: what is left out; None computes everything.
    """
    towards = prompt.expand(len(latents), -1, -1)
    both = None if negative_prompt is None else torch.cat([negative_prompt.expand_as(towards), towards])
    shortcut = Shortcut(unet) if savings else None
    draws_noise = "generator" in inspect.signature(scheduler.step).parameters
    step_options = {"generator": generators} if draws_noise else {}
    for step, timestep in enumerate(scheduler.timesteps):
        model_input = scheduler.scale_model_input(latents, timestep).to(prompt.dtype)
        guides = both is not None and (savings is None or savings.guides(scheduler, timestep))
        text = both if both is not None and guides else towards
        batch = torch.cat([model_input] * 2) if guides else model_input
        if shortcut and savings and shortcut.suffices(len(batch), savings):
            predicted = shortcut.outer(batch, timestep, text).float()
        else:
            predicted = shortcut(batch, timestep, text) if shortcut else unet(batch, timestep, text).sample
            predicted = predicted.float()
            figures.unet_evaluations += 1
        if guides:
            away, asked = predicted.chunk(2)
            predicted = away + guidance_scale * (asked - away)
        denoised = remove_noise(scheduler, model_input.float(), predicted, timestep)
        latents = scheduler.step(predicted, timestep, latents, **step_options).prev_sample
        if kept:
            renoised = add_noise(scheduler, kept.clean, kept.noise, step + 1)
            latents = torch.where(kept.repainted, latents, renoised)
        yield latents, denoised


def decode(vae: AutoencoderKL, latents: torch.Tensor) -> Image.Image:
    """The RGB picture of one picture's latents, (1, channels, height / factor, width / factor).

    One that doesn't fit into the memory of a GPU as a whole is decoded in tiles of the VAE's native size.
    They overlap and are blended, but each is normalised by itself, so their colours may differ a little.
    """
    latents = latents.to(vae.dtype) / vae.config["scaling_factor"]
    try:
        pixels = vae.decode(latents).sample[0]
    except torch.OutOfMemoryError:
        speed.free_memory(latents.device)
        log.info("a picture does not fit into memory while it is decoded: decoding it in tiles")
        pixels = vae.tiled_decode(latents).sample[0]
    pixels = (pixels / 2 + 0.5).clamp(0, 1) * 255
    return Image.fromarray(pixels.round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())
