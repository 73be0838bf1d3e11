"""Pictures made by the model in this process, through the Predictor that the container runs."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from PIL import Image

from japanese_stable_diffusion import openapi
from japanese_stable_diffusion.page.line import Finished, Progress, Teller
from japanese_stable_diffusion.page.preview import Preview
from japanese_stable_diffusion.pipeline import Figures, Picture, Pipeline, Step
from japanese_stable_diffusion.request import Request
from japanese_stable_diffusion.safety import is_flagged
from predict import Predictor

_log = logging.getLogger("japanese_stable_diffusion")


class Model:
    """The Predictor, watched while it works. Loads the weights."""

    def __init__(self) -> None:
        self._predictor = Predictor()
        self._predictor.setup()
        self._pipeline = _Watched(self._predictor.pipeline)
        self._predictor.pipeline = cast(Pipeline, self._pipeline)

    @property
    def schema(self) -> dict[str, Any]:
        """The OpenAPI schema of its inputs."""
        return openapi.schema()

    def make(self, inputs: dict[str, Any], tell: Teller) -> Finished:
        """Make the pictures. Whatever `tell` raises stops it before the next step.

        Raises:
            RequestError: a wrong input.
        """
        self._pipeline.watch = lambda step: tell(Progress(step.index, step.total, self._previews(step)))
        with _heard() as log:
            files = self._predictor.predict(**inputs)
        return Finished(tuple(Path(file) for file in files), tuple(log))

    @cached_property
    def _preview(self) -> Preview:
        return Preview(self._predictor.pipeline.weights.vae)

    def _previews(self, step: Step) -> tuple[Image.Image, ...]:
        checker = self._predictor.checker
        previews = self._preview(step.denoised)
        return tuple(preview for preview in previews if not (checker and is_flagged(preview, checker)))


class _Watched:
    """A pipeline with somebody who looks at every step."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self.watch: Callable[[Step], None]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipeline, name)

    def generate(self, request: Request, figures: Figures | None = None) -> Iterator[Step | Picture]:
        for event in self._pipeline.generate(request, figures):
            if isinstance(event, Step):
                self.watch(event)
            yield event


@contextlib.contextmanager
def _heard() -> Iterator[list[str]]:
    """The lines that the project logs meanwhile."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    _log.addHandler(handler)
    try:
        yield lines
    finally:
        _log.removeHandler(handler)
