"""Japanese text → 77 token ids, by sentencepiece.

The ids are those of the slow `T5Tokenizer` of transformers 4 with `do_lower_case = True`, which the model was
trained with. The `T5Tokenizer` of transformers 5 ignores that switch and knows neither capital letters nor
combining voiced sound marks; sentencepiece itself does it right.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from sentencepiece import SentencePieceProcessor

MAX_LENGTH = 77
"""Token ids per prompt, `</s>` included: the positions of the text encoder."""


@dataclass(frozen=True)
class Tokens:
    """A prompt as the text encoder takes it.

    Attributes:
        ids: `MAX_LENGTH` token ids: the pieces, `</s>`, then padding.
        cut: the end of the prompt that found no room; empty if all of it did.
    """

    ids: list[int]
    cut: str


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
        """Tokenize a prompt; names of special pieces in it, such as `</s>`, are text like any other."""
        # Letter by letter, as the slow tokenizer did: str.lower() would turn the last Σ of a word into ς.
        letters = [letter.lower() for letter in text]
        encoded = self._processor.encode("".join(letters), return_type="offset_mapping")
        room = MAX_LENGTH - 1
        ids = [*encoded["ids"][:room], self._end]
        cut = ""
        if len(encoded["ids"]) > room:
            origins = [index for index, letter in enumerate(letters) for _ in letter]
            begin, _ = encoded["offsets"][room]
            cut = text[origins[begin] :]
        return Tokens(ids + [self._padding] * (MAX_LENGTH - len(ids)), cut)


def _padding_piece(folder: Path) -> str:
    path = folder / "special_tokens_map.json"
    names = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    piece = names.get("pad_token", "[PAD]")
    return str(piece["content"] if isinstance(piece, dict) else piece)
