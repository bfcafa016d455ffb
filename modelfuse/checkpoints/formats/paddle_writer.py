"""Write Paddle's format: a pickle of a dict of numpy arrays, with tensors at planned offsets.

It is what ``paddle.save`` writes for a state dict: protocol 4, bfloat16 as 16-bit unsigned integers.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Iterable, Sequence

from modelfuse.checkpoints.formats.numpy_pickle_types import CODES
from modelfuse.checkpoints.tensors import Frame
from modelfuse.dtypes import DType
from modelfuse.errors import RecipeError

#: Pickle opcodes by name; this module does not unpickle.
_OP = {op.name: op.code.encode("latin-1") for op in pickletools.opcodes}
_START = _OP["PROTO"] + b"\x04" + _OP["EMPTY_DICT"] + _OP["MARK"]
#: After an array's bytes: complete the state tuple and build the array.
_AFTER = _OP["TUPLE"] + _OP["BUILD"]
_END = _OP["SETITEMS"] + _OP["STOP"]
#: The array constructor's name in all versions of numpy.
_BUILDER = _OP["GLOBAL"] + b"numpy.core.multiarray\n_reconstruct\n"
_ARRAY = _OP["GLOBAL"] + b"numpy\nndarray\n"
_DTYPE = _OP["GLOBAL"] + b"numpy\ndtype\n"
_NO_SHAPE = _OP["BININT1"] + b"\x00" + _OP["TUPLE1"]
_NO_BYTES = _OP["SHORT_BINBYTES"] + b"\x01b"


def frame_paddle(tensors: Sequence[tuple[str, DType, Sequence[int]]]) -> Frame:
    """Lay out a Paddle file, in which tensors are the bytes of pickled arrays.

    Raises:
        RecipeError: If Paddle does not support a type.
    """
    pieces: list[tuple[int, bytes]] = []
    offsets: list[int] = []
    position, run = 0, _START
    for name, dtype, shape in tensors:
        size = dtype.nbytes(math.prod(shape))
        run += b"".join(_before(name, dtype, shape, size))
        pieces.append((position, run))
        offsets.append(position + len(run))
        position, run = offsets[-1] + size, _AFTER
    run += _END
    pieces.append((position, run))
    return Frame(tuple(pieces), tuple(offsets), position + len(run))


def _before(name: str, dtype: DType, shape: Sequence[int], size: int) -> Iterable[bytes]:
    """The opcodes of a name, and of its array up to the bytes."""
    code = next((code for code, each in CODES.items() if each is dtype), None)
    if code is None or dtype.paddle is None:
        raise RecipeError(
            f"Tensor {name!r} is {dtype}, a type that Paddle's .pdparams files do not have",
            "Use --output_format paddle or hf.",
        )
    yield _text(name)
    yield _BUILDER + _ARRAY + _NO_SHAPE + _NO_BYTES + _OP["TUPLE3"] + _OP["REDUCE"]
    yield _OP["MARK"] + _number(1)
    yield _OP["MARK"] + b"".join(map(_number, shape)) + _OP["TUPLE"]
    yield _DTYPE + _text(code) + _OP["NEWFALSE"] + _OP["NEWTRUE"] + _OP["TUPLE3"] + _OP["REDUCE"]
    yield _OP["MARK"] + _number(3) + _text("<" if dtype.bytes > 1 else "|") + _OP["NONE"] * 3
    yield _number(-1) + _number(-1) + _number(0) + _OP["TUPLE"] + _OP["BUILD"]
    yield _OP["NEWFALSE"] + _OP["BINBYTES8"] + size.to_bytes(8, "little")


def _text(text: str) -> bytes:
    encoded = text.encode()
    return _OP["BINUNICODE"] + len(encoded).to_bytes(4, "little") + encoded


def _number(number: int) -> bytes:
    if -(2**31) <= number < 2**31:
        return _OP["BININT"] + number.to_bytes(4, "little", signed=True)
    return _OP["LONG1"] + b"\x09" + number.to_bytes(9, "little", signed=True)
