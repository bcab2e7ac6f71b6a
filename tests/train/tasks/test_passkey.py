"""A passkey's prompt is the published one, of exactly the length asked for, and only the key is right."""

from __future__ import annotations

import pytest

from train.data.tokenizer import ByteTokenizer, load_tokenizer
from train.data.tokens import tokens_in_memory
from train.errors import UserError
from train.tasks.passkey import Passkey, cells
from train.tasks.text import Text


def _as_text(example) -> str:
    assert example.prompt[0] == 255
    return bytes(example.prompt[1:].astype("u1")).decode()


def test_the_prompt_is_the_published_one(text):
    example = Passkey(text, seed=0).example(3, 500, depth=0.5)
    prompt = _as_text(example)
    opening = "There is an important pass key hidden inside a lot of irrelevant text. Find it and memorize it:\n"
    needle = f"The pass key is {example.expected}. Remember it. {example.expected} is the pass key. "
    assert prompt.startswith(opening)
    assert prompt.endswith("\nAnswer: ")
    assert prompt.count(needle) == 1
    assert bytes(example.answer.astype("u1")).decode() == example.expected
    assert len(example.expected) == 5
    haystack = prompt.removeprefix(opening).removesuffix("\nAnswer: ").replace(needle, "")
    whole = bytes(text.read(0, 4 * text.size).astype("u1")).decode()  # in circles: a window may run over the end
    assert haystack in whole


@pytest.mark.parametrize("length", [171, 256, 1000, 5000])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_prompt_and_answer_are_as_long_as_asked_for_and_the_needle_as_deep(text, length, depth):
    example = Passkey(text, seed=1).example(0, length, depth)
    assert example.length == len(example.prompt) + len(example.answer) == length
    before, _, after = _as_text(example).partition("The pass key is ")
    fill = length - 170
    assert len(before) - 96 == round(depth * fill)
    assert len(after) == len(f"{example.expected}. Remember it. {example.expected} is the pass key. \nAnswer: ") + (
        fill - round(depth * fill)
    )


def test_an_example_depends_on_seed_index_length_and_depth_alone(text):
    def prompt(seed: int, *place) -> bytes:
        return Passkey(text, seed).example(*place).prompt.tobytes()

    places = [(0, 400, 0.5), (1, 400, 0.5), (0, 401, 0.5), (0, 400, 0.25)]
    prompts = [prompt(seed, *place) for seed in (0, 1) for place in places]
    assert prompts == [prompt(seed, *place) for seed in (0, 1) for place in places]
    assert len(set(prompts)) == len(prompts)


def test_any_tokenizer_makes_the_length_exact(bpe_file):
    tokenizer = load_tokenizer(str(bpe_file))
    passkey = Passkey(Text(tokens_in_memory(["the quick brown fox jumps. "] * 30, tokenizer)), seed=0)
    for index in range(5):
        example = passkey.example(index, 400, 0.7)
        assert example.length == 400
        assert f"The pass key is {example.expected}. " in tokenizer.decode(example.prompt)
        assert tokenizer.decode(example.answer) == example.expected


def test_needles_of_training_are_anywhere(text):
    passkey = Passkey(text, seed=0)
    depths = []
    for index in range(200):
        example = passkey.training_example(index, 400)
        assert example.length == 400
        depths.append((_as_text(example).index("The pass key is ") - 96) / (400 - 170))
    assert min(depths) < 0.05
    assert max(depths) > 0.95
    assert abs(sum(depths) / 200 - 0.5) < 0.1


@pytest.mark.parametrize(
    ("answer", "is_right"),
    [
        ("12345", True),
        (" 12345.", True),
        ("12345 is the", True),
        ("123456", False),
        ("1234", False),
        ("54321 12345", False),
        ("", False),
        ("none", False),
    ],
)
def test_the_first_number_is_the_answer(answer, is_right):
    assert Passkey.is_right(answer, "12345") is is_right


def test_a_constant_answer_is_never_right(text):
    passkey = Passkey(text, seed=0)
    keys = [passkey.example(index, 200, 0.5).expected for index in range(100)]
    assert sum(Passkey.is_right(keys[0], key) for key in keys) == 1


def test_a_length_below_the_needle_s_is_refused(text):
    with pytest.raises(UserError, match=r"passkey of 169 tokens is too short.*takes 170"):
        cells(Passkey(text, 0), lengths=[1000, 169], depths=[0.5], tries=1)


def test_a_text_without_words_is_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match="is empty"):
        Text.of_file(tmp_path / "empty.txt", ByteTokenizer())
    with pytest.raises(UserError, match="cannot read the text"):
        Text.of_file(tmp_path / "missing.txt", ByteTokenizer())
