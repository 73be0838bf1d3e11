"""What go_fast leaves out, and that what is left is the same."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from japanese_stable_diffusion import pipeline as pipelines
from japanese_stable_diffusion.pipeline import Figures, Picture, Pipeline
from japanese_stable_diffusion.request import Request
from japanese_stable_diffusion.schedulers import make_scheduler
from japanese_stable_diffusion.shortcuts import GO_FAST, Savings, Shortcut

FAST = Request(seed=3, num_inference_steps=6, width=64, height=128, go_fast=True)


def inputs(seed=1, count=2):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(count, 4, 8, 16, generator=generator)
    return latents, torch.tensor(500), torch.randn(count, 77, 32, generator=generator)


def every(count):
    return Savings(guided=(0, float("inf")), inner_every=count)


def pictures(weights, request, figures=None):
    events = Pipeline(weights).generate(request, figures)
    return [event.image for event in events if isinstance(event, Picture)]


@torch.inference_mode()
def test_outer_layers_alone_say_the_same_where_the_inner_ones_would(weights):
    shortcut = Shortcut(weights.unet)
    latents, timestep, text = inputs()
    expected = weights.unet(latents, timestep, text).sample
    assert torch.equal(shortcut(latents, timestep, text), expected)
    assert torch.allclose(shortcut.outer(latents, timestep, text), expected, atol=1e-6)
    assert torch.allclose(shortcut.outer(latents[1:], timestep, text[1:]), expected[1:], atol=1e-5)


@torch.inference_mode()
def test_outer_layers_still_hear_latents_and_text(weights):
    shortcut = Shortcut(weights.unet)
    latents, timestep, text = inputs()
    before = shortcut(latents, timestep, text)
    assert not torch.allclose(shortcut.outer(latents + 1, timestep, text), before, atol=1e-3)
    assert not torch.allclose(shortcut.outer(latents, timestep, text * 2), before, atol=1e-6)


@torch.inference_mode()
def test_outer_layers_compute_a_part(weights):
    shortcut = Shortcut(weights.unet)
    latents, timestep, text = inputs()
    with FlopCounterMode(display=False) as everything:
        shortcut(latents, timestep, text)
    with FlopCounterMode(display=False) as outer:
        shortcut.outer(latents, timestep, text)
    assert outer.get_total_flops() < 0.5 * everything.get_total_flops()


@torch.inference_mode()
def test_inner_layers_of_fewer_latents_do_not_serve(weights):
    shortcut = Shortcut(weights.unet)
    assert not shortcut.suffices(1, every(3))
    shortcut(*inputs(count=1))
    assert shortcut.suffices(1, every(3)) and not shortcut.suffices(2, every(3))
    with pytest.raises(ValueError, match="were not computed"):
        shortcut.outer(*inputs(count=2))


@torch.inference_mode()
def test_inner_layers_serve_for_a_while(weights):
    shortcut = Shortcut(weights.unet)
    for _ in range(2):
        shortcut(*inputs())
        assert not shortcut.suffices(2, every(1)) and shortcut.suffices(2, every(2))
        shortcut.outer(*inputs())
        assert not shortcut.suffices(2, every(2)) and shortcut.suffices(2, every(3))
        shortcut.outer(*inputs())
        assert not shortcut.suffices(2, every(3))


def test_guidance_is_given_between_two_noise_levels():
    scheduler = make_scheduler("DDIM", {})
    scheduler.set_timesteps(500)
    savings = Savings(guided=(0.5, 5.0), inner_every=1)
    guided = [bool(savings.guides(scheduler, t)) for t in scheduler.timesteps]
    noise = [
        ((1 - scheduler.alphas_cumprod[t]) / scheduler.alphas_cumprod[t]) ** 0.5 for t in scheduler.timesteps
    ]
    assert guided == [0.5 <= float(sigma) <= 5 for sigma in noise]
    assert True in guided and not guided[0] and not guided[-1]


@pytest.mark.parametrize("scheduler", ["DPMSolverMultistep", "PNDM", "KLMS", "K_EULER_ANCESTRAL"])
def test_nothing_left_out_makes_the_same_picture(weights, monkeypatch, scheduler):
    monkeypatch.setattr(pipelines, "GO_FAST", Savings(guided=(0, float("inf")), inner_every=1))
    request = replace(FAST, scheduler=scheduler)
    assert pictures(weights, request) == pictures(weights, replace(request, go_fast=False))


@pytest.mark.parametrize("guided", [(0, float("inf")), (0.5, 5.0), (0, 0)])
@pytest.mark.parametrize("count", [1, 3])
def test_it_computes_less_and_draws_another_picture(weights, monkeypatch, guided, count):
    monkeypatch.setattr(pipelines, "GO_FAST", Savings(guided, inner_every=3))
    figures, all_figures = Figures(), Figures()
    request = replace(FAST, num_outputs=count)
    fast = pictures(weights, request, figures)
    full = pictures(weights, replace(request, go_fast=False), all_figures)
    assert len(fast) == count and all(a.tobytes() != b.tobytes() for a, b in zip(fast, full, strict=True))
    assert 2 <= figures.unet_evaluations < all_figures.unet_evaluations == 6


def test_what_go_fast_leaves_out_is_something():
    assert GO_FAST.inner_every > 1 and GO_FAST.guided != (0, float("inf"))
