"""Stores that can be asked for a range of one version of an object: S3, and web servers."""

from __future__ import annotations

import asyncio
import functools
import io
import weakref
from abc import abstractmethod
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping
from email.message import Message
from http.client import HTTPResponse
from typing import Any

import numpy as np

from modelfuse.storage.remote.connections import Lines, Odd, Request
from modelfuse.storage.remote.errors import Cut, Replaced, Unranged, answer
from modelfuse.storage.remote.http_exchange import exchange, look_at, receive
from modelfuse.storage.remote.s3_signing import Signer
from modelfuse.storage.remote.stores import Content, Store
from modelfuse.storage.url import Entry, Url

#: What is looked for on a server that lists nothing: weights, and what serves them.
KNOWN = (
    *(f"{stem}{suffix}{index}"
      for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin"), ("model_state", ".pdparams"),
                           ("master_weights", ".safetensors"), ("master_weights", ".bin"),
                           ("master_weights", ".pdparams"), ("adapter_model", ".safetensors"),
                           ("adapter_model", ".bin"), ("peft_model", ".safetensors"),
                           ("lora_model_state", ".pdparams"), ("diffusion_pytorch_model", ".safetensors"),
                           ("diffusion_pytorch_model", ".bin"))
      for index in ("", ".index.json")),
    "adapter_config.json", "lora_config.json", "config.json", "generation_config.json", "tokenizer.json",
    "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json", "preprocessor_config.json",
    "processor_config.json", "video_preprocessor_config.json", "spiece.model", "sentencepiece.bpe.model",
    "merge_config.json", "merge_report.json",
)  # fmt: skip
#: How long a web server may take to answer at all, and to go on.
CONNECT_SECONDS, READ_SECONDS = 10.0, 30.0
#: The most bytes of an answer that are looked at together.
CHUNK = 1 << 20
#: The least bytes of a range that is received here; how often that may be odd before it is left to the libraries.
LEAST, MOST_ODD = 1 << 20, 3
#: Where S3 says what the bytes of an answer add up to.
CHECKSUMS = {f"x-amz-checksum-{name}" for name in ("crc32", "crc32c", "crc64nvme", "sha1", "sha256")}
#: How the names end of what is a file and no folder.
FILES = (".safetensors", ".bin", ".pdparams", ".json")


class RangedStore(Store):
    """Receives large ranges itself, unless they are odd; all others, and all that failed once, through the library."""

    def __init__(self, fs: Any) -> None:
        super().__init__(fs)
        self._lines, self._odd = Lines(), Counter[str]()
        weakref.finalize(self, self._lines.close)

    def forget(self) -> None:
        super().forget()
        self._odd.clear()

    async def _range(self, url: Url, entry: Entry, start: int, end: int, attempt: int) -> Content:
        is_whole = end - start == entry.size  # Comes with a checksum, which the library compares.
        if attempt == 0 and end - start >= LEAST and not is_whole and self._odd["reading"] < MOST_ODD:
            try:
                request = await self._request(url, entry)
                return await receive(self._lines, request, start, end, functools.partial(self._check, entry))
            except Odd:
                self._odd["reading"] += 1
        return await self._by_library(url, entry, start, end)

    @abstractmethod
    async def _request(self, url: Url, entry: Entry) -> Request:
        """How the library would ask for a file; Odd if that is not known."""

    @abstractmethod
    def _check(self, entry: Entry, headers: Message) -> None:
        """Raise Replaced if an answer is of another version, Odd if there is anything about it for the library."""

    @abstractmethod
    async def _by_library(self, url: Url, entry: Entry, start: int, end: int) -> Content:
        """A range, through the library."""


class S3Store(RangedStore):
    """S3, and all that speaks as it does."""

    def __init__(self, fs: Any) -> None:
        super().__init__(fs)
        fs.retries = 1
        self._signer = Signer(fs)

    def forget(self) -> None:
        super().forget()
        self._signer.forget()

    async def _request(self, url: Url, entry: Entry) -> Request:
        bucket, key, _ = self.fs.split_path(self.address(url))
        return await self._signer.reading(bucket, key, entry)

    def _check(self, entry: Entry, headers: Message) -> None:
        if headers.get("ETag", entry.version) != entry.version:
            raise Replaced
        if any(name.lower() in CHECKSUMS and "-" not in value for name, value in headers.items()):
            raise Odd("a checksum")

    async def _list(self, folder: Url) -> dict[str, Entry | None]:
        return self.entries(self.address(folder), await self.fs._lsdir(self.address(folder), refresh=True))

    async def _by_library(self, url: Url, entry: Entry, start: int, end: int) -> Content:
        bucket, key, _ = self.fs.split_path(self.address(url))
        found = await self.fs._call_s3(
            "get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{end - 1}", IfMatch=entry.version
        )
        async with found["Body"] as body:
            if found.get("ETag", entry.version) != entry.version:  # Not every store knows conditions.
                raise Replaced
            return await _received(body.iter_chunks(CHUNK), end - start)

    async def send_part(self, attempt: int, body: bytearray, **options: Any) -> str:
        """Send a part of an upload, with the options of the client's method; its tag."""
        if attempt == 0 and self._odd["sending"] < MOST_ODD:
            try:
                request = await self._signer.prepared("upload_part", Body=body, **options)
                return await exchange(self._lines, request, _tag)
            except Odd:
                self._odd["sending"] += 1
        sent = await self.fs._call_s3("upload_part", Body=io.BytesIO(body), **options)
        return str(sent["ETag"])

    def _is_wrong(self, error: BaseException) -> bool:
        return answer(error)[1] == "NoSuchBucket"


class HttpStore(RangedStore):
    """A web server, which lists nothing."""

    lists = False

    def __init__(self, fs: Any) -> None:
        super().__init__(fs)
        self._others: dict[str, set[str]] = {}

    def forget(self) -> None:
        super().forget()
        self._others.clear()

    def address(self, url: Url) -> str:
        return url.address

    async def _list(self, folder: Url) -> dict[str, Entry | None]:
        return {} if folder.path.endswith(FILES) else await self._all(folder, KNOWN)

    def entry(self, url: Url) -> Entry | None:
        if url.name not in KNOWN:
            self.look_up(url.parent, [url.name])
        return super().entry(url)

    def look_up(self, folder: Url, names: Iterable[str]) -> None:
        with self._lock:
            listing, asked = self._listings.get(str(folder)), self._asked(folder)
            wanted = [name for name in names if name not in asked]
        if listing is None or not wanted:
            return
        found = self.wait(folder, self._all(folder, wanted))
        with self._lock:
            listing.update(found)
            asked.update(wanted)

    def _asked(self, folder: Url) -> set[str]:
        return self._others.setdefault(str(folder), set(KNOWN))

    async def _all(self, folder: Url, names: Iterable[str]) -> dict[str, Entry | None]:
        names = list(names)
        asked = (self.attempt(functools.partial(self._ask, folder / name)) for name in names)
        found = await asyncio.gather(*asked)
        return {name: entry for name, entry in zip(names, found, strict=True) if entry is not None}

    async def _session(self) -> tuple[Any, dict[str, Any]]:
        """aiohttp's session, and what every request is made with."""
        import aiohttp

        patience = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
        options = {"allow_redirects": True, "timeout": patience, **self.fs.kwargs}
        # What is compressed on its way has another size, and no ranges of the file.
        options["headers"] = {"Accept-Encoding": "identity", **options.get("headers", {})}
        return await self.fs.set_session(), options

    async def _ask(self, url: Url) -> Entry | None:
        session, options = await self._session()
        address = self.fs.encode_url(url.address)
        async with session.head(address, **options) as response:
            if response.status in (404, 410):
                return None
            if response.status not in (403, 405, 501):
                response.raise_for_status()
                if "Content-Length" in response.headers:
                    return _entry(response.headers, int(response.headers["Content-Length"]))
        # Servers that sign addresses allow one method only; a byte tells the size, too.
        options["headers"]["Range"] = "bytes=0-0"
        async with session.get(address, **options) as response:
            if response.status in (404, 410):
                return None
            response.raise_for_status()
            whole = response.headers.get("Content-Range", "").rpartition("/")[2]
            if response.status != 206 or not whole.isdigit():
                raise Unranged
            return _entry(response.headers, int(whole))

    async def _request(self, url: Url, entry: Entry) -> Request:
        if self.fs.kwargs or self.fs.client_kwargs or url.user or url.scheme == "https":
            raise Odd("settings that are the library's")
        headers = {"Accept-Encoding": "identity"}
        return Request("GET", str(self.fs.encode_url(url.address)), headers, None, CONNECT_SECONDS, READ_SECONDS)

    def _check(self, entry: Entry, headers: Mapping[str, str] | Message) -> None:
        whole = headers.get("Content-Range", "").rpartition("/")[2]
        if _entry(headers, int(whole) if whole.isdigit() else entry.size) != entry:
            raise Replaced

    async def _by_library(self, url: Url, entry: Entry, start: int, end: int) -> Content:
        session, options = await self._session()
        options["headers"]["Range"] = f"bytes={start}-{end - 1}"
        async with session.get(self.fs.encode_url(url.address), **options) as response:
            response.raise_for_status()
            if response.status != 206:
                raise Unranged
            self._check(entry, response.headers)
            return await _received(response.content.iter_chunked(CHUNK), end - start)


def _tag(response: HTTPResponse) -> str:
    """What S3 calls a part that it has taken."""
    look_at(response, 200)
    tag = response.getheader("ETag")
    if not tag or response.read():
        raise Odd("no tag")
    return tag


async def _received(chunks: AsyncIterator[bytes], count: int) -> Content:
    """What comes, put where it is to lie at once: aiohttp would copy it once more to hand it over as one."""
    content, position = np.empty(count, np.uint8), 0
    async for chunk in chunks:
        end = position + len(chunk)
        if end > count:
            raise Cut(f"more than {count:,} bytes came")
        content[position:end] = np.frombuffer(chunk, np.uint8)
        position = end
    return content[:position].data


def _entry(headers: Mapping[str, str] | Message, size: int) -> Entry:
    return Store.entry_of({"size": size, "ETag": headers.get("ETag"), "Last-Modified": headers.get("Last-Modified")})
