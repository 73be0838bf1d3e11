"""What brackets in a prompt mean: every form, nesting, full-width marks, plain brackets, and nonsense."""

import itertools
import random
import re

import pytest

from japanese_stable_diffusion.emphasis import parse

BRACKETS = r"[()（）\[\]［］]"
UP, DOWN = 1.1, round(1 / 1.1, 6)


def read(prompt):
    return [(fragment.text, fragment.weight) for fragment in parse(prompt)]


@pytest.mark.parametrize(
    ("prompt", "fragments"),
    [
        ("", []),
        ("猫", [("猫", 1)]),
        ("(猫)", [("猫", UP)]),
        ("[猫]", [("猫", DOWN)]),
        ("(猫:1.3)", [("猫", 1.3)]),
        ("(猫: 1.3 )", [("猫", 1.3)]),
        ("(猫:.5)", [("猫", 0.5)]),
        ("(猫:2.)", [("猫", 2)]),
        ("(猫:+2)", [("猫", 2)]),
        ("(猫:-1)", [("猫", -1)]),
        ("(猫:0)", [("猫", 0)]),
        ("赤い(猫:1.3)と[犬]", [("赤い", 1), ("猫", 1.3), ("と", 1), ("犬", DOWN)]),
        ("((猫))", [("猫", 1.21)]),
        ("[[猫]]", [("猫", round(1 / 1.21, 6))]),
        ("([猫])", [("猫", 1)]),
        ("(赤い(猫:1.5):2)", [("赤い", 2), ("猫", 3)]),
        ("(赤い (猫) 犬)", [("赤い ", UP), ("猫", 1.21), (" 犬", UP)]),
        ("(猫:1.3)(犬:1.3)", [("猫犬", 1.3)]),
        ("猫(:1.5)犬()", [("猫犬", 1)]),
        ("(a [b) c]", [("a ", UP), ("b", 1), (" c", DOWN)]),
    ],
)
def test_brackets_give_weights(prompt, fragments):
    assert read(prompt) == fragments


@pytest.mark.parametrize("prompt", ["（猫：１．３）", "(猫：1.3）", "（猫:１.３)", "（猫　:　＋１．３）"])
def test_every_mark_may_be_full_width(prompt):
    assert [(text.strip(), weight) for text, weight in read(prompt)] == [("猫", 1.3)]


def test_full_width_square_brackets():
    assert read("赤い［猫]") == [("赤い", 1), ("猫", DOWN)]


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        (r"\(猫\)", "(猫)"),
        (r"\(猫:1.3\)", "(猫:1.3)"),
        (r"\（猫\）＼［犬＼］", "（猫）［犬］"),
        (r"\[猫\]", "[猫]"),
        ("(猫", "(猫"),
        ("猫)", "猫)"),
        ("猫:1.3)", "猫:1.3)"),
        ("]猫[", "]猫["),
        (")猫(", ")猫("),
        ("(猫]", "(猫]"),
        ("（猫", "（猫"),
        ("猫 :) 犬 :(", "猫 :) 犬 :("),
        ("1\\2 と C:\\(猫", "1\\2 と C:(猫"),
    ],
)
def test_plain_brackets_are_text_without_weight(prompt, text):
    assert read(prompt) == [(text, 1)]


def test_a_backslash_itself_can_be_written_before_a_bracket():
    assert read(r"\\(猫)") == [("\\", 1), ("猫", UP)]


@pytest.mark.parametrize(
    "prompt", ["猫:1.3", r"C:\\猫\犬", "１６：９", "「猫」【犬】{鳥}<魚>", " 二行\n の文 "]
)
def test_without_brackets_a_prompt_is_taken_as_it_is(prompt):
    assert read(prompt) == [(prompt, 1)]


@pytest.mark.parametrize("inner", ["猫:", "猫:1.3.1", "猫:赤", "猫:1.3 赤", "猫:1e1", "16:9:"])
def test_what_is_no_number_is_text(inner):
    assert read(f"({inner})") == [(inner, UP)]


def test_square_brackets_take_no_number():
    assert read("[猫:1.3]") == [("猫:1.3", DOWN)]


TEXTS = ["猫", "犬、", "a cat", "油絵 ", "１", ": ", ".5", "\\"]


def tree(rng, weight, depth):
    """A random well-formed prompt, and the weight of every character of its text."""
    prompt, characters = "", []
    for _ in range(rng.randrange(4)):
        kind = rng.choice("txrsn") if depth else "t"
        if kind == "t":
            text = rng.choice(TEXTS[:5])
            prompt += text
            characters += [(letter, weight) for letter in text]
        elif kind == "x":
            bracket = rng.choice(BRACKETS[1:-1].replace("\\", ""))
            prompt += rng.choice("\\＼") + bracket
            characters.append((bracket, weight))
        else:
            number = rng.choice(["0.5", "1.3", "2"])
            opening, closing, factor = {
                "r": (rng.choice("(（"), rng.choice(")）"), 1.1),
                "s": (rng.choice("[［"), rng.choice("]］"), 1 / 1.1),
                "n": (rng.choice("(（"), rng.choice(":：") + number + rng.choice(")）"), float(number)),
            }[kind]
            inner, inside = tree(rng, weight * factor, depth - 1)
            prompt += opening + inner + closing
            characters += inside
    return prompt, characters


def test_every_character_of_a_well_formed_prompt_has_its_weight():
    for seed in range(500):
        prompt, expected = tree(random.Random(seed), 1.0, 4)
        parsed = [(letter, fragment.weight) for fragment in parse(prompt) for letter in fragment.text]
        assert [letter for letter, _ in parsed] == [letter for letter, _ in expected], prompt
        assert [weight for _, weight in parsed] == pytest.approx([weight for _, weight in expected], abs=1e-6)


def test_nonsense_is_read_without_an_error_and_loses_marks_only():
    for seed in range(500):
        rng = random.Random(seed)
        prompt = "".join(
            rng.choice(["(", "[", ")", "]", "（", "］", ":1.3)", "：2）", *TEXTS]) for _ in range(30)
        )
        fragments = parse(prompt)
        assert all(fragment.text for fragment in fragments)
        assert all(one.weight != other.weight for one, other in itertools.pairwise(fragments))
        text = "".join(fragment.text for fragment in fragments)
        words = "[猫犬油絵、acte]"
        assert re.findall(words, text) == re.findall(words, prompt)
        # Escaped, what is left of the brackets is plain again.
        if re.search(BRACKETS, text):
            assert read(re.sub(rf"{BRACKETS}|[\\＼]", r"\\\g<0>", text)) == [(text, 1)]


def test_brackets_that_cancel_out_leave_the_plain_prompt():
    for depth in range(1, 20):
        assert read("[" * depth + "(" * depth + "猫" + ")" * depth + "]" * depth) == [("猫", 1)]
        assert read("([" * depth + "猫" + "])" * depth) == [("猫", 1)]


def test_a_thousand_brackets_are_no_trouble():
    assert read("(" * 500 + ")" * 500) == []
    [(text, weight)] = read("(" * 333 + "猫" + ")" * 333)
    assert text == "猫" and weight > 1e13
    assert read(":" * 1000) == [(":" * 1000, 1)]
    assert read("(" + ":1" * 499) == [("(" + ":1" * 499, 1)]
