"""A loopback server that speaks the Hugging Face Hub's HTTP protocol, for tests with the real client.

It stores models and datasets with their whole history in a folder (contents under their sha256, streamed to disk,
so that memory stays small whatever is pushed), checks tokens, makes commits atomically and can be told to fail.

    with HubServer(tmp_path) as hub:
        HfApi(endpoint=hub.url, token=hub.token).create_repo("tester/model")

As on the Hub, large and binary files live on a second origin (the storage host), to which clients are redirected and
which must never see a token. It offers plain LFS and no Xet storage: `xet-write-token` answers 404, unless `has_xet` is
set, which shows what a client makes of the answer and stores nothing.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO, Literal
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml

Failure = Literal["drop", "lost"] | int
Fault = Failure | Callable[[], Failure | None]
RepoType = Literal["model", "dataset"]

CHUNK = 1 << 20
XET_TOKEN = "xet"  # what a client shows to the storage host instead of its own token
LICENSES = r"mit|apache-2\.0|bsd-3-clause|cc-by-4\.0|cc-by-sa-4\.0|gpl-3\.0|lgpl-3\.0|unlicense|other|unknown"
REPO_ID = r"([\w.-]+/)?\w[\w.-]*"
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


class HubServer:
    """The server, a context manager.

    Attributes:
        url: the endpoint (what `HF_ENDPOINT` is set to).
        token, read_token: tokens of `user` that may write, and only read.
        requests: every request so far as "METHOD /path", on either origin, in order of arrival.
        leaks: requests that carried a token to the storage host; must stay empty.
    """

    user = "tester"

    def __init__(self, folder: Path) -> None:
        self.store = Store(Path(folder) / "objects")
        self.repos: dict[tuple[RepoType, str], Repo] = {}
        self.token, self.read_token = "hf_loopbackWriteToken", "hf_loopbackReadToken"
        self.requests: list[str] = []
        self.leaks: list[str] = []
        self.has_xet = False
        self._faults: dict[int, Fault] = {}
        self._lock = threading.RLock()
        self._hub = self._listen(HubHandler)
        self._storage = self._listen(StorageHandler)
        self.url = f"http://127.0.0.1:{self._hub.server_port}"
        self.storage_url = f"http://127.0.0.1:{self._storage.server_port}"

    def _listen(self, handler: type[Handler]) -> ThreadingHTTPServer:
        server = ThreadingHTTPServer(("127.0.0.1", 0), type(handler.__name__, (handler,), {"hub": self}))
        server.daemon_threads = True
        return server

    def __enter__(self) -> HubServer:
        for server in (self._hub, self._storage):
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in (self._hub, self._storage):
            server.shutdown()
            server.server_close()

    def environment(self, home: Path, *, token: str | None = None) -> dict[str, str]:
        """Environment of a fresh process that takes this server for the Hub, with its own (empty) HF_HOME."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        given = {"HF_TOKEN": token} if token else {}
        return {**kept, "HF_ENDPOINT": self.url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", **given}

    def fail(self, nth_request: int, fault: Fault, times: int = 1) -> None:
        """Makes the nth request from now (1 = the next) fail, and the `times` − 1 after it.

        An integer is the status to answer with; "drop" closes the connection before anything is done, "lost" after
        everything is done but the answer; a callable is called, and what it returns is what happens (None: nothing).
        """
        with self._lock:
            first = len(self.requests) + nth_request - 1
            self._faults.update(dict.fromkeys(range(first, first + times), fault))

    def heal(self) -> None:
        """Forgets the faults that have not struck."""
        with self._lock:
            self._faults.clear()

    def arrive(self, request: str) -> Fault | None:
        """Logs a request; returns the fault meant for it."""
        with self._lock:
            self.requests.append(request)
            return self._faults.pop(len(self.requests) - 1, None)

    def repo(self, repo_id: str, repo_type: RepoType = "model") -> Repo:
        return self.repos[repo_type, repo_id]

    def files(self, repo_id: str, revision: str = "main", repo_type: RepoType = "model") -> dict[str, str]:
        """Path → sha256 of every file at a revision, as a reader sees them."""
        return {path: blob.sha256 for path, blob in self.repo(repo_id, repo_type).at(revision).files.items()}

    def create(self, repo_id: str, repo_type: RepoType = "model", *, private: bool = False) -> Repo:
        """A new repository with the Hub's first commit, which holds .gitattributes."""
        with self._lock:
            if (repo_type, repo_id) in self.repos:
                raise HubError(409, "You already created this repo")
            repo = self.repos[repo_type, repo_id] = Repo(repo_id, repo_type, private)
            rules = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in sorted(LFS_SUFFIXES))
            files = {".gitattributes": self.store.regular(rules.encode())}
            self.commit(repo, "refs/heads/main", files, "initial commit", parent=None)
            return repo

    def put(
        self, repo_id: str, files: Mapping[str, bytes | Path], *, repo_type: RepoType = "model", revision: str = "main"
    ) -> str:
        """Commits files without the client (making the repository when it is missing); returns the commit's id."""
        repo = self.repos.get((repo_type, repo_id)) or self.create(repo_id, repo_type)
        with self._lock:
            name = repo.ref_name(revision) or f"refs/heads/{revision}"
            head = repo.at(revision if name in repo.refs else "main")
            added = {path: self.store.add(path, content) for path, content in files.items()}
            return self.commit(repo, name, {**head.files, **added}, "Add files", parent=head.oid).oid

    def commit(
        self, repo: Repo, ref: str, files: Mapping[str, Blob], title: str, *, parent: str | None, message: str = ""
    ) -> Commit:
        """Makes a commit and moves `ref` to it, in one step for every reader."""
        with self._lock:
            content = [repo.repo_id, parent, title, message, len(repo.commits)]
            content += [(path, blob.sha256) for path, blob in sorted(files.items())]
            oid = hashlib.sha1(json.dumps(content).encode()).hexdigest()
            commit = Commit(oid, parent, title, message, self.user, now(), dict(sorted(files.items())))
            repo.commits[oid] = commit
            repo.refs[ref] = oid
            return commit


class Dropped(Exception):
    """The connection is to be closed without an answer."""


class Handler(BaseHTTPRequestHandler):
    """What both origins share: reading bodies, injecting faults, answering."""

    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def handle(self) -> None:
        # a client that was killed, or hangs up, is no error of the server's
        with suppress(ConnectionError):
            super().handle()

    def _handle(self) -> None:
        url = urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        self.parts = url.path.strip("/").split("/")
        self.answer_lost = False
        try:
            # the client asks at most once a day which agents there are, about nothing that is tested here
            if self.parts != ["api", "agent-harnesses"]:
                self._strike(self.hub.arrive(f"{self.command} {unquote(url.path)}"))
            self.dispatch()
        except HubError as error:
            self._refuse(error)
        except (Dropped, BrokenPipeError, ConnectionResetError):
            self._close()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def dispatch(self) -> None:
        raise NotImplementedError

    def _strike(self, fault: Fault | None) -> None:
        failure = fault() if callable(fault) else fault
        self.answer_lost = failure == "lost"
        if isinstance(failure, int):
            raise HubError(failure, "Injected fault")
        if failure == "drop":
            raise Dropped

    def _close(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def body_chunks(self) -> Iterator[bytes]:
        """The request's body, piece by piece; a body that ends early drops the connection."""
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield from self._pieces(self.rfile, size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            yield from self._pieces(self.rfile, int(self.headers.get("Content-Length", 0)))

    @staticmethod
    def _pieces(file: BinaryIO, size: int) -> Iterator[bytes]:
        while size > 0:
            piece = file.read(min(size, CHUNK))
            if not piece:
                raise Dropped
            size -= len(piece)
            yield piece

    def body(self) -> bytes:
        return b"".join(self.body_chunks())

    def json_body(self) -> Any:
        try:
            return json.loads(self.body())
        except json.JSONDecodeError as error:
            raise HubError(400, "The body is not JSON") from error

    def reply(self, content: Any = None, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        """Answers with JSON."""
        data = json.dumps(content).encode()
        self._head(status, {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})})
        if self.command != "HEAD":
            self.wfile.write(data)

    def _head(self, status: int, headers: Mapping[str, str]) -> None:
        if self.answer_lost:
            raise Dropped
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _refuse(self, error: HubError) -> None:
        self.close_connection = True  # the body may be unread
        headers = {"X-Error-Message": error.message, "X-Request-Id": "loopback", "Connection": "close"}
        if error.code:
            headers["X-Error-Code"] = error.code
        try:
            self._drain()
            self.reply({"error": error.message}, error.status, {**headers, **error.headers})
        except (Dropped, OSError):
            self._close()

    def _drain(self) -> None:
        """Reads what the client is still sending, for it may not look for an answer before."""
        self.connection.settimeout(0.05)
        try:
            while self.command in ("POST", "PUT") and self.rfile.read1(CHUNK):
                pass
        except TimeoutError:
            pass

    def send_file(self, blob_path: Path, headers: Mapping[str, str]) -> None:
        """Answers with a file, or with the part of it that a Range header asks for."""
        size = blob_path.stat().st_size
        first, last = self._range(size)
        partial = {"Content-Range": f"bytes {first}-{last}/{size}"} if self.headers.get("Range") else {}
        length = {"Content-Length": str(last - first + 1), "Accept-Ranges": "bytes"}
        self._head(206 if partial else 200, {**length, **partial, **headers})
        if self.command == "HEAD":
            return
        with blob_path.open("rb") as file:
            file.seek(first)
            for piece in self._pieces(file, last - first + 1):
                self.wfile.write(piece)

    def _range(self, size: int) -> tuple[int, int]:
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not asked or asked.groups() == ("", ""):
            return 0, size - 1
        start, end = asked.groups()
        first, last = (int(start), int(end or size - 1)) if start else (max(0, size - int(end)), size - 1)
        if first >= size:
            raise HubError(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{size}"})
        return first, min(last, size - 1)


class StorageHandler(Handler):
    """The storage host: PUT and GET of contents by sha256, open to whoever holds the address."""

    def dispatch(self) -> None:
        if self.headers.get("Authorization", "").removeprefix("Bearer ") not in ("", XET_TOKEN):
            self.hub.leaks.append(self.path)
        sha256 = self.parts[-1]
        if not re.fullmatch(r"[0-9a-f]{64}", sha256):
            raise HubError(404, "No such object")
        if self.command == "PUT":
            self.hub.store.receive(self.body_chunks(), expected=sha256)
            self._head(200, {"Content-Length": "0", "ETag": f'"{sha256}"'})
        elif not self.hub.store.path(sha256).is_file():
            raise HubError(404, "No such object")
        else:
            self.send_file(self.hub.store.path(sha256), {"ETag": f'"{sha256}"'})


class HubHandler(Handler):
    """The Hub itself: the API, LFS negotiation, and files at a revision."""

    def dispatch(self) -> None:
        match self.parts:
            case ["api", "whoami-v2"]:
                role = "write" if self._role() == "write" else self._require("read")
                self.reply({"type": "user", "name": self.hub.user, "auth": {"accessToken": {"role": role}}})
            case ["api", "agent-harnesses"]:
                self.reply({"standardEnvVars": [], "harnesses": {}})
            case ["api", "validate-yaml"]:
                self._validate_card(self.json_body())
            case ["api", "repos", "create"]:
                self._create_repo(self.json_body())
            case ["api", ("models" | "datasets") as kind, owner, name, *rest]:
                self._api(kind[:-1], f"{owner}/{name}", [unquote(part) for part in rest])
            case ["datasets", owner, name, "info", "lfs", "objects", action] if name.endswith(".git"):
                self._lfs("dataset", f"{owner}/{name[:-4]}", action)
            case [owner, name, "info", "lfs", "objects", action] if name.endswith(".git"):
                self._lfs("model", f"{owner}/{name[:-4]}", action)
            case ["datasets", owner, name, "resolve", revision, *path]:
                self._resolve("dataset", f"{owner}/{name}", unquote(revision), unquote("/".join(path)))
            case [owner, name, "resolve", revision, *path]:
                self._resolve("model", f"{owner}/{name}", unquote(revision), unquote("/".join(path)))
            case _:
                raise HubError(404, "Not Found")

    # Who asks, and what they may

    def _role(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in ("", self.hub.token, self.hub.read_token):
            raise HubError(401, "Invalid credentials in Authorization header")
        return {self.hub.token: "write", self.hub.read_token: "read"}.get(token)

    def _require(self, role: str) -> str:
        held = self._role()
        if held is None:
            raise HubError(401, "Invalid username or password.")
        if role == "write" and held != "write":
            raise HubError(403, "Forbidden: you must use a write token to upload to a repository.")
        return held

    def _repo(self, repo_type: RepoType, repo_id: str, *, write: bool = False) -> Repo:
        """The repository, unless the caller may not know of it (the Hub answers 401 to strangers, else 404)."""
        role = self._role()
        repo = self.hub.repos.get((repo_type, repo_id))
        if repo is None or (repo.private and role is None):
            raise HubError(401 if role is None else 404, "Repository not found", "RepoNotFound")
        if write:
            self._require("write")
            self._require_namespace(repo_id)
        return repo

    def _require_namespace(self, repo_id: str) -> None:
        owner = repo_id.split("/")[0]
        if owner != self.hub.user:
            raise HubError(403, f'You don\'t have the rights to write under the namespace "{owner}"')

    # The API

    def _api(self, repo_type: RepoType, repo_id: str, rest: list[str]) -> None:
        match self.command, rest:
            case "GET", []:
                self._info(self._repo(repo_type, repo_id), "main")
            case "GET", ["revision", revision]:
                self._info(self._repo(repo_type, repo_id), revision)
            case "GET", ["tree", revision, *path]:
                self._tree(self._repo(repo_type, repo_id).at(revision), "/".join(path))
            case "POST", ["paths-info", revision]:
                self._paths_info(self._repo(repo_type, repo_id).at(revision))
            case "GET", ["refs"]:
                self._refs(self._repo(repo_type, repo_id))
            case "GET", ["discussions"]:
                self._pull_requests(self._repo(repo_type, repo_id))
            case "GET", ["commits", revision]:
                self._commits(self._repo(repo_type, repo_id), revision)
            case "GET", ["xet-write-token", _] if self.hub.has_xet:
                self._repo(repo_type, repo_id, write=True)
                self.reply(
                    {
                        "casUrl": self.hub.storage_url,
                        "exp": int(time.time()) + 3600,
                        "accessToken": XET_TOKEN,
                    }
                )
            case "POST", ["preupload", revision]:
                self._preupload(self._repo(repo_type, repo_id, write=True), revision)
            case "POST", ["commit", revision]:
                self._commit(self._repo(repo_type, repo_id, write=True), revision)
            case "POST", ["branch", branch]:
                repo = self._repo(repo_type, repo_id, write=True)
                self._new_ref(repo, f"refs/heads/{branch}", self.json_body().get("startingPoint", "main"))
            case "POST", ["tag", revision]:
                repo = self._repo(repo_type, repo_id, write=True)
                self._new_ref(repo, f"refs/tags/{self.json_body()['tag']}", revision)
            case "DELETE", [("branch" | "tag") as kind, name]:
                repo = self._repo(repo_type, repo_id, write=True)
                repo.refs.pop(f"refs/{'heads' if kind == 'branch' else 'tags'}/{name}", None)
                self.reply({})
            case _:
                raise HubError(404, "Not Found")

    def _create_repo(self, order: dict[str, Any]) -> None:
        self._require("write")
        repo_id = f"{order.get('organization') or self.hub.user}/{order['name']}"
        self._require_namespace(repo_id)
        repo_type = order.get("type") or "model"
        private = bool(order.get("private")) or order.get("visibility") == "private"
        url = f"{self.hub.url}/{'datasets/' if repo_type == 'dataset' else ''}{repo_id}"
        try:
            self.hub.create(repo_id, repo_type, private=private)
        except HubError as error:
            self.reply({"error": error.message, "url": url}, error.status, {"X-Error-Message": error.message})
        else:
            self.reply({"url": url, "name": repo_id})

    def _validate_card(self, order: dict[str, str]) -> None:
        """The Hub's check of a card's metadata, if it has any; see `card_errors`."""
        front = re.match(r"---\r?\n(.*?)\r?\n---", order["content"], re.DOTALL)
        try:
            metadata = yaml.safe_load(front[1]) if front else None
        except yaml.YAMLError as error:
            metadata = str(error)
        errors = [] if metadata is None else [{"message": message} for message in card_errors(metadata)]
        warnings = [{"message": "empty or missing yaml metadata in repo card"}] if metadata is None else []
        refusal = {"error": "Invalid metadata in repo card"} if errors else {}
        self.reply({"errors": errors, "warnings": warnings, **refusal}, 400 if errors else 200)

    def _info(self, repo: Repo, revision: str) -> None:
        commit = repo.at(revision)
        siblings = [{"rfilename": path} for path in commit.files]
        if self.query.get("blobs"):
            for sibling, blob in zip(siblings, commit.files.values(), strict=True):
                entry = blob.entry(sibling["rfilename"])
                lfs = {"lfs": {**entry["lfs"], "sha256": blob.sha256}} if blob.lfs else {}
                sibling.update(size=blob.size, blobId=blob.git_oid, **lfs)
        created = next(iter(repo.commits.values())).date
        facts = {"_id": repo.repo_id, "author": self.hub.user, "gated": False, "disabled": False, "tags": []}
        dates = {"createdAt": created, "lastModified": commit.date, "downloads": 0, "likes": 0}
        names = {"id": repo.repo_id, "modelId": repo.repo_id, "sha": commit.oid, "private": repo.private}
        self.reply({**facts, **dates, **names, "siblings": siblings})

    def _tree(self, commit: Commit, folder: str) -> None:
        prefix = f"{folder.strip('/')}/" if folder else ""
        inside = [path for path in commit.files if path.startswith(prefix)]
        if prefix and not inside:
            raise HubError(404, f"{folder} does not exist on {commit.oid}", "EntryNotFound")
        recursive = self.query.get("recursive", "false").lower() in ("true", "1")
        entries = {}
        for path in inside:
            below = path.removeprefix(prefix).split("/")
            depth = len(below) if recursive else min(len(below), 2)
            for parents in range(1, depth):
                entry = self._folder_entry(prefix + "/".join(below[:parents]))
                entries[entry["path"]] = entry
            if recursive or len(below) == 1:
                entries[path] = self._dated(commit.files[path].entry(path), commit)
        self.reply(list(entries.values()))

    def _paths_info(self, commit: Commit) -> None:
        raw = self.body()
        is_json = "json" in self.headers.get("Content-Type", "")
        paths = json.loads(raw)["paths"] if is_json else parse_qs(raw.decode()).get("paths", [])
        entries = []
        for path in paths:
            if path in commit.files:
                entries.append(self._dated(commit.files[path].entry(path), commit))
            elif any(name.startswith(f"{path}/") for name in commit.files):
                entries.append(self._folder_entry(path))
        self.reply(entries)

    @staticmethod
    def _folder_entry(path: str) -> dict[str, Any]:
        return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}

    @staticmethod
    def _dated(entry: dict[str, Any], commit: Commit) -> dict[str, Any]:
        return {**entry, "lastCommit": {"id": commit.oid, "title": commit.title, "date": commit.date}}

    def _refs(self, repo: Repo) -> None:
        kinds = {"branches": "refs/heads/", "tags": "refs/tags/", "pullRequests": "refs/pr/"}
        listed = {
            kind: [
                {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": oid}
                for ref, oid in repo.refs.items()
                if ref.startswith(prefix)
            ]
            for kind, prefix in kinds.items()
        }
        self.reply({**listed, "converts": []})

    def _pull_requests(self, repo: Repo) -> None:
        """All discussions, in one page: there are none but pull requests."""
        about = {
            "title": "",
            "author": {"name": self.hub.user},
            "createdAt": now(),
            "repo": {"name": repo.repo_id, "type": repo.repo_type},
            "isPullRequest": True,
        }
        listed = [
            {**about, "num": int(ref.rsplit("/", 1)[1]), "status": "closed" if ref in repo.closed else "open"}
            for ref in repo.refs
            if ref.startswith("refs/pr/")
        ]
        self.reply({"discussions": listed, "count": len(listed), "start": 0})

    def _commits(self, repo: Repo, revision: str) -> None:
        self.reply(
            [
                {"id": c.oid, "title": c.title, "message": c.message, "authors": [{"user": c.author}], "date": c.date}
                for c in repo.history(revision)
            ]
        )

    def _new_ref(self, repo: Repo, name: str, revision: str) -> None:
        with self.hub._lock:
            if name in repo.refs:
                raise HubError(409, f"Reference already exists: {name}")
            repo.refs[name] = repo.at(revision).oid
        self.reply({})

    # Writing

    def _preupload(self, repo: Repo, revision: str) -> None:
        held = repo.at(revision).files
        answers = []
        for file in self.json_body()["files"]:
            large = is_large(file["path"], file["size"], base64.b64decode(file["sample"]))
            blob = held.get(file["path"])
            answer = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            answers.append({**answer, **({"oid": blob.etag} if blob else {})})
        self.reply({"files": answers})

    def _lfs(self, repo_type: RepoType, repo_id: str, action: str) -> None:
        repo = self._repo(repo_type, repo_id, write=True)
        order = self.json_body()
        if action == "verify":
            path = self.hub.store.path(order["oid"])
            if not path.is_file() or path.stat().st_size != order["size"]:
                raise HubError(404, "Object was not uploaded")
            return self.reply({})
        if action != "batch" or order.get("operation") != "upload":
            raise HubError(404, "Not Found")
        return self.reply({"transfer": "basic", "objects": [self._lfs_orders(repo, item) for item in order["objects"]]})

    def _lfs_orders(self, repo: Repo, item: dict[str, Any]) -> dict[str, Any]:
        """What to do for one object: nothing when it is here, else where to put it and where to have it checked."""
        answer = {"oid": item["oid"], "size": item["size"], "authenticated": True}
        if self.hub.store.path(item["oid"]).is_file():
            return answer
        base = f"{self.hub.url}/{'datasets/' if repo.repo_type == 'dataset' else ''}{repo.repo_id}.git"
        upload = {"href": f"{self.hub.storage_url}/upload/{item['oid']}", "header": {}}
        verify = {"href": f"{base}/info/lfs/objects/verify", "header": {}}
        return {**answer, "actions": {"upload": upload, "verify": verify}}

    def _commit(self, repo: Repo, revision: str) -> None:
        lines = [json.loads(line) for line in self.body().splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        with self.hub._lock:
            head, ref = repo.at(revision), repo.ref_name(revision)
            expected = header.get("parentCommit")
            if expected not in (None, head.oid):
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            if self.query.get("create_pr"):
                ref = f"refs/pr/{1 + sum(name.startswith('refs/pr/') for name in repo.refs)}"
            elif ref is None or ref.startswith("refs/tags/"):
                raise HubError(400, f"{revision} is no branch")
            files = self._changed(head.files, lines)
            message = header.get("description", "")
            made = self.hub.commit(repo, ref, files, header["summary"], parent=head.oid, message=message)
        answer = {
            "success": True,
            "commitOid": made.oid,
            "commitUrl": f"{self.hub.url}/{repo.repo_id}/commit/{made.oid}",
        }
        if self.query.get("create_pr"):
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo.repo_id}/discussions/{ref.rsplit('/', 1)[1]}"
        self.reply(answer)

    def _changed(self, files: Mapping[str, Blob], lines: list[dict[str, Any]]) -> dict[str, Blob]:
        """The files after a commit's operations; refuses it whole when one cannot be done."""
        files = dict(files)
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "file":
                    content = base64.b64decode(value["content"])
                    if is_large(value["path"], len(content), content[:512]):
                        raise HubError(400, f"{value['path']} is binary or too large: it must go through LFS")
                    files[value["path"]] = self.hub.store.regular(content)
                case "lfsFile":
                    files[value["path"]] = self.hub.store.large(value["oid"])
                case "deletedFile":
                    if files.pop(value["path"], None) is None:
                        raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
                case "deletedFolder":
                    prefix = value["path"].rstrip("/") + "/"
                    files = {path: blob for path, blob in files.items() if not path.startswith(prefix)}
        return files

    # Reading

    def _resolve(self, repo_type: RepoType, repo_id: str, revision: str, path: str) -> None:
        commit = self._repo(repo_type, repo_id).at(revision)
        named = {"X-Repo-Commit": commit.oid}
        blob = commit.files.get(path)
        if blob is None:
            raise HubError(404, "Entry not found", "EntryNotFound", named)
        if not blob.lfs:
            return self.send_file(self.hub.store.path(blob.sha256), {**named, "ETag": f'"{blob.etag}"'})
        linked = {"X-Linked-Size": str(blob.size), "X-Linked-Etag": f'"{blob.sha256}"', "ETag": f'"{blob.git_oid}"'}
        location = f"{self.hub.storage_url}/{quote(path)}/{blob.sha256}"
        return self._head(302, {**named, **linked, "Location": location, "Content-Length": "0"})


def card_errors(metadata: Any) -> Iterator[str]:
    """What the Hub would not take of a model card's metadata."""

    def is_text(value: Any, pattern: str = r".+") -> bool:
        return isinstance(value, str) and re.fullmatch(pattern, value) is not None

    if not isinstance(metadata, dict):
        yield "the metadata must be a mapping"
        return
    if not is_text(metadata.get("license", "mit"), LICENSES):
        yield '"license" must be one of the identifiers that the Hub lists'
    for name, pattern in (("tags", r".+"), ("base_model", REPO_ID), ("datasets", REPO_ID), ("library_name", r"[\w-]+")):
        values = metadata.get(name, [])
        several = values if isinstance(values, list) else [values]
        if isinstance(values, str) and name in ("tags", "datasets"):
            yield f'"{name}" must be an array'
        elif not all(is_text(value, pattern) for value in several):
            yield f'"{name}" must hold {"repository ids" if pattern == REPO_ID else "text"}'
    index = metadata.get("model-index", [])
    try:
        for entry in index:
            good = is_text(entry["name"]) and entry["results"]
            for result in entry["results"]:
                data = result["dataset"]
                good = (
                    good
                    and is_text(result["task"]["type"])
                    and is_text(data["type"], REPO_ID)
                    and is_text(data["name"])
                )
                scores = [(metric["type"], metric["value"]) for metric in result["metrics"]]
                good = good and scores and all(is_text(kind) and value is not None for kind, value in scores)
            if not good:
                yield '"model-index" must hold models with a name and results, each with a task, a dataset and metrics'
    except (KeyError, TypeError) as error:
        yield f'"model-index" is not as it must be: {type(error).__name__} {error}'


def copy_repository(hub: HubServer, repo_id: str, folder: Path, revision: str = "main") -> Path:
    """Writes a revision's files into a folder, as a clone would."""
    for path, sha256 in hub.files(repo_id, revision).items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(hub.store.path(sha256), target)
    return folder
