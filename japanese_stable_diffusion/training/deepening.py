"""A deeper denoiser that begins as the one it is made of."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn


def deepen(unet: UNet2DConditionModel, added: Sequence[int]) -> UNet2DConditionModel:
    """A UNet with more layers in its blocks, which at first computes the same.

    A layer is a residual block and, where the others of its block have one, an attention. New ones add
    nothing until they are trained, for what they add passes through zeros at the end (Chen et al. 2016,
    arXiv:1511.05641, sec. 2.4, with the identity in the residual). In the way up, each also
    takes over a skip connection of its own, from the layer before the new one in the way down.

    Args:
        unet: what is deepened; stays as it is.
        added: for each block of the way down, how many layers it and its partner on the way up are given.

    Raises:
        ValueError: there are more or fewer blocks than that.
    """
    blocks = len(unet.config["down_block_types"])
    if len(added) != blocks or min(added) < 0:
        raise ValueError(f"deepen is {list(added)}, but must say for each of {blocks} blocks how many layers")
    for layer in range(max(added)):
        unet = _with_one_more(unet, [count > layer for count in added])
    return unet


@torch.no_grad()
def _with_one_more(unet: UNet2DConditionModel, chosen: Sequence[bool]) -> UNet2DConditionModel:
    """With one layer more in the chosen blocks of the way down, and in their partners."""
    layers = unet.config["layers_per_block"]
    if isinstance(layers, int):
        layers = [layers] * len(chosen)
    depths = [count + more for count, more in zip(layers, chosen, strict=True)]
    same = depths[0] if len(set(depths)) == 1 else depths
    deeper: Any = UNet2DConditionModel.from_config({**unet.config, "layers_per_block": same})
    # The first layer up has the skip connection of the last one down, which is a new one: so on the way up
    # the new layer of a block comes second.
    places = {
        **{f"down_blocks.{block}": layers[block] for block, more in enumerate(chosen) if more},
        **{f"up_blocks.{block}": 1 for block, more in enumerate(reversed(chosen)) if more},
    }
    deeper.load_state_dict(
        {_moved(name, places): tensor for name, tensor in unet.state_dict().items()}, strict=False
    )
    for block, place in places.items():
        _silence(deeper.get_submodule(block), place)
    return deeper


_LAYER = re.compile(r"(?P<block>(?:down|up)_blocks\.\d+)\.(?P<kind>resnets|attentions)\.(?P<number>\d+)")
"""The beginning of the names of a layer's tensors."""


def _moved(name: str, places: dict[str, int]) -> str:
    """The name of a tensor once there is a new layer in its block, at the place for that block."""
    layer = _LAYER.match(name)
    if not layer or layer["block"] not in places or int(layer["number"]) < places[layer["block"]]:
        return name
    return f"{layer['block']}.{layer['kind']}.{int(layer['number']) + 1}{name[layer.end() :]}"


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
