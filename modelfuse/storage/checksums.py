"""A checksum of a tensor whose parts may be added in any order.

XXH3-128 (https://github.com/Cyan4973/xxHash) of every block of 256 KiB, then of the blocks' digests: it does not depend
on slices, and several workers can verify one tensor.
"""

from __future__ import annotations

import numpy as np
import xxhash

BLOCK_BYTES = 1 << 18
#: Its name in the report.
ALGORITHM = "xxh3-128 of the xxh3-128 of every 256 KiB"
_DIGEST_BYTES = 16


class Checksum:
    """The checksum of ``nbytes`` bytes."""

    __slots__ = ("_digests",)

    def __init__(self, nbytes: int) -> None:
        self._digests = bytearray(-(-nbytes // BLOCK_BYTES) * _DIGEST_BYTES)

    def update(self, offset: int, data: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> None:
        """Add the bytes at ``offset``, which must be the start of a block; thread-safe."""
        for start in range(0, data.size, BLOCK_BYTES):
            at = _digest_offset(offset + start)
            digest = xxhash.xxh3_128_digest(data[start : start + BLOCK_BYTES].data)
            self._digests[at : at + _DIGEST_BYTES] = digest

    @property
    def digests(self) -> bytes:
        """The digests of all blocks, for :meth:`restore`."""
        return bytes(self._digests)

    def restore(self, offset: int, digests: bytes) -> None:
        """Add the digests of another checksum's bytes, which are at ``offset``, the start of a block."""
        at = _digest_offset(offset)
        self._digests[at : at + len(digests)] = digests

    def hexdigest(self) -> str:
        """The checksum, once all bytes were added."""
        return xxhash.xxh3_128_hexdigest(bytes(self._digests))


def _digest_offset(offset: int) -> int:
    return offset // BLOCK_BYTES * _DIGEST_BYTES
