from pathlib import Path
from typing import Any

import pytest
from layout_2022 import write_2022_layout
from PIL import Image

from japanese_stable_diffusion.page.album import keep
from japanese_stable_diffusion.page.line import Cancelled, Progress, Waiting
from japanese_stable_diffusion.page.model import Model
from japanese_stable_diffusion.request import RequestError
from japanese_stable_diffusion.safety import SafetyError

INPUTS: dict[str, Any] = {
    "prompt": "猫",
    "width": 64,
    "height": 128,
    "num_inference_steps": 3,
    "num_outputs": 2,
    "seed": 5,
}


@pytest.fixture(scope="module")
def model(tiny_weights: Path) -> Model:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JSD_WEIGHTS", str(tiny_weights))
        return Model()


def test_it_tells_every_step_with_previews(model: Model) -> None:
    told: list[Progress] = []
    finished = model.make(INPUTS, lambda news: told.append(news) if isinstance(news, Progress) else None)
    assert [(news.done, news.total) for news in told] == [(2, 6), (4, 6), (6, 6)]
    assert all([preview.size for preview in news.previews] == [(64, 128)] * 2 for news in told)
    assert told[0].previews[0].tobytes() != told[-1].previews[0].tobytes()
    assert "seed: 5" in finished.log

    first, second = keep(finished.files)
    assert (first.seed, second.seed, first.file.name) == (5, 6, "seed-5.png")
    assert "Seed: 5" in first.parameters
    # The next request doesn't take them away.
    model.make({**INPUTS, "num_inference_steps": 1}, lambda news: None)
    assert Image.open(second.file).size == (64, 128)


def test_it_stops_at_the_step_at_which_it_is_cancelled(model: Model) -> None:
    told = []

    def tell(news: Progress | Waiting) -> None:
        told.append(news)
        raise Cancelled

    with pytest.raises(Cancelled):
        model.make(INPUTS, tell)
    assert len(told) == 1


def test_a_wrong_input_is_refused(model: Model) -> None:
    with pytest.raises(RequestError, match="seed: -1 is out of range"):
        model.make({**INPUTS, "seed": -1}, lambda news: None)


def test_previews_have_to_pass_the_safety_check(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = write_2022_layout(tiny_weights, tmp_path / "2022")
    monkeypatch.setenv("JSD_WEIGHTS", str(checked))
    model = Model()
    checker = model._predictor.checker
    assert checker
    shown: list[int] = []

    def tell(news: Progress | Waiting) -> None:
        assert isinstance(news, Progress)
        shown.append(len(news.previews))

    checker.model.concept_embeds_weights.data.fill_(2)
    model.make(INPUTS, tell)
    assert shown == [2, 2, 2]
    shown.clear()
    # No cosine is below.
    checker.model.concept_embeds_weights.data.fill_(-2)
    with pytest.raises(SafetyError):
        model.make(INPUTS, tell)
    assert shown == [0, 0, 0]
