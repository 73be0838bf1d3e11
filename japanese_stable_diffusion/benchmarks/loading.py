"""How fast weights load and how much memory that takes, beside the time that reading their files takes."""

import multiprocessing
import os
import time
from dataclasses import dataclass
from pathlib import Path

_CHUNK = 8 * 2**20
_WIDTHS = (10, 10, 7, 11, 11, 18, 7)


@dataclass(frozen=True)
class Reading:
    """Reading every file of a weights folder once, from front to back."""

    bytes: int
    seconds: float


@dataclass(frozen=True)
class Loading:
    """One `setup()` in a fresh process, its imports done before.

    Attributes:
        weights_bytes: size of all weights in memory, in the precision in which they are computed.
        seconds: until `setup()` returned; parts of the files that it mapped may not have been read or
            converted by then.
        seconds_used: until every page of every weight was converted and used once, too.
        processor_seconds: of these, what the processor worked for this process.
        peak_bytes: most memory at any moment of it, beyond what the process held before.
    """

    weights_bytes: int
    seconds: float
    seconds_used: float
    processor_seconds: float
    peak_bytes: int


def compare(folder: Path, runs: int) -> str:
    """A table of reading and loading a weights folder, cold and warm; of `runs` each, the fastest."""
    titles = ("read", "setup", "ratio", "all used", "processor", "peak / weights", "ratio")
    rows = [" " * 4 + "".join(f"{title:>{width}}" for title, width in zip(titles, _WIDTHS, strict=True))]
    for name in ("cold", "warm"):
        readings, loadings = [], []
        for _ in range(runs):
            if name == "cold":
                forget_files(folder)
            readings.append(read_files(folder))
            if name == "cold":
                forget_files(folder)
            loadings.append(load(folder))
        read = min(reading.seconds for reading in readings)
        fastest = min(loadings, key=lambda loading: loading.seconds)
        peak = max(loading.peak_bytes for loading in loadings)
        cells = (
            f"{read:.2f} s",
            f"{fastest.seconds:.2f} s",
            f"{fastest.seconds / read:.2f}",
            f"{fastest.seconds_used:.2f} s",
            f"{fastest.processor_seconds:.2f} s",
            f"{peak / 1e9:.2f} / {fastest.weights_bytes / 1e9:.2f} GB",
            f"{peak / fastest.weights_bytes:.2f}",
        )
        rows.append(name + "".join(f"{cell:>{width}}" for cell, width in zip(cells, _WIDTHS, strict=True)))
    size = f"{folder}: {readings[0].bytes / 1e9:.2f} GB in files; the fastest of {runs}, the highest peak"
    return "\n".join([size, *rows])


def read_files(folder: Path) -> Reading:
    """Read the files of a folder, and nothing more."""
    buffer = bytearray(_CHUNK)
    count = 0
    started = time.perf_counter()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while part := file.readinto(buffer):
                    count += part
    return Reading(count, time.perf_counter() - started)


def forget_files(folder: Path) -> None:
    """Have the system drop its copies of the files in memory, so that they are read from the disk next."""
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


def load(folder: Path) -> Loading:
    """Run `setup()` on the weights in a folder, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_load, (folder,))


def _load(folder: Path) -> Loading:
    from predict import Predictor

    os.environ["JSD_WEIGHTS"] = str(folder)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak that the imports left, see proc(5)
    started, worked = time.perf_counter(), time.process_time()
    predictor = Predictor()
    predictor.setup()
    seconds = time.perf_counter() - started
    weights = predictor.pipeline.weights
    weights.convert()
    tensors = [tensor for model in weights.models for tensor in model.state_dict().values()]
    for tensor in tensors:
        tensor.flatten()[:: 4096 // tensor.itemsize].sum()
    return Loading(
        weights_bytes=sum(tensor.nbytes for tensor in tensors),
        seconds=seconds,
        seconds_used=time.perf_counter() - started,
        processor_seconds=time.process_time() - worked,
        peak_bytes=memory("VmHWM") - before,
    )


def memory(name: str) -> int:
    """Bytes of this process that Linux counts under `name`."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[name].split()[0]) * 1024
