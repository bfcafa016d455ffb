"""A FUSE file system that shows a folder's files with a given latency and bandwidth, like a remote server.

Every request is answered after a delay; the delays of concurrent requests overlap, and the bandwidth is shared. The
files should be in the page cache. It needs root and FUSE.

    python benchmarks/distant.py FOLDER MOUNT_POINT MILLISECONDS MEGABYTES_A_SECOND
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
import sys
import threading
import time
from pathlib import Path

THREADS = 64
MOST = 1 << 20
LOOKUP, FORGET, GETATTR, OPEN, READ, STATFS, RELEASE, INIT, OPENDIR, READDIR = 1, 2, 3, 14, 15, 17, 18, 26, 27, 28
RELEASEDIR, INTERRUPT, DESTROY, BATCH_FORGET = 29, 36, 38, 42
ASYNC_READ, MAX_PAGES, KEEP_CACHE = 1 << 0, 1 << 22, 1 << 1
#: Seconds for which the kernel may cache attributes.
VALID = 3600
_libc = ctypes.CDLL(None, use_errno=True)


class Server:
    """Answers the kernel's requests.

    Args:
        folder: The folder to show.
        device: The open descriptor of /dev/fuse.
        delay: Latency in seconds.
        speed: Total bandwidth in bytes per second; 0: unlimited.
    """

    def __init__(self, folder: Path, device: int, delay: float, speed: float) -> None:
        self._device, self._delay, self._speed = device, delay, speed
        self._paths, self._numbers = {1: folder}, {folder: 1}
        self._files: dict[int, int] = {}
        self._lock, self._free_at = threading.Lock(), 0.0

    def serve(self) -> None:
        """Answer requests until the file system is unmounted."""
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _work(self) -> None:
        request, data = bytearray(MOST + 4096), bytearray(MOST)
        while True:
            try:
                count = os.readv(self._device, [request])
            except OSError as error:
                if error.errno in (errno.EINTR, errno.ENOENT):
                    continue
                return
            _, code, unique, node = struct.unpack_from("<IIQQ", request)
            if code in (FORGET, BATCH_FORGET, INTERRUPT):
                continue
            try:
                answer, status = self._answer(code, node, bytes(request[40:count]), data), 0
            except OSError as error:
                answer, status = memoryview(b""), -(error.errno or errno.EIO)
            os.writev(self._device, [struct.pack("<IiQ", 16 + len(answer), status, unique), answer])
            if code == DESTROY:
                return

    def _answer(self, code: int, node: int, body: bytes, data: bytearray) -> memoryview:
        if code == READ:
            return self._read(node, body, data)
        answers = {INIT: self._init, LOOKUP: self._lookup, GETATTR: self._getattr, OPEN: self._open}
        answers |= {OPENDIR: self._open, READDIR: self._readdir}
        if code in answers:
            return memoryview(answers[code](node, body))
        if code in (RELEASE, RELEASEDIR, DESTROY):
            return memoryview(b"")
        if code == STATFS:
            return memoryview(bytes(80))
        raise OSError(errno.ENOSYS, "")

    def _init(self, node: int, body: bytes) -> bytes:
        major, minor, ahead, flags = struct.unpack_from("<IIII", body)
        flags &= ASYNC_READ | MAX_PAGES
        return struct.pack("<IIIIHHIIHHI28x", major, minor, ahead, flags, THREADS, THREADS, MOST, 1, MOST >> 12, 0, 0)

    def _lookup(self, node: int, body: bytes) -> bytes:
        path = self._paths[node] / os.fsdecode(body.rstrip(b"\0"))
        status = os.stat(path)
        with self._lock:
            number = self._numbers.setdefault(path, len(self._numbers) + 1)
            self._paths[number] = path
        return struct.pack("<QQQQII", number, 0, VALID, VALID, 0, 0) + _attributes(number, status)

    def _getattr(self, node: int, body: bytes) -> bytes:
        return struct.pack("<QII", VALID, 0, 0) + _attributes(node, os.stat(self._paths[node]))

    def _open(self, node: int, body: bytes) -> bytes:
        with self._lock:
            if node not in self._files:
                self._files[node] = os.open(self._paths[node], os.O_RDONLY)
        return struct.pack("<QII", self._files[node], KEEP_CACHE, 0)

    def _readdir(self, node: int, body: bytes) -> bytes:
        _, offset = struct.unpack_from("<QQ", body)
        answer = b""
        for number, entry in enumerate(() if offset else os.scandir(self._paths[node]), 1):
            name = os.fsencode(entry.name)
            kind = stat.S_IFDIR if entry.is_dir() else stat.S_IFREG
            answer += struct.pack("<QQII", number + 1, number, len(name), kind >> 12) + name + bytes(-len(name) % 8)
        return answer

    def _read(self, node: int, body: bytes, data: bytearray) -> memoryview:
        handle, offset, size = struct.unpack_from("<QQI", body)
        now = time.monotonic()
        due = now + self._delay
        if self._speed:
            with self._lock:
                self._free_at = max(self._free_at, now) + size / self._speed
                due = max(due, self._free_at)
        count = os.preadv(handle, [memoryview(data)[:size]], offset)
        time.sleep(max(due - time.monotonic(), 0))
        return memoryview(data)[:count]


def _attributes(number: int, status: os.stat_result) -> bytes:
    times = [each // 10**9 for each in (status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns)]
    parts = [each % 10**9 for each in (status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns)]
    rest = (status.st_mode, status.st_nlink, status.st_uid, status.st_gid, 0, 4096, 0)
    return struct.pack("<QQQQQQIIIIIIIIII", number, status.st_size, status.st_blocks, *times, *parts, *rest)


def main(folder: Path, point: Path, delay: float, speed: float) -> None:
    """Mount the file system and answer its requests."""
    device = os.open("/dev/fuse", os.O_RDWR)
    words = f"fd={device},rootmode={stat.S_IFDIR:o},user_id={os.getuid()},group_id={os.getgid()},max_read={MOST}"
    if _libc.mount(b"distant", os.fsencode(point), b"fuse.distant", 1, words.encode()):  # 1: MS_RDONLY.
        raise OSError(ctypes.get_errno(), "mount", str(point))
    Server(folder, device, delay, speed).serve()


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve(), float(sys.argv[3]) / 1e3, float(sys.argv[4]) * 1e6)
