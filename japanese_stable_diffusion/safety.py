"""The NSFW check that came with the weights. Whether it runs is the operator's choice, never the caller's."""

import logging
import os

import torch
from PIL import Image

from japanese_stable_diffusion.weights import SafetyChecker, Weights

log = logging.getLogger(__name__)

# It says that a black picture will be returned, which is not so here.
logging.getLogger("diffusers.pipelines.stable_diffusion.safety_checker").setLevel(logging.ERROR)


class SafetyError(Exception):
    """No picture may be shown, or the operator's choice can't be understood; the message is one line."""


def choose_checker(weights: Weights) -> SafetyChecker | None:
    """The checker that pictures of these weights have to pass; None if they have none or it was turned off.

    The operator's choice is the environment variable JSD_SAFETY_CHECKER: on (the default) or off.

    Raises:
        SafetyError: it is something else.
    """
    choice = os.environ.get("JSD_SAFETY_CHECKER") or "on"
    if choice not in ("on", "off"):
        raise SafetyError(f"JSD_SAFETY_CHECKER: {choice!r} is unknown; on or off is allowed")
    if not weights.safety:
        log.info("safety checker: none, %s has none", weights.manifest.name)
        return None
    log.info("safety checker: %s", choice)
    return weights.safety if choice == "on" else None


@torch.inference_mode()
def is_flagged(picture: Image.Image, checker: SafetyChecker) -> bool:
    """Whether the checker finds a picture unsafe: it lies too near to one of 17 concepts.

    Nearness is the cosine of CLIP embeddings (Radford et al. 2021, arXiv:2103.00020). Each concept has a
    threshold of its own (Rando et al. 2022, arXiv:2210.04610).
    """
    pixels = checker.image_processor(picture, return_tensors="pt").pixel_values
    # The checker blackens what it flags; it is given something else to blacken.
    stand_in = torch.zeros(1, 1)
    _, flagged = checker.model(clip_input=pixels.to(checker.model.device), images=stand_in)
    return bool(flagged[0])


def report(left_out: int, of: int) -> None:
    """Log how many pictures were flagged.

    Raises:
        SafetyError: all of them.
    """
    if left_out == of:
        raise SafetyError(
            f"prompt: the safety checker flagged {'the picture' if of == 1 else f'all {of} pictures'}; "
            "another prompt or another seed may pass"
        )
    if left_out:
        log.warning("safety checker: left out %d of %d pictures", left_out, of)
