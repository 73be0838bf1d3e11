"""Public scheduler names → diffusers schedulers, set up as upstream set them up."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

from japanese_stable_diffusion.request import LCM_STEPS

_NOISE_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
}
"""What Stable Diffusion v1 was trained with; a weights folder may say otherwise."""

_SCHEDULERS: dict[str, tuple[Callable[..., SchedulerMixin], dict[str, Any]]] = {
    "DPMSolverMultistep": (DPMSolverMultistepScheduler, {}),
    "PNDM": (PNDMScheduler, {"skip_prk_steps": True, "steps_offset": 1}),
    "DDIM": (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    "KLMS": (LMSDiscreteScheduler, {}),
    "K_EULER": (EulerDiscreteScheduler, {}),
    "K_EULER_ANCESTRAL": (EulerAncestralDiscreteScheduler, {}),
    "UniPC": (UniPCMultistepScheduler, {}),
    "LCM": (LCMScheduler, {"original_inference_steps": LCM_STEPS}),
}


def make_scheduler(name: str, config: dict[str, Any]) -> SchedulerMixin:
    """A fresh scheduler for one batch of pictures; schedulers remember earlier steps, so none is used twice.

    For `num_inference_steps` N, the UNet is evaluated N times, but N + 1 times by PNDM (from N = 2 on): it
    repeats its second timestep to start up without Runge-Kutta steps (Liu et al. 2022, arXiv:2202.09778).

    Args:
        name: one of `request.SCHEDULERS`.
        config: `scheduler_config.json` of a weights folder, of which the noise schedule is used.
    """
    make, options = _SCHEDULERS[name]
    noise_schedule = {key: config.get(key, value) for key, value in _NOISE_SCHEDULE.items()}
    return make(**noise_schedule, **options)


def skip_steps(scheduler: SchedulerMixin, count: int) -> None:
    """Leave out the first steps, for latents that have only as much noise as those would have left.

    What remains is a schedule of its own, which begins with a first-order step as schedules do. Entered
    midway, KLMS and PNDM would count on steps that were never taken.

    Args:
        scheduler: with its timesteps set.
        count: steps to leave out, as `num_inference_steps` counts them.
    """
    if not count:
        return
    if isinstance(scheduler, PNDMScheduler):
        remaining = scheduler.timesteps.unique_consecutive()[count:]
        scheduler.timesteps = torch.cat([remaining[:2], remaining[1:]])
    else:
        scheduler.timesteps = scheduler.timesteps[count:]
        if hasattr(scheduler, "sigmas"):
            scheduler.sigmas = scheduler.sigmas[count:]
    if isinstance(scheduler, LCMScheduler):
        # It adds noise after each step but the last of so many.
        scheduler.num_inference_steps = len(scheduler.timesteps)


def signal_share(scheduler: SchedulerMixin, timestep: torch.Tensor) -> torch.Tensor:
    """The picture's share of the variance of latents at one of the scheduler's timesteps: a scalar, ᾱ."""
    share: torch.Tensor = scheduler.alphas_cumprod[round(float(timestep))]
    return share


def remove_noise(
    scheduler: SchedulerMixin, scaled: torch.Tensor, predicted: torch.Tensor, timestep: torch.Tensor
) -> torch.Tensor:
    """Latents without the noise that the UNet sees in them (Song et al. 2021, arXiv:2010.02502, equation 12).

    Args:
        scheduler: of whichever kind; all give the UNet latents on the same scale.
        scaled: what the UNet was given, (pictures, channels, height / factor, width / factor).
        predicted: what it said, of the same shape: the noise, or the velocity of Salimans & Ho 2022.
        timestep: one of the scheduler's.
    """
    signal = signal_share(scheduler, timestep).to(scaled.device)
    if scheduler.config["prediction_type"] == "v_prediction":
        return signal.sqrt() * scaled - (1 - signal).sqrt() * predicted
    return (scaled - (1 - signal).sqrt() * predicted) / signal.sqrt()
