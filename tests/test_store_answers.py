"""What stores answer: taken only if it is the answer to the question. What passes is tried again, nothing else is."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import Said, call, make_model, random_tensors
from stores import S3, Headers, Web, length_of, prove
from test_storage import large, same_but_for_names

import modelfuse as package
from modelfuse.errors import CheckpointError
from modelfuse.storage import Url, named_hosts, path_or_url
from modelfuse.storage.remote import open_store, stores, uploads
from modelfuse.storage.remote.range_cache import RUN, Ranges
from modelfuse.storage.url import Version

Run = Callable[..., Said]


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two models of 15 MB, whose outputs have several parts."""
    monkeypatch.setattr(uploads, "PART", 5 << 20)
    return [make_model(tmp_path / name, large(seed, 11)) for seed, name in enumerate("AB")]


# --- answers that are not to the question --------------------------------------------------------------------------


def shifted(headers: Headers) -> Headers:
    """As if the bytes before were sent."""
    first, last = headers["Content-Range"].removeprefix("bytes ").partition("/")[0].split("-")
    whole = headers["Content-Range"].rpartition("/")[2]
    return {**headers, "Content-Range": f"bytes {int(first) - 1}-{int(last) - 1}/{whole}"}


def unnamed(headers: Headers) -> Headers:
    return {name: value for name, value in headers.items() if name != "Content-Range"}


def encoded(headers: Headers) -> Headers:
    return {**headers, "Content-Encoding": "gzip"}


LIES = {"another range": (shifted, "sent another range"), "no range": (unnamed, "sent a range without Content-Range"),
        "encoded": (encoded, "sent encoded bytes")}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_an_answer_that_is_none_of_s3(
    refuse: Callable[..., str], s3: S3, models: list[Path], tmp_path: Path, lie: str
) -> None:
    urls = [s3.put(path, path.name) for path in models]
    twist, says = LIES[lie]
    s3.twist = lambda asked, headers: twist(headers) if asked.range and length_of(asked) > 1 << 20 else headers
    words = ("merge", "--model_path_list", *urls, "--output_path", tmp_path / "out")
    refuse(*words, says=[urls[0][:-1], "model.safetensors", "wrong answer", says])


@pytest.mark.parametrize("lie", LIES)
def test_an_answer_that_is_none_of_a_web_server(refuse: Callable[..., str], web: Web, tmp_path: Path, lie: str) -> None:
    for seed, name in enumerate("AB"):
        make_model(tmp_path / "web" / name, large(seed, 11))
    twist, says = LIES[lie]
    web.twist = lambda asked, headers: twist(headers) if asked.range and length_of(asked) > 1 << 20 else headers
    words = ("merge", "--model_path_list", f"{web.url}/A", f"{web.url}/B", "--output_path", tmp_path / "out")
    refuse(*words, says=[web.url, "model.safetensors", "wrong answer", says])


def test_more_bytes_than_were_asked_for(web: Web, tmp_path: Path) -> None:
    make_model(tmp_path / "web" / "A", random_tensors(1))
    web.more = b"!"
    with pytest.raises(CheckpointError, match=r"A/model.safetensors: .*sent more bytes than were requested"):
        package.check(model_path_list=[f"{web.url}/A", f"{web.url}/A"])


def test_a_body_that_is_cut_is_tried_again(
    merge: Run, refuse: Callable[..., str], web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "PAUSE", 0.01)
    paths = [make_model(tmp_path / "web" / name, large(seed, 11)) for seed, name in enumerate("AB")]
    words = ("--model_path_list", f"{web.url}/A", f"{web.url}/B", "--output_path")
    merge("--model_path_list", *paths, "--output_path", tmp_path / "local")
    web.cut = lambda asked: asked.range is not None and web.asked.count(asked) == 1
    merge(*words, tmp_path / "remote")
    same_but_for_names(tmp_path / "local", tmp_path / "remote")
    web.cut = lambda asked: asked.range is not None
    refuse("merge", *words, tmp_path / "out", says=["closed the connection before all bytes came"], hint="Try again")


def test_a_body_that_trickles_is_given_up(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "SECONDS", 1.0)
    make_model(tmp_path / "web" / "A", random_tensors(1))
    web.trickles = True
    begun = time.monotonic()
    with pytest.raises(CheckpointError, match="did not answer in time"):
        package.check(model_path_list=[f"{web.url}/A", f"{web.url}/A"])
    assert time.monotonic() - begun < 20


# --- certificates --------------------------------------------------------------------------------------------------


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
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    urls = [secure.put(path, path.name) for path in models]
    words = ("--model_path_list", *urls, "--output_path")
    refuse("merge", *words, tmp_path / "out", says=[urls[0], "certificate is refused"], hint="AWS_CA_BUNDLE")
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "proof" / "certificate"))
    open_store.forget(connections=True)
    merge("--model_path_list", *models, "--output_path", tmp_path / "local")
    with secure.speaking() as client:  # Of a merge that was killed, which is looked for over TLS, too.
        client.create_multipart_upload(Bucket="bucket", Key="out/model.safetensors")
    merge(*words, "s3://bucket/out")
    assert secure.objects("out")["model.safetensors"] == (tmp_path / "local" / "model.safetensors").read_bytes()
    assert secure.uploads() == []


def test_who_wants_no_proof(
    merge: Run, secure: S3, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = [secure.put(path, path.name) for path in models]
    monkeypatch.setenv("FSSPEC_S3", '{"client_kwargs": {"verify": false}}')
    open_store.forget(connections=True)
    merge("--model_path_list", *models, "--output_path", tmp_path / "local")
    merge("--model_path_list", *urls, "--output_path", tmp_path / "remote")
    same_but_for_names(tmp_path / "local", tmp_path / "remote")


def test_a_certificate_that_is_refused_is_refused_at_once(refuse: Callable[..., str], tmp_path: Path) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*prove(tmp_path))
    connections: list[str] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connections.append("one")
            try:
                context.wrap_socket(connection, server_side=True).close()
            except OSError:
                connection.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    url = f"https://127.0.0.1:{listener.getsockname()[1]}"
    words = ("merge", "--model_path_list", f"{url}/A", f"{url}/B", "--output_path", tmp_path / "out")
    refuse(*words, says=[url, "certificate is refused"], hint="SSL_CERT_FILE")
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(20)
    assert 1 <= len(connections) <= 4  # For each model one, and perhaps another name of it.


# --- secrets -------------------------------------------------------------------------------------------------------

SECRETS = ("hunter2", "5ecret", "me:", "fr4gment", "t0ken")


def refused_without_secrets(refuse: Callable[..., str], *words: object, says: str) -> None:
    said = refuse("merge", *words, says=[says])
    assert not [secret for secret in SECRETS if secret in said], said


@pytest.mark.parametrize("way", ["circle", "refused", "nobody", "broken", "garbage"])
def test_no_secret_of_a_url_is_in_an_error(
    refuse: Callable[..., str], web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(stores, "PAUSE", 0.01)
    host = web.url.removeprefix("http://")
    says = ""
    if way == "circle":
        web.twist = lambda asked, headers: {**headers, "Location": f"{asked.path}?5ecret=1"}
        web.fault, says = (lambda _: 302), "redirects"
    elif way == "refused":
        host, says = "127.0.0.1:1", "cannot be reached"
    elif way == "nobody":
        host, says = "nobody.invalid", "cannot be reached"
    elif way == "broken":
        web.fault, says = (lambda _: 500), "status 500"
    else:
        web.fault, says = (lambda _: 999), "status 999"
    for address in (f"http://me:hunter2@{host}/A", f"http://me:hunter2@{host}/A?sig=5ecret#fr4gment"):
        refused_without_secrets(
            refuse, "--model_path_list", address, address, "--output_path", tmp_path / "o", says=says
        )


def test_no_secret_of_another_store_is_in_an_error(refuse: Callable[..., str], tmp_path: Path) -> None:
    address = "ftp://me:hunter2@127.0.0.1:1/A"
    says = "ftp://127.0.0.1:1/A"
    refused_without_secrets(refuse, "--model_path_list", address, address, "--output_path", tmp_path / "o", says=says)


def test_what_is_secret_does_not_follow_to_another_server(
    refuse: Callable[..., str], web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    make_model(tmp_path / "other" / "A", random_tensors(1))
    other = Web(tmp_path / "other")
    try:
        web.twist = lambda asked, headers: {**headers, "Location": f"{other.url}{asked.path}"}
        web.fault = lambda _: 302
        # A header that is configured, and a password: the other server is asked, and sees neither.
        monkeypatch.setenv("FSSPEC_HTTP", '{"headers": {"Authorization": "Bearer t0ken", "Cookie": "t0ken"}}')
        for address in (f"{web.url}/A", f"{web.url.replace('://', '://me:hunter2@')}/A"):
            open_store.forget(connections=True)
            package.check(model_path_list=[address, address])
        assert any("Authorization" in headers for headers in web.headers)
        assert any("Bearer t0ken" in headers.values() for headers in web.headers)
        assert other.headers
        assert not [headers for headers in other.headers if {"Authorization", "Cookie"} & set(headers)]
        # A query: the other server would see it as the place where it was sent from.
        other.headers.clear()
        address = f"{web.url}/A/model.safetensors?sig=5ecret"
        words = ("--model_path_list", address, address, "--output_path", tmp_path / "o")
        refused_without_secrets(refuse, *words, says=f"redirects to {other.url.removeprefix('http://')}")
        assert other.headers == []
        # Any other header would follow.
        monkeypatch.setenv("FSSPEC_HTTP", '{"headers": {"X-Key": "t0ken"}}')
        open_store.forget(connections=True)
        words = ("--model_path_list", f"{web.url}/A", f"{web.url}/A", "--output_path", tmp_path / "o")
        refused_without_secrets(refuse, *words, says="The header X-Key")
    finally:
        other.stop()


def test_headers_go_to_servers_that_the_user_names(
    modelfuse: Run, web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(named_hosts, "_NAMED", set())
    monkeypatch.setenv("FSSPEC_HTTP", '{"headers": {"Authorization": "Bearer t0ken"}}')
    make_model(tmp_path / "web" / "A", random_tensors(1))
    (tmp_path / "recipe.yaml").write_text(f"model_path_list: ['{web.url}/A', '{web.url}/A']\n")
    assert modelfuse("check", tmp_path / "recipe.yaml").status == 0
    assert web.headers
    assert not [headers for headers in web.headers if "Authorization" in headers]
    open_store.forget(connections=True)
    assert modelfuse("check", "--model_path_list", f"{web.url}/A", f"{web.url}/A").status == 0
    assert [headers for headers in web.headers if "Authorization" in headers]


def test_only_full_asks_the_stores_of_a_report(merge: Run, modelfuse: Run, web: Web, tmp_path: Path) -> None:
    for seed, name in enumerate("AB"):
        make_model(tmp_path / "web" / name, random_tensors(seed))
    merge("--model_path_list", f"{web.url}/A", f"{web.url}/B", "--output_path", tmp_path / "out")
    web.asked.clear()
    said = modelfuse("verify", tmp_path / "out")
    assert (said.status, web.asked) == (0, [])
    assert "only --full accesses" in said.out
    said = modelfuse("verify", tmp_path / "out", "--full")
    assert said.status == 0, said.err
    assert web.asked
    assert f"Reading inputs from {web.url}" in said.out + said.err


# --- the end of a process ------------------------------------------------------------------------------------------


def test_a_process_ends_as_it_should(s3: S3, tmp_path: Path) -> None:
    """Threads of a library that come back while the interpreter ends would abort it."""
    urls = [s3.put(make_model(tmp_path / name, random_tensors(seed)), name) for seed, name in enumerate("AB")]
    for number in range(4):
        words = ["merge", "--model_path_list", *urls, "--output_path", f"s3://bucket/out{number}", "--quiet"]
        code = f"import modelfuse.cli.main as cli; assert cli.main({words!r}) == 0"
        said = call(code=code)
        assert (said.status, said.err) == (0, "")


# --- ranges --------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(s3: S3, tmp_path: Path) -> tuple[Version, bytes]:
    """A file of some runs."""
    (tmp_path / "in").mkdir()
    content = np.random.default_rng(0).bytes(6 * RUN)
    (tmp_path / "in" / "file").write_bytes(content)
    url = path_or_url(s3.put(tmp_path / "in", "in") + "/file")
    assert isinstance(url, Url)
    entry = open_store.store_of(url).entry(url)
    assert entry is not None
    s3.asked.clear()
    return Version(url, entry), content


def test_what_is_read_after_it_was_refused_is_fetched_as_a_whole(s3: S3, file: tuple[Version, bytes]) -> None:
    version, content = file
    ranges = Ranges()
    ranges.capacity = 4 * RUN
    assert ranges.expect(version, 0, 2 * RUN)
    assert not ranges.expect(version, 2 * RUN, RUN)
    for start in range(2 * RUN, 3 * RUN, RUN // 8):
        buffer = bytearray(RUN // 8)
        ranges.read(version, start, memoryview(buffer))
        assert buffer == content[start : start + len(buffer)]
    wait_for_all(ranges)
    assert sorted(length_of(each) for each in s3.asked) == [RUN, RUN, RUN]


def test_what_is_on_its_way_needs_no_room(s3: S3, file: tuple[Version, bytes]) -> None:
    version, _ = file
    ranges = Ranges()
    ranges.capacity = 4 * RUN
    assert ranges.expect(version, 0, 2 * RUN)
    assert ranges.expect(version, RUN // 2, RUN)
    assert ranges.expect(version, 0, 2 * RUN)
    assert not ranges.expect(version, RUN, 2 * RUN)
    buffer = bytearray(2 * RUN)
    ranges.read(version, 0, memoryview(buffer))
    wait_for_all(ranges)
    assert [length_of(each) for each in s3.asked] == [RUN, RUN]


def wait_for_all(ranges: Ranges) -> None:
    for run in list(ranges._runs):
        run.content.result()
    ranges.forget()


def test_every_range_is_asked_for_on_the_condition_of_its_version(s3: S3, file: tuple[Version, bytes]) -> None:
    version, content = file
    buffer = bytearray(100)
    Ranges().read(version, 1000, memoryview(buffer))
    assert buffer == content[1000:1100]
    assert [each.condition for each in s3.asked] == [version.entry.version]
