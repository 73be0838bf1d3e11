"""Which samples make up which step: a function of seed and step alone, so that any run can be resumed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .compositions import left_out
from .shards import Shards
from .styles import STYLES, Pixels

ENCODED_TOGETHER = 64
BASE_STYLES = frozenset(style.name for style in STYLES if style.in_base)


def takes_part(about: dict[str, Any], only_styles_of_base: bool, without_hands: Collection[str] = ()) -> bool:
    """Whether a sample is trained on: compositions that the report tests are left out of every stage."""
    if "concept" not in about:
        return True
    if about.get("hand") in without_hands or left_out(about["concept"], about["style"]):
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
    empty prompt's. With ``partners`` it is no picture but ``ids`` and ``partner_ids`` (77,) of two captions
    of one, the second its first English one if there is ``encode_english``. With ``hands`` there is also
    what each of so many hands drew for its concept and style: ``drawings`` (hands, 2·channels, height/f,
    width/f), and ``drawn`` (hands,), False for nothing. Each epoch has an order of its own, and so do the
    captions; with ``styles_evenly`` all styles are about as frequent in it, but for those that
    ``style_frequency`` names, which are so many times as frequent.
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
        partners: bool = False,
        without_hands: Collection[str] = (),
        hands: int = 0,
        styles_evenly: bool = False,
        style_frequency: Mapping[str, float] | None = None,
        encode_english: Callable[[str], list[int]] | None = None,
    ) -> None:
        """Raises ValueError.

        There are more than ``hands`` hands, and that is more than 1; or ``style_frequency`` names a style
        that isn't there.
        """
        self.shards = shards
        self.language = language
        self.seed = seed
        self.encode = encode
        self.caption_dropout = caption_dropout
        self.moments = moments
        self.crop = crop
        self.partners = partners
        self.hands = hands
        self.encode_english = encode_english
        self.members = np.array(
            [
                index
                for index, about in enumerate(shards.about)
                if about[language]
                and (about["en"] or not encode_english)
                and takes_part(about, only_styles_of_base, without_hands)
            ],
            np.int64,
        )
        if styles_evenly:
            self.members = self._even(self.members, style_frequency or {})
        if hands > 1:
            names = sorted({str(shards.about[member].get("hand")) for member in self.members})
            if len(names) > hands:
                raise ValueError(f"hands is {hands}, but there are {len(names)}: {', '.join(names)}")
            self._places = {name: place for place, name in enumerate(names)}
            self._drawings: dict[tuple[str, str], list[int]] = {}
            for member in np.unique(self.members).tolist():
                self._drawings.setdefault(self._subject(member), []).append(member)

    def __getitem__(self, position: int) -> dict[str, Any]:
        epoch, place = divmod(position, len(self.members))
        index = int(self.members[_order(self.seed, epoch, len(self.members))[place]])
        item: dict[str, Any] = {}
        if self.partners:
            return self._two_captions(index, position)
        if self.moments is None:
            item["picture"] = to_tensor(self._cut(self.shards.picture(index), position))
        else:
            item["moments"] = torch.from_numpy(self.moments[index].astype(np.float32))
            if self.hands:
                item["drawings"], item["drawn"] = self._by_hand(index, position)
        if self.encode:
            rng = np.random.default_rng((self.seed, 1, position))
            item["ids"] = torch.tensor(self.encode(self._caption(index, rng)))
        return item

    def _caption(self, index: int, rng: np.random.Generator) -> str:
        """One of a sample's captions, or the empty one as often as captions are dropped."""
        captions: Sequence[str] = self.shards.about[index][self.language]
        caption = captions[int(rng.integers(len(captions)))]
        return "" if rng.random() < self.caption_dropout else caption

    def _even(self, members: npt.NDArray[np.int64], frequency: Mapping[str, float]) -> npt.NDArray[np.int64]:
        """Members as often as it takes for every style to be seen about as often as the commonest.

        Those of the styles in ``frequency`` are taken so many times as often.
        """
        of_style: dict[str, list[int]] = {}
        for member in members.tolist():
            of_style.setdefault(self._subject(member)[1], []).append(member)
        unknown = sorted(set(frequency) - set(of_style))
        if unknown:
            raise ValueError(
                f"style_frequency names {', '.join(unknown)}, but there are {', '.join(sorted(of_style))}"
            )
        most = max(map(len, of_style.values()), default=0)
        return np.concatenate(
            [
                np.tile(own, max(1, round(most / len(own) * frequency.get(style, 1.0))))
                for style, own in of_style.items()
            ]
        )

    def _subject(self, index: int) -> tuple[str, str]:
        about = self.shards.about[index]
        return str(about.get("concept")), str(about.get("style"))

    def _by_hand(self, index: int, position: int) -> tuple[Tensor, Tensor]:
        """The moments of what each hand drew for a sample's concept and style, one of its drawings each."""
        assert self.moments is not None
        drawings = torch.zeros(self.hands, *self.moments.shape[1:])
        drawn = torch.zeros(self.hands, dtype=torch.bool)
        if self.hands == 1:
            drawings[0], drawn[0] = torch.from_numpy(self.moments[index].astype(np.float32)), True
            return drawings, drawn
        for other in np.random.default_rng((self.seed, 5, position)).permutation(
            self._drawings[self._subject(index)]
        ):
            place = self._places[str(self.shards.about[other].get("hand"))]
            if not drawn[place]:
                drawings[place] = torch.from_numpy(self.moments[other].astype(np.float32))
                drawn[place] = True
        return drawings, drawn

    def _two_captions(self, index: int, position: int) -> dict[str, Any]:
        assert self.encode
        rng = np.random.default_rng((self.seed, 4, position))
        captions = self.shards.about[index][self.language]
        if self.encode_english:
            caption = self._caption(index, rng)
            english = self.shards.about[index]["en"][0] if caption else ""
            return {
                "ids": torch.tensor(self.encode(caption)),
                "partner_ids": torch.tensor(self.encode_english(english)),
            }
        two = rng.choice(len(captions), 2, replace=len(captions) < 2)
        ids, partner_ids = (torch.tensor(self.encode(captions[number])) for number in two)
        return {"ids": ids, "partner_ids": partner_ids}

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


def shift_timesteps(steps: Tensor, shift: float, timesteps: int) -> Tensor:
    """Move timesteps 0 … ``timesteps`` - 1 towards the last ones, that is, to more noise; 1 leaves them.

    As Esser et al. 2024 do (arXiv:2403.03206, eq. 23) with latents of many numbers, which show through more
    noise than few do, so that what a picture is of is decided in fewer of the timesteps.
    """
    share = steps / timesteps
    return (shift * share / (1 + (shift - 1) * share) * timesteps).round().long().clamp(max=timesteps - 1)


def fingerprint(shards: Shards, vae_file: Path, without_hands: Collection[str] = ()) -> str:
    """A name for the latents of these shards, but for those hands', under this autoencoder."""
    digest = hashlib.sha256(vae_file.read_bytes())
    digest.update("\n".join(without_hands).encode())
    for path in shards.paths:
        digest.update(f"{path.name} {path.stat().st_size}".encode())
    digest.update("\n".join(shards.keys).encode())
    return digest.hexdigest()[:16]


@torch.inference_mode()
def cached_moments(
    shards: Shards,
    vae: AutoencoderKL,
    path: Path,
    accelerator: Accelerator,
    without_hands: Collection[str] = (),
) -> npt.NDArray[np.float16]:
    """Mean and log-variance of every picture's latents, (samples, 2·channels, height, width), memory-mapped.

    Zeros stand for pictures that no stage without these hands is trained on. They are computed once, by all
    processes together; a broken-off computation leaves no such file behind.
    """
    if not path.exists():
        partial = path.with_suffix(".partial")
        members = [
            index
            for index, about in enumerate(shards.about)
            if takes_part(about, only_styles_of_base=False, without_hands=without_hands)
        ]

        def encode(indices: Sequence[int]) -> npt.NDArray[np.float16]:
            pictures = torch.stack([to_tensor(shards.picture(index)) for index in indices])
            moments = vae.encode(pictures.to(accelerator.device)).latent_dist.parameters
            return np.asarray(moments.half().cpu().numpy())

        if accelerator.is_main_process:
            shape = (len(shards), *encode([0]).shape[1:])
            np.lib.format.open_memmap(partial, mode="w+", dtype=np.float16, shape=shape).flush()
        accelerator.wait_for_everyone()
        cache = np.load(partial, mmap_mode="r+")
        stride = ENCODED_TOGETHER * accelerator.num_processes
        mine = range(ENCODED_TOGETHER * accelerator.process_index, len(members), stride)
        for first in tqdm(mine, desc="latents", unit="batch", disable=not accelerator.is_main_process):
            indices = members[first : first + ENCODED_TOGETHER]
            cache[indices] = encode(indices)
        cache.flush()
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            partial.rename(path)
        accelerator.wait_for_everyone()
    return np.asarray(np.load(path, mmap_mode="r"))
