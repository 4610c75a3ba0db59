"""A hub on loopback: speaks as much of Hugging Face's and of ModelScope's interface as their clients ask of it.

    with HubServer({"owner/name": {"llm.pt": b"..."}}) as server:
        server.faults["llm.pt"] = Fault(drop_after_bytes=1000)
        HuggingFaceHub(server.address).list_files("owner/name")
        server.requests  # what was asked, in order

It is data in, bytes out; every fault is one that real hubs, proxies and cables have.
"""

import hashlib
import json
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
STORE = "/store/"  # where large files lie
LFS_THRESHOLD_BYTES = 1000  # larger files are listed with a sha256, smaller ones with git's sha1 alone


@dataclass
class Fault:
    """What goes wrong with one file."""

    drop_after_bytes: int | None = None  # the connection breaks off there
    drops: int = 1  # so many times, then the rest comes
    stall_after_bytes: int | None = None  # the connection stays open there and nothing more comes, once
    truncate_to_bytes: int | None = None  # the file that is served is shorter than the one that is listed
    corrupt: bool = False  # a byte of what is served is another than in what is listed
    status: int | None = None  # served in place of the file
    listed_size_bytes: int | None = None  # listed in place of the true size


class Request(NamedTuple):
    """One thing a client asked."""

    method: str
    path: str  # without the query
    file: str | None  # the file's path in its repository, where one was asked for
    range: str | None  # the Range header
    authorization: str | None


@dataclass
class HubServer:
    """Serves repositories at `address` while its `with` block runs."""

    repositories: dict[str, dict[str, bytes]]
    faults: dict[str, Fault] = field(default_factory=dict)
    status: int | None = None  # answered to everything
    requests: list[Request] = field(default_factory=list)
    fetches: list[Request] = field(default_factory=list)  # those of them that were for a file's content
    stalled: threading.Event = field(default_factory=threading.Event)  # a transfer has stopped as its fault says

    def __enter__(self) -> "HubServer":
        hub = self

        class Handler(_Handler):
            server_state = hub

        self._server = _Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def address(self) -> str:
        """Where the hub answers."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def fetches_of(self, file: str) -> list[Request]:
        """The times that a file's content was asked for, and not just sent on from."""
        return [request for request in self.fetches if request.file == file]

    @property
    def fetched(self) -> list[str]:
        """The files whose content was asked for, in order, once for each time."""
        return [str(request.file) for request in self.fetches]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that was killed is no error here
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: HubServer

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self) -> None:
        hub = self.server_state
        parts = urlsplit(self.path)
        path, query = unquote(parts.path), parse_qs(parts.query)
        repository, file, listing = _locate(path, query)
        request = Request(self.command, path, file, self.headers.get("Range"), self.headers.get("Authorization"))
        hub.requests.append(request)
        if hub.status is not None:
            self._send_json({"error": "as the test wants", "Message": "as the test wants"}, hub.status)
        elif path == "/" or path.endswith("internalAccelerationInfo"):
            self._send_json({"Data": {}})
        elif repository not in hub.repositories:
            self._send_json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif file is not None:
            content = hub.repositories[repository].get(file)
            if content is not None and len(content) > LFS_THRESHOLD_BYTES and not path.startswith(STORE):
                self._redirect(f"{repository}/{file}", content)
                return
            if self.command == "GET":
                hub.fetches.append(request)
            self._send_file(file, content)
        else:
            self._send_json(getattr(self, f"_{listing}")(repository, hub.repositories[repository]))

    def _info(self, repository: str, files: dict[str, bytes]) -> Any:
        return {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}

    def _tree(self, repository: str, files: dict[str, bytes]) -> Any:
        """Hugging Face's list of a repository's files."""
        entries = []
        for name, content in files.items():
            size = self._listed_size(name, content)
            entry = {"type": "file", "path": name, "size": size, "oid": git_sha1(content)}
            if len(content) > LFS_THRESHOLD_BYTES:
                entry["lfs"] = {"oid": sha256(content), "size": size, "pointerSize": 130}
            entries.append(entry)
        return [*entries, {"type": "directory", "path": "asset", "oid": "0" * 40}]

    def _files(self, repository: str, files: dict[str, bytes]) -> Any:
        """ModelScope's list of a repository's files."""
        entries = [
            {"Path": name, "Type": "blob", "Size": self._listed_size(name, content), "Sha256": sha256(content)}
            for name, content in files.items()
        ]
        return {"Code": 200, "Success": True, "Data": {"Files": [*entries, {"Path": "asset", "Type": "tree"}]}}

    def _model(self, repository: str, files: dict[str, bytes]) -> Any:
        return {"Code": 200, "Success": True, "Data": {"Id": 1, "Name": repository.split("/")[1]}}

    def _listed_size(self, name: str, content: bytes) -> int:
        fault = self.server_state.faults.get(name, Fault())
        return len(content) if fault.listed_size_bytes is None else fault.listed_size_bytes

    def _redirect(self, path: str, content: bytes) -> None:
        """Send a client on to the store of large files, which is another host and must see no token."""
        self.send_response(302)
        self.send_header("Location", f"http://localhost:{self.server.server_address[1]}{STORE}{quote(path)}")
        for header, value in {**_headers(content), "Content-Length": "0"}.items():
            self.send_header(header, value)
        self.end_headers()

    def _send_file(self, name: str, content: bytes | None) -> None:
        fault = self.server_state.faults.get(name, Fault())
        if fault.status is not None or content is None:
            self._send_json({"error": "Entry not found"}, fault.status or 404, {"X-Error-Code": "EntryNotFound"})
            return
        headers = _headers(content)
        if fault.truncate_to_bytes is not None:
            content = content[: fault.truncate_to_bytes]
        if fault.corrupt:
            content = content[:-1] + bytes([content[-1] ^ 1])
        first, last = _range(self.headers.get("Range"), len(content))
        if first >= len(content) and first > 0:
            self._send_json({}, 416, {"Content-Range": f"bytes */{len(content)}"})
            return
        self.send_response(206 if self.headers.get("Range") else 200)
        if self.headers.get("Range"):
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        for header, value in {**headers, "Content-Length": str(last + 1 - first)}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "GET":
            self._send_body(content[first : last + 1], fault)

    def _send_body(self, body: bytes, fault: Fault) -> None:
        end, stalls = len(body), fault.stall_after_bytes is not None
        if fault.stall_after_bytes is not None:
            end, fault.stall_after_bytes = fault.stall_after_bytes, None
        elif fault.drop_after_bytes is not None and fault.drops > 0:
            end, fault.drops = fault.drop_after_bytes, fault.drops - 1
        try:
            self.wfile.write(body[:end])
            self.wfile.flush()
            if stalls:
                self.server_state.stalled.set()
                self.connection.recv(1)  # returns when the client is gone
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client has seen enough
        self.close_connection = end < len(body)

    def _send_json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for header, content in {**(headers or {}), "Content-Type": "application/json"}.items():
            self.send_header(header, content)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def _headers(content: bytes) -> dict[str, str]:
    headers = {"ETag": f'"{sha256(content)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
    if len(content) > LFS_THRESHOLD_BYTES:
        headers |= {"X-Linked-ETag": f'"{sha256(content)}"', "X-Linked-Size": str(len(content))}
    return headers


def _locate(path: str, query: dict[str, list[str]]) -> tuple[str, str | None, str]:
    """Which repository is asked for, which file of it, and else which list."""
    words = path.strip("/").split("/")
    if words[:3] == ["api", "v1", "models"]:
        repository, rest = "/".join(words[3:5]), words[5:]
        if rest == ["repo"]:
            return repository, query["FilePath"][0], ""
        return repository, None, "files" if rest == ["repo", "files"] else "model"
    if words[:2] == ["api", "models"]:
        return "/".join(words[2:4]), None, "tree" if words[4:5] == ["tree"] else "info"
    if path.startswith(STORE):
        return "/".join(words[1:3]), "/".join(words[3:]), ""
    if words[2:3] == ["resolve"]:
        return "/".join(words[:2]), "/".join(words[4:]), ""
    return path, None, "info"


def _range(header: str | None, size: int) -> tuple[int, int]:
    if header is None:
        return 0, size - 1
    first, _, last = header.removeprefix("bytes=").partition("-")
    return int(first), min(int(last), size - 1) if last else size - 1


def sha256(content: bytes) -> str:
    """The hash of a large file."""
    return hashlib.sha256(content).hexdigest()


def git_sha1(content: bytes) -> str:
    """The hash git gives to a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
