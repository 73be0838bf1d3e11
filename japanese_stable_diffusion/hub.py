"""Fetch the real weights from the Hugging Face Hub, and put them in their place when all is whole."""

import errno
import fcntl
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from huggingface_hub import HfApi, constants, get_token, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled, RevisionNotFoundError
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers

if TYPE_CHECKING:
    from japanese_stable_diffusion.conversion import Precision

log = logging.getLogger(__name__)

REPOSITORY = "rinna/japanese-stable-diffusion"
REVISION = "07655518e5518c6ad4340168d1d0c98958e96ae0"
"""The commit to fetch, so that what is fetched today is what is fetched in years."""
PAGE = f"https://huggingface.co/{REPOSITORY}"
LICENCE = "CreativeML OpenRAIL-M"

CONFIGURATION_FILES = (
    "feature_extractor/preprocessor_config.json",
    "safety_checker/config.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "tokenizer/special_tokens_map.json",
    "tokenizer/spiece.model",
    "tokenizer/tokenizer_config.json",
    "unet/config.json",
    "vae/config.json",
)
TENSOR_FILES = (
    ("safety_checker/model.safetensors", "safety_checker/pytorch_model.bin"),
    ("text_encoder/model.safetensors", "text_encoder/pytorch_model.bin"),
    ("vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.bin"),
    ("unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.bin"),
)
"""The tensors of each model, by the names that they may have: the first one that is there is fetched."""

SPARE = 256 * 2**20
"""Bytes to be left free on the disk."""
_AGAIN = "then run the same again to go on"


class DownloadError(Exception):
    """The weights can't be fetched; the message is one line that says why and what to do."""


@dataclass(frozen=True)
class RemoteFile:
    """A file on the hub: its path in the repository, size in bytes, and what its content hashes to.

    `sha256` is known of large files, which the hub keeps beside Git; `git_sha1` of the others.
    """

    path: str
    bytes: int
    sha256: str | None
    git_sha1: str | None


@dataclass(frozen=True)
class Snapshot:
    """The needed files of the repository at one commit."""

    commit: str
    files: tuple[RemoteFile, ...]

    @property
    def bytes(self) -> int:
        """Size of all files together."""
        return sum(file.bytes for file in self.files)


def download(folder: Path, revision: str, precision: "Precision", keep_original: bool) -> None:
    """Fetch the weights, convert them, and put them into `folder`, which appears only when all is whole.

    What was fetched before an error or an interruption is kept beside `folder`, hidden, for the next attempt.

    Args:
        folder: where the weights shall be.
        revision: commit, branch or tag to fetch.
        precision: see `conversion.convert`.
        keep_original: keep what was fetched too, in `<folder>-original`.

    Raises:
        DownloadError: it failed; the message is one line that says why and what to do.
    """
    folder = folder.absolute()
    original = folder.parent / f"{folder.name}-original"
    for taken in (folder, original) if keep_original else (folder,):
        if taken.exists():
            raise DownloadError(
                f"{taken}: is there already; --verify checks it, or remove it to fetch it anew"
            )
    snapshot = list_files(revision)
    fetched = folder.with_name(f".{folder.name}-{snapshot.commit[:12]}")
    converted = folder.with_name(f".{folder.name}-converting")
    with _room_for(fetched, converted):
        _check_disk(snapshot, fetched, precision)
        log.info("fetching %s at %s: %.2f GB", REPOSITORY, snapshot.commit[:7], snapshot.bytes / 1e9)
        fetch(snapshot, fetched)

        log.info("converting to %s", precision)
        # PyTorch takes seconds to import, and most errors come before it is needed.
        from japanese_stable_diffusion.conversion import convert
        from japanese_stable_diffusion.weights import Source, WeightsError

        source = Source(
            REPOSITORY, LICENCE, f"{PAGE}/tree/{snapshot.commit}", f"weights, here in {precision}"
        )
        with _told_in_one_line():
            try:
                convert(fetched, converted, precision, folder.name, snapshot.commit[:7], [source])
            except WeightsError as error:
                # What the hub itself calls whole won't be better next time.
                shutil.rmtree(fetched)
                raise DownloadError(str(error)) from error
            converted.rename(folder)
            if keep_original:
                fetched.rename(original)
            else:
                shutil.rmtree(fetched)
    log.info("the weights are in %s", folder)


def download_if_wanted(folder: Path) -> None:
    """Fetch the weights into `folder` where JSD_FETCH_WEIGHTS is on and it isn't there yet.

    It is for containers whose image holds no weights and whose volume keeps them from one start to the next.

    Raises:
        DownloadError: see `download`, or JSD_FETCH_WEIGHTS is something else than on or off.
    """
    choice = os.environ.get("JSD_FETCH_WEIGHTS") or "off"
    if choice not in ("on", "off"):
        raise DownloadError(f"JSD_FETCH_WEIGHTS: {choice!r} is unknown; on or off is allowed")
    if choice == "on" and not folder.exists():
        download(folder, REVISION, "fp16", keep_original=False)


def list_files(revision: str) -> Snapshot:
    """Ask the hub for the needed files at `revision`: a commit, a branch or a tag. Small files come first.

    Raises:
        DownloadError: the hub doesn't answer, or lacks a needed file.
    """
    with _told_in_one_line():
        try:
            info = HfApi().model_info(REPOSITORY, revision=revision, files_metadata=True)
        except UnicodeEncodeError:
            raise DownloadError(
                "HF_TOKEN: holds characters that no token has; copy it from "
                "https://huggingface.co/settings/tokens"
            ) from None
        except (ValueError, KeyError):
            # Networks that ask for a password first answer everything with a page of their own.
            raise DownloadError(
                f"{constants.ENDPOINT}: answers, but not as a hub; check HF_ENDPOINT and the network, "
                f"{_AGAIN}"
            ) from None
    there = {
        sibling.rfilename: RemoteFile(
            sibling.rfilename,
            sibling.size or 0,
            sibling.lfs.sha256 if sibling.lfs else None,
            None if sibling.lfs else sibling.blob_id,
        )
        for sibling in info.siblings or ()
    }
    files = []
    for names in (*((name,) for name in CONFIGURATION_FILES), *TENSOR_FILES):
        found = [there[name] for name in names if name in there]
        if not found:
            raise DownloadError(
                f"{REPOSITORY} at {revision}: holds no {names[-1]}; choose another --revision or none"
            )
        files.append(found[0])
    return Snapshot(info.sha or revision, tuple(files))


def fetch(snapshot: Snapshot, folder: Path) -> None:
    """Fetch the files of a snapshot into a folder, going on where an earlier attempt at the same stopped.

    A file has its own name once it is whole and hashes to what the hub says; until then it ends in `.part`.

    Raises:
        DownloadError: the hub refuses, the network fails or the disk is full.
    """
    # Not `snapshot_download`: in huggingface_hub 2 the next process fetches every unfinished file anew.
    headers = build_hf_headers()
    for number, file in enumerate(snapshot.files, start=1):
        path = folder / file.path
        if path.is_file():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        with _told_in_one_line(), part.open("ab") as opened:
            http_get(
                hf_hub_url(REPOSITORY, file.path, revision=snapshot.commit),
                opened,
                resume_size=_resume_size(opened, file),
                headers=headers,
                expected_size=file.bytes,
                displayed_filename=f"{number}/{len(snapshot.files)} {file.path}",
            )
        if not _is_intact(part, file):
            part.unlink()
            raise DownloadError(
                f"{file.path}: arrived damaged and was removed; run the same to fetch it again"
            )
        part.rename(path)


def verify(folder: Path) -> int:
    """Read every file of a weights folder again and compare it with the manifest; the number of files.

    Raises:
        DownloadError: one is missing or differs, or there is no manifest to compare with.
    """
    from japanese_stable_diffusion.weights import WeightsError, read_manifest, verify_weights

    try:
        manifest = read_manifest(folder)
        if not manifest.files:
            raise DownloadError(
                f"{folder}: holds no manifest.json with hashes; run without --verify to fetch it"
            )
        verify_weights(folder, manifest, hashes=True)
    except WeightsError as error:
        raise DownloadError(str(error)) from error
    return len(manifest.files)


@contextmanager
def _room_for(fetched: Path, converted: Path) -> Iterator[None]:
    """The two hidden folders, for this process alone; in the end `converted` goes, and an empty `fetched`."""
    try:
        fetched.mkdir(parents=True, exist_ok=True)
        lock = os.open(fetched, os.O_RDONLY)
    except OSError as error:
        raise DownloadError(
            f"{fetched.parent}: {error.strerror}; name another folder with --output"
        ) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise DownloadError(
            f"{fetched.parent}: another download into it is running; wait for its end"
        ) from None
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        log.error("interrupted; run the same again to go on, or remove %s to give up", fetched)
        raise
    finally:
        shutil.rmtree(converted, ignore_errors=True)
        if not any(path.is_file() and path.stat().st_size for path in fetched.rglob("*")):
            shutil.rmtree(fetched, ignore_errors=True)
        os.close(lock)


def _check_disk(snapshot: Snapshot, fetched: Path, precision: "Precision") -> None:
    here = sum(path.stat().st_size for path in fetched.rglob("*") if path.is_file())
    # What was published in fp32 shrinks to half in fp16, but for the VAE.
    converted = snapshot.bytes * (0.6 if precision == "fp16" else 1.0)
    needed = int(snapshot.bytes - here + converted) + SPARE
    free = shutil.disk_usage(fetched).free
    if free < needed:
        raise DownloadError(
            f"{fetched.parent}: has {free / 1e9:.1f} GB free, but fetching and converting take "
            f"{needed / 1e9:.1f} GB; make room there, or name a folder on another disk with --output"
        )


def _resume_size(opened: BinaryIO, file: RemoteFile) -> int:
    """Bytes of `file` that are there already; none if there are more than it has."""
    if opened.seek(0, os.SEEK_END) > file.bytes:
        opened.truncate(0)
    return opened.seek(0, os.SEEK_END)


def _is_intact(path: Path, file: RemoteFile) -> bool:
    if path.stat().st_size != file.bytes:
        return False
    if file.sha256:
        with path.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest() == file.sha256
    content = path.read_bytes()
    return file.git_sha1 in (None, hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest())


@contextmanager
def _told_in_one_line() -> Iterator[None]:
    try:
        yield
    except OfflineModeIsEnabled:
        raise DownloadError(f"HF_HUB_OFFLINE is set, so nothing can be fetched; unset it, {_AGAIN}") from None
    except RevisionNotFoundError:
        raise DownloadError(
            f"{REPOSITORY}: has no such revision; --revision may name one of {PAGE}/commits/main"
        ) from None
    except HfHubHTTPError as error:
        raise DownloadError(_refusal(error.response.status_code)) from None
    except HTTPError as error:
        what = f"{constants.ENDPOINT}: no connection ({_one_line(error)})"
        raise DownloadError(f"{what}; check network and proxy, {_AGAIN}") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DownloadError(f"the disk is full; make room, {_AGAIN}") from None
        what = f"{error.filename}: {error.strerror}" if error.filename else _one_line(error)
        raise DownloadError(f"{what}; mend that, {_AGAIN}") from None


def _refusal(status: int) -> str:
    licence = f"read and accept its licence at {PAGE}"
    token = "make a token at https://huggingface.co/settings/tokens and give it as HF_TOKEN"
    if status == 401 and get_token() is None:
        return f"{REPOSITORY}: is for registered users only; {licence}, {token}"
    if status == 401:
        return f"{REPOSITORY}: the hub doesn't know this token, it may have expired; {token}"
    if status == 403:
        return f"{REPOSITORY}: this token may not read it yet; {licence}, with the account of the token"
    if status == 404:
        return f"{REPOSITORY}: isn't at {constants.ENDPOINT}, or not for this token's account; see {PAGE}"
    return f"{constants.ENDPOINT}: the hub answers with error {status}; try again later"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
