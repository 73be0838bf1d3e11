"""What keeps a sample out of the training data, and how often it did.

Samples stream through in small batches. The only thing that grows with the data is the list of
pictures seen so far, and that lies in a file.
"""

from __future__ import annotations

import re
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path

import cv2
import numpy as np

from .samples import Sample
from .styles import Floats, Pixels

BATCH = 64
"""How many pictures the scorer sees at once."""

MAX_DISTANCE = 3
"""Beyond it, looking up near pictures means comparing with a large share of all of them."""

HASH_BITS = 64

KANA = re.compile(r"[\u3041-\u309f\u30a1-\u30ff\u31f0-\u31ff\uff66-\uff9f]")
JAPANESE = re.compile(
    r"[々〆〇\u3041-\u309f\u30a1-\u30ff\u31f0-\u31ff\uff66-\uff9f\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)


class FilterError(Exception):
    """A filter can't work as asked; the message says why and what is allowed."""


@dataclass(frozen=True)
class Limits:
    """What a sample must keep to.

    ``japanese``: the least share of a caption's letters that are kana or kanji, 0 to 1; 0 takes any
    caption. ``min_side``: of the picture as it was found, in pixels. ``max_ratio``: of its longer to
    its shorter side. ``duplicates``: how many of the 64 bits of two pictures' perceptual hashes may
    differ for the later one to be refused, 0 to 3; -1 keeps them all. ``min_similarity``: of picture
    and first Japanese caption, -1 to 1, as the model in ``scorer`` sees it.
    """

    japanese: float
    min_side: int
    max_ratio: float
    duplicates: int
    min_similarity: float | None = None
    scorer: Path | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.japanese <= 1:
            raise FilterError(f"japanese: {self.japanese} is no share of letters; 0 to 1 is allowed")
        if self.min_side < 0:
            raise FilterError(f"min-side: {self.min_side} is negative; 0 and more are allowed")
        if not self.max_ratio >= 1:
            raise FilterError(f"max-ratio: {self.max_ratio} refuses even squares; 1 and more are allowed")
        if not -1 <= self.duplicates <= MAX_DISTANCE:
            raise FilterError(
                f"duplicates: {self.duplicates} bits; -1 (all stay) to {MAX_DISTANCE} is allowed"
            )
        if self.min_similarity is not None and not -1 <= self.min_similarity <= 1:
            raise FilterError(f"min-similarity: {self.min_similarity} is no cosine; -1 to 1 is allowed")
        if self.scorer and self.min_similarity is None:
            raise FilterError("scorer: does nothing without min-similarity; give both")


def is_japanese(text: str, share: float, language: str = "") -> bool:
    """Whether at least ``share`` of the letters are kana or kanji, and they aren't Chinese.

    Kanji without kana may be either. ``language`` is what somebody else took the text for (LAION's
    tables say); without it the characters must be in code page 932 (JIS X 0208 and makers' additions),
    which has none of those that only simplified Chinese uses. A language identifier is no help with
    texts so short: py3langid 0.4.0 took 22 of 24 like 富士山 or 送料無料 for Chinese.
    """
    if share == 0:
        return True
    letters = [character for character in text if character.isalpha()]
    japanese = [letter for letter in letters if JAPANESE.match(letter)]
    if not japanese or len(japanese) < share * len(letters):
        return False
    if KANA.search(text):
        return True
    if language:
        return language == "ja"
    try:
        "".join(japanese).encode("cp932")
    except UnicodeEncodeError:
        return False
    return True


def perceptual_hash(picture: Pixels) -> int:
    """64 bits that hardly change when a picture is scaled or compressed again.

    OpenCV's pHash: the signs of the lowest 8 × 8 frequencies against their mean
    (https://docs.opencv.org/4.x/d4/d93/group__img__hash.html).
    """
    bits = cv2.img_hash.pHash(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    return int.from_bytes(bits.tobytes(), "big")


class Seen:
    """The perceptual hashes of all pictures so far, in an SQLite file.

    Two hashes that differ in at most d bits agree on at least one of d + 1 parts, so only those
    that agree on a part are compared (Manku, Jain, Das Sarma: Detecting Near-Duplicates for Web
    Crawling, 2007).
    """

    def __init__(self, path: Path, distance: int) -> None:
        self._distance = distance
        edges = [round(part * HASH_BITS / (distance + 1)) for part in range(distance + 2)]
        self._parts = [(low, (1 << high - low) - 1) for low, high in pairwise(edges)]
        self._database = sqlite3.connect(path)
        self._database.execute("CREATE TABLE IF NOT EXISTS parts (number, bits, hash, shard)")
        self._database.execute("CREATE INDEX IF NOT EXISTS by_bits ON parts (number, bits)")

    def forget_from(self, shard: int) -> None:
        """Forget what came with this shard and later ones: they will be made again."""
        self._database.execute("DELETE FROM parts WHERE shard >= ?", (shard,))
        self._database.commit()

    def add(self, value: int, shard: int) -> bool:
        """Remember a picture by its hash; False if one like it is there already."""
        parts = [(n, _blob(value >> low & mask)) for n, (low, mask) in enumerate(self._parts)]
        agreeing = "SELECT hash FROM parts WHERE number = ? AND bits = ?"
        for part in parts:
            for (near,) in self._database.execute(agreeing, part):
                if (int.from_bytes(near, "big") ^ value).bit_count() <= self._distance:
                    return False
        rows = [(number, bits, _blob(value), shard) for number, bits in parts]
        self._database.executemany("INSERT INTO parts VALUES (?, ?, ?, ?)", rows)
        return True

    def commit(self) -> None:
        """Make what was added last."""
        self._database.commit()

    def close(self) -> None:
        """Let go of the file; what wasn't committed is lost."""
        self._database.close()


def _blob(value: int) -> bytes:
    # SQLite's integers are signed.
    return value.to_bytes(HASH_BITS // 8, "big")


class Scorer:
    """A CLIP-like model: how well a picture and a caption go together.

    Any folder that transformers' AutoModel reads will do if the model has an image and a text tower
    (CLIP, SigLIP, AltCLIP, VisionTextDualEncoder ...) and its tokenizer and image processor lie
    beside it. No code from the folder is run. Raises FilterError.
    """

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        if not (folder / "config.json").is_file():
            raise FilterError(
                f"{folder}: no config.json; a scorer is a folder with a CLIP-like model of transformers, "
                "its tokenizer and its image processor"
            )
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self._model = AutoModel.from_pretrained(folder, local_files_only=True).to(self._device).eval()
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self._processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise FilterError(f"{folder}: transformers can't load this scorer ({reason})") from error
        if not hasattr(self._model, "get_text_features") or not hasattr(self._model, "get_image_features"):
            kind = type(self._model).__name__
            raise FilterError(f"{folder}: {kind} can't score pictures; give a CLIP-like model")
        positions = self._model.config.text_config.max_position_embeddings
        self._tokens = min(positions, self._tokenizer.model_max_length, 77)

    def similarities(self, pictures: list[Pixels], captions: list[str]) -> Floats:
        """The cosine of each picture's features with its caption's: (number of pictures,), -1 to 1."""
        import torch
        from torch.nn.functional import cosine_similarity

        pixels = self._processor(images=pictures, return_tensors="pt", input_data_format="channels_last")
        # SigLIP was trained on captions padded to full length; the others mask the padding out.
        tokens = self._tokenizer(
            captions, padding="max_length", truncation=True, max_length=self._tokens, return_tensors="pt"
        )
        with torch.inference_mode():
            seen = self._model.get_image_features(**pixels.to(self._device)).pooler_output
            read = self._model.get_text_features(**tokens.to(self._device)).pooler_output
            similarity = cosine_similarity(seen, read)
        return np.asarray(similarity.cpu(), dtype=np.float32)


class Filters:
    """All filters of one folder of shards, which are made in order of their numbers."""

    def __init__(self, limits: Limits, database: Path, first: int) -> None:
        """``first``: the shard to go on from; what ``database`` holds of it and later ones is forgotten."""
        self._limits = limits
        self._scorer = Scorer(limits.scorer) if limits.scorer else None
        self._seen: Seen | None = None
        if limits.duplicates >= 0:
            if first > 0 and not database.exists():
                raise FilterError(f"{database}: missing, so duplicates can't be told; choose another folder")
            self._seen = Seen(database, limits.duplicates)
            self._seen.forget_from(first)

    def passing(self, samples: Iterable[Sample], shard: int, refused: Counter[str]) -> Iterator[Sample]:
        """The samples that pass, in the same order; ``refused`` counts the others by what was wrong.

        A sample with several captions keeps them all if one of them is Japanese. One that was
        scored has its ``similarity`` among its facts.
        """
        samples = iter(samples)
        while batch := list(islice(samples, BATCH)):
            fitting: list[tuple[Sample, Pixels]] = []
            for sample in batch:
                pixels = sample.pixels()
                wrong = self._wrong(sample, pixels)
                if wrong:
                    refused[wrong] += 1
                else:
                    fitting.append((sample, pixels))
            for sample, pixels in self._scored(fitting, refused):
                # Last, so that a picture refused with one caption may still come in with a better one.
                if self._seen and not self._seen.add(perceptual_hash(pixels), shard):
                    refused["duplicate"] += 1
                else:
                    yield sample
        if self._seen:
            self._seen.commit()

    def _wrong(self, sample: Sample, pixels: Pixels) -> str | None:
        language = str(sample.facts.get("language", ""))
        if not any(is_japanese(caption, self._limits.japanese, language) for caption in sample.japanese):
            return "caption"
        size = {"height": pixels.shape[0], "width": pixels.shape[1]} | sample.facts
        return wrong_size(int(size["width"]), int(size["height"]), self._limits)

    def _scored(
        self, fitting: list[tuple[Sample, Pixels]], refused: Counter[str]
    ) -> Iterator[tuple[Sample, Pixels]]:
        if not self._scorer or not fitting:
            yield from fitting
            return
        assert self._limits.min_similarity is not None
        captions = [sample.japanese[0] for sample, _ in fitting]
        scores = self._scorer.similarities([pixels for _, pixels in fitting], captions)
        for (sample, pixels), score in zip(fitting, scores, strict=True):
            if score < self._limits.min_similarity:
                refused["similarity"] += 1
            else:
                facts = sample.facts | {"similarity": round(float(score), 4)}
                yield replace(sample, facts=facts), pixels

    def close(self) -> None:
        """Let go of the file with the pictures seen."""
        if self._seen:
            self._seen.close()


def wrong_size(width: int, height: int, limits: Limits) -> str | None:
    """What is wrong with a picture of this size, if anything: ``size`` or ``shape``."""
    if min(width, height) < max(limits.min_side, 1):
        return "size"
    if max(width, height) > limits.max_ratio * min(width, height):
        return "shape"
    return None
