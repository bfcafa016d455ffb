"""What is large goes over connections of our own: as the libraries would send it, or through them after all."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from email.message import Message
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Said, make_model
from stores import BUCKET, S3, Asked, Web, prove
from test_storage import large, same_but_for_names

from modelfuse.storage import Url, place_of
from modelfuse.storage.remote import open_store, s3_signing, uploads
from modelfuse.storage.remote.connections import Lines, Odd, Refused, Request, is_proxied
from modelfuse.storage.remote.errors import Cut, Replaced
from modelfuse.storage.remote.http_exchange import receive
from modelfuse.storage.remote.range_cache import RUN, Ranges
from modelfuse.storage.remote.s3_and_http import LEAST, MOST_ODD, S3Store
from modelfuse.storage.url import Entry, Version

Run = Callable[..., Said]


@pytest.fixture
def by_library(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The large ranges and the parts that go through the library; parts as zero, and their numbers."""
    seen: list[tuple[int, int]] = []
    read = S3Store._by_library

    async def recorded(self: S3Store, url: Url, entry: Entry, start: int, end: int) -> Any:
        if LEAST <= end - start < entry.size:
            seen.append((start, end))
        return await read(self, url, entry, start, end)

    monkeypatch.setattr(S3Store, "_by_library", recorded)
    return seen


@pytest.fixture
def parts_by_library(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The parts that are sent through the library."""
    import s3fs

    seen: list[int] = []
    call = s3fs.S3FileSystem._call_s3

    async def recorded(self: Any, method: str, *words: Any, **options: Any) -> Any:
        sent = await call(self, method, *words, **options)
        if method == "upload_part":
            seen.append(options["PartNumber"])
        return sent

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", recorded)
    return seen


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two models of 15 MB, whose outputs have several parts."""
    monkeypatch.setattr(uploads, "PART", 5 << 20)
    return [make_model(tmp_path / name, large(seed, 11)) for seed, name in enumerate("AB")]


def odd(url: str) -> dict[str, int]:
    place = place_of(url)
    assert isinstance(place, Url)
    store = open_store.store_of(place)
    assert isinstance(store, S3Store)
    return dict(store._odd)


# --- S3 ------------------------------------------------------------------------------------------------------------


def test_what_is_large_goes_past_the_library(
    merge: Run, s3: S3, models: list[Path], by_library: list[Any], parts_by_library: list[int], tmp_path: Path
) -> None:
    urls = [s3.put(path, path.name) for path in models]
    merge("--model_path_list", *models, "--output_path", tmp_path / "local")
    merge("--model_path_list", *urls, "--output_path", "s3://bucket/out")
    assert s3.objects("out")["model.safetensors"] == (tmp_path / "local" / "model.safetensors").read_bytes()
    assert (by_library, parts_by_library, odd(urls[0])) == ([], [], {})


@pytest.fixture
def secure(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """The same over TLS, with a certificate that nobody trusts yet."""
    (tmp_path / "proof").mkdir()
    server = S3(proof=prove(tmp_path / "proof"))
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.endpoint)
    yield server
    open_store.forget(connections=True)
    server.stop()


def test_tls(
    merge: Run,
    refuse: Callable[..., str],
    secure: S3,
    models: list[Path],
    by_library: list[Any],
    parts_by_library: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    urls = [secure.put(path, path.name) for path in models]
    words = ("--model_path_list", *urls, "--output_path")
    refuse("merge", *words, tmp_path / "out", says=[urls[0], "CERTIFICATE_VERIFY_FAILED"])
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "proof" / "certificate"))
    open_store.forget(connections=True)
    merge("--model_path_list", *models, "--output_path", tmp_path / "local")
    merge(*words, "s3://bucket/out")
    assert secure.objects("out")["model.safetensors"] == (tmp_path / "local" / "model.safetensors").read_bytes()
    assert (by_library, parts_by_library, odd(urls[0])) == ([], [], {})


def test_who_wants_no_proof_reads_through_the_library(
    merge: Run, secure: S3, models: list[Path], by_library: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    urls = [secure.put(path, path.name) for path in models]
    monkeypatch.setitem(fsspec.config.conf, "s3", {"client_kwargs": {"verify": False}})
    open_store.forget(connections=True)
    merge("--model_path_list", *models, "--output_path", tmp_path / "local")
    merge("--model_path_list", *urls, "--output_path", tmp_path / "remote")
    same_but_for_names(tmp_path / "local", tmp_path / "remote")
    assert by_library


def test_what_is_odd_goes_through_the_library(merge: Run, s3: S3, models: list[Path], tmp_path: Path) -> None:
    urls = [s3.put(path, path.name) for path in models]
    numbers, seen, lock = count(), set[tuple[str, str | None]](), threading.Lock()

    def fault(asked: Asked) -> int | None:
        """The first large ranges are refused once each, as by a store that wants every range signed."""
        if not asked.range or _length(asked) < LEAST:
            return None
        with lock:
            is_first = (asked.path, asked.range) not in seen
            seen.add((asked.path, asked.range))
            return 403 if is_first and next(numbers) < MOST_ODD else None

    s3.fault = fault
    merge("--model_path_list", *urls, "--output_path", tmp_path / "remote")
    s3.fault = lambda _: None
    assert odd(urls[0]) == {"reading": MOST_ODD}
    open_store.forget()
    assert odd(urls[0]) == {}
    merge("--model_path_list", *models, "--output_path", tmp_path / "local")
    same_but_for_names(tmp_path / "local", tmp_path / "remote")


def test_what_failed_once_goes_through_the_library(
    merge: Run, s3: S3, models: list[Path], by_library: list[Any], parts_by_library: list[int], tmp_path: Path
) -> None:
    urls = [s3.put(path, path.name) for path in models]
    seen, lock = set[object](), threading.Lock()

    def fault(asked: Asked) -> int | None:
        if not (asked.range and _length(asked) >= LEAST) and "partNumber" not in asked.query:
            return None
        with lock:
            is_first = (asked.path, asked.query, asked.range) not in seen
            seen.add((asked.path, asked.query, asked.range))
            return 503 if is_first else None

    s3.fault = fault
    merge("--model_path_list", *urls, "--output_path", "s3://bucket/out")
    s3.fault = lambda _: None
    assert len(by_library) + len(parts_by_library) == len(seen)
    assert odd(urls[0]) == {}
    merge("--model_path_list", *models, "--output_path", tmp_path / "local")
    assert s3.objects("out")["model.safetensors"] == (tmp_path / "local" / "model.safetensors").read_bytes()


def stored(s3: S3, model: Path) -> tuple[Url, S3Store, Entry]:
    """The weights of a model in a bucket, where they are, and what the store says of them."""
    url = place_of(s3.put(model, "A") + "/model.safetensors")
    assert isinstance(url, Url)
    store = open_store.store_of(url)
    assert isinstance(store, S3Store)
    entry = store.entry(url)
    assert entry is not None
    return url, store, entry


def test_one_signature_serves_for_all_ranges_of_a_version(s3: S3, models: list[Path]) -> None:
    url, store, entry = stored(s3, models[0])

    def request() -> Request:
        return store.submit(store._request(url, entry)).result()

    first = request()
    assert first is request()
    assert first.url == f"{s3.endpoint}/{BUCKET}/A/model.safetensors"
    assert first.headers["If-Match"] == entry.version
    assert "Credential=key/" in first.headers["Authorization"]
    assert "if-match" in first.headers["Authorization"]
    assert "range" not in first.headers["Authorization"]
    store._signer._reading = {
        key: (at - s3_signing.SECONDS - 1, old) for key, (at, old) in store._signer._reading.items()
    }
    assert first is not request()


def test_a_proxy_is_left_to_the_library(s3: S3, models: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    url, store, entry = stored(s3, models[0])
    with monkeypatch.context() as environment:
        environment.setenv("HTTP_PROXY", "http://127.0.0.1:1")
        environment.setenv("no_proxy", "127.0.0.1")
        assert store.submit(store._request(url, entry)).result().url == f"{s3.endpoint}/bucket/A/model.safetensors"
        open_store.forget()
        environment.setenv("no_proxy", "")
        with pytest.raises(Odd, match="proxy"):
            store.submit(store._request(url, entry)).result()
        assert not is_proxied("https://127.0.0.1/")


def test_what_headers_say(s3: S3) -> None:
    url = place_of("s3://bucket/A")
    assert isinstance(url, Url)
    store = open_store.store_of(url)
    assert isinstance(store, S3Store)
    entry = Entry(5, '"one"', 0)

    def check(**headers: str) -> None:
        message = Message()
        for name, value in headers.items():
            message[name.replace("_", "-")] = value
        store._check(entry, message)

    check(etag='"one"', x_amz_checksum_crc32="abc-2", x_amz_checksum_type="FULL_OBJECT")
    check()
    with pytest.raises(Replaced):
        check(etag='"two"')
    with pytest.raises(Odd, match="checksum"):
        check(etag='"one"', x_amz_checksum_crc64nvme="abc=")


def _length(asked: Asked) -> int:
    first, last = str(asked.range).removeprefix("bytes=").split("-")
    return int(last) - int(first) + 1


# --- a web server --------------------------------------------------------------------------------------------------


def test_a_web_server_is_asked_over_few_connections(merge: Run, web: Web, tmp_path: Path) -> None:
    paths = [make_model(tmp_path / "web" / name, large(seed, 20)) for seed, name in enumerate("AB")]
    merge("--model_path_list", *paths, "--output_path", tmp_path / "local")
    merge("--model_path_list", f"{web.url}/A", f"{web.url}/B", "--output_path", tmp_path / "remote")
    same_but_for_names(tmp_path / "local", tmp_path / "remote")
    ours = [each for each, headers in zip(web.asked, web.headers, strict=True)
            if each.range and "User-Agent" not in headers]  # fmt: skip
    assert sum(map(_length, ours)) > 40_000_000


# --- connections ---------------------------------------------------------------------------------------------------


class Answering:
    """A server that gives each connection one answer, and then does as a test says.

    Args:
        answer: What it sends.
        goes_on: Whether it leaves the connection open.
    """

    def __init__(self, answer: bytes, goes_on: bool = False) -> None:
        self._answer, self._goes_on = answer, goes_on
        self.requests, self.left = list[bytes](), threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/file"
        self.request = Request("GET", url, {"If-Match": "one"}, None, 5.0, 30.0)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                self.requests.append(connection.recv(10_000))
                connection.sendall(self._answer)
                if self._goes_on:
                    connection.settimeout(20)
                    if not connection.recv(1):
                        self.left.set()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(20)


@pytest.fixture
def answering() -> Iterator[Callable[..., Answering]]:
    servers: list[Answering] = []

    def start(*words: Any, **options: Any) -> Answering:
        servers.append(Answering(*words, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def lines() -> Iterator[Lines]:
    ours = Lines()
    yield ours
    ours.close()


def answer(body: bytes, count: int | None = None, status: int = 206, place: str = "bytes 2-6/10") -> bytes:
    head = (
        f"HTTP/1.1 {status} Said\r\ncontent-range: {place}\r\nContent-Length: {len(body) if count is None else count}"
    )
    return head.encode() + b"\r\n\r\n" + body


def received(lines: Lines, request: Request, check: Any = lambda _: None) -> bytes:
    return bytes(asyncio.run(receive(lines, request, 2, 7, check)))


def test_a_connection_that_was_closed_meanwhile(lines: Lines, answering: Callable[..., Answering]) -> None:
    server = answering(answer(b"hello"))
    for number in range(1, 4):
        assert received(lines, server.request) == b"hello"
        assert len(server.requests) == number
    assert b"GET /file HTTP/1.1" in server.requests[0]
    assert b"Range: bytes=2-6\r\n" in server.requests[0]
    assert b"If-Match: one\r\n" in server.requests[0]


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        (answer(b"hel", 5), Cut),
        (b"", Cut),
        (answer(b"", status=503), Refused),
        (answer(b"", status=403), Odd),
        (answer(b"hello", status=200), Odd),
        (answer(b"hello", place="bytes 0-4/10"), Odd),
        (answer(b"hello", place=""), Odd),
        (answer(b"hello!"), Odd),
        (answer(b"hello").replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n"), Odd),
        (b"no HTTP at all\r\n\r\n", Cut),
    ],
)
def test_an_answer_that_is_none(
    lines: Lines, answering: Callable[..., Answering], said: bytes, kind: type[Exception]
) -> None:
    server = answering(said)
    with pytest.raises(kind):
        received(lines, server.request)
    assert lines._idle == {}


def test_headers_are_looked_at_first(lines: Lines, answering: Callable[..., Answering]) -> None:
    server = answering(answer(b"", 5))

    def check(headers: Message) -> None:
        assert headers["Content-Range"] == "bytes 2-6/10"
        raise Replaced

    with pytest.raises(Replaced):
        received(lines, server.request, check)


def test_nobody_there(lines: Lines, answering: Callable[..., Answering]) -> None:
    server = answering(b"")
    server.close()
    server._listener = socket.socket()
    with pytest.raises(Odd):
        received(lines, server.request)
    server._listener.bind(("127.0.0.1", 0))
    server._listener.listen()


def test_nothing_comes(lines: Lines, answering: Callable[..., Answering]) -> None:
    server = answering(answer(b"hel", 5), goes_on=True)
    request = server.request
    with pytest.raises(TimeoutError):
        received(lines, Request("GET", request.url, request.headers, None, 5.0, 0.1))
    assert server.left.wait(10)


def test_what_is_given_up_is_cut_off(lines: Lines, answering: Callable[..., Answering]) -> None:
    server = answering(answer(b"hel", 5), goes_on=True)

    async def give_up() -> None:
        task = asyncio.create_task(receive(lines, server.request, 2, 7, lambda _: None))
        while not server.requests:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(give_up())
    assert server.left.wait(10)


def test_threads_end_with_their_connections(answering: Callable[..., Answering]) -> None:
    lines, server = Lines(), answering(answer(b"hello"))
    before = set(threading.enumerate())
    assert received(lines, server.request) == b"hello"
    ours = set(threading.enumerate()) - before
    assert [each.name for each in ours] == ["line"]
    lines.close()
    for each in ours:
        each.join(10)
        assert not each.is_alive()


# --- ranges --------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(s3: S3, tmp_path: Path) -> tuple[Version, bytes]:
    """A file of some runs."""
    (tmp_path / "in").mkdir()
    content = np.random.default_rng(0).bytes(6 * RUN)
    (tmp_path / "in" / "file").write_bytes(content)
    url = place_of(s3.put(tmp_path / "in", "in") + "/file")
    assert isinstance(url, Url)
    entry = open_store.store_of(url).entry(url)
    assert entry is not None
    s3.asked.clear()
    return Version(url, entry), content


def test_what_is_read_after_it_was_refused_is_fetched_as_a_whole(s3: S3, file: tuple[Version, bytes]) -> None:
    version, content = file
    ranges = Ranges()
    ranges.room = 4 * RUN
    assert ranges.expect(version, 0, 2 * RUN)
    assert not ranges.expect(version, 2 * RUN, RUN)
    for start in range(2 * RUN, 3 * RUN, RUN // 8):
        buffer = bytearray(RUN // 8)
        ranges.read(version, start, memoryview(buffer))
        assert buffer == content[start : start + len(buffer)]
    ranges.forget()
    assert sorted(_length(each) for each in s3.asked) == [RUN, RUN, RUN]


def test_what_is_on_its_way_needs_no_room(s3: S3, file: tuple[Version, bytes]) -> None:
    version, _ = file
    ranges = Ranges()
    ranges.room = 4 * RUN
    assert ranges.expect(version, 0, 2 * RUN)
    assert ranges.expect(version, RUN // 2, RUN)
    assert ranges.expect(version, 0, 2 * RUN)
    assert not ranges.expect(version, RUN, 2 * RUN)
    buffer = bytearray(2 * RUN)
    ranges.read(version, 0, memoryview(buffer))
    ranges.forget()
    assert [_length(each) for each in s3.asked] == [RUN, RUN]
