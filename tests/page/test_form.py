"""The form that is made from a schema, and what it gives when it is read."""

from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from PIL import Image

from japanese_stable_diffusion import openapi
from japanese_stable_diffusion.page.form import Form, make_form
from japanese_stable_diffusion.request import Request

DESCRIBED = "強さ。高いほど強い。 / Strength; higher is stronger."


def form(schema: dict[str, Any]) -> Form:
    with gr.Blocks(analytics_enabled=False):
        return make_form(schema)


def form_of(**inputs: dict[str, Any]) -> Form:
    """A form for inputs that predict.py doesn't have."""
    schemas: dict[str, Any] = {name: described.pop("is", {}) for name, described in inputs.items()}
    return form({"components": {"schemas": {**schemas, "Input": {"properties": inputs}}}})


def read(form: Form, **values: Any) -> dict[str, Any]:
    """What the form gives as it is filled in at first, but for some values."""
    return form.read(
        tuple(values.get(field.names[0], getattr(field.component, "value", None)) for field in form.fields)
    )


def test_as_it_is_at_first_it_asks_for_the_defaults() -> None:
    schema = openapi.schema()
    whole = form(schema)
    properties = schema["components"]["schemas"]["Input"]["properties"]
    assert sorted(name for field in whole.fields for name in field.names) == sorted(properties)
    assert Request(**read(whole)) == Request()


@pytest.mark.parametrize(
    ("described", "component", "value", "given"),
    [
        ({"type": "integer", "minimum": 1, "maximum": 8, "default": 2}, gr.Slider, 3.0, 3),
        ({"type": "number", "minimum": 0, "maximum": 1, "default": 0.5}, gr.Slider, 0.25, 0.25),
        ({"type": "integer", "minimum": 0, "maximum": 4294967295, "nullable": True}, gr.Textbox, "7", 7),
        ({"type": "number", "default": 1.5}, gr.Textbox, "2.5", 2.5),
        ({"type": "integer", "default": 1}, gr.Textbox, "七", "七"),
        ({"type": "boolean", "default": False}, gr.Checkbox, True, True),
        ({"is": {"enum": ["a", "b"], "type": "string"}, "default": "b"}, gr.Dropdown, "a", "a"),
        ({"type": "string", "default": ""}, gr.Textbox, "猫", "猫"),
        ({"type": "string", "format": "uri", "nullable": True}, gr.File, "/tmp/cat", Path("/tmp/cat")),
    ],
    ids=str,
)
def test_a_new_input_appears_by_itself(
    described: dict[str, Any], component: type, value: Any, given: Any
) -> None:
    one = form_of(new={"description": DESCRIBED, **described})
    assert type(one.component("new")) is component
    assert read(one, new=value) == {"new": given}
    assert type(read(one, new=value)["new"]) is type(given)


@pytest.mark.parametrize("kind", ["integer", "number", "string"])
def test_what_is_left_empty_is_left_out(kind: str) -> None:
    assert read(form_of(new={"type": kind, "nullable": True}), new="") == {}


def test_its_labels_are_what_the_description_says_first_in_both_languages() -> None:
    component = form_of(new={"type": "string", "description": DESCRIBED}).component("new")
    assert isinstance(component, gr.Textbox)
    assert component.label == "強さ / Strength"
    assert component.info == "高いほど強い。 / higher is stronger. `new`"


def test_a_mask_is_drawn_over_the_picture() -> None:
    file = {"type": "string", "format": "uri", "nullable": True}
    drawing = form_of(image=dict(file), mask=dict(file))
    component = drawing.component("mask")
    assert isinstance(component, gr.ImageEditor) and component is drawing.component("image")

    picture = Image.new("RGB", (40, 30), "red")
    stroke = Image.new("RGBA", picture.size)
    stroke.paste((255, 255, 255, 255), (10, 5, 20, 15))
    inputs = read(drawing, image={"background": picture, "layers": [stroke], "composite": picture})
    assert Image.open(inputs["image"]).convert("RGB").tobytes() == picture.tobytes()
    mask = Image.open(inputs["mask"])
    assert (mask.size, mask.getbbox(), mask.getextrema()) == ((40, 30), (10, 5, 20, 15), (0, 255))

    bare = read(
        drawing, image={"background": picture, "layers": [Image.new("RGBA", picture.size)], "composite": None}
    )
    assert bare.keys() == {"image"}
    assert read(drawing, image=None) == read(drawing, image={"background": None, "layers": []}) == {}
