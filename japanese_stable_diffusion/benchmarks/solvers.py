"""How many steps a scheduler needs: how far it is from its limit, and what a judge sees in its pictures."""

import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np

from japanese_stable_diffusion.benchmarks.generation import UPSTREAM_STEPS
from japanese_stable_diffusion.pipeline import suited
from japanese_stable_diffusion.request import SCHEDULERS, Request
from japanese_stable_diffusion.schedulers import make_scheduler
from japanese_stable_diffusion.shortcuts import GO_FAST, Savings
from japanese_stable_diffusion.training.claims import read_claims
from japanese_stable_diffusion.training.evaluation import Ask, Settings, generate, score
from japanese_stable_diffusion.training.judge import Judge
from japanese_stable_diffusion.training.styles import Pixels
from japanese_stable_diffusion.weights import Weights

LIMIT = 200
"""Steps after which a scheduler's picture is taken for its limit."""
RANDOM = frozenset({"K_EULER_ANCESTRAL", "LCM"})
"""Schedulers that add noise on the way: their pictures have no limit to be near to."""

SAVINGS = tuple(
    Savings((low, high), every)
    for every in (1, 2, 3, 4)
    for low in (0.0, 0.5, 1.0)
    for high in (math.inf, 10.0, 5.0)
)[1:]
"""What may be left out: guidance where there is less or more noise, inner layers at every so many steps."""


@dataclass(frozen=True)
class Point:
    """One scheduler at one number of steps.

    Attributes:
        savings: what is left out; None for nothing.
        evaluations: of the whole UNet for one picture, of which those without guidance cost half.
        distance: root mean square difference to the same scheduler's pictures at ``LIMIT`` steps, in units of
            0 to 255, the mean over pictures; None for schedulers of ``RANDOM``.
        concept: share of pictures that the judge takes for what was asked for; None without a judge.
        style: share whose style the judge finds as asked for, of those that name one; None likewise.
    """

    scheduler: str
    steps: int
    evaluations: float
    distance: float | None
    concept: float | None
    style: float | None
    savings: Savings | None = None


def count_evaluations(
    weights: Weights,
    scheduler: str,
    steps: int,
    savings: Savings | None = None,
    guidance_scale: float = Request.guidance_scale,
) -> float:
    """Evaluations of the whole UNet for one picture: 1 with guidance, half of it without.

    PNDM repeats its second timestep (`make_scheduler`).
    """
    schedule = make_scheduler(scheduler, weights.scheduler_config)
    schedule.set_timesteps(steps)
    count = known = 0.0
    reused = 0
    for timestep in schedule.timesteps:
        guides = guidance_scale > 1 and (savings is None or savings.guides(schedule, timestep))
        share = 1.0 if guides else 0.5
        # Where guidance sets in, inner layers were computed for half of what they are needed for.
        if savings and savings.reuses(known, share, reused):
            reused += 1
        else:
            count, known, reused = count + share, share, 0
    return count


def prompts(count: int, seeds: int = 1) -> list[Ask]:
    """``count`` prompts of ``claims.toml``, spread over all of it, with what counts as right.

    Each is there ``seeds`` times, with a seed of its own.
    """
    all_claims = [claim for claims in read_claims() for claim in claims.prompts]
    chosen = np.linspace(0, len(all_claims) - 1, min(count, len(all_claims))).round().astype(int)
    return [
        Ask(
            claim.prompt,
            "",
            zlib.crc32(f"{claim.prompt}{number or ''}".encode()),
            claim.concepts,
            claim.style,
        )
        for claim in (all_claims[index] for index in chosen)
        for number in range(seeds)
    ]


def measure(
    weights: Weights,
    judge: Judge | None,
    asks: Sequence[Ask],
    steps: Sequence[int],
    guidance_scale: float,
    schedulers: Sequence[str] = SCHEDULERS,
    savings: Sequence[Savings | None] = (None,),
) -> list[Point]:
    """Every scheduler at every number of steps, with everything that may be left out, from the same noise.

    Guidance is what these weights compute with when a request asks for ``guidance_scale``.
    """
    points = []
    guidance_scale = _suited_guidance(weights, guidance_scale)
    for scheduler in schedulers:
        settings = Settings(LIMIT, guidance_scale, scheduler=scheduler)
        limit = None if scheduler in RANDOM else _draw(weights, asks, settings)
        for count, left_out in product(steps, savings):
            settings = replace(settings, steps=count, savings=left_out)
            points.append(_point(weights, judge, asks, settings, limit))
    return points


def compare(weights: Weights, judge: Judge, asks: Sequence[Ask], distilled: Weights | None) -> list[Point]:
    """Upstream's way, the defaults, `go_fast` and, if there are any, distilled weights; the same noise."""
    upstream, default = (
        Settings(steps, _suited_guidance(weights, Request.guidance_scale), scheduler=scheduler)
        for steps, scheduler in (
            (UPSTREAM_STEPS, "PNDM"),
            (Request.num_inference_steps, Request.scheduler),
        )
    )
    ways = [(weights, upstream), (weights, default), (weights, replace(default, savings=GO_FAST))]
    if distilled:
        ways.append((distilled, Settings(distilled.manifest.few_steps, 1.0, scheduler="LCM")))
    return [_point(drawing, judge, asks, settings) for drawing, settings in ways]


def _suited_guidance(weights: Weights, guidance_scale: float) -> float:
    return suited(Request(guidance_scale=guidance_scale), weights.manifest).guidance_scale


def _draw(weights: Weights, asks: Sequence[Ask], settings: Settings) -> Pixels:
    return generate(weights, asks, settings, f"{settings.scheduler}, {settings.steps} steps")


def _point(
    weights: Weights,
    judge: Judge | None,
    asks: Sequence[Ask],
    settings: Settings,
    limit: Pixels | None = None,
) -> Point:
    pictures = _draw(weights, asks, settings)
    verdict = score(asks, judge.look(pictures)) if judge else None
    return Point(
        settings.scheduler,
        settings.steps,
        count_evaluations(
            weights, settings.scheduler, settings.steps, settings.savings, settings.guidance_scale
        ),
        None if limit is None else distance(pictures, limit),
        verdict.concept_top1 if verdict else None,
        verdict.style if verdict else None,
        settings.savings,
    )


def distance(pictures: Pixels, others: Pixels) -> float:
    """Root mean square difference of each picture (height, width, 3) to its other, the mean over pictures."""
    squares = (pictures.astype(np.float32) - others.astype(np.float32)) ** 2
    return float(np.sqrt(squares.mean(axis=(1, 2, 3))).mean())


def describe(points: Sequence[Point]) -> str:
    """A table with a line for each point."""
    lines = [
        f"{'scheduler':<20}{'steps':>6}{'guided σ':>16}{'inner every':>13}{'evaluations':>13}{'distance':>10}"
        f"{'concept':>9}{'style':>8}"
    ]
    for point in points:
        far = "-" if point.distance is None else f"{point.distance:.2f}"
        concept, style = ("-" if share is None else f"{share:.1%}" for share in (point.concept, point.style))
        low, high = point.savings.guided if point.savings else (0.0, math.inf)
        every = point.savings.inner_every if point.savings else 1
        lines.append(
            f"{point.scheduler:<20}{point.steps:>6}{f'{low:g} to {high:g}':>16}{every:>13}"
            f"{point.evaluations:>13g}{far:>10}{concept:>9}{style:>8}"
        )
    return "\n".join(lines)


def write(points: Sequence[Point], file: Path) -> None:
    """Store the points as JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps([asdict(point) for point in points], indent=1) + "\n", encoding="utf-8")
