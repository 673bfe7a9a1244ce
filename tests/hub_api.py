"""The loopback Hub's API: who asks and what they may, repositories, commits, LFS negotiation, files at a revision."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qs, quote, unquote

import yaml
from hub_cards import card_errors
from hub_http import XET_TOKEN, Handler
from hub_storage import Blob, Commit, HubError, Repo, RepoType, is_large, now


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
            case "GET", ["xet-write-token", _]:
                self._repo(repo_type, repo_id, write=True)
                expiry = int(time.time()) + 3600
                self.reply({"casUrl": self.hub.storage_url, "exp": expiry, "accessToken": XET_TOKEN})
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
