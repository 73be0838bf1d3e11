"""Train a sentencepiece tokenizer in the layout of the 2022 weights."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

MAX_LENGTH = 77
SPECIAL_PIECES = {
    "bos_token": "<s>",
    "cls_token": "[CLS]",
    "eos_token": "</s>",
    "mask_token": "[MASK]",
    "pad_token": "[PAD]",
    "sep_token": "[SEP]",
    "unk_token": "<unk>",
}


def train_tokenizer(texts: Iterable[str], vocabulary: int, folder: Path) -> None:
    """Learn a unigram vocabulary from ``texts`` and write a tokenizer folder.

    Unigram model (Kudo 2018, arXiv:1804.10959), NFKC, lower case; ids 0 to 3 are <s>, <unk>, </s>
    and [PAD], as in the 2022 weights. A word that stands alone in ``texts`` often enough becomes one piece.
    Fewer pieces are made where the texts don't yield ``vocabulary``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(unicodedata.normalize("NFKC", text).lower() for text in texts),
        model_prefix=str(folder / "spiece"),
        model_type="unigram",
        vocab_size=vocabulary,
        hard_vocab_limit=False,
        character_coverage=1.0,
        normalization_rule_name="nmt_nfkc",
        bos_id=0,
        unk_id=1,
        eos_id=2,
        pad_id=3,
        pad_piece="[PAD]",
        control_symbols=["[CLS]", "[SEP]", "[MASK]"],
        num_threads=1,
        input_sentence_size=10_000_000,
        shuffle_input_sentence=True,
        minloglevel=2,
    )
    (folder / "spiece.vocab").unlink()
    about = {
        **SPECIAL_PIECES,
        "do_lower_case": True,
        "extra_ids": 0,
        "model_max_length": MAX_LENGTH,
        "additional_special_tokens": [],
        "tokenizer_class": "T5Tokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(SPECIAL_PIECES, indent=2) + "\n")
