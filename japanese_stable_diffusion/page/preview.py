"""What latents look like, without the cost of decoding them."""

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch.nn import functional

from japanese_stable_diffusion.pipeline import vae_factor

_SIDE = 16
"""Latents along each side of the pictures that the map is fitted on."""
_SCALES = (3, 10)
"""Blots of colour along each side of these pictures, one picture each."""


class Preview:
    """A linear map from latents to pixels, fitted by least squares to what the autoencoder itself decodes.

    Of each latent and its eight neighbours it makes the patch of pixels that the decoder would fill there.
    Next to a denoising step it costs nothing, and it serves any weights. Fitting decodes some small pictures.
    """

    @torch.inference_mode()
    def __init__(self, vae: AutoencoderKL) -> None:
        self._factor = vae_factor(vae)
        pictures = _colourful_pictures(_SIDE * self._factor).to(vae.device, vae.dtype)
        # One at a time: together they would need the memory of a large picture.
        latents = torch.cat([vae.encode(picture[None]).latent_dist.mode() for picture in pictures])
        decoded = torch.cat([vae.decode(latent[None]).sample for latent in latents])
        known = _neighbourhoods(latents.float().cpu() * vae.config["scaling_factor"])
        wanted = functional.pixel_unshuffle(decoded.float().cpu(), self._factor)
        # At the edges the decoder sees nothing where latents are repeated here.
        known, wanted = (values[..., 1:-1, 1:-1].movedim(1, -1).flatten(0, -2) for values in (known, wanted))
        self._map = torch.linalg.lstsq(known, wanted, driver="gelsd").solution

    @torch.inference_mode()
    def __call__(self, latents: torch.Tensor) -> tuple[Image.Image, ...]:
        """RGB pictures of latents without noise: (pictures, channels, height, width)."""
        patches = torch.einsum("nchw,cp->nphw", _neighbourhoods(latents.float().cpu()), self._map)
        pixels = functional.pixel_shuffle(patches, self._factor)
        pixels = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        return tuple(Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pixels)


def _colourful_pictures(side: int) -> torch.Tensor:
    """Random colours in blots, coarse to fine, hard and soft: (2 · scales, 3, side, side), -1 to 1."""
    generator = torch.Generator().manual_seed(0)
    pictures = []
    for scale in _SCALES:
        blots = torch.rand(1, 3, scale, scale, generator=generator) * 2 - 1
        pictures.append(functional.interpolate(blots, (side, side), mode="nearest"))
        pictures.append(functional.interpolate(blots, (side, side), mode="bilinear"))
    return torch.cat(pictures)


def _neighbourhoods(latents: torch.Tensor) -> torch.Tensor:
    """Each latent with its eight neighbours and a one: (pictures, 9 · channels + 1, height, width)."""
    height, width = latents.shape[2:]
    edged = functional.pad(latents, (1, 1, 1, 1), mode="replicate")
    around = functional.unfold(edged, 3).unflatten(2, (height, width))
    return torch.cat([around, torch.ones_like(around[:, :1])], dim=1)
