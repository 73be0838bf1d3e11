from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import nn

from japanese_stable_diffusion.page.preview import Preview


class LinearAutoencoder(nn.Module):
    """Decodes by one convolution, so that a linear map can do exactly the same. An untrained decoder can't be
    mapped: it makes noise of whatever it is given."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.config = {"scaling_factor": 0.5, "block_out_channels": (1,) * (factor.bit_length())}
        self.device, self.dtype, self.factor = torch.device("cpu"), torch.float32, factor
        generator = torch.Generator().manual_seed(7)
        self.mixed = torch.randn(4, 3, generator=generator)
        self.kernel = torch.randn(3 * factor**2, 4, 3, 3, generator=generator) / 20

    def encode(self, pixels: torch.Tensor) -> SimpleNamespace:
        latents = torch.einsum("lc,nchw->nlhw", self.mixed, nn.functional.avg_pool2d(pixels, self.factor))
        # What the fourth channel holds must not follow from the others, or there is nothing to fit it by.
        latents[:, 3] = latents[:, 3] ** 2
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: latents))

    def decode(self, latents: torch.Tensor) -> SimpleNamespace:
        patches = nn.functional.conv2d(latents, self.kernel, padding=1)
        return SimpleNamespace(sample=nn.functional.pixel_shuffle(patches, self.factor))


def distance(one: Image.Image, other: np.ndarray) -> float:
    return float(np.abs(np.asarray(one, float) - other).mean())


@pytest.mark.parametrize("factor", [4, 8])
def test_it_shows_what_the_autoencoder_would_decode(factor: int) -> None:
    vae = LinearAutoencoder(factor)
    latents = torch.randn(2, 4, 10, 6, generator=torch.Generator().manual_seed(1)) / 2
    shown = Preview(cast(AutoencoderKL, vae))(latents)
    assert [picture.size for picture in shown] == [(6 * factor, 10 * factor)] * 2
    decoded = ((vae.decode(latents / 0.5).sample / 2 + 0.5).clamp(0, 1) * 255).permute(0, 2, 3, 1).numpy()
    assert decoded.std() > 20
    for picture, expected in zip(shown, decoded, strict=True):
        # At its edges the decoder sees nothing where the map repeats the last latent.
        inner = np.s_[factor:-factor, factor:-factor]
        assert distance(Image.fromarray(np.asarray(picture)[inner]), expected[inner]) < 1
