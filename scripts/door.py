"""What every door shares: how it is spoken to, and the Python that it runs in.

    arguments = door.parser(__doc__).parse_args()
    door.enter()
    from japanese_stable_diffusion... import ...

Until `enter()` a door needs the standard library only, so that --help and a mistyped flag answer at once, on
a fresh clone too. `enter()` goes on in `.venv`, which holds the versions that the requirements files pin: the
first time it makes it; later it compares checksums and installs only a list that changed.
"""

import argparse
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "installed"
UNFINISHED = VENV / "unfinished"
EVERYWHERE = ("requirements.txt", "requirements-dev.txt")
TRAINING = "requirements-training.txt"
WEB = "requirements-web.txt"
PIP_OPTIONS = ("--disable-pip-version-check", "--no-input")

# A file name that isn't UTF-8 is printed as it is.
sys.stdout.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]

# Ctrl-C ends a door without a traceback, and what it was doing still cleans up after itself.
signal.signal(signal.SIGINT, lambda number, frame: sys.exit(128 + number))


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{message}; see {self.prog} --help\n")


def parser(documentation: str) -> Parser:
    """A parser for the running door, with its module's docstring as the help."""
    return Parser(
        prog=f"scripts/{Path(sys.argv[0]).name}",
        description=documentation,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def enter(*lists: str) -> None:
    """Go on in `.venv`, with `requirements.txt`, `requirements-dev.txt` and `lists` installed.

    Starts the running door again in `.venv` if it isn't there yet, with the repository importable and
    `.venv/bin` first on PATH for it and its children. Ends with one line and code 1 if that can't be done.
    """
    try:
        if not _is_current(EVERYWHERE + lists):
            _install(EVERYWHERE + lists)
    except OSError as error:
        sys.exit(f"cannot set up {VENV}: {error.strerror}: {error.filename}")
    if Path(sys.prefix).resolve() == VENV.resolve() and os.environ.get("PYTHONPATH") == str(ROOT):
        return
    os.environ.pop("PYTHONHOME", None)
    os.environ["PYTHONPATH"] = str(ROOT)
    os.environ["PATH"] = f"{VENV / 'bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    os.execv(PYTHON, [str(PYTHON), str(Path(sys.argv[0]).resolve()), *sys.argv[1:]])


def _is_current(lists: tuple[str, ...]) -> bool:
    installed = _installed() if PYTHON.exists() else {}
    return all(installed.get(name) == _checksum(name) for name in lists)


def _installed() -> dict[str, str]:
    if UNFINISHED.exists() or not STAMP.exists():
        return {}
    return dict(line.split() for line in STAMP.read_text().splitlines())


def _checksum(name: str) -> str:
    return hashlib.sha256((ROOT / name).read_bytes()).hexdigest()


def _install(lists: tuple[str, ...]) -> None:
    # Two doors opened together on a fresh clone must not both make it.
    lock = os.open(ROOT, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        if _is_current(lists):
            return
        print(f"Setting up {VENV} with what {', '.join(lists)} list;", file=sys.stderr)
        print("the first time this fetches PyTorch, which takes some minutes.", file=sys.stderr, flush=True)
        installed = _installed()
        if VENV.exists() and (UNFINISHED.exists() or not PYTHON.exists()):
            # An interrupted pip leaves packages that look installed and aren't.
            shutil.rmtree(VENV)
        if not PYTHON.exists():
            python = _find_python()
            VENV.mkdir(exist_ok=True)
            UNFINISHED.touch()
            venv = _run(python, "-m", "venv", str(VENV))
            if venv.returncode != 0:
                sys.exit(f"cannot make {VENV}: {_reason(venv)}; see that the disk has room, then try again")
        UNFINISHED.touch()
        requirements = [argument for name in lists for argument in ("-r", str(ROOT / name))]
        pip = _run(str(PYTHON), "-m", "pip", "install", *PIP_OPTIONS, *requirements)
        if pip.returncode != 0:
            if pip.returncode > 0:
                # pip gave up by itself, so what is there is whole.
                UNFINISHED.unlink()
            sys.exit(f"cannot install packages: {_reason(pip)}; check network and disk space, then try again")
        installed.update((name, _checksum(name)) for name in lists)
        STAMP.write_text("".join(f"{name} {checksum}\n" for name, checksum in installed.items()))
        UNFINISHED.unlink()
    finally:
        os.close(lock)


def _find_python() -> str:
    for python in _candidates():
        command = [python, "-c", "import sys; print(*sys.version_info[:2], sep='.')"]
        version = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        if version.returncode == 0 and version.stdout.strip() == "3.11":
            break
    else:
        sys.exit("no Python 3.11 here: install it so that the command python3.11 works, then try again")
    if subprocess.run([python, "-c", "import ensurepip"], stderr=subprocess.DEVNULL).returncode != 0:
        sys.exit(f"{python} has no venv module: install python3.11-venv (Debian, Ubuntu), then try again")
    return python


def _candidates() -> Iterator[str]:
    yield sys.executable
    for name in ("python3.11", "python3", "python"):
        found = shutil.which(name)
        if found:
            yield found


def _run(*command: str) -> "subprocess.CompletedProcess[str]":
    # Progress goes to our stderr, so that stdout holds nothing but what the door itself prints.
    return subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)


def _reason(process: "subprocess.CompletedProcess[str]") -> str:
    errors = [line for line in process.stderr.splitlines() if line.startswith("ERROR: ")]
    return errors[-1][len("ERROR: ") :] if errors else f"exit code {process.returncode}"
