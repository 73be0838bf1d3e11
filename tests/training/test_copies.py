import numpy as np
import pytest
from drawn_shards import CONCEPTS

from japanese_stable_diffusion.training.copies import Copies, as_vectors
from japanese_stable_diffusion.training.shards import Shards
from japanese_stable_diffusion.training.styles import Pixels


@pytest.fixture(scope="module")
def pictures(drawn: Shards) -> Pixels:
    return np.stack([drawn.picture(i) for i in range(len(drawn))])


@pytest.fixture(scope="module")
def copies(drawn: Shards, pictures: Pixels) -> Copies:
    return Copies(drawn, pictures, np.flatnonzero([about["hand"] != "noto" for about in drawn.about]))


def test_distance_is_the_root_mean_square_over_pixels() -> None:
    black, grey = np.zeros((1, 64, 64, 3), np.uint8), np.full((1, 64, 64, 3), 51, np.uint8)
    assert np.linalg.norm(as_vectors(black) - as_vectors(grey)) == pytest.approx(0.2)


def test_a_training_picture_is_a_near_copy_of_itself(copies: Copies, pictures: Pixels) -> None:
    nearest = copies.nearest(pictures[copies.members])
    assert (pictures[nearest.indices] == pictures[copies.members]).all()
    assert nearest.distances == pytest.approx(0, abs=1e-2) and (nearest.distances < copies.near).all()
    slightly_off = np.clip(pictures[copies.members].astype(int) + 3, 0, 255).astype(np.uint8)
    assert (copies.nearest(slightly_off).distances < copies.near).all()


def test_what_was_never_trained_on_is_no_near_copy(copies: Copies, pictures: Pixels, drawn: Shards) -> None:
    # Upside down and mirrored, the diagonal half of a picture is nobody's.
    strange = pictures[[0, 40, 90]].copy()
    strange[:, :32] = 255 - strange[:, :32, ::-1]
    assert (copies.nearest(strange).distances > copies.near).all()
    assert all(drawn.about[int(i)]["hand"] != "noto" for i in copies.nearest(strange).indices)


def test_near_means_nearer_than_real_placements_are(copies: Copies, pictures: Pixels, drawn: Shards) -> None:
    """One in twenty of them is allowed to be nearer; here all placements are equally far apart."""
    assert copies.drawings == len(CONCEPTS) * 5
    plain = [i for i in copies.members if drawn.about[i]["style"] == "illustration"]
    others = []
    for i in plain:
        mates = [
            j
            for j in plain
            if j != i and all(drawn.about[i][k] == drawn.about[j][k] for k in ("concept", "hand"))
        ]
        between = [np.linalg.norm(as_vectors(pictures[[i]]) - as_vectors(pictures[[j]])) for j in mates]
        others.append(min(between))
    assert 0.3 < copies.near < 1
    assert copies.near <= np.max(others) / np.mean(others)


def test_seeds_that_give_one_picture_are_not_apart(copies: Copies, pictures: Pixels, drawn: Shards) -> None:
    of_dogs = [
        i for i in copies.members if drawn.about[i]["concept"] == "🐶" and drawn.about[i]["hand"] == "fluent"
    ]
    placements = [i for i in of_dogs if drawn.about[i]["style"] == "illustration"]
    assert copies.apart(pictures[[placements[0]] * 3], "🐶") == pytest.approx([0, 0, 0])
    different = copies.apart(pictures[placements], "🐶")
    assert len(different) == 6 and (different > copies.near).all()
