"""Where a picture came from: the parameters that every file carries, by which the picture can be made again.

They are one text in the form that Stable Diffusion web UI (AUTOMATIC1111) introduced and other tools read:
the prompt, the negative prompt if there is one, and a line of settings. PNG files carry it as the text chunk
`parameters`, JPEG and WebP files as the EXIF tag UserComment.
"""

import hashlib
import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, PngImagePlugin

from japanese_stable_diffusion import watermark
from japanese_stable_diffusion.request import Request, RequestError

SAMPLERS = {
    "DPMSolverMultistep": "DPM++ 2M",
    "PNDM": "PLMS",
    "DDIM": "DDIM",
    "KLMS": "LMS",
    "K_EULER": "Euler",
    "K_EULER_ANCESTRAL": "Euler a",
    "UniPC": "UniPC",
    "LCM": "LCM",
}
"""Our scheduler names → those of the web UI."""

_CHUNK = "parameters"
_NEGATIVE = "\nNegative prompt: "
_SETTING = re.compile(r'\s*([^:,]+):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')
# EXIF 2.3, section 4.6.5: a UserComment begins with 8 bytes that name its character code.
_UNICODE = b"UNICODE\0"


class ProvenanceError(Exception):
    """A file doesn't say how its picture was made; the message is one line that names the file and why."""


@dataclass(frozen=True)
class Parameters:
    """What made one picture.

    Attributes:
        request: for this picture alone, with its own seed.
        weights: name of the weights.
        weights_version: their version; may be empty.
        image_hash: of the picture file that it was made from, the first 16 hexadecimal digits of its SHA-256;
            empty if it was made from none.
        mask_hash: likewise of the mask file.
        lora_hash: likewise of the LoRA file.
    """

    request: Request
    weights: str
    weights_version: str
    image_hash: str = ""
    mask_hash: str = ""
    lora_hash: str = ""

    def __str__(self) -> str:
        request = self.request
        settings: dict[str, object] = {
            "Steps": request.num_inference_steps,
            "Sampler": SAMPLERS[request.scheduler],
            "CFG scale": request.guidance_scale,
            "Seed": request.seed,
            "Size": f"{request.width}x{request.height}",
            "Model": self.weights,
        }
        if self.weights_version:
            settings["Model version"] = self.weights_version
        if self.image_hash:
            settings["Denoising strength"] = request.prompt_strength
            settings["Init image hash"] = self.image_hash
        if self.mask_hash:
            settings["Mask hash"] = self.mask_hash
        if request.variation_strength:
            settings["Variation seed"] = request.variation_seed
            settings["Variation seed strength"] = request.variation_strength
        if self.lora_hash:
            settings["Lora hash"] = self.lora_hash
            settings["Lora scale"] = request.lora_scale
        if request.output_format != "png":
            settings["Output format"] = request.output_format
            settings["Output quality"] = request.output_quality
        if not request.second_pass:
            settings["Second pass"] = "off"
        if request.go_fast:
            settings["Go fast"] = "on"
        if _NEGATIVE in f"\n{request.prompt}":
            settings["Prompt length"] = len(request.prompt)
        settings["Version"] = "japanese-stable-diffusion"
        negative = f"{_NEGATIVE}{request.negative_prompt}" if request.negative_prompt else ""
        line = ", ".join(f"{name}: {_quote(str(value))}" for name, value in settings.items())
        return f"{request.prompt}{negative}\n{line}"


def parse(text: str) -> Parameters:
    """The parameters that a text in the web UI's form gives, ours or that of another tool.

    Raises:
        ProvenanceError: a setting is missing or isn't possible here; the message names it, but no file.
    """
    prompts, _, line = text.rpartition("\n")
    settings = {name: _unquote(value) for name, value in _SETTING.findall(line)}
    if "Prompt length" in settings:
        length = _number("Prompt length", settings, int)
        prompt, negative = prompts[:length], prompts[length:].removeprefix(_NEGATIVE)
    else:
        prompt, _, negative = f"\n{prompts}".partition(_NEGATIVE)
        prompt = prompt[1:]
    schedulers = {sampler: scheduler for scheduler, sampler in SAMPLERS.items()}
    sampler = _setting("Sampler", settings)
    if sampler not in schedulers:
        raise ProvenanceError(f"Sampler {sampler!r} is not offered here; {', '.join(schedulers)} are")
    size = re.fullmatch(r"(\d{1,5})x(\d{1,5})", _setting("Size", settings))
    if not size:
        raise ProvenanceError(f"Size {settings['Size']!r} is not WIDTHxHEIGHT")
    try:
        request = Request(
            prompt=prompt,
            negative_prompt=negative,
            width=int(size[1]),
            height=int(size[2]),
            num_inference_steps=_number("Steps", settings, int),
            guidance_scale=_number("CFG scale", settings, float),
            scheduler=schedulers[sampler],
            seed=_number("Seed", settings, int),
            **_optional(settings),
        )
    except RequestError as error:
        raise ProvenanceError(str(error)) from error
    return Parameters(
        request,
        settings.get("Model", ""),
        settings.get("Model version", ""),
        settings.get("Init image hash", ""),
        settings.get("Mask hash", ""),
        settings.get("Lora hash", ""),
    )


def hash_file(file: Path) -> str:
    """By which a file is known again: the first 16 hexadecimal digits of its SHA-256."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:16]


def save_options(file_format: str, parameters: Parameters) -> dict[str, Any]:
    """What `Image.save` is to be given beside the picture for the file to carry `parameters`.

    Args:
        file_format: as Pillow calls it: PNG, JPEG or WEBP.
    """
    text = str(parameters)
    if file_format == "PNG":
        chunks = PngImagePlugin.PngInfo()
        chunks.add_text(_CHUNK, text)
        return {"pnginfo": chunks}
    exif = Image.Exif()
    # Readers disagree whether UTF-16 follows the byte order of the EXIF block or is big-endian: let both be.
    exif.endian = ">"
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = _UNICODE + text.encode("utf-16-be")
    return {"exif": exif}


def read_text(picture: Image.Image) -> str | None:
    """The parameters text that an opened file carries, in whichever form; None if it carries none."""
    text = picture.info.get(_CHUNK)
    if isinstance(text, str):
        return str(text)
    try:
        with warnings.catch_warnings(action="ignore"):
            comment = picture.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    except Exception:  # whatever Pillow's parser stumbles over in damaged data
        return None
    if isinstance(comment, bytes) and comment.startswith(_UNICODE):
        return comment.removeprefix(_UNICODE).decode("utf-16-be", errors="replace")
    return None


def read_parameters(file: Path) -> Parameters:
    """How the picture in a file was made.

    Raises:
        ProvenanceError: it can't be read, or doesn't say; the message names the file.
    """
    try:
        with open_picture(file) as picture:
            text = read_text(picture)
        if text is None:
            raise ProvenanceError(
                "carries no parameters; only files as they were made do, not screenshots or copies"
            )
        return parse(text)
    except ProvenanceError as error:
        raise ProvenanceError(f"{file}: {error}") from error


def examine(file: Path) -> tuple[str | None, watermark.Detection]:
    """The parameters text that a file carries, if it carries one, and what is found of the watermark.

    Raises:
        ProvenanceError: it can't be read; the message names the file.
    """
    try:
        with open_picture(file) as picture:
            return read_text(picture), watermark.detect(picture)
    except ProvenanceError as error:
        raise ProvenanceError(f"{file}: {error}") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise ProvenanceError(f"{file}: is truncated or damaged") from error


def open_picture(file: Path) -> Image.Image:
    """Open a picture file of a format that can carry parameters.

    Raises:
        ProvenanceError: it isn't there or isn't such a file; the message doesn't name it.
    """
    try:
        return Image.open(file, formats=("PNG", "JPEG", "WEBP"))
    except FileNotFoundError:
        raise ProvenanceError("is not there") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ProvenanceError("is not a PNG, JPEG or WebP picture that can be read") from error


def _optional(settings: dict[str, str]) -> dict[str, Any]:
    inputs: dict[str, Any] = {}
    if "Init image hash" in settings:
        inputs["prompt_strength"] = _number("Denoising strength", settings, float)
    if "Variation seed strength" in settings:
        inputs["variation_seed"] = _number("Variation seed", settings, int)
        inputs["variation_strength"] = _number("Variation seed strength", settings, float)
    if "Lora hash" in settings:
        inputs["lora_scale"] = _number("Lora scale", settings, float)
    if "Second pass" in settings:
        inputs["second_pass"] = settings["Second pass"] != "off"
    if "Go fast" in settings:
        inputs["go_fast"] = settings["Go fast"] == "on"
    if "Output format" in settings:
        inputs["output_format"] = settings["Output format"]
        inputs["output_quality"] = _number("Output quality", settings, int)
    return inputs


def _setting(name: str, settings: dict[str, str]) -> str:
    if name not in settings:
        raise ProvenanceError(f"{name} is missing from its parameters")
    return settings[name]


def _number(name: str, settings: dict[str, str], kind: type[int] | type[float]) -> Any:
    try:
        return kind(_setting(name, settings))
    except ValueError:
        raise ProvenanceError(f"{name} {settings[name]!r} is not a number") from None


def _quote(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r'[,:"\n]', value) else value


def _unquote(value: str) -> str:
    if value.startswith('"') and value.endswith('"'):
        try:
            return str(json.loads(value))
        except ValueError:
            pass
    return value.strip()
