"""The part of S3 that a merge needs, with low processor load: files of a folder are sent by the kernel.

The folder's subfolders are buckets. Supported are listing, HEAD, conditional range reads, and uploads, whole or in
parts. Requests are not authenticated; for measurements only.

    python benchmarks/object_server.py FOLDER PORT [SECONDS [BYTES]]

SECONDS is the latency of every answer; BYTES is the bandwidth in bytes per second, which all answers share.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from xml.sax.saxutils import escape

from aiohttp import web

NAMESPACE = 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'
MODIFIED = "2026-01-01T00:00:00.000Z"
#: The folder of uploads in progress.
PARTS = ".parts"
#: Distance in bytes between parts whose final offset is unknown when they arrive: the largest part that S3 allows.
ELSEWHERE = 5 << 30
CHUNK = 1 << 20
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Parts:
    """An upload: a file in which each part has its final offset if all parts but the last are as long as the first.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sizes: dict[int, int] = {}
        self._first = 0
        self._offsets: dict[int, int] = {}
        path.touch()

    @contextmanager
    def open_part(self, number: int, size: int) -> Iterator[BinaryIO]:
        """The file at the offset for a part."""
        if number == 1:
            self._first = size
        fits = 0 < size <= self._first
        self._offsets[number] = (number - 1) * self._first if fits else number * ELSEWHERE
        with open(self.path, "r+b", buffering=0) as file:
            file.seek(self._offsets[number])
            yield file

    def become(self, path: Path) -> None:
        """Complete the upload: rename the file or, if parts are at other offsets, copy them in order."""
        numbers = sorted(self.sizes)
        ends = itertools.accumulate(self.sizes[number] for number in numbers)
        if all(self._offsets[each] + self.sizes[each] == end for each, end in zip(numbers, ends, strict=True)):
            os.replace(self.path, path)
            return
        with open(self.path, "rb") as file, open(path, "wb") as whole:
            for number in numbers:
                file.seek(self._offsets[number])
                whole.write(file.read(self.sizes[number]))
        self.path.unlink()


class ObjectServer:
    """Answers requests.

    Args:
        folder: The folder of the buckets.
        delay: Latency of every answer in seconds.
        bandwidth: Total bandwidth of downloads in bytes per second.
    """

    def __init__(self, folder: Path, delay: float = 0.0, bandwidth: float = math.inf) -> None:
        self._folder, self._delay, self._bandwidth = folder, delay, bandwidth
        #: The time at which all requested bytes will have been sent.
        self._free = 0.0
        self._numbers = itertools.count(1)
        self._under_way: dict[str, Parts] = {}

    def application(self) -> web.Application:
        """The application for aiohttp."""
        application = web.Application(client_max_size=1 << 30)
        application.router.add_route("*", "/{bucket}", self._answer)
        application.router.add_route("*", "/{bucket}/{key:.*}", self._answer)
        return application

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        if self._delay:
            await asyncio.sleep(self._delay)
        kind = f"{request.method} {','.join(sorted(request.query.keys() & {'uploads', 'uploadId', 'list-type'}))}"
        handlers: dict[str, Handler] = {
            "GET list-type": self._list,
            "GET uploads": self._uploads,
            "POST uploads": self._begin,
            "PUT uploadId": self._part,
            "POST uploadId": self._complete,
            "DELETE uploadId": self._abort,
            "PUT ": self._put,
            "DELETE ": self._delete,
        }
        return await handlers.get(kind, self._get)(request)

    def _path(self, request: web.Request) -> Path:
        path = self._folder / request.match_info["bucket"] / request.match_info.get("key", "")
        if ".." in path.parts:
            raise web.HTTPForbidden
        return path

    async def _get(self, request: web.Request) -> web.StreamResponse:
        path = self._path(request)
        if not path.is_file():
            raise web.HTTPNotFound
        if request.method == "GET":
            start, stop, _ = request.http_range.indices(path.stat().st_size)
            now = time.monotonic()
            self._free = max(self._free, now) + (stop - start) / self._bandwidth
            await asyncio.sleep(self._free - now)
        return web.FileResponse(path, chunk_size=CHUNK)

    async def _list(self, request: web.Request) -> web.StreamResponse:
        bucket, prefix = self._folder / request.match_info["bucket"], request.query.get("prefix", "")
        folder = bucket / prefix
        found = []
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            key = escape(f"{prefix}{path.name}")
            if path.is_dir():
                found.append(f"<CommonPrefixes><Prefix>{key}/</Prefix></CommonPrefixes>")
                continue
            status = path.stat()
            found.append(
                f"<Contents><Key>{key}</Key><LastModified>{MODIFIED}</LastModified><Size>{status.st_size}</Size>"
                f"<ETag>&quot;{status.st_mtime_ns:x}-{status.st_size:x}&quot;</ETag></Contents>"
            )
        return _xml("ListBucketResult", f"<IsTruncated>false</IsTruncated>{''.join(found)}")

    async def _uploads(self, request: web.Request) -> web.StreamResponse:
        return _xml("ListMultipartUploadsResult", "<IsTruncated>false</IsTruncated>")

    async def _begin(self, request: web.Request) -> web.StreamResponse:
        name = str(next(self._numbers))
        (self._folder / PARTS).mkdir(exist_ok=True)
        self._under_way[name] = Parts(self._folder / PARTS / name)
        return _xml("InitiateMultipartUploadResult", f"<UploadId>{name}</UploadId>")

    async def _part(self, request: web.Request) -> web.StreamResponse:
        parts, number = self._under_way[request.query["uploadId"]], int(request.query["partNumber"])
        with parts.open_part(number, request.content_length or 0) as file:
            parts.sizes[number] = await _receive(request, file)
        return web.Response(headers={"ETag": f'"{number}"'})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        self._path(request).parent.mkdir(parents=True, exist_ok=True)
        await asyncio.to_thread(self._under_way.pop(request.query["uploadId"]).become, self._path(request))
        return _xml("CompleteMultipartUploadResult", "<ETag>&quot;whole&quot;</ETag>")

    async def _abort(self, request: web.Request) -> web.StreamResponse:
        self._under_way.pop(request.query["uploadId"]).path.unlink()
        return web.Response(status=204)

    async def _put(self, request: web.Request) -> web.StreamResponse:
        self._path(request).parent.mkdir(parents=True, exist_ok=True)
        with open(self._path(request), "wb", buffering=0) as file:
            await _receive(request, file)
        return web.Response(headers={"ETag": '"whole"'})

    async def _delete(self, request: web.Request) -> web.StreamResponse:
        self._path(request).unlink(missing_ok=True)
        return web.Response(status=204)


async def _receive(request: web.Request, file: BinaryIO) -> int:
    """Write the body of a request, plain or in signed chunks; returns its size in bytes."""
    count = 0
    if "aws-chunked" in request.headers.get("Content-Encoding", ""):
        return file.write(b"".join(_chunks(await request.read())))
    async for piece in request.content.iter_any():
        count += file.write(piece)
    return count


def _chunks(body: bytes) -> list[bytes]:
    chunks: list[bytes] = []
    at = 0
    while True:
        end = body.index(b"\r\n", at)
        size = int(body[at:end].split(b";")[0], 16)
        if not size:
            return chunks
        chunks.append(body[end + 2 : end + 2 + size])
        at = end + 2 + size + 2


def _xml(root: str, content: str) -> web.Response:
    text = f'<?xml version="1.0" encoding="UTF-8"?><{root} {NAMESPACE}>{content}</{root}>'
    return web.Response(text=text, content_type="application/xml")


if __name__ == "__main__":
    server = ObjectServer(Path(sys.argv[1]), *map(float, sys.argv[3:]))
    web.run_app(server.application(), host="127.0.0.1", port=int(sys.argv[2]), print=None, access_log=None)
