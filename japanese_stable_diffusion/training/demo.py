"""The demo weights from nothing: art, shards, every stage, and the folder that the repository carries."""

from __future__ import annotations

import logging
from pathlib import Path

from .configuration import Configuration
from .export import publish
from .preparation import prepare_emoji
from .trainer import train

log = logging.getLogger(__name__)


def needed_stages(configuration: Configuration, name: str) -> list[str]:
    """The stages that must run so that stage ``name`` can, itself last. Raises ConfigurationError."""
    order: list[str] = []

    def visit(stage: str) -> None:
        if stage not in order:
            for origin in configuration.stage(stage).start.values():
                if origin and "/" not in origin:
                    visit(origin)
            order.append(stage)

    visit(name)
    return order


def make_demo(
    configuration: Configuration, stage: str, working: Path, folder: Path, version: str, cpu: bool
) -> None:
    """Prepare the data, train up to ``stage`` and publish its weights in ``folder``.

    What is there already in ``working`` is not made again, and a stage that was stopped goes on.
    Raises ArtError, ConfigurationError, PreparationError.
    """
    prepare_emoji(working / "art", working / "data", configuration.resolution)
    for name in needed_stages(configuration, stage):
        weights = train(
            configuration,
            configuration.stage(name),
            working / "data",
            working / "runs" / configuration.name,
            cpu,
        )
    publish(weights, folder, configuration, stage, version)
    log.info("%s: weights of stage %s", folder, stage)
