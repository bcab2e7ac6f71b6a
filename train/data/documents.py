"""Reads text files into documents, a few megabytes at a time.

Reading is split in two so that it can run in parallel: ``read_blocks`` cuts a file into blocks, cheaply and in order;
``Block.documents`` parses one, in whichever process. Blocks depend on the file alone.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from train.errors import UsageError, UserError

_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_ACCEPTED = "accepted are .txt and .jsonl (also .gz or .zst), .parquet, and folders of them"
_BYTE_ORDER_MARK = "\ufeff"
_BLOCK_BYTES = 1 << 22
_LONGEST_LINE = 1 << 28


@dataclasses.dataclass(frozen=True)
class Block(abc.ABC):
    """Part of one file."""

    path: Path
    file_bytes: int
    """Bytes of the file on disk that this block took, for progress."""

    @property
    def continues(self) -> bool:
        """Whether the block's only document goes on with the last one of the block before."""
        return False

    @abc.abstractmethod
    def documents(self) -> list[str]:
        """Texts of the block, in order; "" stands for a document without text. Raises UserError for what is no text."""


@dataclasses.dataclass(frozen=True)
class TextBlock(Block):
    """Part of a text file, which is one document however long it is."""

    data: bytes
    offset: int
    """Where the data begins in the (decompressed) file, in bytes."""

    @property
    def continues(self) -> bool:
        return self.offset > 0

    def documents(self) -> list[str]:
        if (position := self.data.find(b"\0")) >= 0:
            raise UserError(f"{self.path} is not text: it has a zero byte at offset {self.offset + position:,}.")
        try:
            text = self.data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.path} is not UTF-8 text: byte 0x{self.data[error.start]:02X} at offset "
                f"{self.offset + error.start:,}. Convert it (for example 'iconv -f latin1 -t utf-8'), or leave it out."
            ) from None
        return [text if self.continues else text.removeprefix(_BYTE_ORDER_MARK)]


@dataclasses.dataclass(frozen=True)
class LinesBlock(Block):
    """Whole lines of a JSON-lines file, each a document."""

    data: bytes
    first_line: int
    """Number of the first line, from 1."""
    text_field: str

    def documents(self) -> list[str]:
        data = self.data if self.first_line > 1 else self.data.removeprefix(_BYTE_ORDER_MARK.encode())
        lines = enumerate(data.split(b"\n"), self.first_line)
        return [self._parse(line, f"{self.path}, line {number}") for number, line in lines if line.strip()]

    def _parse(self, line: bytes, place: str) -> str:
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{place} is not JSON: {error}. A .jsonl file has one JSON object a line.") from None
        if not isinstance(record, dict):
            raise UserError(f"{place} is not a JSON object but {str(record)[:40]!r}.")
        if self.text_field not in record:
            fields = ", ".join(map(repr, record)) or "none"
            raise UserError(f"{place} has no field {self.text_field!r}; its fields: {fields}. Set --text_field.")
        text = record[self.text_field]
        if not isinstance(text, str | None):
            raise UserError(f"{place}: field {self.text_field!r} is no text but {text!r:.40}. Set --text_field.")
        return _replace_surrogates(text or "")


@dataclasses.dataclass(frozen=True)
class RowsBlock(Block):
    """Rows of a Parquet file, each a document."""

    texts: Sequence[str | None]

    def documents(self) -> list[str]:
        return [text or "" for text in self.texts]


def find_files(inputs: Sequence[str | Path]) -> list[Path]:
    """The files that inputs stand for: themselves, or all readable ones below a folder, sorted, none twice.

    Raises:
        UsageError: an input does not exist, has a suffix no reader is for, or is a folder without a readable file.
    """
    files: dict[Path, Path] = {}
    for item in map(Path, inputs):
        if item.is_dir():
            found = [path for path in sorted(item.rglob("*")) if _is_readable(path, item)]
            if not found:
                raise UsageError(f"{item} holds no file to read; {_ACCEPTED}.")
        elif not item.exists():
            raise UsageError(f"{item} does not exist.")
        elif _kind(item) is None:
            raise UsageError(f"{item} has a suffix that says nothing about its format; {_ACCEPTED}.")
        else:
            found = [item]
        files |= {path.resolve(): path for path in found}
    return list(files.values())


def read_blocks(path: Path, text_field: str) -> Iterator[Block]:
    """Cuts a file into blocks of about 4 MiB.

    Args:
        path: a file of ``find_files``.
        text_field: field of JSON lines, or column of Parquet, that holds the text.

    Raises:
        UserError: the file cannot be read, is truncated, or is not what its suffix says.
    """
    try:
        match _kind(path):
            case ".txt":
                for data, offset, file_bytes in _cut_stream(path, _end_of_text):
                    yield TextBlock(path, file_bytes, data, offset)
            case ".jsonl":
                first_line = 1
                for data, _, file_bytes in _cut_stream(path, _end_of_lines):
                    yield LinesBlock(path, file_bytes, data, first_line, text_field)
                    first_line += data.count(b"\n")
            case _:
                yield from _read_parquet(path, text_field)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def _kind(path: Path) -> str | None:
    """The format a file's name claims: '.txt', '.jsonl', '.parquet', or None."""
    plain = Path(path.stem) if path.suffix in _COMPRESSIONS else path
    if plain.suffix in (".txt", ".jsonl"):
        return plain.suffix
    return ".parquet" if path.suffix == ".parquet" else None


def _is_readable(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return not hidden and path.is_file() and _kind(path) is not None


def _cut_stream(path: Path, find_end: Callable[[bytes], int]) -> Iterator[tuple[bytes, int, int]]:
    """Yields (data, its offset in the decompressed file, bytes of the file it took), cut where ``find_end`` says."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(pa.OSFile(str(path), "rb"))
        stream = file
        if compression := _COMPRESSIONS.get(path.suffix):
            stream = stack.enter_context(pa.CompressedInputStream(file, compression))
        rest, offset, file_position = b"", 0, 0
        while chunk := stream.read(_BLOCK_BYTES):
            data = rest + chunk
            end = find_end(data)
            rest = data[end:]
            if len(rest) > _LONGEST_LINE:
                raise UserError(f"{path} has a line of more than {_LONGEST_LINE:,} bytes: is it JSON lines?")
            if end:
                yield data[:end], offset, file.tell() - file_position
                offset, file_position = offset + end, file.tell()
        if rest:
            yield rest, offset, file.tell() - file_position


def _end_of_lines(data: bytes) -> int:
    return data.rfind(b"\n") + 1


def _end_of_text(data: bytes) -> int:
    """After the last line, or where there is none before the last character, which may be incomplete."""
    if end := _end_of_lines(data):
        return end
    first_bytes = (i for i in range(len(data) - 1, max(len(data) - 5, 0), -1) if data[i] & 0xC0 != 0x80)
    return next(first_bytes, len(data))


def _read_parquet(path: Path, text_field: str) -> Iterator[RowsBlock]:
    with pyarrow.parquet.ParquetFile(path) as file:
        columns = {field.name: str(field.type) for field in file.schema_arrow}
        if columns.get(text_field) not in ("string", "large_string"):
            has = f"as {columns[text_field]}, not text" if text_field in columns else "not"
            listed = ", ".join(f"{name} ({kind})" for name, kind in columns.items())
            raise UserError(f"{path} has the column {text_field!r} {has}; its columns: {listed}. Set --text_field.")
        bytes_per_row = path.stat().st_size / max(file.metadata.num_rows, 1)
        texts: list[str | None] = []
        held_bytes = 0
        for batch in file.iter_batches(batch_size=64, columns=[text_field]):
            texts += batch.column(0).to_pylist()
            held_bytes += batch.nbytes
            if held_bytes >= _BLOCK_BYTES:
                yield RowsBlock(path, round(len(texts) * bytes_per_row), texts)
                texts, held_bytes = [], 0
        if texts:
            yield RowsBlock(path, round(len(texts) * bytes_per_row), texts)


def _replace_surrogates(text: str) -> str:
    """Lone surrogates, which JSON can spell and UTF-8 cannot, become U+FFFD: one must not stop a corpus."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
