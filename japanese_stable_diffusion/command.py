"""A prediction asked for on the command line: what was typed becomes inputs, and pictures become files."""

import contextlib
import json
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args, get_type_hints

from cog.types import Path as CogPath
from cog.types import URLPath

from japanese_stable_diffusion.images import open_start
from japanese_stable_diffusion.provenance import Parameters, ProvenanceError, hash_file, read_parameters
from japanese_stable_diffusion.request import Request, RequestError

_TYPES = get_type_hints(Request)
_FILES = {name for name, kind in _TYPES.items() if Path in get_args(kind)}
_MOST_TEXT = 1_000_000
"""Characters read of a text file: far over what any input allows, so that an endless file ends too."""
_ENDINGS = {".png": "png", ".jpg": "jpg", ".jpeg": "jpg", ".webp": "webp"}
_JSON_ALLOWED = 'an object such as {"seed": 1} is allowed, or @FILE that holds one'


def predict(
    typed: list[str], json_text: str | None = None, output: str | None = None, again: str | None = None
) -> int:
    """Make pictures and write them to files. Their paths go to stdout, everything else to stderr.

    Args:
        typed: inputs as `name=value` or `name=@file`.
        json_text: instead of these a JSON object, `@file`, or `@-` for standard input. What goes to stdout is
            then `{"status": "succeeded" or "failed", "output": [path, ...], "error": ""}`, as from
            `cog predict --json`.
        output: a folder, or for one picture a file name; the current folder if None.
        again: a file that carries the parameters of a picture, which stand for the inputs that aren't given.

    Returns:
        The exit code: 0, or after one line on stderr 2 for a wrong input and 1 for any other failure.
    """
    received = contextlib.ExitStack()
    try:
        made = read_parameters(Path(again)) if again else None
        inputs = asdict(made.request) if made else {}
        if output and not _is_folder(output) and (ending := _ending(output)):
            inputs["output_format"] = ending
        inputs |= read_inputs(typed) if json_text is None else read_json(json_text)
        inputs |= {name: _receive(name, inputs[name], received) for name in _FILES & inputs.keys()}
        # predict() checks again; but PyTorch and the weights take seconds to load, and a mistake is told now.
        request = Request(**inputs)
        target = choose_target(output, request)
        if again and made:
            _compare(request, made, again)
        else:
            open_start(request)
        written = _make_pictures(inputs, made, target)
        code, error = 0, ""
    except Exception as failure:
        code, error = (2 if isinstance(failure, RequestError | ProvenanceError) else 1), one_line(failure)
        written = []
        print(error, file=sys.stderr)
    finally:
        received.close()
    if json_text is not None:
        status = "failed" if error else "succeeded"
        print(json.dumps({"status": status, "output": written, "error": error}, ensure_ascii=False, indent=2))
    else:
        print(*written, sep="\n", end="\n" if written else "")
    return code


def read_inputs(typed: list[str]) -> dict[str, Any]:
    """`name=value` texts as inputs; `name=@file` takes the value from a file.

    Where `Request` wants something else than a text, the value is JSON: 512, 7.5, true. What isn't JSON stays
    a text, for `Request` to refuse. Where it wants a file, the value is its name, with or without `@`.

    Raises:
        RequestError: no `=`, an unknown or repeated name, or a file that can't be read.
    """
    inputs: dict[str, Any] = {}
    for text in typed:
        name, equals, value = text.partition("=")
        if not equals:
            raise RequestError(f"-i {text!r}: has no value; write -i NAME=VALUE")
        _check_name(name)
        if name in inputs:
            raise RequestError(f"{name}: is given twice; give it once")
        if name in _FILES:
            inputs[name] = value.removeprefix("@")
            continue
        if value.startswith("@"):
            value = _read_text(name, value[1:])
        inputs[name] = value if _TYPES[name] is str else _parse(value)
    return inputs


def read_json(text: str) -> dict[str, Any]:
    """A JSON object of inputs, itself, in `@file`, or on standard input (`@-`). Its values keep their types.

    Raises:
        RequestError: no JSON object, an unknown name, or a file that can't be read.
    """
    if text == "@-":
        text = sys.stdin.read()
    elif text.startswith("@"):
        text = _read_text("--json", text[1:])
    try:
        inputs = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"--json: is not JSON ({error}); {_JSON_ALLOWED}") from None
    if not isinstance(inputs, dict):
        raise RequestError(f"--json: is not an object; {_JSON_ALLOWED}")
    for name in inputs:
        _check_name(name)
    return inputs


def choose_target(output: str | None, request: Request) -> Path:
    """The folder that the pictures of a request go to, made if it isn't there, or the file for the only one.

    Raises:
        RequestError: `output` is neither a folder nor the name of one picture file of the format asked for,
            or can't be written to.
    """
    target = Path(output or ".")
    is_folder = not output or _is_folder(output)
    if not is_folder:
        ending = _ending(str(output))
        if not ending:
            raise RequestError(
                f"--output: {output!r} is neither a folder nor a file that ends in {', '.join(_ENDINGS)}"
            )
        if ending != request.output_format:
            raise RequestError(
                f"--output: {output!r} is no name for output_format {request.output_format}; change one"
            )
        if request.num_outputs > 1:
            raise RequestError(
                f"--output: {output!r} is one file for {request.num_outputs} pictures; name a folder"
            )
    folder = target if is_folder else target.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise RequestError(f"--output: {str(folder)!r} can't be made ({reason}); name another") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise RequestError(f"--output: {str(folder)!r} can't be written to; name another")
    return target


def _is_folder(output: str) -> bool:
    return output.endswith("/") or Path(output).is_dir() or not Path(output).suffix


def _ending(output: str) -> str | None:
    return _ENDINGS.get(Path(output).suffix.lower())


def _make_pictures(inputs: dict[str, Any], made: Parameters | None, target: Path) -> list[str]:
    # What the Predictor prints is its log; stdout is for the result alone.
    with contextlib.redirect_stdout(sys.stderr):
        from predict import Predictor

        predictor = Predictor()
        predictor.setup()
        manifest = predictor.pipeline.weights.manifest
        if made and (made.weights, made.weights_version) != (manifest.name, manifest.version):
            made_with = f"{made.weights} {made.weights_version}".strip() or "unknown"
            print(f"the weights are others than those it was made with ({made_with}): it will look different")
        written = [_move(picture, target) for picture in predictor.predict(**inputs)]
        predictor.outputs.cleanup()
        return written


def _receive(name: str, value: object, received: contextlib.ExitStack) -> object:
    """The path of a file here, or of one fetched from a URL as Cog's server does, which is removed later."""
    if not isinstance(value, str):
        return value
    try:
        found = CogPath.validate(value)
        if not isinstance(found, URLPath):
            return Path(os.path.expanduser(value))
        fetched = found.convert()
    except (OSError, ValueError) as error:
        raise RequestError(
            f"{name}: can't be fetched ({one_line(error)}); name another URL or file"
        ) from None
    received.callback(fetched.unlink, missing_ok=True)
    return Path(fetched)


def _compare(request: Request, made: Parameters, again: str) -> None:
    """Tell whether the pictures and the LoRA that a file was made from are there, and the same."""
    for name, hash in (("image", made.image_hash), ("mask", made.mask_hash)):
        if hash and not getattr(request, name):
            raise RequestError(
                f"{name}: {again} was made from a picture that it doesn't hold; give that with -i {name}=FILE"
            )
    start = open_start(request)
    if start and (start.image_hash, start.mask_hash) != (made.image_hash, made.mask_hash):
        print("it was made from other pictures than those given: it will look different", file=sys.stderr)
    if not made.lora_hash:
        return
    if request.lora is None:
        raise RequestError(
            f"lora: {again} was made with a LoRA that it doesn't hold; give that with -i lora=FILE"
        )
    with contextlib.suppress(OSError):  # of which the LoRA's own reader tells
        if hash_file(request.lora) != made.lora_hash:
            print("it was made with another LoRA than the one given: it will look different", file=sys.stderr)


def _move(picture: Path, target: Path) -> str:
    file = target / picture.name if target.is_dir() else target
    if file.is_dir():
        raise RequestError(f"--output: {str(file)!r} is a folder where the picture should go; name another")
    shutil.move(picture, file)
    return str(file)


def _parse(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _check_name(name: str) -> None:
    if name not in _TYPES:
        raise RequestError(f"{name!r}: is not an input; the inputs are {', '.join(_TYPES)}")


def _read_text(name: str, file: str) -> str:
    try:
        with Path(file).expanduser().open(encoding="utf-8-sig") as opened:
            return opened.read(_MOST_TEXT).removesuffix("\n")
    except UnicodeDecodeError:
        raise RequestError(f"{name}: {file!r} is not UTF-8 text; convert it, or name another file") from None
    except (OSError, ValueError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise RequestError(
            f"{name}: can't read {file!r} ({reason}); after @ comes the name of a file"
        ) from None


def one_line(failure: Exception) -> str:
    """A failure in one line; its kind is named only if the message isn't written by this project."""
    message = " ".join(str(failure).split())
    told = type(failure).__module__.startswith("japanese_stable_diffusion")
    return message if told and message else f"{type(failure).__name__}: {message}"
