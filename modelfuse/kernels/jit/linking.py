"""Machine code as a shared library, which the system loads by itself in no time; LLVM takes 30 ms to be loaded.

Made where there is a linker, on Linux. Elsewhere an object file stays one.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from pathlib import Path

#: Where an ELF file says what it is, and that it is a shared library.
_KIND, _SHARED = slice(16, 18), 3
#: Objects that LLVM makes for itself have addresses in their code, which are filled in when they are loaded.
_LINK = ("ld", "-shared", "-z", "notext", "-z", "noexecstack")
#: What a slow machine's linker takes at most, in seconds.
_PATIENCE = 20.0


def is_library(code: bytes) -> bool:
    """Whether machine code is a shared library."""
    return code.startswith(b"\x7fELF") and int.from_bytes(code[_KIND], sys.byteorder) == _SHARED


def link(code: bytes, symbol: str) -> bytes:
    """An object file as a shared library that this system loads; as it was, if that cannot be had."""
    from subprocess import DEVNULL, SubprocessError, run
    from tempfile import TemporaryDirectory

    with contextlib.suppress(OSError, SubprocessError, AttributeError), TemporaryDirectory() as folder:
        one, other = Path(folder, "kernel.o"), Path(folder, "kernel.so")
        one.write_bytes(code)
        run([*_LINK, "-o", other, one], check=True, timeout=_PATIENCE, stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL)
        library = other.read_bytes()
        if is_library(library) and hasattr(load_library(library), symbol):
            return library
    return code


def load_library(code: bytes) -> ctypes.CDLL:
    """Load a shared library from memory: a file of it may change, or lie where nothing may be executed.

    Raises:
        OSError: If the system does not load it.
        AttributeError: If the system has no such files.
    """
    # Open as long as the process lives: the system takes libraries of one path for the same.
    descriptor = os.memfd_create("modelfuse")
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(code)
        return ctypes.CDLL(f"/proc/self/fd/{descriptor}")
    except OSError:
        os.close(descriptor)
        raise
