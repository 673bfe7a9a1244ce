"""A text source (Hub id, folder, files or Python's own standard library) as a stream of documents."""

from __future__ import annotations

import codecs
import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import datasets
import fsspec
import zstandard

from bilinear_tc.train.errors import UserError, one_line

PYTHON_STDLIB = "python-stdlib"
COMPRESSIONS = (".zst", ".gz", ".bz2", ".xz")
FILE_FORMATS = {".txt": "text", ".py": "text", ".jsonl": "jsonl", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
READ_BYTES = 1 << 20
HEAD_BYTES = 1 << 16  # of each end of a file that was read, by which it is known again
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

Rows = tuple[datasets.IterableDataset, list[str]]  # a stream with one shard a file, and the names of these files


class TextError(UserError):
    """A text source that cannot be found, read or used."""


class Documents:
    """A resumable stream of documents, one pass over a text source.

    Iterating goes on from the stream's position, which is the beginning at first and again after a full
    pass. Empty documents are left out.

    Args:
        dataset: one of
            - a dataset on the Hub, such as "monology/pile-uncopyrighted";
            - a folder in a Hub dataset's layout (data files, with or without a README.md that describes them; its
              .txt files are one document each);
            - files: a path, a glob, or several of them separated by commas. A .txt or .py file is one document,
              a .jsonl, .json, .csv or .parquet file has one a row; .zst, .gz, .bz2 and .xz are decompressed;
            - "python-stdlib": the files of `python_stdlib_files`, one document each.
        config: the dataset's configuration, for a Hub id or folder that has several.
        split: which part to read. Files have one split, "train"; python-stdlib has "train" and "validation". Of a Hub
            dataset or folder it may also be a file or glob in there, such as "val.jsonl.zst" of the Pile, which is in
            none of its splits.
        text_column: the column that holds the text.
        skip_bad_rows: leave out rows that hold no text, or cannot be read, and count them in `skipped`.

    Raises:
        TextError: here, if the source, its configuration, split or text column does not exist or there is no
            text in it; while iterating, if a file is unreadable or cut short, a line is not JSON, or a text is
            not a string. The file is named, and its line if it has lines. Documents handed out before stay
            good, and so does a position taken before.
    """

    def __init__(
        self,
        dataset: str,
        *,
        config: str | None = None,
        split: str = "train",
        text_column: str = "text",
        skip_bad_rows: bool = False,
    ) -> None:
        self.name = dataset
        self.skipped = 0
        self._column, self._skip = text_column, skip_bad_rows
        self._stream, self.files = _open(dataset, config, split, text_column, skip_bad_rows)
        names = "\n".join(file.rsplit("/", 1)[-1] for file in self.files or [dataset])  # wherever they lie
        self._source = hashlib.sha256(names.encode()).hexdigest()
        self._local = bool(self.files) and all(map(os.path.isfile, self.files))
        self._chain = [""]  # a hash of the content of the first files, by how many
        self._start = self._stream.state_dict()
        self._position: dict | None = self._start
        if next(iter(self), None) is None:
            raise TextError(f"the split {split!r} of {dataset!r} holds no text; choose another dataset or split")
        self._position, self.skipped = self._start, 0

    def __iter__(self) -> Iterator[str]:
        self._stream.load_state_dict(self.state_dict()["position"])
        self._position = None  # known to the stream itself from here on
        try:
            for row in self._stream:
                text = _or_skipped(partial(_text_of, row, self._column, self._file), self._skip)
                self.skipped += text is None
                if text:
                    yield text
        except TextError:
            raise
        except Exception as error:  # whatever file system, decompressor or parser lies underneath
            raise TextError(f"{self._file()} cannot be read: {one_line(error)}") from error
        self._position = self._start

    def state_dict(self) -> dict:
        """The position after the last document handed out, in plain numbers and strings."""
        position = self._stream.state_dict() if self._position is None else self._position
        kept = {"position": position, "source": self._source, "skipped": self.skipped}
        return kept | {"read": self._read_until(position)}

    def load_state_dict(self, state: dict) -> None:
        """Iterate from a position that `state_dict` gave; files read to their end by then are not read again.

        TextError if the position belongs to other files, or what was read of them is no longer the same.
        """
        read = state.get("read", self._read_until(state["position"]))  # earlier positions tell the names alone
        if state["source"] != self._source or read != self._read_until(state["position"]):
            raise TextError(
                f"the position to resume from belongs to other text than {self.name!r} holds now;"
                " resume with the same dataset and split, or start anew"
            )
        self._position, self.skipped = state["position"], state.get("skipped", 0)

    def _file(self) -> str:
        """The file being read, as far as the stream's state tells it."""
        number = self._file_number(self._stream.state_dict())
        return self.files[number] if number < len(self.files) else repr(self.name)

    def _file_number(self, position: dict) -> int:
        while "examples_iterable" in position:
            position = position["examples_iterable"]
        return position.get("shard_idx", len(self.files))

    def _read_until(self, position: dict) -> str:
        """A hash of the content of the files that were read to their end; empty for files of another machine.

        The file being read has no part in it: a broken line in it may be mended before the text is read on.
        """
        number = min(self._file_number(position), len(self.files)) if self._local else 0
        while len(self._chain) <= number:
            content = self._chain[-1] + _ends_hash(self.files[len(self._chain) - 1])
            self._chain.append(hashlib.sha256(content.encode()).hexdigest())
        return self._chain[number]


def python_stdlib_files() -> dict[str, list[str]]:
    """The `.py` files of the running interpreter's standard library, held out by file.

    About one file in ten, chosen by a hash of its path inside the library and so the same for every Python version, is
    in "validation"; the others are in "train". The same hash orders the files, so that neighbours in the stream are
    unrelated. Tests (which some distributions leave out), character tables and installed packages are left out.
    TextError if there are no such files, perhaps because the library is zipped.
    """
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}
    hashes: dict[str, bytes] = {}
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in left_out]
        for file in (Path(folder, name) for name in names if name.endswith(".py")):
            if file.is_file() and file.stat().st_size:  # a distribution's link may lead nowhere
                hashes[str(file)] = hashlib.sha256(file.relative_to(root).as_posix().encode()).digest()
    splits: dict[str, list[str]] = {"train": [], "validation": []}
    for path in sorted(hashes, key=hashes.__getitem__):
        splits["validation" if hashes[path][-1] < 26 else "train"].append(path)
    if not all(splits.values()):
        raise TextError(
            f"Python's standard library is not in {root} as .py files, perhaps because it is zipped; use a Python that"
            " has them, or name another dataset"
        )
    return splits


def _open(dataset: str, config: str | None, split: str, text_column: str, skip: bool) -> Rows:
    """The rows of any source."""
    files = python_stdlib_files() if dataset == PYTHON_STDLIB else _named_files(dataset)
    if files is None:
        return _open_repository(dataset, config, split, text_column, skip)
    if config is not None:
        raise TextError(f"{dataset!r} has no configurations, but dataset_config is {config!r}; leave it out")
    _check_split(dataset, split, files)
    formats = {_file_format(file) for file in files[split]}
    if len(formats) > 1:
        raise TextError(f"the files of {dataset!r} must be of one kind, but they are {_listed(formats)}")
    kind = formats.pop()
    if kind in ("text", "jsonl"):
        return _row_stream(files[split], kind, text_column, skip)
    try:
        named = {name: [glob.escape(file) for file in paths] for name, paths in files.items()}
        builder = datasets.load_dataset_builder(kind, data_files=named)
    except Exception as error:  # such as a cache that cannot be written
        raise TextError(f"{dataset!r} cannot be opened: {one_line(error)}") from error
    return _builder_stream(builder, files[split], split, text_column)


def _named_files(dataset: str) -> dict[str, list[str]] | None:
    """The files that `dataset` names, as the split "train"; None if it is a folder or a Hub id."""
    if Path(dataset).is_file():
        return {"train": [dataset]}
    if Path(dataset).is_dir():  # whose name may hold commas and stars
        if "[" not in dataset:
            return None
        raise TextError(f"{dataset!r} is taken for a pattern: rename it, or name {glob.escape(dataset)}/*.jsonl")
    patterns = [dataset] if glob.glob(dataset) else [pattern for pattern in dataset.split(",") if pattern]
    if len(patterns) == 1 and _file_format(dataset) is None and not glob.has_magic(dataset):
        return None
    files = []
    for pattern in patterns:
        matches = [pattern] if Path(pattern).is_file() else filter(os.path.isfile, glob.glob(pattern, recursive=True))
        if not (found := sorted(matches)):
            raise TextError(f"no file matches {pattern!r}; give an existing file, folder, glob or Hub dataset")
        files += found
    for file in files:
        if _file_format(file) is None:
            raise TextError(f"{file} is not a text file that can be read; supported are {_listed(FILE_FORMATS)}")
    return {"train": files}


def _file_format(file: str) -> str | None:
    """A value of `FILE_FORMATS`, by the file's name; only text and jsonl may be compressed."""
    path = Path(file)
    if path.suffix not in COMPRESSIONS:
        return FILE_FORMATS.get(path.suffix)
    kind = FILE_FORMATS.get(path.with_suffix("").suffix)
    return kind if kind in ("text", "jsonl") else None


def _open_repository(dataset: str, config: str | None, split: str, text_column: str, skip: bool) -> Rows:
    """A Hub dataset or a folder in its layout."""
    if dataset.startswith((".", "/", "~")) and not Path(dataset).is_dir():
        raise TextError(f"there is no file or folder {dataset!r}; give an existing one, or a Hub dataset")
    file, split = (split, "train") if _file_format(split) else (None, split)
    try:
        builder = datasets.load_dataset_builder(dataset, name=config, data_files=file)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise TextError(
            f"the dataset {dataset!r} is not a file or folder here and cannot be found on the Hub: {one_line(error)}"
        ) from error
    except Exception as error:
        raise TextError(f"the dataset {dataset!r} cannot be opened: {one_line(error)}") from error
    data_files = builder.config.data_files or {}
    _check_split(dataset, split, data_files or builder.info.splits or [split])
    files = [str(file) for file in data_files.get(split, [])]
    formats = {_file_format(file) for file in files}
    if formats == {"jsonl"} or (formats == {"text"} and Path(dataset).is_dir()):
        return _row_stream(files, formats.pop() or "", text_column, skip)
    return _builder_stream(builder, files, split, text_column)


def _builder_stream(builder: datasets.DatasetBuilder, files: list[str], split: str, text_column: str) -> Rows:
    """The rows as `datasets` itself reads them, without other columns if the format can leave them out."""
    if hasattr(builder.config, "encoding_errors"):  # a CSV file's bad bytes are read as a .txt file's are
        builder.config.encoding_errors = "replace"
    if files:  # so that the columns are not sought in another split
        data_files = builder.config.data_files
        builder.config.data_files = type(data_files)({split: data_files[split]})
    try:
        stream = builder.as_streaming_dataset(split=split)
        if text_column in (stream.column_names or ()) and hasattr(builder.config, "columns"):
            builder.config.columns = [text_column]
            stream = builder.as_streaming_dataset(split=split)
    except Exception as error:
        place = files[0] if files else f"the split {split!r}"
        raise TextError(f"{place} cannot be read: {one_line(error)}") from error
    return stream, files


def _row_stream(files: list[str], kind: str, text_column: str, skip: bool) -> Rows:
    """Text and JSON lines, read by this module rather than by the builders of `datasets`.

    Those look into every file before the first row is read; on a broken line they read the whole shard into
    memory; they refuse shards whose other columns differ in type; and they take a truncated zstd file for a
    short one.
    """
    if kind == "text" and text_column != "text":
        raise TextError(f"plain text files have no column {text_column!r}; their only column is 'text'")
    rows = {"text": _text_rows, "jsonl": _jsonl_rows}[kind]
    arguments = {"files": files, "text_column": text_column, "skip": skip}
    return datasets.IterableDataset.from_generator(rows, gen_kwargs=arguments), files


def _text_rows(files: list[str], text_column: str, skip: bool) -> Iterator[dict]:
    for file in files:
        content = b"".join(_content(file))
        encoding = "utf-16" if content.startswith(UTF_16) else "utf-8-sig"
        if encoding != "utf-16" and b"\0" in content:
            raise TextError(f"{file} holds zero bytes: expected text in UTF-8, or in UTF-16 with a byte order mark")
        text = content.decode(encoding, errors="replace")
        yield {text_column: text.replace("\r\n", "\n").replace("\r", "\n")}


def _jsonl_rows(files: list[str], text_column: str, skip: bool) -> Iterator[dict]:
    for file in files:
        number = 0
        try:
            for number, line in enumerate(_lines(_content(file)), start=1):
                if line.strip():
                    read = partial(_json_text, line, text_column, f"line {number} of {file}")
                    yield {text_column: _or_skipped(read, skip)}
        except TextError:
            raise
        except Exception as error:
            raise TextError(f"{file} cannot be read past line {number}: {one_line(error)}") from error


def _or_skipped(read: Callable[[], str], skip: bool) -> str | None:
    """A row's text; None for a bad one that is to be skipped."""
    try:
        return read()
    except TextError as error:
        if skip:
            return None
        raise TextError(f"{error}; mend it, or leave such rows out with --skip_bad_rows") from error


def _json_text(line: bytes, text_column: str, place: str) -> str:
    if line.startswith(UTF_16):
        raise TextError(f"{place} is in UTF-16: expected JSON lines in UTF-8; convert the file")
    try:
        row = json.loads(line)
    except ValueError as error:
        raise TextError(f"{place} is not JSON: {one_line(error)}") from error
    if not isinstance(row, dict):
        raise TextError(f"{place} must be a JSON object, but is {_described(row)}")
    text = _text_of(row, text_column, lambda: place)
    # JSON can escape half of a surrogate pair, which is no text and which tokenizers refuse.
    return text if text.isascii() else text.encode(errors="replace").decode()


def _text_of(row: dict, text_column: str, place: Callable[[], str]) -> str:
    """The row's text; `place` tells where the row comes from, if it has none."""
    if text_column not in row:
        raise TextError(f"{place()} has no column {text_column!r}; its columns are {_listed(row)}")
    text = row[text_column]
    if not isinstance(text, str):
        raise TextError(f"the column {text_column!r} of {place()} must be a string, but is {_described(text)}")
    return text


def _lines(content: Iterable[bytes]) -> Iterator[bytes]:
    rest = b""
    for block in content:
        *lines, rest = (rest + block).split(b"\n")
        yield from lines
    if rest:
        yield rest


def _content(file: str) -> Iterator[bytes]:
    """The decompressed content in blocks. EOFError if a compressed file ends too early."""
    is_zstd = file.endswith(".zst")
    with fsspec.open(file, "rb", compression=None if is_zstd else "infer") as opened:
        blocks = iter(lambda: opened.read(READ_BYTES), b"")
        yield from _zstd_content(blocks) if is_zstd else blocks


def _zstd_content(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """zstandard's own reader ends silently where a frame is cut short; this one does not."""
    frame = None
    for block in blocks:
        while block:
            if frame is None:
                frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            yield frame.decompress(block)
            block, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise EOFError("it ends in the middle of a zstd frame, so the file is truncated")


def _check_split(dataset: str, split: str, splits: Iterable[str]) -> None:
    if split not in splits:
        raise TextError(f"{dataset!r} has no split {split!r}; it has {_listed(splits)}")


def _ends_hash(path: str) -> str:
    """Hash of a file's size, beginning and end: a file of many gigabytes takes no time."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
        file.seek(max(0, size - HEAD_BYTES))
        return hashlib.sha256(b"%d %s %s" % (size, head, file.read(HEAD_BYTES))).hexdigest()


def _listed(names: Iterable[object]) -> str:
    return ", ".join(repr(str(name)) for name in names)


def _described(value: object) -> str:
    return "null" if value is None else f"a value of type {type(value).__name__}"
