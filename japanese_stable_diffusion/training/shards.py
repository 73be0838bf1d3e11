"""Training data on disk: webdataset shards, read at random.

A shard is a plain tar with a picture (``.png`` or ``.jpg``) and a ``.json`` for each sample, as
webdataset defines it (https://github.com/webdataset/webdataset). An uncompressed tar can be read
anywhere once one knows where its members lie, so the reader keeps an index and the trainer draws
samples in any order; a batch is then a function of its number alone, and a run can be resumed
exactly.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from webdataset import TarWriter

from .samples import File, Sample
from .styles import Pixels

PICTURES = ("png", "jpg", "jpeg", "webp")


class ShardError(Exception):
    """A data folder can't be read; the message names it and says what to do."""


def write_shard(path: Path, samples: Iterable[Sample]) -> int:
    """Write one shard, whole or not at all; the same samples give the same bytes. Returns their number."""
    partial = path.with_suffix(".partial")
    count = 0
    with open(partial, "wb") as stream, TarWriter(stream, mtime=0.0, user="", group="") as tar:
        for sample in samples:
            picture = sample.file()
            about = {"ja": list(sample.japanese), "en": list(sample.english), **sample.facts}
            tar.write(
                {
                    "__key__": sample.key,
                    picture.kind: picture.content,
                    "json": json.dumps(about, ensure_ascii=False, sort_keys=True).encode(),
                }
            )
            count += 1
    os.replace(partial, path)
    return count


def members(tar: tarfile.TarFile, whole: bool = True) -> dict[str, dict[str, tarfile.TarInfo]]:
    """Where the parts of each sample lie, by key and then by kind of file.

    A tar that breaks off raises tarfile.ReadError, or with ``whole=False`` ends before the break.
    """
    found: dict[str, dict[str, tarfile.TarInfo]] = {}
    key = kind = ""
    try:
        for member in tar:
            key, _, kind = member.name.partition(".")
            found.setdefault(key, {})[kind] = member
    except tarfile.ReadError:
        if whole:
            raise
        # tarfile finds the break when it looks for what follows.
        del found[key][kind]
    return found


def read_shard(path: Path) -> Iterator[Sample]:
    """The samples of one shard, one at a time, as ``write_shard`` was given them. Raises ShardError."""
    with tarfile.open(path) as tar:
        for key, parts in members(tar).items():
            kind = next((kind for kind in PICTURES if kind in parts), None)
            if kind is None or "json" not in parts:
                raise _incomplete(path, key)
            about = json.loads(read_member(tar, parts["json"]))
            japanese, english = tuple(about.pop("ja")), tuple(about.pop("en"))
            yield Sample(key, File(kind, read_member(tar, parts[kind])), japanese, english, about)


def _incomplete(path: Path, key: str) -> ShardError:
    return ShardError(f"{path}: sample {key} has no picture or no .json; prepare the data again")


def read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """The bytes of one file of a tar."""
    stream = tar.extractfile(member)
    assert stream is not None
    return stream.read()


class Shards:
    """All samples of a folder of shards, in the order of their names. Raises ShardError."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.glob("*.tar"))
        if not self.paths:
            raise ShardError(f"{folder}: no .tar shards here; make them with scripts/prepare-data")
        self.keys: list[str] = []
        self.about: list[dict[str, Any]] = []
        places: list[tuple[int, int, int]] = []
        for number, path in enumerate(self.paths):
            with tarfile.open(path) as tar:
                for key, parts in members(tar).items():
                    picture = next((parts[kind] for kind in PICTURES if kind in parts), None)
                    if picture is None or "json" not in parts:
                        raise _incomplete(path, key)
                    self.keys.append(key)
                    self.about.append(json.loads(read_member(tar, parts["json"])))
                    places.append((number, picture.offset_data, picture.size))
        self._places = np.array(places, np.int64)

    def __len__(self) -> int:
        return len(self.keys)

    def picture(self, index: int) -> Pixels:
        """The picture of one sample: (height, width, 3), uint8 RGB."""
        shard, offset, size = self._places[index]
        with open(self.paths[shard], "rb") as stream:
            stream.seek(int(offset))
            return np.asarray(Image.open(io.BytesIO(stream.read(int(size)))).convert("RGB"))
