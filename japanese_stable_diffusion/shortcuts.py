"""What `go_fast` leaves out: guidance where it does little, inner layers that hardly change between steps."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import SchedulerMixin, UNet2DConditionModel

from japanese_stable_diffusion.schedulers import signal_share


@dataclass(frozen=True)
class Savings:
    """What is left out.

    Attributes:
        guided: noise levels σ between which there is guidance, as in Kynkäänniemi et al. 2024
            (arXiv:2404.07724); latents are σ parts of noise to one part of picture.
        inner_every: steps from one full evaluation of the UNet to the next at most; between them its inner
            layers are taken to say what they last said, as in DeepCache (Ma et al. 2024, arXiv:2312.00858)
            with the outermost branch. 1 leaves out nothing.
    """

    guided: tuple[float, float]
    inner_every: int

    def guides(self, scheduler: SchedulerMixin, timestep: torch.Tensor) -> bool:
        """Whether there is guidance at a timestep."""
        signal = float(signal_share(scheduler, timestep))
        low, high = self.guided
        return bool(low <= ((1 - signal) / signal) ** 0.5 <= high)

    def reuses(self, computed: float, wanted: float, reused: int) -> bool:
        """Whether inner layers computed for so many latents do for those wanted, reused so often before."""
        return wanted <= computed and reused + 1 < self.inner_every


GO_FAST = Savings(guided=(0.0, 10.0), inner_every=3)


class Shortcut:
    """A UNet whose inner layers may be left out, if they were computed before.

    Args:
        unet: of any depth. Its last block's last layers, and what leads in and out, are computed always.
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self._unet = unet
        self._block = unet.up_blocks[-1]
        self._inner: torch.Tensor | None = None
        self._reused = 0

    def __call__(self, latents: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """The predicted noise, of the shape of `latents`; everything is computed."""
        handle = self._block.resnets[-1].register_forward_pre_hook(self._remember)
        try:
            predicted: torch.Tensor = self._unet(latents, timestep, text).sample
        finally:
            handle.remove()
        self._reused = 0
        return predicted

    def suffices(self, count: int, savings: Savings) -> bool:
        """Whether the outer layers will do for `count` latents, the last that the inner ones computed."""
        return self._inner is not None and savings.reuses(len(self._inner), count, self._reused)

    def outer(self, latents: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """The same from the outer layers alone, with what the inner ones said of the last full evaluation.

        Raises:
            ValueError: it was of fewer latents.
        """
        if self._inner is None or len(self._inner) < len(latents):
            raise ValueError("the inner layers were not computed for so many latents")
        self._reused += 1
        unet, block = self._unet, self._block
        embedding = unet.time_embedding(unet.get_time_embed(latents, timestep))
        added = unet.get_aug_embed(embedding, text, {})
        if added is not None:
            embedding = embedding + added
        hidden = torch.cat([self._inner[-len(latents) :], unet.conv_in(latents)], dim=1)
        hidden = block.resnets[-1](hidden, embedding)
        if getattr(block, "has_cross_attention", False):
            hidden = block.attentions[-1](hidden, encoder_hidden_states=text, return_dict=False)[0]
        predicted: torch.Tensor = unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden)))
        return predicted

    def _remember(self, _: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        outermost = self._unet.conv_in.out_channels
        self._inner = inputs[0][:, :-outermost]
