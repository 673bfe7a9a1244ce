"""HTTP as the loopback Hub's two origins speak it: bodies, answers, parts of files, and faults on the way."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal
from urllib.parse import parse_qs, unquote, urlsplit

from hub_storage import CHUNK, HubError

if TYPE_CHECKING:
    from hub_server import HubServer

Failure = Literal["drop", "lost"] | int
Fault = Failure | Callable[[], Failure | None]

XET_TOKEN = "xet"  # what a client shows to the storage host instead of its own token


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
            asked = {"Retry-After": "1"} if failure == 429 else {}
            raise HubError(failure, "Injected fault", headers=asked)
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
