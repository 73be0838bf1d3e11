"""The training loop: its stages, its checkpoints, its processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from japanese_stable_diffusion.pipeline import Figures, Picture, Pipeline
from japanese_stable_diffusion.request import Request
from japanese_stable_diffusion.training.batches import (
    BASE_STYLES,
    Draws,
    Steps,
    _order,
    cached_moments,
    noise_for,
    shift_timesteps,
    takes_part,
    to_tensor,
)
from japanese_stable_diffusion.training.configuration import (
    ConfigurationError,
    Stage,
    read_configuration,
)
from japanese_stable_diffusion.training.demo import needed_stages
from japanese_stable_diffusion.training.export import publish
from japanese_stable_diffusion.training.objectives import (
    Aligning,
    Consistency,
    Denoising,
    Guess,
    Picturing,
)
from japanese_stable_diffusion.training.samples import Sample
from japanese_stable_diffusion.training.shards import Shards, write_shard
from japanese_stable_diffusion.training.trainer import learning_rate, make_model, start_models, train
from japanese_stable_diffusion.weights import load_weights, read_manifest, verify_weights

TINY = Path(__file__).with_name("tiny.toml")
DOORS = Path(__file__).parents[2] / "scripts"
CPU = torch.device("cpu")


def tensors(folder: Path, model: str) -> dict[str, torch.Tensor]:
    return load_file(next((folder / model).glob("*.safetensors")))


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "loss.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(drawn_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All stages, trained for a few steps each."""
    folder = tmp_path_factory.mktemp("runs")
    configuration = read_configuration(str(TINY))
    for stage in configuration.stages:
        train(configuration, stage, drawn_folder, folder, cpu=True)
    return folder


def test_every_stage_trains_what_it_says_and_nothing_else(runs: Path) -> None:
    base, stage1, stage2 = (runs / name / "weights" for name in ("base", "stage1", "stage2"))
    assert same(tensors(runs / "autoencoder" / "weights", "vae"), tensors(stage2, "vae"))
    assert same(tensors(base, "unet"), tensors(stage1, "unet"))
    assert not same(tensors(stage1, "unet"), tensors(stage2, "unet"))
    assert not same(tensors(stage1, "text_encoder"), tensors(stage2, "text_encoder"))


def test_the_autoencoder_learns_and_scales_its_latents(runs: Path) -> None:
    curve = losses(runs / "autoencoder")
    assert curve[-1] < 0.9 * curve[0]
    config = json.loads((runs / "autoencoder" / "weights" / "vae" / "config.json").read_text())
    assert config["scaling_factor"] != 0.18215


def test_captions_find_their_partners(runs: Path) -> None:
    curve = losses(runs / "words")
    assert curve[-1] < 0.9 * curve[0]
    assert not (runs / "words" / "weights" / "unet").exists()


def test_a_text_encoder_learns_to_say_what_one_of_another_language_says(runs: Path) -> None:
    curve = losses(runs / "aligned_ja")
    assert np.mean(curve[-3:]) < 0.9 * np.mean(curve[:3])
    weights = runs / "aligned_ja" / "weights"
    assert {path.name for path in weights.iterdir()} >= {"text_encoder", "tokenizer"}
    assert not (weights / "english").exists() and not (weights / "unet").exists()
    japanese = (runs / "tokenizer-ja" / "spiece.model").read_bytes()
    assert (weights / "tokenizer" / "spiece.model").read_bytes() == japanese


@torch.no_grad()
def test_what_is_aligned_is_the_error_in_units_of_what_the_teacher_tells_apart(runs: Path) -> None:
    configuration = read_configuration(str(TINY))
    models = start_models(configuration, configuration.stage("aligned_ja"), runs)
    assert same(models["english"].state_dict(), tensors(runs / "base" / "weights", "text_encoder"))
    ids = torch.randint(4, 20, (3, 77), generator=torch.Generator().manual_seed(1))
    teacher = models["english"].eval()
    assert float(Aligning(teacher, teacher)(ids, ids)["loss"]) == 0
    silent = models["text_encoder"].eval()
    silent.final_layer_norm.weight.zero_()
    silent.final_layer_norm.bias.fill_(float(teacher(ids).last_hidden_state.mean()))
    assert float(Aligning(silent, teacher)(ids, ids)["loss"]) == pytest.approx(1, abs=1e-3)


def test_captions_tell_what_their_pictures_look_like(runs: Path) -> None:
    curve = losses(runs / "pictured")
    assert np.mean(curve[-3:]) < np.mean(curve[:3])
    weights = runs / "pictured" / "weights"
    assert not same(tensors(runs / "words" / "weights", "text_encoder"), tensors(weights, "text_encoder"))
    assert same(tensors(runs / "autoencoder" / "weights", "vae"), tensors(weights, "vae"))


def test_another_text_encoder_may_learn_to_say_the_same(runs: Path) -> None:
    first, second = (runs / name / "weights" for name in ("pictured", "pictured_ja"))
    assert same(tensors(first, "guess"), tensors(second, "guess"))
    assert not same(tensors(first, "text_encoder"), tensors(second, "text_encoder"))
    curve = losses(runs / "pictured_ja")
    assert np.mean(curve[-3:]) < np.mean(curve[:3])


@torch.no_grad()
def test_each_position_guesses_its_own_patch_of_the_picture_as_each_hand_would_draw_it() -> None:
    configuration = read_configuration(str(TINY))
    torch.manual_seed(0)
    guess = Guess(hidden_size=16, latent_channels=4, hands=3)
    picturing = Picturing(make_model("text_encoder", configuration), guess)
    ids = torch.randint(4, 60, (2, 77))
    hidden = picturing.text_encoder(ids).last_hidden_state
    latents = torch.zeros(2, 3, 4, 8, 8)
    for picture in range(2):
        for place in range(16):
            top, left = 2 * (place // 4), 2 * (place % 4)
            patches = guess.linear(hidden[picture, 77 - 16 + place]).reshape(3, 4, 2, 2)
            latents[picture, :, :, top : top + 2, left : left + 2] = patches
    everything = torch.ones(2, 3, dtype=torch.bool)
    assert picturing(latents, everything, ids)["loss"] < 1e-9
    latents[1, 2] += 1
    drawn = torch.tensor([[True, True, True], [True, True, False]])
    assert picturing(latents, drawn, ids)["loss"] < 1e-9
    assert picturing(latents, everything, ids)["loss"] == pytest.approx(1 / 6, rel=1e-3)
    with pytest.raises(ValueError, match="100 patches"):
        picturing(torch.zeros(2, 3, 4, 20, 20), drawn, ids)


def test_what_each_hand_drew_comes_together(drawn: Shards) -> None:
    moments = np.arange(len(drawn), dtype=np.float16)[:, None, None, None]

    def hands_of(draws: Draws, position: int) -> tuple[list[str], set[tuple[str, str]]]:
        item = draws[position]
        members = [int(index) for index in item["drawings"].flatten()[item["drawn"]]]
        about = [drawn.about[member] for member in members]
        return [a["hand"] for a in about], {(a["concept"], a["style"]) for a in about}

    draws = Draws(drawn, "ja", 7, False, None, 0, moments, hands=6)
    without = Draws(drawn, "ja", 7, False, None, 0, moments, without_hands=("noto", "fluent"), hands=6)
    for position in range(20):
        hands, subjects = hands_of(draws, position)
        assert hands == sorted(set(hands)) and len(hands) == 6 and len(subjects) == 1
        assert not {"noto", "fluent"} & set(hands_of(without, position)[0])
    alone = Draws(drawn, "ja", 7, False, None, 0, moments, hands=1)[3]
    assert alone["drawn"].tolist() == [True] and len(alone["drawings"]) == 1
    with pytest.raises(ValueError, match="hands is 2, but there are 6"):
        Draws(drawn, "ja", 7, False, None, 0, moments, hands=2)


def test_latents_are_cached_for_every_picture_that_is_trained_on(drawn: Shards, tmp_path: Path) -> None:
    vae = make_model("vae", read_configuration(str(TINY)))
    moments = cached_moments(drawn, vae, tmp_path / "latents.npy", Accelerator(cpu=True), ("noto", "fluent"))
    draws = Draws(drawn, "ja", 7, False, None, 0, moments, without_hands=("noto", "fluent"))
    known = np.flatnonzero(moments.any(axis=(1, 2, 3)))
    assert known.tolist() == draws.members.tolist()
    index = int(known[-1])
    with torch.inference_mode():
        expected = vae.encode(to_tensor(drawn.picture(index))[None]).latent_dist.parameters[0]
    torch.testing.assert_close(
        torch.from_numpy(moments[index].astype(np.float32)), expected, atol=1e-2, rtol=1e-2
    )


def test_rare_styles_may_be_shown_as_often_as_common_ones(drawn: Shards) -> None:
    def shares(evenly: bool) -> list[float]:
        draws = Draws(drawn, "ja", 7, False, None, 0.0, None, styles_evenly=evenly)
        counts = Counter(drawn.about[member]["style"] for member in draws.members)
        return [count / len(draws.members) for count in counts.values()]

    assert max(shares(False)) > 1.5 * min(shares(False))
    assert max(shares(True)) < 1.5 * min(shares(True))
    assert len(shares(True)) == len(shares(False))


def test_a_style_may_be_shown_more_often_than_the_others(drawn: Shards) -> None:
    draws = Draws(drawn, "ja", 7, False, None, 0.0, None, styles_evenly=True, style_frequency={"ukiyoe": 3.0})
    counts = Counter(drawn.about[member]["style"] for member in draws.members)
    others = [count for style, count in counts.items() if style != "ukiyoe"]
    assert min(others) * 2 < counts["ukiyoe"] < max(others) * 4
    with pytest.raises(ValueError, match=r"style_frequency names sepia, but there are .*ukiyoe"):
        Draws(drawn, "ja", 7, False, None, 0.0, None, styles_evenly=True, style_frequency={"sepia": 2.0})


def test_a_stage_may_leave_out_hands(drawn: Shards) -> None:
    draws = Draws(drawn, "ja", 7, False, None, 0, None, without_hands=("noto", "fluent"))
    hands = {drawn.about[index]["hand"] for index in draws.members}
    assert hands == {about["hand"] for about in drawn.about} - {"noto", "fluent"}


def test_two_captions_of_one_picture_are_partners(drawn: Shards) -> None:
    draws = Draws(
        drawn, "ja", 7, False, lambda text: [len(text)] + [ord(c) for c in text], 0.5, None, partners=True
    )
    for position in range(20):
        item = draws[position]
        about = drawn.about[int(draws.members[_order(7, 0, len(draws.members))[position]])]
        texts = ["".join(map(chr, item[name].tolist()[1:])) for name in ("ids", "partner_ids")]
        assert set(texts) <= set(about["ja"]) and (len(set(texts)) == 2 or len(set(about["ja"])) == 1)


def test_the_english_partner_of_a_caption_is_the_first(drawn: Shards) -> None:
    def encode(text: str) -> list[int]:
        return [len(text)] + [ord(c) for c in text]

    draws = Draws(drawn, "ja", 7, True, encode, 0.3, None, partners=True, encode_english=encode)
    seen = set()
    for position in range(40):
        item = draws[position]
        about = drawn.about[int(draws.members[_order(7, 0, len(draws.members))[position]])]
        japanese, english = ("".join(map(chr, item[name].tolist()[1:])) for name in ("ids", "partner_ids"))
        assert (japanese in about["ja"] and english == about["en"][0]) or (japanese, english) == ("", "")
        seen.add(bool(japanese))
    assert seen == {True, False}


def test_sample_pictures_and_losses_are_logged(runs: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for stage in ("autoencoder", "stage2", "distilled"):
        events = EventAccumulator(str(runs / stage / "logs"))
        events.Reload()
        assert events.Tags()["images"], stage
        assert {"loss", "learning_rate"} <= set(events.Tags()["scalars"]), stage


def test_published_weights_make_pictures_and_say_where_they_come_from(runs: Path, tmp_path: Path) -> None:
    configuration = replace(read_configuration(str(TINY)), guidance_scale=3.0)
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "LICENSE.md").write_text("stays")
    publish(runs / "stage2" / "weights", folder, configuration, "stage2", "1")
    manifest = read_manifest(folder)
    verify_weights(folder, manifest, hashes=True)
    assert (folder / "LICENSE.md").read_text() == "stays"
    assert manifest.native_size == 64 and manifest.enlarge == 2 and manifest.guidance_scale == 3.0
    assert manifest.training is not None and "stage2" in manifest.training.configuration
    assert tensors(folder, "unet")["conv_in.weight"].dtype == torch.float16
    for config in folder.glob("*/config.json"):
        assert str(runs) not in config.read_text(), "names a folder of the machine that trained it"
    pipeline = Pipeline(load_weights(folder, CPU, torch.float32))
    request = Request(prompt="犬", width=128, height=128, num_inference_steps=2, seed=1)
    pictures = [made.image for made in pipeline.generate(request) if isinstance(made, Picture)]
    assert [picture.size for picture in pictures] == [(128, 128)]
    assert isinstance(pictures[0], Image.Image)


def test_distilled_weights_make_pictures_in_few_steps_without_guidance(
    runs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    distilled, stage2 = runs / "distilled" / "weights", runs / "stage2" / "weights"
    assert not same(tensors(distilled, "unet"), tensors(stage2, "unet"))
    assert same(tensors(distilled, "text_encoder"), tensors(stage2, "text_encoder"))
    assert not (distilled / "teacher").exists()
    publish(distilled, tmp_path, read_configuration(str(TINY)), "distilled", "1")
    assert read_manifest(tmp_path).few_steps == 4
    pipeline = Pipeline(load_weights(tmp_path, CPU, torch.float32))
    caplog.set_level("INFO")
    for asked, steps in (
        (Request(seed=1, go_fast=True), 4),
        (Request(seed=1, scheduler="LCM", num_inference_steps=2), 2),
    ):
        figures = Figures()
        *_, picture = pipeline.generate(replace(asked, prompt="犬", width=128, height=128), figures)
        made = picture.request
        assert (made.scheduler, made.num_inference_steps, made.guidance_scale) == ("LCM", steps, 1)
        assert figures.unet_evaluations == steps
        assert f"LCM, {steps} steps without guidance" in caplog.text


def test_weights_from_elsewhere_are_distilled_with_their_own_tokenizer(
    runs: Path, drawn_folder: Path, tmp_path: Path
) -> None:
    configuration = read_configuration(str(TINY))
    carried = tmp_path / "carried"
    publish(runs / "stage2" / "weights", carried, configuration, "stage2", "1")
    start = {name: str(carried) for name in ("vae", "unet", "teacher", "text_encoder")}
    stage = replace(configuration.stage("distilled"), start=start, steps=4)
    trained = train(configuration, stage, drawn_folder, tmp_path / "runs", cpu=True)
    assert not list((tmp_path / "runs").glob("tokenizer-*"))
    pieces = (trained / "tokenizer" / "spiece.model").read_bytes()
    assert pieces == (carried / "tokenizer" / "spiece.model").read_bytes()
    (carried / "tokenizer" / "spiece.model").unlink()
    with pytest.raises(ConfigurationError, match=r"no .*carried/tokenizer/spiece\.model"):
        train(configuration, stage, drawn_folder, tmp_path / "again", cpu=True)


@pytest.mark.parametrize("able", [False, True])
def test_bf16_is_computed_where_the_processor_can(
    able: bool,
    drawn_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": able})
    configuration = read_configuration(str(TINY))
    stage = replace(configuration.stage("autoencoder"), steps=2)
    weights = {
        precision: tensors(
            train(
                configuration, replace(stage, precision=precision), drawn_folder, tmp_path / precision, True
            ),
            "vae",
        )
        for precision in ("no", "bf16")
    }
    assert same(weights["no"], weights["bf16"]) == (not able)
    assert ("stage autoencoder: in single precision" in caplog.text) == (not able)


class Known(nn.Module):
    """A denoiser that predicts what it is told, times a weight."""

    def __init__(self, noise: torch.Tensor) -> None:
        super().__init__()
        self.noise = noise
        self.weight = nn.Parameter(torch.ones(()))
        self.asked: list[torch.Tensor] = []

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor) -> SimpleNamespace:
        assert timesteps.min() >= 0 and len(timesteps) == len(noisy) == len(text)
        self.asked.append(timesteps)
        noise = self.noise.repeat(len(noisy) // len(self.noise), 1, 1, 1)
        return SimpleNamespace(sample=self.weight * noise)


@pytest.mark.parametrize("skip", [20, 80, 1000])
def test_a_student_is_consistent_if_it_says_of_every_point_where_the_path_of_the_teacher_ends(
    skip: int,
) -> None:
    configuration = read_configuration(str(TINY))
    text_encoder = make_model("text_encoder", configuration).requires_grad_(False)
    latents, noise = torch.randn(2, 8, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([0, 19, 20, 500, 519, 520, 980, 999])
    ids = torch.randint(4, 60, (8, 77))

    def losses(
        student: nn.Module, teacher: nn.Module, guidance_scale: float = 3.0
    ) -> dict[str, torch.Tensor]:
        nothing = torch.full((77,), 3)
        objective = Consistency(
            student, teacher, text_encoder, configuration.scheduler, guidance_scale, nothing, skip
        )
        found: dict[str, torch.Tensor] = objective(latents, noise, timesteps, ids)
        return found

    right, other = Known(noise), Known(noise + 0.1)
    assert losses(right, right)["error"] < 1e-5
    assert torch.equal(right.asked[1], (right.asked[2] - skip).clamp(min=0))
    wrong = losses(other, right)
    assert wrong["error"] > 1e-3
    wrong["loss"].backward()
    assert other.weight.grad is not None and other.weight.grad.abs() > 0
    assert right.weight.grad is None


def test_a_student_learns_what_guidance_makes_of_the_teacher(runs: Path) -> None:
    configuration = read_configuration(str(TINY))
    models = {
        name: start_models(configuration, configuration.stage("distilled"), runs)[name]
        for name in ("unet", "teacher", "text_encoder")
    }
    latents, noise = torch.randn(2, 4, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(4, 60, (4, 77))
    with torch.no_grad():
        errors = [
            Consistency(*models.values(), configuration.scheduler, scale, torch.full((77,), 3))(
                latents, noise, torch.full((4,), 600), ids
            )["error"].item()
            for scale in (1.0, 2.0)
        ]
    assert errors[0] != errors[1]


def test_a_killed_run_goes_on_to_the_same_weights(runs: Path, drawn_folder: Path, tmp_path: Path) -> None:
    mine = tmp_path / "tiny"
    shutil.copytree(runs / "autoencoder", mine / "autoencoder")
    for path in runs.glob("*-*"):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, mine / path.name)
    command = [sys.executable, DOORS / "train", "base", "--cpu", "--configuration", str(TINY)]
    command += ["--data", str(drawn_folder), "--runs", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    curve = mine / "base" / "loss.jsonl"
    while process.poll() is None and not (curve.exists() and curve.read_text().count("\n") >= 6):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    assert not (mine / "base" / "weights").exists()
    train(
        read_configuration(str(TINY)),
        read_configuration(str(TINY)).stage("base"),
        drawn_folder,
        mine,
        cpu=True,
    )
    steps = [json.loads(line)["step"] for line in curve.read_text().splitlines()]
    assert steps[-1] == 12 and len(steps) > 12, "it did not go on from a checkpoint"
    for model in ("unet", "text_encoder"):
        assert same(tensors(mine / "base" / "weights", model), tensors(runs / "base" / "weights", model))


def test_muon_moves_inner_matrices_as_far_in_all_directions(
    runs: Path, drawn_folder: Path, tmp_path: Path
) -> None:
    configuration = read_configuration(str(TINY))
    stage = replace(configuration.stage("base"), optimizer="muon")
    before = start_models(configuration, stage, runs)["unet"].state_dict()
    for name in ("adamw", "muon", "whole", "broken-off"):
        for path in (runs / "autoencoder", runs / "tokenizer-en"):
            shutil.copytree(path, tmp_path / name / path.name)
    inner, outer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_v.weight", "conv_in.weight"
    moved = {}
    for optimizer in ("adamw", "muon"):
        once = replace(stage, optimizer=optimizer, stop=1)
        after = tensors(train(configuration, once, drawn_folder, tmp_path / optimizer, cpu=True), "unet")
        moved[optimizer] = {name: (after[name] - before[name]).flatten(1) for name in (inner, outer)}
    spread = {name: torch.linalg.svdvals(moves[inner]) for name, moves in moved.items()}
    assert spread["muon"].max() < 2 * spread["muon"].median()
    assert spread["adamw"].max() > 3 * spread["adamw"].median()
    length = {name: float(moves[inner].pow(2).mean().sqrt()) for name, moves in moved.items()}
    assert length["muon"] == pytest.approx(0.2 * length["adamw"], rel=0.3)
    torch.testing.assert_close(moved["muon"][outer], moved["adamw"][outer], rtol=0.01, atol=1e-6)

    whole = train(configuration, stage, drawn_folder, tmp_path / "whole", cpu=True)
    curve = losses(tmp_path / "whole" / "base")
    assert curve[-1] < 0.9 * curve[0]
    broken_off = train(configuration, replace(stage, stop=8), drawn_folder, tmp_path / "broken-off", cpu=True)
    shutil.rmtree(broken_off)
    train(configuration, stage, drawn_folder, tmp_path / "broken-off", cpu=True)
    for model in ("unet", "text_encoder"):
        assert same(tensors(whole, model), tensors(broken_off, model))


@pytest.mark.slow
def test_two_processes_follow_the_curve_of_one(runs: Path, drawn_folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "long.toml"
    recipe.write_text(TINY.read_text().replace("steps = 12\n", "steps = 200\n", 1))
    curves = []
    for processes in (1, 2):
        mine = tmp_path / str(processes)
        shutil.copytree(runs / "autoencoder", mine / "long" / "autoencoder")
        command = [
            Path(sys.executable).with_name("torchrun"),
            "--standalone",
            "--nproc-per-node",
            str(processes),
        ]
        command += [DOORS / "train", "base", "--cpu", "--configuration", str(recipe)]
        command += ["--data", str(drawn_folder), "--runs", str(mine)]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        curves.append(losses(mine / "long" / "base"))
    assert len(curves[0]) == len(curves[1]) == 200
    for one, two in zip(*curves, strict=True):
        assert two == pytest.approx(one, rel=0.01)


def test_draws_leave_out_what_the_report_asks_for(drawn: Shards) -> None:
    def seen(only_styles_of_base: bool) -> set[tuple[str, str]]:
        draws = Draws(drawn, "ja", 0, only_styles_of_base, None, 0.1, None)
        return {(drawn.about[i]["concept"], drawn.about[i]["style"]) for i in draws.members}

    assert ("🍣", "oil_painting") not in seen(False)
    assert ("🍣", "ukiyoe") in seen(False)
    assert {style for _, style in seen(True)} <= BASE_STYLES
    assert takes_part({"url": "https://example.org/1.jpg"}, only_styles_of_base=True)


def test_samples_without_a_caption_in_the_language_are_left_out(tmp_path: Path) -> None:
    picture = np.zeros((8, 8, 3), np.uint8)
    samples = [Sample("0", picture, ("犬",), ("dog",)), Sample("1", picture, ("猫",), ())]
    write_shard(tmp_path / "table-0.tar", samples)
    shards = Shards(tmp_path)
    assert list(Draws(shards, "ja", 0, False, None, 0.1, None).members) == [0, 1]
    assert list(Draws(shards, "en", 0, False, None, 0.1, None).members) == [0]


def test_captions_are_dropped_as_often_as_asked(drawn: Shards) -> None:
    words: list[str] = []

    def encode(text: str) -> list[int]:
        words.append(text)
        return [0] * 77

    draws = Draws(drawn, "ja", 0, False, encode, 0.25, None)
    for position in range(400):
        draws[position]
    assert words.count("") == pytest.approx(100, abs=30)
    assert "犬" in words


def test_an_epoch_shows_every_sample_once_in_an_order_of_its_own(drawn: Shards) -> None:
    draws = Draws(drawn, "ja", 0, False, None, 0.1, None)
    count = len(draws.members)
    first, second = (
        [draws[p]["picture"].sum().item() for p in range(e * count, (e + 1) * count)] for e in (0, 1)
    )
    assert first != second and sorted(first) == pytest.approx(sorted(second))


def test_processes_share_a_step_between_them() -> None:
    alone = [position for batch in Steps(3, 5, 8, 4, 0, 1) for position in batch]
    shared = [list(Steps(3, 5, 8, 4, rank, 2)) for rank in (0, 1)]
    assert alone == list(range(24, 40))
    assert [shared[0][0], shared[1][0]] == [[24, 25, 26, 27], [28, 29, 30, 31]]
    with pytest.raises(ValueError, match="multiple"):
        Steps(0, 1, 8, 4, 0, 3)


def test_noise_belongs_to_the_position() -> None:
    whole = noise_for(1, range(10, 14), (2, 3), 1000)
    part = noise_for(1, range(12, 14), (2, 3), 1000)
    assert all(torch.equal(a[2:], b) for a, b in zip(whole, part, strict=True))
    assert not torch.equal(whole[0], whole[1])


def test_timesteps_may_be_moved_to_more_noise(runs: Path, drawn_folder: Path, tmp_path: Path) -> None:
    steps = torch.tensor([0, 100, 500, 900, 999])
    assert torch.equal(shift_timesteps(steps, 1.0, 1000), steps)
    assert shift_timesteps(steps, 3.0, 1000).tolist() == [0, 250, 750, 964, 999]
    configuration = read_configuration(str(TINY))
    stage = replace(configuration.stage("base"), timestep_shift=3.0, steps=1)
    for name in ("autoencoder", "pictured", "tokenizer-en"):
        shutil.copytree(runs / name, tmp_path / name)
    train(configuration, stage, drawn_folder, tmp_path, cpu=True)
    # A new denoiser tells nothing, and what it misses of much noise weighs more.
    assert losses(tmp_path / "base")[0] > 1.2 * losses(runs / "base")[0]


def test_timesteps_weigh_as_if_the_velocity_were_predicted_up_to_the_limit() -> None:
    configuration = read_configuration(str(TINY))
    parts = make_model("unet", configuration), make_model("text_encoder", configuration)
    signal = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    weights = Denoising(*parts, configuration.scheduler, 20.0).timestep_weights.numpy()
    np.testing.assert_allclose(weights[[0, 300, 600]], 1 / signal[[0, 300, 600]], rtol=1e-4)
    assert weights[-1] == 20 < 1 / signal[-1]
    assert (Denoising(*parts, configuration.scheduler, 0.0).timestep_weights == 1).all()


def test_a_picture_of_little_contrast_may_count_as_much_as_others() -> None:
    configuration = read_configuration(str(TINY))
    torch.manual_seed(0)
    parts = make_model("unet", configuration), make_model("text_encoder", configuration)
    guess = Guess(hidden_size=16, latent_channels=4, hands=1)
    # Its errors are then the pictures themselves.
    for parameter in guess.parameters():
        torch.nn.init.zeros_(parameter)
    latents = torch.randn(3, 4, 8, 8) * torch.tensor([1.0, 0.3, 0.01])[:, None, None, None] + 5
    noise, timesteps = torch.randn(3, 4, 8, 8), torch.tensor([300, 600, 900])
    ids, drawn = torch.randint(4, 60, (3, 77)), torch.ones(3, 1, dtype=torch.bool)
    contrast = latents.numpy().var(axis=(2, 3), ddof=1).mean(axis=1)
    assert contrast[0] > contrast[1] > 0.05 > contrast[2]
    weights = 1 / np.maximum(contrast, 0.05)

    plain = Denoising(*parts, configuration.scheduler, 20.0)
    errors = [
        plain(latents[i : i + 1], noise[i : i + 1], timesteps[i : i + 1], ids[i : i + 1])["loss"].item()
        for i in range(3)
    ]
    squares = latents.pow(2).mean(dim=(1, 2, 3)).numpy()
    weighed = Denoising(*parts, configuration.scheduler, 20.0, guess, contrast_floor=0.05)
    found = weighed(latents, noise, timesteps, ids, latents[:, None], drawn)
    assert found["guess"].item() == pytest.approx(np.mean(weights * squares), rel=1e-4)
    expected = np.mean(weights * errors) + np.mean(weights * squares)
    assert found["loss"].item() == pytest.approx(expected, rel=1e-4)


def test_a_stage_may_heed_contrast(runs: Path, drawn_folder: Path, tmp_path: Path) -> None:
    configuration = read_configuration(str(TINY))
    stage = replace(configuration.stage("base"), contrast_floor=1000.0, steps=1)
    for name in ("autoencoder", "tokenizer-en"):
        shutil.copytree(runs / name, tmp_path / name)
    train(configuration, stage, drawn_folder, tmp_path, cpu=True)
    assert losses(tmp_path / "base")[0] == pytest.approx(losses(runs / "base")[0] / 1000, rel=1e-4)


def test_a_stage_may_go_on_with_a_deeper_denoiser(runs: Path, drawn_folder: Path, tmp_path: Path) -> None:
    configuration = read_configuration(str(TINY))
    stage = replace(configuration.stage("stage2"), deepen=(2, 0))
    for name in ("autoencoder", "base", "stage1", "tokenizer-ja"):
        shutil.copytree(runs / name, tmp_path / name)
    weights = train(configuration, stage, drawn_folder, tmp_path, cpu=True)
    assert losses(tmp_path / "stage2")[0] == pytest.approx(losses(runs / "stage2")[0], rel=1e-5)
    deeper = load_weights(weights, CPU, torch.float32).unet
    assert deeper.config["layers_per_block"] == [3, 1]
    assert (deeper.down_blocks[0].resnets[2].conv2.weight != 0).any()
    for added, told in (((1,), r"deepen is \[1\].* 2 blocks"), ((1, -1), r"deepen is \[1, -1\]")):
        with pytest.raises(ConfigurationError, match=told):
            start_models(configuration, replace(stage, deepen=added), tmp_path)
    with pytest.raises(ConfigurationError, match="deepen is for a stage with a unet"):
        start_models(configuration, replace(configuration.stage("autoencoder"), deepen=(1, 1)), tmp_path)


def test_a_decoder_may_learn_on_alone(runs: Path, drawn_folder: Path, tmp_path: Path) -> None:
    configuration = read_configuration(str(TINY))
    shutil.copytree(runs / "autoencoder", tmp_path / "autoencoder")
    stage = replace(
        configuration.stage("autoencoder"),
        name="sharpened",
        start={"vae": "autoencoder"},
        train=("vae.decoder",),
    )
    before, after = (
        AutoencoderKL.from_pretrained(folder / "vae")
        for folder in (
            runs / "autoencoder" / "weights",
            train(configuration, stage, drawn_folder, tmp_path, cpu=True),
        )
    )
    assert before.config["scaling_factor"] == after.config["scaling_factor"]
    for name, tensor in before.state_dict().items():
        same = torch.equal(tensor, after.state_dict()[name])
        assert same != name.startswith("decoder."), name
    with pytest.raises(ConfigurationError, match=r"train names vae\.encodes, which isn't there"):
        wrong = replace(stage, name="wrong", train=("vae.encodes",))
        train(configuration, wrong, drawn_folder, tmp_path, cpu=True)


def test_the_learning_rate_warms_up_and_decays() -> None:
    stage = replace(
        read_configuration(str(TINY)).stage("base"), steps=100, warmup_steps=10, learning_rate=1.0
    )
    rates = [learning_rate(stage, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) < 1 and rates[-1] == pytest.approx(0.01)


def test_a_stage_may_stop_before_its_learning_rate_has_decayed(drawn_folder: Path, tmp_path: Path) -> None:
    configuration = read_configuration(str(TINY))
    whole = configuration.stage("autoencoder")
    weights = train(configuration, replace(whole, stop=2), drawn_folder, tmp_path, cpu=True)
    lines = (tmp_path / "autoencoder" / "loss.jsonl").read_text().splitlines()
    assert [json.loads(line)["learning_rate"] for line in lines] == [learning_rate(whole, s) for s in (0, 1)]
    assert (weights / "vae" / "config.json").exists()


@pytest.mark.parametrize("name", ["demo", "full"])
def test_configurations_are_whole(name: str) -> None:
    configuration = read_configuration(name)
    assert {"stage1", "stage2"} <= {stage.name for stage in configuration.stages}
    for stage in configuration.stages:
        assert stage.batch_size % stage.micro_batch_size == 0
        assert {part.split(".")[0] for part in stage.train} <= set(stage.start)
        assert all(o in configuration.models for o, origin in stage.start.items() if not origin)


def test_needed_stages_come_in_order() -> None:
    configuration = read_configuration("demo")
    base = ["autoencoder", "whole", "words", "pictured", "drafted", "base"]
    second = ["together", "contrasted", "deepened", "stage2"]
    assert needed_stages(configuration, "stage2") == [
        *base[:2],
        "sharpened",
        *base[2:],
        "aligned_ja",
        "stage1",
        *second,
    ]


def test_errors_are_told_in_a_line(drawn_folder: Path, tmp_path: Path) -> None:
    configuration = read_configuration(str(TINY))
    with pytest.raises(ConfigurationError, match="stage3: tiny has autoencoder, words, base, stage1, stage2"):
        configuration.stage("stage3")
    with pytest.raises(ConfigurationError, match="there are demo, full"):
        read_configuration("nothing")
    stage = '[[stages]]\nname = "x"\nobjective = "{}"\ntrain = []\nstart = {{}}\nfew_steps = {}\n'
    for objective, few_steps in (("denoising", 4), ("consistency", 0)):
        wrong = tmp_path / "wrong.toml"
        wrong.write_text(TINY.read_text() + stage.format(objective, few_steps))
        with pytest.raises(ConfigurationError, match="few_steps is for the objective consistency"):
            read_configuration(str(wrong))
    wrong.write_text(TINY.read_text() + 'optimizer = "sgd"\n')
    with pytest.raises(
        ConfigurationError, match="distilled: optimizer is sgd, but has to be one of adamw, muon"
    ):
        read_configuration(str(wrong))
    wrong.write_text(TINY.read_text() + "style_frequency = { ukiyoe = 2.0 }\n")
    with pytest.raises(ConfigurationError, match="style_frequency needs styles_evenly"):
        read_configuration(str(wrong))
    with pytest.raises(ConfigurationError, match="starts from autoencoder"):
        train(configuration, configuration.stage("base"), drawn_folder, tmp_path, cpu=True)
    uneven: Stage = replace(configuration.stage("autoencoder"), batch_size=9)
    with pytest.raises(ConfigurationError, match="batch_size 9"):
        train(configuration, uneven, drawn_folder, tmp_path, cpu=True)
    direct = configuration.stage("direct")
    with pytest.raises(ConfigurationError, match=r"direct: .* cache_latents = true"):
        train(configuration, replace(direct, cache_latents=False), drawn_folder, tmp_path, cpu=True)
    mistyped = tmp_path / "mistyped.toml"
    mistyped.write_text(TINY.read_text().replace("crop = 32", "corp = 32"))
    with pytest.raises(ConfigurationError, match="autoencoder has no entry corp"):
        read_configuration(str(mistyped))
