"""Preparing data: the same bytes every time, from where it was stopped, and all that was left out counted."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from picture_server import pictures
from plain_downloader import install
from small_art import write_art

from japanese_stable_diffusion.training.emoji import HANDS, STYLES, VARIANTS
from japanese_stable_diffusion.training.filters import Limits
from japanese_stable_diffusion.training.preparation import (
    EMOJI_LIMITS,
    PreparationError,
    prepare_emoji,
    prepare_table,
)
from japanese_stable_diffusion.training.shards import Shards
from japanese_stable_diffusion.training.table import Table

ROOT = Path(__file__).resolve().parents[2]
SIZE = 48
LIMITS = Limits(japanese=0.3, min_side=64, max_ratio=2, duplicates=3)
# Two concepts by two hands, one by both, and the daruma by four of our own.
DRAWINGS = 3 + 4
PICTURES = DRAWINGS * sum(VARIANTS.get(style.name, 1) for style in STYLES)


def files(folder: Path) -> dict[str, bytes]:
    """What a run must make again byte for byte."""
    paths = [*folder.glob("*.tar"), *folder.glob("*.json")]
    assert paths and not [p.name for p in folder.iterdir() if p.suffix in (".partial", ".drawn")]
    return {path.name: path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def art(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_art(tmp_path_factory.mktemp("art"))


@pytest.fixture(scope="module")
def emoji_folder(art: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("emoji")
    report = prepare_emoji(art, folder, SIZE, processes=1)
    assert (report.total()["seen"], report.total()["kept"]) == (PICTURES, PICTURES)
    return folder


def test_emoji_shards_hold_every_drawing_with_its_licence(emoji_folder: Path) -> None:
    shards = Shards(emoji_folder)
    assert len(shards) == PICTURES
    assert {shards.picture(index).shape for index in (0, PICTURES - 1)} == {(SIZE, SIZE, 3)}
    licences = {hand.licence for hand in HANDS} | {"CC0-1.0"}
    assert all(about["licence"] in licences and about["ja"] and about["en"] for about in shards.about)
    assert {about["concept"] for about in shards.about} == {"😀", "😉", "daruma"}


def test_emoji_again_changes_nothing(art: Path, emoji_folder: Path) -> None:
    before, times = (
        files(emoji_folder),
        [path.stat().st_mtime_ns for path in sorted(emoji_folder.glob("*.tar"))],
    )
    report = prepare_emoji(art, emoji_folder, SIZE, processes=1)
    assert files(emoji_folder) == before
    assert times == [path.stat().st_mtime_ns for path in sorted(emoji_folder.glob("*.tar"))]
    assert report.total()["kept"] == PICTURES


@pytest.mark.slow
def test_emoji_killed_and_resumed_makes_the_same(art: Path, emoji_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    command = [ROOT / "scripts" / "prepare-data", "emoji", "--art", art, "--folder", folder]
    command += ["--size", str(SIZE), "--processes", "1"]
    first = subprocess.Popen([sys.executable, *command], start_new_session=True, stderr=subprocess.DEVNULL)
    while not list(folder.glob("*.drawn")) and first.poll() is None:
        time.sleep(0.01)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    again = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert files(folder) == files(emoji_folder)
    counts = {line.split()[0]: line.split()[1] for line in again.stdout.splitlines() if "%" in line}
    assert counts["seen"] == counts["kept"] == str(PICTURES) and counts["duplicate"] == "0"


def test_filters_apply_to_emoji_too(art: Path, tmp_path: Path) -> None:
    report = prepare_emoji(
        art, tmp_path / "data", SIZE, replace(EMOJI_LIMITS, min_side=SIZE + 1), processes=1
    )
    assert report.total()["refused"]["size"] == PICTURES and report.total()["kept"] == 0
    assert not list((tmp_path / "data").glob("*.tar"))


def test_other_settings_want_another_folder(art: Path, emoji_folder: Path) -> None:
    before = files(emoji_folder)
    with pytest.raises(PreparationError, match=r"was begun with other settings \(size\); .* another folder"):
        prepare_emoji(art, emoji_folder, SIZE + 1)
    with pytest.raises(PreparationError, match=r"other settings \(limits\)"):
        prepare_emoji(art, emoji_folder, SIZE, replace(EMOJI_LIMITS, japanese=0))
    assert files(emoji_folder) == before


def test_strange_shards_are_left_alone(art: Path, tmp_path: Path) -> None:
    (tmp_path / "emoji-00000.tar").write_bytes(b"somebody's")
    with pytest.raises(PreparationError, match=r"has shards but no report\.json"):
        prepare_emoji(art, tmp_path, SIZE)
    assert (tmp_path / "emoji-00000.tar").read_bytes() == b"somebody's"


def test_two_runs_don_t_share_a_folder(art: Path, tmp_path: Path) -> None:
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(PreparationError, match="another run is preparing data here"):
        prepare_emoji(art, tmp_path, SIZE)
    os.close(handle)


def test_numbers_that_make_no_sense_are_refused(art: Path, tmp_path: Path) -> None:
    with pytest.raises(PreparationError, match="size: 31 pixels; 32 to 2048 is allowed"):
        prepare_emoji(art, tmp_path, 31)
    with pytest.raises(PreparationError, match="processes: 0; 1 and more are allowed"):
        prepare_emoji(art, tmp_path, SIZE, processes=0)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_can_t_be_made_is_one_line(art: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PreparationError, match=r"file: .* choose a folder that can be written"):
        prepare_emoji(art, tmp_path / "file", SIZE)


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(tmp_path_factory.mktemp("tools"))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Table]:
    with pictures() as server:
        wants = ["100x100/0", "missing", "100x100/1", "page", "40x90/2", "90x190/3"]
        wants += ["120x120/0", "100x100/4", "silent", "80x100/5", "100x100/1"]
        path = tmp_path_factory.mktemp("table") / "laion.parquet"
        urls = [f"{server}/{want}" for want in wants] + ["file:///etc/hostname", f"{server}/100x100/6"]
        captions = [f"{number}の写真" for number in range(len(wants))] + ["ファイル", "a photo"]
        pq.write_table(pa.table({"URL": urls, "TEXT": captions, "LICENSE": ["?"] * len(urls)}), path)
        yield Table(path)


def prepare(table: Table, folder: Path, tools: Path, processes: int = 1) -> dict[str, bytes]:
    prepare_table(table, folder, tools, SIZE, LIMITS, processes, rows_per_shard=4, timeout=0.5)
    return files(folder)


@pytest.fixture(scope="module")
def table_folder(table: Table, tools: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("table") / "data"
    prepare(table, folder, tools)
    return folder


def test_a_table_s_pictures_become_shards(table: Table, table_folder: Path) -> None:
    shards = Shards(table_folder)
    assert shards.keys == ["00000-00000", "00000-00002", "00001-00003", "00002-00001"]
    assert [about["ja"] for about in shards.about] == [["0の写真"], ["2の写真"], ["7の写真"], ["9の写真"]]
    assert [about["en"] for about in shards.about] == [[]] * 4
    assert shards.about[3]["url"].endswith("/80x100/5") and shards.about[3]["licence"] == "?"
    assert (shards.about[3]["width"], shards.about[3]["height"]) == (80, 100)
    assert {shards.picture(index).shape for index in range(4)} == {(SIZE, SIZE, 3)}


def test_the_report_counts_every_row_once(table_folder: Path) -> None:
    report = json.loads((table_folder / "report.json").read_text())
    total = report["total"]
    assert (total["seen"], total["kept"]) == (13, 4)
    assert total["seen"] == total["kept"] + sum(total["refused"].values())
    expected = {
        "address": 1,
        "caption": 1,
        "not fetched": 2,
        "broken": 1,
        "size": 1,
        "shape": 1,
        "duplicate": 2,
    }
    assert {reason: count for reason, count in total["refused"].items() if count} == expected
    assert total["errors"]["HTTP Error 404: Not Found"] == 1
    assert [shard["shard"] for shard in report["shards"]] == [f"table-{n:05d}.tar" for n in range(3)]


def test_a_table_gives_the_same_bytes_however_many_processes(
    table: Table, table_folder: Path, tools: Path, tmp_path: Path
) -> None:
    assert prepare(table, tmp_path / "data", tools, processes=3) == files(table_folder)


def test_a_table_again_changes_nothing(table: Table, table_folder: Path, tools: Path) -> None:
    before = files(table_folder)
    assert prepare(table, table_folder, tools) == before


def test_a_table_goes_on_where_a_shard_is_missing(table: Table, table_folder: Path, tools: Path) -> None:
    before = files(table_folder)
    (table_folder / "table-00001.tar").unlink()
    assert prepare(table, table_folder, tools) == before


def test_the_report_is_a_table_of_counts(table: Table, table_folder: Path, tools: Path) -> None:
    report = prepare_table(table, table_folder, tools, SIZE, LIMITS, rows_per_shard=4)
    lines = [line.split() for line in str(report).splitlines()]
    assert ["seen", "13", "100.0%"] in lines and ["kept", "4", "30.8%"] in lines
    assert ["not", "fetched", "2", "15.4%"] in lines and ["duplicate", "2", "15.4%"] in lines


def test_the_door_says_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    door = [sys.executable, ROOT / "scripts" / "prepare-data", "table", tmp_path / "gone.parquet"]
    done = subprocess.run([*door, "--folder", tmp_path / "data"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"{tmp_path}/gone.parquet: can't be read as parquet")
    assert done.stderr.count("\n") == 1
