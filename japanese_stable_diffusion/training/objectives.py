"""What the stages minimise: the error of an autoencoder, of a text encoder, of a denoiser."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, LCMScheduler, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextModel

from japanese_stable_diffusion.schedulers import make_scheduler

Losses = dict[str, Tensor]

CHROMA_WEIGHT = 3.0
"""How much more an error of colour weighs than one of brightness. Flat art differs mostly in brightness, so a
small autoencoder that weighs them alike learns outlines first and leaves every red brown for a long time."""


class Autoencoding(nn.Module):
    """L1 + L2 reconstruction error and a small KL term (Rombach et al. 2022, arXiv:2112.10752, app. G).

    The error's brightness (its mean over the channels) and its colour (the rest) weigh as
    ``CHROMA_WEIGHT`` says. That paper's adversarial term is left out: flat art has little texture to gain.
    """

    def __init__(self, vae: AutoencoderKL, kl_weight: float) -> None:
        super().__init__()
        self.vae = vae
        self.kl_weight = kl_weight

    def forward(self, pixels: Tensor, noise: Tensor) -> Losses:
        """``pixels`` (batch, 3, height, width) in -1 to 1; ``noise`` shaped as the latents."""
        posterior = self.vae.encode(pixels).latent_dist
        restored = self.vae.decode(posterior.mean + posterior.std * noise).sample
        difference = (restored - pixels).float()
        brightness = difference.mean(dim=1, keepdim=True)
        difference = brightness + CHROMA_WEIGHT * (difference - brightness)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        l1, l2 = difference.abs().mean(), difference.pow(2).mean()
        return {"loss": l1 + l2 + self.kl_weight * kl, "l1": l1, "kl": kl}


TEMPERATURE = 0.07
"""Of the contrastive loss, as CLIP's training begins with."""


class Wording(nn.Module):
    """Find each caption's partner, another caption of the same picture, among those of a batch.

    The contrastive loss of CLIP (Radford et al. 2021, arXiv:2103.00020, fig. 3) with a second caption in
    place of the picture, on the mean of all positions. Stable Diffusion began with CLIP's text encoder; one
    with random weights gives all captions nearly the same mean, which a denoiser takes long to see through.
    """

    def __init__(self, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, ids: Tensor, partner_ids: Tensor) -> Losses:
        """Both (batch, 77), partners at the same place."""
        hidden = self.text_encoder(torch.cat([ids, partner_ids])).last_hidden_state.float()
        captions, partners = functional.normalize(hidden.mean(dim=1), dim=1).chunk(2)
        likeness = captions @ partners.T / TEMPERATURE
        right = torch.arange(len(ids), device=ids.device)
        loss = functional.cross_entropy(likeness, right) + functional.cross_entropy(likeness.T, right)
        return {"loss": loss / 2, "found": (likeness.argmax(1) == right).float().mean()}


class Aligning(nn.Module):
    """Say of a picture's caption what another text encoder says of its caption in another language.

    Reimers & Gurevych 2020 (arXiv:2004.09813, eq. 1) have a student repeat a sentence's embedding after a
    teacher of another language; here it repeats all positions, for cross-attention reads them all. Squared
    errors count in units of the teacher's variance.

    Args:
        text_encoder: the student.
        english: the teacher, which isn't trained.
    """

    def __init__(self, text_encoder: CLIPTextModel, english: CLIPTextModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.english = english

    def forward(self, ids: Tensor, partner_ids: Tensor) -> Losses:
        """The student's token ids and the teacher's, both (batch, 77), partners at the same place."""
        with torch.no_grad():
            expected = self.english(partner_ids).last_hidden_state.float()
        found = self.text_encoder(ids).last_hidden_state.float()
        return {"loss": (found - expected).pow(2).mean() / expected.var()}


PATCH = 2
"""Latents a side that one position of the text guesses."""


class Guess(ModelMixin, ConfigMixin):
    """The linear maps of ``Picturing``, one for each hand: a text encoder's state → a patch of latents.

    Args:
        hidden_size: of the text encoder.
        latent_channels: of the autoencoder.
        hands: how many there are that pictures are from.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, hidden_size: int, latent_channels: int, hands: int = 1) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, hands * latent_channels * PATCH * PATCH)

    def forward(self, hidden: Tensor) -> Tensor:
        """(batch, positions, hidden_size) → (batch, hands, positions, latent_channels · PATCH · PATCH)."""
        patches: Tensor = self.linear(hidden).unflatten(2, (self.config["hands"], -1)).transpose(1, 2)
        return patches


class Picturing(nn.Module):
    """Guess a picture's latents from its caption alone: their mean over all pictures that it may be of.

    That is what a denoiser has to say where there is nothing but noise. Each of the last positions, which are
    padding after all but the longest captions, guesses one patch of the latents, row by row, all of them
    through the same linear map. So what cross-attention has to learn, to look up the position that belongs
    to a place, is the same for every caption; a denoiser that has to learn from one summary of the caption
    what belongs where must do so name by name, and takes far longer.

    Each hand that pictures are from has a map of its own, for the mean of what many hands draw has no shape:
    the text has to tell how each would draw it, and the denoiser finds out from the noise which one it is.

    The maps may come from another text encoder's training and stay as they are. Then this text encoder learns
    to say what that one says, in its own language, from pictures alone.
    """

    def __init__(self, text_encoder: CLIPTextModel, guess: Guess) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.guess = guess

    def forward(self, drawings: Tensor, drawn: Tensor, ids: Tensor) -> Losses:
        """What each hand drew: scaled latents (batch, hands, channels, height, width).

        ``drawn`` (batch, hands) is False where a hand drew nothing; ``ids`` is (batch, 77).
        """
        return {"loss": guess_error(self.guess, self.text_encoder(ids).last_hidden_state, drawings, drawn)}


def per_contrast(values: Tensor, latents: Tensor, floor: float) -> Tensor:
    """Values (…) in units of the contrast of latents (…, channels, height, width), as they are at floor 0.

    The contrast is the variance over places, the mean over channels, and counts as no less than the floor.
    """
    if not floor:
        return values
    return values / latents.float().var(dim=(-2, -1)).mean(dim=-1).clamp(min=floor)


def guess_error(
    guess: Guess, hidden: Tensor, drawings: Tensor, drawn: Tensor, contrast_floor: float = 0.0
) -> Tensor:
    """Mean squared error of a guess from the states (batch, 77, hidden_size) of a text encoder.

    ``drawings`` and ``drawn`` are those of ``Picturing``, ``contrast_floor`` is ``Denoising``'s. Raises
    ValueError if the latents have more patches than the text has positions.
    """
    patches = functional.unfold(drawings.float().flatten(0, 1), PATCH, stride=PATCH).transpose(1, 2)
    places = patches.shape[1]
    if places > hidden.shape[1]:
        raise ValueError(
            f"latents have {places} patches of {PATCH}×{PATCH}, the text {hidden.shape[1]} positions"
        )
    guessed = guess(hidden[:, -places:].float())
    errors = (guessed - patches.unflatten(0, drawn.shape)).pow(2).mean(dim=(2, 3))
    return per_contrast(errors, drawings, contrast_floor)[drawn].mean()


class Denoising(nn.Module):
    """Epsilon prediction on latents (Ho et al. 2020, arXiv:2006.11239, eq. 14), conditioned on token ids.

    With ``weight_limit`` above 0 each timestep weighs as if the velocity were predicted, (SNR + 1) / SNR
    (Salimans & Ho 2022, arXiv:2202.00512, app. D), but no more than the limit. Without it, nearly all of
    the error is made where little noise is left, and the text, which matters where there is much, is hardly
    heard.

    With a ``contrast_floor`` above 0 the error of each picture counts in units of its latents' contrast, but
    of no less than the floor. Without it, pale pictures, and what is drawn dark on dark, have small errors
    whatever is drawn, and a denoiser learns their style but not the things in them.

    With a ``guess``, the error of ``Picturing`` is added, so that a text encoder that learns together with a
    new denoiser, which takes words for noise at first, does not make them all alike.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        scheduler: dict[str, Any],
        weight_limit: float,
        guess: Guess | None = None,
        contrast_floor: float = 0.0,
    ) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder
        self.guess = guess
        self.contrast_floor = contrast_floor
        self.noise_schedule = DDPMScheduler(**scheduler)
        # (SNR + 1) / SNR is the inverse of the signal's share of the variance.
        weights = (1 / self.noise_schedule.alphas_cumprod).clamp(max=weight_limit or 1.0)
        self.timestep_weights: Tensor
        self.register_buffer("timestep_weights", weights, persistent=False)

    def forward(
        self,
        latents: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        ids: Tensor,
        drawings: Tensor | None = None,
        drawn: Tensor | None = None,
    ) -> Losses:
        """The losses of scaled ``latents`` (batch, channels, height, width) and ``noise`` of the same shape.

        ``timesteps`` is (batch,), ``ids`` is (batch, 77); ``drawings`` and ``drawn`` are for the guess.
        """
        noisy = self.noise_schedule.add_noise(latents, noise, timesteps)
        embeddings = self.text_encoder(ids).last_hidden_state
        predicted = self.unet(noisy, timesteps, embeddings).sample
        errors = (predicted.float() - noise.float()).pow(2).mean(dim=(1, 2, 3))
        weights = per_contrast(self.timestep_weights[timesteps], latents, self.contrast_floor)
        losses = {"loss": (errors * weights).mean(), "error": errors.mean()}
        if self.guess is not None and drawings is not None and drawn is not None:
            losses["guess"] = guess_error(self.guess, embeddings, drawings, drawn, self.contrast_floor)
            losses["loss"] = losses["loss"] + losses["guess"]
        return losses


HUBER = 1e-3
"""Below a root mean square of so much, an error of consistency counts as its square (Luo et al. 2023)."""


class Consistency(nn.Module):
    """Latent consistency distillation (Luo et al. 2023, arXiv:2310.04378, algorithm 1).

    The student says at once where a path of the teacher's, with guidance, ends, whichever point of the path
    it is shown: what it says of a point must be what it says of the next. That one counts as given (Song &
    Dhariwal 2023, arXiv:2310.14189, found no use in averaging the weights that say it). Steps are those of
    DDIM, from the points of the grid that the scheduler LCM takes its own from.

    Args:
        unet: the student; begins as the teacher.
        teacher: predicts noise, and isn't trained.
        text_encoder: of both.
        scheduler: the noise schedule.
        guidance_scale: that the student learns to do without.
        unconditional_ids: of the empty caption, (77,).
        skip: timesteps from a point to the next, that paper's k. What the student says of the last point has
            to come up from the first, step by step; long steps bring it there sooner, less exactly.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        teacher: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        scheduler: dict[str, Any],
        guidance_scale: float,
        unconditional_ids: Tensor,
        skip: int = 20,
    ) -> None:
        super().__init__()
        self.unet = unet
        self.teacher = teacher
        self.text_encoder = text_encoder
        self.guidance_scale = guidance_scale
        self.skip = skip
        self.noise_schedule: LCMScheduler = make_scheduler("LCM", scheduler)
        grid = self.noise_schedule.config["original_inference_steps"]
        self.spacing = self.noise_schedule.config["num_train_timesteps"] // grid
        self.signal: Tensor
        self.unconditional_ids: Tensor
        self.register_buffer("signal", self.noise_schedule.alphas_cumprod, persistent=False)
        self.register_buffer("unconditional_ids", unconditional_ids, persistent=False)

    def forward(self, latents: Tensor, noise: Tensor, timesteps: Tensor, ids: Tensor) -> Losses:
        """The losses of scaled ``latents`` (batch, channels, height, width) and ``noise`` of the same shape.

        ``timesteps`` (batch,) are any of training's; the points of the grid at or above them are taken.
        ``ids`` is (batch, 77).
        """
        start = timesteps // self.spacing * self.spacing + self.spacing - 1
        noisy = self.noise_schedule.add_noise(latents, noise, start)
        with torch.no_grad():
            texts = torch.cat([ids, self.unconditional_ids[None]])
            embeddings, unconditional = self.text_encoder(texts).last_hidden_state.split([len(ids), 1])
            both = torch.cat([embeddings, unconditional.expand_as(embeddings)])
            predicted = self.teacher(torch.cat([noisy] * 2), start.repeat(2), both).sample.float()
            towards, away = predicted.chunk(2)
            guided = away + self.guidance_scale * (towards - away)
            target = self._say(*self._step(noisy, guided, start), embeddings)
        errors = (self._say(noisy, start, embeddings) - target).pow(2).mean(dim=(1, 2, 3))
        return {"loss": ((errors + HUBER**2).sqrt() - HUBER).mean(), "error": errors.mean()}

    def _step(self, noisy: Tensor, noise: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """One step of DDIM, and where it leads; below 0 to clean latents."""
        end = start - self.skip
        signal = self.signal[start][:, None, None, None]
        left = torch.where(end < 0, 1.0, self.signal[end.clamp(min=0)])[:, None, None, None]
        clean = _without_noise(noisy, noise, signal)
        return left.sqrt() * clean + (1 - left).sqrt() * noise, end

    def _say(self, noisy: Tensor, timesteps: Tensor, embeddings: Tensor) -> Tensor:
        """The consistency function, equation 9: what the scheduler LCM takes the clean latents for."""
        known = timesteps.clamp(min=0)
        predicted = self.unet(noisy, known, embeddings).sample.float()
        signal = self.signal[known][:, None, None, None]
        clean = _without_noise(noisy, predicted, signal)
        skip, out = (
            torch.as_tensor(share, dtype=torch.float32, device=noisy.device)[:, None, None, None]
            for share in self.noise_schedule.get_scalings_for_boundary_condition_discrete(known)
        )
        said = skip * noisy + out * clean
        return torch.where((timesteps < 0)[:, None, None, None], noisy, said)


def _without_noise(noisy: Tensor, noise: Tensor, signal: Tensor) -> Tensor:
    """Latents that have this share of ``signal`` and the rest ``noise``, without it."""
    return (noisy - (1 - signal).sqrt() * noise) / signal.sqrt()
