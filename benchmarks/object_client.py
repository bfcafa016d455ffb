"""Reads objects with the client library alone: every byte once, so many ranges of so many bytes at a time.

python benchmarks/object_client.py REQUESTS BYTES [--send s3://bucket/key] s3://bucket/key ...

With --send, it meanwhile sends an object as large as the last of the others, by parts.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import obstore
from obstore.store import S3Store

#: Bytes of a part that is sent, and parts on their way.
PART, SENT_AT_ONCE = 8 << 20, 8


@cache
def bucket(name: str) -> Any:
    """A bucket, as the environment says."""
    return S3Store(name, client_options={"allow_http": True})


def place(url: str) -> tuple[str, str]:
    """The bucket and the key of a URL."""
    name, _, key = url.removeprefix("s3://").partition("/")
    return name, key


def read(urls: list[str], requests: int, size: int) -> int:
    """Read all objects; the number of bytes."""

    def one(name: str, key: str, start: int, end: int) -> int:
        return len(obstore.get(bucket(name), key, options={"range": (start, end)}).bytes())

    ranges = [
        (name, key, start, min(start + size, whole))
        for name, key in map(place, urls)
        for whole in (size_of(name, key),)
        for start in range(0, whole, size)
    ]
    with ThreadPoolExecutor(requests) as threads:
        return sum(threads.map(one, *zip(*ranges, strict=True)))


def size_of(name: str, key: str) -> int:
    """The bytes of an object."""
    return int(obstore.head(bucket(name), key)["size"])


def send(url: str, size: int) -> None:
    """Send an object of so many bytes."""

    def parts() -> Iterator[bytearray]:
        for start in range(0, size, PART):
            yield bytearray(min(PART, size - start))

    name, key = place(url)
    obstore.put(bucket(name), key, parts(), use_multipart=True, chunk_size=PART, max_concurrency=SENT_AT_ONCE)


def main() -> None:
    """As the module says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("requests", type=int)
    parser.add_argument("bytes", type=int)
    parser.add_argument("--send")
    parser.add_argument("urls", nargs="+")
    options = parser.parse_args()
    with ThreadPoolExecutor(1) as sending:
        if options.send:
            sending.submit(send, options.send, size_of(*place(options.urls[-1])))
        print(read(options.urls, options.requests, options.bytes))


if __name__ == "__main__":
    main()
