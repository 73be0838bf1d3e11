"""Which compositions of a thing and a style no stage of the training sees: the report asks for them.

Each of the two is trained on, with other partners; whoever can draw them together has understood both.
"""

import zlib

_NAMED = frozenset({("🍣", "oil_painting"), ("🐴", "ukiyoe"), ("🐎", "ukiyoe")})
_ONE_IN = 79


def left_out(concept: str, style: str) -> bool:
    """Whether samples of this concept in this style stay out of training.

    寿司 in oils and 馬 as ukiyo-e by name, and one in 79 of all others by a checksum: 64 pairs for the
    concepts of ``concepts.txt``. The plain illustration teaches what a thing looks like; it always stays.

    Args:
        concept: the emoji, or the name of a drawing of our own, as ``concepts.txt`` and samples have it.
        style: the name of a style of ``styles.STYLES``.
    """
    if style == "illustration":
        return False
    return (concept, style) in _NAMED or zlib.crc32(f"{concept} {style}".encode()) % _ONE_IN == 0
