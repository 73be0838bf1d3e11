"""Pictures from a table of addresses and captions, such as LAION's, as samples.

The table is parquet with the columns of LAION-5B (https://laion.ai/blog/laion-5b/): URL, TEXT, and if
there are WIDTH, HEIGHT, similarity, LICENSE, LANGUAGE and NSFW. It is read a piece at a time. What a
row says of itself decides first, so that nothing is downloaded in vain; img2dataset
(https://github.com/rom1504/img2dataset) gets the rest. It keeps away from pictures whose owners
forbid it (``X-Robots-Tag: noai``).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .filters import Limits, is_japanese, wrong_size
from .samples import File, Sample
from .shards import members, read_member

REQUIREMENTS = Path(__file__).parents[2] / "requirements-img2dataset.txt"

THREADS = 64
"""Downloads at a time, for each process."""

RETRIES = 1

MEMORY_KB = 8 << 20
"""What one download process may take; a server that sends without end runs into it."""

MOST_PIXELS = 100_000_000
"""A picture that unpacks to more counts as broken."""

FACTS = {"similarity": "stated_similarity", "license": "licence", "language": "language", "nsfw": "nsfw"}


class TableError(Exception):
    """The table or the downloader can't be used; the message says why and what to do."""


@dataclass(frozen=True)
class Row:
    """One line of the table that is worth a download."""

    url: str
    japanese: str
    english: str
    facts: dict[str, str | int | float]


@dataclass(frozen=True)
class Piece:
    """The rows that make up one shard, and how many were refused to find them."""

    rows: list[Row]
    refused: Counter[str]


class Table:
    """A parquet file, or a folder of them in the order of their names. Raises TableError.

    ``english``: the column with English captions; without it samples have none.
    """

    def __init__(self, path: Path, english: str | None = None) -> None:
        self.paths = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        if not self.paths:
            raise TableError(f"{path}: no .parquet files in this folder; give a table as LAION publishes it")
        self.english = english
        self._columns: list[dict[str, str]] = []
        self.lengths: list[int] = []
        for file in self.paths:
            with _opened(file) as parquet:
                self.lengths.append(parquet.metadata.num_rows)
                self._columns.append(self._known(file, parquet.schema_arrow.names))

    def _known(self, file: Path, names: list[str]) -> dict[str, str]:
        lower = {name.lower(): name for name in names}
        wanted = ("url", "text", "width", "height", *FACTS)
        columns = {known: lower[known] for known in wanted if known in lower}
        # Tables that were published again call it so.
        columns |= {"text": lower["caption"]} if "text" not in lower and "caption" in lower else {}
        for needed in ("url", "text"):
            if needed not in columns:
                raise TableError(f"{file}: no column {needed.upper()}; there are {', '.join(names)}")
        if self.english:
            if self.english not in names:
                raise TableError(f"{file}: no column {self.english}; there are {', '.join(names)}")
            columns["english"] = self.english
        return columns

    def pieces(self, limits: Limits, rows_per_piece: int) -> Iterator[Piece]:
        """Read on until ``rows_per_piece`` rows pass what can be told without the picture, and again."""
        rows: list[Row] = []
        refused = Counter[str]()
        for file, columns in zip(self.paths, self._columns, strict=True):
            names = list(columns.values())
            with _opened(file) as parquet:
                for batch in parquet.iter_batches(4096, columns=names):
                    for line in batch.select(names).rename_columns(list(columns)).to_pylist():
                        wrong = _wrong(line, limits)
                        if wrong:
                            refused[wrong] += 1
                            continue
                        rows.append(_row(line))
                        if len(rows) == rows_per_piece:
                            yield Piece(rows, refused)
                            rows, refused = [], Counter()
        if rows or refused:
            yield Piece(rows, refused)


@contextmanager
def _opened(file: Path) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(file) as parquet:
            yield parquet
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise TableError(f"{file}: can't be read as parquet ({reason})") from error


def _row(line: dict[str, Any]) -> Row:
    facts = {fact: line[name] for name, fact in FACTS.items() if line.get(name) not in (None, "")}
    return Row(line["url"], line["text"], line.get("english") or "", facts)


def _wrong(line: dict[str, Any], limits: Limits) -> str | None:
    # img2dataset would open file:// addresses too, and show strangers' tables our disk.
    if not str(line["url"]).lower().startswith(("http://", "https://")):
        return "address"
    text = line["text"]
    if not text or not is_japanese(text, limits.japanese, line.get("language") or ""):
        return "caption"
    if line.get("width") and line.get("height"):
        wrong = wrong_size(line["width"], line["height"], limits)
        if wrong:
            return wrong
    if limits.min_similarity is not None and limits.scorer is None:
        if "similarity" not in line:
            raise TableError(
                "min-similarity: the table has no column similarity to go by; "
                "give a CLIP-like model with --scorer, or leave it out"
            )
        if not (line["similarity"] or -1) >= limits.min_similarity:
            return "similarity"
    return None


def install_img2dataset(folder: Path) -> Path:
    """Make an environment for img2dataset below ``folder`` once; return its Python. Raises TableError."""
    place = folder / f"img2dataset-{hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()[:12]}"
    python = Path("bin") / "python"
    if place.is_dir():
        return place / python
    folder.mkdir(parents=True, exist_ok=True)
    print(f"Setting up img2dataset in {place}; this takes a minute or two.", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        unfinished = Path(scratch) / "environment"
        venv.create(unfinished, with_pip=True)
        pip = subprocess.run(
            [unfinished / python, "-m", "pip", "install", "--no-input", "--quiet", "-r", REQUIREMENTS],
            stdout=sys.stderr,
            stderr=subprocess.PIPE,
            text=True,
        )
        if pip.returncode:
            errors = [line for line in pip.stderr.splitlines() if line.startswith("ERROR: ")]
            reason = errors[-1][len("ERROR: ") :] if errors else f"pip ended with {pip.returncode}"
            raise TableError(f"can't install img2dataset: {reason}; check network and disk space")
        try:
            unfinished.rename(place)
        except OSError:
            # Somebody else was faster.
            if not place.is_dir():
                raise
    return place / python


class Download:
    """img2dataset at work on one piece, in a process of its own.

    ``folder`` holds what it writes; one that it finished before is taken as it is. Pictures are
    scaled and cropped to squares of ``size`` pixels.
    """

    def __init__(self, python: Path, piece: Piece, folder: Path, size: int, timeout: float) -> None:
        self._folder = folder
        self._rows = piece.rows
        # A server that sends a byte now and then never times out. While others answer or fail, samples end
        # in their files at least this often.
        self._patience = 4 * timeout * (1 + RETRIES)
        self._process: subprocess.Popen[bytes] | None = None
        if not piece.rows or (folder / "00000_stats.json").exists():
            return
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        pq.write_table(pa.table({"url": [row.url for row in piece.rows]}), folder / "rows.parquet")
        options = {
            "url_list": folder / "rows.parquet",
            "input_format": "parquet",
            "output_folder": folder,
            "output_format": "webdataset",
            # All rows in one shard, so that a sample's key is the number of its row.
            "number_sample_per_shard": 10 ** len(str(len(piece.rows))),
            "processes_count": 1,
            "thread_count": THREADS,
            "timeout": timeout,
            "retries": RETRIES,
            "image_size": size,
            "resize_mode": "center_crop",
            "extract_exif": False,
            "compute_hash": "sha256",
        }
        limited = ["sh", "-c", 'ulimit -v "$0"; exec "$@"', str(MEMORY_KB)]
        program = [str(python), "-m", "img2dataset.main"]
        with open(folder / "log", "wb") as log:
            self._process = subprocess.Popen(
                [*limited, *program, *(f"--{name}={value}" for name, value in options.items())],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=_environment(),
            )

    def wait(self) -> None:
        """Wait for the end, or end it when servers draw it out. Raises TableError."""
        if self._process is None:
            return
        written, grown = 0, time.monotonic()
        while self._process.poll() is None:
            time.sleep(0.05)
            files = [self._folder / "00000.tar", self._folder / "00000.parquet"]
            before, written = written, sum(file.stat().st_size for file in files if file.exists())
            if written != before or not files[0].exists():
                grown = time.monotonic()
            elif time.monotonic() > grown + self._patience:
                self.stop()
                return
        if not (self._folder / "00000_stats.json").exists():
            log = self._folder / "log"
            last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
            raise TableError(f"img2dataset failed: {last[0]}; all it said is in {log}")

    def stop(self) -> None:
        """End img2dataset and the processes that it started."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def clear(self) -> None:
        """Remove what img2dataset wrote."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def samples(self, prefix: str, refused: Counter[str], errors: Counter[str]) -> Iterator[Sample]:
        """What was found, in the order of the rows; the others are counted, with the reason given."""
        found = 0
        path = self._folder / "00000.tar"
        if path.exists() and path.stat().st_size:
            # A download that was stopped leaves a tar without an end.
            with tarfile.open(path) as tar:
                parts = members(tar, whole=False)
                for key in sorted(parts):
                    if not {"jpg", "json"} <= parts[key].keys():
                        continue
                    found += 1
                    about = json.loads(read_member(tar, parts[key]["json"]))
                    picture = File("jpg", read_member(tar, parts[key]["jpg"]))
                    yield self._sample(prefix, int(key), about, picture)
        self._count_failures(len(self._rows) - found, refused, errors)

    def _sample(self, prefix: str, number: int, about: dict[str, Any], picture: File) -> Sample:
        row = self._rows[number]
        facts: dict[str, str | int | float] = {
            "url": row.url,
            "licence": "unknown",
            **row.facts,
            "width": about["original_width"],
            "height": about["original_height"],
            "sha256": about["sha256"],
        }
        english = (row.english,) if row.english else ()
        return Sample(f"{prefix}-{number:05d}", picture, (row.japanese,), english, facts)

    def _count_failures(self, failures: int, refused: Counter[str], errors: Counter[str]) -> None:
        status = self._folder / "00000.parquet"
        if (self._folder / "00000_stats.json").exists():
            table = pq.read_table(status, columns=["status", "error_message"])
            for line in table.to_pylist():
                if line["status"] == "success":
                    continue
                failures -= 1
                refused["broken" if line["status"] == "failed_to_resize" else "not fetched"] += 1
                # A server may have worded it.
                reason = "".join(filter(str.isprintable, line["error_message"]))[:80]
                errors[reason or "no reason given"] += 1
        if failures:
            refused["not fetched"] += failures
            errors["took too long"] += failures


def _environment() -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return ours | {
        "NO_ALBUMENTATIONS_UPDATE": "1",
        "OPENCV_IO_MAX_IMAGE_PIXELS": str(MOST_PIXELS),
        # Address space that is only set aside would count against the limit too.
        "MALLOC_ARENA_MAX": "2",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
