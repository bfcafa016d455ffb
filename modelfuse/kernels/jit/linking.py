"""Link machine code to a shared library, which the system can load without llvmlite (whose import takes 30 ms).

Needs Linux and a linker; otherwise the object file is kept.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from pathlib import Path

#: The field of an ELF header with the file's type, and the type of shared libraries.
_KIND, _SHARED = slice(16, 18), 3
#: Objects for LLVM's JIT have text relocations, hence notext.
_LINK = ("ld", "-shared", "-z", "notext", "-z", "noexecstack")
#: Time limit of the linker in seconds.
_PATIENCE = 20.0


def is_library(code: bytes) -> bool:
    """Whether machine code is a shared library."""
    return code.startswith(b"\x7fELF") and int.from_bytes(code[_KIND], sys.byteorder) == _SHARED


def link(code: bytes, symbol: str) -> bytes:
    """Link an object file to a shared library that this system can load; the object file if that fails."""
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
    """Load a shared library from memory: a file may change, or be on a filesystem that is mounted noexec.

    Raises:
        OSError: If the system cannot load it.
        AttributeError: If the system has no memfd_create.
    """
    # Never closed: the loader identifies libraries by path, and the descriptor's path must stay unique.
    descriptor = os.memfd_create("modelfuse")
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(code)
        return ctypes.CDLL(f"/proc/self/fd/{descriptor}")
    except OSError:
        os.close(descriptor)
        raise
