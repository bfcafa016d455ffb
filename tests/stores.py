"""Local stores: moto's S3, and a web server with range requests, both with faults that tests choose."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

BUCKET = "bucket"
AUTHORIZATION = "AWS4-HMAC-SHA256 Credential=key/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
#: Environment variables with the credentials of S3.
ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1",
               "AWS_EC2_METADATA_DISABLED": "true"}  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """A request: method, path, query, and the headers Range and If-Match, if there are any."""

    method: str
    path: str
    query: str
    range: str | None
    condition: str | None = None

    @property
    def is_upload(self) -> bool:
        return self.method in ("PUT", "POST") and "delete" not in self.query


Headers = dict[str, str]
#: Replaces the headers of an answer.
Twist = Callable[[Asked, Headers], Headers]
#: Gives the status of an error for a request; None: a normal answer.
Fault = Callable[[Asked], int | None]
#: Instead of a status: the request is executed, but answered with an error.
LOST = -1


def length_of(asked: Asked) -> int:
    """The number of bytes of a request's range."""
    first, last = str(asked.range).removeprefix("bytes=").split("-")
    return int(last) - int(first) + 1


class _Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log(self, *_: object) -> None:
        pass


@dataclass
class S3:
    """moto's S3 with a log of requests.

    Attributes:
        asked: All requests, in order.
        fault: Chooses requests that fail.
        twist: Changes the headers of answers.
        delay: Seconds before each answer.
        most: The largest number of concurrent requests.
        proof: The files of a certificate and its key, for TLS.
    """

    asked: list[Asked] = field(default_factory=list)
    fault: Fault = lambda _: None
    twist: Twist = lambda _, headers: headers
    delay: float = 0.0
    most: int = 0
    proof: tuple[str, str] | None = None
    #: Whether requests without a signature are accepted.
    trusts: bool = False

    def __post_init__(self) -> None:
        self._application = DomainDispatcherApplication(create_backend_app)
        self._lock, self._now = threading.Lock(), 0
        self._server = make_server(
            "127.0.0.1", 0, self._answer, threaded=True, request_handler=_Quiet, ssl_context=self.proof
        )
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.endpoint = f"{'https' if self.proof else 'http'}://127.0.0.1:{self._server.server_port}"

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _answer(self, environ: dict[str, Any], start: Any) -> Any:
        asked = Asked(
            environ["REQUEST_METHOD"],
            environ["PATH_INFO"],
            environ["QUERY_STRING"],
            environ.get("HTTP_RANGE"),
            environ.get("HTTP_IF_MATCH"),
        )

        def begin(status: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
            return start(
                status, list(self.twist(asked, {name.title(): value for name, value in headers}).items()), *rest
            )

        with self._lock:
            self.asked.append(asked)
            self._now += 1
            self.most = max(self.most, self._now)
        if self.trusts and not environ.get("HTTP_AUTHORIZATION", "").startswith("AWS4"):
            environ["HTTP_AUTHORIZATION"] = AUTHORIZATION
        try:
            if self.delay:
                time.sleep(self.delay)
            status = self.fault(asked)
            if status is None:
                return self._application(environ, begin)
            if status == LOST:
                b"".join(self._application(environ, lambda *_: None))
                status = 500
            else:
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            code = {403: "AccessDenied", 500: "InternalError", 503: "SlowDown"}[status]
            body = f"<Error><Code>{code}</Code><Message>as the test asks</Message></Error>".encode()
            start(f"{status} {code}", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
            return [body]
        finally:
            with self._lock:
                self._now -= 1

    @property
    def client(self) -> Any:
        """A client of boto3."""
        import boto3  # type: ignore[import-untyped]

        keys = {"aws_access_key_id": "key", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
        return boto3.client("s3", endpoint_url=self.endpoint, verify=self.proof and self.proof[0], **keys)

    @contextmanager
    def speaking(self) -> Iterator[Any]:
        client = self.client
        try:
            yield client
        finally:
            client.close()

    def put(self, folder: Path, prefix: str) -> str:
        """Upload a folder; returns its URL."""
        with self.speaking() as client:
            for path in sorted(folder.rglob("*")):
                if path.is_file():
                    client.put_object(Bucket=BUCKET, Key=f"{prefix}/{path.relative_to(folder)}", Body=path.read_bytes())
        return f"s3://{BUCKET}/{prefix}"

    def objects(self, prefix: str = "") -> dict[str, bytes]:
        """The contents of all objects with a prefix, by their names without it."""
        with self.speaking() as client:
            found = client.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
            keys = [each["Key"] for each in found]
            return {
                key.removeprefix(f"{prefix}/"): client.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in keys
            }

    def uploads(self) -> list[str]:
        """The names of unfinished multipart uploads."""
        with self.speaking() as client:
            return [each["Key"] for each in client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])]

    def reset(self) -> None:
        """Remove all objects, uploads and faults."""
        self.trusts = False
        self.fault, self.twist, self.delay = (lambda _: None), (lambda _, headers: headers), 0.0
        with self.speaking() as client:
            for upload in client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", []):
                client.abort_multipart_upload(Bucket=BUCKET, Key=upload["Key"], UploadId=upload["UploadId"])
            for each in client.list_objects_v2(Bucket=BUCKET).get("Contents", []):
                client.delete_object(Bucket=BUCKET, Key=each["Key"])
        self.asked.clear()
        self.most = 0


def prove(folder: Path) -> tuple[str, str]:
    """Write a self-signed certificate for 127.0.0.1 and its key; returns their paths."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    now = datetime.now(UTC)
    names = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + timedelta(days=1))
        .add_extension(names, critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "certificate").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return str(folder / "certificate"), str(folder / "key")


class Web:
    """A web server of a folder.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.ranges, self.asked = folder, True, list[Asked]()
        self.headers: list[Mapping[str, str]] = []
        self.fault: Fault = lambda _: None
        self.twist: Twist = lambda _, headers: headers
        #: Chooses answers that are truncated; whether bytes are sent one by one; bytes that follow the content.
        self.cut: Callable[[Asked], bool] = lambda _: False
        self.trickles, self.more = False, b""
        web = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                web._answer(self)

            do_HEAD = do_GET

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        path, _, query = handler.path.partition("?")
        asked = Asked(handler.command, path, query, handler.headers.get("Range"))
        self.asked.append(asked)
        self.headers.append({name.title(): value for name, value in handler.headers.items()})
        file = self.folder / path.lstrip("/")
        status = self.fault(asked) or (200 if file.is_file() else 404)
        content = file.read_bytes() if status == 200 else b""
        tag = f'"{hash(content)}"'
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", asked.range or "") if self.ranges else None
        if found and status == 200:
            whole, status = len(content), 206
            content = content[int(found[1]) : int(found[2]) + 1] + self.more
        headers = {"ETag": tag, "Content-Length": str(len(content))}
        if found and status == 206:
            headers["Content-Range"] = f"bytes {found[1]}-{found[2]}/{whole}"
        handler.send_response(status)
        for name, value in self.twist(asked, headers).items():
            handler.send_header(name, value)
        handler.end_headers()
        if asked.method == "GET":
            self._send(handler, asked, content)

    def _send(self, handler: BaseHTTPRequestHandler, asked: Asked, content: bytes) -> None:
        if self.cut(asked):
            handler.wfile.write(content[: len(content) // 2])
            handler.close_connection = True
            return
        try:
            for offset in range(len(content)) if self.trickles else ():
                handler.wfile.write(content[offset : offset + 1])
                time.sleep(0.05)
            if not self.trickles:
                handler.wfile.write(content)
        except ConnectionError:
            handler.close_connection = True
