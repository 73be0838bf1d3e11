"""Turn a source of samples into a folder of shards, with a report of what was left out.

Shards are made in order, and each is whole or not there, so a run that was stopped goes on where it
was. The same source gives the same bytes.
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import shutil
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import cv2
from tqdm import tqdm

from . import emoji
from .filters import Filters, Limits
from .samples import Sample
from .shards import read_shard, write_shard
from .table import Download, Piece, Table, install_img2dataset

CONCEPTS_PER_SHARD = 16
ROWS_PER_SHARD = 10_000
REASONS = ("address", "not fetched", "broken", "caption", "size", "shape", "similarity", "duplicate")

EMOJI_LIMITS = Limits(japanese=0.3, min_side=1, max_ratio=1, duplicates=-1)
"""Several drawings of a thing are meant to look alike, and in some styles so do those of like things."""

TABLE_LIMITS = Limits(japanese=0.3, min_side=256, max_ratio=2, duplicates=3)


SIZES = range(32, 2049)


class PreparationError(Exception):
    """The data can't be prepared into this folder; the message says why and what to do."""


class Report:
    """What came in and what was left out of each shard, in ``report.json`` beside the shards."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self._folder = folder
        self._path = folder / "report.json"
        self.shards: list[dict[str, Any]] = []
        # As JSON gives it back: no tuples, no paths.
        self._settings = json.loads(json.dumps(settings, default=str))
        if not self._path.exists():
            if any(folder.glob("*.tar")):
                raise PreparationError(f"{folder}: has shards but no report.json; choose another folder")
            return
        report = json.loads(self._path.read_text())
        if report["settings"] != self._settings:
            before = report["settings"]
            changed = [
                name for name in self._settings | before if before.get(name) != self._settings.get(name)
            ]
            raise PreparationError(
                f"{folder}: was begun with other settings ({', '.join(changed)}); "
                "give the same again, or choose another folder"
            )
        for shard in report["shards"]:
            if shard["kept"] and not (folder / shard["shard"]).exists():
                break
            self.shards.append(shard)

    @property
    def done(self) -> int:
        """How many shards are finished."""
        return len(self.shards)

    def add(self, shard: str, kept: int, refused: Counter[str], errors: Counter[str]) -> None:
        """Record a finished shard."""
        about: dict[str, Any] = {"shard": shard, "seen": kept + refused.total(), "kept": kept}
        about["refused"] = {reason: refused[reason] for reason in REASONS if refused[reason]}
        if errors:
            about["errors"] = dict(sorted(errors.items(), key=lambda item: (-item[1], item[0]))[:20])
        self.shards.append(about)
        report = {"settings": self._settings, "total": self.total(), "shards": self.shards}
        unfinished = self._path.with_suffix(".partial")
        unfinished.write_text(json.dumps(report, ensure_ascii=False, indent=1))
        os.replace(unfinished, self._path)

    def total(self) -> dict[str, Any]:
        """The sums over all finished shards."""
        refused, errors = Counter[str](), Counter[str]()
        for shard in self.shards:
            refused.update(shard["refused"])
            errors.update(shard.get("errors", {}))
        return {
            "seen": sum(shard["seen"] for shard in self.shards),
            "kept": sum(shard["kept"] for shard in self.shards),
            "refused": {reason: refused[reason] for reason in REASONS},
            "errors": dict(errors.most_common(20)),
        }

    def __str__(self) -> str:
        total = self.total()
        lines = [("seen", total["seen"]), *total["refused"].items(), ("kept", total["kept"])]
        table = [f"{name:<12} {count:>12,} {count / max(total['seen'], 1):>8.1%}" for name, count in lines]
        errors = [f"{count:>25,} × {error}" for error, count in list(total["errors"].items())[:5]]
        return "\n".join([*table, *errors])


def _check(size: int, processes: int | None) -> None:
    if size not in SIZES:
        raise PreparationError(f"size: {size} pixels; {SIZES[0]} to {SIZES[-1]} is allowed")
    if processes is not None and processes < 1:
        raise PreparationError(f"processes: {processes}; 1 and more are allowed")


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise PreparationError(f"{folder}: {error.strerror}; choose a folder that can be written") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise PreparationError(f"{folder}: another run is preparing data here; wait for its end") from None
    finally:
        os.close(handle)


def _write(shard: Path, samples: Iterator[Sample]) -> int:
    kept = write_shard(shard, samples)
    if not kept:
        # An empty tar says no more than none.
        shard.unlink()
    return kept


def _draw(art: Path, folder: Path, size: int, first: int) -> Path:
    path = folder / f"emoji-{first:05d}.drawn"
    if not path.exists():
        cv2.setNumThreads(1)
        write_shard(path, emoji.samples(art, size, first, CONCEPTS_PER_SHARD))
    return path


def prepare_emoji(
    art: Path, folder: Path, size: int = 128, limits: Limits = EMOJI_LIMITS, processes: int | None = None
) -> Report:
    """Draw all concepts in all styles into ``folder``, on all cores unless ``processes`` says how many.

    ``art`` is where the drawings are kept, and fetched to if they aren't there. Raises ArtError,
    FilterError and PreparationError.
    """
    _check(size, processes)
    with _alone_in(folder):
        packages = {hand.package: hand.version for hand in emoji.HANDS} | dict([emoji.NAMES_PACKAGE])
        report = Report(folder, {"source": "emoji", "art": packages, "size": size, "limits": asdict(limits)})
        filters = Filters(limits, folder / "seen.sqlite", report.done)
        firsts = range(0, len(emoji.read_concepts(art)), CONCEPTS_PER_SHARD)
        # Drawing takes nearly all the time; filtering has to know all that came before.
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            drawn = pool.imap(partial(_draw, art, folder, size), firsts[report.done :])
            progress = tqdm(drawn, total=len(firsts), initial=report.done, desc="shards", unit="shard")
            for number, path in enumerate(progress, report.done):
                refused = Counter[str]()
                shard = path.with_suffix(".tar")
                kept = _write(shard, filters.passing(read_shard(path), number, refused))
                report.add(shard.name, kept, refused, Counter())
                path.unlink()
        filters.close()
    return report


def prepare_table(
    table: Table,
    folder: Path,
    tools: Path,
    size: int = 512,
    limits: Limits = TABLE_LIMITS,
    processes: int = 2,
    rows_per_shard: int = ROWS_PER_SHARD,
    timeout: float = 10,
) -> Report:
    """Download what a table lists into ``folder``, as squares of ``size`` pixels.

    ``tools`` is where img2dataset is kept, and installed to if it isn't there. ``processes`` pieces of
    the table are downloaded at a time. A server that doesn't answer within ``timeout`` seconds is
    given up. Raises FilterError, PreparationError and TableError.
    """
    _check(size, processes)
    if not timeout > 0:
        raise PreparationError(f"timeout: {timeout} seconds; more than 0 is allowed")
    with _alone_in(folder):
        files = [
            [path.name, path.stat().st_size, length]
            for path, length in zip(table.paths, table.lengths, strict=True)
        ]
        settings = {
            "source": "table",
            "files": files,
            "english": table.english,
            "size": size,
            "rows_per_shard": rows_per_shard,
            "limits": asdict(limits),
        }
        report = Report(folder, settings)
        filters = Filters(limits, folder / "seen.sqlite", report.done)
        python = install_img2dataset(tools)
        running: deque[tuple[int, Piece, Download]] = deque()
        progress = tqdm(total=sum(table.lengths), desc="rows", unit="row", unit_scale=True)

        def finish_first() -> None:
            number, piece, download = running[0]
            download.wait()
            shard, errors = folder / f"table-{number:05d}.tar", Counter[str]()
            samples = download.samples(f"{number:05d}", piece.refused, errors)
            kept = _write(shard, filters.passing(samples, number, piece.refused))
            report.add(shard.name, kept, piece.refused, errors)
            download.clear()
            running.popleft()
            progress.update(report.shards[number]["seen"])

        try:
            for number, piece in enumerate(table.pieces(limits, rows_per_shard)):
                if number < report.done:
                    progress.update(report.shards[number]["seen"])
                    continue
                place = folder / "downloads" / f"{number:05d}"
                running.append((number, piece, Download(python, piece, place, size, timeout)))
                if len(running) == processes:
                    finish_first()
            while running:
                finish_first()
        finally:
            for _, _, download in running:
                download.stop()
            progress.close()
        filters.close()
        shutil.rmtree(folder / "downloads", ignore_errors=True)
    return report
