"""What a Japanese model claims to understand, read from ``claims.toml``."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

CLAIMS = Path(__file__).parent / "claims.toml"


@dataclass(frozen=True)
class Claim:
    """A prompt and what counts as right: any of ``concepts``, in ``style`` unless that is None."""

    prompt: str
    concepts: tuple[str, ...]
    style: str | None


@dataclass(frozen=True)
class Claims:
    """One thing that is claimed, with the prompts that put it to the test."""

    name: str
    title: str
    prompts: tuple[Claim, ...]


def read_claims(path: Path = CLAIMS) -> list[Claims]:
    """All claims of a file."""
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    return [
        Claims(
            entry["name"],
            entry["title"],
            tuple(Claim(p["prompt"], tuple(p["concepts"]), p.get("style")) for p in entry["prompts"]),
        )
        for entry in table["claims"]
    ]
