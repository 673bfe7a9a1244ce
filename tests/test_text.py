"""Documents: every kind of source, resuming at every document, and what is said when a source is wrong."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hub_server import HubServer

from bilinear_tc.train.recipe import Recipe
from bilinear_tc.train.text.documents import Documents, TextError, python_stdlib_files
from bilinear_tc.train.text.source import check_text

TEXTS = [f"document {number}\nüñí \U0001f600 {'words ' * (number % 5)}" for number in range(23)]


def jsonl(texts: Iterable[object], column: str = "text") -> bytes:
    return b"".join(json.dumps({column: text, "meta": {"n": i}}).encode() + b"\n" for i, text in enumerate(texts))


def write_parquet(path: Path, columns: dict[str, list]) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=4)


def write_source(folder: Path, kind: str) -> str:
    """TEXTS in two shards of one kind; returns what to pass as `dataset`."""
    halves = {"a": TEXTS[:9], "b": TEXTS[9:]}
    for name, texts in halves.items():
        shard = folder / f"{name}.{kind}"
        if kind in ("txt", "py"):
            for number, text in enumerate(texts):
                (folder / f"{name}{number:02}.{kind}").write_text(text, encoding="utf-8")
        elif kind == "json":
            shard.write_text(json.dumps([{"text": text, "n": 1} for text in texts]))
        elif kind == "parquet":
            write_parquet(shard, {"n": list(range(len(texts))), "text": texts})
        else:
            compress = {
                "jsonl": bytes,
                "jsonl.zst": zstandard.ZstdCompressor().compress,
                "jsonl.gz": gzip.compress,
                "jsonl.bz2": bz2.compress,
                "jsonl.xz": lzma.compress,
            }[kind]
            shard.write_bytes(compress(jsonl(texts)))
    return f"{folder}/*.{kind}"


def message(**arguments: object) -> str:
    """The sentence with which a source is refused, at once or while it is read."""
    with pytest.raises(TextError) as caught:
        list(Documents(**arguments))
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize(
    "kind", ["txt", "py", "jsonl", "jsonl.zst", "jsonl.gz", "jsonl.bz2", "jsonl.xz", "json", "parquet"]
)
def test_every_format_resumes_after_any_document(tmp_path: Path, kind: str) -> None:
    source = write_source(tmp_path, kind)
    documents = Documents(source)
    assert list(documents) == TEXTS
    assert list(documents) == TEXTS  # a second pass starts again
    for read in (0, 1, 3, 4, 5, 8, 9, 10, 13, 22, 23):  # at, before and after the ends of shards and row groups
        assert list(islice(documents, read)) == TEXTS[:read]
        state = json.loads(json.dumps(documents.state_dict()))
        resumed = Documents(source)
        resumed.load_state_dict(state)
        assert list(resumed) == (TEXTS[read:] if read else TEXTS)
        assert list(resumed) == TEXTS
        assert list(documents) == (TEXTS[read:] if read else TEXTS)  # and so does the stream itself


def test_files_are_taken_in_the_order_named(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"text of {name}\r\nsecond line")
    (tmp_path / "empty.txt").touch()
    named = ",".join(str(tmp_path / f"{name}.txt") for name in ("c", "empty", "a"))
    assert list(Documents(named)) == ["text of c\nsecond line", "text of a\nsecond line"]
    assert list(Documents(str(tmp_path / "b.txt"))) == ["text of b\nsecond line"]


def test_lines_that_strain_a_json_reader(tmp_path: Path) -> None:
    """Other columns that change their type, a byte order mark, blank lines, no last line break, half a surrogate."""
    path = tmp_path / "odd.jsonl"
    lines = [
        '\ufeff{"text": "a", "x": 1}',
        '{"x": "one", "text": "b\\u2028c"}',
        " ",
        '{"text": "d \\ud800 e", "x": []}',
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    assert list(Documents(str(path))) == ["a", "b\u2028c", "d ? e"]


def test_zstd_frames_one_after_another(tmp_path: Path) -> None:
    compress = zstandard.ZstdCompressor().compress
    (tmp_path / "a.jsonl.zst").write_bytes(compress(jsonl(TEXTS[:5])[:-20]) + compress(jsonl(TEXTS[:5])[-20:]))
    assert list(Documents(str(tmp_path / "a.jsonl.zst"))) == TEXTS[:5]


def test_lines_longer_than_a_read(tmp_path: Path) -> None:
    texts = ["x" * 3_000_000, "y", "z" * 2_500_000]
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts))
    assert list(Documents(str(tmp_path / "a.jsonl"))) == texts


def test_folder_with_splits_configurations_and_columns(tmp_path: Path) -> None:
    """A folder in a Hub dataset's layout, described by its README."""
    for name, texts in {"english": TEXTS[:6], "code": TEXTS[6:]}.items():
        (tmp_path / name).mkdir()
        write_parquet(tmp_path / name / "train.parquet", {"content": texts[:4], "n": [0] * 4})
        write_parquet(tmp_path / name / "held_out.parquet", {"content": texts[4:], "n": [0] * len(texts[4:])})
    entries = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/train.parquet\n"
        f"  - split: held_out\n    path: {name}/held_out.parquet\n"
        for name in ("english", "code")
    )
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{entries}---\n")
    folder = str(tmp_path)
    assert list(Documents(folder, config="english", split="held_out", text_column="content")) == TEXTS[4:6]
    assert list(Documents(folder, config="code", text_column="content")) == TEXTS[6:10]
    assert "'english'" in message(dataset=folder)
    assert "'code'" in message(dataset=folder, config="french")
    sentence = message(dataset=folder, config="code", split="validation")
    assert "'train'" in sentence
    assert "'held_out'" in sentence
    assert "'content', 'n'" in message(dataset=folder, config="code")


def test_folder_without_readme_in_the_layout_of_the_pile(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    compress = zstandard.ZstdCompressor().compress
    (tmp_path / "train" / "00.jsonl.zst").write_bytes(compress(jsonl(TEXTS[:4])))
    (tmp_path / "train" / "01.jsonl.zst").write_bytes(compress(jsonl(TEXTS[4:8])))
    (tmp_path / "val.jsonl.zst").write_bytes(compress(jsonl(TEXTS[8:])))
    assert list(Documents(str(tmp_path))) == TEXTS[:8]
    assert list(Documents(str(tmp_path), split="val.jsonl.zst")) == TEXTS[8:]
    assert list(Documents(str(tmp_path), split="train/*1.jsonl.zst")) == TEXTS[4:8]
    assert "absent.jsonl" in message(dataset=str(tmp_path), split="absent.jsonl")


HUB_READER = """
import json, sys
from itertools import islice
from bilinear_tc.train.text.documents import Documents, TextError

documents = Documents("tester/pile")
head = list(islice(documents, 5))
state = json.loads(json.dumps(documents.state_dict()))
resumed = Documents("tester/pile")
resumed.load_state_dict(state)
errors = []
for arguments in ({"split": "test"}, {"config": "other"}, {"text_column": "content"}, {"dataset": "tester/absent"}):
    try:
        Documents(**{"dataset": "tester/pile"} | arguments)
    except TextError as error:
        errors.append(str(error))
print(json.dumps([head, list(resumed), list(Documents("tester/pile", split="val.jsonl.zst")), errors]))
"""


@pytest.mark.slow
def test_hub_dataset_streams_and_resumes(tmp_path: Path) -> None:
    compress = zstandard.ZstdCompressor().compress
    shards = {
        "train/00.jsonl.zst": compress(jsonl(TEXTS[:4])),
        "train/01.jsonl.zst": compress(jsonl(TEXTS[4:8])),
        "val.jsonl.zst": compress(jsonl(TEXTS[8:])),
    }
    with HubServer(tmp_path / "hub") as hub:
        hub.put("tester/pile", shards, repo_type="dataset")
        done = subprocess.run(
            [sys.executable, "-c", HUB_READER],
            env=hub.environment(tmp_path / "home"),
            capture_output=True,
            text=True,
            timeout=600,
        )
    assert done.returncode == 0, done.stderr
    head, rest, validation, errors = json.loads(done.stdout)
    assert [*head, *rest] == TEXTS[:8]
    assert validation == TEXTS[8:]
    assert "no split 'test'; it has 'train'" in errors[0]
    assert "other" in errors[1]
    assert "'default'" in errors[1]
    assert "no column 'content'; its columns are 'text', 'meta'" in errors[2]
    assert "tester/absent" in errors[3]
    assert "cannot be found" in errors[3]


def test_python_stdlib_is_split_by_file() -> None:
    files = python_stdlib_files()
    assert not set(files["train"]) & set(files["validation"])
    assert 0.05 < len(files["validation"]) / len(files["train"]) < 0.2
    for split in ("train", "validation"):
        expected = [Path(file).read_text(encoding="utf-8", errors="replace") for file in files[split]]
        assert list(Documents("python-stdlib", split=split)) == expected


def test_a_link_that_leads_nowhere_is_no_part_of_the_python_stdlib(tmp_path, monkeypatch) -> None:
    library = {f"module_{number}.py": f"text of {number}" for number in range(60)}
    for name, text in library.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "broken.py").symlink_to(tmp_path / "absent.py")
    monkeypatch.setattr(sysconfig, "get_path", lambda _name: str(tmp_path))
    files = python_stdlib_files()
    assert {Path(file).name for split in files.values() for file in split} == set(library)
    assert set(Documents("python-stdlib")) < set(library.values())


def test_a_python_stdlib_without_source_files_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda _name: str(tmp_path / "python.zip"))
    for split in ("train", "validation"):
        sentence = message(dataset="python-stdlib", split=split)
        assert "python.zip as .py files, perhaps because it is zipped; use a Python that has them" in sentence


OPENED: list[str] = []


def note_opened(event: str, arguments: tuple) -> None:
    if event == "open" and isinstance(arguments[0], str | os.PathLike):
        OPENED.append(os.path.basename(arguments[0]))


sys.addaudithook(note_opened)


@pytest.mark.parametrize("kind", ["txt", "jsonl.zst", "parquet"])
def test_files_read_past_are_not_opened_again(tmp_path: Path, kind: str) -> None:
    source = write_source(tmp_path, kind)
    documents, resumed = Documents(source), Documents(source)
    list(islice(documents, 15))
    resumed.load_state_dict(documents.state_dict())  # looks whether they are still the same
    OPENED.clear()
    assert list(resumed) == TEXTS[15:]
    opened = {name for name in OPENED if name.endswith(kind)}
    assert opened
    assert not {name for name in opened if name.startswith("a")}
    if kind == "txt":  # one document a file: the fifteenth may be looked at again, none before it
        assert opened <= {f"b{number:02}.txt" for number in range(5, 14)}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"dataset": "python-stdlib", "split": "test"}, "'python-stdlib' has no split 'test'; it has 'train', 'valid"),
        ({"dataset": "python-stdlib", "config": "x"}, "has no configurations"),
        ({"dataset": "python-stdlib", "text_column": "content"}, "no column 'content'; their only column is 'text'"),
        ({"dataset": "./absent"}, "there is no file or folder './absent'"),
        ({"dataset": "absent/*.txt"}, "no file matches 'absent/*.txt'"),
        ({"dataset": "absent.jsonl"}, "no file matches 'absent.jsonl'"),
        ({"dataset": "{folder}/a.jsonl,absent.jsonl"}, "no file matches 'absent.jsonl'"),
        ({"dataset": "{folder}/a.jsonl", "split": "validation"}, "has no split 'validation'; it has 'train'"),
        ({"dataset": "{folder}/a.jsonl", "text_column": "body"}, "no column 'body'; its columns are 'text', 'meta'"),
        ({"dataset": "{folder}/a.parquet", "text_column": "body"}, "no column 'body'; its columns are 'n', 'text'"),
        ({"dataset": "{folder}/a.json", "text_column": "body"}, "no column 'body'; its columns are 'text', 'n'"),
        ({"dataset": "{folder}/a.parquet", "text_column": "n"}, "must be a string, but is a value of type int"),
        ({"dataset": "{folder}/a.*"}, "must be of one kind"),
        ({"dataset": "{folder}/picture.png,{folder}/a.jsonl"}, "picture.png is not a text file"),
        ({"dataset": "{folder}/empty.txt"}, "holds no text"),
        ({"dataset": "{folder}/empty.jsonl"}, "holds no text"),
        ({"dataset": "{folder}/empty"}, "cannot be opened"),
    ],
)
def test_a_source_that_is_wrong_is_refused_at_once(tmp_path: Path, arguments: dict[str, str], expected: str) -> None:
    for kind in ("jsonl", "json", "parquet"):
        write_source(tmp_path, kind)
    for name in ("picture.png", "empty.txt", "empty.jsonl"):
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    arguments = {name: value.replace("{folder}", str(tmp_path)) for name, value in arguments.items()}
    with pytest.raises(TextError) as caught:
        Documents(**arguments)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"text": "cut off', "is not JSON"),
        (b'{"text": "\xff\xfe"}', "is not JSON"),
        (b'["text"]', "must be a JSON object, but is a value of type list"),
        (b'{"text": null}', "must be a string, but is null"),
        (b'{"text": 3}', "must be a string, but is a value of type int"),
        (b'{"body": "x"}', "no column 'text'; its columns are 'body'"),
    ],
)
def test_a_broken_line_is_named_and_what_was_read_before_stays(tmp_path: Path, line: bytes, expected: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS[:3]))
    (tmp_path / "b.jsonl").write_bytes(jsonl(TEXTS[3:5]) + line + b"\n" + jsonl(TEXTS[5:]))
    documents = Documents(f"{tmp_path}/*.jsonl")
    read = []
    for _ in range(2):  # a second attempt fails in the same place, and hands nothing out twice
        with pytest.raises(TextError, match=r"line 3 of .*b\.jsonl") as caught:
            read.extend(documents)
        assert read == TEXTS[:5]
        assert expected in str(caught.value)


@pytest.mark.parametrize("kind", ["jsonl.zst", "jsonl.gz", "parquet"])
def test_a_truncated_shard_is_named_and_what_was_read_before_stays(tmp_path: Path, kind: str) -> None:
    source = write_source(tmp_path, kind)
    shard = tmp_path / f"b.{kind}"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    documents = Documents(source)
    read = []
    with pytest.raises(TextError, match=rf"b\.{kind} cannot be read") as caught:
        read.extend(documents)
    assert read[:9] == TEXTS[:9]
    assert read == TEXTS[: len(read)]
    assert "\n" not in str(caught.value)
    state = documents.state_dict()
    shard.write_bytes(whole)
    mended = Documents(source)
    mended.load_state_dict(state)
    assert list(mended) == TEXTS[len(read) :]


@pytest.mark.parametrize("kind", ["jsonl.zst", "parquet", "json"])
def test_a_truncated_first_shard_is_named(tmp_path: Path, kind: str) -> None:
    source = write_source(tmp_path, kind)
    shard = tmp_path / f"a.{kind}"
    shard.write_bytes(shard.read_bytes()[:40])
    assert f"a.{kind} cannot be read" in message(dataset=source)


def test_splits_may_have_different_columns(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text('{"question": "a"}\n')
    (tmp_path / "validation.json").write_text('{"text": "b"}\n')
    assert list(Documents(str(tmp_path), split="validation")) == ["b"]
    assert "its columns are 'question'" in message(dataset=str(tmp_path))


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_text_that_was_read_and_has_changed_since_is_refused(tmp_path: Path, kind: str) -> None:
    source = write_source(tmp_path, kind)
    documents = Documents(source)
    list(islice(documents, 15))
    state = documents.state_dict()
    first = min(path for path in tmp_path.rglob(f"a*.{kind}"))
    whole = first.read_bytes()
    for changed in (whole + b"\n", whole.replace(b"document", b"documEnt")):  # another size, another content of it
        first.write_bytes(changed)
        with pytest.raises(TextError, match="the position to resume from belongs to other text"):
            Documents(source).load_state_dict(state)
    first.write_bytes(whole)
    again = Documents(source)
    again.load_state_dict(state)
    assert list(again) == TEXTS[15:]


def test_a_position_that_tells_the_names_alone_is_still_taken(tmp_path: Path) -> None:
    source = write_source(tmp_path, "jsonl")
    documents = Documents(source)
    list(islice(documents, 15))
    state = {name: value for name, value in documents.state_dict().items() if name != "read"}
    again = Documents(source)
    again.load_state_dict(state)
    assert list(again) == TEXTS[15:]


def test_a_csv_file_has_one_document_a_row(tmp_path: Path) -> None:
    file = tmp_path / "texts.csv"
    file.write_text('n,text\n1,"one, two\nthree"\n2,four\n')
    documents = Documents(str(file))
    assert list(documents) == ["one, two\nthree", "four"]
    assert "its columns are 'n', 'text'" in message(dataset=str(file), text_column="body")


def test_a_text_file_in_a_folder_is_one_document(tmp_path: Path) -> None:
    for name, text in (("a", "one\ntwo"), ("b", "three\n\nfour\n")):
        (tmp_path / f"{name}.txt").write_text(text)
    assert list(Documents(str(tmp_path))) == list(Documents(f"{tmp_path}/*.txt")) == ["one\ntwo", "three\n\nfour\n"]


def test_utf_16_is_read_by_its_mark_and_other_zero_bytes_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    for encoding in ("utf-16", "utf-8-sig", "utf-8"):
        file.write_text("größe ≠ 0", encoding=encoding)
        assert list(Documents(str(file))) == ["größe ≠ 0"]
    file.write_text("no mark", encoding="utf-16-le")
    assert "holds zero bytes: expected text in UTF-8" in message(dataset=str(file))
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"text": "a"}\n', encoding="utf-16")
    assert "line 1" in (said := message(dataset=str(lines)))
    assert "is in UTF-16: expected JSON lines in UTF-8" in said


def test_a_held_out_file_that_is_fitted_on_is_refused(tmp_path: Path) -> None:
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    check_text(Recipe(dataset=str(tmp_path), eval_split="validation"))
    with pytest.raises(TextError, match=r"eval_split 'train.jsonl' holds .*train.jsonl, which the fit is on"):
        check_text(Recipe(dataset=str(tmp_path), eval_split="train.jsonl"))


def test_two_files_are_a_text_and_its_held_out_part(tmp_path: Path) -> None:
    fitted, held_out = tmp_path / "train.jsonl", tmp_path / "val.jsonl"
    for file in (fitted, held_out):
        file.write_text(json.dumps({"text": file.stem}) + "\n")
    check_text(Recipe(dataset=str(fitted), eval_split=str(held_out)))
    with pytest.raises(TextError, match=r"holds .*train.jsonl, which the fit is on"):
        check_text(Recipe(dataset=str(fitted), eval_split=str(fitted)))
    later = Recipe(dataset=str(held_out), eval_split=str(fitted))  # of a set that is measured on another text
    with pytest.raises(TextError, match=r"holds .*train.jsonl, which the fit is on: name another --split"):
        check_text(Recipe(dataset=str(fitted), eval_split=None), later)
    with pytest.raises(TextError, match=r"no held-out text: .* has no split"):
        check_text(Recipe(dataset=str(fitted), eval_split=str(tmp_path / "none.jsonl")))
