import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from japanese_stable_diffusion.benchmarks import solvers
from japanese_stable_diffusion.request import SCHEDULERS, Request
from japanese_stable_diffusion.shortcuts import GO_FAST, Savings
from japanese_stable_diffusion.training.judge import Judge
from japanese_stable_diffusion.weights import Weights, load_weights


@pytest.fixture(scope="module")
def weights(tiny_weights: Path) -> Weights:
    return load_weights(tiny_weights, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_evaluations_are_those_that_the_unet_sees(weights: Weights, scheduler: str) -> None:
    asks = solvers.prompts(2)
    calls: list[int] = []
    hook = weights.unet.register_forward_hook(lambda module, inputs, output: calls.append(1))
    try:
        solvers.generate(weights, asks, solvers.Settings(4, scheduler=scheduler))
    finally:
        hook.remove()
    assert solvers.count_evaluations(weights, scheduler, 4) == len(calls)


def test_a_scheduler_comes_nearer_to_its_limit_with_more_steps(weights: Weights) -> None:
    points = solvers.measure(weights, None, solvers.prompts(3), [3, 40, solvers.LIMIT], 4.0, ["DDIM"])
    far, near, there = (point.distance for point in points)
    assert far is not None and near is not None
    assert far > near > 0 == there


def test_a_scheduler_that_adds_noise_has_no_limit(weights: Weights) -> None:
    (point,) = solvers.measure(weights, None, solvers.prompts(2), [3], 4.0, ["K_EULER_ANCESTRAL"])
    assert point.distance is None
    assert point.concept is None and point.style is None


def test_distance_is_the_root_mean_square_of_each_picture() -> None:
    black = np.zeros((2, 4, 4, 3), np.uint8)
    other = black.copy()
    other[1] = 30
    assert solvers.distance(black, other) == pytest.approx(15)


def test_prompts_are_spread_over_all_claims() -> None:
    few, many = solvers.prompts(4), solvers.prompts(10_000)
    assert len(few) == 4 and few[0] == many[0] and few[-1] == many[-1]
    assert len({ask.seed for ask in many}) == len({ask.prompt for ask in many})


def test_seeds_of_a_prompt_are_different_and_the_first_stays() -> None:
    one, three = solvers.prompts(4), solvers.prompts(4, seeds=3)
    assert three[::3] == one
    assert len({ask.seed for ask in three}) == len(three) == 12


def test_ways_are_judged_on_the_same_noise(weights: Weights, judge_folder: Path) -> None:
    distilled = replace(weights, manifest=replace(weights.manifest, few_steps=4))
    points = solvers.compare(weights, Judge(judge_folder), solvers.prompts(3, 2), distilled)
    upstream, default, go_fast, few = points
    assert (upstream.scheduler, upstream.steps, upstream.evaluations) == ("PNDM", 50, 51)
    assert default.evaluations == default.steps == Request().num_inference_steps
    assert go_fast.savings == GO_FAST and go_fast.evaluations < default.evaluations
    assert (few.scheduler, few.steps, few.evaluations) == ("LCM", 4, 2)
    assert all(point.concept is not None and point.style is not None for point in points)


def test_go_fast_is_counted_as_the_unet_sees_it(weights: Weights) -> None:
    seen: list[float] = []
    hook = weights.unet.mid_block.register_forward_hook(
        lambda module, inputs, output: seen.append(len(inputs[0]) / 2)
    )
    try:
        settings = solvers.Settings(20, 7.5, scheduler="DPMSolverMultistep", savings=GO_FAST)
        solvers.generate(weights, solvers.prompts(1), settings)
    finally:
        hook.remove()
    assert solvers.count_evaluations(weights, "DPMSolverMultistep", 20, GO_FAST) == sum(seen)
    assert {0.5, 1} == set(seen)


def test_what_is_left_out_is_counted(weights: Weights) -> None:
    count = solvers.count_evaluations
    everything = Savings((0, math.inf), 1)
    assert count(weights, "DPMSolverMultistep", 20, everything) == 20
    assert count(weights, "DPMSolverMultistep", 20, Savings((0, math.inf), 4)) == 5
    assert count(weights, "DPMSolverMultistep", 20, Savings((100, math.inf), 1)) == 10
    assert 10 < count(weights, "DPMSolverMultistep", 20, Savings((0.5, 5), 1)) < 20


def test_what_is_left_out_takes_pictures_away_from_the_limit(weights: Weights) -> None:
    given = [None, Savings((0, math.inf), 1), Savings((0, math.inf), 5), Savings((100, math.inf), 1)]
    nothing, also_nothing, inner, guidance = solvers.measure(
        weights, None, solvers.prompts(2), [20], 4.0, ["DPMSolverMultistep"], given
    )
    assert nothing.distance is not None and also_nothing.distance == nothing.distance
    assert inner.distance is not None and inner.distance > nothing.distance
    assert guidance.distance is not None and guidance.distance > nothing.distance


def test_guidance_is_what_the_weights_make_of_it(weights: Weights) -> None:
    def far(weights: Weights, guidance_scale: float) -> float | None:
        points = solvers.measure(weights, None, solvers.prompts(2), [3], guidance_scale, ["DDIM"])
        return points[0].distance

    gentle = replace(weights, manifest=replace(weights.manifest, guidance_scale=2.0))
    assert far(gentle, 7.5) == far(weights, 2.0) != far(weights, 7.5)


def test_points_are_told_and_stored(tmp_path: Path) -> None:
    points = [
        solvers.Point("DDIM", 20, 20, 3.25, 0.9, 1.0),
        solvers.Point("K_EULER_ANCESTRAL", 20, 7.5, None, None, None, Savings((0.3, 5), 2)),
    ]
    table = solvers.describe(points).splitlines()
    assert table[1].split() == ["DDIM", "20", "0", "to", "inf", "1", "20", "3.25", "90.0%", "100.0%"]
    assert table[2].split() == ["K_EULER_ANCESTRAL", "20", "0.3", "to", "5", "2", "7.5", "-", "-", "-"]
    solvers.write(points, tmp_path / "new" / "points.json")
    assert json.loads((tmp_path / "new" / "points.json").read_text())[0]["distance"] == 3.25
