"""A little emoji art in the layout of the npm packages that the real art comes in."""

import json
from pathlib import Path

from japanese_stable_diffusion.training.emoji import HANDS, HERE, NAMES_PACKAGE

GRIN, WINK = "😀", "😉"
DRAWINGS = {
    "noto": {
        "grinning-face": '<circle cx="16" cy="16" r="14" fill="#fc2"/>',
        "winking-face": '<rect x="4" y="4" width="24" height="24" fill="#28f"/>',
    },
    "fxemoji": {"grinningface": '<path d="M16 2 30 30H2z" fill="#e44"/>'},
}


def write_art(folder: Path) -> Path:
    """Two concepts by two hands; every other concept has names and no drawing."""
    rows = [
        line.split() for line in (HERE / "concepts.txt").read_text().splitlines() if line[:1] not in ("", "#")
    ]
    for language, words in (
        ("ja", ("えがお", "まばたき", "顔", "晴れ晴れ")),
        ("en", ("grin", "wink", "face", "cheer")),
    ):
        first, second, common, unique = words
        entries = [
            {"emoji": row[0], "label": f"{language}{number}", "tags": []}
            for number, row in enumerate(rows)
            if not row[0][0].isascii()
        ]
        by_emoji = {entry["emoji"]: entry for entry in entries}
        by_emoji[GRIN] |= {"label": first, "tags": [common, unique]}
        by_emoji[WINK] |= {"label": second, "tags": [common]}
        _write(_package(folder, *NAMES_PACKAGE) / language / "data.json", entries)
    for hand in HANDS:
        bodies = DRAWINGS.get(hand.name, {})
        icons = {name: {"body": body} for name, body in bodies.items()}
        package = _package(folder, hand.package, hand.version)
        _write(package / "icons.json", {"width": 32, "height": 32, "icons": icons})
        if hand.name == "noto":
            codes = {"1f600": "grinning-face", "1f609": "winking-face"}
            _write(package / "chars.json", codes)
    return folder


def _package(folder: Path, name: str, version: str) -> Path:
    return folder / f"{name.replace('@', '').replace('/', '-')}-{version}"


def _write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
