"""How a door makes its Python: in a small repository with packages of its own, so that nothing is fetched."""

import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOOR = """
import sys
import door
door.parser("A door.").parse_known_args()
door.enter()
import pebble
print(pebble.VERSION, sys.argv[1:], sys.path[1])
"""


def write_wheel(folder: Path, version: str) -> None:
    """A package `pebble` of one module, as pip takes it."""
    information = f"pebble-{version}.dist-info"
    with zipfile.ZipFile(folder / f"pebble-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("pebble.py", f"VERSION = {version!r}\n")
        wheel.writestr(
            f"{information}/METADATA", f"Metadata-Version: 2.1\nName: pebble\nVersion: {version}\n"
        )
        wheel.writestr(
            f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{information}/RECORD", "")


class Repository:
    """A fresh clone with one door, whose requirements ask for `pebble`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        wheels = root / "wheels"
        wheels.mkdir(parents=True)
        (root / "scripts").mkdir()
        shutil.copy(ROOT / "scripts" / "door.py", root / "scripts")
        (root / "scripts" / "show").write_text(DOOR)
        (root / "requirements-dev.txt").write_text("# nothing\n")
        for version in ("1.0", "2.0"):
            write_wheel(wheels, version)
        self.ask_for("1.0")

    def ask_for(self, version: str) -> None:
        options = "--no-index\n--find-links wheels\n"
        (self.root / "requirements.txt").write_text(f"{options}pebble=={version}\n")

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        return subprocess.Popen(
            [sys.executable, self.root / "scripts" / "show", *arguments],
            cwd="/",
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def show(self, *arguments: str) -> tuple[int, str, str]:
        process = self.start(*arguments)
        out, error = process.communicate()
        return process.returncode, out, error


@pytest.mark.slow
def test_an_environment_is_made_kept_and_renewed(tmp_path: Path) -> None:
    repository = Repository(tmp_path / "a clone")
    doors = [repository.start("a b", "c") for _ in range(2)]
    results = [(door.communicate(), door.returncode) for door in doors]
    expected = f"1.0 ['a b', 'c'] {repository.root}\n"
    assert [(out, code) for (out, _), code in results] == [(expected, 0)] * 2, results
    assert sum("Setting up" in error for (_, error), _ in results) == 1

    assert repository.show() == (0, f"1.0 [] {repository.root}\n", "")

    repository.ask_for("2.0")
    code, out, error = repository.show()
    assert (code, out.split()[0]) == (0, "2.0") and "Setting up" in error

    repository.ask_for("3.0")
    code, out, error = repository.show()
    assert (code, out) == (1, "")
    told = "cannot install packages: No matching distribution found for pebble==3.0; "
    assert error.splitlines()[-1].startswith(told) and "Traceback" not in error

    # As after the Python that it was made from was removed.
    (repository.root / ".venv" / "bin" / "python").unlink()
    repository.ask_for("2.0")
    assert repository.show()[:2] == (0, f"2.0 [] {repository.root}\n")


@pytest.mark.slow
def test_an_interrupted_set_up_is_done_again(tmp_path: Path) -> None:
    repository = Repository(tmp_path)
    first = repository.start()
    while not (tmp_path / ".venv" / "unfinished").exists():
        assert first.poll() is None
        time.sleep(0.01)
    first.send_signal(signal.SIGINT)
    _, error = first.communicate()
    assert first.returncode == 130 and "Traceback" not in error

    # What a killed set-up leaves may look whole: a Python that runs, a package that lacks its files.
    (tmp_path / ".venv" / "bin").mkdir(exist_ok=True)
    (tmp_path / ".venv" / "bin" / "python").unlink(missing_ok=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)
    assert repository.show()[:2] == (0, f"1.0 [] {tmp_path}\n")
