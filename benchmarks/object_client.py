"""Read objects with obstore alone: every byte once, in REQUESTS concurrent requests of BYTES each.

python benchmarks/object_client.py REQUESTS BYTES [--send s3://bucket/key] s3://bucket/key ...

With --send, it uploads an object as large as the last of the others at the same time, in parts.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import obstore
from obstore.store import S3Store

#: Bytes of an uploaded part, and concurrent parts.
PART, SENT_AT_ONCE = 8 << 20, 8


@cache
def bucket(name: str) -> Any:
    """A bucket, with settings from the environment."""
    return S3Store(name, client_options={"allow_http": True})


def bucket_and_key(url: str) -> tuple[str, str]:
    """The bucket and the key of a URL."""
    name, _, key = url.removeprefix("s3://").partition("/")
    return name, key


def read(urls: list[str], requests: int, size: int) -> int:
    """Read all objects; returns the number of bytes."""

    def one(name: str, key: str, start: int, end: int) -> int:
        return len(obstore.get(bucket(name), key, options={"range": (start, end)}).bytes())

    ranges = [
        (name, key, start, min(start + size, whole))
        for name, key in map(bucket_and_key, urls)
        for whole in (size_of(name, key),)
        for start in range(0, whole, size)
    ]
    with ThreadPoolExecutor(requests) as threads:
        return sum(threads.map(one, *zip(*ranges, strict=True)))


def size_of(name: str, key: str) -> int:
    """The size of an object in bytes."""
    return int(obstore.head(bucket(name), key)["size"])


def send(url: str, size: int) -> None:
    """Upload an object of ``size`` bytes."""

    def parts() -> Iterator[bytearray]:
        for start in range(0, size, PART):
            yield bytearray(min(PART, size - start))

    name, key = bucket_and_key(url)
    obstore.put(bucket(name), key, parts(), use_multipart=True, chunk_size=PART, max_concurrency=SENT_AT_ONCE)


def main() -> None:
    """Run the client; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("requests", type=int)
    parser.add_argument("bytes", type=int)
    parser.add_argument("--send")
    parser.add_argument("urls", nargs="+")
    options = parser.parse_args()
    with ThreadPoolExecutor(1) as sending:
        if options.send:
            sending.submit(send, options.send, size_of(*bucket_and_key(options.urls[-1])))
        print(read(options.urls, options.requests, options.bytes))


if __name__ == "__main__":
    main()
