"""Whether a generator copies its training pictures: how far each picture is from the nearest of them.

Distances are root mean squares over pixels at ``SIDE`` × ``SIDE``, where fine texture and the autoencoder's
losses hardly count, and are told as multiples of the drawing's own spread: the mean distance between
pictures of that one drawing placed differently. So a white thing on white is measured as strictly as a
dark one.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

from .judge import shrink
from .shards import Shards
from .styles import Pixels

SIDE = 16
NEAR_PERCENTILE = 5.0
"""A near copy is nearer than this share, in percent, of real placements are to their nearest other one."""

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Nearest:
    """Each picture's nearest training picture: index in the shards, distance in spreads of its drawing."""

    indices: Indices
    distances: Floats


def as_vectors(pictures: Pixels) -> Floats:
    """Pictures (n, height, width, 3) as rows (n, 3·SIDE²) whose distance is the RMS over pixels, 0 to 1."""
    small = np.stack([shrink(picture, SIDE) for picture in pictures]).astype(np.float32)
    return small.reshape(len(small), -1) / np.float32(255 * np.sqrt(3 * SIDE * SIDE))


class Copies:
    """The training pictures, ready to be searched.

    Args:
        shards: where they come from.
        pictures: (samples, size, size, 3), all of the shards' pictures, small.
        members: indices of those that were trained on.

    Attributes:
        near: distance in spreads below which a picture is a near copy.
        drawings: number of drawings that ``near`` was measured on.
    """

    def __init__(self, shards: Shards, pictures: Pixels, members: Indices) -> None:
        self.shards = shards
        self.members = members
        self.vectors = as_vectors(pictures[members])
        self._squares = (self.vectors**2).sum(1)
        placements: dict[tuple[str, str], list[int]] = {}
        for row, index in enumerate(members):
            about = shards.about[index]
            if about["style"] == "illustration":
                placements.setdefault((about["concept"], about["hand"]), []).append(row)
        self._spread: dict[tuple[str, str], float] = {}
        nearest_others: list[float] = []
        for drawing, rows in placements.items():
            if len(rows) < 2:
                continue
            between = _distances(self.vectors[rows], self.vectors[rows])
            apart = between[~np.eye(len(rows), dtype=bool)].reshape(len(rows), -1)
            spread = max(float(apart.mean()), 1e-6)
            self._spread[drawing] = spread
            nearest_others.extend(apart.min(1) / spread)
        self.drawings = len(self._spread)
        self.near = float(np.percentile(nearest_others, NEAR_PERCENTILE))

    def nearest(self, pictures: Pixels) -> Nearest:
        """The nearest training picture of each of ``pictures``, (n, height, width, 3)."""
        vectors = as_vectors(pictures)
        rows = (self._squares - 2 * vectors @ self.vectors.T).argmin(1)
        distances = np.linalg.norm(vectors - self.vectors[rows], axis=1)
        indices = self.members[rows]
        spreads = np.array([self._spread_of(int(index)) for index in indices], np.float32)
        return Nearest(indices, distances / spreads)

    def apart(self, pictures: Pixels, concept: str) -> Floats:
        """Distances between all pairs of ``pictures`` of one concept, in mean spreads of its drawings."""
        spreads = [spread for (drawn, _), spread in self._spread.items() if drawn == concept]
        vectors = as_vectors(pictures)
        pairs = [np.linalg.norm(vectors[a] - vectors[b]) for a, b in combinations(range(len(vectors)), 2)]
        return np.array(pairs, np.float32) / np.float32(np.mean(spreads))

    def _spread_of(self, index: int) -> float:
        about = self.shards.about[index]
        return self._spread.get(
            (about["concept"], about["hand"]), float(np.mean(list(self._spread.values())))
        )


def _distances(first: Floats, second: Floats) -> Floats:
    return np.linalg.norm(first[:, None] - second[None], axis=-1).astype(np.float32)
