"""Every public name makes the right diffusers scheduler, from the noise schedule of the weights."""

import numpy as np
import pytest
import torch

from japanese_stable_diffusion.request import LCM_STEPS, NUM_INFERENCE_STEPS, SCHEDULERS
from japanese_stable_diffusion.schedulers import make_scheduler, remove_noise, skip_steps


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        (name, steps)
        for name in SCHEDULERS
        for steps in (1, 2, 3, 25, *((LCM_STEPS,) if name == "LCM" else (300, NUM_INFERENCE_STEPS[1])))
    ],
)
def test_steps_are_evaluations_and_pndm_makes_one_more(name, steps):
    scheduler = make_scheduler(name, {})
    scheduler.set_timesteps(steps)
    assert len(scheduler.timesteps) == (steps + 1 if name == "PNDM" and steps > 1 else steps)
    latents = torch.ones(1, 4, 2, 2) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        predicted = scheduler.scale_model_input(latents, timestep) / 2
        latents = scheduler.step(predicted, timestep, latents).prev_sample
    assert torch.isfinite(latents).all()


@pytest.mark.parametrize(
    ("name", "made", "settings"),
    [
        (
            "DPMSolverMultistep",
            "DPMSolverMultistepScheduler",
            {"algorithm_type": "dpmsolver++", "solver_order": 2},
        ),
        ("PNDM", "PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1, "set_alpha_to_one": False}),
        ("DDIM", "DDIMScheduler", {"clip_sample": False, "steps_offset": 1, "set_alpha_to_one": False}),
        ("KLMS", "LMSDiscreteScheduler", {"steps_offset": 0, "timestep_spacing": "linspace"}),
        ("K_EULER", "EulerDiscreteScheduler", {"steps_offset": 0}),
        ("K_EULER_ANCESTRAL", "EulerAncestralDiscreteScheduler", {"steps_offset": 0}),
        ("UniPC", "UniPCMultistepScheduler", {"solver_order": 2}),
        ("LCM", "LCMScheduler", {"original_inference_steps": 50, "clip_sample": False}),
    ],
)
def test_settings_are_those_of_upstream(name, made, settings):
    scheduler = make_scheduler(name, {"skip_prk_steps": False, "clip_sample": True, "steps_offset": 7})
    assert type(scheduler).__name__ == made
    assert {key: scheduler.config[key] for key in settings} == settings


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_noise_schedule_is_that_of_the_weights(name):
    default = make_scheduler(name, {})
    assert default.config["beta_start"] == 0.00085
    assert default.config["beta_end"] == 0.012
    assert default.config["beta_schedule"] == "scaled_linear"
    own = make_scheduler(
        name, {"beta_start": 0.001, "beta_schedule": "linear", "prediction_type": "v_prediction"}
    )
    assert own.config["beta_start"] == 0.001
    assert own.config["beta_end"] == 0.012
    assert own.config["prediction_type"] == "v_prediction"
    assert own.alphas_cumprod[-1] != default.alphas_cumprod[-1]


@pytest.mark.parametrize("count", [0, 1, 5, 18, 19, 20])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_picture_gets_rid_of_the_noise_that_it_was_given(name, count):
    """With the noise predicted rightly, a straight way, the steps that remain lead back to the picture."""
    scheduler = make_scheduler(name, {})
    scheduler.set_timesteps(20)
    whole = scheduler.timesteps.unique_consecutive()
    skip_steps(scheduler, count)
    assert torch.equal(scheduler.timesteps.unique_consecutive(), whole[count:])
    assert len(scheduler.timesteps) == 20 - count + (name == "PNDM" and count < 19)
    clean, noise = torch.randn((2, 1, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    kept = scheduler.alphas_cumprod.numpy()
    latents = clean
    if count < 20:
        latents = scheduler.add_noise(clean, noise, scheduler.timesteps[:1])
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(latents, timestep)
        predicted = noise
        if name in ("K_EULER_ANCESTRAL", "LCM"):
            # It adds noise of its own, which then has to be predicted too.
            sigma = np.interp(timestep, np.arange(1000), ((1 - kept) / kept) ** 0.5)
            share = 1 / (1 + sigma**2)
            predicted = (scaled - share**0.5 * clean) / (1 - share) ** 0.5
        latents = scheduler.step(predicted, timestep, latents).prev_sample
    # PNDM and DDIM end at the first timestep of training, with 3 % of the noise left.
    left = 0.03 if name in ("PNDM", "DDIM") and count < 20 else 0
    assert (latents - clean - left * noise).abs().max() < 0.02


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_noise_that_is_known_is_removed_altogether(name, prediction_type):
    generator = torch.Generator().manual_seed(3)
    clean, noise = torch.randn(2, 1, 4, 8, 8, generator=generator)
    for step in (0, 4, 8):
        scheduler = make_scheduler(name, {"prediction_type": prediction_type})
        scheduler.set_timesteps(9)
        timestep = scheduler.timesteps[step]
        noisy = scheduler.add_noise(clean, noise, timestep[None])
        scaled = scheduler.scale_model_input(noisy, timestep)
        signal = scheduler.alphas_cumprod[round(float(timestep))]
        velocity = signal.sqrt() * noise - (1 - signal).sqrt() * clean
        predicted = noise if prediction_type == "epsilon" else velocity
        # Timesteps between two trained ones are rounded to one of them.
        assert torch.allclose(remove_noise(scheduler, scaled, predicted, timestep), clean, atol=0.05)
