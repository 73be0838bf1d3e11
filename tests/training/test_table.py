"""Tables of addresses: what is read from them, and what img2dataset makes of strangers' servers."""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from picture_server import jpeg, pictures

from japanese_stable_diffusion.training.filters import Limits
from japanese_stable_diffusion.training.preparation import prepare_table
from japanese_stable_diffusion.training.shards import Shards
from japanese_stable_diffusion.training.table import (
    Download,
    Piece,
    Row,
    Table,
    TableError,
    install_img2dataset,
)

LIMITS = Limits(japanese=0.3, min_side=64, max_ratio=2, duplicates=3)


def write_table(path: Path, **columns: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def read(path: Path, limits: Limits = LIMITS, english: str | None = None) -> tuple[list[Row], Counter[str]]:
    pieces = list(Table(path, english).pieces(limits, 1000))
    return [row for piece in pieces for row in piece.rows], sum((p.refused for p in pieces), Counter[str]())


def test_a_row_s_own_word_decides_before_anything_is_downloaded(tmp_path: Path) -> None:
    table = write_table(
        tmp_path / "laion.parquet",
        SAMPLE_ID=list(range(8)),
        URL=[
            "http://a/1",
            "https://a/2",
            "file:///etc/hostname",
            "http://a/4",
            None,
            "http://a/6",
            "http://a/7",
            "http://a/8",
        ],
        TEXT=["猫の写真", "a cat", "猫の写真", "猫の写真", "猫の写真", "猫の写真", None, "猫写真"],
        WIDTH=[300, 300, 300, 63, 300, 300, 300, None],
        HEIGHT=[200, 300, 300, 300, 300, 700, 300, None],
        LANGUAGE=["ja", "ja", "ja", "ja", "ja", "ja", "ja", "zh"],
    )
    rows, refused = read(table)
    assert [row.url for row in rows] == ["http://a/1"]
    assert refused == {"caption": 3, "address": 2, "size": 1, "shape": 1}


def test_a_row_without_a_stated_size_waits_for_the_picture(tmp_path: Path) -> None:
    table = write_table(
        tmp_path / "t.parquet", caption=["猫です"], url=["http://a/1"], WIDTH=[0], HEIGHT=[None]
    )
    assert [row.url for row in read(table)[0]] == ["http://a/1"]


def test_what_the_table_says_goes_into_the_facts(tmp_path: Path) -> None:
    table = write_table(
        tmp_path / "t.parquet",
        URL=["http://a/1", "http://a/2"],
        TEXT=["猫です", "犬です"],
        LICENSE=["CC-BY-4.0", None],
        NSFW=["UNLIKELY", "UNLIKELY"],
        similarity=[0.25, 0.5],
        translated=["a cat", None],
    )
    rows, _ = read(table, english="translated")
    assert rows[0].facts == {"licence": "CC-BY-4.0", "nsfw": "UNLIKELY", "stated_similarity": 0.25}
    assert rows[1].facts == {"nsfw": "UNLIKELY", "stated_similarity": 0.5}
    assert [row.english for row in rows] == ["a cat", ""]


def test_without_a_scorer_the_table_s_own_similarity_counts(tmp_path: Path) -> None:
    columns = {"URL": [f"http://a/{n}" for n in range(3)], "TEXT": ["猫です"] * 3}
    limits = Limits(japanese=0, min_side=0, max_ratio=9, duplicates=-1, min_similarity=0.3)
    table = write_table(tmp_path / "t.parquet", **columns, similarity=[0.29, 0.3, None])
    rows, refused = read(table, limits)
    assert [row.url for row in rows] == ["http://a/1"] and refused == {"similarity": 2}
    with pytest.raises(TableError, match=r"min-similarity: .* no column similarity .* --scorer"):
        read(write_table(tmp_path / "u.parquet", **columns), limits)


def test_pieces_fill_up_over_files_and_take_every_row_once(tmp_path: Path) -> None:
    for file in range(3):
        urls = [f"http://a/{file}{row}" for row in range(5)]
        text = ["猫です" if row % 2 == 0 else "cat" for row in range(5)]
        write_table(tmp_path / f"part-{file}.parquet", URL=urls, TEXT=text)
    pieces = list(Table(tmp_path).pieces(LIMITS, 4))
    assert [[row.url[-2:] for row in piece.rows] for piece in pieces] == [
        ["00", "02", "04", "10"],
        ["12", "14", "20", "22"],
        ["24"],
    ]
    assert sum(len(piece.rows) + piece.refused.total() for piece in pieces) == 15


@pytest.mark.parametrize(
    ("columns", "english", "message"),
    [
        ({"URL": ["http://a"], "ALT": ["猫"]}, None, "no column TEXT; there are URL, ALT"),
        ({"LINK": ["http://a"], "TEXT": ["猫"]}, None, "no column URL; there are LINK, TEXT"),
        ({"URL": ["http://a"], "TEXT": ["猫"]}, "EN", "no column EN; there are URL, TEXT"),
    ],
)
def test_missing_columns_are_named(
    columns: dict[str, list[Any]], english: str | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(TableError, match=message):
        Table(write_table(tmp_path / "t.parquet", **columns), english)


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r"no \.parquet files in this folder"):
        Table(tmp_path)
    with pytest.raises(TableError, match=r"gone\.parquet: can't be read as parquet"):
        Table(tmp_path / "gone.parquet")
    (tmp_path / "t.parquet").write_text("URL,TEXT\n")
    with pytest.raises(TableError, match=r"t\.parquet: can't be read as parquet"):
        Table(tmp_path / "t.parquet")


PIECE = Piece([Row(f"http://a/{n}", f"写真{n}", "", {}) for n in range(4)], Counter())


def write_download(folder: Path, order: list[int]) -> bytes:
    """The tar of an img2dataset run that found these rows, in this order."""
    folder.mkdir(parents=True)
    with open(folder / "00000.tar", "wb") as stream, webdataset.TarWriter(stream) as tar:
        for number in order:
            about = {"url": f"http://a/{number}", "original_width": 200 + number, "original_height": 100}
            content = json.dumps(about | {"sha256": f"{number:064d}"}).encode()
            tar.write({"__key__": f"{number:06d}", "jpg": jpeg(number, 64, 64), "json": content})
    return (folder / "00000.tar").read_bytes()


def test_a_finished_download_is_taken_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "00000"
    write_download(folder, [3, 0])
    lines = [("success", None), ("failed_to_download", "HTTP Error 404: Not\nFound"), ("success", None)]
    lines.append(("failed_to_resize", "Image decoding error"))
    status = {"status": [line[0] for line in lines], "error_message": [line[1] for line in lines]}
    pq.write_table(pa.table(status), folder / "00000.parquet")
    (folder / "00000_stats.json").write_text("{}")
    download = Download(tmp_path / "no-program", PIECE, folder, 64, timeout=1)
    download.wait()
    refused, errors = Counter[str](), Counter[str]()
    samples = list(download.samples("00007", refused, errors))
    assert [sample.key for sample in samples] == ["00007-00000", "00007-00003"]
    assert [sample.japanese for sample in samples] == [("写真0",), ("写真3",)]
    assert samples[1].facts == {
        "url": "http://a/3",
        "licence": "unknown",
        "width": 203,
        "height": 100,
        "sha256": f"{3:064d}",
    }
    assert samples[1].file().content == jpeg(3, 64, 64)
    assert refused == {"not fetched": 1, "broken": 1}
    assert errors == {"HTTP Error 404: NotFound": 1, "Image decoding error": 1}


def test_what_a_stopped_download_had_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "00000"
    download = Download(Path(sys.executable), PIECE, folder, 64, timeout=1)
    download.stop()
    download.clear()
    whole = write_download(folder, [2, 0, 1])
    (folder / "00000.tar").write_bytes(whole[: len(whole) * 3 // 4])
    refused, errors = Counter[str](), Counter[str]()
    assert [sample.key for sample in download.samples("p", refused, errors)] == ["p-00000", "p-00002"]
    assert refused == {"not fetched": 2} and errors == {"took too long": 2}


def test_a_downloader_that_fails_is_quoted(tmp_path: Path) -> None:
    download = Download(Path(sys.executable), PIECE, tmp_path / "00000", 64, timeout=1)
    with pytest.raises(TableError, match=r"img2dataset failed: .*No module named '?img2dataset'?.*/log$"):
        download.wait()


@pytest.fixture(scope="module")
def tools(request: pytest.FixtureRequest) -> Path:
    """img2dataset itself, installed once for this and later runs."""
    assert request.config.cache is not None
    folder = request.config.cache.mkdir("tools")
    assert install_img2dataset(folder) == install_img2dataset(folder)
    return folder


@pytest.mark.slow
def test_img2dataset_gets_what_strangers_servers_give(tools: Path, tmp_path: Path) -> None:
    with pictures() as server:
        wants = ["300x300/0", "missing", "silent", "page", "cut", "forbidden", "40x40/1", "300x100/2"]
        urls = [f"{server}/{want}" for want in [*wants, "150x150/0", "200x300/3"]]
        captions = [f"{number}の写真" for number in range(len(urls))]
        table = Table(write_table(tmp_path / "t.parquet", URL=urls, TEXT=captions))
        report = prepare_table(table, tmp_path / "data", tools, 128, LIMITS, timeout=2)
    shards = Shards(tmp_path / "data")
    assert [about["ja"] for about in shards.about] == [["0の写真"], ["9の写真"]]
    assert {shards.picture(index).shape for index in range(2)} == {(128, 128, 3)}
    assert (shards.about[1]["width"], shards.about[1]["height"]) == (200, 300)
    total = report.total()
    assert (total["seen"], total["kept"]) == (10, 2)
    expected = {"not fetched": 3, "broken": 2, "size": 1, "shape": 1, "duplicate": 1}
    assert {reason: count for reason, count in total["refused"].items() if count} == expected
    assert "HTTP Error 404: Not Found" in total["errors"]


@pytest.mark.slow
def test_img2dataset_is_stopped_when_a_server_never_ends(tools: Path, tmp_path: Path) -> None:
    with pictures() as server:
        urls = [f"{server}/600x600/{number}" for number in range(4)] + [f"{server}/dripping"]
        captions = [f"{number}の写真" for number in range(len(urls))]
        table = Table(write_table(tmp_path / "t.parquet", URL=urls, TEXT=captions))
        report = prepare_table(table, tmp_path / "data", tools, 512, LIMITS, timeout=2)
    total = report.total()
    # What it had not yet written to disk is lost with it.
    assert 2 <= total["kept"] == len(Shards(tmp_path / "data")) <= 4
    assert total["errors"] == {"took too long": 5 - total["kept"]}
