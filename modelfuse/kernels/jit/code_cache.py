"""Cache of compiled kernels in files, callable without numba.

Importing numba takes 0.1 s, and loading its own cache more; llvmlite, on which it is built, loads a kernel's machine
code in a few milliseconds. So a kernel is stored as an object file whose entry point takes the arguments as an array of
64-bit words: address, shape and strides of arrays, and tuples flattened. If it can be linked to a shared library
(:mod:`modelfuse.kernels.jit.linking`), not even llvmlite is needed.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import pwd
import struct
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from modelfuse.kernels.jit.linking import is_library, load_library
from modelfuse.kernels.jit.private_files import FOLDER_MODE, private_folder, read_private, write_private

PACKAGE = Path(__file__).parent.parent.parent
#: Suffix of cache files; their names encode the kernel, argument types, processor and sources.
SUFFIX = ".kernel"
#: Array flags that numba specializes on: C-contiguous, aligned, writeable.
_FLAGS = 0x501
_WORDS = tuple(struct.Struct(f"{count}Q") for count in range(20))
_DOUBLE, _SINGLE = struct.Struct("d"), struct.Struct("f4x" if sys.byteorder == "little" else "4xf")
_DIGEST_BYTES = 16
#: Where Linux describes the processors, and the lines that machine code depends on.
CPU_INFO = Path("/proc/cpuinfo")
_TELLING = ("vendor_id", "cpu family", "model\t", "flags", "features", "cpu implementer", "cpu variant", "cpu part")
#: Conversions of a kernel's result, by the first byte of its file.
_RESULTS: dict[bytes, Callable[[int], Any]] = {b"n": lambda _: None, b"i": lambda word: word, b"b": bool}

#: The entry point of a kernel's machine code: takes the words of its arguments.
Entry = Callable[[bytes], Any]


class Prepared(NamedTuple):
    """An argument laid out once for many calls; it refers to the arrays, which must not be resized.

    Attributes:
        value: The argument.
        kind: Its type, as far as compilation depends on it.
        words: Its 64-bit words.
    """

    value: Any
    kind: str
    words: bytes

    def __reduce__(self) -> tuple[Callable[[Any], Prepared], tuple[Any]]:
        return prepare, (self.value,)  # Addresses differ in another process.


class NotLaidOut(TypeError):
    """An argument that cannot be laid out in words."""


def prepare(value: Any) -> Prepared:
    """Lay out an argument: a number, an array, or a tuple of these.

    Raises:
        NotLaidOut: If it is anything else.
    """
    kind = type(value)
    if kind is Prepared:
        prepared: Prepared = value
        return prepared
    if kind is np.ndarray:
        shape = value.shape
        flags = value.flags.num
        where = f"{value.dtype.str}{len(shape)}.{flags & (_FLAGS if flags & 1 else _FLAGS | 2)};"
        numbers = (0, 0, value.size, value.itemsize, value.__array_interface__["data"][0], *shape, *value.strides)
        return Prepared(value, where, _WORDS[len(numbers)].pack(*numbers))
    if kind is bool or kind is np.bool_:
        return Prepared(value, "b;", _WORDS[1].pack(bool(value)))
    if kind is int or kind is np.int64:
        return Prepared(value, "i;", _WORDS[1].pack(int(value) & 0xFFFFFFFFFFFFFFFF))
    if kind is np.uint64:
        return Prepared(value, "u;", _WORDS[1].pack(int(value)))
    if kind is float or kind is np.float64:
        return Prepared(value, "d;", _DOUBLE.pack(value))
    if kind is np.float32:
        return Prepared(value, "f;", _SINGLE.pack(value))
    if isinstance(value, tuple):
        parts = [prepare(each) for each in value]
        inner = "".join([part.kind for part in parts])
        make = getattr(kind, "_make", tuple)  # Some items may already be laid out.
        whole = make([part.value for part in parts])
        return Prepared(whole, f"{kind.__name__}({inner})", b"".join([part.words for part in parts]))
    raise NotLaidOut(f"{kind.__name__} cannot be laid out in words")


@cache
def engine() -> Any:
    """The llvmlite engine that holds the machine code of all kernels; initialized on first use."""
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_default_triple().create_target_machine(jit=True)
    return binding.create_mcjit_compiler(binding.parse_assembly(""), machine)


def load(content: bytes, symbol: str) -> Entry:
    """Load a kernel from its file's content; not thread-safe."""
    result_of, code = _RESULTS[content[:1]], content[1:]
    function = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_char_p, ctypes.c_void_p)
    run = function((symbol, load_library(code))) if is_library(code) else function(_address(code, symbol))

    def entry(words: bytes) -> Any:
        result = ctypes.c_int64()
        if run(words, ctypes.byref(result)):
            raise RuntimeError(f"{symbol} failed")
        return result_of(result.value)

    return entry


def _address(code: bytes, symbol: str) -> int:
    """Load an object file with llvmlite; returns the address of its entry point."""
    from llvmlite import binding

    engine().add_object_file(binding.ObjectFileRef.from_data(code))
    engine().finalize_object()
    address: int = engine().get_function_address(symbol)
    return address


def symbol_of(function: Callable[..., Any], kind: str) -> str:
    """The entry point's name of a kernel for arguments of this kind."""
    digest = hashlib.blake2b(kind.encode(), digest_size=8).hexdigest()
    return f"{function.__module__}.{function.__qualname__}-{digest}"


def find(symbol: str) -> bytes | None:
    """The content of an entry point's cache file, if it is intact and cannot have been written by another user."""
    for path in folders():
        with contextlib.suppress(OSError, ValueError), private_folder(path) as folder:
            content = read_private(folder, symbol + _key() + SUFFIX)
            if content[:_DIGEST_BYTES] == _digest(content[_DIGEST_BYTES:]):
                return content[_DIGEST_BYTES:]
    return None


def keep(symbol: str, content: bytes) -> None:
    """Write an entry point's cache file, if possible, and remove those made from older sources."""
    machine, _ = _key().rsplit("-", 1)
    name = symbol + _key() + SUFFIX
    for path in folders():
        with contextlib.suppress(OSError), private_folder(path, make=True) as folder:
            write_private(folder, name, _digest(content) + content)
            for old in os.listdir(folder):
                if old.startswith(f"{symbol}{machine}-") and old.endswith(SUFFIX) and old != name:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(old, dir_fd=folder)
            return


def kept_in() -> Path | None:
    """The cache folder; None if no folder can be written."""
    for path in folders():
        with contextlib.suppress(OSError), private_folder(path, make=True):
            return path
    return None


def folder_for_numba() -> Path | None:
    """The folder for numba's own cache: numba executes what it finds there, so it must be private to this user."""
    for path in (each / "numba" for each in folders()):
        with contextlib.suppress(OSError), private_folder(path, make=True) as folder:
            os.fchmod(folder, FOLDER_MODE)
            return path
    return None


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest()


def folders() -> Iterator[Path]:
    """Candidates for the cache folder: beside the sources, else in the user's home.

    With ``sudo -E``, HOME belongs to another user, whose files are not trusted; then root's home is used.
    """
    if given := os.environ.get("NUMBA_CACHE_DIR"):
        yield Path(given) / "modelfuse"
        return
    yield PACKAGE / "kernels" / "__pycache__" / "modelfuse"
    with contextlib.suppress(RuntimeError):  # There is no home.
        yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modelfuse"
    with contextlib.suppress(KeyError):  # There is no such user.
        yield Path(pwd.getpwuid(os.geteuid()).pw_dir, ".cache", "modelfuse")


def _processor() -> str:
    """The processor's features that machine code depends on; LLVM would know them, but is slow to load."""
    with contextlib.suppress(OSError), open(CPU_INFO, encoding="utf-8", errors="replace") as file:
        lines = [line for line in takewhile(str.strip, file) if line.lower().startswith(_TELLING)]
        if any(line.lower().startswith(("flags", "features")) for line in lines):
            return f"{os.uname().machine} {lines}"
    from llvmlite import binding

    features = binding.get_host_cpu_features().flatten()
    return repr((binding.get_process_triple(), binding.get_host_cpu_name(), features))


@cache
def has_wide_vectors() -> bool:
    """Whether vectors of this processor have 512 bits, and there are 32 of them."""
    return "avx512f" in _processor()


@cache
def _key() -> str:
    """What machine code depends on beside the arguments: the processor, the sources and the compiler's version."""
    import llvmlite

    settings = sorted(
        (name, value)
        for name, value in os.environ.items()
        if name.startswith("NUMBA_") and name != "NUMBA_CACHE_DIR"  # The cache's location does not change the code.
    )
    machine = repr((sys.platform, _processor(), settings))
    sources = hashlib.blake2b(f"{sys.version_info} {llvmlite.__version__}".encode(), digest_size=8)
    numba = find_spec("numba")
    version = [Path(numba.origin).with_name("_version.py")] if numba is not None and numba.origin else []
    for path in (
        *version,
        *(path for package in ("kernels", "methods") for path in sorted((PACKAGE / package).rglob("*.py"))),
    ):
        sources.update(path.read_bytes())
    return f"-{hashlib.blake2b(machine.encode(), digest_size=6).hexdigest()}-{sources.hexdigest()}"
