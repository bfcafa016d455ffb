"""A server with the part of Azure's blob storage that a merge needs: lists, conditional ranges, uploads in blocks."""

from __future__ import annotations

import base64
import contextlib
import re
import threading
from collections.abc import Callable
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote
from xml.sax.saxutils import escape

ACCOUNT, BOX = "devstoreaccount1", "box"
MODIFIED = "Wed, 21 Oct 2015 07:28:00 GMT"


class Azure:
    """A container.

    Attributes:
        blobs: The contents of blobs, by name.
        conditions: The If-Match headers of all requests.
        fails: Whether a request fails, by its path and query.
    """

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.conditions: list[str] = []
        self.fails: Callable[[str, str], bool] = lambda path, query: False
        self._blocks: dict[tuple[str, str], bytes] = {}
        azure = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                azure._answer(self)

            do_HEAD = do_PUT = do_DELETE = do_POST = do_GET

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.environment = {
            "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": base64.b64encode(b"key").decode(),
            "AZURE_STORAGE_ENDPOINT": f"http://127.0.0.1:{self._server.server_port}/{ACCOUNT}",
        }

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def put(self, folder: Path, prefix: str) -> str:
        """Upload a folder; returns its URL."""
        for path in folder.rglob("*"):
            if path.is_file():
                self.blobs[f"{prefix}/{path.relative_to(folder)}"] = path.read_bytes()
        return f"az://{BOX}/{prefix}"

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        path, _, query = handler.path.partition("?")
        name = unquote(path).removeprefix(f"/{ACCOUNT}/").removeprefix(BOX).strip("/")
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        status, headers, content = self._do(handler, name, parse_qs(query, keep_blank_values=True), body)
        if self.fails(path, query):
            status, headers, content = 403, {}, b"<Error><Code>AuthorizationFailure</Code></Error>"
        handler.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            handler.send_header(key, value)
        handler.end_headers()
        if handler.command != "HEAD":
            with contextlib.suppress(ConnectionError):
                handler.wfile.write(content)

    def _do(
        self, handler: BaseHTTPRequestHandler, name: str, query: dict[str, list[str]], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        known = {"ETag": '"none"', "Last-Modified": MODIFIED, "x-ms-request-id": "1", "x-ms-version": "2023-11-03"}
        if handler.command == "PUT":
            if query.get("comp") == ["block"]:
                self._blocks[name, query["blockid"][0]] = body
            elif query.get("comp") == ["blocklist"]:
                numbers = re.findall(r"<(?:Uncommitted|Latest)>(.*?)</", body.decode())
                self.blobs[name] = b"".join(self._blocks[name, number] for number in numbers)
            else:
                self.blobs[name] = body
            return 201, known, b""
        if query.get("comp") == ["batch"]:
            return 202, {"Content-Type": "multipart/mixed; boundary=b"}, self._remove(body.decode())
        if query.get("comp") == ["list"]:
            return 200, {"Content-Type": "application/xml"}, self._list(query.get("prefix", [""])[0])
        if name not in self.blobs:
            return 404, {}, b"<Error><Code>BlobNotFound</Code></Error>"
        if handler.command == "DELETE":
            del self.blobs[name]
            return 202, {}, b""
        content = self.blobs[name]
        known["ETag"] = f'"{_tag(content)}"'
        if condition := handler.headers.get("If-Match"):
            self.conditions.append(condition)
            if condition != known["ETag"]:
                return 412, {}, b""
        found = re.fullmatch(
            r"bytes=(\d+)-(\d+)", handler.headers.get("x-ms-range") or handler.headers.get("Range") or ""
        )
        if not found:
            return 200, known, content
        first, last = int(found[1]), min(int(found[2]), len(content) - 1)
        known["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return 206, known, content[first : last + 1]

    def _remove(self, body: str) -> bytes:
        """Answer a batch of DELETE requests."""
        answers = []
        for number, name in enumerate(re.findall(rf"DELETE /(?:{ACCOUNT}/)?{BOX}/(\S+)", body)):
            status = "202 Accepted" if self.blobs.pop(unquote(name), None) is not None else "404 BlobNotFound"
            head = f"--b\r\nContent-Type: application/http\r\nContent-ID: {number}\r\n\r\nHTTP/1.1 {status}\r\n"
            answers.append(f"{head}x-ms-request-id: 1\r\n\r\n")
        return f"{''.join(answers)}--b--\r\n".encode()

    def _list(self, prefix: str) -> bytes:
        found, folders = [], set()
        for name, content in sorted(self.blobs.items()):
            rest = name.removeprefix(prefix)
            if not name.startswith(prefix):
                continue
            if "/" in rest:
                folders.add(f"{prefix}{rest.partition('/')[0]}/")
                continue
            found.append(
                f"<Blob><Name>{escape(name)}</Name><Properties><Last-Modified>{MODIFIED}</Last-Modified>"
                f"<Etag>{_tag(content)}</Etag><Content-Length>{len(content)}</Content-Length>"
                "<Content-Type>application/octet-stream</Content-Type></Properties></Blob>"
            )
        found += [f"<BlobPrefix><Name>{escape(each)}</Name></BlobPrefix>" for each in sorted(folders)]
        return (
            '<?xml version="1.0" encoding="utf-8"?><EnumerationResults><Blobs>'
            f"{''.join(found)}</Blobs><NextMarker/></EnumerationResults>"
        ).encode()


def _tag(content: bytes) -> str:
    """The version of a blob, as in listings; headers have it in quotation marks."""
    return f"0x{md5(content).hexdigest()[:16].upper()}"
