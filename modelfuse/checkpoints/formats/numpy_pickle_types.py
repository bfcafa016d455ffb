"""The globals that the pickle of a numpy array may use, and their replacements.

The names and their arguments are those of ``ndarray.__reduce_ex__`` and ``dtype.__reduce__``; modules
were renamed in numpy 2.0, and Python 2's names occur in protocol 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from modelfuse.checkpoints.formats.pickle_types import (
    NEVER_EXECUTED,
    Builder,
    ByteRange,
    Inert,
    Refused,
    Stateful,
    TextRange,
    counts,
)
from modelfuse.dtypes import BF16, BY_NAME, DType

#: numpy's type codes. numpy has no bfloat16: Paddle stores it as 16-bit unsigned integers.
CODES: Mapping[str, DType] = {
    "f8": BY_NAME["F64"],
    "f4": BY_NAME["F32"],
    "f2": BY_NAME["F16"],
    "u2": BF16,
    "i8": BY_NAME["I64"],
    "i4": BY_NAME["I32"],
    "i2": BY_NAME["I16"],
    "i1": BY_NAME["I8"],
    "u8": BY_NAME["U64"],
    "u4": BY_NAME["U32"],
    "u1": BY_NAME["U8"],
    "b1": BY_NAME["BOOL"],
    "c8": BY_NAME["C64"],
}
_LATIN_1 = ("latin1", "latin-1")


@dataclass(frozen=True, slots=True)
class EncodedText:
    """Bytes that protocol 2 writes as text, with one character per byte."""

    text: str | TextRange


class NumpyType(Stateful):
    """A numpy dtype: its code (or the type, if numpy lacks it) and its byte order."""

    __slots__ = ("big_endian", "code")

    def __init__(self, code: str | DType) -> None:
        self.code = code
        self.big_endian = False

    def set_state(self, state: object) -> None:
        """Take ``(version, byte order, subarray, names, fields, ...)``."""
        if type(state) is not tuple or len(state) < 5 or any(part is not None for part in state[2:5]):
            raise Refused(f"its numpy type {self._shown()} is not a plain number")
        if state[1] not in ("<", ">", "|"):
            raise Refused(f"its numpy type {self._shown()} has no byte order")
        self.big_endian = state[1] == ">"

    def dtype(self) -> DType:
        """The element type; raises Refused if checkpoints cannot have it."""
        dtype = self.code if isinstance(self.code, DType) else CODES.get(self.code)
        if dtype is None:
            raise Refused(f"it holds arrays of numpy's type {self._shown()}, which is no tensor's")
        return dtype

    def _shown(self) -> str:
        return repr(self.code[:20]) if isinstance(self.code, str) else str(self.code)


class NumpyArray(Stateful):
    """A numpy array; its bytes are in the file, encoded as text, or few."""

    __slots__ = ("data", "fortran", "shape", "type")

    def __init__(self) -> None:
        self.shape: tuple[int, ...] = ()
        self.type: NumpyType | None = None
        self.fortran = False
        self.data: ByteRange | EncodedText | None = None

    def set_state(self, state: object) -> None:
        """Take ``(version, shape, dtype, whether Fortran order, bytes)``."""
        if type(state) is not tuple or len(state) != 5:
            raise Refused("a numpy array in it is malformed")
        self.fill(state[1], state[2], state[3] is True, state[4])

    def fill(self, shape: object, kind: object, fortran: bool, data: object) -> None:
        """Check and store the parts of the array."""
        if not isinstance(kind, NumpyType) or not isinstance(data, ByteRange | EncodedText):
            raise Refused("a numpy array in it has no type, or its bytes are not bytes")
        self.shape, self.type, self.fortran = counts(shape, "the shape of an array"), kind, fortran
        self.data = data

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


_NDARRAY = "numpy.ndarray"


def _reconstruct(arguments: tuple[object, ...]) -> NumpyArray:
    if len(arguments) != 3 or arguments[0] is not _NDARRAY:
        raise Refused("it holds an array of a subclass of numpy.ndarray", NEVER_EXECUTED)
    return NumpyArray()


def _from_buffer(arguments: tuple[object, ...]) -> NumpyArray:
    """Protocol 5: ``(bytes, dtype, shape, order)``."""
    if len(arguments) != 4:
        raise Refused("a numpy array in it is malformed")
    data, kind, shape, order = arguments
    if not isinstance(order, str) or order not in ("C", "F"):
        raise Refused("a numpy array in it has no order")
    array = NumpyArray()
    array.fill(shape, kind, order == "F", data)
    return array


def _dtype(arguments: tuple[object, ...]) -> NumpyType:
    if not arguments or not isinstance(arguments[0], str | DType):
        raise Refused("a numpy type in it is malformed")
    return NumpyType(arguments[0])


def _encode(arguments: tuple[object, ...]) -> EncodedText:
    """Bytes in protocol 2: ``(text, "latin1")``."""
    if len(arguments) != 2 or not isinstance(arguments[1], str) or arguments[1] not in _LATIN_1:
        raise Refused("its pickle encodes a text in an unexpected way", NEVER_EXECUTED)
    if not isinstance(arguments[0], str | TextRange):
        raise Refused("its pickle encodes something that is no text")
    return EncodedText(arguments[0])


def _no_bytes(arguments: tuple[object, ...]) -> EncodedText:
    if arguments:
        raise Refused("its pickle builds bytes in an unexpected way", NEVER_EXECUTED)
    return EncodedText("")


NUMPY_NAMES: Mapping[str, object] = {
    **{
        f"{package} {name}": Builder(build)
        for module, name, build in (
            ("multiarray", "_reconstruct", _reconstruct),
            ("multiarray", "scalar", Inert),
            ("numeric", "_frombuffer", _from_buffer),
        )
        for package in (f"numpy.core.{module}", f"numpy._core.{module}")
    },
    "numpy ndarray": _NDARRAY,
    "numpy dtype": Builder(_dtype),
    "_codecs encode": Builder(_encode),
    "builtins bytes": Builder(_no_bytes),
    "__builtin__ bytes": Builder(_no_bytes),
    "ml_dtypes bfloat16": BF16,
    "ml_dtypes float8_e4m3fn": BY_NAME["F8_E4M3"],
    "ml_dtypes float8_e5m2": BY_NAME["F8_E5M2"],
}
