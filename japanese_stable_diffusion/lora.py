"""LoRA: low-rank changes to the weights, from a file, for one prediction (Hu et al. 2021, arXiv:2106.09685).

A layer y = Wx becomes y = Wx + scale · alpha / rank · BAx. The changes are added to what the layers put out,
so the weights themselves are never touched and nothing has to be put back.

diffusers 0.42's own loader, with PEFT 0.21, only logs keys that it finds no place for, leaves layers replaced
after an error, and fails on kohya's text encoder keys; so the keys are read here.
"""

import json
import math
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import torch
from torch.nn.functional import conv2d, linear

from japanese_stable_diffusion.provenance import hash_file
from japanese_stable_diffusion.request import LORA_BYTES, RequestError
from japanese_stable_diffusion.weights import Weights

_KEY = re.compile(r"(?P<layer>.+?)[._]lora(_linear_layer)?[._](?P<kind>down|up|A|B)(\.\w+)?\.weight")
_ALPHA = re.compile(r"(?P<layer>.+)\.alpha")
_LAYER = re.compile(
    r"(base_model_model_)?((lora_)?(?P<part>unet|te1?|text_encoder)_)?(text_model_)?(?P<name>.+)"
)
_MODELS = ("unet", "text_encoder")
_PARTS = {"unet": "unet", "te": "text_encoder", "te1": "text_encoder", "text_encoder": "text_encoder"}
_KINDS = {"down": "down", "A": "down", "up": "up", "B": "up"}
_ALLOWED = "a safetensors file of a LoRA that was trained on these weights is allowed"
_TOLD = 5

Item = TypeVar("Item")
Shape = tuple[int, ...]


class LoRA(AbstractContextManager[None]):
    """A LoRA file, ready for weights: inside of `with` it is applied to them, outside they are bare.

    It takes the memory of its own tensors, rank × (inputs + outputs) values per layer in the precision of the
    weights, and while a layer computes (rank + outputs) values per token or latent pixel.

    Understood are the keys of kohya's sd-scripts, of diffusers and of PEFT, for linear and convolutional
    layers of the UNet and the text encoder. A file that doesn't tell its alpha is taken to have alpha = rank.

    Args:
        file: safetensors, and nothing else.
        scale: of the changes; 1 is as trained.
        weights: which it is for, on their device.

    Attributes:
        hash: the first 16 hexadecimal digits of the file's SHA-256.

    Raises:
        RequestError: it isn't such a file, or something in it doesn't fit; the message lists what.
    """

    def __init__(self, file: Path, scale: float, weights: Weights) -> None:
        self._opened = ExitStack()
        try:
            size = file.stat().st_size
            if size > LORA_BYTES:
                raise RequestError(f"lora: is {size:,} bytes large; up to {LORA_BYTES:,} are allowed")
            self.hash = hash_file(file)
            with safetensors.safe_open(file, framework="pt") as tensors:
                self._layers = _read_layers(tensors, scale, weights)
        except OSError as error:
            raise RequestError(f"lora: can't be read ({error.strerror or error}); {_ALLOWED}") from None
        except safetensors.SafetensorError:
            raise RequestError(f"lora: is not a safetensors file, or damaged; {_ALLOWED}") from None

    def __enter__(self) -> None:
        for layer in self._layers:
            self._opened.callback(layer.module.register_forward_hook(layer.change).remove)

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def during(self, items: Iterator[Item]) -> Iterator[Item]:
        """The same items, with the LoRA applied while each is made, and not between them."""
        while True:
            with self:
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item


@dataclass(frozen=True)
class _Layer:
    """Changes to one layer: `down` is A, (rank, inputs, ...); `up` is B, (outputs, rank, ...), scaled."""

    module: torch.nn.Module
    down: torch.Tensor
    up: torch.Tensor

    def change(self, module: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        if self.down.ndim == 2:
            return output + linear(linear(inputs[0], self.down), self.up)
        options = {"stride": module.stride, "padding": module.padding, "dilation": module.dilation}
        return output + conv2d(conv2d(inputs[0], self.down, **options), self.up)


def _read_layers(tensors: Any, scale: float, weights: Weights) -> list[_Layer]:
    """The layers of an opened file. Shapes are checked before any tensor is read."""
    modules = _modules(weights)
    keys: dict[str, dict[str, str]] = {}
    misfits = []
    for key in tensors.keys():  # noqa: SIM118 (a safetensors file is no dict)
        found, kind = _find_layer(key, modules)
        if not found:
            misfits.append(f"{_show(key)} has no place in them")
        elif kind in keys.setdefault(found, {}):
            misfits.append(f"{_show(key)} is there twice")
        else:
            keys[found][kind] = key
    for name, kinds in keys.items():
        for kind in ("down", "up"):
            if kind not in kinds:
                misfits.append(f"{next(iter(kinds.values()))} has no {kind} part")
        if {"down", "up"} <= kinds.keys():
            shapes = {kind: tuple(tensors.get_slice(key).get_shape()) for kind, key in kinds.items()}
            misfits += _compare(kinds, shapes, tuple(modules[name].weight.shape))
    if misfits:
        told = "; ".join(misfits[:_TOLD])
        more = f"; and {len(misfits) - _TOLD} more" if len(misfits) > _TOLD else ""
        raise RequestError(f"lora: does not fit the weights: {told}{more}; {_ALLOWED}")
    if not keys:
        raise RequestError(f"lora: holds no tensors; {_ALLOWED}")
    told_alphas = _told_alphas(tensors.metadata())
    return [
        _read_layer(tensors, kinds, scale, modules[name], told_alphas.get(name.split(" ")[0]), weights.dtype)
        for name, kinds in keys.items()
    ]


def _read_layer(
    tensors: Any,
    kinds: dict[str, str],
    scale: float,
    module: Any,
    told_alpha: float | None,
    dtype: torch.dtype,
) -> _Layer:
    read = {kind: tensors.get_tensor(key).float() for kind, key in kinds.items()}
    if not all(tensor.isfinite().all() for tensor in read.values()):
        raise RequestError(f"lora: {kinds['down']} or its other parts are not finite; {_ALLOWED}")
    down, up, weight = read["down"], read["up"], module.weight
    rank = down.shape[0]
    alpha = read["alpha"].item() if "alpha" in read else told_alpha or rank
    up = up * (scale * alpha / rank)
    return _Layer(
        module,
        down.reshape(rank, *weight.shape[1:]).to(weight.device, dtype),
        up.reshape(weight.shape[0], rank, *(1,) * (weight.ndim - 2)).to(weight.device, dtype),
    )


def _modules(weights: Weights) -> dict[str, Any]:
    """Layers that can be changed, by their part and their name, with `_` for every `.`."""
    return {
        f"{part} {name.replace('.', '_')}": module
        for part, model in (("unet", weights.unet), ("text_encoder", weights.text_encoder))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }


def _find_layer(key: str, modules: dict[str, Any]) -> tuple[str, str]:
    """The name of the layer that a tensor is for, empty if there is none, and what the tensor is of it."""
    match = _KEY.fullmatch(key) or _ALPHA.fullmatch(key)
    if not match:
        return "", ""
    kind = _KINDS[match["kind"]] if match.re is _KEY else "alpha"
    layer = _LAYER.fullmatch(match["layer"].replace(".processor.", ".").replace(".", "_"))
    assert layer, "every non-empty text is one"
    parts = [_PARTS[layer["part"]]] if layer["part"] else _MODELS
    # diffusers kept LoRAs in attention processors once, where to_out was to_out.0.
    names = [f"{part} {layer['name']}{suffix}" for part in parts for suffix in ("", "_0")]
    return next((name for name in names if name in modules), ""), kind


def _compare(kinds: dict[str, str], shapes: dict[str, Shape], weight: Shape) -> list[str]:
    """What doesn't fit of the shapes of a layer's parts, whose keys are given too, and of its weight."""
    down, up = shapes["down"], shapes["up"]
    misfits = []
    if not down or not down[0] or _without_kernel(down) != (down[0], *_without_kernel(weight)[1:]):
        needed = ", ".join(["rank", *map(str, weight[1:])])
        misfits.append(f"{kinds['down']} is {list(down)} where [{needed}] is needed")
    elif _without_kernel(up) != (weight[0], down[0]):
        misfits.append(f"{kinds['up']} is {list(up)} where [{weight[0]}, {down[0]}] is needed")
    if math.prod(shapes.get("alpha", ())) != 1:
        misfits.append(f"{kinds['alpha']} is {list(shapes['alpha'])} where one number is needed")
    return misfits


def _show(key: str) -> str:
    shown = key if key.isprintable() else ascii(key)
    return shown if len(shown) <= 120 else f"{shown[:117]}..."


def _without_kernel(shape: Shape) -> Shape:
    """The shape of a linear layer for one of a convolution over single pixels, which computes the same."""
    return shape[:2] if shape[2:] == (1, 1) else shape


def _told_alphas(metadata: dict[str, str] | None) -> dict[str, float]:
    """The alpha of each part, UNet and text encoder, that diffusers writes beside the tensors."""
    try:
        told = json.loads((metadata or {}).get("lora_adapter_metadata", "{}"))
        alphas = {part: float(told[f"{part}.lora_alpha"]) for part in _MODELS if f"{part}.lora_alpha" in told}
        uneven = any(
            told.get(f"{part}.{name}") for part in _MODELS for name in ("alpha_pattern", "use_rslora")
        )
    except (AttributeError, TypeError, ValueError):
        raise RequestError(f"lora: has metadata that can't be read; {_ALLOWED}") from None
    if uneven or not all(map(math.isfinite, alphas.values())):
        raise RequestError(f"lora: has no single alpha, by its metadata; {_ALLOWED}")
    return alphas
