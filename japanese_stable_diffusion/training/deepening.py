"""A deeper denoiser that begins as the one it is made of."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn


@torch.no_grad()
def deepen(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A UNet with one layer more in every block, which at first computes the same.

    A layer is a residual block and, where the others of its block have one, an attention. New ones add
    nothing until they are trained, for what they add passes through zeros at the end (Chen et al. 2016,
    arXiv:1511.05641, sec. 2.4, with the identity in the residual). In the way up, each also
    takes over a skip connection of its own, from the layer before the new one in the way down.

    Raises:
        ValueError: its blocks have different numbers of layers.
    """
    layers = unet.config["layers_per_block"]
    if not isinstance(layers, int):
        raise ValueError(f"layers_per_block is {layers}; only a UNet with one number for all can be deepened")
    deeper: Any = UNet2DConditionModel.from_config({**unet.config, "layers_per_block": layers + 1})
    for name in ("time_embedding", "add_embedding", "conv_in", "mid_block", "conv_norm_out", "conv_out"):
        if getattr(unet, name, None) is not None:
            getattr(deeper, name).load_state_dict(getattr(unet, name).state_dict())
    for old, new in zip(unet.down_blocks, deeper.down_blocks, strict=True):
        _take_over(old, new, layers)
    for old, new in zip(unet.up_blocks, deeper.up_blocks, strict=True):
        # The first layer up has the skip connection of the last one down, which is a new one, so the new
        # layer comes second.
        _take_over(old, new, 1)
    return deeper


def _take_over(old: Any, new: Any, place: int) -> None:
    """Give a block the layers of another around the one at ``place``, which is made to add nothing."""
    state = {}
    for name, tensor in old.state_dict().items():
        kind, _, rest = name.partition(".")
        if kind in ("resnets", "attentions"):
            number, _, rest = rest.partition(".")
            name = f"{kind}.{int(number) + (int(number) >= place)}.{rest}"
        state[name] = tensor
    new.load_state_dict(state, strict=False)
    resnet = new.resnets[place]
    nn.init.zeros_(resnet.conv2.weight)
    nn.init.zeros_(resnet.conv2.bias)
    if resnet.conv_shortcut is not None:
        # Of what comes from below and what the skip connection brings, only the first passes.
        nn.init.dirac_(resnet.conv_shortcut.weight)
        nn.init.zeros_(resnet.conv_shortcut.bias)
    if getattr(new, "attentions", None):
        nn.init.zeros_(new.attentions[place].proj_out.weight)
        nn.init.zeros_(new.attentions[place].proj_out.bias)
