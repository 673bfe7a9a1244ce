"""The repository folder's files, by the hashes that the Hub knows their contents by."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class LocalFile:
    """A file of the repository folder, by the two hashes that the Hub knows contents by.

    Attributes:
        path: where it lies.
        size: in bytes.
        sha256: hash of the content; the Hub's name for a large (LFS) file.
        git_oid: git's hash of it as a blob; the Hub's name for a small file.
    """

    path: Path
    size: int
    sha256: str
    git_oid: str


def list_files(folder: Path) -> dict[str, LocalFile]:
    """Every file of the repository folder by its path in the repository, with its hashes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hash_file(path) for path in files}


def hash_file(path: Path) -> LocalFile:
    """Both hashes of a file in one reading."""
    size = path.stat().st_size
    sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            sha256.update(chunk)
            git.update(chunk)
    return LocalFile(path, size, sha256.hexdigest(), git.hexdigest())
