"""Prompts become 77 ids: lower-cased, composed, ended, padded, and cut where they are too long."""

import json
import shutil

import pytest
from sentencepiece import SentencePieceProcessor

from japanese_stable_diffusion.tokenizer import MAX_LENGTH, Tokenizer

UNKNOWN, END, PADDING = 1, 2, 3


@pytest.fixture(scope="module")
def folder(tiny_weights):
    return tiny_weights / "tokenizer"


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer(folder)


def test_a_prompt_ends_and_is_padded_to_77(tokenizer, folder):
    pieces = SentencePieceProcessor(model_file=str(folder / "spiece.model")).encode("サラリーマン 油絵")
    tokens = tokenizer("サラリーマン 油絵")
    assert tokens.ids == [*pieces, END] + [PADDING] * (MAX_LENGTH - 1 - len(pieces))
    assert UNKNOWN not in tokens.ids
    assert tokens.cut == ""


def test_an_empty_prompt_is_the_end_and_padding(tokenizer):
    assert tokenizer("").ids == [END] + [PADDING] * (MAX_LENGTH - 1)


@pytest.mark.parametrize(
    ("text", "same_as"),
    [
        ("Cyberpunk CITY", "cyberpunk city"),
        ("ＣＹＢＥＲＰＵＮＫ", "cyberpunk"),
        ("ぱんた\u3099", "ぱんだ"),
        ("ｻﾗﾘｰﾏﾝ\u3000油絵", "サラリーマン 油絵"),
        ("猫\n\t寿司", "猫 寿司"),
    ],
    ids=["capitals", "full-width capitals", "combining mark", "half-width", "white space"],
)
def test_what_reads_the_same_gets_the_same_ids(tokenizer, text, same_as):
    tokens = tokenizer(text)
    assert tokens == tokenizer(same_as)
    assert UNKNOWN not in tokens.ids


def test_names_of_special_pieces_are_text_like_any_other(tokenizer):
    ids = tokenizer("猫</s>[PAD]<s>犬").ids
    assert ids.count(END) == 1
    assert ids[ids.index(END) :] == [END] + [PADDING] * (MAX_LENGTH - 1 - ids.index(END))


def test_what_finds_no_room_is_quoted_as_it_was_typed(tokenizer):
    prompt = "サラリーマン 油絵 ABC " * 30
    tokens = tokenizer(prompt)
    assert len(tokens.ids) == MAX_LENGTH
    assert tokens.ids[-1] == END
    assert tokens.cut
    assert prompt.endswith(tokens.cut)
    kept = tokenizer(prompt.removesuffix(tokens.cut))
    assert kept.ids[: MAX_LENGTH - 1] == tokens.ids[: MAX_LENGTH - 1]
    assert kept.cut == ""


def test_the_quote_is_right_where_lower_case_letters_are_more(tokenizer):
    prompt = "İ" * 20 + "猫" * 100
    tokens = tokenizer(prompt)
    kept = tokenizer(prompt.removesuffix(tokens.cut))
    assert tokens.cut == "猫" * len(tokens.cut)
    assert kept.ids == tokens.ids
    assert kept.cut == ""


def test_76_pieces_just_fit(tokenizer):
    prompt = "猫" * 75  # after the piece for the word's beginning
    ids = tokenizer(prompt).ids
    assert PADDING not in ids
    assert tokenizer(prompt).cut == ""
    assert tokenizer(prompt + "富").cut == "富"


def test_the_padding_piece_is_the_one_that_the_folder_names(folder, tmp_path):
    shutil.copy(folder / "spiece.model", tmp_path)
    for named in ("[MASK]", {"content": "[MASK]", "lstrip": False}):
        (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": named}))
        assert Tokenizer(tmp_path)("").ids[-1] == 6


def test_a_padding_piece_that_does_not_exist_is_refused(folder, tmp_path):
    shutil.copy(folder / "spiece.model", tmp_path)
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": "[NONE]"}')
    with pytest.raises(ValueError, match=r"\[NONE\]"):
        Tokenizer(tmp_path)


def test_another_file_is_refused(tmp_path):
    (tmp_path / "spiece.model").write_bytes(b"no model" * 100)
    with pytest.raises(ValueError, match="sentencepiece"):
        Tokenizer(tmp_path)
