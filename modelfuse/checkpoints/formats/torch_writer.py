"""Write torch's format: an uncompressed zip archive, with tensors at planned offsets.

It is what ``torch.save`` writes for a state dict, as ``torch.load(weights_only=True)`` reads it, mapped into memory or
not: ``data.pkl``, which describes tensors, ``byteorder``, ``data/N`` with the bytes of each, from a multiple of 64 on,
and ``version``. Checksums of tensors would be known only once all are written; they are zero, as torch itself may leave
them out (``torch.serialization.set_crc32_options(False)``), and loaders do not look at them.
"""

from __future__ import annotations

import math
import pickletools
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from modelfuse.checkpoints.tensors import Frame
from modelfuse.dtypes import DType
from modelfuse.errors import RecipeError

#: Opcodes by name. Nothing here can unpickle anything.
_OP = {op.name: op.code.encode("latin-1") for op in pickletools.opcodes}
#: The storages that torch has for element types, by their safetensors names.
_STORAGES = {"F64": "Double", "F32": "Float", "F16": "Half", "BF16": "BFloat16", "I64": "Long", "I32": "Int",
             "I16": "Short", "I8": "Char", "U8": "Byte", "BOOL": "Bool", "C64": "ComplexFloat"}  # fmt: skip
_DICT = _OP["GLOBAL"] + b"collections\nOrderedDict\n" + _OP["EMPTY_TUPLE"] + _OP["REDUCE"]
_REBUILD = _OP["GLOBAL"] + b"torch._utils\n_rebuild_tensor_v2\n"
#: The archive's only folder, where bytes of tensors begin, and the version of the layout.
_ROOT, _ALIGNMENT, _VERSION = "archive/", 64, b"3\n"
_LOCAL, _CENTRAL = struct.Struct("<4s5H3L2H"), struct.Struct("<4s6H3L5H2L")
_END, _END64, _LOCATOR64 = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL")
#: What stands for a number that is too large for its field, the field that has it, and the padding's.
_MANY, _FULL, _ZIP64, _PADDING = 0xFFFF, 0xFFFFFFFF, 1, b"FB"
#: The version of zip that knows the larger fields, and names in UTF-8.
_NEEDED, _UTF8 = 45, 0x800


def frame_torch(tensors: Sequence[tuple[str, DType, Sequence[int]]]) -> Frame:
    """Lay out a file of torch's: the bytes of every tensor are an entry of the archive.

    Raises:
        RecipeError: If torch has no such type of storage.
    """
    archive = _Archive()
    archive.add("data.pkl", _pickle(tensors))
    archive.add("byteorder", b"little")
    for number, (_, dtype, shape) in enumerate(tensors):
        archive.leave(f"data/{number}", dtype.nbytes(math.prod(shape)))
    archive.add("version", _VERSION)
    return archive.frame()


@dataclass
class _Archive:
    """A zip archive as it grows; gaps that it leaves for tensors are not among the pieces."""

    pieces: list[tuple[int, bytes]] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    _directory: list[bytes] = field(default_factory=list)
    _begin: int = 0
    _run: bytes = b""

    @property
    def _position(self) -> int:
        return self._begin + len(self._run)

    def add(self, name: str, content: bytes) -> None:
        """An entry with its bytes."""
        self._head(name, len(content), zlib.crc32(content))
        self._run += content

    def leave(self, name: str, size: int) -> None:
        """Leave a gap for the bytes of an entry."""
        self._head(name, size, 0)
        self.pieces.append((self._begin, self._run))
        self.offsets.append(self._position)
        self._begin, self._run = self._position + size, b""

    def _head(self, name: str, size: int, checksum: int) -> None:
        encoded, begin = f"{_ROOT}{name}".encode(), self._position
        short = min(size, _FULL)
        extra = _large(size, size) if size >= _FULL else b""
        before = begin + _LOCAL.size + len(encoded) + len(extra) + 4
        gap = -before % _ALIGNMENT
        extra += struct.pack("<2sH", _PADDING, gap) + bytes(gap)
        self._run += _LOCAL.pack(
            b"PK\3\4", _NEEDED, _UTF8, 0, 0, 0, checksum, short, short, len(encoded), len(extra)
        ) + encoded + extra  # fmt: skip
        large = ((size, size) if size >= _FULL else ()) + ((begin,) if begin >= _FULL else ())
        told = _large(*large) if large else b""
        self._directory.append(
            _CENTRAL.pack(
                b"PK\1\2", _NEEDED, _NEEDED, _UTF8, 0, 0, 0, checksum, short, short, len(encoded), len(told), 0, 0, 0,
                0, min(begin, _FULL),
            ) + encoded + told
        )  # fmt: skip

    def frame(self) -> Frame:
        """The finished archive."""
        start, directory, count = self._position, b"".join(self._directory), len(self._directory)
        end64 = start + len(directory)
        self._run += directory
        self._run += _END64.pack(
            b"PK\6\6", _END64.size - 12, _NEEDED, _NEEDED, 0, 0, count, count, len(directory), start
        ) + _LOCATOR64.pack(b"PK\6\7", 0, end64, 1)  # fmt: skip
        few = min(count, _MANY)
        self._run += _END.pack(
            b"PK\5\6", 0, 0, few, few, min(len(directory), _FULL), min(start, _FULL), 0
        )  # fmt: skip
        self.pieces.append((self._begin, self._run))
        return Frame(tuple(self.pieces), tuple(self.offsets), self._position)


def _large(*numbers: int) -> bytes:
    """The field of an entry that has the numbers which are too large for theirs."""
    return struct.pack(f"<2H{len(numbers)}Q", _ZIP64, 8 * len(numbers), *numbers)


def _pickle(tensors: Sequence[tuple[str, DType, Sequence[int]]]) -> bytes:
    parts = [_OP["PROTO"], b"\x02", _DICT, _OP["MARK"]]
    for number, (name, dtype, shape) in enumerate(tensors):
        parts += _described(number, name, dtype, shape)
    return b"".join((*parts, _OP["SETITEMS"], _OP["STOP"]))


def _described(number: int, name: str, dtype: DType, shape: Sequence[int]) -> Iterable[bytes]:
    """A name, and what builds its tensor of an entry's bytes."""
    storage = _STORAGES.get(dtype.name)
    if storage is None:
        raise RecipeError(
            f"Tensor {name!r} is {dtype}, a type that torch's .bin files do not have", "Write safetensors files."
        )
    steps = [1]
    for length in reversed(shape[1:]):
        steps.insert(0, steps[0] * max(length, 1))
    yield _text(name) + _REBUILD + _OP["MARK"]
    yield _OP["MARK"] + _text("storage") + _OP["GLOBAL"] + f"torch\n{storage}Storage\n".encode()
    yield _text(str(number)) + _text("cpu") + _whole(math.prod(shape)) + _OP["TUPLE"] + _OP["BINPERSID"]
    yield _whole(0) + _tuple(shape) + _tuple(steps if shape else ()) + _OP["NEWFALSE"] + _DICT + _OP["TUPLE"]
    yield _OP["REDUCE"]


def _tuple(numbers: Iterable[int]) -> bytes:
    return _OP["MARK"] + b"".join(map(_whole, numbers)) + _OP["TUPLE"]


def _text(text: str) -> bytes:
    encoded = text.encode()
    return _OP["BINUNICODE"] + len(encoded).to_bytes(4, "little") + encoded


def _whole(number: int) -> bytes:
    if number < 2**31:
        return _OP["BININT"] + number.to_bytes(4, "little", signed=True)
    return _OP["LONG1"] + b"\x09" + number.to_bytes(9, "little", signed=True)
