"""The schema is the one that `cog build` writes, and predict.py can be read without running it."""

import ast
import io
import itertools
import json
import tokenize
from pathlib import Path
from typing import Any

import pytest

from japanese_stable_diffusion.openapi import PREDICTOR, schema, write_schema
from japanese_stable_diffusion.request import OUTPUT_FORMATS, SCHEDULERS, SIDES

FILE = {"type": "string", "format": "uri", "default": None, "nullable": True}
TEXT = {"type": "string", "maxLength": 1000}


@pytest.fixture(scope="module")
def components() -> dict[str, Any]:
    schemas: dict[str, Any] = schema()["components"]["schemas"]
    return schemas


@pytest.mark.parametrize(
    ("order", "name", "expected"),
    [
        (0, "prompt", {"title": "Prompt", "default": "サラリーマン 油絵", **TEXT}),
        (1, "negative_prompt", {"title": "Negative Prompt", "default": "", **TEXT}),
        (2, "width", {"allOf": [{"$ref": "#/components/schemas/width"}], "default": 512}),
        (3, "height", {"allOf": [{"$ref": "#/components/schemas/height"}], "default": 512}),
        (
            4,
            "num_outputs",
            {"title": "Num Outputs", "type": "integer", "default": 1, "minimum": 1, "maximum": 8},
        ),
        (
            5,
            "num_inference_steps",
            {"title": "Num Inference Steps", "type": "integer", "default": 20, "minimum": 1, "maximum": 500},
        ),
        (
            6,
            "guidance_scale",
            {"title": "Guidance Scale", "type": "number", "default": 7.5, "minimum": 1, "maximum": 20},
        ),
        (
            7,
            "scheduler",
            {"allOf": [{"$ref": "#/components/schemas/scheduler"}], "default": "DPMSolverMultistep"},
        ),
        (
            8,
            "seed",
            {
                "title": "Seed",
                "type": "integer",
                "default": None,
                "nullable": True,
                "minimum": 0,
                "maximum": 4294967295,
            },
        ),
        (9, "image", {"title": "Image", **FILE}),
        (
            10,
            "prompt_strength",
            {"title": "Prompt Strength", "type": "number", "default": 0.8, "minimum": 0, "maximum": 1},
        ),
        (11, "mask", {"title": "Mask", **FILE}),
        (
            12,
            "output_format",
            {"allOf": [{"$ref": "#/components/schemas/output_format"}], "default": "png"},
        ),
        (
            13,
            "output_quality",
            {"title": "Output Quality", "type": "integer", "default": 90, "minimum": 0, "maximum": 100},
        ),
        (
            14,
            "variation_seed",
            {
                "title": "Variation Seed",
                "type": "integer",
                "default": None,
                "nullable": True,
                "minimum": 0,
                "maximum": 4294967295,
            },
        ),
        (
            15,
            "variation_strength",
            {"title": "Variation Strength", "type": "number", "default": 0, "minimum": 0, "maximum": 1},
        ),
        (16, "lora", {"title": "Lora", **FILE}),
        (
            17,
            "lora_scale",
            {"title": "Lora Scale", "type": "number", "default": 1, "minimum": 0, "maximum": 5},
        ),
        (18, "second_pass", {"title": "Second Pass", "type": "boolean", "default": True}),
        (19, "go_fast", {"title": "Go Fast", "type": "boolean", "default": False}),
    ],
)
def test_each_input(order: int, name: str, expected: dict[str, Any], components: dict[str, Any]) -> None:
    described = dict(components["Input"]["properties"][name])
    assert described.pop("description")
    assert described == {"x-order": order, **expected}
    # An int stays one in JSON, as in what cog build writes.
    assert all(type(described[limit]) is int for limit in ("minimum", "maximum") if limit in described)


def test_there_are_no_other_inputs_and_none_is_required(components: dict[str, Any]) -> None:
    assert len(components["Input"]["properties"]) == 20
    assert "required" not in components["Input"]


@pytest.mark.parametrize(
    ("name", "kind", "choices"),
    [
        ("width", "integer", SIDES),
        ("height", "integer", SIDES),
        ("scheduler", "string", SCHEDULERS),
        ("output_format", "string", OUTPUT_FORMATS),
    ],
)
def test_choices_are_enumerations(
    name: str, kind: str, choices: tuple[object, ...], components: dict[str, Any]
) -> None:
    expected = {"title": name, "description": "An enumeration.", "enum": list(choices), "type": kind}
    assert components[name] == expected


def test_the_output_is_a_list_of_files(components: dict[str, Any]) -> None:
    expected = {"title": "Output", "type": "array", "items": {"type": "string", "format": "uri"}}
    assert components["Output"] == expected


def test_the_rest_is_what_cog_serves() -> None:
    whole = schema()
    assert (whole["openapi"], whole["info"]) == ("3.0.2", {"title": "Cog", "version": "0.1.0"})
    assert list(whole["paths"]) == [
        "/",
        "/health-check",
        "/predictions",
        "/predictions/{prediction_id}/cancel",
    ]
    references = {part.split('"')[0] for part in json.dumps(whole).split('"#/components/schemas/')[1:]}
    assert references <= set(whole["components"]["schemas"])


def test_it_is_written_where_the_server_reads_it(tmp_path: Path) -> None:
    assert write_schema(tmp_path) == tmp_path / ".cog" / "openapi_schema.json"
    assert json.loads((tmp_path / ".cog" / "openapi_schema.json").read_text(encoding="utf-8")) == schema()
    assert len(list((tmp_path / ".cog").iterdir())) == 1


def test_inputs_are_literals_only() -> None:
    """Names, calls and joined strings are what Cog's static reader gets wrong."""
    for value in (keyword.value for call in input_calls() for keyword in call.keywords):
        elements = value.elts if isinstance(value, ast.List) else [value]
        assert all(isinstance(element, ast.Constant) for element in elements), ast.unparse(value)


def test_no_string_of_an_input_is_joined_or_escaped() -> None:
    source = PREDICTOR.read_text(encoding="utf-8")
    for call in input_calls():
        text = ast.get_source_segment(source, call)
        assert text
        tokens = [
            token
            for token in tokenize.generate_tokens(io.StringIO(text).readline)
            if token.type not in (tokenize.NL, tokenize.COMMENT)
        ]
        for before, token in itertools.pairwise(tokens):
            assert not before.type == token.type == tokenize.STRING, token.line
        strings = [token.string for token in tokens if token.type == tokenize.STRING]
        assert all(string[0] in "'\"" and "\\" not in string for string in strings)


def test_an_input_that_may_be_left_out_is_declared_optional() -> None:
    parameters = predict().args.args[1:]
    for parameter, call in zip(parameters, input_calls(), strict=True):
        defaults = [keyword.value for keyword in call.keywords if keyword.arg == "default"]
        assert len(defaults) == 1, parameter.arg
        assert isinstance(defaults[0], ast.Constant) and parameter.annotation
        is_optional = ast.unparse(parameter.annotation).startswith("Optional[")
        assert is_optional == (defaults[0].value is None), parameter.arg


def predict() -> ast.FunctionDef:
    for node in ast.walk(ast.parse(PREDICTOR.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name == "predict":
            return node
    raise AssertionError("predict.py has no predict()")


def input_calls() -> list[ast.Call]:
    calls = predict().args.defaults
    assert all(isinstance(call, ast.Call) and ast.unparse(call.func) == "Input" for call in calls)
    return [call for call in calls if isinstance(call, ast.Call)]
