"""A form made from the OpenAPI schema: a component for each input, so that a new input appears by itself."""

import contextlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import gradio as gr
from PIL import Image, ImageChops

_LONG_TEXT = 200
"""Most characters of a text that is given a single line."""
_DRAWING = (
    "ここに画像をアップロードします。一部だけを描き直すなら、そこをブラシで白く塗ってください。 / "
    "Upload a picture here; to repaint a part of it only, brush that part white."
)
_SLIDER_STEPS = 1000
"""Most positions of a slider; what has more is typed."""


@dataclass(frozen=True)
class Field:
    """A component of the form and the inputs that it gives.

    Attributes:
        names: of the inputs.
        component: that a person fills in.
        read: the component's value → the inputs that it stands for. What is left empty isn't among them.
    """

    names: tuple[str, ...]
    component: gr.components.Component
    read: Callable[[Any], dict[str, Any]]


@dataclass(frozen=True)
class Form:
    """The components of all inputs, placed where it is made; see `gr.Blocks`.

    Attributes:
        fields: in the order of the inputs.
    """

    fields: tuple[Field, ...]

    @property
    def components(self) -> list[gr.components.Component]:
        """What an event has to be given for `read`."""
        return [field.component for field in self.fields]

    def read(self, values: tuple[Any, ...]) -> dict[str, Any]:
        """The values of the components → inputs, as predict() and the HTTP API take them; files as paths."""
        inputs = {}
        for field, value in zip(self.fields, values, strict=True):
            inputs.update(field.read(value))
        return inputs

    def component(self, name: str) -> gr.components.Component | None:
        """The one for an input, if there is such an input."""
        return next((field.component for field in self.fields if name in field.names), None)


def make_form(schema: Mapping[str, Any], buttons: Sequence[gr.Button] = ()) -> Form:
    """Place a form for the inputs of an OpenAPI schema: texts, `buttons`, files, and all other settings."""
    schemas = schema["components"]["schemas"]
    inputs = {
        name: {**schemas.get(name, {}), **described}
        for name, described in sorted(
            schemas["Input"]["properties"].items(), key=lambda item: item[1].get("x-order", 0)
        )
    }
    drawn = {"image", "mask"} <= inputs.keys()
    texts = [name for name, described in inputs.items() if _is_long_text(described)]
    files = [name for name, described in inputs.items() if _is_file(described)]
    fields = {name: _field(name, inputs[name]) for name in texts}
    with gr.Row():
        for button in buttons:
            button.render()
    if files:
        with gr.Accordion("画像などのファイル / Pictures and other files", open=False):
            for name in files:
                if name == "image" and drawn:
                    fields[name] = _drawing(inputs["image"])
                elif name != "mask" or not drawn:
                    fields[name] = _field(name, inputs[name])
    with gr.Accordion("細かい設定 / Settings"), gr.Row():
        for name, described in inputs.items():
            if name not in texts and name not in files:
                fields[name] = _field(name, described)
    return Form(tuple(fields[name] for name in inputs if name in fields))


def _is_long_text(described: Mapping[str, Any]) -> bool:
    return "maxLength" in described and described["maxLength"] > _LONG_TEXT


def _is_file(described: Mapping[str, Any]) -> bool:
    return described.get("format") == "uri"


def _field(name: str, described: Mapping[str, Any]) -> Field:
    kind, default, optional = described["type"], described.get("default"), described.get("nullable", False)
    common: dict[str, Any] = {"label": _label(described), "elem_id": name}
    of_values = {**common, "info": _info(name, described), "value": default, "min_width": 300}
    component: gr.components.Component
    read: Callable[[Any], Any] = _same
    if "enum" in described:
        component = gr.Dropdown(described["enum"], filterable=False, **of_values)
    elif kind == "boolean":
        component = gr.Checkbox(**of_values)
    elif kind in ("integer", "number"):
        step = _slider_step(described)
        read = _whole if kind == "integer" else _same
        if step and not optional:
            component = gr.Slider(described["minimum"], described["maximum"], step=step, **of_values)
        else:
            # A field for numbers can't be left empty, and wouldn't let one hear why a value isn't possible.
            component = gr.Textbox(**{**of_values, "value": "" if default is None else str(default)})
            read = _number
    elif _is_file(described) and name == "image":
        component = gr.Image(type="filepath", sources=["upload", "clipboard"], **common)
        read = _path
    elif _is_file(described):
        component = gr.File(type="filepath", **common)
        read = _path
    else:
        lines = 2 if _is_long_text(described) else 1
        component = gr.Textbox(lines=lines, **of_values)
        read = (lambda text: text or None) if optional else _same

    def inputs(value: Any) -> dict[str, Any]:
        given = read(value)
        return {} if given is None else {name: given}

    return Field((name,), component, inputs)


def _drawing(image: Mapping[str, Any]) -> Field:
    """A picture to upload, and the mask drawn over it."""
    component = gr.ImageEditor(
        type="pil",
        sources=["upload", "clipboard"],
        transforms=None,
        layers=False,
        brush=gr.Brush(colors=["#ffffff"], color_mode="fixed"),
        placeholder=_DRAWING,
        label=_label(image),
        elem_id="image",
    )
    return Field(("image", "mask"), component, _read_drawing)


def _read_drawing(value: dict[str, Any] | None) -> dict[str, Any]:
    if not value or value["background"] is None:
        return {}
    folder = Path(mkdtemp())
    picture = value["background"].convert("RGB")
    picture.save(folder / "image.png")
    inputs = {"image": folder / "image.png"}
    mask = Image.new("L", picture.size)
    for layer in value["layers"]:
        mask = ImageChops.lighter(mask, layer.getchannel("A").resize(picture.size))
    if mask.getbbox():
        # A brush has soft edges.
        mask.point(lambda alpha: 255 * (alpha > 127)).save(folder / "mask.png")
        inputs["mask"] = folder / "mask.png"
    return inputs


def _same(value: Any) -> Any:
    return value


def _whole(value: float | None) -> float | None:
    """Browsers know one kind of number only; what isn't whole stays as it is, to be refused."""
    return int(value) if value is not None and value == int(value) else value


def _number(text: str) -> int | float | str | None:
    """What isn't a number stays as it is, to be refused."""
    with contextlib.suppress(ValueError):
        return int(text)
    with contextlib.suppress(ValueError):
        if math.isfinite(number := float(text)):
            return number
    return text.strip() or None


def _path(value: str | None) -> Path | None:
    return Path(value) if value else None


def _slider_step(described: Mapping[str, Any]) -> float | None:
    """The step of a slider from limit to limit; None if it has no limits, or too many steps to aim at one."""
    if "minimum" not in described or "maximum" not in described:
        return None
    span = described["maximum"] - described["minimum"]
    step = 1 if described["type"] == "integer" else 0.01 if span <= 2 else 0.1
    return step if span / step <= _SLIDER_STEPS else None


def _label(described: Mapping[str, Any]) -> str:
    return " / ".join(head for head, _ in _halves(described))


def _info(name: str, described: Mapping[str, Any]) -> str:
    return " ".join((" / ".join(rest for _, rest in _halves(described) if rest), f"`{name}`")).strip()


def _halves(described: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Japanese and English description, each as what it says first, and the rest."""
    japanese, _, english = described.get("description", "").partition(" / ")
    halves = [re.split("。", japanese, maxsplit=1), re.split(r"[,;:.](?:\s|$)", english, maxsplit=1)]
    return [(half[0].strip(), half[1].strip() if len(half) > 1 else "") for half in halves if half[0]]
