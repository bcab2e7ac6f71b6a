"""The golden document is the one that answers, wherever it stands; those who guess its place find 1 in N."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from tests.train.tasks.conftest import sentences
from train.data.tokenizer import ByteTokenizer
from train.data.tokens import tokens_in_memory
from train.errors import UserError
from train.tasks.document_retrieval import DocumentRetrieval, PassagesOfFile, PassagesOfText, cells
from train.tasks.text import Text


@pytest.fixture
def task(text) -> DocumentRetrieval:
    return DocumentRetrieval(PassagesOfText(text), seed=0)


def _documents(example) -> tuple[str, list[tuple[str, str]]]:
    """The query, and number and text of each document, read from the prompt."""
    prompt = bytes(example.prompt[1:].astype("u1")).decode()
    body, end = prompt[: -len(" <|Answer|> <|Document ")], prompt[-len(" <|Answer|> <|Document ") :]
    assert end == " <|Answer|> <|Document "
    parts = re.split(r" <\|Query\|> (.*?) <\|Document (\d+)\|> ", body, flags=re.DOTALL)
    assert parts[0] == ""
    assert len(set(parts[1::3])) == 1  # the same query before each document
    return parts[1], list(zip(parts[2::3], parts[3::3], strict=True))


def test_the_golden_document_holds_the_query(task):
    for index in range(50):
        example = task.example(index, 6)
        query, documents = _documents(example)
        assert len({number for number, _ in documents}) == 6
        assert query in dict(documents)[example.expected]
        assert bytes(example.answer.astype("u1")).decode() == f"{example.expected}|>"


def test_one_document_alone_holds_the_query_where_most_of_the_text_repeats():
    indents = " " * 100 + "\n" + "\t" * 100
    text = Text(tokens_in_memory([*sentences(0, 30) * 3, indents, *sentences(1, 30)], ByteTokenizer()))
    task = DocumentRetrieval(PassagesOfText(text), seed=0)
    examples = [task.example(index, 20) for index in range(60)]
    examples += [task.training_example(index, 2048) for index in range(60)]
    for example in examples:
        query, documents = _documents(example)
        assert [number for number, document in documents if query in document] == [example.expected]
        assert sum(not character.isspace() for character in query) >= 8


@pytest.mark.parametrize("text", ["again and again. ", " \n\t" * 400])
def test_a_text_without_a_query_of_one_document_says_what_to_do(text):
    task = DocumentRetrieval(PassagesOfText(Text(tokens_in_memory([text * 30], ByteTokenizer()))), seed=0)
    with pytest.raises(UserError, match=r"stands in several of 2 documents.* Take a larger one, or fewer documents"):
        task.example(0, 2)


def test_the_golden_document_stands_at_every_place_alike(task):
    counts = np.zeros(5)
    for index in range(400):
        example = task.example(index, 5)
        numbers = [number for number, _ in _documents(example)[1]]
        counts[numbers.index(example.expected)] += 1
    # Of 400 at random 80 are at each place, give or take 8: the last place is no better guess than another.
    assert np.all(np.abs(counts - 80) < 32)


def test_a_guess_of_the_last_document_is_right_as_often_as_any_guess(task):
    examples = [task.example(index, 8) for index in range(300)]
    right = [task.is_right(f"{_documents(example)[1][-1][0]}|>", example.expected) for example in examples]
    assert 0.05 < np.mean(right) < 0.21


def test_an_example_depends_on_seed_index_and_count_alone(task, text):
    other = DocumentRetrieval(PassagesOfText(text), seed=1)
    prompts = [maker.example(i, n).prompt.tobytes() for maker in (task, other) for i in (0, 1) for n in (3, 4)]
    assert prompts == [maker.example(i, n).prompt.tobytes() for maker in (task, other) for i in (0, 1) for n in (3, 4)]
    assert len(set(prompts)) == len(prompts)


def test_training_examples_fill_the_length_with_documents(task):
    for index in range(20):
        example = task.training_example(index, 1000)
        assert example.length <= 1000
        assert example.length + 250 > 1000
        assert len(_documents(example)[1]) >= 3


def test_questions_of_a_file_are_asked_of_other_contexts(tmp_path):
    rows = [{"question": f"what is {i}?{j}", "context": f"the number {i} is here."} for i in range(6) for j in range(2)]
    (tmp_path / "squad.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = DocumentRetrieval(PassagesOfFile(tmp_path / "squad.jsonl", ByteTokenizer()), seed=0)
    for index in range(30):
        example = task.example(index, 6)
        query, documents = _documents(example)
        assert len({text for _, text in documents}) == 6  # two questions of one context never meet
        number = re.fullmatch(r"what is (\d)\?\d", query).group(1)
        assert dict(documents)[example.expected] == f"the number {number} is here."
    with pytest.raises(UserError, match="6 different documents"):
        task.example(0, 7)


@pytest.mark.parametrize("content", ["[1]", "{}", "no json", '{"question": "a"}'])
def test_files_without_documents_are_named(tmp_path, content):
    (tmp_path / "documents.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"documents\.jsonl has no documents"):
        PassagesOfFile(tmp_path / "documents.jsonl", ByteTokenizer())
    with pytest.raises(UserError, match="cannot read the documents"):
        PassagesOfFile(tmp_path / "missing.jsonl", ByteTokenizer())


def test_counts_and_lengths_without_examples_are_refused(task):
    with pytest.raises(UserError, match="1001 documents"):
        cells(task, documents=[1001], tries=1)
    with pytest.raises(UserError, match="of 100 tokens is too short"):
        task.training_example(0, 100)
