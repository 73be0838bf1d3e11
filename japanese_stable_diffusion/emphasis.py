"""Emphasis in a prompt, as the web UI of AUTOMATIC1111 reads it (Attention/emphasis in its wiki's Features).

    (単語)      weight × 1.1
    (単語:1.3)  weight × 1.3
    [単語]      weight ÷ 1.1
    \\(単語\\)    plain brackets

Brackets may be nested, which multiplies, and every mark may be full-width, as Japanese keyboards type it.
Other than in the web UI, a bracket without its partner is text like any other, and so is a backslash before
anything but a bracket or a backslash.
"""

import re
import unicodedata
from dataclasses import dataclass

STEP = 1.1
"""What one pair of brackets without a number multiplies or divides by."""

_BRACKET = re.compile(r"[()（）\[\]［］]")
_NUMBER = r"[+\-＋－]?(?:[0-9０-９]+(?:[.．][0-9０-９]*)?|[.．][0-9０-９]+)"
_MARK = re.compile(
    rf"""
    [\\＼](?P<plain>[\\＼()（）\[\]［］])
    | (?P<round>[(（])
    | (?P<square>[\[［])
    | (?:[:：]\s*(?P<weight>{_NUMBER})\s*)?(?P<round_end>[)）])
    | (?P<square_end>[\]］])
    """,
    re.VERBOSE,
)


@dataclass(frozen=True)
class Fragment:
    """A part of a prompt, and what its embedding is multiplied by."""

    text: str
    weight: float


def parse(prompt: str) -> list[Fragment]:
    """The fragments that a prompt is made of, without the marks, neighbours differing in weight.

    A prompt without brackets is one fragment of weight 1, backslashes and all. An empty one has none.
    """
    if not _BRACKET.search(prompt):
        return [Fragment(prompt, 1.0)] if prompt else []
    texts: list[str] = []
    weights: list[float] = []
    open_brackets: dict[str, list[int]] = {"round": [], "square": []}

    def add(text: str) -> None:
        texts.append(text)
        weights.append(1.0)

    end = 0
    for mark in _MARK.finditer(prompt):
        add(prompt[end : mark.start()])
        end = mark.end()
        kind = str(mark.lastgroup)
        if kind == "plain":
            add(mark["plain"])
        elif kind in open_brackets:
            open_brackets[kind].append(len(texts))
            add(mark[0])
        elif open_brackets[kind.removesuffix("_end")]:
            begin = open_brackets[kind.removesuffix("_end")].pop()
            # The opening bracket had been kept as text, in case that its partner wouldn't come.
            texts[begin] = ""
            factor = _factor(mark)
            weights[begin:] = [weight * factor for weight in weights[begin:]]
        else:
            add(mark[0])
    add(prompt[end:])

    fragments: list[Fragment] = []
    for text, product in zip(texts, weights, strict=True):
        # Brackets that cancel each other out leave 1 and no rounding error.
        weight = round(product, 6)
        if fragments and fragments[-1].weight == weight:
            fragments[-1] = Fragment(fragments[-1].text + text, weight)
        elif text:
            fragments.append(Fragment(text, weight))
    return fragments


def _factor(mark: re.Match[str]) -> float:
    if mark["weight"]:
        return float(unicodedata.normalize("NFKC", mark["weight"]))
    return 1 / STEP if mark["square_end"] else STEP
