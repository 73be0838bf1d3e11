"""Upstream's way of making a picture and ours, in turn: seconds, evaluations, FLOP, memory."""

import importlib
import importlib.util
import json
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextModel, logging

from japanese_stable_diffusion import onednn
from japanese_stable_diffusion.benchmarks.attempts import ATTEMPTS
from japanese_stable_diffusion.benchmarks.loading import memory
from japanese_stable_diffusion.pipeline import Figures, Pipeline, encode, vae_factor
from japanese_stable_diffusion.request import Request
from japanese_stable_diffusion.speed import SWITCHES, choose_device, choose_dtype, speed_up
from japanese_stable_diffusion.tokenizer import Tokenizer
from japanese_stable_diffusion.weights import load_weights

UPSTREAM_STEPS = 50
"""Denoising steps of upstream's own predictor, which PNDM takes 51 evaluations for."""


@dataclass(frozen=True)
class Job:
    """What every way is given.

    Attributes:
        prompt: of the pictures.
        width: in pixels, as the UNet sees them.
        height: likewise.
        pictures: made together.
        seed: of the first.
    """

    prompt: str = "サラリーマン 油絵"
    width: int = 512
    height: int = 512
    pictures: int = 1
    seed: int = 1


@dataclass(frozen=True)
class Measured:
    """One thing done once by one way.

    Attributes:
        way: whose.
        what: `evaluate` (the UNet once, with guidance), `decode` (one picture) or `make` (whole pictures).
        seconds: wall clock.
        evaluations: of the UNet, for `make`; 1 otherwise.
        peak_bytes: most memory that the way's process held so far, its libraries among it.
    """

    way: str
    what: str
    seconds: float
    evaluations: int
    peak_bytes: int


class Upstream:
    """Stock diffusers as upstream used it: float32, PNDM, 50 steps, nothing of this project but token ids."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer(folder / "tokenizer")
        self.unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
        self.vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32)
        self.text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", torch_dtype=torch.float32)
        # With the pipeline comes a safety checker, which asks for torchvision and isn't used here.
        logging.set_verbosity_error()
        from diffusers import StableDiffusionPipeline

        self._pipeline = StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=None,
            unet=self.unet,
            scheduler=PNDMScheduler.from_pretrained(
                folder / "scheduler", skip_prk_steps=True, steps_offset=1
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        self._pipeline.set_progress_bar_config(disable=True)

    @torch.inference_mode()
    def evaluate(self, job: Job) -> int:
        """Predict the noise of a batch with guidance, once."""
        self.unet(*self.inputs(job))
        return 1

    @torch.inference_mode()
    def decode(self, job: Job) -> int:
        """Decode the latents of one picture."""
        latents = torch.randn(self._shape(job), generator=torch.Generator().manual_seed(job.seed))[None]
        self.vae.decode(latents)
        return 1

    @torch.inference_mode()
    def make(self, job: Job) -> int:
        """Make whole pictures; returns how often the UNet was evaluated."""
        evaluations = 0

        def count(*_: object) -> None:
            nonlocal evaluations
            evaluations += 1

        handle = self.unet.register_forward_hook(count)
        self._pipeline(
            prompt_embeds=encode(self.tokenizer(job.prompt).ids, self.text_encoder),
            negative_prompt_embeds=encode(self.tokenizer("").ids, self.text_encoder),
            width=job.width,
            height=job.height,
            num_images_per_prompt=job.pictures,
            num_inference_steps=UPSTREAM_STEPS,
            guidance_scale=Request.guidance_scale,
            generator=[torch.Generator().manual_seed(job.seed + i) for i in range(job.pictures)],
        )
        handle.remove()
        return evaluations

    @torch.inference_mode()
    def flops(self, job: Job) -> int:
        """Floating-point operations of `evaluate`, by PyTorch's counter."""
        with FlopCounterMode(display=False) as counter:
            self.evaluate(job)
        return int(counter.get_total_flops())

    def _shape(self, job: Job) -> tuple[int, int, int]:
        factor = vae_factor(self.vae)
        return self.unet.config["in_channels"], job.height // factor, job.width // factor

    def inputs(self, job: Job) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What `evaluate` gives the UNet: latents of the job's size and text, both random, and a timestep."""
        generator = torch.Generator().manual_seed(job.seed)
        latents = torch.randn(2 * job.pictures, *self._shape(job), generator=generator)
        text = torch.randn(2 * job.pictures, 77, self.unet.config["cross_attention_dim"], generator=generator)
        return latents, torch.tensor(500), text


class Compiled(Upstream):
    """Stock diffusers, its UNet compiled by torch.compile."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.unet.compile()


class OpenVINO(Upstream):
    """Stock diffusers' UNet, run by OpenVINO."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._compiled: Any = None

    @torch.inference_mode()
    def evaluate(self, job: Job) -> int:
        """Predict the noise of a batch with guidance, once."""
        openvino = importlib.import_module("openvino")
        latents, timestep, text = self.inputs(job)
        if self._compiled is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # tracing warns of every branch in diffusers' code
                converted = openvino.convert_model(self.unet, example_input=(latents, timestep, text))
            precision = {"INFERENCE_PRECISION_HINT": "f32"}
            self._compiled = openvino.compile_model(converted, "CPU", precision)
        self._compiled([latents.numpy(), timestep.numpy(), text.numpy()])
        return 1


class Ours(Upstream):
    """What `predict.py` runs.

    Args:
        folder: with the weights.
        switches: of `speed.py`; None for all.
        go_fast: as the input of that name.
        attempt: one of `ATTEMPTS` on top; none if empty.
    """

    def __init__(
        self,
        folder: Path,
        switches: Sequence[str] | None = None,
        go_fast: bool = False,
        attempt: str = "",
    ) -> None:
        device = choose_device()
        weights = load_weights(folder, device, choose_dtype(device))
        speed_up(weights, switches)
        if attempt:
            ATTEMPTS[attempt](weights)
        self.unet, self.vae = weights.unet, weights.vae
        self._go_fast = go_fast
        self._ours = Pipeline(weights)

    @torch.inference_mode()
    def make(self, job: Job) -> int:
        """Make whole pictures; returns how often all of the UNet was evaluated."""
        figures = Figures()
        request = Request(
            prompt=job.prompt,
            width=job.width,
            height=job.height,
            num_outputs=job.pictures,
            seed=job.seed,
            go_fast=self._go_fast,
            second_pass=False,
        )
        for _ in self._ours.generate(request, figures):
            pass
        return figures.unet_evaluations


WAYS: dict[str, Callable[[Path], Upstream]] = {
    "upstream": Upstream,
    "ours": Ours,
    "go_fast": partial(Ours, go_fast=True),
    "torch.compile": Compiled,
    "openvino": OpenVINO,
    "no switches": partial(Ours, switches=()),
    **{f"{name} alone": partial(Ours, switches=(name,)) for name in SWITCHES},
    **{name: partial(Ours, attempt=name) for name in ATTEMPTS},
}
"""All ways that can be measured, by name."""
PEERS = {"torch.compile": "torch", "openvino": "openvino"}
"""Ways that need a package, which may not be installed."""


class Process:
    """A way in a process of its own, with its own memory and its own settings of the C library.

    Attributes:
        setup: seconds that loading the weights took, imports not counted.
    """

    def __init__(self, way: str, folder: Path) -> None:
        self._way = way
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, way, folder), daemon=True)
        self._process.start()
        theirs.close()
        self.setup = float(self._pipe.recv())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pipe.close()
        self._process.join(10)
        self._process.kill()

    def measure(self, what: str, job: Job) -> Measured:
        """Do one thing once. What the process dies of is raised as EOFError."""
        self._pipe.send((what, job))
        seconds, evaluations, peak = self._pipe.recv()
        return Measured(self._way, what, seconds, evaluations, peak)


def _serve(pipe: Connection, way: str, folder: Path) -> None:
    started = time.perf_counter()
    doer = WAYS[way](folder)
    pipe.send(time.perf_counter() - started)
    while True:
        try:
            what, job = pipe.recv()
        except EOFError:
            return
        started = time.perf_counter()
        result = getattr(doer, what)(job)
        pipe.send((time.perf_counter() - started, result, memory("VmHWM")))


def is_installed(way: str) -> bool:
    """Whether a way can be measured here."""
    return way not in PEERS or importlib.util.find_spec(PEERS[way]) is not None


def compare(
    folder: Path, ways: Sequence[str], things: Sequence[str], job: Job, rounds: int, flops: int = 0
) -> dict[str, Any]:
    """Have all ways do the same things in turn, A B A B, each in a process that stays.

    Args:
        folder: with the weights.
        ways: names from `WAYS`; the first is what the others are compared with.
        things: `evaluate`, `decode`, `make`.
        job: the same for all.
        rounds: how often; one more of `evaluate` and `decode` goes before, which isn't counted.
        flops: of `evaluate`, if known; 0 has the first way count them, which must not be ours: PyTorch's
            counter doesn't know oneDNN's products.

    Returns:
        What `describe` shows, ready to be stored as JSON.
    """
    with ExitStack() as stack:
        processes = {way: stack.enter_context(Process(way, folder)) for way in ways}
        first = processes[ways[0]]
        flops = flops or first.measure("flops", job).evaluations
        measured: list[Measured] = []
        for what in things:
            for turn in range(rounds + (what != "make")):
                taken = [process.measure(what, job) for process in processes.values()]
                if turn or what == "make":
                    measured += taken
    return {
        "job": asdict(job),
        "weights": folder.name,
        "threads": torch.get_num_threads(),
        "matrix_multiply_flops_per_second": matrix_multiply_peak(),
        "flops_per_evaluation": flops,
        "setup_seconds": {way: process.setup for way, process in processes.items()},
        "measured": [asdict(one) for one in measured],
    }


def matrix_multiply_peak(size: int = 2048, runs: int = 5) -> float:
    """FLOP per second of the fastest of some products of square float32 matrices, by PyTorch or by oneDNN."""
    matrix = torch.randn(size, size)
    seconds = []
    for _ in range(runs):
        for multiply in (torch.matmul, onednn.linear):
            started = time.perf_counter()
            multiply(matrix, matrix)
            seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


def describe(report: dict[str, Any]) -> str:
    """A table with a line for each way and thing: medians, and the ratio to the first way turn by turn."""
    job, peak, flops = (
        report["job"],
        report["matrix_multiply_flops_per_second"],
        report["flops_per_evaluation"],
    )
    lines = [
        f"{report['weights']}: {job['pictures']} × {job['width']} × {job['height']}, "
        f"{report['threads']} threads; {flops / 1e9:.0f} GFLOP per evaluation, "
        f"matrix products at {peak / 1e9:.0f} GFLOP/s",
        f"{'what':<10}{'way':<34}{'seconds':>10}{'evaluations':>13}{'ratio':>8}{'(each turn)':>22}"
        f"{'of peak':>9}{'memory':>10}{'setup':>9}",
    ]
    measured = [Measured(**one) for one in report["measured"]]
    first = measured[0].way
    for what in dict.fromkeys(one.what for one in measured):
        reference = [one.seconds for one in measured if one.what == what and one.way == first]
        for way in dict.fromkeys(one.way for one in measured):
            mine = [one for one in measured if one.what == what and one.way == way]
            ratios = [one.seconds / other for one, other in zip(mine, reference, strict=True)]
            seconds = statistics.median(one.seconds for one in mine)
            share = f"{flops / seconds / peak:.0%}" if what == "evaluate" else ""
            each = " ".join(f"{ratio:.2f}" for ratio in ratios)
            lines.append(
                f"{what:<10}{way:<34}{seconds:>10.2f}{mine[0].evaluations:>13}{statistics.median(ratios):>8.2f}"
                f"{f'({each})':>22}{share:>9}{max(one.peak_bytes for one in mine) / 1e9:>7.1f} GB"
                f"{report['setup_seconds'][way]:>7.1f} s"
            )
    return "\n".join(lines)


def write(report: dict[str, Any], file: Path) -> None:
    """Store a report as JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
