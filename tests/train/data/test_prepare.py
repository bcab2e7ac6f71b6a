"""A prepared corpus holds the input's documents, whatever the number of workers, and never half of them."""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

from train.data import documents, prepare
from train.data.storage import read_corpus
from train.data.tokenizer import ByteTokenizer, load_tokenizer
from train.data.tokens import Corpus, Tokens
from train.errors import UsageError, UserError

_REPOSITORY = Path(__file__).parents[3]


def _texts(tokens: Tokens) -> list[str]:
    return [tokens.tokenizer.decode(ids) for ids in tokens.iter_documents()]


def _all_texts(corpus: Corpus) -> list[str]:
    return sorted(_texts(corpus.train) + _texts(corpus.held_out))


def _random_texts(count: int, longest: int = 300) -> list[str]:
    return ["".join(random.choices("abcdefé 😀\n", k=random.randint(1, longest))) for _ in range(count)]


def _write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_document_of_every_format_is_in_one_split(tmp_path: Path):
    texts = _random_texts(60)
    folder = tmp_path / "in"
    folder.mkdir()
    for number, text in enumerate(texts[:10]):
        (folder / f"{number}.txt").write_bytes(text.encode())
    lines = _write_jsonl(folder / "a.jsonl", texts[10:20]).read_bytes()
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(_write_jsonl(folder / "a.jsonl", texts[20:30]).read_bytes()))
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "c.txt.zst").write_bytes(zstandard.compress(texts[30].encode()))
    pyarrow.parquet.write_table(pa.table({"text": texts[31:]}), folder / "d.parquet")
    made = prepare.prepare([folder], tmp_path / "out", tokenizer=ByteTokenizer(), held_out=0.3)
    corpus = read_corpus(tmp_path / "out")
    assert _all_texts(corpus) == sorted(texts)
    assert 0 < corpus.held_out.documents < 45
    assert made.files == 14
    assert (made.counts["train"].documents, made.counts["held_out"].documents) == (
        corpus.train.documents,
        corpus.held_out.documents,
    )
    assert corpus.train.text_bytes == len("".join(_texts(corpus.train)).encode())


def test_documents_keep_the_order_of_the_input(tmp_path: Path):
    texts = [f"document {number}" for number in range(500)]
    prepare.prepare([_write_jsonl(tmp_path / "a.jsonl", texts)], tmp_path / "out", tokenizer=ByteTokenizer())
    train = _texts(read_corpus(tmp_path / "out").train)
    assert train == [text for text in texts if text in set(train)]


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_the_result_does_not_depend_on_the_number_of_workers(
    tmp_path: Path, kind: str, bpe_file: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(prepare, "_BYTES_PER_WORKER", 1000)
    monkeypatch.setattr(documents, "_BLOCK_BYTES", 1000)
    tokenizer = ByteTokenizer() if kind == "bytes" else load_tokenizer(str(bpe_file))
    (tmp_path / "in").mkdir()
    _write_jsonl(tmp_path / "in" / "a.jsonl", _random_texts(200))
    (tmp_path / "in" / "b.txt").write_text("\n".join(_random_texts(200)), encoding="utf-8")
    for workers in (1, 3):
        prepare.prepare([tmp_path / "in"], tmp_path / str(workers), tokenizer=tokenizer, held_out=0.2, workers=workers)
    assert _contents(tmp_path / "1") == _contents(tmp_path / "3")


def test_a_long_text_file_stays_one_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(documents, "_BLOCK_BYTES", 100)
    texts = [f"{number}\n" + "".join(_random_texts(20)) for number in range(40)]
    for number, text in enumerate(texts):
        (tmp_path / f"{number:02}.txt").write_bytes(text.encode())
    prepare.prepare([tmp_path], tmp_path / "out", tokenizer=ByteTokenizer(), held_out=0.5)
    corpus = read_corpus(tmp_path / "out")
    assert _all_texts(corpus) == sorted(texts)
    assert corpus.held_out.documents > 1


def test_equal_documents_are_on_the_same_side(tmp_path: Path):
    texts = _random_texts(100)
    prepare.prepare(
        [_write_jsonl(tmp_path / "a.jsonl", texts), _write_jsonl(tmp_path / "b.jsonl", texts[::-1])],
        tmp_path / "out",
        tokenizer=ByteTokenizer(),
        held_out=0.3,
    )
    corpus = read_corpus(tmp_path / "out")
    assert set(_texts(corpus.train)).isdisjoint(_texts(corpus.held_out))


@pytest.mark.parametrize("held_out", [0.01, 0.5])
def test_one_long_text_has_its_end_held_out(tmp_path: Path, held_out: float):
    for number in range(20):  # on both sides of the hash
        text = "".join(_random_texts(100))
        (tmp_path / "a.txt").write_bytes(text.encode())
        out = tmp_path / f"out{number}"
        prepare.prepare([tmp_path / "a.txt"], out, tokenizer=ByteTokenizer(), held_out=held_out)
        corpus = read_corpus(out)
        assert _texts(corpus.train)[0] + _texts(corpus.held_out)[0] == text
        assert corpus.held_out.text_bytes == pytest.approx(held_out * len(text.encode()), rel=0.1)


def test_empty_documents_are_left_out_and_counted(tmp_path: Path):
    texts = ["", *_random_texts(30), ""]
    (tmp_path / "empty.txt").write_text("")
    made = prepare.prepare(
        [_write_jsonl(tmp_path / "a.jsonl", texts), tmp_path / "empty.txt"],
        tmp_path / "out",
        tokenizer=ByteTokenizer(),
        held_out=0.5,
    )
    assert made.empty_documents == 2
    assert _all_texts(read_corpus(tmp_path / "out")) == sorted(texts[1:-1])


def test_input_without_text_is_an_error_and_leaves_nothing(tmp_path: Path):
    (tmp_path / "a.txt").write_text("")
    _write_jsonl(tmp_path / "b.jsonl", ["", ""])
    with pytest.raises(UserError, match=r"there is no text in .*a\.txt, .*b\.jsonl"):
        prepare.prepare([tmp_path / "a.txt", tmp_path / "b.jsonl"], tmp_path / "out", tokenizer=ByteTokenizer())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.jsonl"]


@pytest.mark.parametrize("workers", [1, 2])
def test_binary_input_is_named_and_leaves_nothing(tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prepare, "_BYTES_PER_WORKER", 10)
    (tmp_path / "a.txt").write_text("text " * 100)
    (tmp_path / "b.txt").write_bytes(b"\x7fELF\0\0")
    with pytest.raises(UserError, match=r"b\.txt is not text: it has a zero byte at offset 4"):
        prepare.prepare([tmp_path], tmp_path / "out", tokenizer=ByteTokenizer(), workers=workers)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.txt"]


def test_settings_that_cannot_be_used_are_usage_errors(tmp_path: Path):
    (tmp_path / "a.txt").write_text("text " * 100)
    for settings, message in [
        ({"held_out": 0.0}, "--held_out 0.0: give a share above 0"),
        ({"held_out": 0.9}, "--held_out 0.9"),
        ({"workers": 0}, "--workers 0: give at least 1"),
    ]:
        with pytest.raises(UsageError, match=message):
            prepare.prepare([tmp_path / "a.txt"], tmp_path / "out", tokenizer=ByteTokenizer(), **settings)
    assert not (tmp_path / "out").exists()


_PROGRAM = """
import sys, time
from train.data import documents, prepare
from train.data.storage import CorpusWriter
from train.data.tokenizer import ByteTokenizer

def append_once_and_wait(self, *args, **kwargs):
    append(self, *args, **kwargs)
    self._files["train"].flush()
    print("written", flush=True)
    time.sleep(600)

append, CorpusWriter.append = CorpusWriter.append, append_once_and_wait
documents._BLOCK_BYTES = prepare._BYTES_PER_WORKER = 1000
prepare.prepare([sys.argv[1]], sys.argv[2], tokenizer=ByteTokenizer(), workers=2)
"""


def test_a_killed_run_leaves_nothing_that_is_read_and_the_next_run_succeeds(tmp_path: Path):
    source = _write_jsonl(tmp_path / "a.jsonl", _random_texts(100))
    command = [sys.executable, "-c", _PROGRAM, str(source), str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=_REPOSITORY) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        with pytest.raises(UserError, match="another process is making it"):
            prepare.prepare([source], tmp_path / "out", tokenizer=ByteTokenizer())
        process.send_signal(signal.SIGKILL)
    assert len(workers) >= 2
    with pytest.raises(UserError, match="does not exist"):
        read_corpus(tmp_path / "out")
    prepare.prepare([source], tmp_path / "out", tokenizer=ByteTokenizer())
    prepare.prepare([source], tmp_path / "again", tokenizer=ByteTokenizer())
    assert _contents(tmp_path / "out") == _contents(tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "again", "out"]
    _wait_until_gone([int(worker) for worker in workers])


def _wait_until_gone(processes: list[int]) -> None:
    """Fails when a worker outlives its killed parent."""
    for process in processes:
        deadline = time.monotonic() + 20
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            while Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
                assert time.monotonic() < deadline, f"process {process} is still there"
                time.sleep(0.05)


def test_the_command_prints_what_it_made_and_how_to_use_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = _write_jsonl(tmp_path / "a.jsonl", _random_texts(300))
    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    out = tmp_path / "out"
    prepare.run(parser.parse_args([str(source), "--out", str(out), "--held_out", "0.2", "--workers", "1"]))
    corpus = read_corpus(out)
    printed = capsys.readouterr().out
    assert f"{corpus.train.documents}" in printed
    assert f"{corpus.held_out.documents}" in printed
    assert f'Data.source = "{out}"' in printed
    assert "LanguageModel.vocab_size = 256" in printed


def test_the_command_takes_a_tokenizer_file_and_a_text_field(tmp_path: Path, bpe_file: Path):
    texts = ["the quick brown fox jumps over the lazy dog"] * 50
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    arguments = [str(source), "--out", str(tmp_path / "out"), "--tokenizer", str(bpe_file), "--text_field", "body"]
    prepare.run(parser.parse_args(arguments))
    corpus = read_corpus(tmp_path / "out")
    assert corpus.tokenizer.vocab_size == 300
    assert corpus.train.targets < corpus.train.text_bytes
    assert _texts(corpus.train)[0] == texts[0]
