from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from japanese_stable_diffusion.training.configuration import read_configuration
from japanese_stable_diffusion.training.deepening import deepen
from japanese_stable_diffusion.training.trainer import make_model

TINY = str(Path(__file__).with_name("tiny.toml"))


@pytest.fixture(params=[TINY, "demo"])
def unet(request: pytest.FixtureRequest) -> UNet2DConditionModel:
    torch.manual_seed(0)
    model: UNet2DConditionModel = make_model("unet", read_configuration(request.param))
    return model.eval()


def inputs(unet: UNet2DConditionModel) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    latents = torch.randn(2, unet.config["in_channels"], 16, 16)
    return latents, torch.tensor([3, 700]), torch.randn(2, 77, unet.config["cross_attention_dim"])


def test_a_deeper_denoiser_begins_by_computing_the_same(unet: UNet2DConditionModel) -> None:
    blocks = len(unet.config["block_out_channels"])
    deeper = deepen(deepen(unet, [1] * blocks), [2] + [0] * (blocks - 1)).eval()
    assert deeper.config["layers_per_block"] == [4] + [2] * (blocks - 1)
    given = inputs(unet)
    torch.testing.assert_close(deeper(*given).sample, unet(*given).sample, rtol=1e-3, atol=1e-4)


def test_everything_in_it_learns(unet: UNet2DConditionModel) -> None:
    deeper = deepen(unet, range(len(unet.config["block_out_channels"])))
    optimizer = torch.optim.SGD(deeper.parameters(), lr=0.1)
    # What is before a zero hears of an error only once that is a zero no more.
    for _ in range(2):
        optimizer.zero_grad()
        deeper(*inputs(unet)).sample.pow(2).mean().backward()
        optimizer.step()
    assert all(parameter.grad is not None for parameter in deeper.parameters())
    deaf = [name for name, parameter in deeper.named_parameters() if not parameter.grad.any()]
    assert not deaf


def test_all_blocks_alike_stay_one_number(unet: UNet2DConditionModel) -> None:
    blocks = len(unet.config["block_out_channels"])
    assert deepen(unet, [1] * blocks).config["layers_per_block"] == 2


@pytest.mark.parametrize("added", [[], [1], [1, -1], [1, 1, 1, 1]])
def test_a_wrong_number_of_blocks_is_refused(added: list[int], unet: UNet2DConditionModel) -> None:
    with pytest.raises(ValueError, match=r"deepen is \["):
        deepen(unet, added)
