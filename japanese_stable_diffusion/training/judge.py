"""An independent measure of what a picture shows: a small classifier of concept and of style.

It never meets a generator. It is trained on real pictures only, spoilt a little as a small autoencoder
spoils them, and it holds back whole renderings (every picture of a drawing in a style) to say how often
it is right. Below ``CONCEPTS_RIGHT`` and ``STYLES_RIGHT`` it is no judge, and refuses to be loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from japanese_stable_diffusion.speed import keep_memory

from .shards import Shards
from .styles import Pixels

SIZE = 128
"""Side in pixels at which pictures are judged: that of the demo's own."""
CONCEPTS_RIGHT = 0.95
STYLES_RIGHT = 0.98
"""Least share of held-out pictures of which a judge must name concept and style."""
HELD_OUT_ONE_IN = 12
"""One rendering in so many is held out."""
WIDTHS = (24, 48, 96, 192)
SEED = 20221123
EPOCHS = 10
SMALL_SIZE, SMALL_EPOCHS = 80, 0.6
"""The first share of the epochs sees pictures this small, for most is learnt from them in half the time."""
BATCH_SIZE = 128
LEARNING_RATE = 4e-3
CONFUSIONS = 40
"""So many of the commonest confusions are written down."""

Floats = npt.NDArray[np.float32]


class JudgeError(Exception):
    """There is no judge to be had; the message says why and what to do."""


@dataclass(frozen=True)
class HeldOut:
    """How often a judge is right on renderings that it never saw.

    Shares are from 0 to 1. ``confusions`` are (concept, what was seen in its place, times), the commonest
    first.
    """

    pictures: int
    renderings: int
    concept_top1: float
    concept_top5: float
    style_top1: float
    concept_top1_by_style: dict[str, float]
    confusions: list[tuple[str, str, int]]

    @property
    def is_a_judge(self) -> bool:
        """Whether this is good enough to judge by."""
        return self.concept_top1 >= CONCEPTS_RIGHT and self.style_top1 >= STYLES_RIGHT


@dataclass(frozen=True)
class About:
    """What ``judge.json`` says: the classes in the order of the logits, and what the judge is worth."""

    concepts: list[str]
    styles: list[str]
    held_out: HeldOut
    data: str
    seed: int = SEED
    epochs: int = EPOCHS
    size: int = SIZE
    widths: list[int] = field(default_factory=lambda: list(WIDTHS))


@dataclass(frozen=True)
class Verdicts:
    """What a judge sees in pictures: (pictures, 5) concepts, the likeliest first, and (pictures,) styles."""

    concepts: list[list[str]]
    styles: list[str]


class _Convolution(nn.Sequential):
    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__(
            nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(inplace=True),
        )


class _Residual(nn.Module):
    """Residual learning (He et al. 2016, arXiv:1512.03385) over one convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolution = _Convolution(channels, channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        return features + self.convolution(features)


class Classifier(nn.Module):
    """Convolutions with two heads.

    ``forward`` takes pixels (batch, 3, size, size) from 0 to 1 and returns the logits of concepts (batch,
    concepts) and of styles (batch, styles).
    """

    def __init__(self, concepts: int, styles: int, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.PixelUnshuffle(2), _Convolution(12, widths[0], 2)]
        for narrow, wide in pairwise(widths):
            layers += [_Convolution(narrow, wide, 2), _Residual(wide)]
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.1))
        self.concept = nn.Linear(4 * widths[-1], concepts)
        self.style = nn.Linear(4 * widths[-1], styles)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(pixels * 2 - 1)
        return self.concept(features), self.style(features)


class Judge:
    """A loaded judge.

    Args:
        folder: where ``train_judge`` left it.
        device: where to compute.

    Raises:
        JudgeError: there is no judge in the folder, or what is there is wrong too often.
    """

    def __init__(self, folder: Path, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")
        self.about = read_about(folder)
        refuse_no_judge(self.about.held_out, folder)
        classes = len(self.about.concepts), len(self.about.styles)
        self._classifier = Classifier(*classes, self.about.widths)
        tensors = load_file(folder / "judge.safetensors")
        self._classifier.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
        self._classifier.to(self.device).eval()

    def look(self, pictures: Pixels | Sequence[Pixels]) -> Verdicts:
        """What pictures show: (height, width, 3) uint8 RGB each, of any size."""
        verdicts = Verdicts([], [])
        for first in range(0, len(pictures), BATCH_SIZE):
            small = np.stack(
                [shrink(picture, self.about.size) for picture in pictures[first : first + BATCH_SIZE]]
            )
            concepts, styles = _logits(self._classifier, small, self.device)
            best = concepts.topk(min(5, concepts.shape[1])).indices.tolist()
            verdicts.concepts.extend([self.about.concepts[index] for index in row] for row in best)
            verdicts.styles.extend(self.about.styles[index] for index in styles.argmax(1).tolist())
        return verdicts


def read_about(folder: Path) -> About:
    """What the judge of a folder says about itself. Raises JudgeError."""
    path = folder / "judge.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        held_out = content.pop("held_out")
        held_out["confusions"] = [tuple(confusion) for confusion in held_out["confusions"]]
        return About(held_out=HeldOut(**held_out), **content)
    except FileNotFoundError:
        raise JudgeError(f"{path}: there is no judge here; train one with scripts/train-judge") from None
    except (ValueError, KeyError, TypeError) as error:
        raise JudgeError(
            f"{path}: does not describe a judge ({error}); train one with scripts/train-judge"
        ) from error


def refuse_no_judge(held_out: HeldOut, folder: Path) -> None:
    """Raise JudgeError if a judge is wrong too often to be one."""
    if not held_out.is_a_judge:
        raise JudgeError(
            f"{folder}: is no judge: right on {held_out.concept_top1:.1%} of concepts and "
            f"{held_out.style_top1:.1%} of styles, needs {CONCEPTS_RIGHT:.0%} and {STYLES_RIGHT:.0%}; "
            "see the confusions in judge.json"
        )


def is_held_out(about: dict[str, Any]) -> bool:
    """Whether a sample's rendering, its (concept, hand, style) with all variants, is kept back."""
    rendering = f"judge {about['concept']} {about['hand']} {about['style']}"
    return zlib.crc32(rendering.encode()) % HELD_OUT_ONE_IN == 0


def data_fingerprint(shards: Shards) -> str:
    """A short name for the pictures of these shards."""
    digest = hashlib.sha256()
    for path in shards.paths:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
    digest.update("\n".join(shards.keys).encode())
    return digest.hexdigest()[:16]


def shrink(picture: Pixels, size: int) -> Pixels:
    """A picture at (size, size, 3), by averaging."""
    if picture.shape[:2] == (size, size):
        return picture
    return np.asarray(cv2.resize(picture, (size, size), interpolation=cv2.INTER_AREA), dtype=np.uint8)


def small_pictures(shards: Shards, folder: Path, size: int = SIZE) -> Pixels:
    """All pictures of the shards, (samples, size, size, 3), uint8 RGB; read once and kept in ``folder``."""
    path = folder / f"pictures-{data_fingerprint(shards)}-{size}.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        shape = (len(shards), size, size, 3)
        pictures = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
        for index in tqdm(range(len(shards)), desc="pictures", unit="picture"):
            pictures[index] = shrink(shards.picture(index), size)
        pictures.flush()
        os.replace(partial, path)
    return np.load(path, mmap_mode="r")


def spoil(pixels: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Move, tint, blur and soil pictures as a small autoencoder and a free placement might.

    ``pixels`` (batch, 3, height, width), 0 to 1; the result likewise, ``size`` square. Nothing is mirrored,
    for some things have a left and a right.
    """
    batch = len(pixels)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(batch, *shape, generator=generator) * (high - low) + low

    angle, scale = uniform(-0.12, 0.12), uniform(0.88, 1.12)
    cosine, sine = torch.cos(angle) / scale, torch.sin(angle) / scale
    shift = uniform(-0.14, 0.14, 2)
    rows = torch.stack([cosine, -sine, shift[:, 0]], 1), torch.stack([sine, cosine, shift[:, 1]], 1)
    grid = functional.affine_grid(torch.stack(rows, 1), [batch, 3, size, size], align_corners=False)

    def sample(pictures: Tensor, places: Tensor) -> Tensor:
        return functional.grid_sample(pictures, places, padding_mode="border", align_corners=False)

    # The mean of two pictures a pixel or so apart is blurred; PyTorch's blurs take five times as long.
    apart = uniform(-1.5, 1.5, 1, 1, 2) / size
    pixels = (sample(pixels, grid - apart) + sample(pixels, grid + apart)) / 2
    pixels = (pixels - 0.5) * uniform(0.88, 1.12, 1, 1, 1) + (0.5 + uniform(-0.06, 0.06, 3, 1, 1))
    blotches = torch.randn(batch, 3, 8, 8, generator=generator) * uniform(0, 0.05, 1, 1, 1)
    pixels += sample(blotches, grid)
    pixels += torch.randn(batch, 1, size, size, generator=generator) * uniform(0, 0.03, 1, 1, 1)
    return pixels.clamp_(0, 1)


def train_judge(data: Path, folder: Path, epochs: int = EPOCHS) -> About:
    """Train a judge on the shards of ``data`` and leave it in ``folder``; a broken-off training goes on.

    ``judge.safetensors`` and ``judge.json`` are written whether it is good enough or not; what is not is
    refused by ``Judge``.

    Raises:
        ShardError: there are no shards.
        JudgeError: the pictures don't say what they show.
    """
    keep_memory()
    shards = Shards(data)
    try:
        held_out = np.array([is_held_out(about) for about in shards.about])
        names = [(about["concept"], about["style"]) for about in shards.about]
    except KeyError as error:
        raise JudgeError(
            f"{data}: samples have no {error}; a judge needs pictures of known concept and style"
        ) from None
    concepts, styles = sorted({concept for concept, _ in names}), sorted({style for _, style in names})
    concept_of, style_of = (
        {name: index for index, name in enumerate(classes)} for classes in (concepts, styles)
    )
    labels = torch.tensor([(concept_of[concept], style_of[style]) for concept, style in names])
    pictures = small_pictures(shards, folder)
    torch.manual_seed(SEED)
    classifier = Classifier(len(concepts), len(styles)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    fingerprint = data_fingerprint(shards)
    _fit(
        classifier,
        pictures,
        labels,
        np.flatnonzero(~held_out),
        epochs,
        folder / f"checkpoint-{fingerprint}-{epochs}.pt",
    )
    # As it is saved, so it is measured.
    classifier.half().float()
    members = np.flatnonzero(held_out)
    renderings = {(*names[index], shards.about[index]["hand"]) for index in members}
    measured = _measure(classifier, pictures, labels, members, len(renderings), concepts, styles)
    about = About(concepts, styles, measured, fingerprint, epochs=epochs)
    tensors = {
        name: tensor.half() for name, tensor in classifier.state_dict().items() if tensor.is_floating_point()
    }
    counters = {
        name: tensor for name, tensor in classifier.state_dict().items() if not tensor.is_floating_point()
    }
    save_file({**{k: t.contiguous() for k, t in tensors.items()}, **counters}, folder / "judge.safetensors")
    text = json.dumps(asdict(about), ensure_ascii=False, indent=1)
    (folder / "judge.json").write_text(text + "\n", encoding="utf-8")
    return about


def _fit(
    classifier: nn.Module,
    pictures: Pixels,
    labels: Tensor,
    members: npt.NDArray[np.int64],
    epochs: int,
    checkpoint: Path,
) -> None:
    """Train; every epoch is a function of its number and the state before it, and leaves a checkpoint."""
    steps = max(1, len(members) // BATCH_SIZE)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    # One cycle up and down (Smith & Topin 2018, arXiv:1708.07120).
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps * epochs, pct_start=0.25
    )
    parts: dict[str, Any] = {"classifier": classifier, "optimizer": optimizer, "schedule": schedule}
    epoch = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        epoch = state["epoch"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
    classifier.train()
    bar = tqdm(total=steps * epochs, initial=steps * epoch, desc="judge", unit="step")
    while epoch < epochs:
        size = SMALL_SIZE if epoch < SMALL_EPOCHS * epochs else SIZE
        # Dropout draws from the global generator.
        torch.manual_seed(SEED + epoch)
        generator = torch.Generator().manual_seed(SEED + epoch)
        order = np.random.default_rng((SEED, epoch)).permutation(members)
        for batch in _batches(order, steps):
            pixels = spoil(_to_pixels(pictures[batch]), size, generator)
            concepts, styles = classifier(pixels.contiguous(memory_format=torch.channels_last))
            loss = functional.cross_entropy(concepts, labels[batch, 0], label_smoothing=0.1)
            loss = loss + functional.cross_entropy(styles, labels[batch, 1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
            if bar.n % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
        epoch += 1
        partial = checkpoint.with_suffix(".partial")
        torch.save({"epoch": epoch, **{name: part.state_dict() for name, part in parts.items()}}, partial)
        os.replace(partial, checkpoint)
    bar.close()


def _batches(order: npt.NDArray[np.int64], steps: int) -> Iterator[npt.NDArray[np.int64]]:
    for step in range(steps):
        # Sorted, a batch is read from the disk in one sweep.
        yield np.sort(order[step * BATCH_SIZE : (step + 1) * BATCH_SIZE])


def _to_pixels(pictures: Pixels) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 255


@torch.inference_mode()
def _logits(classifier: nn.Module, pictures: Pixels, device: torch.device) -> tuple[Tensor, Tensor]:
    pixels = _to_pixels(pictures).to(device).contiguous(memory_format=torch.channels_last)
    concepts, styles = classifier(pixels)
    return concepts.cpu(), styles.cpu()


def _measure(
    classifier: nn.Module,
    pictures: Pixels,
    labels: Tensor,
    members: npt.NDArray[np.int64],
    renderings: int,
    concepts: list[str],
    styles: list[str],
) -> HeldOut:
    """How often the classifier is right on ``members``."""
    classifier.eval()
    top5, style = [], []
    for first in range(0, len(members), BATCH_SIZE):
        logits = _logits(classifier, pictures[members[first : first + BATCH_SIZE]], torch.device("cpu"))
        top5.append(logits[0].topk(min(5, len(concepts))).indices)
        style.append(logits[1].argmax(1))
    judged, judged_style = torch.cat(top5), torch.cat(style)
    concept, true_style = labels[members].unbind(1)
    right = judged[:, 0] == concept
    wrong = Counter(
        (concepts[truth], concepts[seen])
        for truth, seen in zip(concept[~right], judged[~right, 0], strict=True)
    )
    by_style = {
        name: float(right[true_style == index].float().mean())
        for index, name in enumerate(styles)
        if (true_style == index).any()
    }
    return HeldOut(
        pictures=len(members),
        renderings=renderings,
        concept_top1=float(right.float().mean()),
        concept_top5=float((judged == concept[:, None]).any(1).float().mean()),
        style_top1=float((judged_style == true_style).float().mean()),
        concept_top1_by_style=by_style,
        confusions=[(truth, seen, times) for (truth, seen), times in wrong.most_common(CONFUSIONS)],
    )


def describe(held_out: HeldOut) -> str:
    """The figures of a judge in a few lines."""
    lines = [
        f"held out: {held_out.pictures} pictures of {held_out.renderings} renderings",
        f"concept top-1 {held_out.concept_top1:.1%}, top-5 {held_out.concept_top5:.1%}; "
        f"style {held_out.style_top1:.1%}",
        "concept top-1 by style: "
        + ", ".join(f"{style} {share:.1%}" for style, share in held_out.concept_top1_by_style.items()),
        "commonest confusions: "
        + ", ".join(f"{truth}→{seen} {times}×" for truth, seen, times in held_out.confusions[:20]),
    ]
    return "\n".join(lines)
