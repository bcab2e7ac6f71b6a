"""The built-in corpus is the library's source, split by name, the same every time."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from train.data.stdlib import stdlib_corpus
from train.data.tokens import Corpus
from train.errors import UserError


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return stdlib_corpus()


def _texts(corpus: Corpus) -> tuple[list[str], list[str]]:
    train, held_out = (
        [corpus.tokenizer.decode(ids) for ids in split.iter_documents()] for split in (corpus.train, corpus.held_out)
    )
    return train, held_out


def test_it_holds_the_running_python_s_source(corpus: Corpus):
    train, held_out = _texts(corpus)
    library = Path(sysconfig.get_paths()["stdlib"])
    for name in ("argparse.py", "json/decoder.py", "urllib/request.py"):
        assert (library / name).read_text(encoding="utf-8") in train + held_out
    assert corpus.train.text_bytes > 5_000_000


def test_a_few_percent_are_held_out_and_in_neither_split_twice(corpus: Corpus):
    train, held_out = _texts(corpus)
    assert 0.02 < len(held_out) / (len(train) + len(held_out)) < 0.1
    assert corpus.held_out.documents == len(held_out) > 5


def test_tests_and_installed_packages_are_left_out(corpus: Corpus):
    library = Path(sysconfig.get_paths()["stdlib"])
    train, held_out = _texts(corpus)
    left_out = [path for name in ("test", "site-packages") for path in (library / name).glob("*/*.py")]
    texts = {path.read_text(encoding="utf-8") for path in left_out if path.stat().st_size > 2000}
    assert texts.isdisjoint(train + held_out)


def test_it_is_the_same_every_time(corpus: Corpus):
    again = stdlib_corpus()
    assert again.train.fingerprint == corpus.train.fingerprint
    assert again.held_out.fingerprint == corpus.held_out.fingerprint


def _library(folder: Path, count: int, text: str = "x = {}\n") -> Path:
    for number in range(count):
        path = folder / f"package{number % 3}" / f"module{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.format(number), encoding="utf-8")
    return folder


def test_the_side_of_a_file_depends_on_its_name_alone(tmp_path: Path):
    old, new = _library(tmp_path / "old", 200), _library(tmp_path / "new", 300, "y = {}\n")
    _, held_out_old = _texts(stdlib_corpus(old))
    train_new, held_out_new = _texts(stdlib_corpus(new))
    renamed = {text.replace("x", "y") for text in held_out_old}
    assert renamed <= set(held_out_new)
    assert renamed.isdisjoint(train_new)


def test_files_that_are_not_utf8_and_tests_are_passed_over(tmp_path: Path):
    library = _library(tmp_path, 200)
    documents = stdlib_corpus(library).train.documents + stdlib_corpus(library).held_out.documents
    (library / "latin.py").write_bytes(b"# caf\xe9\n")
    (library / "tests").mkdir()
    (library / "tests" / "module.py").write_text("z = 1\n")
    after = stdlib_corpus(library)
    assert documents == after.train.documents + after.held_out.documents == 200


def test_a_machine_without_the_source_is_told_the_way_out(tmp_path: Path):
    with pytest.raises(UserError, match=r"0 source files .* 'mamba-jax prepare'"):
        stdlib_corpus(tmp_path)
