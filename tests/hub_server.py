"""A local hub with the part of the protocol that huggingface_hub needs to download and upload models."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

#: Requests for files of at least this size are redirected to another host.
SMALL = 1000
PIECE = 1 << 16


@dataclass
class Repository:
    """A model: its commits, each with all files, and the commits of branches and tags."""

    name: str
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        number = f"{self.name} {len(self.commits)} {sorted(files)}"
        sha = hashlib.sha1(number.encode()).hexdigest()
        self.commits[sha] = files
        self.refs[branch] = sha
        return sha


@dataclass(frozen=True)
class Asked:
    """A request."""

    method: str
    path: str
    headers: dict[str, str]


@dataclass
class Hub:
    """The server and its log.

    Attributes:
        asked: All requests.
        sent: The number of bytes sent of each file.
        status: The status of all answers; None: normal answers.
        before: Called with a file's name before its content is sent.
        ranges: Whether range requests are supported.
        token: The token that gives access to gated and private models.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)
    status: int | None = None
    before: Callable[[str], None] = lambda _: None
    ranges: bool = True
    token: str = "hf_right"
    blobs: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    port: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def add(self, name: str, folder: Path | None = None, files: Mapping[str, bytes] | None = None) -> Repository:
        """Publish a folder as a model."""
        repository = self.repositories.setdefault(name, Repository(name))
        found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in _all(folder)} if folder else {}
        repository.commit({**found, **(files or {})})
        return repository

    def fetched(self, name: str) -> set[str]:
        """The files of a model that were requested."""
        with self.lock:
            return {path.removeprefix(f"{name}/") for path in self.sent if path.startswith(f"{name}/")}


def _all(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


@contextmanager
def serving() -> Iterator[Hub]:
    """Run a hub while the context is active."""
    hub = Hub()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *words: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):
            self.answer()

    def do_POST(self) -> None:
        """Create a repository, a branch or a commit; a token is required."""
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.asked.append(Asked(self.command, path, {name.lower(): value for name, value in self.headers.items()}))
        if self.hub.status is not None:
            self.reply(self.hub.status)
        elif not self.is_let_in():
            self.refuse(401, "")
        elif path == "/api/repos/create":
            given = json.loads(body)
            name = f"{given['organization']}/{given['name']}"
            if name in self.hub.repositories:
                self.tell_json({"error": "exists", "url": f"{self.hub.endpoint}/{name}"}, 409)
                return
            repository = self.hub.repositories[name] = Repository(
                name, private="private" in (given.get("visibility"), given.get("private") and "private")
            )
            repository.commit({".gitattributes": b""})
            self.tell_json({"url": f"{self.hub.endpoint}/{name}"})
        elif path == "/api/validate-yaml":
            self.tell_json({"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/(.+)", path):
            files = [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                     for each in json.loads(body)["files"]]  # fmt: skip
            self.tell_json({"files": files})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/(.+)", path):
            repository = self.hub.repositories[match[1]]
            repository.refs[match[2]] = repository.refs["main"]
            self.tell_json({})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
            self.commit(self.hub.repositories[match[1]], match[2], body)
        else:
            self.refuse(404, "")

    def commit(self, repository: Repository, branch: str, body: bytes) -> None:
        files = dict(repository.commits[repository.refs[branch]])
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "deletedFile":
                files.pop(entry["value"]["path"])
        sha = repository.commit(files, branch)
        url = f"{self.hub.endpoint}/{repository.name}/commit/{sha}"
        self.tell_json({"success": True, "commitUrl": url, "commitOid": sha, "hookOutput": ""})

    def list_tree(self, name: str, revision: str) -> None:
        if found := self.find(name, revision):
            repository, sha = found
            self.tell_json([{"type": "file", "path": file, "size": len(content), "oid": _git(content)}
                            for file, content in repository.commits[sha].items()])  # fmt: skip

    def tell_json(self, answer: object, status: int = 200) -> None:
        self.reply(status, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        with self.hub.lock:
            headers = {name.lower(): value for name, value in self.headers.items()}
            self.hub.asked.append(Asked(self.command, path, headers))
        if self.hub.status is not None:
            self.reply(self.hub.status)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self.tell(match[1], match[2] or "main")
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/(.+)", path):
            self.list_tree(match[1], match[2])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([0-9a-f]{40}|[^/]+)/(.+)", path):
            self.resolve(match[1], match[2], match[3])
        elif match := re.fullmatch(r"/blobs/([0-9a-f]+)", path):
            name, content = self.hub.blobs[match[1]]
            self.content(name, content, {"ETag": f'"{match[1]}"'})
        else:
            self.refuse(404, "")

    def find(self, name: str, revision: str) -> tuple[Repository, str] | None:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self.is_let_in()):
            self.refuse(401, "RepoNotFound")
            return None
        sha = repository.refs.get(revision, revision)
        if sha not in repository.commits:
            self.refuse(404, "RevisionNotFound")
            return None
        return repository, sha

    def is_let_in(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def tell(self, name: str, revision: str) -> None:
        if found := self.find(name, revision):
            repository, sha = found
            siblings = [
                {"rfilename": file, "size": len(content), "blobId": _git(content)}
                for file, content in repository.commits[sha].items()
            ]
            answer = {"_id": "0" * 24, "id": name, "modelId": name, "sha": sha, "private": repository.private,
                      "gated": "manual" if repository.gated else False, "tags": [], "siblings": siblings,
                      "downloads": 0, "likes": 0}  # fmt: skip
            self.reply(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def resolve(self, name: str, revision: str, file: str) -> None:
        found = self.find(name, revision)
        if found is None:
            return
        repository, sha = found
        if repository.gated and not self.is_let_in():
            self.refuse(403, "GatedRepo")
            return
        content = repository.commits[sha].get(file)
        if content is None:
            self.refuse(404, "EntryNotFound", {"X-Repo-Commit": sha})
            return
        headers = {"X-Repo-Commit": sha, "ETag": f'"{_git(content)}"'}
        if len(content) < SMALL:
            self.content(f"{name}/{file}", content, headers)
            return
        blob = hashlib.sha256(content).hexdigest()
        self.hub.blobs[blob] = f"{name}/{file}", content
        # Another host, which must not receive the token.
        headers |= {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{blob}"',
                    "Location": f"http://localhost:{self.hub.port}/blobs/{blob}"}  # fmt: skip
        self.reply(302, b"", headers)

    def content(self, name: str, content: bytes, headers: dict[str, str]) -> None:
        part, status = content, 200
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if self.hub.ranges else None
        if match is not None:
            begin, end = int(match[1]), int(match[2] or len(content) - 1)
            part, status = content[begin : end + 1], 206
            headers["Content-Range"] = f"bytes {begin}-{begin + len(part) - 1}/{len(content)}"
        if self.command == "GET":
            with self.hub.lock:
                self.hub.sent.setdefault(name, 0)
            self.hub.before(name)
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(part))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            for start in range(0, len(part), PIECE):
                self.wfile.write(part[start : start + PIECE])
                with self.hub.lock:
                    self.hub.sent[name] += len(part[start : start + PIECE])

    def refuse(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self.reply(status, b"", {"X-Error-Code": code, "X-Error-Message": f"{code} it is", **(headers or {})})

    def reply(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _git(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
