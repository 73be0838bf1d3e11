"""How many steps a scheduler needs: how far it is from its limit, and what a judge sees in its pictures."""

import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from japanese_stable_diffusion.request import SCHEDULERS
from japanese_stable_diffusion.training.claims import read_claims
from japanese_stable_diffusion.training.evaluation import Ask, Settings, generate, score
from japanese_stable_diffusion.training.judge import Judge
from japanese_stable_diffusion.training.styles import Pixels
from japanese_stable_diffusion.weights import Weights

LIMIT = 200
"""Steps after which a scheduler's picture is taken for its limit."""
RANDOM = frozenset({"K_EULER_ANCESTRAL"})
"""Schedulers that add noise on the way: their pictures have no limit to be near to."""


@dataclass(frozen=True)
class Point:
    """One scheduler at one number of steps.

    Attributes:
        evaluations: guided evaluations of the UNet for one picture.
        distance: root mean square difference to the same scheduler's pictures at ``LIMIT`` steps, in units of
            0 to 255, the mean over pictures; None for schedulers of ``RANDOM``.
        concept: share of pictures that the judge takes for what was asked for; None without a judge.
        style: share whose style the judge finds as asked for, of those that name one; None likewise.
    """

    scheduler: str
    steps: int
    evaluations: int
    distance: float | None
    concept: float | None
    style: float | None


def evaluations(scheduler: str, steps: int) -> int:
    """Guided UNet evaluations for one picture: PNDM repeats its second timestep (`make_scheduler`)."""
    return steps + 1 if scheduler == "PNDM" and steps > 1 else steps


def prompts(count: int) -> list[Ask]:
    """``count`` prompts of ``claims.toml``, spread over all of it, with what counts as right."""
    asks = [
        Ask(claim.prompt, "", zlib.crc32(claim.prompt.encode()), claim.concepts, claim.style)
        for claims in read_claims()
        for claim in claims.prompts
    ]
    chosen = np.linspace(0, len(asks) - 1, min(count, len(asks))).round().astype(int)
    return [asks[index] for index in chosen]


def measure(
    weights: Weights,
    judge: Judge | None,
    asks: Sequence[Ask],
    steps: Sequence[int],
    guidance_scale: float,
    schedulers: Sequence[str] = SCHEDULERS,
) -> list[Point]:
    """Every scheduler at every number of steps, from the same noise."""
    points = []
    for scheduler in schedulers:

        def draw(count: int, scheduler: str = scheduler) -> Pixels:
            settings = Settings(count, guidance_scale, scheduler=scheduler)
            return generate(weights, asks, settings, f"{scheduler}, {count} steps")

        limit = None if scheduler in RANDOM else draw(LIMIT)
        for count in steps:
            pictures = draw(count)
            verdict = score(asks, judge.look(pictures)) if judge else None
            points.append(
                Point(
                    scheduler,
                    count,
                    evaluations(scheduler, count),
                    None if limit is None else distance(pictures, limit),
                    verdict.concept_top1 if verdict else None,
                    verdict.style if verdict else None,
                )
            )
    return points


def distance(pictures: Pixels, others: Pixels) -> float:
    """Root mean square difference of each picture (height, width, 3) to its other, the mean over pictures."""
    squares = (pictures.astype(np.float32) - others.astype(np.float32)) ** 2
    return float(np.sqrt(squares.mean(axis=(1, 2, 3))).mean())


def describe(points: Sequence[Point]) -> str:
    """A table with a line for each point."""
    lines = [f"{'scheduler':<20}{'steps':>6}{'evaluations':>13}{'distance':>10}{'concept':>9}{'style':>8}"]
    for point in points:
        far = "-" if point.distance is None else f"{point.distance:.2f}"
        concept, style = ("-" if share is None else f"{share:.1%}" for share in (point.concept, point.style))
        lines.append(
            f"{point.scheduler:<20}{point.steps:>6}{point.evaluations:>13}{far:>10}{concept:>9}{style:>8}"
        )
    return "\n".join(lines)


def write(points: Sequence[Point], file: Path) -> None:
    """Store the points as JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps([asdict(point) for point in points], indent=1) + "\n", encoding="utf-8")
