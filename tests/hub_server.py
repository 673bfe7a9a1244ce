"""A loopback server that speaks the Hugging Face Hub's HTTP protocol, for tests with the real client.

It stores models and datasets with their whole history in a folder (contents under their sha256, streamed to disk,
so that memory stays small whatever is pushed), checks tokens, makes commits atomically and can be told to fail.

    with HubServer(tmp_path) as hub:
        HfApi(endpoint=hub.url, token=hub.token).create_repo("tester/model")

As on the Hub, large and binary files live on a second origin (the storage host), to which clients are redirected and
which must never see a token. It stores what comes by plain LFS and has no Xet storage, which clients would use unless
HF_HUB_DISABLE_XET is set (as it is in `environment`): they get a token for it, and 404 for what they send with it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Mapping
from http.server import ThreadingHTTPServer
from pathlib import Path

from hub_api import HubHandler
from hub_http import Fault, Handler, StorageHandler
from hub_storage import LFS_SUFFIXES, Blob, Commit, HubError, Repo, RepoType, Store, now


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
        places = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1"}
        return {**kept, **places, **given}

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


def copy_repository(hub: HubServer, repo_id: str, folder: Path, revision: str = "main") -> Path:
    """Writes a revision's files into a folder, as a clone would."""
    for path, sha256 in hub.files(repo_id, revision).items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(hub.store.path(sha256), target)
    return folder
