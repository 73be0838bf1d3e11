"""The report: English base, stage 1 and stage 2 on the same seeds, looked at by the judge.

Every row of its table is a list of prompts for one model, with what counts as right. Pictures are kept, so a
report that was broken off goes on at the row that it was in, and what has been drawn is not drawn again.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from tqdm import tqdm

from japanese_stable_diffusion.pipeline import Figures, denoise, draw, encode
from japanese_stable_diffusion.schedulers import make_scheduler
from japanese_stable_diffusion.shortcuts import Savings
from japanese_stable_diffusion.speed import speed_up
from japanese_stable_diffusion.weights import Weights, hash_files, load_weights

from . import emoji
from .batches import takes_part, to_tensor
from .claims import read_claims
from .compositions import left_out
from .copies import NEAR_PERCENTILE, Copies
from .judge import Judge, Verdicts, is_held_out, small_pictures
from .shards import Shards
from .sheets import Tile, write_sheets
from .styles import STYLES, Pixels

MODELS = ("base", "stage1", "stage2")
BATCH_SIZE = 32
PROMPTS_PER_STYLE = 50
SEEDS_PER_CLAIM = 3
SEEDS_PER_COMPOSITION = 4
CONCEPTS_OF_MANY_SEEDS = 48
SEEDS_PER_CONCEPT = 4
REAL_PICTURES = 600
NEAR_CHANCE = 0.1
"""A style accuracy is near chance if it is at most this much above it."""
OWN_GROUP = "drawings of our own"


class EvaluationError(Exception):
    """The report can't be made; the message says why and what to do."""


@dataclass(frozen=True)
class Ask:
    """One picture that is asked for: any of ``concepts`` is right, in ``style`` unless that is None.

    ``english`` says the same as ``prompt`` for readers without Japanese letters.
    """

    prompt: str
    english: str
    seed: int
    concepts: tuple[str, ...]
    style: str | None


@dataclass(frozen=True)
class Row:
    """One row of the table: what one model is asked for."""

    model: str
    name: str
    asks: tuple[Ask, ...]


@dataclass(frozen=True)
class Score:
    """How often the judge agrees, as shares from 0 to 1; ``style`` counts the asks that name one.

    ``right`` is the share whose likeliest concept and style are both what was asked for.
    """

    pictures: int
    concept_top1: float
    concept_top5: float
    style: float | None
    right: float


@dataclass(frozen=True)
class Target:
    """What the report must show, what it shows, and whether that will do."""

    what: str
    needed: str
    reached: str
    met: bool


@dataclass(frozen=True)
class Settings:
    """How the pictures of a report are made. ``limit`` cuts rows to so many pictures, for a quick look."""

    steps: int = 20
    guidance_scale: float = 4.0
    limit: int | None = None
    scheduler: str = "DPMSolverMultistep"
    savings: Savings | None = None


def plan(shards: Shards) -> list[Row]:
    """All rows. Seeds belong to what is asked for, so that every model draws it from the same noise."""
    japanese, english = _first_captions(shards, "ja"), _first_captions(shards, "en")
    concepts = sorted({concept for concept, _ in japanese})

    def ask(captions: dict[tuple[str, str], str], concept: str, style: str, number: int = 0) -> Ask:
        pair = concept, style
        seed = zlib.crc32(f"{concept} {style} {number}".encode())
        return Ask(captions[pair], english[pair], seed, (concept,), style)

    def of_styles(captions: dict[tuple[str, str], str], in_base: bool) -> tuple[Ask, ...]:
        asks: list[Ask] = []
        for style in STYLES:
            if style.name == "illustration" or style.in_base != in_base:
                continue
            drawn = [c for c in concepts if (c, style.name) in captions and not left_out(c, style.name)]
            drawn.sort(key=lambda concept: zlib.crc32(f"{concept} in {style.name}".encode()))
            asks.extend(ask(captions, concept, style.name) for concept in drawn[:PROMPTS_PER_STYLE])
        return tuple(asks)

    rows = []
    for model in MODELS:
        captions = english if model == "base" else japanese
        rows += [
            Row(model, "things", tuple(ask(captions, concept, "illustration") for concept in concepts)),
            Row(model, "styles of the base", of_styles(captions, True)),
            Row(model, "styles new to the base", of_styles(captions, False)),
        ]
        # The base reads English only.
        for claims in read_claims() if model != "base" else []:
            asks = [
                Ask(
                    claim.prompt,
                    english.get((claim.concepts[0], claim.style or "illustration"), claims.name),
                    zlib.crc32(f"{claim.prompt} {number}".encode()),
                    claim.concepts,
                    claim.style,
                )
                for claim in claims.prompts
                for number in range(SEEDS_PER_CLAIM)
            ]
            rows.append(Row(model, f"claim: {claims.name}", tuple(asks)))
    compositions = [pair for pair in sorted(japanese) if left_out(*pair)]
    many = sorted(concepts, key=lambda concept: zlib.crc32(f"{concept} many".encode()))[
        :CONCEPTS_OF_MANY_SEEDS
    ]
    rows += [
        Row(
            "stage2",
            "compositions left out",
            tuple(ask(japanese, *pair, n) for pair in compositions for n in range(SEEDS_PER_COMPOSITION)),
        ),
        Row(
            "stage2",
            "many seeds",
            tuple(ask(japanese, c, "illustration", n) for c in many for n in range(SEEDS_PER_CONCEPT)),
        ),
    ]
    return [row for row in rows if row.asks]


def _first_captions(shards: Shards, language: str) -> dict[tuple[str, str], str]:
    """For each (concept, style) the caption with the concept's primary name."""
    captions: dict[tuple[str, str], str] = {}
    for about in shards.about:
        captions.setdefault((about["concept"], about["style"]), about[language][0])
    return captions


def shorten(row: Row, limit: int | None) -> Row:
    """At most ``limit`` asks of a row, spread over all of it; seeds of one prompt stay together."""
    if limit is None or len(row.asks) <= limit:
        return row
    prompts = [list(asks) for _, asks in groupby(row.asks, key=lambda ask: ask.prompt)]
    count = max(1, limit // len(prompts[0]))
    chosen = np.linspace(0, len(prompts) - 1, count).round().astype(int)
    asks = [ask for index in chosen for ask in prompts[index]]
    return Row(row.model, row.name, tuple(asks[:limit]))


@torch.inference_mode()
def generate(weights: Weights, asks: Sequence[Ask], settings: Settings, description: str = "") -> Pixels:
    """Draw what is asked for at the size that the UNet was trained on: (asks, side, side, 3), uint8 RGB.

    Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598), with different prompts in a batch.
    """
    unet, channels, side = (
        weights.unet,
        weights.unet.config["in_channels"],
        weights.unet.config["sample_size"],
    )
    unprompted = encode(weights.tokenizer("").ids, weights.text_encoder)
    pictures = []
    with tqdm(total=len(asks), desc=description, unit="picture") as bar:
        for first in range(0, len(asks), BATCH_SIZE):
            batch = asks[first : first + BATCH_SIZE]
            prompted = torch.cat(
                [encode(weights.tokenizer(ask.prompt).ids, weights.text_encoder) for ask in batch]
            )
            scheduler = make_scheduler(settings.scheduler, weights.scheduler_config)
            scheduler.set_timesteps(settings.steps, device=weights.device)
            generators = [torch.Generator().manual_seed(ask.seed) for ask in batch]
            noise = draw(generators, (channels, side, side)).to(weights.device)
            *_, (latents, _) = denoise(
                unet,
                scheduler,
                generators,
                noise * scheduler.init_noise_sigma,
                prompted,
                unprompted if settings.guidance_scale > 1 else None,
                settings.guidance_scale,
                Figures(),
                savings=settings.savings,
            )
            pictures.append(_decode(weights.vae, latents / weights.vae.config["scaling_factor"]))
            bar.update(len(batch))
    return np.concatenate(pictures)


def _decode(vae: AutoencoderKL, latents: Tensor) -> Pixels:
    pixels = (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1) * 255
    return np.asarray(pixels.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())


@torch.inference_mode()
def through_autoencoder(vae: AutoencoderKL, pictures: Sequence[Pixels]) -> Pixels:
    """What is left of real pictures after encoding and decoding: as many, of their size."""
    restored = []
    for first in range(0, len(pictures), BATCH_SIZE):
        batch = torch.stack([to_tensor(picture) for picture in pictures[first : first + BATCH_SIZE]])
        restored.append(_decode(vae, vae.encode(batch.to(vae.device)).latent_dist.mean))
    return np.concatenate(restored)


def score(asks: Sequence[Ask], verdicts: Verdicts) -> Score:
    """Compare what was asked for with what the judge saw, in the same order."""
    top1 = [seen[0] in ask.concepts for ask, seen in zip(asks, verdicts.concepts, strict=True)]
    top5 = [bool(set(seen) & set(ask.concepts)) for ask, seen in zip(asks, verdicts.concepts, strict=True)]
    style = [ask.style in (None, seen) for ask, seen in zip(asks, verdicts.styles, strict=True)]
    named = [right for ask, right in zip(asks, style, strict=True) if ask.style]
    return Score(
        pictures=len(asks),
        concept_top1=float(np.mean(top1)),
        concept_top5=float(np.mean(top5)),
        style=float(np.mean(named)) if named else None,
        right=float(np.mean(np.array(top1) & np.array(style))),
    )


def same_tensors(first: nn.Module, second: nn.Module) -> bool:
    """Whether two models have the same tensors under the same names, bit for bit."""
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(
        tensor.dtype == theirs[name].dtype
        and tensor.shape == theirs[name].shape
        and torch.equal(_bits(tensor), _bits(theirs[name]))
        for name, tensor in ours.items()
    )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def read_groups(art: Path) -> dict[str, str]:
    """CLDR's group of every emoji, such as "food & drink"; our own drawings are in none. Raises ArtError."""
    names = emoji.fetch_package(*emoji.NAMES_PACKAGE, art)
    titles = json.loads((names / "meta" / "groups.json").read_text(encoding="utf-8"))["groups"]
    entries = json.loads((names / "en" / "data.json").read_text(encoding="utf-8"))
    plain = str.maketrans("", "", "\ufe0f\ufe0e")
    return {
        entry["emoji"].translate(plain): titles[str(entry["group"])] for entry in entries if "group" in entry
    }


class Evaluation:
    """Everything that a report needs, and the report.

    Args:
        folders: for each of ``MODELS`` that is there, its weights folder.
        shards: the data that they were trained on.
        judge: looks at the pictures.
        groups: the group of each concept, for the table.
        folder: where pictures, sheets and ``report.json`` go.
        settings: how pictures are made.

    Raises:
        EvaluationError: the judge doesn't know all concepts of the shards, there is no model, or the limit
            leaves no two seeds to compare.
    """

    def __init__(
        self,
        folders: dict[str, Path],
        shards: Shards,
        judge: Judge,
        groups: dict[str, str],
        folder: Path,
        settings: Settings,
    ) -> None:
        unknown = {about["concept"] for about in shards.about} - set(judge.about.concepts)
        if unknown:
            raise EvaluationError(
                f"the judge does not know {', '.join(sorted(unknown)[:5])} and was trained on other data; "
                "train it again with scripts/train-judge"
            )
        if not folders:
            raise EvaluationError(
                "none of base, stage1 and stage2 is there; train one with scripts/train-demo"
            )
        if settings.limit is not None and settings.limit < 2:
            raise EvaluationError(
                f"--limit: {settings.limit} pictures in a row show nothing; at least 2 are needed"
            )
        self.folders = folders
        self.shards = shards
        self.judge = judge
        self.groups = groups
        self.folder = folder
        self.settings = settings
        self._weights: dict[str, Weights] = {}
        self._fingerprints = {model: _fingerprint(path) for model, path in folders.items()}

    def report(self) -> dict[str, Any]:
        """Draw, judge and compare; write ``report.json`` and contact sheets; return what the JSON holds."""
        scores: dict[str, dict[str, Score]] = {model: {} for model in self.folders}
        details: dict[str, Any] = {}
        kept: dict[str, tuple[Row, Pixels]] = {}
        for row in plan(self.shards):
            if row.model not in self.folders:
                continue
            row = shorten(row, self.settings.limit)
            pictures = self.pictures(row)
            verdicts = self.judge.look(pictures)
            scores[row.model][row.name] = score(row.asks, verdicts)
            details[f"{row.model}, {row.name}"] = self._detail(row, verdicts)
            self._sheet(row, pictures, verdicts)
            if row.model == "stage2":
                kept[row.name] = row, pictures
        last = [model for model in MODELS if model in self.folders][-1]
        report: dict[str, Any] = {
            "models": {
                m: {"folder": str(p), "sha256": self._fingerprints[m]} for m, p in self.folders.items()
            },
            "settings": asdict(self.settings),
            "judge": {"data": self.judge.about.data, **asdict(self.judge.about.held_out)},
            "real pictures through the autoencoder": asdict(self._real(self._load(last).vae)),
            "scores": {m: {name: asdict(s) for name, s in rows.items()} for m, rows in scores.items()},
            "details": details,
        }
        if "base" in self.folders and "stage1" in self.folders:
            base, stage1 = self._load("base"), self._load("stage1")
            report["stage 1 has the base's UNet and autoencoder"] = same_tensors(
                base.unet, stage1.unet
            ) and same_tensors(base.vae, stage1.vae)
        if kept:
            report["copies"] = self._copies(kept)
        report["targets"] = [asdict(target) for target in targets(scores, report)]
        text = json.dumps(report, ensure_ascii=False, indent=1)
        (self.folder / "report.json").write_text(text + "\n", encoding="utf-8")
        return report

    def pictures(self, row: Row) -> Pixels:
        """The pictures of a row: those kept from last time if model and asks are the same, else new ones."""
        settings = (
            self.settings.scheduler,
            self.settings.steps,
            self.settings.guidance_scale,
            self.settings.savings,
        )
        asked = [(ask.prompt, ask.seed) for ask in row.asks]
        key = hashlib.sha256(repr((self._fingerprints[row.model], settings, asked)).encode()).hexdigest()[:12]
        path = self.folder / "pictures" / f"{_file_name(row)}-{key}.npy"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            drawn = generate(self._load(row.model), row.asks, self.settings, f"{row.model}, {row.name}")
            partial = path.with_suffix(".partial")
            with partial.open("wb") as stream:
                np.save(stream, drawn)
            os.replace(partial, path)
        return np.asarray(np.load(path))

    def _load(self, model: str) -> Weights:
        if model not in self._weights:
            self._weights[model] = load_weights(self.folders[model], self.judge.device, torch.float32)
            speed_up(self._weights[model])
        return self._weights[model]

    def _detail(self, row: Row, verdicts: Verdicts) -> dict[str, Any]:
        """Scores by group and by style, and every picture that is not right."""
        wholes: dict[str, dict[str, list[int]]] = {"by group": {}, "by style": {}}
        wrong = []
        for index, ask in enumerate(row.asks):
            group = self.groups.get(ask.concepts[0], OWN_GROUP)
            wholes["by group"].setdefault(group, []).append(index)
            wholes["by style"].setdefault(ask.style or "any", []).append(index)
            seen, style = verdicts.concepts[index][0], verdicts.styles[index]
            if seen not in ask.concepts or ask.style not in (None, style):
                wrong.append({"prompt": ask.prompt, "seed": ask.seed, "concept": seen, "style": style})
        parts = {
            kind: {
                name: asdict(_score_part(row, verdicts, members)) for name, members in sorted(groups.items())
            }
            for kind, groups in wholes.items()
        }
        return {**parts, "wrong": wrong}

    def _sheet(self, row: Row, pictures: Pixels, verdicts: Verdicts) -> None:
        tiles = []
        for ask, picture, seen, style in zip(
            row.asks, pictures, verdicts.concepts, verdicts.styles, strict=True
        ):
            right = seen[0] in ask.concepts and ask.style in (None, style)
            tiles.append(Tile((picture,), ask.prompt, ask.english, right))
        write_sheets(tiles, self.folder / "sheets", _file_name(row))

    def _real(self, vae: AutoencoderKL) -> Score:
        """What the judge makes of unseen real pictures through the autoencoder: all that one can hope for."""
        held_out = [index for index, about in enumerate(self.shards.about) if is_held_out(about)]
        count = min(self.settings.limit or REAL_PICTURES, len(held_out))
        chosen = [held_out[index] for index in np.linspace(0, len(held_out) - 1, count).round().astype(int)]
        asks = [
            Ask("", "", 0, (self.shards.about[index]["concept"],), self.shards.about[index]["style"])
            for index in chosen
        ]
        pictures = through_autoencoder(vae, [self.shards.picture(index) for index in chosen])
        return score(asks, self.judge.look(pictures))

    def _copies(self, kept: dict[str, tuple[Row, Pixels]]) -> dict[str, Any]:
        """How near stage 2 comes to its training pictures, and how different its seeds are."""
        members = np.array(
            [i for i, about in enumerate(self.shards.about) if takes_part(about, False)], np.int64
        )
        copies = Copies(self.shards, small_pictures(self.shards, self.folder), members)
        row, pictures = kept["things"]
        nearest = copies.nearest(pictures)
        tiles = [
            Tile(
                (picture, self.shards.picture(int(index))),
                f"{ask.prompt} {distance:.2f}",
                f"{ask.english} {distance:.2f}",
                bool(distance >= copies.near),
            )
            for ask, picture, index, distance in zip(
                row.asks, pictures, nearest.indices, nearest.distances, strict=True
            )
        ]
        write_sheets(tiles, self.folder / "sheets", "nearest-training-picture")
        plain = [int(i) for i in members if self.shards.about[i]["style"] == "illustration"]
        count = min(self.settings.limit or REAL_PICTURES, len(plain))
        chosen = [plain[index] for index in np.linspace(0, len(plain) - 1, count).round().astype(int)]
        true_copies = through_autoencoder(self._load("stage2").vae, [self.shards.picture(i) for i in chosen])
        row, pictures = kept["many seeds"]
        of_concept: dict[str, list[int]] = {}
        for index, ask in enumerate(row.asks):
            of_concept.setdefault(ask.concepts[0], []).append(index)
        apart = np.concatenate(
            [copies.apart(pictures[rows], concept) for concept, rows in of_concept.items()]
        )
        hands = [
            len({self.shards.about[i]["hand"] for i in copies.nearest(pictures[rows]).indices})
            for rows in of_concept.values()
        ]
        return {
            "near copy": f"nearer to a training picture, at 16 × 16 pixels, than {NEAR_PERCENTILE:g} % of "
            f"real placements of a drawing are to its nearest other placement ({copies.drawings} drawings)",
            "threshold, in spreads of a drawing": copies.near,
            "share of near copies": float((nearest.distances < copies.near).mean()),
            "distance to the nearest training picture, median": float(np.median(nearest.distances)),
            "training pictures through the autoencoder that count as near copies": float(
                (copies.nearest(true_copies).distances < copies.near).mean()
            ),
            "seeds": {
                "concepts": len(of_concept),
                "distance between two seeds, median": float(np.median(apart)),
                "share of pairs that are not near copies of each other": float((apart >= copies.near).mean()),
                "different hands that the nearest training pictures come from, mean": float(np.mean(hands)),
            },
        }


def _score_part(row: Row, verdicts: Verdicts, members: Sequence[int]) -> Score:
    part = Verdicts([verdicts.concepts[i] for i in members], [verdicts.styles[i] for i in members])
    return score([row.asks[i] for i in members], part)


def _file_name(row: Row) -> str:
    return f"{row.model}-{row.name}".replace(": ", "-").replace(" ", "-")


def _fingerprint(folder: Path) -> str:
    """A name for what a weights folder draws with."""
    parts = {
        part: {name: file.sha256 for name, file in hash_files(folder / part).items()}
        for part in ("tokenizer", "text_encoder", "unet", "vae", "scheduler")
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def targets(scores: dict[str, dict[str, Score]], report: dict[str, Any]) -> list[Target]:
    """What must be shown, for as many models as there are."""
    found: list[Target] = []

    def at_least(what: str, figure: float, needed: float) -> None:
        found.append(Target(what, f"at least {needed:.1%}", f"{figure:.1%}", figure >= needed - 1e-9))

    base, stage1, stage2 = (scores.get(model, {}) for model in MODELS)
    if base:
        things = base["things"]
        at_least(f"base: {things.pictures} things named in English, concept top-1", things.concept_top1, 0.8)
    if base and stage1:
        within = base["things"].concept_top1 - 0.1
        at_least("stage 1: things named in Japanese, concept top-1", stage1["things"].concept_top1, within)
        same = report["stage 1 has the base's UNet and autoencoder"]
        found.append(
            Target(
                "stage 1: UNet and autoencoder", "bit for bit the base's", "same" if same else "differ", same
            )
        )
    if stage1:
        style = stage1["styles new to the base"].style or 0.0
        most = 1 / len(STYLES) + NEAR_CHANCE
        found.append(
            Target("stage 1: styles new to the base", f"at most {most:.1%}", f"{style:.1%}", style <= most)
        )
    if stage2:
        at_least("stage 2: things named in Japanese, concept top-1", stage2["things"].concept_top1, 0.8)
        styled = [stage2[f"styles {which} the base"] for which in ("of", "new to")]
        pictures = sum(part.pictures for part in styled)
        style = sum((part.style or 0.0) * part.pictures for part in styled) / pictures
        at_least("stage 2: style", style, 0.9)
        for name, part in stage2.items():
            if name.startswith("claim: "):
                at_least(f"stage 2: {name}", part.right, 0.8)
        left = stage2["compositions left out"]
        at_least("stage 2: compositions left out, concept top-5", left.concept_top5, 0.7)
        at_least("stage 2: compositions left out, style", left.style or 0.0, 0.8)
    return found


def describe(report: dict[str, Any]) -> str:
    """The report as a table for a terminal."""
    lines = [f"{'model':8}{'row':26}{'pictures':>9}{'top-1':>8}{'top-5':>8}{'style':>8}{'right':>8}"]

    def line(model: str, name: str, row: dict[str, Any]) -> str:
        shares = [row["concept_top1"], row["concept_top5"], row["style"], row["right"]]
        return f"{model:8}{name:26}{row['pictures']:>9}" + "".join(
            f"{'–' if share is None else format(share, '.1%'):>8}" for share in shares
        )

    lines.append(line("real", "through the autoencoder", report["real pictures through the autoencoder"]))
    for model, rows in report["scores"].items():
        lines += [line(model, name, row) for name, row in rows.items()]
    for model in report["scores"]:
        lines += ["", f"{model}, things by group"]
        groups = report["details"][f"{model}, things"]["by group"]
        lines += [line("", name, row) for name, row in groups.items()]
    if "copies" in report:
        copies = report["copies"]
        lines += ["", f"near copy: {copies['near copy']}"]
        figures = {**copies, **copies["seeds"]}
        lines += [f"  {name}: {figure:.3g}" for name, figure in figures.items() if isinstance(figure, float)]
    lines += [""]
    lines += [
        f"{'✓' if target['met'] else '✗'} {target['what']}: {target['reached']} ({target['needed']})"
        for target in report["targets"]
    ]
    return "\n".join(lines)
