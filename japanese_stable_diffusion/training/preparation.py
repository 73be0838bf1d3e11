"""Turn a source of samples into a folder of shards."""

from __future__ import annotations

import multiprocessing
from functools import partial
from pathlib import Path

import cv2
from tqdm import tqdm

from . import emoji
from .shards import write_shard

CONCEPTS_PER_SHARD = 16


def _shard_of_emoji(art: Path, folder: Path, size: int, first: int) -> None:
    path = folder / f"emoji-{first:05d}.tar"
    if path.exists():
        return
    cv2.setNumThreads(1)
    write_shard(path, emoji.samples(art, size, first, CONCEPTS_PER_SHARD))


def prepare_emoji(art: Path, folder: Path, size: int = 128, processes: int | None = None) -> None:
    """Draw all concepts in all styles into ``folder``; shards that are there already are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    firsts = range(0, len(emoji.read_concepts(art)), CONCEPTS_PER_SHARD)
    work = partial(_shard_of_emoji, art, folder, size)
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for _ in tqdm(pool.imap_unordered(work, firsts), total=len(firsts), desc="shards", unit="shard"):
            pass
