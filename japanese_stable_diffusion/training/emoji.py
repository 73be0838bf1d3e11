"""Freely licensed emoji art and its names in Japanese and English, as (picture, captions) samples.

The art comes as SVG from the npm registry, one package for each hand that drew it; the names are
CLDR's (https://cldr.unicode.org), through emojibase-data, with words of our own in ``concepts.txt``
and a few drawings of our own in ``drawings/``.
"""

from __future__ import annotations

import json
import subprocess
import tarfile
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import resvg_py

from .samples import Sample
from .styles import STYLES, Pixels, Style

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Hand:
    """One artist's or company's set of drawings: where it comes from and on what terms."""

    name: str
    package: str
    version: str
    licence: str
    author: str


HANDS: tuple[Hand, ...] = (
    Hand("noto", "@iconify-json/noto", "1.2.9", "Apache-2.0", "Google, Noto Emoji"),
    Hand("noto-v1", "@iconify-json/noto-v1", "1.2.5", "Apache-2.0", "Google, Noto Emoji before 2017"),
    Hand("twemoji", "@iconify-json/twemoji", "1.2.5", "CC-BY-4.0", "Twitter, Twemoji"),
    Hand("fluent", "@iconify-json/fluent-emoji", "1.2.7", "MIT", "Microsoft, Fluent Emoji"),
    Hand("fluent-flat", "@iconify-json/fluent-emoji-flat", "1.2.6", "MIT", "Microsoft, Fluent Emoji flat"),
    Hand("emojione", "@iconify-json/emojione", "1.2.3", "CC-BY-4.0", "Ranks.com, EmojiOne 2"),
    Hand("fxemoji", "@iconify-json/fxemoji", "1.2.2", "Apache-2.0", "Mozilla, FxEmojis"),
)
NAMES_PACKAGE = ("emojibase-data", "17.0.0")


class ArtError(Exception):
    """The art can't be had; the message says what to do."""


@dataclass(frozen=True)
class Concept:
    """A thing that can be asked for. The first name in each language is the one that is shown."""

    emoji: str
    japanese: tuple[str, ...]
    english: tuple[str, ...]
    slugs: tuple[str, ...]

    @property
    def key(self) -> str:
        """A name that a file may have."""
        return self.emoji if self.emoji.isascii() else _hexcode(self.emoji).lower()


def fetch_package(package: str, version: str, folder: Path) -> Path:
    """Unpack an npm package below ``folder`` once; return where it lies. Raises ArtError."""
    place = folder / f"{package.replace('@', '').replace('/', '-')}-{version}"
    if place.is_dir():
        return place
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        try:
            # npm checks the package's sha512 against the registry's before it writes the file.
            done = subprocess.run(
                ["npm", "pack", "--silent", f"{package}@{version}"],
                cwd=scratch,
                capture_output=True,
                text=True,
            )
        except FileNotFoundError:
            raise ArtError("npm: not found; install Node.js (Debian: apt-get install npm)") from None
        archives = list(Path(scratch).glob("*.tgz"))
        if done.returncode or not archives:
            reason = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
            raise ArtError(f"{package}@{version}: npm could not fetch it ({reason}); check the network")
        with tarfile.open(archives[0]) as archive:
            archive.extractall(Path(scratch) / "unpacked", filter="data")
        (Path(scratch) / "unpacked" / "package").rename(place)
    return place


def _plain(text: str) -> str:
    return text.replace("\ufe0f", "").replace("\ufe0e", "")


def _hexcode(emoji: str) -> str:
    return "-".join(f"{ord(c):04X}" for c in emoji)


def read_concepts(art: Path) -> list[Concept]:
    """Read ``concepts.txt`` and join CLDR's names to it.

    A tag of CLDR's becomes a name only where no other concept has it, so that a word stands for one
    thing.
    """
    names = fetch_package(*NAMES_PACKAGE, art)
    words: dict[str, dict[str, dict[str, Any]]] = {
        language: {_plain(e["emoji"]): e for e in json.loads((names / language / "data.json").read_text())}
        for language in ("ja", "en")
    }
    slugs: dict[str, set[str]] = {}
    for hand in HANDS:
        listing = fetch_package(hand.package, hand.version, art) / "chars.json"
        if listing.is_file():
            for code, slug in json.loads(listing.read_text()).items():
                slugs.setdefault(code.upper().replace("-FE0F", ""), set()).add(slug)
    rows = [
        line.split()
        for line in (HERE / "concepts.txt").read_text().splitlines()
        if line.strip() and not line.startswith("#")
    ]
    ours = {word for row in rows for word in row[1:]}
    labels: dict[str, set[str]] = {"ja": set(), "en": set()}
    tags: dict[str, Counter[str]] = {"ja": Counter(), "en": Counter()}
    for row in rows:
        for language in ("ja", "en"):
            entry = words[language].get(_plain(row[0]))
            if entry:
                labels[language].add(entry["label"])
                tags[language].update(set(entry.get("tags", [])))

    def spoken(emoji: str, language: str, first: list[str]) -> tuple[str, ...]:
        entry = words[language].get(_plain(emoji), {})
        taken = labels[language] | (ours if language == "ja" else set())
        label = [entry["label"]] if entry and entry["label"] not in ours else []
        unique = [
            t for t in entry.get("tags", []) if tags[language][t] == 1 and t not in taken and len(t) > 1
        ]
        return tuple(dict.fromkeys([*first, *label, *unique]))

    concepts = []
    for emoji, *first in rows:
        english = (first.pop(),) if not words["en"].get(_plain(emoji)) else ()
        code = _hexcode(_plain(emoji))
        concepts.append(
            Concept(
                emoji,
                spoken(emoji, "ja", first),
                english or spoken(emoji, "en", []),
                tuple(sorted(slugs.get(code, set()))),
            )
        )
    return concepts


class Drawings:
    """All drawings of all hands, found by concept."""

    def __init__(self, art: Path) -> None:
        self._icons: dict[str, dict[str, Any]] = {}
        for hand in HANDS:
            icons = json.loads((fetch_package(hand.package, hand.version, art) / "icons.json").read_text())
            self._icons[hand.name] = icons

    def of(self, concept: Concept) -> Iterator[tuple[Hand, str]]:
        """Each hand that drew this concept, with the drawing as a whole SVG document."""
        for number, path in enumerate(sorted((HERE / "drawings").glob(f"{concept.emoji}-*.svg")), 1):
            yield Hand(f"own-{number}", "", "", "CC0-1.0", "this project"), path.read_text()
        for hand in HANDS:
            icons = self._icons[hand.name]
            for slug in concept.slugs:
                # FxEmojis runs the words of a name together.
                name = slug.replace("-", "") if hand.name == "fxemoji" else slug
                name = icons.get("aliases", {}).get(name, {}).get("parent", name)
                icon = icons["icons"].get(name)
                if icon:
                    yield hand, _document(icons | icon)
                    break


def _document(icon: dict[str, Any]) -> str:
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {icon.get('width', 16)} {icon.get('height', 16)}"
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {names} viewBox="{box}">{icon["body"]}</svg>'


def rasterize(svg: str, size: int) -> Pixels:
    """Draw an SVG on a transparent square: (size, size, 4), uint8 RGBA, not premultiplied."""
    encoded = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size))
    drawing = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_UNCHANGED)
    drawing = cv2.cvtColor(drawing, cv2.COLOR_BGRA2RGBA)
    square = np.zeros((size, size, 4), np.uint8)
    height, width = drawing.shape[:2]
    top, left = (size - height) // 2, (size - width) // 2
    square[top : top + height, left : left + width] = drawing
    return square


def place(drawing: Pixels, rng: np.random.Generator) -> Pixels:
    """Turn, scale and shift a drawing a little, inside its frame.

    By less than what one latent covers: what lies anywhere looks, on average, like nothing.
    """
    size = drawing.shape[0]
    turn = cv2.getRotationMatrix2D((size / 2, size / 2), rng.uniform(-2, 2), rng.uniform(0.84, 0.88))
    turn[:, 2] += rng.uniform(-0.01, 0.01, 2) * size
    alpha = drawing[..., 3:].astype(np.float32) / 255
    premultiplied = np.concatenate([drawing[..., :3] * alpha, drawing[..., 3:]], -1).astype(np.float32)
    moved = cv2.warpAffine(premultiplied, turn, (size, size), flags=cv2.INTER_AREA)
    cover = np.maximum(moved[..., 3:] / 255, 1e-3)
    moved[..., :3] = moved[..., :3] / cover
    return np.clip(moved, 0, 255).astype(np.uint8)


def captions(names: tuple[str, ...], style: Style, language: str) -> tuple[str, ...]:
    """What a person might call this picture; the first name comes up as often as all others together."""
    weighted = [names[0]] * max(1, len(names) - 1) + list(names[1:])
    styles = style.japanese if language == "ja" else style.english
    if style.name == "illustration":
        plain = "{name}のイラスト" if language == "ja" else "an illustration of {name}"
        return tuple(weighted * 3 + [plain.format(name=name) for name in weighted])
    japanese = ("{name} {style}", "{style}の{name}", "{name}、{style}", "{name}の{style}")
    forms = japanese if language == "ja" else ("{name}, {style}", "{style} of {name}")
    return tuple(f.format(name=n, style=s) for n in weighted for s in styles for f in forms)


# How many differently placed pictures are made of one drawing.
VARIANTS = {"illustration": 4}


def samples(art: Path, size: int, first: int, count: int) -> Iterator[Sample]:
    """``count`` concepts from number ``first`` on, by every hand in every style, ``size`` pixels square.

    The same arguments give the same pictures.
    """
    drawings = Drawings(art)
    for concept in read_concepts(art)[first : first + count]:
        for hand, svg in drawings.of(concept):
            drawing = rasterize(svg, 2 * size)
            for style in STYLES:
                for variant in range(VARIANTS.get(style.name, 1)):
                    key = f"{concept.key}_{hand.name}_{style.name}_{variant}"
                    rng = np.random.default_rng(zlib.crc32(key.encode()))
                    picture = style.draw(place(drawing, rng), rng)
                    yield Sample(
                        key=key,
                        picture=cv2.resize(picture, (size, size), interpolation=cv2.INTER_AREA),
                        japanese=captions(concept.japanese, style, "ja"),
                        english=captions(concept.english, style, "en"),
                        facts={
                            "concept": concept.emoji,
                            "hand": hand.name,
                            "style": style.name,
                            "licence": hand.licence,
                            "author": hand.author,
                        },
                    )
