"""From a request to pictures: seeds, batches, guidance, prompts, sizes and figures, on the tiny model."""

import dataclasses
import logging
import os

import numpy as np
import pytest
import skimage
import torch
from PIL import Image
from safetensors.torch import save_file

from japanese_stable_diffusion.images import open_start
from japanese_stable_diffusion.pipeline import (
    ACTIVATIONS_PER_CHANNEL,
    Figures,
    Picture,
    Pipeline,
    Step,
    decode,
    encode,
    encode_picture,
    first_pass_size,
    generated_size,
    largest_batch,
    slerp,
)
from japanese_stable_diffusion.provenance import hash_file
from japanese_stable_diffusion.request import SCHEDULERS, Request, RequestError
from japanese_stable_diffusion.schedulers import make_scheduler
from japanese_stable_diffusion.speed import speed_up
from japanese_stable_diffusion.weights import WEIGHTS, Manifest, load_weights


@pytest.fixture(scope="module")
def pipeline(weights):
    return Pipeline(weights)


def ask(**inputs):
    return Request(
        **{"prompt": "猫", "width": 64, "height": 64, "num_inference_steps": 3, "seed": 7, **inputs}
    )


def pictures(pipeline, request, figures=None):
    """The pictures of a request as arrays of integers, (height, width, 3)."""
    return [
        np.asarray(event.image, dtype=int)
        for event in pipeline.generate(request, figures)
        if isinstance(event, Picture)
    ]


def difference(one, other):
    return np.abs(one - other).max()


@pytest.fixture(scope="module")
def photograph(tmp_path_factory):
    """A file of 96 × 64 pixels in which nothing is of one colour."""
    across, down = np.meshgrid(np.linspace(0, 255, 96), np.linspace(0, 255, 64))
    path = tmp_path_factory.mktemp("photograph") / "photograph.png"
    Image.fromarray(np.stack([across, down, 255 - down], axis=-1).astype(np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def mask(tmp_path_factory):
    """A file that goes with the photograph: white in the left third."""
    path = tmp_path_factory.mktemp("mask") / "mask.png"
    picture = Image.new("1", (96, 64))
    picture.paste(1, (0, 0, 32, 64))
    picture.save(path)
    return path


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_pictures_of_a_batch_are_those_that_seed_plus_i_makes_alone(pipeline, scheduler):
    first = 2**32 - 2
    alone = [pictures(pipeline, ask(seed=(first + i) % 2**32, scheduler=scheduler))[0] for i in range(8)]
    assert all(difference(alone[0], other) > 30 for other in alone[1:])
    for count in (1, 3, 8):
        batch = pictures(pipeline, ask(seed=first, num_outputs=count, scheduler=scheduler))
        assert len(batch) == count
        assert all(difference(one, other) <= 2 for one, other in zip(batch, alone, strict=False))


@pytest.mark.parametrize("scheduler", ["DPMSolverMultistep", "K_EULER_ANCESTRAL"])
def test_the_same_seed_gives_the_same_pixels_again(pipeline, scheduler):
    request = ask(num_outputs=2, scheduler=scheduler)
    assert np.array_equal(pictures(pipeline, request), pictures(pipeline, request))


def test_each_picture_says_how_it_is_made_alone(pipeline):
    request = ask(num_outputs=2, seed=2**32 - 1)
    made = [event for event in pipeline.generate(request) if isinstance(event, Picture)]
    assert [(picture.index, picture.request) for picture in made] == [
        (0, ask(num_outputs=1, seed=2**32 - 1)),
        (1, ask(num_outputs=1, seed=0)),
    ]


def test_what_does_not_fit_is_made_in_smaller_batches(pipeline, monkeypatch):
    whole = pictures(pipeline, ask(num_outputs=5))
    shrink_memory(monkeypatch, 4 * 2 * bytes_of_a_picture(pipeline))
    sizes = batch_sizes(pipeline, ask(num_outputs=5))
    assert sizes == [2] * 3 + [2] * 3 + [1] * 3
    assert all(
        difference(*pair) <= 2 for pair in zip(pictures(pipeline, ask(num_outputs=5)), whole, strict=True)
    )


def shrink_memory(monkeypatch, total):
    """Let this machine have so many bytes of memory, of which a quarter is for a batch."""
    sizes = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": total}
    monkeypatch.setattr(os, "sysconf", lambda name: sizes[name])


def bytes_of_a_picture(pipeline):
    """Activations of a guided picture of 8 × 8 latents, in single precision."""
    return 2 * ACTIVATIONS_PER_CHANNEL * pipeline.weights.unet.config["block_out_channels"][0] * 8 * 8 * 4


def batch_sizes(pipeline, request):
    return [len(event.latents) for event in pipeline.generate(request) if isinstance(event, Step)]


def test_one_picture_is_tried_however_small_the_memory(weights, monkeypatch):
    shrink_memory(monkeypatch, 4)
    assert largest_batch(weights, (4, 128, 96)) == 1


class SmallDevice(torch.nn.Module):
    """A UNet on a device that runs out of memory above so many samples at once."""

    def __init__(self, unet, most):
        super().__init__()
        self.unet, self.most, self.sizes = unet, most, []
        self.config, self.dtype, self.device = unet.config, unet.dtype, unet.device

    def forward(self, sample, timestep, embeddings):
        self.sizes.append(len(sample))
        if len(sample) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self.unet(sample, timestep, embeddings)


def test_after_out_of_memory_the_same_pictures_come_in_smaller_batches(pipeline, caplog):
    caplog.set_level(logging.INFO, "japanese_stable_diffusion")
    whole = pictures(pipeline, ask(num_outputs=7))
    unet = SmallDevice(pipeline.weights.unet, most=4)
    small = Pipeline(dataclasses.replace(pipeline.weights, unet=unet))
    events = list(small.generate(ask(num_outputs=7)))
    made = [event for event in events if isinstance(event, Picture)]
    assert [picture.index for picture in made] == list(range(7))
    for picture, expected in zip(made, whole, strict=True):
        assert difference(np.asarray(picture.image, dtype=int), expected) <= 2
    # 7 and 3 pictures fail at the first evaluation (14 and 6 samples), then 1 at a time: 2 samples.
    assert unet.sizes == [14, 6] + [2] * 3 * 7
    assert [event.index for event in events if isinstance(event, Step)][-1] == 7 * 3
    assert "making 3 at once" in caplog.text


@torch.inference_mode()
def test_a_picture_that_does_not_fit_whole_is_decoded_in_tiles(caplog):
    caplog.set_level(logging.INFO, "japanese_stable_diffusion")
    vae = load_weights(WEIGHTS / "demo", torch.device("cpu"), torch.float32).vae
    photograph = Image.fromarray(skimage.data.astronaut()).resize((256, 256))
    latents, _ = encode_picture(vae, photograph, photograph.size)

    def distance():
        return np.abs(np.asarray(decode(vae, latents), dtype=int) - np.asarray(photograph)).mean()

    def fail_if_large(_, inputs):
        if inputs[0].shape[-1] > latents.shape[-1] / 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    whole = distance()
    assert "in tiles" not in caplog.text
    vae.decoder.register_forward_pre_hook(fail_if_large)
    tiled = distance()
    assert "in tiles" in caplog.text
    assert whole < tiled < 1.5 * whole


def test_a_picture_too_large_for_the_device_is_told_in_one_line(pipeline):
    small = Pipeline(dataclasses.replace(pipeline.weights, unet=SmallDevice(pipeline.weights.unet, most=1)))
    with pytest.raises(RequestError, match=r"^width, height: .*64 × 64.*memory.*fewer pixels"):
        list(small.generate(ask(num_outputs=4)))


def test_without_guidance_the_unet_sees_each_picture_once(pipeline):
    unet = SmallDevice(pipeline.weights.unet, most=100)
    counting = Pipeline(dataclasses.replace(pipeline.weights, unet=unet))
    unguided = pictures(counting, ask(guidance_scale=1, num_outputs=2))
    assert unet.sizes == [2] * 3
    unet.sizes.clear()
    guided = pictures(counting, ask(guidance_scale=1.0001, num_outputs=2))
    assert unet.sizes == [4] * 3
    # Guidance towards the prompt at a scale of 1 is the prompt alone.
    assert difference(unguided[0], guided[0]) <= 2


@pytest.mark.parametrize(
    "other",
    [
        {"prompt": "寿司"},
        {"prompt": ""},
        {"negative_prompt": "寿司"},
        {"guidance_scale": 15},
        {"num_inference_steps": 4},
        {"scheduler": "DDIM"},
        {"scheduler": "K_EULER_ANCESTRAL"},
    ],
    ids=str,
)
def test_everything_asked_for_shows(pipeline, other):
    assert difference(pictures(pipeline, ask())[0], pictures(pipeline, ask(**other))[0]) > 10


def test_weights_that_want_less_guidance_get_it_in_proportion(pipeline, caplog):
    caplog.set_level(logging.INFO, "japanese_stable_diffusion")
    manifest = dataclasses.replace(pipeline.weights.manifest, guidance_scale=4.0)
    gentle = Pipeline(dataclasses.replace(pipeline.weights, manifest=manifest))
    for asked, computed in ((7.5, 4.0), (20, 1 + 19 * 3 / 6.5), (1, 1)):
        [found] = pictures(gentle, ask(guidance_scale=asked))
        [expected] = pictures(pipeline, ask(guidance_scale=computed))
        assert difference(found, expected) == 0
    assert [record.getMessage() for record in caplog.records] == [
        "guidance_scale: 7.5 counts as 4 with these weights",
        "guidance_scale: 20 counts as 9.77 with these weights",
    ]


def test_a_negative_prompt_that_is_the_prompt_leaves_no_guidance(pipeline):
    [same] = pictures(pipeline, ask(negative_prompt="猫"))
    [unguided] = pictures(pipeline, ask(guidance_scale=1))
    assert difference(same, unguided) <= 2


@pytest.mark.parametrize("name", ["prompt", "negative_prompt"])
def test_a_long_prompt_shows_to_its_end_and_the_log_tells_its_windows(pipeline, caplog, name):
    caplog.set_level(logging.INFO, "japanese_stable_diffusion")
    long = "猫" * 75 + "富士山"
    [with_end] = pictures(pipeline, ask(**{name: long}))
    assert [record.getMessage() for record in caplog.records] == [
        f"{name}: is encoded in 2 windows of 77 tokens"
    ]
    [without] = pictures(pipeline, ask(**{name: long[:75]}))
    assert len(caplog.records) == 1
    assert difference(with_end, without) > 10


def test_windows_are_encoded_one_by_one_and_the_shorter_side_is_followed_by_empty_ones(pipeline):
    seen = []

    class Listening(SmallDevice):
        def forward(self, sample, timestep, embeddings):
            seen.append(embeddings)
            return super().forward(sample, timestep, embeddings)

    listening = Pipeline(
        dataclasses.replace(pipeline.weights, unet=Listening(pipeline.weights.unet, most=100))
    )
    weights = pipeline.weights
    pictures(listening, ask(prompt="猫" * 75 + "富士山", negative_prompt="寿司", num_inference_steps=1))
    ids = [weights.tokenizer(text).ids for text in ("寿司", "", "猫" * 75)]
    away, empty, first = (encode(window, weights.text_encoder) for window in ids)
    [embeddings] = seen
    assert embeddings.shape == (2, 2 * 77, 32)
    assert torch.equal(embeddings[:1], torch.cat([away, empty], dim=1))
    assert torch.equal(embeddings[1:, :77], first)


@pytest.mark.parametrize("prompt", ["(猫:1.0)、[（寿司）]", "猫、((寿司:2):.5)", "(猫、寿司：１)"])
def test_a_weight_of_1_everywhere_gives_the_picture_of_the_plain_prompt(pipeline, prompt):
    plain = ask(prompt="猫、寿司", negative_prompt="猫、寿司 ABC")
    emphasized = ask(prompt=prompt, negative_prompt="猫、寿司 (A[B]C:1)".replace("[B]", "B"))
    assert np.array_equal(pictures(pipeline, emphasized), pictures(pipeline, plain))


@pytest.mark.parametrize("name", ["prompt", "negative_prompt"])
def test_emphasis_shows(pipeline, name):
    made = [
        pictures(pipeline, ask(**{name: text}))[0]
        for text in ("猫、寿司", "(猫:1.5)、寿司", "猫、(寿司:1.5)")
    ]
    assert min(difference(made[i], made[j]) for i, j in ((0, 1), (0, 2), (1, 2))) > 5


def test_weights_multiply_the_embedding_and_its_mean_is_restored(weights):
    encoder, ids = weights.text_encoder, weights.tokenizer("猫寿司").ids
    with torch.inference_mode():
        # With a bias, as trained ones have, the tokens' means agree in sign.
        encoder.final_layer_norm.bias.add_(0.5)
        try:
            plain = encode(ids, encoder)
            factors = [1.0, 1.0, 1.5, 0.5] + [1.0] * 73
            weighted = encode(ids, encoder, factors)
        finally:
            encoder.final_layer_norm.bias.sub_(0.5)
    expected = plain * torch.tensor(factors)[:, None]
    expected *= plain.mean() / expected.mean()
    assert torch.allclose(weighted, expected, atol=1e-5)
    assert weighted.mean().item() == pytest.approx(plain.mean().item(), rel=1e-4)
    assert not torch.allclose(weighted, plain, atol=1e-2)


def test_a_mean_near_zero_does_not_scale_the_embedding_beyond_its_weights(weights):
    encoder, ids = weights.text_encoder, weights.tokenizer("猫寿司").ids
    for text_weight in (0.0, 0.2, 1.3, 3.0):
        factors = [1.0, text_weight] + [1.0] * 75
        with torch.inference_mode():
            plain, weighted = encode(ids, encoder), encode(ids, encoder, factors)
        ratio = (weighted[0, 2:] / plain[0, 2:]).median()
        assert 1 / max(factors) - 1e-4 <= ratio <= 1 / max(0.1, min(factors)) + 1e-4


def test_every_step_tells_how_far_it_is(pipeline):
    steps = [e for e in pipeline.generate(ask(num_outputs=2, scheduler="PNDM")) if isinstance(e, Step)]
    assert [(step.index, step.total) for step in steps] == [(2, 8), (4, 8), (6, 8), (8, 8)]
    assert all(step.latents.shape == (2, 4, 8, 8) for step in steps)
    assert not torch.equal(steps[0].latents, steps[1].latents)


def test_every_step_tells_what_it_took_the_latents_for_without_noise(pipeline):
    *_, before, last, _ = pipeline.generate(ask(num_inference_steps=4, scheduler="K_EULER"))
    assert before.denoised.shape == before.latents.shape
    # Euler's last step goes all the way to where it points.
    assert torch.allclose(last.denoised, last.latents, atol=1e-3)
    assert not torch.allclose(before.denoised, before.latents, atol=1e-1)


def test_the_latents_of_the_last_step_are_the_picture(pipeline):
    *_, step, picture = pipeline.generate(ask())
    assert np.array_equal(decode(pipeline.weights.vae, step.latents), picture.image)


def test_dropping_the_iterator_stops_the_work(pipeline):
    unet = SmallDevice(pipeline.weights.unet, most=100)
    events = Pipeline(dataclasses.replace(pipeline.weights, unet=unet)).generate(ask(num_inference_steps=50))
    next(events)
    events.close()
    assert len(unet.sizes) == 1


def test_gradients_are_off_inside_and_left_alone_outside(pipeline):
    events = pipeline.generate(ask())
    step = next(events)
    assert step.latents.is_inference()
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    events.close()


def test_figures_count_evaluations_and_seconds(pipeline, monkeypatch):
    figures = Figures()
    pictures(pipeline, ask(num_outputs=3, scheduler="PNDM", num_inference_steps=5), figures)
    assert figures.unet_evaluations == 6
    assert min(figures.text_seconds, figures.denoising_seconds, figures.decoding_seconds) > 0
    shrink_memory(monkeypatch, 4)
    figures = Figures()
    pictures(pipeline, ask(num_outputs=3), figures)
    assert figures.unet_evaluations == 9


@pytest.mark.parametrize(("width", "height"), [(64, 128), (192, 64)])
def test_pictures_have_the_size_asked_for(pipeline, width, height):
    [picture] = pictures(pipeline, ask(width=width, height=height))
    assert picture.shape == (height, width, 3)


@pytest.mark.parametrize(
    ("asked", "generated"),
    [
        ((512, 512), (128, 128)),
        ((64, 64), (128, 128)),
        ((1024, 768), (144, 112)),
        ((512, 768), (112, 160)),
        ((1024, 64), (512, 32)),
    ],
)
def test_small_weights_generate_about_their_native_area_in_the_asked_shape(weights, asked, generated):
    small = dataclasses.replace(weights, manifest=Manifest("small", native_size=128, enlarge=4))
    assert generated_size(small, *asked) == generated
    assert generated_size(weights, *asked) == asked


def test_what_small_weights_generate_is_enlarged_to_the_asked_size(weights):
    small = dataclasses.replace(weights, manifest=Manifest("small", native_size=64, enlarge=4))
    *_, step, picture = Pipeline(small).generate(ask(width=256, height=256))
    assert step.latents.shape == (1, 4, 8, 8)
    assert picture.image.size == (256, 256)
    enlarged = decode(weights.vae, step.latents).resize((256, 256), Image.Resampling.LANCZOS)
    assert np.array_equal(picture.image, enlarged)


def test_of_few_steps_one_at_least_repaints_a_picture(pipeline, photograph):
    for strength, steps in [(0, 0), (0.01, 1), (0.2, 1), (0.8, 3), (1, 4)]:
        request = ask(image=photograph, prompt_strength=strength, num_inference_steps=4, scheduler="LCM")
        *_, picture = events = list(pipeline.generate(request))
        assert len(events) == steps + 1
        assert isinstance(picture, Picture)


def test_lcm_is_not_made_faster_by_what_has_changed_since(pipeline):
    request = ask(scheduler="LCM", num_inference_steps=4)
    [plain], [fast] = (pictures(pipeline, dataclasses.replace(request, go_fast=go)) for go in (False, True))
    assert np.array_equal(plain, fast)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_words_alone_make_the_picture_of_the_plain_loop_bit_for_bit(pipeline, scheduler):
    weights = pipeline.weights
    solver = make_scheduler(scheduler, weights.scheduler_config)
    solver.set_timesteps(3)
    generator = torch.Generator().manual_seed(7)
    with torch.inference_mode():
        ids = torch.tensor([weights.tokenizer("").ids, weights.tokenizer("猫").ids])
        # One after the other, as the pipeline does: two at once may round otherwise.
        embeddings = torch.cat([weights.text_encoder(one[None]).last_hidden_state for one in ids])
        latents = torch.randn((1, 4, 8, 8), generator=generator) * solver.init_noise_sigma
        for timestep in solver.timesteps:
            scaled = solver.scale_model_input(latents, timestep)
            away, towards = weights.unet(torch.cat([scaled, scaled]), timestep, embeddings).sample.chunk(2)
            draws_noise = scheduler in ("K_EULER_ANCESTRAL", "LCM", "DDIM")
            options = {"generator": [generator]} if draws_noise else {}
            predicted = away + 7.5 * (towards - away)
            latents = solver.step(predicted, timestep, latents, **options).prev_sample
        pixels = weights.vae.decode(latents / weights.vae.config["scaling_factor"]).sample[0]
    expected = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0)
    [made] = pictures(pipeline, ask(scheduler=scheduler))
    assert np.array_equal(made, expected.numpy())


def test_strength_decides_how_many_steps_are_taken(pipeline, photograph):
    for strength, steps in [(0, 0), (0.09, 0), (0.1, 1), (0.75, 7), (1, 10)]:
        request = ask(image=photograph, prompt_strength=strength, num_inference_steps=10)
        events = list(pipeline.generate(request))
        assert [event.total for event in events[:-1]] == [steps] * steps
        assert isinstance(events[-1], Picture)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_less_strength_stays_nearer_to_the_picture(pipeline, photograph, scheduler):
    def made(strength):
        asked = ask(image=photograph, prompt_strength=strength, num_inference_steps=10, scheduler=scheduler)
        return pictures(pipeline, asked)[0]

    same = made(0)
    apart = [np.abs(made(strength) - same).mean() for strength in (0.2, 0.5, 1)]
    assert 0 < apart[0] < apart[1] < apart[2]


def test_without_strength_the_picture_comes_back_as_the_autoencoder_sees_it(pipeline, photograph):
    vae = pipeline.weights.vae
    picture = open_start(ask(image=photograph)).picture
    values = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.inference_mode():
        posterior = vae.encode(values).latent_dist
        noise = torch.randn((4, 8, 8), generator=torch.Generator().manual_seed(7))
        latents = (posterior.mean + posterior.std * noise) * vae.config["scaling_factor"]
        expected = decode(vae, latents)
    [made] = pictures(pipeline, ask(image=photograph, prompt_strength=0))
    assert difference(made, np.asarray(expected, dtype=int)) <= 1


@pytest.mark.parametrize("scheduler", ["DPMSolverMultistep", "K_EULER_ANCESTRAL"])
def test_a_batch_from_a_picture_is_what_its_seeds_make_alone(
    pipeline, photograph, mask, scheduler, monkeypatch
):
    asked = {"image": photograph, "mask": mask, "width": 128, "scheduler": scheduler}
    alone = [pictures(pipeline, ask(seed=7 + i, **asked))[0] for i in range(3)]
    assert difference(alone[0], alone[1]) > 10
    batch = pictures(pipeline, ask(num_outputs=3, **asked))
    assert all(difference(*pair) <= 2 for pair in zip(batch, alone, strict=True))
    shrink_memory(monkeypatch, 4)
    one_by_one = pictures(pipeline, ask(num_outputs=3, **asked))
    assert all(difference(*pair) <= 2 for pair in zip(one_by_one, alone, strict=True))


def test_a_picture_says_at_which_size_it_was_made(pipeline, photograph):
    request = Request(prompt="猫", image=photograph, num_inference_steps=2, seed=1)
    *_, picture = pipeline.generate(request)
    assert picture.image.size == (picture.request.width, picture.request.height) == (128, 64)
    assert picture.request.image == photograph
    assert picture.start.picture.size == (128, 64)


@pytest.mark.parametrize("strength", [0, 0.5, 1])
def test_what_is_black_in_the_mask_is_kept_to_the_pixel(pipeline, photograph, mask, strength):
    asked = ask(image=photograph, mask=mask, prompt_strength=strength, width=192, height=128)
    start = open_start(asked)
    kept = np.asarray(start.repainted) == 0
    assert 0.5 < kept.mean() < 0.9
    [made] = pictures(pipeline, asked)
    assert np.array_equal(made[kept], np.asarray(start.picture)[kept])
    assert difference(made[~kept], np.asarray(start.picture, dtype=int)[~kept]) > 50


def test_weights_that_enlarge_keep_the_pixels_too(weights, photograph, mask):
    small = Pipeline(dataclasses.replace(weights, manifest=Manifest("small", native_size=64, enlarge=4)))
    asked = ask(image=photograph, mask=mask, prompt_strength=1, width=384, height=256)
    start = open_start(asked)
    kept = np.asarray(start.repainted) == 0
    *_, step, picture = small.generate(asked)
    assert step.latents.shape == (1, 4, 6, 10)
    assert np.array_equal(np.asarray(picture.image)[kept], np.asarray(start.picture)[kept])
    assert difference(np.asarray(picture.image, int)[~kept], np.asarray(start.picture, int)[~kept]) > 50


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_latents_outside_the_mask_are_the_pictures_own_at_every_step(pipeline, photograph, mask, scheduler):
    asked = {"image": photograph, "mask": mask, "width": 192, "height": 128, "scheduler": scheduler}
    cat, dog = (
        [event.latents for event in pipeline.generate(ask(prompt=prompt, **asked)) if isinstance(event, Step)]
        for prompt in ("猫", "サラリーマン 油絵")
    )
    for one, other in zip(cat, dog, strict=True):
        assert torch.equal(one[..., 8:], other[..., 8:])
        assert not torch.equal(one[..., :8], other[..., :8])
    spreads = [latents[..., 8:].std().item() for latents in cat]
    assert spreads[-1] < spreads[0], "less and less noise"


def test_a_mask_of_a_few_pixels_repaints_their_latents(pipeline, photograph, tmp_path):
    dot = Image.new("L", (96, 64))
    dot.putpixel((48, 32), 255)
    dot.save(tmp_path / "dot.png")
    asked = ask(image=photograph, mask=tmp_path / "dot.png", prompt_strength=1, width=192, height=128)
    [made] = pictures(pipeline, asked)
    changed = np.abs(made - np.asarray(open_start(asked).picture, dtype=int)).max(axis=2) > 0
    assert 1 <= changed.sum() <= 16


@pytest.mark.parametrize("scheduler", ["DPMSolverMultistep", "K_EULER_ANCESTRAL"])
def test_variations_of_a_batch_are_those_that_both_seeds_plus_i_make_alone(pipeline, scheduler):
    asked = {"variation_strength": 0.3, "scheduler": scheduler}
    batch = pictures(pipeline, ask(seed=2**32 - 1, variation_seed=8, num_outputs=3, **asked))
    for i, one in enumerate(batch):
        [alone] = pictures(pipeline, ask(seed=(2**32 - 1 + i) % 2**32, variation_seed=8 + i, **asked))
        assert difference(one, alone) <= 2


def test_a_variation_goes_from_one_picture_to_the_other(pipeline):
    one, other = (pictures(pipeline, ask(seed=seed))[0] for seed in (7, 8))
    between = [
        pictures(pipeline, ask(variation_seed=8, variation_strength=strength))[0]
        for strength in (0, 0.01, 0.3, 0.7, 1)
    ]
    assert np.array_equal(between[0], one)
    assert difference(between[4], other) <= 1
    away = [np.abs(one - picture).mean() for picture in between]
    assert away == sorted(set(away))
    assert np.array_equal(pictures(pipeline, ask(variation_seed=7, variation_strength=0.5))[0], one)


def test_blended_noise_varies_as_much_as_noise():
    one, other = (torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    assert torch.equal(slerp(one, other, 1.0), other)
    for strength in (0.1, 0.5, 0.9):
        assert slerp(one, other, strength).std().item() == pytest.approx(1, abs=0.03)
    assert torch.equal(slerp(one, one, 0.5), one)


def test_a_variation_shows_in_what_is_made_from_a_picture(pipeline, tmp_path):
    Image.radial_gradient("L").save(tmp_path / "image.png")
    asked = {"image": tmp_path / "image.png", "variation_seed": 8}
    one, other = (pictures(pipeline, ask(variation_strength=strength, **asked))[0] for strength in (0, 0.5))
    assert difference(one, other) > 10


@pytest.fixture(params=["unet", "text_encoder"])
def lora(request, pipeline, tmp_path):
    """A file that changes much of one part of the weights."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, module in getattr(pipeline.weights, request.param).named_modules():
        if isinstance(module, torch.nn.Linear):
            for kind, shape in (("A", (2, module.in_features)), ("B", (module.out_features, 2))):
                tensors[f"{request.param}.{name}.lora_{kind}.weight"] = torch.randn(
                    shape, generator=generator
                )
    save_file(tensors, tmp_path / "lora")
    return tmp_path / "lora"


def test_a_lora_shows_and_is_gone_with_the_next_request(weights, lora):
    pipeline = Pipeline(weights)
    # For the text encoder, the empty prompt is made with the LoRA too, and not kept.
    [with_lora] = pictures(pipeline, ask(lora=lora))
    before = pictures(pipeline, ask())
    assert difference(with_lora, before[0]) > 10
    for scale in (0.5, 0, 2):
        [scaled] = pictures(pipeline, ask(lora=lora, lora_scale=scale))
        assert (difference(scaled, before[0]) > 5) == bool(scale)
        assert difference(scaled, with_lora) > 5
        assert np.array_equal(pictures(pipeline, ask()), before)
    assert np.array_equal(pictures(pipeline, ask(lora=lora))[0], with_lora)


def test_a_lora_is_gone_while_a_request_waits_and_after_it_was_cancelled(pipeline, lora):
    before = pictures(pipeline, ask())
    events = pipeline.generate(ask(lora=lora, num_outputs=2))
    next(events)
    # Neither closed nor finished.
    assert np.array_equal(pictures(pipeline, ask()), before)
    events.close()
    assert np.array_equal(pictures(pipeline, ask()), before)


def test_a_lora_is_gone_after_an_error(pipeline, lora):
    before = pictures(pipeline, ask())

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    failing = pipeline.weights.unet.conv_out.register_forward_hook(fail)
    try:
        with pytest.raises(RequestError, match=r"^width, height"):
            list(pipeline.generate(ask(lora=lora)))
    finally:
        failing.remove()
    assert np.array_equal(pictures(pipeline, ask()), before)


@pytest.mark.parametrize(
    "inputs",
    [
        {},
        {"negative_prompt": "犬", "prompt": "(猫:1.3) 油絵", "num_outputs": 2},
        {"go_fast": True, "num_inference_steps": 6},
        {"scheduler": "LCM", "guidance_scale": 1},
        {"image": True, "width": 192, "height": 128},
        {"image": True, "mask": True, "prompt_strength": 1, "width": 192, "height": 128},
        {"lora": True, "lora_scale": 0.3},
        {"variation_strength": 0.3, "variation_seed": 2},
    ],
    ids=" ".join,
)
def test_in_half_precision_as_on_a_gpu_the_picture_is_nearly_the_same(
    inputs, tiny_weights, weights, photograph, mask, lora
):
    files = {"image": photograph, "mask": mask, "lora": lora}
    request = ask(**{name: files.get(name, value) for name, value in inputs.items()})
    half = load_weights(tiny_weights, torch.device("cpu"), torch.float16)
    speed_up(half)
    expected, found = (pictures(Pipeline(part), request) for part in (weights, half))
    others = pictures(Pipeline(weights), dataclasses.replace(request, seed=100))
    assert len(found) == request.num_outputs
    for one, same, other in zip(found, expected, others, strict=True):
        # A UNet that was never trained makes much of what was rounded.
        assert 0 < np.abs(one - same).mean() < np.abs(one - other).mean() / 4


def test_a_picture_to_start_from_that_is_too_large_for_the_device_is_told_in_a_line(pipeline, photograph):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    failing = pipeline.weights.vae.encoder.register_forward_hook(fail)
    try:
        with pytest.raises(RequestError, match=r"^width, height: not even one picture of .* fits"):
            list(pipeline.generate(ask(image=photograph)))
    finally:
        failing.remove()


def test_every_picture_tells_the_lora_that_it_was_made_with(pipeline, lora):
    made = [e for e in pipeline.generate(ask(lora=lora, num_outputs=2)) if isinstance(e, Picture)]
    assert [picture.lora_hash for picture in made] == [hash_file(lora)] * 2
    [bare] = [e for e in pipeline.generate(ask()) if isinstance(e, Picture)]
    assert bare.lora_hash == ""


@pytest.mark.parametrize(
    ("asked", "first"),
    [
        ((1024, 768), (592, 448)),
        ((768, 1024), (448, 592)),
        ((832, 512), (656, 400)),
        ((1024, 256), (768, 192)),
        ((1024, 64), (768, 48)),
        ((768, 768), None),
        ((64, 64), None),
    ],
)
def test_pictures_well_above_the_native_size_are_made_smaller_first(weights, asked, first):
    width, height = asked
    assert first_pass_size(weights, ask(width=width, height=height)) == first
    assert first_pass_size(weights, ask(width=width, height=height, second_pass=False)) is None
    enlarging = dataclasses.replace(weights, manifest=Manifest("small", native_size=64, enlarge=4))
    assert first_pass_size(enlarging, ask(width=width, height=height)) is None


@pytest.fixture
def small_native(weights, monkeypatch):
    """The tiny model as if it had been trained at 64 pixels, and 128 were large."""
    monkeypatch.setattr("japanese_stable_diffusion.pipeline.LARGE", 0)
    return Pipeline(dataclasses.replace(weights, manifest=Manifest("small", native_size=64)))


@pytest.mark.parametrize(("scheduler", "steps"), [("DPMSolverMultistep", 5 + 2), ("PNDM", 6 + 3)])
def test_a_second_pass_repaints_the_enlarged_picture(small_native, caplog, scheduler, steps):
    caplog.set_level(logging.INFO, "japanese_stable_diffusion")
    request = ask(width=128, height=192, num_outputs=2, num_inference_steps=5, scheduler=scheduler)
    *made, one, other = small_native.generate(request)
    assert [step.index for step in made] == [2 * i for i in range(1, steps + 1)]
    assert {step.total for step in made} == {2 * steps}
    sides = [tuple(step.latents.shape) for step in made]
    second = steps - steps // 3
    assert sides == [(2, 4, 10, 6)] * second + [(2, 4, 24, 16)] * (steps - second)
    assert "second_pass: made at 48 × 80, then enlarged to 128 × 192" in caplog.messages
    assert one.image.size == other.image.size == (128, 192)
    [alone] = pictures(small_native, other.request)
    assert difference(np.asarray(other.image, dtype=int), alone) <= 2


def test_without_a_second_pass_a_large_picture_is_made_at_once(small_native, pipeline, caplog):
    caplog.set_level(logging.INFO, "japanese_stable_diffusion")
    request = ask(width=128, height=128, second_pass=False)
    assert np.array_equal(pictures(small_native, request), pictures(pipeline, request))
    assert caplog.messages == []
    assert difference(
        pictures(small_native, request)[0], pictures(small_native, ask(width=128, height=128))[0]
    )


def test_what_starts_from_a_picture_needs_no_second_pass(small_native, tmp_path):
    Image.radial_gradient("L").save(tmp_path / "image.png")
    request = ask(image=tmp_path / "image.png", width=128, height=128)
    assert {step.latents.shape for step in small_native.generate(request) if isinstance(step, Step)} == {
        (1, 4, 16, 16)
    }


def test_with_too_few_steps_to_repaint_the_picture_is_only_enlarged(small_native):
    *_, step, picture = small_native.generate(ask(width=128, height=128, num_inference_steps=2))
    assert (step.index, step.total) == (2, 2)
    assert picture.image.size == (128, 128)


def test_a_lora_and_a_variation_show_in_both_passes(small_native, lora):
    asked = {"width": 128, "height": 128}
    plain = pictures(small_native, ask(**asked))
    assert difference(pictures(small_native, ask(lora=lora, **asked))[0], plain[0]) > 5
    varied = ask(variation_seed=8, variation_strength=0.5, **asked)
    assert difference(pictures(small_native, varied)[0], plain[0]) > 5
    assert np.array_equal(pictures(small_native, ask(**asked)), plain)
