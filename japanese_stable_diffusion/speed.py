"""What makes it fast: the device, its precision, batches that fit, and how layers compute."""

import ctypes
import math
import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.upsampling import Upsample2D
from torch.nn.functional import conv2d, pad

from japanese_stable_diffusion import onednn, winograd
from japanese_stable_diffusion.weights import Weights


class DeviceError(Exception):
    """This machine's GPU can't be used; the message is one line with the way out."""


def choose_device() -> torch.device:
    """The GPU where there is one that this PyTorch can compute on, else the CPU.

    Raises:
        DeviceError: there is a GPU, but its driver is too old or this PyTorch has no kernels for it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PyTorch would warn of here is raised below, in one line
        try:
            (torch.ones(1, device="cuda") + 1).cpu()
        except (AssertionError, RuntimeError) as error:
            return _cpu_unless_gpu_is_unusable(error)
    return torch.device("cuda", torch.cuda.current_device())


def _cpu_unless_gpu_is_unusable(error: Exception) -> torch.device:
    reason = str(error)
    if "too old" in reason:
        raise DeviceError(
            f"GPU: the NVIDIA driver is too old for CUDA {torch.version.cuda}; "
            "install a newer driver, or hide the GPU with CUDA_VISIBLE_DEVICES= to compute on the CPU"
        ) from error
    if "no kernel image" in reason:
        raise DeviceError(
            f"GPU: {torch.cuda.get_device_name()} is not supported by PyTorch {torch.__version__}, which has "
            f"kernels for {', '.join(torch.cuda.get_arch_list())}; use another GPU, or hide it with "
            "CUDA_VISIBLE_DEVICES= to compute on the CPU"
        ) from error
    if torch.cuda.is_available():
        raise DeviceError(f"GPU: {' '.join(reason.split())[:200]}") from error
    return torch.device("cpu")


def choose_dtype(device: torch.device) -> torch.dtype:
    """Half precision on a GPU (the T4 has no bfloat16), single on a CPU, which is slow at half."""
    return torch.float16 if device.type == "cuda" else torch.float32


def memory_budget(device: torch.device) -> int:
    """Bytes that one batch may take: half of what the weights leave of a GPU, a quarter of a machine.

    It depends on the machine and not on what else runs there, so the same request is split into the same
    batches every time; what a busy GPU then lacks is found out by an out-of-memory error.
    """
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return (total - torch.cuda.memory_allocated(device)) // 2
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (bytes_allowed := limit.read_text().strip()).isdigit():
        total = min(total, int(bytes_allowed))
    return total // 4


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that seconds and progress are those of work done and not of work queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory(device: torch.device) -> None:
    """Hand memory that PyTorch keeps for later back to the GPU, so that differently sized work finds room."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def speed_up(weights: Weights, switches: Iterable[str] | None = None) -> None:
    """Make the models of a weights folder compute the same in less time. Next to nothing is copied at once.

    Args:
        weights: loaded; their models are changed in place.
        switches: names from `SWITCHES`; None for all of them.
    """
    for name in SWITCHES if switches is None else switches:
        SWITCHES[name](weights)


def keep_memory(_: Weights | None = None) -> None:
    """Have glibc keep memory that was freed for the next layer, on a CPU.

    It hands large blocks back to the kernel at once, which clears every page of them when they are asked for
    again. What mallopt(3) sets holds for the whole process, in the image and outside of it. Other C libraries
    are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        for parameter, value in _MALLOPT.items():
            mallopt(parameter, value)


_MALLOPT = {
    -8: 1,  # M_ARENA_MAX: threads share the one arena that can grow without mmap(2)
    -4: 0,  # M_MMAP_MAX: no block has a mapping of its own, which would go when it is freed
    -1: 2**31 - 1,  # M_TRIM_THRESHOLD: up to 2 GiB that are free at the end stay
}


CPU_MAX = Path("/sys/fs/cgroup/cpu.max")
"""Microseconds of processor time per period that a container may use, "max" for all, as Linux tells it."""


def limit_threads(_: Weights) -> None:
    """Use no more threads than the container may use processors.

    PyTorch starts one for each processor of the machine. Where the container has a share of them
    (`docker run --cpus`), the threads would wait for each other most of the time.
    """
    if not CPU_MAX.exists():
        return
    allowed, period = CPU_MAX.read_text().split()
    if allowed.isdigit():
        processors = math.ceil(int(allowed) / int(period))
        torch.set_num_threads(max(1, min(torch.get_num_threads(), processors)))


def put_channels_last(weights: Weights) -> None:
    """Keep the channels of a pixel together, as the kernels for convolutions want them on all devices.

    A layer puts out what its input or its weights ask for. On a CPU only the first layers are copied for it,
    and convolutions over single pixels say so, whose weights lie in memory the same either way; the others go
    on with what they get.
    """
    unet, vae = weights.unet, weights.vae
    if weights.device.type != "cpu":
        unet.to(memory_format=torch.channels_last)
        vae.to(memory_format=torch.channels_last)
        return
    for first in (unet.conv_in, vae.encoder.conv_in, vae.decoder.conv_in):
        first.to(memory_format=torch.channels_last)
    for module in (*unet.modules(), *vae.modules()):
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (1, 1):
            outputs, inputs = module.weight.shape[:2]
            weight = module.weight.detach().reshape(outputs, 1, 1, inputs).permute(0, 3, 1, 2)
            module.weight = torch.nn.Parameter(weight, requires_grad=False)
    for module in vae.modules():
        if isinstance(module, Attention):
            module.register_forward_hook(_put_last)


def _put_last(_: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output.contiguous(memory_format=torch.channels_last)


def multiply_by_onednn(weights: Weights) -> None:
    """Compute linear layers, convolutions over single pixels and the UNet's attention by oneDNN on a CPU."""
    if weights.device.type != "cpu":
        return
    for model in (weights.unet, weights.vae):
        for module in model.modules():
            if type(module) is torch.nn.Linear:
                module.__class__ = onednn.Linear
            elif onednn.is_pointwise(module):
                module.__class__ = onednn.Pointwise
    for module in weights.unet.modules():
        if isinstance(module, Attention) and onednn.is_plain(module):
            module.set_processor(onednn.Attending())


class RememberingLinear(onednn.Linear):
    """A linear layer that computes once for one and the same tensor, and then remembers what came out."""

    _input: torch.Tensor | None = None
    _output: torch.Tensor

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., inputs) → (..., outputs)."""
        if self._input is not input:
            self._input, self._output = input, super().forward(input)
        return self._output


def remember_keys(weights: Weights) -> None:
    """Compute keys and values of the text once per prediction: at every step it is the same tensor."""
    for module in weights.unet.modules():
        if isinstance(module, Attention) and module.is_cross_attention:
            module.to_k.__class__ = module.to_v.__class__ = RememberingLinear


class FoldedUpsample(Upsample2D):
    """Twice the size, then a convolution of 3×3, without computing with the same pixel twice.

    The nine pixels that each new pixel is computed from are copies of only four. The weights of copies are
    added up instead, so there are four kernels of 2×2, one for each place in a new square of four. It
    computes 4 products where there were 9, and is the same up to rounding.
    """

    _kernels: dict[tuple[int, int], torch.Tensor] | None = None

    def forward(
        self, hidden_states: torch.Tensor, output_size: Any = None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """(pictures, channels, height, width) → (pictures, channels, 2 · height, 2 · width)."""
        batch, _, height, width = hidden_states.shape
        # A LoRA changes what the convolution itself puts out.
        changed = bool(self.conv._forward_hooks)
        if changed or (output_size is not None and tuple(output_size) != (2 * height, 2 * width)):
            return super().forward(hidden_states, output_size, *args, **kwargs)
        if self._kernels is None:
            self._kernels = _fold(self.conv.weight)
        size = (batch, 2 * height, 2 * width, self.conv.out_channels)
        enlarged = hidden_states.new_empty(size).permute(0, 3, 1, 2)
        for (row, column), kernel in self._kernels.items():
            around = pad(hidden_states, (1 - column, column, 1 - row, row))
            enlarged[:, :, row::2, column::2] = conv2d(around, kernel, self.conv.bias)
        return enlarged


def _fold(weight: torch.Tensor) -> dict[tuple[int, int], torch.Tensor]:
    """Kernels (outputs, inputs, 2, 2) for each place in a square, of one kernel (outputs, inputs, 3, 3)."""

    def add_up(kernel: torch.Tensor, place: int, dim: int) -> torch.Tensor:
        first, second, third = kernel.unbind(dim)
        pair = (first, second + third) if place == 0 else (first + second, third)
        return torch.stack(pair, dim)

    return {
        (row, column): add_up(add_up(weight, row, 2), column, 3).contiguous()
        for row in (0, 1)
        for column in (0, 1)
    }


def fold_upsampling(weights: Weights) -> None:
    """Make every upsampling with a convolution, on a CPU, a `FoldedUpsample`.

    On a GPU its kernels would be rounded once more, to half precision.
    """
    if weights.device.type != "cpu":
        return
    for model in (weights.unet, weights.vae):
        for module in model.modules():
            if type(module) is Upsample2D and _is_plain(module):
                module.__class__ = FoldedUpsample


def _is_plain(module: Upsample2D) -> bool:
    return (
        module.name == "conv"
        and isinstance(module.conv, torch.nn.Conv2d)
        and module.conv.kernel_size == (3, 3)
        and module.conv.padding == (1, 1)
        and module.norm is None
        and module.interpolate
    )


def filter_minimally(weights: Weights) -> None:
    """Make convolutions of many channels `WinogradConv2d` on a CPU, as far as memory for their kernels goes.

    With the weights themselves they may take half of the machine. Those with the fewest channels go first:
    they see the most pixels.
    """
    if weights.device.type != "cpu":
        return
    count = sum(tensor.numel() for model in weights.models for tensor in model.parameters())
    held = count * weights.dtype.itemsize
    budget = 2 * memory_budget(weights.device) - held
    layers = [
        module
        for model in (weights.unet, weights.vae)
        for module in model.modules()
        if isinstance(module, torch.nn.Conv2d) and winograd.fits(module)
    ]
    for layer in sorted(layers, key=lambda layer: layer.weight.numel()):
        budget -= winograd.kernel_bytes(layer)
        if budget < 0:
            break
        layer.__class__ = winograd.WinogradConv2d


SWITCHES: dict[str, Callable[[Weights], None]] = {
    "keep_memory": keep_memory,
    "limit_threads": limit_threads,
    "put_channels_last": put_channels_last,
    "multiply_by_onednn": multiply_by_onednn,
    "remember_keys": remember_keys,
    "fold_upsampling": fold_upsampling,
    "filter_minimally": filter_minimally,
}
"""All that `speed_up` does, by name. `scripts/benchmark --switches` measures each alone."""
