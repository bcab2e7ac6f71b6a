"""``mamba-jax prepare``: text files to a corpus of memory-mapped token streams.

One process reads blocks in order, workers turn them into ids, and the first process writes what they return, again in
order: the result depends on the input alone, and memory on neither its size nor that of its files.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt

from train.data.atomic import new_folder
from train.data.documents import Block, find_files, read_blocks
from train.data.progress import show_progress, text_of_bytes
from train.data.storage import CorpusWriter, Counts
from train.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_description
from train.data.tokens import Split, join_documents
from train.errors import UsageError, UserError

_BYTES_PER_WORKER = 1 << 23
_HASHED_CHARACTERS = 1 << 16


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What ``prepare`` made."""

    counts: dict[Split, Counts]
    """Of each split; without the separator that closes a stream."""
    files: int
    """Files that were read."""
    empty_documents: int
    """Documents without text, which were left out."""


def prepare(
    inputs: Sequence[str | Path],
    out: str | Path,
    *,
    tokenizer: Tokenizer,
    held_out: float = 0.01,
    text_field: str = "text",
    workers: int | None = None,
) -> Prepared:
    """Makes the corpus folder ``out``, which a run then names as its ``Data.source``.

    Documents are text files, lines of JSON-lines files and rows of Parquet files, in the order of the inputs. Each is
    held out or not by a hash of its beginning, so equal documents are on the same side. Where that holds nothing out,
    as with one long text, the end of the corpus is held out instead.

    Args:
        inputs: files (.txt, .jsonl, both also .gz or .zst, .parquet) and folders of them.
        out: folder to make; it appears when it is complete.
        tokenizer: text to ids.
        held_out: share of the documents to keep from training, above 0, at most 0.5.
        text_field: field of JSON lines, or column of Parquet, that holds the text.
        workers: processes that tokenize; None for as many as there are processors.

    Raises:
        UserError: an input is missing, unreadable, binary or without any text; ``out`` exists or cannot be written.
    """
    if not 0 < held_out <= 0.5:
        raise UsageError(f"--held_out {held_out}: give a share above 0 and at most 0.5.")
    if workers is not None and workers < 1:
        raise UsageError(f"--workers {workers}: give at least 1.")
    files = find_files(inputs)
    input_bytes = sum(path.stat().st_size for path in files)
    workers = min(workers or os.cpu_count() or 1, -(-input_bytes // _BYTES_PER_WORKER) or 1)
    blocks = (block for path in files for block in read_blocks(path, text_field))
    empty = 0
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(new_folder(Path(out)))
        writer = stack.enter_context(CorpusWriter(folder, tokenizer))
        advance = stack.enter_context(show_progress("Preparing", input_bytes))
        split: Split = "train"
        results = _tokenize_in_order(blocks, tokenizer, held_out, workers)
        for result in stack.enter_context(contextlib.closing(results)):
            for part in result.parts:
                if part.split is not None:
                    # The first text is for training, whatever its hash: with few documents there might be none.
                    split = part.split if writer.counts["train"].documents else "train"
                writer.append(split, part.ids, documents=part.documents, text_bytes=part.text_bytes)
            empty += result.empty_documents
            advance(result.file_bytes)
        if not writer.counts["train"].documents:
            raise UserError(f"there is no text in {', '.join(map(str, inputs))}: every document is empty.")
        if not writer.counts["held_out"].documents:
            writer.hold_out_tail(held_out)
        prepared = Prepared(dict(writer.counts), len(files), empty)
        writer.finish()
    return prepared


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``mamba-jax prepare``."""
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help=".txt, .jsonl (also .gz or .zst), .parquet, or a folder of them"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make; name it as Data.source afterwards")
    parser.add_argument(
        "--tokenizer",
        default="bytes",
        metavar="bytes|FILE.json",
        help="bytes (default), or a Hugging Face tokenizer.json",
    )
    parser.add_argument(
        "--held_out",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="share of the documents kept for evaluation (0.01)",
    )
    parser.add_argument(
        "--text_field", default="text", metavar="NAME", help="field of .jsonl, column of .parquet, with the text (text)"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes that tokenize (all processors)")


def run(args: argparse.Namespace) -> None:
    """Runs ``mamba-jax prepare`` and prints what it made. Raises UserError as ``prepare`` does."""
    tokenizer = load_tokenizer(args.tokenizer)
    prepared = prepare(
        args.inputs,
        args.out,
        tokenizer=tokenizer,
        held_out=args.held_out,
        text_field=args.text_field,
        workers=args.workers,
    )
    print(f"{args.out} (input files: {prepared.files:,})")
    print(f"  {'':10}{'documents':>14}{'text':>12}{'tokens':>20}{'bytes/token':>14}")
    for split, counts in prepared.counts.items():
        text, ratio = text_of_bytes(counts.text_bytes), counts.text_bytes / counts.tokens
        print(f"  {split:10}{counts.documents:>14,}{text:>12}{counts.tokens:>20,}{ratio:>14.2f}")
    if prepared.empty_documents:
        print(f"  left out, without text: {prepared.empty_documents:,}")
    print(f'Train on it with:\n  Data.source = "{args.out}"\n  LanguageModel.vocab_size = {tokenizer.vocab_size}')


@dataclasses.dataclass(frozen=True)
class _Part:
    """Ids that go to one split."""

    split: Split | None
    """None where the text goes on with the document before."""
    ids: UInt[np.ndarray, " length"]
    documents: int
    text_bytes: int


@dataclasses.dataclass(frozen=True)
class _Tokenized:
    parts: list[_Part]
    empty_documents: int
    file_bytes: int


def _tokenize(block: Block, tokenizer: Tokenizer, held_out: float) -> _Tokenized:
    documents = block.documents()
    texts = [text for text in documents if text]
    if block.continues:
        ids = join_documents([tokenizer.encode(text) for text in texts], tokenizer)[1:]
        return _Tokenized([_Part(None, ids, 0, _text_bytes(texts))], 0, block.file_bytes)
    sides: dict[Split, list[str]] = {"train": [], "held_out": []}
    for text in texts:
        sides["held_out" if _hash_share(text) < held_out else "train"].append(text)
    parts = [
        _Part(split, join_documents([tokenizer.encode(text) for text in side], tokenizer), len(side), _text_bytes(side))
        for split, side in sides.items()
        if side
    ]
    return _Tokenized(parts, len(documents) - len(texts), block.file_bytes)


def _tokenize_in_order(
    blocks: Iterator[Block], tokenizer: Tokenizer, held_out: float, workers: int
) -> Generator[_Tokenized, None, None]:
    """Results in the order of the blocks, with no more than two blocks a worker under way."""
    if workers == 1:
        yield from (_tokenize(block, tokenizer, held_out) for block in blocks)
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _start_worker, (tokenizer.describe(), held_out)
    )
    pending: collections.deque[concurrent.futures.Future[_Tokenized]] = collections.deque()
    try:
        for block in blocks:
            pending.append(pool.submit(_tokenize_in_worker, block))
            if len(pending) >= 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise UserError("a worker was killed, perhaps for want of memory; use fewer --workers.") from None
    finally:
        pool.shutdown(cancel_futures=True)


_worker: dict[str, Any] = {}
"""What a worker process was started with."""


def _start_worker(description: dict[str, Any], held_out: float) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker.update(tokenizer=tokenizer_from_description(description), held_out=held_out)


def _end_with_parent() -> None:
    """Ends a worker whose parent was killed; it would wait for its next block for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _tokenize_in_worker(block: Block) -> _Tokenized:
    return _tokenize(block, **_worker)


def _hash_share(text: str) -> float:
    """A number in [0, 1) that the beginning of the text decides."""
    digest = hashlib.blake2b(text[:_HASHED_CHARACTERS].encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _text_bytes(texts: Sequence[str]) -> int:
    return sum(len(text.encode("utf-8")) for text in texts)
