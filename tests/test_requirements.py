"""The pins: each once, equal to what is installed, and enough for what the container and the code need."""

import ast
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "japanese_stable_diffusion"
KEPT_OUT = ("benchmarks", "page", "training")
CONTAINER = "requirements.txt"
DEVELOPMENT = "requirements-dev.txt"
TRAINING = "requirements-training.txt"
WEB = "requirements-web.txt"
ALL = (CONTAINER, DEVELOPMENT, TRAINING, WEB)
PROVIDERS = metadata.packages_distributions()


def read_pins(name: str) -> list[tuple[str, str]]:
    lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    pins = [line.split("==") for line in lines if line]
    assert all(len(pin) == 2 for pin in pins), f"{name} holds something else than exact pins"
    return [(canonical(project), version) for project, version in pins]


def canonical(project: str) -> str:
    return re.sub(r"[-_.]+", "-", project).lower()


def imported_projects(path: Path) -> set[str]:
    """The installed projects that a file of ours imports, anywhere in it."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules.add(node.module.split(".")[0])
    ours = {"japanese_stable_diffusion", "predict", *(file.stem for file in (ROOT / "tests").rglob("*.py"))}
    return {canonical(PROVIDERS[module][0]) for module in modules - ours - sys.stdlib_module_names}


def test_every_project_is_pinned_once() -> None:
    projects = [project for name in ALL for project, _ in read_pins(name)]
    assert sorted(projects) == sorted(set(projects))


@pytest.mark.parametrize("name", ALL)
def test_what_is_installed_is_what_is_pinned(name: str) -> None:
    installed = {project: metadata.version(project).split("+")[0] for project, _ in read_pins(name)}
    assert installed == dict(read_pins(name))


def test_cog_is_the_same_in_the_image_and_elsewhere() -> None:
    build = yaml.safe_load((ROOT / "cog.yaml").read_text())["build"]
    development = dict(read_pins(DEVELOPMENT))
    assert development["cog"] == development["coglet"] == build["sdk_version"]
    assert not {"cog", "coglet"} & set(dict(read_pins(CONTAINER)))


def test_the_container_is_the_one_that_these_libraries_need() -> None:
    config = yaml.safe_load((ROOT / "cog.yaml").read_text())
    assert config == {
        "build": {
            "gpu": True,
            "cuda": "13.0.3",
            "python_version": "3.11",
            "sdk_version": "0.23.1",
            "python_requirements": CONTAINER,
        },
        "predict": "predict.py:Predictor",
    }


def test_the_container_gets_all_that_its_code_imports() -> None:
    files = [file for file in PACKAGE.rglob("*.py") if file.relative_to(PACKAGE).parts[0] not in KEPT_OUT]
    imported = set().union(*(imported_projects(file) for file in [ROOT / "predict.py", *files]))
    assert imported - {"cog", "coglet"} <= set(dict(read_pins(CONTAINER)))


def test_page_training_and_tests_get_all_that_they_import() -> None:
    pinned = {project for name in ALL for project, _ in read_pins(name)}
    folders = [ROOT / "tests", *(PACKAGE / name for name in KEPT_OUT)]
    files = [file for folder in folders for file in folder.rglob("*.py")]
    assert set().union(*(imported_projects(file) for file in files)) <= pinned


def test_the_container_can_do_without_what_is_kept_out_of_it() -> None:
    kept_out = (ROOT / ".dockerignore").read_text().splitlines()
    for name in KEPT_OUT:
        assert f"japanese_stable_diffusion/{name}" in kept_out
        for file in [ROOT / "predict.py", *PACKAGE.glob("*.py")]:
            assert f"japanese_stable_diffusion.{name}" not in file.read_text(encoding="utf-8"), file
    needed = {
        "predict.py",
        "japanese_stable_diffusion",
        "weights",
        "cog.yaml",
        "requirements.txt",
        ".cog",
        "LICENSE",
    }
    assert needed == {line[1:] for line in kept_out if line.startswith("!")}
