"""Writing Paddle's own format: a pickle of a dict of numpy arrays, made so that tensors have planned places.

It is what ``paddle.save`` writes for a state dict: protocol 4, bfloat16 as 16-bit unsigned integers.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterable, Sequence

from modelfuse.checkpoints.numpy_values import CODES
from modelfuse.checkpoints.tensors import Frame
from modelfuse.dtypes import DType
from modelfuse.errors import RecipeError

#: Opcodes are those of pickle's documentation (``pickletools``), with which the tests read them again.
_START = pickle.PROTO + b"\x04" + pickle.EMPTY_DICT + pickle.MARK
_END = pickle.SETITEMS + pickle.STOP
#: numpy of any version finds an array's builder under this name.
_BUILDER = pickle.GLOBAL + b"numpy.core.multiarray\n_reconstruct\n"
_ARRAY = pickle.GLOBAL + b"numpy\nndarray\n"
_DTYPE = pickle.GLOBAL + b"numpy\ndtype\n"
_NO_SHAPE = pickle.BININT1 + b"\x00" + pickle.TUPLE1
_NO_BYTES = pickle.SHORT_BINBYTES + b"\x01b"


def frame_paddle(tensors: Sequence[tuple[str, DType, Sequence[int]]]) -> Frame:
    """Lay out a Paddle file: the bytes of every tensor lie within the pickle of an array.

    Raises:
        RecipeError: If Paddle has no such type.
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


#: The state of the array is complete, and given to it.
_AFTER = pickle.TUPLE + pickle.BUILD


def _before(name: str, dtype: DType, shape: Sequence[int], size: int) -> Iterable[bytes]:
    """A name, and of its array all that comes before the bytes."""
    code = next((code for code, each in CODES.items() if each is dtype), None)
    if code is None or dtype.paddle is None:
        raise RecipeError(
            f"Tensor {name!r} is {dtype}, a type that Paddle's .pdparams files do not have",
            "Use --output_format paddle or hf.",
        )
    yield _text(name)
    yield _BUILDER + _ARRAY + _NO_SHAPE + _NO_BYTES + pickle.TUPLE3 + pickle.REDUCE
    yield pickle.MARK + _number(1)
    yield pickle.MARK + b"".join(map(_number, shape)) + pickle.TUPLE
    yield _DTYPE + _text(code) + pickle.NEWFALSE + pickle.NEWTRUE + pickle.TUPLE3 + pickle.REDUCE
    yield pickle.MARK + _number(3) + _text("<" if dtype.bytes > 1 else "|") + pickle.NONE * 3
    yield _number(-1) + _number(-1) + _number(0) + pickle.TUPLE + pickle.BUILD
    yield pickle.NEWFALSE + pickle.BINBYTES8 + size.to_bytes(8, "little")


def _text(text: str) -> bytes:
    encoded = text.encode()
    return pickle.BINUNICODE + len(encoded).to_bytes(4, "little") + encoded


def _number(number: int) -> bytes:
    if -(2**31) <= number < 2**31:
        return pickle.BININT + number.to_bytes(4, "little", signed=True)
    return pickle.LONG1 + b"\x09" + number.to_bytes(9, "little", signed=True)
