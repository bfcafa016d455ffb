"""Reads objects with the client library alone: every byte once, so many ranges of so many bytes at a time.

python benchmarks/object_client.py REQUESTS BYTES s3://bucket/key ...
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import s3fs


async def read(fs: Any, urls: list[str], requests: int, size: int) -> int:
    """Read all objects; the number of bytes."""
    free = asyncio.Semaphore(requests)

    async def one(url: str, start: int, end: int) -> int:
        async with free:
            return len(await fs._cat_file(url, start=start, end=end))

    wholes = [(url, (await fs._info(url))["size"]) for url in urls]
    ranges = [(url, start, min(start + size, whole)) for url, whole in wholes for start in range(0, whole, size)]
    return sum(await asyncio.gather(*(one(*each) for each in ranges)))


async def main(requests: int, size: int, urls: list[str]) -> None:
    """As the module says."""
    fs = s3fs.S3FileSystem(asynchronous=True, config_kwargs={"max_pool_connections": requests})
    session = await fs.set_session()
    print(await read(fs, urls, requests, size))
    await session.close()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
