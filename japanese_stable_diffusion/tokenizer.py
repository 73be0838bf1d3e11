"""Japanese text → windows of 77 token ids, by sentencepiece.

The ids are those of the slow `T5Tokenizer` of transformers 4 with `do_lower_case = True`, which the model was
trained with. The `T5Tokenizer` of transformers 5 ignores that switch and knows neither capital letters nor
combining voiced sound marks; sentencepiece itself does it right.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from sentencepiece import SentencePieceProcessor

from japanese_stable_diffusion.emphasis import Fragment

MAX_LENGTH = 77
"""Token ids per window, `</s>` included: the positions of the text encoder."""
ROOM = MAX_LENGTH - 1
"""Pieces that find room in a window, before `</s>`."""
LOOK_BACK = 20
"""Pieces at the end of a full window among which a place to split the prompt is looked for.

As many as in the web UI of AUTOMATIC1111.
"""
_SEPARATORS = (",", "，", "、", "､", "。", "｡")


@dataclass(frozen=True)
class Tokens:
    """A window: as much of a prompt as the text encoder takes at once.

    Attributes:
        ids: `MAX_LENGTH` token ids: the pieces, `</s>`, then padding.
        weights: what the embedding of each is multiplied by; 1 for `</s>` and padding.
    """

    ids: list[int]
    weights: list[float]


@dataclass(frozen=True)
class _Piece:
    """A piece of a prompt: its id, the characters that it stands for, and the mean of their weights."""

    id: int
    text: str
    weight: float


class Tokenizer:
    """The tokenizer of a weights folder: `spiece.model` and, beside it, the name of the padding piece.

    Args:
        folder: holds `spiece.model` and, where the padding piece is not `[PAD]`, `special_tokens_map.json`.

    Raises:
        OSError: `spiece.model` can't be read.
        ValueError: `spiece.model` is not a sentencepiece model, or lacks `</s>` or the padding piece.
    """

    def __init__(self, folder: Path) -> None:
        model = (folder / "spiece.model").read_bytes()
        self._processor = SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise ValueError("is not a sentencepiece model") from error
        self._end = self._processor.eos_id()
        if self._end < 0:
            raise ValueError("has no </s> piece")
        padding = _padding_piece(folder)
        self._padding = self._processor.piece_to_id(padding)
        if self._padding == self._processor.unk_id():
            raise ValueError(f"has no {padding} piece to pad with")

    def __len__(self) -> int:
        """The number of pieces; every id is below it."""
        return int(self._processor.get_piece_size())

    def __call__(self, text: str) -> Tokens:
        """The first window of a text, filled to its end; what finds no room is left out, as in training.

        Names of special pieces in the text, such as `</s>`, are text like any other.
        """
        return self._window(self._encode([Fragment(text, 1.0)])[:ROOM])

    def windows(self, fragments: Sequence[Fragment]) -> list[Tokens]:
        """All windows of a prompt, at least one; together they hold every piece of it, in order.

        The fragments are joined before they are tokenized, so weights never change the ids. A full window
        ends behind the last comma or 、 or 。 among its last `LOOK_BACK` pieces, else before the last space
        there, else wherever it is full.
        """
        pieces = self._encode(fragments)
        windows = []
        while len(pieces) > ROOM:
            end = _split(pieces)
            windows.append(self._window(pieces[:end]))
            pieces = pieces[end:]
        return [*windows, self._window(pieces)]

    def _encode(self, fragments: Sequence[Fragment]) -> list[_Piece]:
        # Letter by letter, as the slow tokenizer did: str.lower() would turn the last Σ of a word into ς.
        letters = [(low, part.weight) for part in fragments for letter in part.text for low in letter.lower()]
        text = "".join(letter for letter, _ in letters)
        encoded = self._processor.encode(text, return_type="offset_mapping")
        pieces = []
        for id_, (begin, end) in zip(encoded["ids"], encoded["offsets"], strict=True):
            # Of the pieces that one character becomes, all but the last are said to end where they begin.
            weights = [weight for _, weight in letters[begin : max(end, begin + 1)]]
            pieces.append(_Piece(id_, text[begin:end], fmean(weights)))
        return pieces

    def _window(self, pieces: Sequence[_Piece]) -> Tokens:
        padding = ROOM - len(pieces)
        return Tokens(
            ids=[*(piece.id for piece in pieces), self._end] + [self._padding] * padding,
            weights=[*(piece.weight for piece in pieces), 1.0] + [1.0] * padding,
        )


def _split(pieces: Sequence[_Piece]) -> int:
    """How many pieces of a prompt that is longer than a window go into its first one."""
    places = range(ROOM, ROOM - LOOK_BACK, -1)
    behind_comma = (end for end in places if pieces[end - 1].text.endswith(_SEPARATORS))
    before_space = (end for end in places if pieces[end].text[:1].isspace())
    return next(behind_comma, next(before_space, ROOM))


def _padding_piece(folder: Path) -> str:
    path = folder / "special_tokens_map.json"
    names = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    piece = names.get("pad_token", "[PAD]")
    return str(piece["content"] if isinstance(piece, dict) else piece)
