"""A row that holds no text ends a fit with the flag that skips it, by which such rows are left out and counted."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from fitting import TinyFit, assert_same_layers, write_text

from bilinear_tc.train.text.documents import Documents, TextError


def jsonl(folder: Path, rows: list[str | None]) -> Path:
    path = folder / "a.jsonl"
    lines = [json.dumps({"text": row}).encode() for row in rows]
    path.write_bytes(b"\n".join([*lines, b'{"text": "\xff\xfe"}', b'{"text": "torn', b"[1]", b"{}"]))
    return path


def parquet(folder: Path, rows: list[str | None]) -> Path:
    pq.write_table(pa.table({"text": rows}), folder / "a.parquet")
    return folder / "a.parquet"


def csv(folder: Path, rows: list[str | None]) -> Path:
    (folder / "a.csv").write_text("\n".join(["text,n", *(f"{row or ''},1" for row in rows)]))
    return folder / "a.csv"


@pytest.mark.parametrize(("write", "bad"), [(jsonl, 5), (parquet, 1), (csv, 1)])
def test_bad_rows_are_left_out_and_counted(tmp_path: Path, write: Callable, bad: int) -> None:
    path = write(tmp_path, ["one", None, "two", "three"])
    with pytest.raises(TextError, match=r"; mend it, or leave such rows out with --skip_bad_rows$"):
        list(Documents(str(path)))
    documents = Documents(str(path), skip_bad_rows=True)
    assert list(documents) == ["one", "two", "three"]
    assert documents.skipped == bad
    again = Documents(str(path), skip_bad_rows=True)
    stream = iter(again)
    next(stream), next(stream)
    half, rest = again.state_dict(), Documents(str(path), skip_bad_rows=True)
    assert half["skipped"] == 1
    rest.load_state_dict(half)
    assert list(rest) == ["three"]
    assert rest.skipped == bad


def test_a_bad_byte_in_a_csv_file_costs_no_row(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"text\none\nt\xffwo\n")
    assert list(Documents(str(tmp_path / "a.csv"))) == ["one", "t\ufffdwo"]


@pytest.mark.slow
def test_a_fit_that_a_bad_row_ended_goes_on_with_the_flag(tiny_fit: TinyFit, tmp_path: Path) -> None:
    run, text = tmp_path / "run", tmp_path / "text"
    write_text(text)
    shard = text / "shard-0.jsonl"
    lines = shard.read_bytes().splitlines(keepends=True)
    middle = len(lines) // 2
    shard.write_bytes(b"".join([*lines[:middle], b'{"text": null}\n', b'{"text": "\xff"}\n', *lines[middle:]]))
    settings = ("--dataset", text / "*.jsonl")
    (error,) = tiny_fit.run(run, *settings).errors
    assert re.search(r"leave such rows out with --skip_bad_rows \(all \d+ steps before it are saved in", error), error
    done = tiny_fit.run(run, *settings, "--skip_bad_rows")
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stdout
    assert "skipped_rows=2" in done.stderr
    assert "were left out, for they held none or could not be read: 2\n" in done.stdout
    assert yaml.safe_load((run / "layer_1" / "config.yaml").read_text())["fit"]["skipped_rows"] == 2
    assert_same_layers(run, tiny_fit.reference())
