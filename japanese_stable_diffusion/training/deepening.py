"""A deeper denoiser that begins as the one it is made of."""

from __future__ import annotations

import re
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
    # The first layer up has the skip connection of the last one down, which is a new one: so on the way up
    # the new layer of a block comes second.
    places = {"down": layers, "up": 1}
    deeper.load_state_dict(
        {_moved(name, places): tensor for name, tensor in unet.state_dict().items()}, strict=False
    )
    for way, blocks in (("down", deeper.down_blocks), ("up", deeper.up_blocks)):
        for block in blocks:
            _silence(block, places[way])
    return deeper


_LAYER = re.compile(r"(?P<block>(?P<way>down|up)_blocks\.\d+\.(resnets|attentions)\.)(?P<number>\d+)")
"""The beginning of the names of a layer's tensors."""


def _moved(name: str, places: dict[str, int]) -> str:
    """The name of a tensor once there is a new layer in its block, at the place for its way."""
    layer = _LAYER.match(name)
    if not layer or int(layer["number"]) < places[layer["way"]]:
        return name
    return f"{layer['block']}{int(layer['number']) + 1}{name[layer.end() :]}"


def _silence(block: Any, place: int) -> None:
    """Make the layer of a block at ``place`` add nothing."""
    resnet = block.resnets[place]
    nn.init.zeros_(resnet.conv2.weight)
    nn.init.zeros_(resnet.conv2.bias)
    if resnet.conv_shortcut is not None:
        # Of what comes from below and what the skip connection brings, only the first passes.
        nn.init.dirac_(resnet.conv_shortcut.weight)
        nn.init.zeros_(resnet.conv_shortcut.bias)
    if getattr(block, "attentions", None):
        nn.init.zeros_(block.attentions[place].proj_out.weight)
        nn.init.zeros_(block.attentions[place].proj_out.bias)
