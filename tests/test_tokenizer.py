"""Prompts become windows of 77 ids: lower-cased, composed, ended, padded, and split where they are long."""

import itertools
import json
import shutil

import pytest
from sentencepiece import SentencePieceProcessor

from japanese_stable_diffusion.emphasis import Fragment
from japanese_stable_diffusion.tokenizer import LOOK_BACK, MAX_LENGTH, Tokenizer

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
    assert tokens.weights == [1.0] * MAX_LENGTH


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


def windows(tokenizer, *fragments):
    return tokenizer.windows([Fragment(*fragment) for fragment in fragments])


def pieces(window):
    """The ids of a window before `</s>`, which padding follows to the end."""
    end = window.ids.index(END)
    assert window.ids[end:] == [END] + [PADDING] * (MAX_LENGTH - 1 - end)
    return window.ids[:end]


def test_76_pieces_just_fit(tokenizer):
    prompt = "猫" * 75  # after the piece for the word's beginning
    assert PADDING not in tokenizer(prompt).ids
    assert windows(tokenizer, (prompt, 1.0)) == [tokenizer(prompt)]
    first, second = windows(tokenizer, (prompt + "富", 1.0))
    assert first == tokenizer(prompt) == tokenizer(prompt + "富")
    assert pieces(second) == tokenizer("猫富").ids[2:3]


def test_an_empty_prompt_is_one_window(tokenizer):
    assert windows(tokenizer) == windows(tokenizer, ("", 1.0)) == [tokenizer("")]


@pytest.mark.parametrize(
    "prompt",
    [
        "猫" * 1000,
        "サラリーマン 油絵 ABC " * 40,
        "富士山、" * 200,
        "がらすの城。" * 100,
        "İ" * 300,
        "a,b " * 250,
    ],
)
def test_windows_hold_every_piece_in_order(tokenizer, folder, prompt):
    processor = SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    whole = processor.encode("".join(letter.lower() for letter in prompt))
    split = [pieces(window) for window in windows(tokenizer, (prompt, 1.0))]
    assert list(itertools.chain(*split)) == whole
    assert all(MAX_LENGTH - 1 - LOOK_BACK < len(window) < MAX_LENGTH for window in split[:-1])
    assert 0 < len(split[-1]) < MAX_LENGTH


@pytest.mark.parametrize(
    ("beginning", "end"),
    [
        ("猫" * 60 + "、" + "猫" * 5 + "、", "猫" * 5 + "城" * 50),
        ("猫" * 70 + "，", "城" * 50),
        ("猫" * 70 + "。", "城" * 50),
        ("猫" * 70 + "、", "城 城" * 20),
        ("猫" * 74 + "、", "城"),
        ("猫" * 60 + " " + "猫" * 10, " " + "城" * 50),
        ("猫" * 75, "城" * 50),
        # Further back than the web UI looks.
        ("猫" * 50 + "、" + "猫" * 24, "城" * 50),
    ],
)
def test_a_prompt_is_split_where_it_pauses(tokenizer, beginning, end):
    first, _ = windows(tokenizer, (beginning + end, 1.0))
    assert first == tokenizer(beginning)


def test_weights_go_to_the_pieces_of_their_characters_and_change_no_id(tokenizer):
    plain = tokenizer("猫富士山寿司")
    [window] = windows(tokenizer, ("猫", 1.0), ("富", 1.5), ("士山寿", 0.5), ("司", 2.0))
    assert window.ids == plain.ids
    spelled = {1: 1.0, 2: 1.5, 3: 0.5, 4: 0.5, 5: 0.5, 6: 2.0}
    assert len(pieces(window)) == 7, "▁ and every character by itself"
    assert window.weights == [spelled.get(index, 1.0) for index in range(MAX_LENGTH)]


def test_a_piece_over_the_edge_of_brackets_gets_the_mean_of_its_characters(tokenizer):
    assert len(pieces(tokenizer("ぱん"))) == 3
    # With its voiced sound mark typed after it, ぱ is one piece of two characters.
    [window] = windows(tokenizer, ("は", 1.0), ("\u309aん", 2.0))
    assert window.ids == tokenizer("ぱん").ids
    assert window.weights[:4] == [1.0, 1.5, 2.0, 1.0]


def test_weights_stay_with_characters_that_become_several_pieces(tokenizer):
    for letter in ("㍿", "İ", "ｶﾞ"):
        alone = pieces(tokenizer("猫" + letter + "猫"))
        [window] = windows(tokenizer, ("猫", 1.0), (letter, 3.0), ("猫", 1.0))
        assert pieces(window) == alone
        assert window.weights[: len(alone)] == [1.0] * 2 + [3.0] * (len(alone) - 3) + [1.0]


def test_weights_follow_their_pieces_into_the_next_window(tokenizer):
    first, second = windows(tokenizer, ("猫" * 70, 1.0), ("城" * 10, 1.5))
    assert first.weights == [1.0] * 71 + [1.5] * 5 + [1.0]
    assert second.weights == [1.5] * 5 + [1.0] * 72


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
