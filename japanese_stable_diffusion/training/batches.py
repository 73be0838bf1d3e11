"""Which samples make up which step: a function of seed and step alone, so that any run can be resumed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .compositions import left_out
from .shards import Shards
from .styles import STYLES, Pixels

BASE_STYLES = frozenset(style.name for style in STYLES if style.in_base)


def takes_part(about: dict[str, Any], only_styles_of_base: bool) -> bool:
    """Whether a sample is trained on: compositions that the report tests are left out of every stage."""
    if "concept" not in about:
        return True
    if left_out(about["concept"], about["style"]):
        return False
    return about["style"] in BASE_STYLES or not only_styles_of_base


def to_tensor(picture: Pixels) -> Tensor:
    """(height, width, 3) uint8 → (3, height, width) in -1 to 1."""
    return torch.from_numpy(picture.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(count)


class Draws(Dataset[dict[str, Any]]):
    """The endless sequence of samples that training sees.

    Item ``position`` is one draw: ``picture`` (3, height, width) in -1 to 1 or ``moments``
    (2·channels, height/f, width/f) from the cache of latents, and ``ids`` (77,), the caption's or the
    empty prompt's. Each epoch has an order of its own, and so do the captions.
    """

    def __init__(
        self,
        shards: Shards,
        language: str,
        seed: int,
        only_styles_of_base: bool,
        encode: Callable[[str], list[int]] | None,
        caption_dropout: float,
        moments: npt.NDArray[np.float16] | None,
        crop: int = 0,
    ) -> None:
        self.shards = shards
        self.language = language
        self.seed = seed
        self.encode = encode
        self.caption_dropout = caption_dropout
        self.moments = moments
        self.crop = crop
        self.members = np.array(
            [i for i, about in enumerate(shards.about) if takes_part(about, only_styles_of_base)], np.int64
        )

    def __getitem__(self, position: int) -> dict[str, Any]:
        epoch, place = divmod(position, len(self.members))
        index = int(self.members[_order(self.seed, epoch, len(self.members))[place]])
        item: dict[str, Any] = {}
        if self.moments is None:
            item["picture"] = to_tensor(self._cut(self.shards.picture(index), position))
        else:
            item["moments"] = torch.from_numpy(self.moments[index].astype(np.float32))
        if self.encode:
            rng = np.random.default_rng((self.seed, 1, position))
            captions = self.shards.about[index][self.language]
            caption = captions[rng.integers(len(captions))]
            dropped = rng.random() < self.caption_dropout
            item["ids"] = torch.tensor(self.encode("" if dropped else caption))
        return item

    def _cut(self, picture: Pixels, position: int) -> Pixels:
        if not self.crop:
            return picture
        rng = np.random.default_rng((self.seed, 3, position))
        top, left = (int(rng.integers(side - self.crop + 1)) for side in picture.shape[:2])
        return picture[top : top + self.crop, left : left + self.crop]


class Steps:
    """Batch sampler: the positions of each micro-batch of process ``rank``, from ``first_step`` on."""

    def __init__(
        self, first_step: int, steps: int, batch_size: int, micro_batch_size: int, rank: int, processes: int
    ):
        if batch_size % (micro_batch_size * processes):
            raise ValueError(
                f"batch_size {batch_size} is not a multiple of micro_batch_size {micro_batch_size} "
                f"× {processes} processes"
            )
        self.first_step, self.steps, self.batch_size = first_step, steps, batch_size
        self.micro_batch_size, self.rank, self.processes = micro_batch_size, rank, processes

    def __iter__(self) -> Iterator[list[int]]:
        share = self.batch_size // self.processes
        for step in range(self.first_step, self.steps):
            start = step * self.batch_size + self.rank * share
            for first in range(start, start + share, self.micro_batch_size):
                yield list(range(first, first + self.micro_batch_size))

    def __len__(self) -> int:
        return (self.steps - self.first_step) * self.batch_size // (self.processes * self.micro_batch_size)


def loader(draws: Draws, steps: Steps, workers: int) -> DataLoader[dict[str, Tensor]]:
    """Micro-batches in the order of ``steps``, read ahead by ``workers`` processes."""
    return DataLoader(draws, batch_sampler=steps, num_workers=workers)


def noise_for(
    seed: int, positions: range, shape: tuple[int, ...], timesteps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Noise for the posterior, noise to predict, and timesteps, for each position on its own.

    Returns two tensors (positions, *shape) and one (positions,). They don't depend on how a batch is
    split between processes.
    """
    posterior, noise, steps = [], [], []
    for position in positions:
        entropy = np.random.SeedSequence((seed, 2, position)).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(entropy >> np.uint64(1)))
        posterior.append(torch.randn(shape, generator=generator))
        noise.append(torch.randn(shape, generator=generator))
        steps.append(torch.randint(timesteps, (), generator=generator))
    return torch.stack(posterior), torch.stack(noise), torch.stack(steps)


def fingerprint(shards: Shards, vae_file: Path) -> str:
    """A name for the latents of these shards under this autoencoder."""
    digest = hashlib.sha256(vae_file.read_bytes())
    for path in shards.paths:
        digest.update(f"{path.name} {path.stat().st_size}".encode())
    digest.update("\n".join(shards.keys).encode())
    return digest.hexdigest()[:16]


@torch.inference_mode()
def cached_moments(
    shards: Shards, vae: AutoencoderKL, path: Path, device: torch.device
) -> npt.NDArray[np.float16]:
    """Mean and log-variance of every picture's latents, (samples, 2·channels, height, width), memory-mapped.

    They are computed once; a broken-off computation leaves no file behind.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        cache = None
        batch = 64
        for first in tqdm(range(0, len(shards), batch), desc="latents", unit="batch"):
            pictures = [to_tensor(shards.picture(i)) for i in range(first, min(first + batch, len(shards)))]
            moments = vae.encode(torch.stack(pictures).to(device)).latent_dist.parameters.float().cpu().numpy()
            if cache is None:
                shape = (len(shards), *moments.shape[1:])
                cache = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float16, shape=shape)
            cache[first : first + len(moments)] = moments
        assert cache is not None
        cache.flush()
        partial.rename(path)
    return np.asarray(np.load(path, mmap_mode="r"))
