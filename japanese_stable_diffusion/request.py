"""What may be asked for: one frozen dataclass, its limits and its errors.

The limits live here and nowhere else. `predict.py` repeats them as literals, because Cog reads that file
without running it; a test holds the two together.
"""

import secrets
from dataclasses import dataclass, replace
from pathlib import Path

from japanese_stable_diffusion import emphasis

PROMPT_LENGTH = 1000
"""Most characters in a prompt."""
WEIGHTS = (0.0, 10.0)
"""Allowed weights of a part of a prompt, with those of all brackets around it multiplied."""
SIDES = tuple(range(64, 1024 + 1, 64))
"""Allowed widths and heights, in pixels."""
PIXELS = 786_432
"""Most pixels in one picture: 1024 × 768."""
LORA_BYTES = 1_000_000_000
"""Most bytes of a LoRA file; one of rank 128 for all layers of Stable Diffusion v1 has a third of it."""
LORA_SCALE = (0.0, 5.0)
VARIATION_STRENGTH = (0.0, 1.0)
NUM_OUTPUTS = (1, 8)
NUM_INFERENCE_STEPS = (1, 500)
GUIDANCE_SCALE = (1.0, 20.0)
SEEDS = (0, 2**32 - 1)
PROMPT_STRENGTH = (0.0, 1.0)
PICTURE_BYTES = 50_000_000
"""Most bytes of a picture file that is sent."""
PICTURE_PIXELS = 50_000_000
"""Most pixels in a picture that is sent."""
OUTPUT_FORMATS = ("png", "jpg", "webp")
OUTPUT_QUALITY = (0, 100)
SCHEDULERS = ("DPMSolverMultistep", "PNDM", "DDIM", "KLMS", "K_EULER", "K_EULER_ANCESTRAL", "UniPC", "LCM")
LCM_STEPS = 50
"""Steps of the grid that latent consistency models are distilled on, and so the most that LCM can take."""


_URL_ALLOWED = "an http, https or data URL is allowed"


class RequestError(ValueError):
    """A value that may not be asked for, told in one line: `input: what was wrong; what is allowed`."""


@dataclass(frozen=True)
class Request:
    """What one prediction is asked for, checked as it is made.

    The fields are the inputs of `predict.py`, in the same order.

    Raises:
        RequestError: a value is of the wrong type or outside its limits; the message names the input.
    """

    prompt: str = "サラリーマン 油絵"
    negative_prompt: str = ""
    width: int = 512
    height: int = 512
    num_outputs: int = 1
    num_inference_steps: int = 20
    guidance_scale: float = 7.5
    scheduler: str = "DPMSolverMultistep"
    seed: int | None = None
    image: Path | None = None
    prompt_strength: float = 0.8
    mask: Path | None = None
    output_format: str = "png"
    output_quality: int = 90
    variation_seed: int | None = None
    variation_strength: float = 0.0
    lora: Path | None = None
    lora_scale: float = 1.0
    second_pass: bool = True
    go_fast: bool = False

    def __post_init__(self) -> None:
        _check_text("prompt", self.prompt)
        _check_text("negative_prompt", self.negative_prompt)
        _check_side("width", self.width)
        _check_side("height", self.height)
        if self.width * self.height > PIXELS:
            raise RequestError(
                f"width, height: {self.width} × {self.height} is {self.width * self.height:,} pixels; "
                f"together at most {PIXELS:,} are allowed, such as 1024 × 768"
            )
        _check_integer("num_outputs", self.num_outputs, *NUM_OUTPUTS)
        _check_integer("num_inference_steps", self.num_inference_steps, *NUM_INFERENCE_STEPS)
        _check_number("guidance_scale", self.guidance_scale, *GUIDANCE_SCALE)
        _check_choice("scheduler", self.scheduler, SCHEDULERS)
        if self.scheduler == "LCM" and self.num_inference_steps > LCM_STEPS:
            raise RequestError(
                f"num_inference_steps: {self.num_inference_steps} is more than the scheduler LCM can take; "
                f"with it, a whole number from 1 to {LCM_STEPS} is allowed, and 4 to 8 is plenty"
            )
        if self.seed is not None:
            _check_integer("seed", self.seed, *SEEDS)
        _check_file("image", self.image)
        _check_number("prompt_strength", self.prompt_strength, *PROMPT_STRENGTH)
        _check_file("mask", self.mask)
        if self.mask is not None and self.image is None:
            raise RequestError("mask: is given without a picture to paint into; give image too")
        _check_choice("output_format", self.output_format, OUTPUT_FORMATS)
        _check_integer("output_quality", self.output_quality, *OUTPUT_QUALITY)
        if self.variation_seed is not None:
            _check_integer("variation_seed", self.variation_seed, *SEEDS)
        _check_number("variation_strength", self.variation_strength, *VARIATION_STRENGTH)
        _check_file("lora", self.lora)
        _check_number("lora_scale", self.lora_scale, *LORA_SCALE)
        _check_switch("second_pass", self.second_pass)
        _check_switch("go_fast", self.go_fast)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seed of each picture: `seed + i` mod 2³².

        Raises:
            ValueError: no seed has been drawn yet, see `with_seed`.
        """
        if self.seed is None:
            raise ValueError("the request has no seed yet")
        return tuple(_add(self.seed, i) for i in range(self.num_outputs))

    def with_seed(self) -> "Request":
        """The same request, with seeds drawn at random where it had none and needs one."""
        request = self
        if request.seed is None:
            request = replace(request, seed=secrets.randbelow(SEEDS[1] + 1))
        if request.variation_seed is None and request.variation_strength:
            request = replace(request, variation_seed=secrets.randbelow(SEEDS[1] + 1))
        return request

    def alone(self, i: int) -> "Request":
        """The request that makes picture i, from 0, by itself: `seed + i` and `variation_seed + i` mod 2³².

        Raises:
            ValueError: no seed has been drawn yet, see `with_seed`.
        """
        variation_seed = None if self.variation_seed is None else _add(self.variation_seed, i)
        return replace(self, seed=self.seeds[i], variation_seed=variation_seed, num_outputs=1)


def _add(seed: int, i: int) -> int:
    return (seed + i) % (SEEDS[1] + 1)


def _show(value: object) -> str:
    """The value as one short line, whatever a stranger sent."""
    try:
        shown = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    except ValueError:  # Python refuses to write out integers of thousands of digits
        return "a number of thousands of digits"
    shown = " ".join(shown.split())
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _check_text(name: str, value: object) -> None:
    allowed = f"a text of up to {PROMPT_LENGTH:,} characters is allowed"
    if not isinstance(value, str):
        raise RequestError(f"{name}: {_show(value)} is not a text; {allowed}")
    if len(value) > PROMPT_LENGTH:
        raise RequestError(f"{name}: is {len(value):,} characters long; {allowed}")
    if "\0" in value:
        raise RequestError(
            f"{name}: holds a NUL character at position {value.index(chr(0))}; {allowed}, without NUL"
        )
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise RequestError(f"{name}: holds half a character (a lone surrogate); {allowed}, in valid Unicode")
    for fragment in emphasis.parse(value):
        if not WEIGHTS[0] <= fragment.weight <= WEIGHTS[1]:
            raise RequestError(
                f"{name}: {_show(fragment.text)} is given the weight {fragment.weight:g}; "
                f"{WEIGHTS[0]:g} to {WEIGHTS[1]:g} is allowed, and \\( and \\) are plain brackets"
            )


def _check_file(name: str, value: object) -> None:
    # Cog's server hands over what it fetched from a URL as a Path. A path or file:// URL that a caller wrote
    # comes through as it was written, a text: refusing texts keeps strangers from the server's own files.
    if value is not None and not isinstance(value, Path):
        raise RequestError(f"{name}: {_show(value)} is not a file that was sent; {_URL_ALLOWED}")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise RequestError(f"{name}: {_show(value)} is unknown; allowed are {', '.join(choices)}")


def _check_integer(name: str, value: object, low: int, high: int) -> None:
    allowed = f"a whole number from {low} to {high} is allowed"
    if not isinstance(value, int) or isinstance(value, bool):
        raise RequestError(f"{name}: {_show(value)} is not a whole number; {allowed}")
    if not low <= value <= high:
        raise RequestError(f"{name}: {_show(value)} is out of range; {allowed}")


def _check_switch(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise RequestError(f"{name}: {_show(value)} is not a switch; true or false is allowed")


def _check_side(name: str, value: object) -> None:
    allowed = f"a multiple of 64 from {SIDES[0]} to {SIDES[-1]} is allowed"
    if not isinstance(value, int) or isinstance(value, bool):
        raise RequestError(f"{name}: {_show(value)} is not a whole number; {allowed}")
    if value not in SIDES:
        raise RequestError(f"{name}: {_show(value)} is not possible; {allowed}")


def _check_number(name: str, value: object, low: float, high: float) -> None:
    allowed = f"a number from {low:g} to {high:g} is allowed"
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise RequestError(f"{name}: {_show(value)} is not a number; {allowed}")
    if not low <= value <= high:
        raise RequestError(f"{name}: {_show(value)} is out of range; {allowed}")
