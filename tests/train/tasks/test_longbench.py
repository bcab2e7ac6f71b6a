"""LongBench's files are read, asked and scored as upstream does; what is not theirs is named."""

from __future__ import annotations

import json

import pytest

from train.data.tokenizer import ByteTokenizer
from train.errors import UserError
from train.tasks.longbench import DATASETS, cells, read_questions, score

TOKENIZER = ByteTokenizer()
ROW = {"context": "It was built in 1889.", "input": "When was it built?", "answers": ["1889", "in 1889"], "length": 5}


def _write(folder, name, rows):
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")


def _read(folder, name, **settings):
    return read_questions(folder, name, TOKENIZER, **{"most_tokens": None, "count": None, **settings})


@pytest.mark.parametrize(
    ("name", "begins", "ends", "new_tokens"),
    [
        (
            "hotpotqa",
            "Answer the question based on the given passages. Only give me the answer and do not output any other "
            "words.\n\nThe following are given passages.\nIt was built in 1889.\n\nAnswer the question based on",
            "output any other words.\n\nQuestion: When was it built?\nAnswer:",
            32,
        ),
        (
            "qasper",
            "You are given a scientific article and a question. Answer the question as concisely as you can, using a "
            "single phrase or sentence if possible. If the question cannot be answered based on the information in the "
            'article, write "unanswerable". If the question is a yes/no question, answer "yes", "no", or '
            '"unanswerable". Do not provide any explanation.\n\nArticle: It was built in 1889.\n\n Answer the question '
            "based on the above article as concisely as you can",
            "Do not provide any explanation.\n\nQuestion: When was it built?\n\nAnswer:",
            128,
        ),
        (
            "samsum",
            "Summarize the dialogue into a few short sentences. The following are some examples.\n\nIt was built",
            "in 1889.\n\nWhen was it built?",
            128,
        ),
        (
            "vcsum",
            "下面有一段会议记录，请你阅读后，写一段总结，总结会议的内容。\n会议记录：\nIt",
            "1889.\n\n会议总结：",
            512,
        ),
    ],
)
def test_prompts_and_lengths_are_upstream_s(tmp_path, name, begins, ends, new_tokens):
    _write(tmp_path, name, [ROW])
    (question,) = _read(tmp_path, name)
    prompt = bytes(question.example.prompt[1:].astype("u1")).decode()
    assert prompt.startswith(begins)
    assert prompt.endswith(ends)
    assert DATASETS[name].max_new_tokens == new_tokens
    assert question.answers == ["1889", "in 1889"]


def test_the_best_answer_counts_in_percent():
    assert score("in 1889!", ["1899", "in 1889"], DATASETS["hotpotqa"]) == 100.0
    assert score("1889 or so", ["1889", "x"], DATASETS["qasper"]) == pytest.approx(100 * 2 * (1 / 3) / (4 / 3))


def test_a_summary_of_samsum_ends_with_its_line_and_no_other():
    said = "\n\nTom calls Ann\nDialogue: and more and more"
    assert score(said, ["Tom calls Ann"], DATASETS["samsum"]) == pytest.approx(100.0, abs=1e-5)
    assert score(said, ["Tom calls Ann"], DATASETS["hotpotqa"]) < 60


def test_long_prompts_are_cut_in_their_middle(tmp_path):
    _write(tmp_path, "samsum", [ROW | {"context": "x" * 500}])
    whole, cut = _read(tmp_path, "samsum"), _read(tmp_path, "samsum", most_tokens=100)
    whole, cut = whole[0].example.prompt[1:], cut[0].example.prompt[1:]
    assert cut.tolist() == [*whole[:50].tolist(), *whole[-50:].tolist()]


def test_cells_hold_every_question_once_shortest_first(tmp_path):
    _write(tmp_path, "qasper", [ROW | {"context": "y" * length} for length in (900, 3, 400, *range(20, 37))])
    made = cells(_read(tmp_path, "qasper"), "qasper", TOKENIZER)
    assert sorted(i for cell in made for i in cell.key["questions"]) == list(range(20))
    assert made[0].key["questions"][0] == 1
    assert made[-1].key["questions"][-2:] == [2, 0]
    assert [cell.length for cell in made] == sorted(cell.length for cell in made)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no questions"),
        (["{"], "not in LongBench's form"),
        (["[]"], "not in LongBench's form"),
        ([{"context": "a", "input": "b"}], "not in LongBench's form"),
        ([ROW | {"answers": []}], "without answers"),
    ],
)
def test_other_files_are_named(tmp_path, rows, message):
    _write(tmp_path, "qasper", rows)
    with pytest.raises(UserError, match=message):
        _read(tmp_path, "qasper")


def test_a_missing_file_says_where_to_put_it(tmp_path):
    with pytest.raises(UserError, match=r"vcsum\.jsonl: No such file.*Put LongBench's vcsum\.jsonl there"):
        _read(tmp_path, "vcsum")
