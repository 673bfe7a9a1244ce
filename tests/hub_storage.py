"""What the loopback Hub holds: file contents as git and LFS know them, commits, and repositories with their history."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

RepoType = Literal["model", "dataset"]

CHUNK = 1 << 20
REGULAR_LIMIT = 10 << 20  # the Hub takes no larger file outside LFS
LFS_SUFFIXES = {".safetensors", ".pt", ".bin", ".parquet", ".zst", ".gz", ".zip", ".npz", ".arrow"}


class HubError(Exception):
    """An answer other than success, with the headers by which the Hub's client tells errors apart."""

    def __init__(
        self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, dict(headers or {})


@dataclass(frozen=True)
class Blob:
    """One file's content: where it lies (by sha256), its size and the id that git gives it."""

    sha256: str
    size: int
    git_oid: str
    lfs: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_oid

    def entry(self, path: str) -> dict[str, Any]:
        """The file as the tree and paths-info calls describe it."""
        lfs = {"lfs": {"oid": self.sha256, "size": self.size, "pointerSize": 134}} if self.lfs else {}
        return {"type": "file", "path": path, "size": self.size, "oid": self.git_oid, **lfs}


@dataclass(frozen=True)
class Commit:
    """One state of a repository: every file, and the commit that it grew from."""

    oid: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: Mapping[str, Blob]


@dataclass
class Repo:
    """A repository: its commits by id and its refs (refs/heads/…, refs/tags/…, refs/pr/…) by full name, and which of
    its pull requests were closed."""

    repo_id: str
    repo_type: RepoType
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    closed: set[str] = field(default_factory=set)

    def ref_name(self, revision: str) -> str | None:
        """Full name of the branch, pull request or tag that `revision` means, or None."""
        names = (revision, f"refs/heads/{revision}", f"refs/tags/{revision}")
        return next((name for name in names if name in self.refs), None)

    def at(self, revision: str) -> Commit:
        """The commit that a sha, a branch, a tag or refs/pr/N names."""
        name = self.ref_name(revision)
        oid = self.refs[name] if name else revision
        if oid not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]

    def history(self, revision: str) -> Iterator[Commit]:
        """The commit at `revision` and its ancestors, newest first."""
        oid: str | None = self.at(revision).oid
        while oid:
            yield self.commits[oid]
            oid = self.commits[oid].parent


class Store:
    """File contents under their sha256 in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, sha256: str) -> Path:
        return self.folder / sha256

    def receive(self, chunks: Iterable[bytes], expected: str | None = None) -> tuple[str, int]:
        """Writes a stream to disk under its sha256; refuses it when that is not the `expected` one."""
        digest, size = hashlib.sha256(), 0
        handle, name = tempfile.mkstemp(dir=self.folder, prefix="incoming-")
        try:
            with os.fdopen(handle, "wb") as file:
                for chunk in chunks:
                    digest.update(chunk)
                    size += file.write(chunk)
            if expected not in (None, digest.hexdigest()):
                raise HubError(400, f"content has sha256 {digest.hexdigest()}, not {expected}")
            os.replace(name, self.path(digest.hexdigest()))
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        return digest.hexdigest(), size

    def regular(self, content: bytes) -> Blob:
        """Stores a small file, known to git by the hash of its content."""
        sha256, size = self.receive([content])
        return Blob(sha256, size, git_hash(content), lfs=False)

    def large(self, sha256: str) -> Blob:
        """A file that was uploaded before, known to git by the hash of its LFS pointer."""
        if not self.path(sha256).is_file():
            raise HubError(400, f"LFS object {sha256} was never uploaded")
        size = self.path(sha256).stat().st_size
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
        return Blob(sha256, size, git_hash(pointer.encode()), lfs=True)

    def add(self, path: str, content: bytes | Path) -> Blob:
        """Stores a file the way its name and content ask for."""
        if isinstance(content, bytes):
            content_sample, size = content[:512], len(content)
        else:
            with content.open("rb") as file:
                content_sample, size = file.read(512), content.stat().st_size
        if not is_large(path, size, content_sample):
            return self.regular(content if isinstance(content, bytes) else content.read_bytes())
        if isinstance(content, bytes):
            return self.large(self.receive([content])[0])
        with content.open("rb") as file:
            return self.large(self.receive(iter(lambda: file.read(CHUNK), b""))[0])


def git_hash(content: bytes) -> str:
    """The id that git gives a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_large(path: str, size: int, sample: bytes) -> bool:
    """Whether the Hub keeps a file in LFS: by suffix, by size, or because it is binary."""
    return size > 0 and (Path(path).suffix in LFS_SUFFIXES or size > REGULAR_LIMIT or b"\0" in sample)


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
