"""What makes it fast: the device, its precision, and how many pictures are made at once."""

import os
import warnings
from pathlib import Path

import torch


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
