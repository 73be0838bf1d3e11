"""Shards: the same bytes every time, whole or not there, and read at random."""

import json
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset

from japanese_stable_diffusion.training.samples import File, Sample
from japanese_stable_diffusion.training.shards import ShardError, Shards, members, read_shard, write_shard


def sample(number: int) -> Sample:
    picture = np.random.default_rng(number).integers(0, 256, (12, 10, 3), np.uint8)
    facts: dict[str, str | int | float] = {"licence": "CC0-1.0", "width": 10 + number}
    return Sample(f"sample-{number}", picture, (f"写真{number}", "しゃしん"), (f"photo {number}",), facts)


def write(path: Path, numbers: range) -> Path:
    assert write_shard(path, map(sample, numbers)) == len(numbers)
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    back = list(read_shard(write(tmp_path / "a.tar", range(3))))
    for number, found in enumerate(back):
        wanted = sample(number)
        assert (found.key, found.japanese, found.english) == (wanted.key, wanted.japanese, wanted.english)
        assert found.facts == wanted.facts
        assert np.array_equal(found.pixels(), wanted.pixels())
    assert len(back) == 3


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    one, other = write(tmp_path / "a.tar", range(3)), write(tmp_path / "b.tar", range(3))
    assert one.read_bytes() == other.read_bytes()


def test_a_picture_that_came_as_a_file_is_not_encoded_again(tmp_path: Path) -> None:
    first = next(read_shard(write(tmp_path / "a.tar", range(1))))
    assert isinstance(first.picture, File)
    # Bytes behind a PNG's end don't change the picture, but encoding again would drop them.
    picture = File("png", first.picture.content + b"trailer")
    write_shard(tmp_path / "b.tar", [replace(first, picture=picture)])
    assert next(read_shard(tmp_path / "b.tar")).picture == picture


def test_a_shard_is_whole_or_not_there(tmp_path: Path) -> None:
    def failing() -> Iterator[Sample]:
        yield sample(0)
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError):
        write_shard(tmp_path / "a.tar", failing())
    assert not (tmp_path / "a.tar").exists()


def test_samples_are_found_at_random_over_all_shards(tmp_path: Path) -> None:
    write(tmp_path / "b.tar", range(2, 5))
    write(tmp_path / "a.tar", range(2))
    shards = Shards(tmp_path)
    assert shards.keys == [f"sample-{number}" for number in range(5)] and len(shards) == 5
    for number in (4, 0, 2, 1, 3):
        assert np.array_equal(shards.picture(number), sample(number).pixels())
        assert shards.about[number]["ja"] == [f"写真{number}", "しゃしん"]
        assert shards.about[number]["width"] == 10 + number


def test_webdataset_itself_reads_a_shard(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", range(3))
    read = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [item["__key__"] for item in read] == ["sample-0", "sample-1", "sample-2"]
    assert json.loads(read[1]["json"])["en"] == ["photo 1"]
    assert read[2]["png"] == sample(2).file().content


def test_a_folder_without_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"no \.tar shards here; make them with scripts/prepare-data"):
        Shards(tmp_path)


def test_a_sample_without_its_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with open(path, "wb") as stream, webdataset.TarWriter(stream) as tar:
        tar.write({"__key__": "lonely", "png": b""})
    for read in (lambda: Shards(tmp_path), lambda: list(read_shard(path))):
        with pytest.raises(ShardError, match=r"a\.tar: sample lonely has no picture or no \.json"):
            read()


@pytest.mark.parametrize("lost", [1, 700, 1700, 2500])
def test_what_is_whole_of_a_broken_off_tar_can_be_read(tmp_path: Path, lost: int) -> None:
    whole = write(tmp_path / "a.tar", range(3)).read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        found = members(tar)
        content = max(m.offset_data + m.size for parts in found.values() for m in parts.values())
    path = tmp_path / "b.tar"
    path.write_bytes(whole[: content - lost])
    with tarfile.open(path) as tar:
        rest = members(tar, whole=False)
        for key, parts in rest.items():
            for kind, member in parts.items():
                stream = tar.extractfile(member)
                assert stream is not None and len(stream.read()) == found[key][kind].size
    assert "sample-0" in rest and len(rest.get("sample-2", {})) < 2
