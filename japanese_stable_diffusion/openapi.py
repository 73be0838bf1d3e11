"""The OpenAPI schema of predict.py, as `cog build` writes it.

Without that schema Cog's HTTP server validates nothing and serves no /openapi.json. In an image it is there;
elsewhere `write_schema` makes it, in the form of cog 0.23's generator.
"""

import ast
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

from cog._adt import InputField, PredictorInfo, Repetition
from cog._inspector import create_predictor

PREDICTOR = Path(__file__).resolve().parent.parent / "predict.py"
SCHEMA = Path(".cog") / "openapi_schema.json"


def schema() -> dict[str, Any]:
    """The OpenAPI 3.0.2 schema of predict.py, under the names that Cog's server and Replicate's form read."""
    predictor = _read_predictor()
    components = {
        "Input": _input_schema(predictor.inputs),
        "Output": predictor.output.json_type(),
        **{name: _choices_schema(field) for name, field in predictor.inputs.items() if field.choices},
        **_FIXED_COMPONENTS,
    }
    return {
        "openapi": "3.0.2",
        "info": {"title": "Cog", "version": "0.1.0"},
        "paths": _PATHS,
        "components": {"schemas": components},
    }


def write_schema(root: Path) -> Path:
    """Write the schema to where Cog's server, started in the folder `root`, reads it; returns that path."""
    text = json.dumps(schema(), ensure_ascii=False, indent=2) + "\n"
    path = root / SCHEMA
    path.parent.mkdir(exist_ok=True)
    # A server that starts meanwhile sees the old file or the new one, never half of it.
    with tempfile.NamedTemporaryFile("w", dir=path.parent, encoding="utf-8", delete=False) as file:
        file.write(text)
    os.replace(file.name, path)
    return path


def _read_predictor() -> PredictorInfo:
    """What the Cog SDK makes of predict.py's signatures, which are read without running the rest of the file.

    `cog build` reads it so too, and it spares importing PyTorch: seconds at every start of the server.
    """
    signatures: list[ast.stmt] = []
    for statement in ast.parse(PREDICTOR.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.ImportFrom) and statement.module in ("cog", "typing"):
            signatures.append(statement)
        elif isinstance(statement, ast.ClassDef):
            for method in statement.body:
                if isinstance(method, ast.FunctionDef):
                    method.body = [ast.Pass()]
            signatures.append(statement)
    module = ModuleType("signatures_of_predict")
    tree = ast.fix_missing_locations(ast.Module(signatures, []))
    exec(compile(tree, str(PREDICTOR), "exec"), module.__dict__)
    sys.modules[module.__name__] = module
    with warnings.catch_warnings():
        # BasePredictor and predict() are this project's chosen interface; the SDK prefers newer names.
        warnings.simplefilter("ignore", DeprecationWarning)
        return create_predictor(module.__name__, "Predictor")


def _input_schema(inputs: dict[str, InputField]) -> dict[str, Any]:
    properties = {name: _property(field) for name, field in inputs.items()}
    required = [name for name, property in properties.items() if "default" not in property]
    form: dict[str, Any] = {"title": "Input", "type": "object", "properties": properties}
    if required:
        form["required"] = required
    return form


def _property(field: InputField) -> dict[str, Any]:
    form: dict[str, Any] = {"x-order": field.order}
    if field.choices:
        form["allOf"] = [{"$ref": f"#/components/schemas/{field.name}"}]
    else:
        form["title"] = field.name.replace("_", " ").title()
        form.update(field.type.json_type())
    optional = field.type.repetition in (Repetition.OPTIONAL, Repetition.OPTIONAL_REPEATED)
    if optional or field.default is not None:
        form["default"] = field.default
    if optional:
        form["nullable"] = True
    limits = {
        "description": field.description,
        "minimum": _number(field.ge),
        "maximum": _number(field.le),
        "minLength": field.min_length,
        "maxLength": field.max_length,
        "pattern": field.regex,
    }
    form.update((name, value) for name, value in limits.items() if value is not None)
    return form


def _number(value: float | None) -> float | None:
    # The SDK keeps limits as floats; cog build writes 64, not 64.0.
    return int(value) if value is not None and value == int(value) else value


def _choices_schema(field: InputField) -> dict[str, Any]:
    return {
        "title": field.name,
        "description": "An enumeration.",
        "enum": field.choices,
        "type": field.type.json_type()["type"],
    }


def _reference(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(title: str, **properties: dict[str, Any]) -> dict[str, Any]:
    return {"title": title, "type": "object", "properties": properties}


def _text(title: str, **more: str) -> dict[str, str]:
    return {"title": title, "type": "string", **more}


_FIXED_COMPONENTS: dict[str, Any] = {
    "PredictionRequest": _object("PredictionRequest", id=_text("Id"), input=_reference("Input")),
    "PredictionResponse": _object(
        "PredictionResponse",
        input=_reference("Input"),
        output=_reference("Output"),
        id=_text("Id"),
        version=_text("Version"),
        created_at=_text("Created At", format="date-time"),
        started_at=_text("Started At", format="date-time"),
        completed_at=_text("Completed At", format="date-time"),
        status=_text("Status"),
        error=_text("Error"),
        logs=_text("Logs"),
        metrics={"title": "Metrics", "type": "object"},
    ),
    "Status": {
        "title": "Status",
        "description": "An enumeration.",
        "enum": ["starting", "processing", "succeeded", "canceled", "failed"],
        "type": "string",
    },
    "HTTPValidationError": _object(
        "HTTPValidationError",
        detail={"title": "Detail", "type": "array", "items": _reference("ValidationError")},
    ),
    "ValidationError": {
        **_object(
            "ValidationError",
            loc={
                "title": "Location",
                "type": "array",
                "items": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
            },
            msg=_text("Message"),
            type=_text("Error Type"),
        ),
        "required": ["loc", "msg", "type"],
    },
}


def _response(description: str, content: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": content}}}


_SUCCESS = {"200": _response("Successful Response", {})}
_REFUSAL = {"422": _response("Validation Error", _reference("HTTPValidationError"))}

_PATHS: dict[str, Any] = {
    "/": {"get": {"summary": "Root", "operationId": "root__get", "responses": _SUCCESS}},
    "/health-check": {
        "get": {
            "summary": "Healthcheck",
            "operationId": "healthcheck_health_check_get",
            "responses": _SUCCESS,
        }
    },
    "/predictions": {
        "post": {
            "summary": "Predict",
            "description": "Run a single prediction on the model",
            "operationId": "predict_predictions_post",
            "requestBody": {"content": {"application/json": {"schema": _reference("PredictionRequest")}}},
            "responses": {
                "200": _response("Successful Response", _reference("PredictionResponse")),
                **_REFUSAL,
            },
        }
    },
    "/predictions/{prediction_id}/cancel": {
        "post": {
            "summary": "Cancel",
            "operationId": "cancel_predictions__prediction_id__cancel_post",
            "parameters": [
                {"required": True, "schema": _text("Prediction Id"), "name": "prediction_id", "in": "path"}
            ],
            "responses": {**_SUCCESS, **_REFUSAL},
        }
    },
}
