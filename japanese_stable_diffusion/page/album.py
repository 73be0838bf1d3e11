"""Pictures that were made, as the page shows them."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp

from japanese_stable_diffusion.provenance import ProvenanceError, read_parameters


@dataclass(frozen=True)
class Made:
    """A picture that was made.

    Attributes:
        file: named after its seed.
        seed: None if the file doesn't carry it, as one of another server may.
        parameters: how it was made, as the file tells it.
    """

    file: Path
    seed: int | None
    parameters: str


def keep(files: tuple[Path, ...]) -> list[Made]:
    """Move new files to a folder where the next request doesn't remove them, and read how they were made."""
    folder = Path(mkdtemp())
    return [_keep(file, folder) for file in files]


def _keep(file: Path, folder: Path) -> Made:
    try:
        made = read_parameters(file)
    except ProvenanceError:
        return Made(file.rename(folder / file.name), None, "")
    return Made(file.rename(folder / f"seed-{made.request.seed}{file.suffix}"), made.request.seed, str(made))
