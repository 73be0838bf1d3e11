"""What a training run does, read from a small TOML file."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from japanese_stable_diffusion.request import Request

HERE = Path(__file__).parent

Precision = Literal["no", "fp16", "bf16"]
"""What a stage is computed in, as Accelerate names it: "no" is single precision."""


class ConfigurationError(Exception):
    """A configuration can't be used; the message names the file and the entry."""


@dataclass(frozen=True)
class Stage:
    """One stage of the recipe.

    ``batch_size`` counts samples over all processes; ``micro_batch_size`` those that one process
    computes at a time, and what is missing between the two is made up by gradient accumulation.
    ``start`` says for each model which earlier stage, or which weights folder (it has a slash), it comes
    from ("" for the configuration's own random start). ``train`` names the models whose weights move, or
    parts of them (``vae.decoder``).
    ``stop`` ends the stage before ``steps``, over which the learning rate decays (0: it runs to its end).
    ``styles_evenly`` shows rare styles more often, until all are about as frequent as the commonest;
    ``style_frequency`` then names those that are shown so many times as often.
    ``without_hands`` names those whose pictures are left out; ``hands`` counts the others, if a guess is to
    tell them apart (1: it takes them for one).
    ``optimizer`` is AdamW, or Muon for the matrices between a model's first and last layers.
    ``few_steps`` is how many a denoiser is distilled for (0: it isn't), ``skip`` timesteps of the teacher's
    at a time.
    ``timestep_shift`` above 1 trains a denoiser more on much noise and less on little; ``contrast_floor``
    above 0 makes it learn as much from pictures of little contrast as from others, down to that contrast.
    ``deepen`` begins with so many layers more than what it starts from has, for each block of the denoiser's
    way down and its partner on the way up.
    ``crop`` trains an autoencoder on squares of so many pixels cut out at random (0: whole pictures).
    """

    name: str
    objective: Literal["autoencoding", "wording", "aligning", "picturing", "denoising", "consistency"]
    train: tuple[str, ...]
    start: dict[str, str]
    steps: int
    batch_size: int
    micro_batch_size: int
    learning_rate: float
    warmup_steps: int
    language: Literal["ja", "en"] = "ja"
    only_styles_of_base: bool = False
    styles_evenly: bool = False
    style_frequency: dict[str, float] = field(default_factory=dict)
    without_hands: tuple[str, ...] = ()
    hands: int = 1
    optimizer: Literal["adamw", "muon"] = "adamw"
    weight_decay: float = 0.01
    gradient_clip: float = 1.0
    ema_decay: float = 0.999
    caption_dropout: float = 0.1
    weight_limit: float = 0.0
    timestep_shift: float = 1.0
    contrast_floor: float = 0.0
    kl_weight: float = 1e-4
    few_steps: int = 0
    skip: int = 20
    deepen: tuple[int, ...] = ()
    crop: int = 0
    stop: int = 0
    cache_latents: bool = True
    precision: Precision = "no"
    workers: int = 0
    checkpoint_steps: int = 500
    picture_steps: int = 500

    @property
    def last_step(self) -> int:
        """The step after which the stage is finished."""
        return self.stop or self.steps


CHOICES = {
    name: get_args(hint) for name, hint in get_type_hints(Stage).items() if get_origin(hint) is Literal
}
"""What a stage's entries of few possible values may be."""


@dataclass(frozen=True)
class Configuration:
    """All of a recipe: how large the models are, and the stages in the order in which they run.

    ``models`` holds the diffusers and transformers configurations of the autoencoder, the UNet,
    the text encoder and what guesses pictures from it. ``vocabulary`` counts the pieces of each tokenizer
    that is trained here; ``scheduler`` is the noise schedule that is trained on; ``guidance_scale`` is what
    pictures of the published weights are made with by default, and what is distilled.
    """

    name: str
    seed: int
    resolution: int
    enlarge: int
    vocabulary: int
    scheduler: dict[str, Any]
    models: dict[str, dict[str, Any]]
    stages: tuple[Stage, ...]
    prompts: dict[str, list[str]] = field(default_factory=dict)
    guidance_scale: float = Request.guidance_scale

    def stage(self, name: str) -> Stage:
        """The stage of this name; raises ConfigurationError."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ConfigurationError(f"stage {name}: {self.name} has {', '.join(s.name for s in self.stages)}")


def read_configuration(name: str) -> Configuration:
    """Read one of this folder's configurations by name (``demo``, ``full``), or any TOML file by path."""
    path = Path(name) if name.endswith(".toml") else HERE / f"{name}.toml"
    try:
        table = tomllib.loads(path.read_text())
    except FileNotFoundError:
        known = ", ".join(sorted(p.stem for p in HERE.glob("*.toml") if p.stem != "claims"))
        raise ConfigurationError(
            f"configuration {name}: not found; there are {known}, or give a .toml file"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{path}: {error}") from None
    common = table.pop("stage", {})
    stages = []
    for entry in table.pop("stages", []):
        unknown = set(common | entry) - {f.name for f in fields(Stage)}
        if unknown:
            raise ConfigurationError(
                f"{path}: stage {entry.get('name')} has no entry {', '.join(sorted(unknown))}"
            )
        try:
            values: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value
                for name, value in (common | entry).items()
            }
            stages.append(Stage(**values))
            for choice, allowed in CHOICES.items():
                if getattr(stages[-1], choice) not in allowed:
                    raise ConfigurationError(
                        f"{path}: stage {entry['name']}: {choice} is {getattr(stages[-1], choice)}, "
                        f"but has to be one of {', '.join(allowed)}"
                    )
            if (stages[-1].objective == "consistency") != bool(stages[-1].few_steps):
                raise ConfigurationError(
                    f"{path}: stage {entry['name']}: few_steps is for the objective consistency, and it alone"
                )
            if stages[-1].style_frequency and not stages[-1].styles_evenly:
                raise ConfigurationError(
                    f"{path}: stage {entry['name']}: style_frequency needs styles_evenly = true"
                )
        except TypeError as error:
            raise ConfigurationError(f"{path}: stage {entry.get('name')}: {error}") from None
    try:
        return Configuration(name=path.stem, stages=tuple(stages), **table)
    except TypeError as error:
        raise ConfigurationError(f"{path}: {error}") from None
