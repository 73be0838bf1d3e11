"""The doors as a person opens them: as processes, from any folder."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from japanese_stable_diffusion.images import write_image
from japanese_stable_diffusion.openapi import schema
from japanese_stable_diffusion.provenance import Parameters
from japanese_stable_diffusion.request import Request

ROOT = Path(__file__).resolve().parent.parent
DOORS = sorted(file for file in (ROOT / "scripts").iterdir() if file.is_file() and file.suffix != ".py")


def run(door: str, *arguments: str, cwd: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [ROOT / "scripts" / door, *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.name)
def test_help_needs_nothing_but_the_standard_library(door: Path, tmp_path: Path) -> None:
    assert os.access(door, os.X_OK)
    # -S leaves out all that is installed.
    told = subprocess.run(
        [sys.executable, "-S", door, "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (told.returncode, told.stderr) == (0, "")
    assert f"scripts/{door.name}" in told.stdout


@pytest.mark.parametrize("door", [door for door in DOORS if door.name != "test"], ids=lambda door: door.name)
def test_an_unknown_flag_is_told_in_one_line(door: Path, tmp_path: Path) -> None:
    told = run(door.name, "--nonsense", cwd=tmp_path)
    assert told.returncode == 2
    assert told.stderr.count("\n") == 1 and f"see scripts/{door.name} --help" in told.stderr


def test_the_help_of_predict_names_every_input(tmp_path: Path) -> None:
    told = run("predict", "--help", cwd=tmp_path).stdout
    described = told[told.index("The inputs:") : told.index("The weights are")]
    listed = [name.strip(",") for line in described.splitlines()[1:] for name in line[:22].split()]
    assert listed == list(schema()["components"]["schemas"]["Input"]["properties"])


def test_a_prompt_becomes_a_picture(tmp_path: Path, tiny_weights: Path) -> None:
    folder = tmp_path / "with a space"
    folder.mkdir()
    door = folder / "predict"
    door.symlink_to(ROOT / "scripts" / "predict")
    inputs = [
        "-i",
        "prompt=サラリーマン 油絵",
        "-i",
        "width=64",
        "-i",
        "height=64",
        "-i",
        "num_inference_steps=2",
    ]
    told = subprocess.run(
        [door, *inputs],
        cwd=folder,
        env={**os.environ, "JSD_WEIGHTS": str(tiny_weights)},
        capture_output=True,
        text=True,
    )
    assert told.returncode == 0, told.stderr
    assert told.stdout == "output.0.png\n"
    assert Image.open(folder / "output.0.png").size == (64, 64)


def test_a_wrong_input_is_one_line_and_code_2(tmp_path: Path) -> None:
    told = run("predict", "-i", "width=100", cwd=tmp_path)
    assert (told.returncode, told.stdout) == (2, "")
    assert told.stderr.startswith("width: 100") and told.stderr.count("\n") == 1
    told = run("predict", "-i", "seed=1", "--json", "{}", cwd=tmp_path)
    assert told.returncode == 2 and told.stderr.count("\n") == 1


def test_ctrl_c_ends_a_prediction_quietly(tmp_path: Path, tiny_weights: Path) -> None:
    process = subprocess.Popen(
        [ROOT / "scripts" / "predict", "-i", "num_inference_steps=500", "-i", "num_outputs=8"],
        cwd=tmp_path,
        env={**os.environ, "JSD_WEIGHTS": str(tiny_weights)},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stderr
    told = ""
    while "seed: " not in told:
        line = process.stderr.readline()
        assert line, told
        told += line
    process.send_signal(signal.SIGINT)
    out, more = process.communicate()
    assert process.returncode == 130
    assert out == "" and "Traceback" not in told + more
    assert os.listdir(tmp_path) == []


def test_serve_tells_that_its_port_is_taken(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        told = run("serve", "--host", "127.0.0.1", cwd=tmp_path, PORT=port)
    assert told.returncode == 1
    assert (
        told.stderr == f"can't listen on 127.0.0.1:{port}: Address already in use; set PORT to another port\n"
    )


@pytest.mark.parametrize("port", ["", "http", "0", "65536", "-1", "５０００"])
def test_serve_refuses_what_is_no_port(port: str, tmp_path: Path) -> None:
    told = run("serve", cwd=tmp_path, PORT=port)
    assert told.returncode == 2
    assert told.stderr.startswith(f"PORT: {port} is not a port") and told.stderr.count("\n") == 1


def test_inspect_tells_what_predict_was_asked(tmp_path: Path) -> None:
    request = Request(prompt="富士山, 浮世絵", seed=7, num_inference_steps=3)
    noise = np.random.default_rng(0).integers(60, 200, (512, 512, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((64, 64)).resize((512, 512))
    write_image(picture, tmp_path / "made.png", Parameters(request, "tiny", ""))
    told = run("inspect", "made.png", cwd=tmp_path)
    assert told.returncode == 0, told.stderr
    assert told.stdout.startswith("富士山, 浮世絵\nSteps: 3, ") and "Seed: 7" in told.stdout
    assert told.stdout.endswith("watermark: found (100% of its bits are right)\n")

    picture.save(tmp_path / "plain.png")
    told = run("inspect", "plain.png", cwd=tmp_path)
    assert told.returncode == 1
    assert told.stdout.startswith("no parameters\nwatermark: not found (")

    told = run("inspect", "nowhere.png", cwd=tmp_path)
    assert (told.returncode, told.stderr) == (2, "nowhere.png: is not there; see scripts/inspect --help\n")
