"""What was tried to make an evaluation faster and didn't pay, kept so that its figures can be had again."""

from collections.abc import Callable

import torch
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

from japanese_stable_diffusion.weights import Weights


def attend_by_matrix_products(weights: Weights) -> None:
    """Compute attention as two plain matrix products, with all of the weights between them in memory."""
    weights.unet.set_attn_processor(AttnProcessor())


def fuse_projections(weights: Weights) -> None:
    """Compute queries, keys and values of self-attention by one larger product."""
    weights.unet.fuse_qkv_projections()


def guide_apart(weights: Weights) -> None:
    """Evaluate what is prompted and what isn't one after the other, not as one batch of two."""
    evaluate = weights.unet.forward

    def evaluate_apart(
        latents: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor
    ) -> UNet2DConditionOutput:
        halves = zip(latents.chunk(2), text.chunk(2), strict=True)
        return UNet2DConditionOutput(
            sample=torch.cat([evaluate(part, timestep, words).sample for part, words in halves])
        )

    weights.unet.forward = evaluate_apart


def round_to_bfloat16(weights: Weights) -> None:
    """Compute convolutions and products in bfloat16. Pictures then are others than upstream's."""
    weights.unet.forward = torch.autocast("cpu", torch.bfloat16)(weights.unet.forward)


ATTEMPTS: dict[str, Callable[[Weights], None]] = {
    "attend_by_matrix_products": attend_by_matrix_products,
    "fuse_projections": fuse_projections,
    "guide_apart": guide_apart,
    "round_to_bfloat16": round_to_bfloat16,
}
"""All attempts by name, each made on top of `speed_up`. `scripts/benchmark --attempts` measures them."""
