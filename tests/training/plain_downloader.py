"""What img2dataset does, at its simplest: so that most tests can do without installing it.

It takes the same options and writes the same files; test_table.py shows that the real one does too.
"""

import hashlib
import io
import json
import os
import sys
import tarfile
import urllib.request
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps


def install(tools: Path) -> Path:
    """Put this file where img2dataset would be installed."""
    # Not for the program itself, which starts often.
    from japanese_stable_diffusion.training.table import REQUIREMENTS

    program = (
        tools / f"img2dataset-{hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()[:12]}" / "bin" / "python"
    )
    program.parent.mkdir(parents=True)
    paths = os.pathsep.join(path for path in sys.path if path)
    # The first two arguments are: -m img2dataset.main
    program.write_text(
        f'#!/bin/sh\nshift 2\nPYTHONPATH="{paths}" exec "{sys.executable}" "{__file__}" "$@"\n'
    )
    program.chmod(0o755)
    return tools


def main(options: dict[str, str]) -> None:
    """Download one after the other, the last first: img2dataset's order is anybody's guess."""
    folder, size = Path(options["output_folder"]), int(options["image_size"])
    urls = pq.read_table(options["url_list"])["url"].to_pylist()
    lines = []
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for number, url in reversed(list(enumerate(urls))):
            line = {"status": "success", "error_message": None}
            try:
                with urllib.request.urlopen(url, timeout=float(options["timeout"])) as answer:
                    content = answer.read()
            except OSError as error:
                lines.append({"status": "failed_to_download", "error_message": str(error)})
                continue
            try:
                picture = Image.open(io.BytesIO(content)).convert("RGB")
            except OSError:
                lines.append({"status": "failed_to_resize", "error_message": "Image decoding error"})
                continue
            encoded = io.BytesIO()
            ImageOps.fit(picture, (size, size)).save(encoded, "JPEG", quality=95)
            about = {"original_width": picture.width, "original_height": picture.height}
            about["sha256"] = hashlib.sha256(content).hexdigest()
            for kind, content in (("jpg", encoded.getvalue()), ("json", json.dumps(about).encode())):
                member = tarfile.TarInfo(f"{number:07d}.{kind}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            lines.append(line)
    pq.write_table(pa.Table.from_pylist(lines), folder / "00000.parquet")
    (folder / "00000_stats.json").write_text("{}")


if __name__ == "__main__":
    main(dict(argument[2:].split("=", 1) for argument in sys.argv[1:]))
