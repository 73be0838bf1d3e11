"""Find, verify and load a weights folder.

A folder has the layout of a diffusers pipeline: `tokenizer/`, `text_encoder/`, `unet/`, `vae/`, `scheduler/`
and maybe `safety_checker/` with `feature_extractor/`. Its tensors are safetensors, or the pickles of a 2022
download, read with `weights_only=True` and nothing else. A `manifest.json` may say what the folder is.
"""

import hashlib
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Container, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPTextConfig, CLIPTextModel
from transformers.initialization import no_init_weights

from japanese_stable_diffusion.request import LCM_STEPS, Request
from japanese_stable_diffusion.schedulers import make_scheduler
from japanese_stable_diffusion.tokenizer import MAX_LENGTH, Tokenizer

WEIGHTS = Path(__file__).resolve().parent.parent / "weights"
"""Where weights folders are kept: beside the package, wherever it is run from."""
MANIFEST = "manifest.json"
TENSOR_FILES = (
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin",
)
"""Names under which the tensors of a model are kept in its folder, best first."""
WAY_OUT = "fetch the weights again with scripts/download-weights, or name another folder in JSD_WEIGHTS"


Model = TypeVar("Model", bound=torch.nn.Module)


class WeightsError(Exception):
    """A weights folder can't be used; the message is one line that names the file and the way out."""


@dataclass(frozen=True)
class File:
    """Size in bytes and SHA-256, in hexadecimal, of one file of a weights folder."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Source:
    """Where art, words or weights came from, and on what terms."""

    name: str
    licence: str
    url: str
    what: str


@dataclass(frozen=True)
class Training:
    """What made the weights: commit of this repository, configuration, seed and data."""

    commit: str
    configuration: str
    seed: int
    data: str


@dataclass(frozen=True)
class Manifest:
    """What a weights folder says about itself, in `manifest.json`.

    Attributes:
        name: of the weights.
        version: of the weights.
        native_size: side in pixels of the square pictures that the model was trained on.
        few_steps: 0 for an ordinary model; above it, the weights are distilled to make pictures in so many
            steps with the scheduler LCM and without guidance.
        enlarge: 1 if pictures are made at the size asked for; above it, they are made with about
            `native_size`² pixels and enlarged to the size asked for.
        guidance_scale: what the default of a request's stands for with these weights; others are in
            proportion. Small models overshoot their colours where large ones don't.
        files: size and hash of each file, by its path in the folder with forward slashes.
        sources: where it all came from.
        training: what made the weights; None if they were not trained by this repository.
    """

    name: str
    version: str = ""
    native_size: int = 512
    enlarge: int = 1
    few_steps: int = 0
    guidance_scale: float = Request.guidance_scale
    files: dict[str, File] = field(default_factory=dict)
    sources: list[Source] = field(default_factory=list)
    training: Training | None = None


@dataclass(frozen=True)
class SafetyChecker:
    """The NSFW check that came with the weights: turns PIL pictures into its pixels, and judges those."""

    image_processor: CLIPImageProcessorPil
    model: StableDiffusionSafetyChecker


@dataclass(frozen=True)
class Weights:
    """A loaded weights folder.

    Attributes:
        dtype: in which text encoder, UNet and safety checker compute. The VAE is in float32 always: its
            activations overflow float16.
    """

    folder: Path
    manifest: Manifest
    tokenizer: Tokenizer
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    scheduler_config: dict[str, Any]
    safety: SafetyChecker | None
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return torch.device(self.unet.device)

    @property
    def models(self) -> list[torch.nn.Module]:
        """All models of the folder, the safety checker too if it has one."""
        models: list[torch.nn.Module] = [self.text_encoder, self.unet, self.vae]
        return [*models, self.safety.model] if self.safety else models

    def convert(self) -> None:
        """Convert now what was loaded `lazily` and hasn't been used yet."""
        for model in self.models:
            if model is not self.vae:
                for module in model.modules():
                    _convert(module, self.dtype)


def find_weights() -> Path:
    """The folder in `JSD_WEIGHTS`, else `weights/japanese-stable-diffusion`, else `weights/demo`.

    Raises:
        WeightsError: there is no such folder.
    """
    named = os.environ.get("JSD_WEIGHTS")
    if named:
        folder = Path(named)
        if not folder.is_dir():
            raise WeightsError(f"JSD_WEIGHTS: {named} is not a folder; name one, or leave JSD_WEIGHTS unset")
        return folder
    for folder in (WEIGHTS / "japanese-stable-diffusion", WEIGHTS / "demo"):
        if folder.is_dir():
            return folder
    raise WeightsError(f"{WEIGHTS}: holds no weights; {WAY_OUT}")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a weights folder; one made up from the folder's name if it carries none.

    Raises:
        WeightsError: `manifest.json` is there, but is not a manifest.
    """
    path = folder / MANIFEST
    if not path.exists():
        return Manifest(name=folder.resolve().name)
    content = _read_json(path)
    try:
        manifest = Manifest(
            **{
                **content,
                "files": {name: File(**file) for name, file in content.get("files", {}).items()},
                "sources": [Source(**source) for source in content.get("sources", [])],
                "training": Training(**content["training"]) if content.get("training") else None,
            }
        )
    except (AttributeError, TypeError) as error:
        raise WeightsError(f"{path}: is not a manifest of weights ({_one_line(error)}); {WAY_OUT}") from error
    for name, low, high in (("native_size", 8, 2**16), ("enlarge", 1, 2**16), ("few_steps", 0, LCM_STEPS)):
        value = getattr(manifest, name)
        if type(value) is not int or not low <= value <= high:
            raise WeightsError(
                f"{path}: {name} is {value!r}, but a whole number from {low} to {high} is needed; {WAY_OUT}"
            )
    scale, most = manifest.guidance_scale, Request.guidance_scale
    if type(scale) not in (int, float) or not 1 < scale <= most:
        raise WeightsError(
            f"{path}: guidance_scale is {scale!r}, but a number above 1 and up to {most} is needed; {WAY_OUT}"
        )
    return manifest


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write `manifest.json` into a weights folder."""
    text = json.dumps(asdict(manifest), ensure_ascii=False, indent=2)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def hash_files(folder: Path) -> dict[str, File]:
    """Size and SHA-256 of every file below a weights folder but the manifest, for `Manifest.files`."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    return {path.relative_to(folder).as_posix(): _hash(path) for path in paths}


def verify_weights(folder: Path, manifest: Manifest, hashes: bool) -> None:
    """Check that the files that the manifest lists are there, whole and, with `hashes`, unchanged.

    Raises:
        WeightsError: names the first file that is missing or differs.
    """
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise WeightsError(f"{path}: is missing; {WAY_OUT}")
        if path.stat().st_size != expected.bytes:
            _refuse_lfs_pointer(path)
            size = path.stat().st_size
            raise WeightsError(f"{path}: has {size:,} bytes, {MANIFEST} says {expected.bytes:,}; {WAY_OUT}")
        if hashes and _hash(path) != expected:
            raise WeightsError(f"{path}: its SHA-256 is not the one in {MANIFEST}; {WAY_OUT}")


def load_weights(folder: Path, device: torch.device, dtype: torch.dtype, lazily: bool = False) -> Weights:
    """Load a weights folder, straight from its memory-mapped files onto the device.

    Sizes are compared with the manifest; hashes too where JSD_VERIFY_WEIGHTS is on, which reads all files.

    Args:
        folder: in today's layout or in that of 2022.
        device: where to compute.
        dtype: of text encoder, UNet and safety checker; the VAE is in float32.
        lazily: leave a layer as it is in its file until it computes for the first time, on a CPU. So files in
            half precision are mapped as quickly as those in single precision, which take no conversion.

    Raises:
        WeightsError: a file is missing, truncated or not what it should be.
    """
    manifest = read_manifest(folder)
    verify_weights(folder, manifest, hashes=_are_hashes_wanted())
    lazily = lazily and device.type == "cpu"
    weights = Weights(
        folder=folder,
        manifest=manifest,
        tokenizer=_load_tokenizer(folder / "tokenizer"),
        text_encoder=_load_model(folder / "text_encoder", _make_text_encoder, device, dtype, lazily),
        unet=_load_model(folder / "unet", UNet2DConditionModel.from_config, device, dtype, lazily),
        vae=_load_model(folder / "vae", AutoencoderKL.from_config, device, torch.float32),
        scheduler_config=_read_json(folder / "scheduler" / "scheduler_config.json"),
        safety=_load_safety_checker(folder, device, dtype, lazily),
        dtype=dtype,
    )
    _check_fit(weights)
    try:
        make_scheduler("DPMSolverMultistep", weights.scheduler_config)
    except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
        path = folder / "scheduler" / "scheduler_config.json"
        raise WeightsError(f"{path}: is not a noise schedule ({_one_line(error)}); {WAY_OUT}") from error
    return weights


def _are_hashes_wanted() -> bool:
    choice = os.environ.get("JSD_VERIFY_WEIGHTS") or "off"
    if choice not in ("on", "off"):
        raise WeightsError(f"JSD_VERIFY_WEIGHTS: {choice!r} is unknown; on or off is allowed")
    return choice == "on"


def _check_fit(weights: Weights) -> None:
    """Refuse folders of whole files that are another kind of model."""
    text, unet, vae = weights.text_encoder.config, weights.unet.config, weights.vae.config
    for fits, mismatch in (
        (
            len(weights.tokenizer) <= text.vocab_size,
            f"tokenizer has {len(weights.tokenizer)} pieces, but text_encoder takes {text.vocab_size}",
        ),
        (
            text.max_position_embeddings >= MAX_LENGTH,
            f"text_encoder takes {text.max_position_embeddings} tokens, but prompts have {MAX_LENGTH}",
        ),
        (
            text.hidden_size == unet["cross_attention_dim"],
            f"text_encoder is {text.hidden_size} wide, but unet takes {unet['cross_attention_dim']}",
        ),
        (
            vae["latent_channels"] == unet["in_channels"] == unet["out_channels"],
            f"vae has {vae['latent_channels']} channels, but unet takes {unet['in_channels']}"
            f" and makes {unet['out_channels']}",
        ),
    ):
        if not fits:
            raise WeightsError(f"{weights.folder}: {mismatch}, so they are not one model; {WAY_OUT}")


def _make_text_encoder(config: dict[str, Any]) -> CLIPTextModel:
    return CLIPTextModel(CLIPTextConfig.from_dict(config))


def _make_safety_checker(config: dict[str, Any]) -> StableDiffusionSafetyChecker:
    return StableDiffusionSafetyChecker(CLIPConfig.from_dict(config))


def _load_tokenizer(folder: Path) -> Tokenizer:
    path = folder / "spiece.model"
    if not path.is_file():
        raise WeightsError(f"{path}: is missing; {WAY_OUT}")
    _refuse_lfs_pointer(path)
    try:
        return Tokenizer(folder)
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise WeightsError(f"{path}: {_one_line(error)}; {WAY_OUT}") from error


def _load_safety_checker(
    folder: Path, device: torch.device, dtype: torch.dtype, lazily: bool
) -> SafetyChecker | None:
    if not (folder / "safety_checker").is_dir():
        return None
    config = _read_json(folder / "feature_extractor" / "preprocessor_config.json")
    return SafetyChecker(
        image_processor=CLIPImageProcessorPil.from_dict(config),
        model=_load_model(folder / "safety_checker", _make_safety_checker, device, dtype, lazily),
    )


def _load_model(
    folder: Path,
    make: Callable[[dict[str, Any]], Model],
    device: torch.device,
    dtype: torch.dtype,
    lazily: bool = False,
) -> Model:
    """Build a model that takes no memory, and give it the tensors of its file one by one."""
    config = _read_json(folder / "config.json")
    try:
        with init_empty_weights(), no_init_weights():
            model = make(config)
    except Exception as error:  # a config of something else can fail in any way inside the libraries
        raise WeightsError(
            f"{folder / 'config.json'}: does not describe the expected model ({_one_line(error)}); {WAY_OUT}"
        ) from error
    path = _find_tensors(folder)
    expected = model.state_dict()
    tensors = {}
    for saved_name, tensor in _read_tensors(path, device):
        name = _todays_name(saved_name, expected)
        if name in expected:
            tensors[name] = tensor.to(device, dtype if tensor.is_floating_point() and not lazily else None)
        elif not name.endswith("position_ids"):  # saved in 2022, counted from 0 today
            raise WeightsError(f"{path}: holds {name!r}, which its config.json has no place for; {WAY_OUT}")
    try:
        model.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        raise WeightsError(f"{path}: does not fit its config.json ({_one_line(error)}); {WAY_OUT}") from error
    if lazily:
        _convert_when_used(model, dtype)
    return model.to(device).requires_grad_(False).eval()


def _convert_when_used(model: torch.nn.Module, dtype: torch.dtype) -> None:
    def convert(module: torch.nn.Module, _: Any) -> None:
        hooks.pop(module).remove()
        # A layer may look at its parts before it calls them, or compute with their weights itself.
        for part in (module, *module.children()):
            _convert(part, dtype)

    hooks = {module: module.register_forward_pre_hook(convert) for module in model.modules()}


@torch.inference_mode(False)
def _convert(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """Convert what a module holds itself, and not in its parts."""
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def _find_tensors(folder: Path) -> Path:
    paths = [folder / name for name in TENSOR_FILES if (folder / name).is_file()]
    if not paths:
        raise WeightsError(f"{folder}: holds none of {', '.join(TENSOR_FILES)}; {WAY_OUT}")
    _refuse_lfs_pointer(paths[0])
    return paths[0]


def _read_tensors(path: Path, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a file with their names, read as they are asked for."""
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt", device=str(device)) as file:
                for name in file.keys():  # noqa: SIM118 (a safetensors file is no dict)
                    yield name, file.get_tensor(name)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
            if not (isinstance(tensors, dict) and all(map(torch.is_tensor, tensors.values()))):
                raise WeightsError(f"{path}: is not a table of tensors; {WAY_OUT}")
            yield from tensors.items()
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path}: is not a pickle of tensors and nothing else, so it was not opened further; {WAY_OUT}"
        ) from error
    except (safetensors.SafetensorError, OSError, EOFError, RuntimeError) as error:
        raise WeightsError(f"{path}: is truncated or damaged ({_one_line(error)}); {WAY_OUT}") from error


_ATTENTION_NAMES_OF_2022 = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _todays_name(name: str, expected: Container[str]) -> str:
    """The name that today's libraries give to a tensor that was saved by those of 2022."""
    if name in expected:
        return name
    if ".attentions." in name:
        *parents, layer, kind = name.split(".")
        return ".".join([*parents, _ATTENTION_NAMES_OF_2022.get(layer, layer), kind])
    for wrapper in ("text_model.", "vision_model."):
        if name.startswith(wrapper):
            return name.removeprefix(wrapper)
    return name


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise WeightsError(f"{path}: is missing; {WAY_OUT}")
    _refuse_lfs_pointer(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: is not readable JSON ({_one_line(error)}); {WAY_OUT}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: is not a JSON object; {WAY_OUT}")
    return content


def _refuse_lfs_pointer(path: Path) -> None:
    beginning = b"version https://git-lfs.github.com/spec/"
    with path.open("rb") as file:
        if file.read(len(beginning)) == beginning:
            raise WeightsError(
                f"{path}: is a Git LFS pointer, not the file itself; run git lfs pull, or {WAY_OUT}"
            )


def _hash(path: Path) -> File:
    with path.open("rb") as file:
        return File(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def _one_line(error: Exception) -> str:
    """The gist of a library's error, which can be pages long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."
