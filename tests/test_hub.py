import contextlib
import errno
import os
import pickle
import signal
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from layout_2022 import write_2022_layout
from loopback_hub import TOKEN, Hub, serve
from PIL import Image

from japanese_stable_diffusion import hub as real_hub
from japanese_stable_diffusion.weights import read_manifest

ROOT = Path(__file__).resolve().parent.parent
UNET = "unet/diffusion_pytorch_model.bin"
UNFINISHED = ".weights-07655518e551"


@pytest.fixture(scope="module")
def original(tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_2022_layout(tiny_weights, tmp_path_factory.mktemp("original") / "2022")
    # Large enough for some of it to reach the disk before it is whole.
    with zipfile.ZipFile(folder / UNET, "a") as archive:
        archive.writestr("diffusion_pytorch_model/padding", os.urandom(24 * 2**20))
    return folder


@pytest.fixture
def hub(original: Path) -> Iterator[Hub]:
    with serve(original) as running:
        yield running


@pytest.fixture
def here(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The hub, for calls in this process too, with a good token."""
    # HF_ENDPOINT as huggingface_hub reads it when it is imported.
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


def environment(hub: Hub | str, token: str | None = TOKEN, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "JSD_"))}
    kept |= {"HF_HOME": "/nonexistent", "HF_ENDPOINT": hub if isinstance(hub, str) else hub.url, **more}
    return kept if token is None else {**kept, "HF_TOKEN": token}


def start(*arguments: object, env: dict[str, str]) -> "subprocess.Popen[str]":
    door = ROOT / "scripts" / "download-weights"
    command = [sys.executable, door, *map(str, arguments)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(*arguments: object, env: dict[str, str]) -> tuple[int, str, str]:
    process = start(*arguments, env=env)
    out, err = process.communicate()
    return process.returncode, out, err


def test_fetch_interrupt_resume_verify_predict(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    hub.stall_at[UNET] = 15 * 2**20

    process = start("-o", folder, env=environment(hub))
    assert hub.stalled.wait(60)
    part = tmp_path / UNFINISHED / f"{UNET}.part"
    while not part.exists() or part.stat().st_size == 0:
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    assert err.splitlines()[-1].startswith("interrupted; run the same again to go on")
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == [UNFINISHED]
    arrived = part.stat().st_size
    assert 0 < arrived < 24 * 2**20

    sent_before = len(hub.sent)
    code, _, err = run("-o", folder, env=environment(hub))
    assert code == 0, err
    assert hub.sent[sent_before:] == [(UNET, arrived)]
    assert hub.tokens_seen_elsewhere == []
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]
    manifest = read_manifest(folder)
    assert manifest.version == "0765551"
    assert "unet/diffusion_pytorch_model.safetensors" in manifest.files
    assert manifest.sources[0].licence == "CreativeML OpenRAIL-M"

    code, out, err = run("--verify", "-o", folder, env=environment(hub))
    assert (code, err) == (0, "")
    assert out == f"{len(manifest.files)} files in {folder} are as they were made\n"

    inputs = ["prompt=サラリーマン 油絵", "seed=1", "num_inference_steps=2", "width=64", "height=64"]
    picture = tmp_path / "picture.png"
    predict = [ROOT / "scripts" / "predict", "-o", picture, *(word for i in inputs for word in ("-i", i))]
    subprocess.run(
        [sys.executable, *predict],
        env=environment(hub, JSD_WEIGHTS=str(folder)),
        check=True,
        capture_output=True,
    )
    assert Image.open(picture).size == (64, 64)

    tensors = folder / "vae" / "diffusion_pytorch_model.safetensors"
    with tensors.open("r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        last = opened.read(1)[0]
        opened.seek(-1, os.SEEK_END)
        opened.write(bytes([last ^ 1]))
    code, out, err = run("--verify", "-o", folder, env=environment(hub))
    assert (code, out) == (1, "")
    assert err.startswith(f"{tensors}: its SHA-256 is not the one in manifest.json")

    code, _, err = run("-o", folder, env=environment(hub))
    assert code == 1
    assert err == f"{folder}: is there already; --verify checks it, or remove it to fetch it anew\n"


def assert_told(hub: Hub | str, folder: Path, told: str, *arguments: str, **env: str | None) -> None:
    code, out, err = run("-o", folder / "weights", *arguments, env=environment(hub, **env))
    assert (code, out) == (1, "")
    lines = [line for line in err.splitlines() if not line.startswith("fetching ")]
    assert len(lines) == 1 and told in lines[0], err
    assert list(folder.iterdir()) == []


def test_no_token(hub: Hub, tmp_path: Path) -> None:
    assert_told(hub, tmp_path, "read and accept its licence at https://huggingface.co/rinna", token=None)


def test_unknown_token(hub: Hub, tmp_path: Path) -> None:
    assert_told(hub, tmp_path, "make a token at https://huggingface.co/settings/tokens", token="hf_unknown")


def test_licence_not_accepted(hub: Hub, tmp_path: Path) -> None:
    assert_told(hub, tmp_path, "this token may not read it yet; read and accept", token="hf_stranger")


def test_no_network(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert_told(f"http://127.0.0.1:{unused.getsockname()[1]}", tmp_path, "no connection")


def test_offline_mode(hub: Hub, tmp_path: Path) -> None:
    assert_told(hub, tmp_path, "HF_HUB_OFFLINE is set", HF_HUB_OFFLINE="1")


def test_no_such_revision(hub: Hub, tmp_path: Path) -> None:
    assert_told(hub, tmp_path, "has no such revision", "--revision", "0" * 40)


def test_broken_hub(hub: Hub, tmp_path: Path) -> None:
    hub.broken = True
    assert_told(hub, tmp_path, "the hub answers with error 502; try again later")


def test_something_else_than_a_hub(hub: Hub, tmp_path: Path) -> None:
    hub.page = b"<html>Welcome to our hotel"
    assert_told(hub, tmp_path, "answers, but not as a hub; check HF_ENDPOINT and the network")


def test_token_of_other_characters(hub: Hub, tmp_path: Path) -> None:
    assert_told(hub, tmp_path, "HF_TOKEN: holds characters that no token has", token="hf_あ")


def test_the_present_folder_is_no_place(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for place, named in ((".", tmp_path), ("/", "/")):
        assert run("-o", place, env=environment(hub)) == (
            1,
            "",
            f"{named}: is there already; --verify checks it, or remove it to fetch it anew\n",
        )


def test_missing_file(hub: Hub, tmp_path: Path) -> None:
    del hub.files["vae/config.json"]
    assert_told(hub, tmp_path, "holds no vae/config.json")


def test_too_small_a_disk(hub: Hub, tmp_path: Path) -> None:
    hub.claimed_bytes[UNET] = 10**16
    assert_told(hub, tmp_path, "fetching and converting take 16000000.3 GB; make room there")
    assert hub.sent == []


def test_no_folder_can_be_made(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, _, err = run("-o", tmp_path / "file" / "weights", env=environment(hub))
    assert (code, err) == (1, f"{tmp_path}/file: Not a directory; name another folder with --output\n")


def test_disk_fills_meanwhile(here: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(url: str, opened: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(real_hub, "http_get", full)
    with pytest.raises(real_hub.DownloadError, match=r"^the disk is full; make room"):
        real_hub.download(tmp_path / "weights", real_hub.REVISION, "fp16", keep_original=False)
    assert list(tmp_path.iterdir()) == []


def test_damaged_file_is_fetched_again(here: Hub, tmp_path: Path, original: Path) -> None:
    snapshot = real_hub.list_files("main")
    for name in ("vae/config.json", "text_encoder/pytorch_model.bin"):
        here.damaged = {name}
        with pytest.raises(real_hub.DownloadError, match=f"^{name}: arrived damaged and was removed"):
            real_hub.fetch(snapshot, tmp_path)
    here.damaged = set()
    real_hub.fetch(snapshot, tmp_path)
    for file in snapshot.files:
        assert (tmp_path / file.path).read_bytes() == (original / file.path).read_bytes()
    assert list(tmp_path.rglob("*.part")) == []


def test_lost_connection_is_taken_up_again(here: Hub, tmp_path: Path) -> None:
    here.drop_at[UNET] = 12 * 2**20
    real_hub.fetch(real_hub.list_files(real_hub.REVISION), tmp_path)
    starts = [start for name, start in here.sent if name == UNET]
    assert len(starts) == 2 and starts[0] == 0 and 0 < starts[1] <= 12 * 2**20


def test_two_downloads_at_once(hub: Hub, tmp_path: Path) -> None:
    hub.stall_at[UNET] = 0
    first = start("-o", tmp_path / "weights", env=environment(hub))
    assert hub.stalled.wait(60)
    code, _, err = run("-o", tmp_path / "weights", env=environment(hub))
    first.send_signal(signal.SIGINT)
    first.communicate()
    assert (code, err) == (1, f"{tmp_path}: another download into it is running; wait for its end\n")


class Hostile:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("save", [torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing, 2))])
def test_hostile_pickle_is_refused_and_nothing_in_it_runs(here: Hub, tmp_path: Path, save) -> None:
    target, hostile = tmp_path / "run", tmp_path / "hostile.bin"
    save({"conv_in.weight": Hostile(target)}, hostile)
    with contextlib.suppress(RuntimeError):
        torch.load(hostile, weights_only=False)
    target.rmdir()
    here.files[UNET] = hostile
    with pytest.raises(real_hub.DownloadError, match="is not a pickle of tensors") as caught:
        real_hub.download(tmp_path / "weights", real_hub.REVISION, "fp16", keep_original=False)
    assert UNET in str(caught.value) and "\n" not in str(caught.value)
    assert not target.exists()
    assert list(tmp_path.iterdir()) == [hostile]


def test_keep_original(here: Hub, tmp_path: Path, original: Path) -> None:
    real_hub.download(tmp_path / "weights", "main", "fp32", keep_original=True)
    assert {path.name for path in tmp_path.iterdir()} == {"weights", "weights-original"}
    kept = tmp_path / "weights-original" / UNET
    assert kept.read_bytes() == (original / UNET).read_bytes()


def test_container_fetches_at_its_first_start_only(
    here: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "weights"
    real_hub.download_if_wanted(folder)
    assert not folder.exists()
    monkeypatch.setenv("JSD_FETCH_WEIGHTS", "on")
    real_hub.download_if_wanted(folder)
    assert read_manifest(folder).version == "0765551"
    sent = len(here.sent)
    real_hub.download_if_wanted(folder)
    assert len(here.sent) == sent > 0
    monkeypatch.setenv("JSD_FETCH_WEIGHTS", "yes")
    with pytest.raises(real_hub.DownloadError, match="JSD_FETCH_WEIGHTS: 'yes' is unknown"):
        real_hub.download_if_wanted(folder)


def test_setup_fetches_weights_if_asked(here: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import predict

    monkeypatch.setattr(predict, "WEIGHTS", tmp_path)
    monkeypatch.setenv("JSD_FETCH_WEIGHTS", "on")
    monkeypatch.setenv("JSD_WEIGHTS", str(tmp_path / "japanese-stable-diffusion"))
    predictor = predict.Predictor()
    predictor.setup()
    assert predictor.pipeline.weights.manifest.name == "japanese-stable-diffusion"


def test_verify_needs_a_manifest(original: Path) -> None:
    with pytest.raises(real_hub.DownloadError, match=r"holds no manifest\.json with hashes"):
        real_hub.verify(original)
