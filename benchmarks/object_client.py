"""Reads objects with the client library alone: every byte once, so many ranges of so many bytes at a time.

python benchmarks/object_client.py REQUESTS BYTES s3://bucket/key ...
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import obstore
from obstore.store import S3Store


@cache
def bucket(name: str) -> Any:
    """A bucket, as the environment says."""
    return S3Store(name, client_options={"allow_http": True})


def read(urls: list[str], requests: int, size: int) -> int:
    """Read all objects; the number of bytes."""

    def one(name: str, key: str, start: int, end: int) -> int:
        return len(obstore.get(bucket(name), key, options={"range": (start, end)}).bytes())

    places = [url.removeprefix("s3://").partition("/") for url in urls]
    wholes = [(name, key, obstore.head(bucket(name), key)["size"]) for name, _, key in places]
    ranges = [
        (name, key, start, min(start + size, whole)) for name, key, whole in wholes for start in range(0, whole, size)
    ]
    with ThreadPoolExecutor(requests) as threads:
        return sum(threads.map(one, *zip(*ranges, strict=True)))


if __name__ == "__main__":
    print(read(sys.argv[3:], int(sys.argv[1]), int(sys.argv[2])))
