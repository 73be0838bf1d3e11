"""Read thousands of damaged picture files, and picture files that ask for much memory.

python tests/fuzzed_pictures.py COUNT [FILE ...] mutates small pictures COUNT times, always in the same way,
and then reads the FILES. It prints how many could be read and how many were refused, and the most memory that
took, in bytes above what the process had before. Whatever is neither read nor refused in one line ends it.
"""

import io
import json
import random
import re
import signal
import struct
import sys
import tempfile
import zlib
from pathlib import Path

from PIL import Image

from japanese_stable_diffusion.images import read_image
from japanese_stable_diffusion.request import RequestError

HANGS = 120
"""Seconds after which a file counts as one that never ends."""


def small_pictures() -> list[bytes]:
    """One picture in every format and mode that strangers send, and texts that are none."""
    colours = Image.effect_mandelbrot((40, 24), (-2, -1.2, 1, 1.2), 40).convert("RGB")
    colours.putpixel((3, 3), (255, 0, 0))
    alpha = colours.copy()
    alpha.putalpha(Image.linear_gradient("L").resize(colours.size))
    grey16 = colours.convert("L").convert("I").point(lambda value: value * 257).convert("I;16")
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = {"save_all": True, "append_images": [colours.rotate(90)]}
    files = []

    def save(picture: Image.Image, file_format: str, **options: object) -> None:
        file = io.BytesIO()
        picture.save(file, file_format, **options)
        files.append(file.getvalue())

    for mode in ("1", "L", "P", "RGB"):
        save(colours.convert(mode), "PNG", exif=exif)
        save(colours.convert(mode), "BMP")
        save(colours.convert(mode), "TIFF", compression="tiff_adobe_deflate")
    for picture in (alpha, alpha.convert("LA"), grey16):
        save(picture, "PNG")
    for mode in ("L", "RGB", "CMYK"):
        save(colours.convert(mode), "JPEG", exif=exif)
        save(colours.convert(mode), "JPEG", progressive=True, quality=95)
    for compression in (None, "tiff_lzw", "packbits", "jpeg"):
        save(colours, "TIFF", compression=compression)
    for picture in (colours.convert("CMYK"), alpha, grey16):
        save(picture, "TIFF", compression="tiff_lzw")
    for picture in (colours, alpha):
        save(picture, "WEBP", exif=exif)
        save(picture, "WEBP", lossless=True)
        save(picture, "AVIF", speed=10)
    save(colours, "GIF")
    for file_format in ("PNG", "GIF", "WEBP", "TIFF", "AVIF", "MPO"):
        save(colours, file_format, **frames)
    files.append(b'<svg xmlns="http://www.w3.org/2000/svg" width="9999999" height="9999999"></svg>')
    files.append(b"<!DOCTYPE html><html><body>404</body></html>")
    return files


def mutated(data: bytes, others: list[bytes], chance: random.Random) -> bytes:
    """`data` with one to three damages; half of the PNG files get right checksums again."""
    damaged = bytearray(data)
    for _ in range(chance.randint(1, 3)):
        place = chance.randrange(len(damaged) + 1)
        if chance.random() < 0.5:
            place = min(place, chance.randrange(64))
        kind = chance.randrange(6)
        if kind == 0:
            damaged[place : place + 1] = bytes([chance.randrange(256)])
        elif kind == 1:
            number = chance.choice([0, 1, 0x7FFF, 0xFFFF, 9999, 100_000, 0x7FFFFFFF, 0xFFFFFFFF])
            written = struct.pack(chance.choice("<>") + "I", number)[: chance.choice([2, 4])]
            damaged[place : place + len(written)] = written
        elif kind == 2:
            del damaged[place:]
        elif kind == 3:
            del damaged[place : place + chance.randint(1, 16)]
        elif kind == 4:
            other = chance.choice(others)
            start = chance.randrange(len(other))
            damaged[place:place] = other[start : start + chance.randint(1, 200)]
        else:
            damaged[place:place] = damaged[place : place + chance.randint(1, 64)] * chance.randint(1, 50)
    return with_checksums(bytes(damaged)) if chance.random() < 0.5 else bytes(damaged)


def with_checksums(data: bytes) -> bytes:
    """A PNG file with the right checksum behind each of its chunks; any other file as it is."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    fixed, place = bytearray(data), 8
    while place + 12 <= len(fixed):
        length = int.from_bytes(fixed[place : place + 4], "big")
        end = place + 8 + length
        if end + 4 > len(fixed):
            break
        fixed[end : end + 4] = struct.pack(">I", zlib.crc32(fixed[place + 4 : end]))
        place = end + 4
    return bytes(fixed)


def peak_memory() -> int:
    """Bytes of memory that this process has had at most."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def is_readable(file: Path) -> bool:
    """Whether the file could be read; what is refused is refused in one line that names the input."""
    signal.alarm(HANGS)
    try:
        picture, _ = read_image("image", file)
    except RequestError as error:
        assert str(error).startswith("image: ") and str(error).isprintable() and len(str(error)) < 250, error
        return False
    finally:
        signal.alarm(0)
    assert picture.mode == "RGB" and min(picture.size) > 0
    return True


def main() -> None:
    base = peak_memory()
    seeds = small_pictures()
    chance = random.Random(0)
    readable = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(int(sys.argv[1])):
            file = Path(folder) / f"{number}.png"
            file.write_bytes(mutated(chance.choice(seeds), seeds, chance))
            readable.append(is_readable(file))
            file.unlink()
    readable += [is_readable(Path(file)) for file in sys.argv[2:]]
    result = {"read": sum(readable), "refused": readable.count(False), "bytes": peak_memory() - base}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
