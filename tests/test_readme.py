"""The README tells the truth about what can be tested: its files, its commands, its table of inputs."""

import re
import subprocess
from pathlib import Path

import pytest

from japanese_stable_diffusion.openapi import schema

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = ["README.md", "weights/demo/LICENSE.md"]


def test_every_file_that_it_links_is_there() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).is_file()] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_door_that_it_names_is_there(document: str) -> None:
    doors = set(re.findall(r"scripts/([\w-]+)", (ROOT / document).read_text(encoding="utf-8")))
    assert doors and [door for door in doors if not (ROOT / "scripts" / door).is_file()] == []


def test_every_flag_that_it_names_is_known() -> None:
    flags: dict[str, set[str]] = {}
    for door, arguments in re.findall(r"scripts/([\w-]+)((?: [^|`#\n]*)?)", README):
        flags.setdefault(door, set()).update(re.findall(r"(?<= )--?[a-z][\w-]*", arguments))
    for door, named in flags.items():
        told = subprocess.run([ROOT / "scripts" / door, "--help"], capture_output=True, text=True).stdout
        assert [flag for flag in named if not re.search(rf"(^|[\s,\[]){flag}\b", told)] == [], door


def test_every_room_that_it_names_is_there() -> None:
    house = README[README.index("The house") : README.index("Licences")]
    named = set(re.findall(r"`(?:japanese_stable_diffusion/)?(\w+\.py)`", house)) - {"predict.py"}
    assert "pipeline.py" in named
    assert named <= {file.name for file in (ROOT / "japanese_stable_diffusion").iterdir()}


def test_its_inputs_are_those_of_the_schema() -> None:
    components = schema()["components"]["schemas"]
    rows = [
        line.split("|")[1:-1]
        for line in README.splitlines()
        if line.startswith("| `") and line.count("|") == 6
    ]
    table = {row[0].strip(" `"): [cell.strip() for cell in row[1:]] for row in rows}
    inputs = components["Input"]["properties"]
    assert list(table) == list(inputs)
    kinds = {"string": "str", "integer": "int", "number": "float", "boolean": "bool"}
    for name, described in inputs.items():
        kind, default, allowed, _ = table[name]
        whole = {**components.get(name, {}), **described}
        assert kind == ("Path" if whole.get("format") == "uri" else kinds[whole["type"]]), name
        if described["default"]:
            assert default == f"`{described['default']}`", name
        if "minimum" in whole:
            assert allowed == f"{whole['minimum']}〜{whole['maximum']}", name
        if "maxLength" in whole:
            assert f"{whole['maxLength']:,}" in allowed, name
        if whole["type"] == "string" and "enum" in whole:
            assert allowed == ", ".join(f"`{choice}`" for choice in whole["enum"]), name
        elif "enum" in whole:
            assert allowed.startswith(f"{whole['enum'][0]}〜{whole['enum'][-1]}"), name
