"""Data and a judge that the tests of training share."""

from pathlib import Path

import pytest
from drawn_shards import write_drawn_shards

from japanese_stable_diffusion.training.judge import train_judge
from japanese_stable_diffusion.training.shards import Shards


@pytest.fixture(scope="session")
def drawn_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of shards of simple shapes."""
    folder = tmp_path_factory.mktemp("drawn") / "data"
    write_drawn_shards(folder)
    return folder


@pytest.fixture(scope="session")
def drawn(drawn_folder: Path) -> Shards:
    """Shards of simple shapes, opened."""
    return Shards(drawn_folder)


@pytest.fixture(scope="session")
def judge_folder(drawn_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A judge that was trained on the simple shapes."""
    folder = tmp_path_factory.mktemp("judge")
    train_judge(drawn_folder, folder, epochs=40)
    return folder
