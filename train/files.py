"""Files of a run: read with a sentence if they are damaged, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
import yaml
from safetensors import SafetensorError

from bilinear_tc.train.errors import StorageError, UserError, one_line
from bilinear_tc.train.launchers import alive

History = Mapping[str, Sequence[float]]  # by the columns of history.parquet, a value an optimizer step
HISTORY_COLUMNS = {
    **dict.fromkeys(("step", "tokens"), pyarrow.int64()),
    **dict.fromkeys(("mse", "variance_explained", "fvu"), pyarrow.float64()),
}
WRITE_ERRORS = (OSError, SafetensorError, pyarrow.ArrowException)
PARTIAL = re.compile(r"\..+\.[0-9a-f]{8}\.partial")  # what `written_whole` calls its scratch folders


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(content: Any, path: Path) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file of settings; UserError if it is not a readable YAML mapping."""
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} is not readable as YAML: {one_line(error)}") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path} must hold one setting a line, got a {type(settings).__name__}")
    return settings


def write_yaml(content: dict[str, Any], path: Path) -> None:
    path.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")


def write_history(history: History, path: Path) -> None:
    columns = {name: pyarrow.array(history[name], kind) for name, kind in HISTORY_COLUMNS.items()}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def read_history(path: Path) -> dict[str, np.ndarray]:
    """The columns of a history.parquet."""
    try:
        table = pyarrow.parquet.read_table(path, columns=list(HISTORY_COLUMNS))
        history = {name: table[name].to_numpy() for name in HISTORY_COLUMNS}
    except (OSError, ValueError, KeyError) as error:  # pyarrow's own errors are subclasses of these
        raise UserError(f"{path} is not a history: {one_line(error)}") from error
    for name, values in history.items():
        if not np.issubdtype(values.dtype, np.number):
            raise UserError(f"{path} is not a history: expected numbers in its column {name}")
    return history


def sha256_of(path: Path) -> str:
    """Hash of a file's content, in hexadecimal."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            sha256.update(chunk)
    return sha256.hexdigest()


def delete_files(files: Iterable[Path]) -> None:
    """Deletes those that are there."""
    for file in files:
        file.unlink(missing_ok=True)


@contextmanager
def written_whole(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """A scratch folder whose files become those of the folder `target` when the block ends without an error.

    They reach the disk before they get their names, so that a power failure leaves no name without its content. If
    `target` exists, the files move into it one by one, each whole; with `replace` it is deleted once they are there.
    StorageError if they cannot be written, as on a full disk.
    """
    merge = target.is_dir() and not replace
    place = target if merge else target.parent
    scratch, aside = (place / f".{target.name}.{secrets.token_hex(4)}.partial" for _ in range(2))
    try:
        scratch.mkdir(parents=True)
        yield scratch
        for file in scratch.rglob("*"):
            if file.is_file():
                synced(file)
        if merge:
            for file in sorted(scratch.iterdir()):
                os.replace(file, target / file.name)
            synced(target)
        else:
            if target.is_dir() and not target.is_symlink():  # a file in its place is not ours
                os.rename(target, aside)
            os.rename(scratch, target)
            synced(target.parent)
            shutil.rmtree(aside, ignore_errors=True)
    except UserError:
        raise
    except WRITE_ERRORS as error:
        raise StorageError(
            f"{target} cannot be written ({one_line(error)}): make room on the disk, or check that you may write "
            "there, and run the same command again"
        ) from error
    finally:
        if aside.exists() and not target.exists():
            os.rename(aside, target)
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other commands off a folder while the context lasts; UserError if one is at work in it."""
    lock, me = folder / ".lock", psutil.Process()
    if lock.is_file() and (holder := _holder(lock)):
        raise UserError(
            f"another command ({holder}) is at work in {folder}: wait for its end, or delete {lock} if there is none"
        )
    try:
        lock.unlink(missing_ok=True)  # of a process that was killed
        with lock.open("x", encoding="utf-8") as file:
            json.dump({"host": socket.gethostname(), "pid": me.pid, "started": me.create_time()}, file)
    except OSError as error:
        raise StorageError(f"{folder} cannot be written ({one_line(error)}): expected write permission") from error
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)


def _holder(lock: Path) -> str | None:
    """The process that holds a lock, as far as can be told from this machine; None if it has ended."""
    try:
        held = read_json(lock)
        if held["host"] != socket.gethostname():
            return f"process {held['pid']} on {held['host']}"
        process = psutil.Process(held["pid"])
        return f"process {held['pid']}" if process.create_time() == held["started"] and alive(process) else None
    except (ValueError, KeyError, TypeError, psutil.Error, OSError):  # cut short by a kill, or ended meanwhile
        return None


def synced(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_disk(folder: Path) -> int:
    """Bytes free where a folder is, or will be."""
    return shutil.disk_usage(next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())).free
