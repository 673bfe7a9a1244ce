"""One Hub repository: what it holds at a revision, and changing it in one commit, over a network that may fail."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar
from urllib.parse import quote

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.constants import HF_HUB_ETAG_TIMEOUT
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import OfflineModeIsEnabled

from bilinear_tc.train.errors import UserError, one_line
from bilinear_tc.upload.local_files import LocalFile
from bilinear_tc.upload.repository import LAYOUT

Answer = TypeVar("Answer")

# The base errors of the HTTP library that huggingface_hub stands on: httpx2, httpx or requests, by its version.
TRANSPORT_ERRORS = (*(set(HfHubHTTPError.__mro__[1:]) - set(OSError.__mro__)), ConnectionError, TimeoutError)
PASSING = {408, 429, 500, 502, 503, 504}
NOT_FOUND = (RepositoryNotFoundError, RevisionNotFoundError)


class HubRefusal(UserError):
    """The Hub, or the way to it, refused: one sentence with the remedy."""


class HubUnreachable(HubRefusal):
    """The Hub gives no answer, or is not to be asked."""


class XetError(ConnectionError):
    """An upload to Xet storage failed, whose client raises Python's own errors and tells an HTTP status in words only.

    Its `status` is 401 or 403 if the token was refused, else None.
    """

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        refused = re.search(r"HTTP status client error \((401|403)", str(error))
        self.status = int(refused[1]) if refused else 403 if isinstance(error, PermissionError) else None


@dataclass(frozen=True)
class RemoteFile:
    """A file on the Hub: its size and hash (sha256 of a large file, git's blob hash of a small one)."""

    size: int
    oid: str
    large: bool

    def holds(self, local: LocalFile) -> bool:
        return (self.size, self.oid) == (local.size, local.sha256 if self.large else local.git_oid)


@dataclass(frozen=True)
class Changes:
    """What a publication changes: paths to add, to replace, to remove, and those that are there as they should be."""

    added: list[str]
    replaced: list[str]
    removed: list[str]
    kept: list[str]

    def __bool__(self) -> bool:
        return bool(self.added or self.replaced or self.removed)


@dataclass(frozen=True)
class State:
    """A commit that holds the set, the page to look at it, and the revision to load it by."""

    commit: str
    url: str
    revision: str


def changes_between(
    local: Mapping[str, LocalFile], remote: Mapping[str, RemoteFile], *, keep_layers: bool = False
) -> Changes:
    """What has to change for `remote` to hold the set; files that are not of a set's layout stay as they are, and so do
    layers that `local` lacks, if they are to be kept."""
    folders = {path.split("/")[0] for path in local}

    def belongs(path: str) -> bool:
        of_other_layer = path.startswith("layer_") and path.split("/")[0] not in folders
        return LAYOUT.fullmatch(path) is not None and not (keep_layers and of_other_layer)

    kept = [path for path, file in local.items() if path in remote and remote[path].holds(file)]
    return Changes(
        added=[path for path in local if path not in remote],
        replaced=[path for path in local if path in remote and path not in kept],
        removed=[path for path in sorted(remote) if path not in local and belongs(path)],
        kept=kept,
    )


class HubRepository:
    """One model repository on the Hub.

    Every call is tried again if the connection drops or the Hub answers 408, 429 or 5xx, after a pause that the Hub
    asks for or a growing one; any other refusal is a HubRefusal.

    Args:
        repo_id: "owner/name".
        revision: the branch (or refs/pr/N) to publish to.
        keep_layers: let layers that a publication lacks stay there.
        attempts: how often a call is tried in all.
        first_wait: pause before the second attempt, in seconds; each further pause is twice as long.
    """

    def __init__(
        self,
        repo_id: str,
        revision: str = "main",
        *,
        keep_layers: bool = False,
        attempts: int = 5,
        first_wait: float = 1.0,
    ) -> None:
        self.api = HfApi()
        self.repo_id, self.revision, self.keep_layers = repo_id, revision, keep_layers
        self.attempts, self.first_wait = attempts, first_wait
        self._unreachable: HubUnreachable | None = None

    @property
    def url(self) -> str:
        """The page of the revision."""
        page = f"{self.api.endpoint}/{self.repo_id}"
        return page if self.revision == "main" else f"{page}/tree/{quote(self.revision, safe='')}"

    # Asking

    def ask(self, call: Callable[[], Answer], *, expect: tuple[type[Exception], ...] = ()) -> Answer:
        """The answer to a call, tried again while failures may pass.

        Raises:
            HubRefusal: in one sentence, with the remedy; HubUnreachable if there was no answer.
            Exception: of a type in `expect`, as it came; and what has nothing to do with the network.
        """
        if self._unreachable:  # asked in vain before
            raise self._unreachable
        as_they_come: tuple[type[Exception], ...] = (HubRefusal, *expect)
        for attempt in range(1, self.attempts + 1):
            try:
                return call()
            except as_they_come:
                raise
            except Exception as error:
                if network_error(error) is None:
                    raise
                if not may_pass(error) or attempt == self.attempts:
                    if is_unanswered(error):
                        self._unreachable = HubUnreachable(self.explain(error))
                        raise self._unreachable from error
                    raise HubRefusal(self.explain(error)) from error
                if wait := asked_to_wait(error):
                    print(
                        f"the Hub takes no more requests for {wait} seconds ({status_of(error)}): waiting", flush=True
                    )
                time.sleep(wait or self.first_wait * 2 ** (attempt - 1))
        raise ValueError(f"attempts must be at least 1, got {self.attempts}")

    def explain(self, error: BaseException) -> str:
        """One sentence on what the Hub (or the way to it) refused, and what to do about it."""
        owner, status, reason = self.repo_id.split("/")[0], status_of(error), redacted(error)
        times = "once" if self.attempts == 1 else f"{self.attempts} times"
        match status:
            case 401:
                return "the Hub does not accept the token (401): log in with `hf auth login`, or set HF_TOKEN anew"
            case 403:
                return (
                    f"the token may not write to {self.repo_id} (403): use a token with write access to {owner}, "
                    "from https://huggingface.co/settings/tokens, or publish under a name of your own with --repo_id"
                )
            case 404:
                return f"the Hub has no {self.repo_id} for this token (404): check --repo_id and --revision: {reason}"
            case 412:
                return (
                    f"{self.revision} of {self.repo_id} was changed by someone else meanwhile (412), and nothing was "
                    "published: run the command again to publish onto the new state"
                )
            case None if is_offline(error):
                return "the Hub is not asked while HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set: unset it"
            case None:
                return f"the connection to the Hub failed {times} ({reason}): run the command again to resume"
            case _ if may_pass(error):
                return f"the Hub failed {times} ({status}): run the command again later to resume"
            case _:
                return f"the Hub refused the request ({status}): {reason}"

    # Reading

    def check_token(self) -> None:
        """Refuses to begin without a token that the Hub accepts."""
        if get_token() is None:
            raise HubRefusal("there is no Hub token: log in with `hf auth login`, or set HF_TOKEN to a write token")
        self.ask(self.api.whoami)

    def head(self, revision: str | None = None) -> str | None:
        """The commit that a revision (this one's own, by default) names; None if there is none."""
        try:
            name = revision or self.revision
            ask_info = partial(self.api.repo_info, self.repo_id, revision=name, timeout=HF_HUB_ETAG_TIMEOUT)
            return self.ask(ask_info, expect=NOT_FOUND).sha
        except NOT_FOUND:
            return None

    def answers(self) -> bool:
        """Whether the Hub can be asked."""
        try:
            self.head()
        except HubUnreachable:
            return False
        return True

    def files(self, commit: str) -> dict[str, RemoteFile]:
        """Every file at a commit."""

        entries = self.ask(lambda: list(self.api.list_repo_tree(self.repo_id, recursive=True, revision=commit)))
        return {
            entry.path: RemoteFile(entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id, entry.lfs is not None)
            for entry in entries
            if isinstance(entry, RepoFile)
        }

    def changes(self, local: Mapping[str, LocalFile], remote: Mapping[str, RemoteFile]) -> Changes:
        """What has to change for the Hub to hold the set, if it holds `remote`."""
        return changes_between(local, remote, keep_layers=self.keep_layers)

    def fetch(self, path: str, commit: str, cache: str) -> Path:
        """A file at a commit, on this machine."""
        return Path(self.ask(partial(self.api.hf_hub_download, self.repo_id, path, revision=commit, cache_dir=cache)))

    def tags(self) -> dict[str, str]:
        """Every tag's commit."""
        refs = self.ask(lambda: self.api.list_repo_refs(self.repo_id))
        return {tag.name: tag.target_commit for tag in refs.tags}

    def state(self, commit: str) -> State:
        """The branch's state at a commit of it."""
        return State(commit, self.url, self.revision)

    def find_on_branch(self, local: Mapping[str, LocalFile]) -> State | None:
        """The state of the branch, if it holds the set."""
        head = self.head()
        return self.state(head) if head and not self.changes(local, self.files(head)) else None

    def find_pull_request(self, local: Mapping[str, LocalFile], parent: str) -> State | None:
        """The newest pull request, not closed, that grew from `parent` and holds the set."""
        discussions = self.ask(
            lambda: list(self.api.get_repo_discussions(self.repo_id, discussion_type="pull_request"))
        )
        closed = {str(discussion.num) for discussion in discussions if discussion.status == "closed"}
        refs = self.ask(lambda: self.api.list_repo_refs(self.repo_id, include_pull_requests=True))
        for pull_request in reversed(refs.pull_requests or []):
            number = pull_request.ref.rsplit("/", 1)[1]
            if number in closed:
                continue
            commit = pull_request.target_commit
            ancestors = self.ask(partial(self.api.list_repo_commits, self.repo_id, revision=commit))
            # one that was merged grew from an older state than the branch is in now
            grew_from_parent = parent in {ancestor.commit_id for ancestor in ancestors}
            if grew_from_parent and not self.changes(local, self.files(commit)):
                return State(commit, f"{self.api.endpoint}/{self.repo_id}/discussions/{number}", commit)
        return None

    # Writing

    def ensure(self, *, private: bool) -> str:
        """Makes the repository and the branch if they do not exist; returns the commit that the branch is at."""
        try:
            is_public = not self.ask(lambda: self.api.repo_info(self.repo_id), expect=NOT_FOUND).private
        except NOT_FOUND:
            is_public = None
        if is_public is None:
            # if it was not asked for, `private` is left to the owner's own default
            self.ask(lambda: self.api.create_repo(self.repo_id, private=private or None, exist_ok=True))
        elif is_public and private:
            raise HubRefusal(
                f"{self.repo_id} exists and is public, and --private only makes new repositories private: "
                "change it in the repository's settings on the Hub, or leave --private out"
            )
        if head := self.head():
            return head
        if self.revision.startswith("refs/"):
            raise HubRefusal(f"{self.repo_id} has no {self.revision}: check --revision")
        self.ask(lambda: self.api.create_branch(self.repo_id, branch=self.revision, exist_ok=True))
        if head := self.head():
            return head
        raise HubRefusal(f"the Hub does not show {self.revision} of {self.repo_id} yet: run the command again")

    def publish(
        self, local: Mapping[str, LocalFile], changes: Changes, *, parent: str, message: str, create_pr: bool = False
    ) -> State:
        """Uploads what is large, then makes one commit on `parent`; HubRefusal if the revision is no longer there.

        A commit whose answer was lost is found rather than made twice.
        """
        additions = [CommitOperationAdd(path, local[path].path) for path in changes.added + changes.replaced]
        options: dict[str, Any] = {"revision": self.revision, "create_pr": create_pr}
        self.ask(lambda: self._upload(additions, **options))
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *additions,
            *(CommitOperationDelete(path, is_folder=False) for path in changes.removed),
        ]
        tried = False

        def commit() -> State:
            nonlocal tried
            if tried:
                made = self.find_pull_request(local, parent) if create_pr else self.find_on_branch(local)
                if made:
                    return made
            tried = True
            info = self.api.create_commit(
                self.repo_id, operations, commit_message=message, parent_commit=parent, **options
            )
            return State(info.oid, info.pr_url, info.oid) if create_pr else self.state(info.oid)

        with warnings.catch_warnings():
            # the histories are meant to lie in a model repository
            warnings.filterwarnings("ignore", message="It seems that you are about to commit a data file")
            return self.ask(commit)

    def _upload(self, additions: list[CommitOperationAdd], **options: Any) -> None:
        try:
            self.api.preupload_lfs_files(self.repo_id, additions, **options)
        except (ConnectionError, PermissionError, RuntimeError) as error:
            # the HTTP library's errors are of its own types, and a file that cannot be read gives an error number
            if type(network_error(error)) in (ConnectionError, NoneType) and getattr(error, "errno", None) is None:
                raise XetError(error) from error
            raise

    def tag(self, name: str, commit: str, message: str | None) -> None:
        """Gives the commit a tag; nothing happens if it has it. HubRefusal if the tag names another commit."""
        self.ask(
            lambda: self.api.create_tag(self.repo_id, tag=name, tag_message=message, revision=commit, exist_ok=True)
        )
        held = self.tags().get(name)
        if held != commit:
            raise HubRefusal(f"tag {name} names another commit ({held}): choose another with --tag")


def network_error(error: BaseException) -> BaseException | None:
    """The Hub's answer, or the failure of the way to it, that an error came from: libraries wrap what went wrong on
    the wire. None if it came from neither."""
    step: BaseException | None = error
    while step is not None and not isinstance(step, TRANSPORT_ERRORS):
        step = step.__cause__ or step.__context__
    return step


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error came from; None if no answer came."""
    failure = network_error(error)
    if isinstance(failure, XetError):
        return failure.status
    response = getattr(failure, "response", None)
    return None if response is None else response.status_code


def asked_to_wait(error: BaseException) -> int | None:
    """Seconds after which the Hub takes requests again, if its answer tells them."""
    headers = getattr(getattr(network_error(error), "response", None), "headers", {})
    limit = re.search(r"\br=0\s*;\s*t=(\d+)", headers.get("ratelimit", ""))
    told = limit[1] if limit else headers.get("retry-after", "")
    return int(told) if told.isdigit() else None


def is_unanswered(error: BaseException) -> bool:
    """Whether no answer came, or the Hub only said that it is in trouble."""
    return status_of(error) in {None, *PASSING}


def is_offline(error: BaseException) -> bool:
    """Whether nothing was asked, as the environment says to stay offline."""
    return isinstance(network_error(error), OfflineModeIsEnabled)


def may_pass(error: BaseException) -> bool:
    """Whether the same call may succeed later."""
    return is_unanswered(error) and not is_offline(error)


def redacted(error: BaseException) -> str:
    """What an error says, in one line, without the token should it quote it."""
    line, token = one_line(error, most=len(str(error))), get_token()  # not cut short, for a cut may halve the token
    return line.replace(token, "***") if token else line
