"""A checksum that parts of a tensor can be given to in any order.

XXH3-128 (https://github.com/Cyan4973/xxHash) of every block of 256 KiB, then of all the blocks' digests: it
does not depend on slices, and verifying can be shared among workers.
"""

from __future__ import annotations

import numpy as np
import xxhash

BLOCK_BYTES = 1 << 18
#: How the report names it.
ALGORITHM = "xxh3-128 of the xxh3-128 of every 256 KiB"
_DIGEST_BYTES = 16


class Checksum:
    """The checksum of ``nbytes`` bytes."""

    __slots__ = ("_digests",)

    def __init__(self, nbytes: int) -> None:
        self._digests = bytearray(-(-nbytes // BLOCK_BYTES) * _DIGEST_BYTES)

    def update(self, offset: int, data: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> None:
        """Add the bytes from ``offset`` on, which starts a block; safe from any thread."""
        for start in range(0, data.size, BLOCK_BYTES):
            place = _place(offset + start)
            digest = xxhash.xxh3_128_digest(data[start : start + BLOCK_BYTES].data)
            self._digests[place : place + _DIGEST_BYTES] = digest

    @property
    def digests(self) -> bytes:
        """What all bytes have come to; for :meth:`restore`."""
        return bytes(self._digests)

    def restore(self, offset: int, digests: bytes) -> None:
        """Add bytes that were added to a checksum of their own; ``offset`` starts a block."""
        self._digests[_place(offset) : _place(offset) + len(digests)] = digests

    def hexdigest(self) -> str:
        """The checksum, once all bytes were added."""
        return xxhash.xxh3_128_hexdigest(bytes(self._digests))


def _place(offset: int) -> int:
    return offset // BLOCK_BYTES * _DIGEST_BYTES
