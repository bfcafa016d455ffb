"""Paddle's own format: one pickle of a dict of numpy arrays, as ``paddle.save`` writes it."""

from __future__ import annotations

import math
from collections.abc import Mapping

from modelfuse.checkpoints.formats.byte_window import Window
from modelfuse.checkpoints.formats.numpy_pickle_types import NUMPY_NAMES, EncodedText, NumpyArray
from modelfuse.checkpoints.formats.paddle_tensors import JoinedTensor, SmallTensor, TextTensor
from modelfuse.checkpoints.formats.pickle_types import (
    NEVER_EXECUTED,
    PLAIN_NAMES,
    Builder,
    ByteRange,
    Refused,
    counts,
    naming,
    not_this_format,
)
from modelfuse.checkpoints.formats.safe_unpickler import PickleMachine
from modelfuse.checkpoints.formats.state_dicts import find_state_dict, split_aliases
from modelfuse.checkpoints.tensors import StoredTensor
from modelfuse.checkpoints.views.strided import ReorderedTensor, is_plain, reorder, row_major, strided_tensor
from modelfuse.storage import PathOrUrl
from modelfuse.storage.files import SourceFile

#: Paddle's table from names in the model to names of variables.
_NAME_TABLE = "StructuredToParameterName@@"
#: Paddle's table of tensors that were split into slices; the spelling is Paddle's.
_SLICE_TABLE = "UnpackBigParamInfor@@"


def read_paddle(path: PathOrUrl) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Read the header of one Paddle file: ``model_state.pdparams`` or the like.

    16-bit unsigned integers are bfloat16, which numpy and so Paddle's files do not have.

    Returns:
        Its tensors by name, and aliases: alias → name.

    Raises:
        CheckpointError: If the file is malformed, does not contain a dict of arrays, or would need to execute code.
    """
    file = SourceFile.at(path)
    with naming(path), file.open() as opened:
        start = Window(opened).take(min(file.size, 64))
        if not start.startswith(b"\x80"):
            raise not_this_format(start, "paddle.save")
        value = PickleMachine(Window(opened), _KNOWN).load()
        entries = find_state_dict(value, lambda item: _as_array(item) is not None)
        arrays = {name: array for name, item in entries.items() if (array := _as_array(item)) is not None}
        slices = _take_slices(entries, arrays)
        # By object, not by file offset: Python shares one-byte strings between unrelated arrays.
        kept, aliases = split_aliases(arrays, id)
        tensors = {name: _stored(name, array, file) for name, array in kept.items()}
        for name, (shape, parts) in slices.items():
            tensors[name] = _join(name, shape, parts, file)
        return tensors, aliases


def _as_array(item: object) -> NumpyArray | None:
    """An array, given directly or in Paddle's pair (variable name, array)."""
    if type(item) is tuple and len(item) == 2 and isinstance(item[0], str):
        item = item[1]
    return item if isinstance(item, NumpyArray) else None


def _take_slices(
    entries: Mapping[str, object], arrays: dict[str, NumpyArray]
) -> dict[str, tuple[tuple[int, ...], list[NumpyArray]]]:
    """Remove the slices of split tensors from ``arrays``; returns each tensor's shape and slices."""
    table = entries.get(_SLICE_TABLE, {})
    if not isinstance(table, dict):
        raise Refused("its table of slices is malformed")
    slices: dict[str, tuple[tuple[int, ...], list[NumpyArray]]] = {}
    for name, entry in table.items():
        if type(name) is not str or not isinstance(entry, dict) or name in arrays:
            raise Refused("its table of slices is malformed")
        shape = counts(entry.get("OriginShape"), f"the shape of {name!r}")
        names = entry.get("slices")
        if type(names) is not list or not names:
            raise Refused(f"its table of slices has none of {name!r}")
        parts = []
        for part in names:
            # Taking each slice out keeps a table that names one slice a million times from costing time.
            if type(part) is not str or part not in arrays:
                raise Refused(f"a slice of {name!r} is missing or is used twice")
            parts.append(arrays.pop(part))
        slices[name] = shape, parts
    return slices


def _stored(name: str, array: NumpyArray, file: SourceFile) -> StoredTensor:
    if array.type is None or array.data is None:
        raise Refused(f"tensor {name!r} has no bytes")
    dtype, shape, data = array.type.dtype(), array.shape, array.data
    nbytes = dtype.nbytes(array.size)
    least, most = _length_of(data)
    if not least <= nbytes <= most:
        raise Refused(f"tensor {name!r} of shape {shape} and type {dtype} cannot have {most:,} bytes")
    if nbytes == 0:
        return StoredTensor(name, dtype, shape, file, 0)
    strides = tuple(reversed(row_major(shape[::-1]))) if array.fortran else row_major(shape)
    if isinstance(data, ByteRange):
        return strided_tensor(name, dtype, shape, file, data.offset, strides, array.type.big_endian)
    return _stored_text(StoredTensor(name, dtype, shape, file, 0), data, strides, array.type.big_endian)


def _length_of(data: ByteRange | EncodedText) -> tuple[int, int]:
    """The least and greatest number of bytes of an array."""
    if isinstance(data, ByteRange):
        return data.length, data.length
    if isinstance(data.text, str):
        return len(data.text), len(data.text)
    # One or two bytes of UTF-8 per byte; the exact number is only known after decoding.
    return (data.text.length + 1) // 2, data.text.length


def _stored_text(tensor: StoredTensor, data: EncodedText, strides: tuple[int, ...], big_endian: bool) -> StoredTensor:
    name, dtype, shape, file = tensor.name, tensor.dtype, tensor.shape, tensor.file
    if isinstance(data.text, str):
        try:
            content = data.text.encode("latin-1")
        except UnicodeEncodeError:
            raise Refused(f"the text of tensor {name!r} does not stand for bytes") from None
        return SmallTensor(name, dtype, shape, file, 0, reorder(content, tensor, strides, big_endian))
    text = TextTensor(name, dtype, shape, file, data.text.offset, data.text.length)
    if is_plain(dtype, shape, strides, big_endian):
        return text
    return ReorderedTensor(name, dtype, shape, file, 0, text, strides, big_endian)


def _join(name: str, shape: tuple[int, ...], slices: list[NumpyArray], file: SourceFile) -> StoredTensor:
    parts = tuple(_stored(f"{name}@@.{number}", part, file) for number, part in enumerate(slices))
    dtype = parts[0].dtype
    if any(part.dtype != dtype for part in parts) or sum(part.size for part in parts) != math.prod(shape):
        raise Refused(f"the slices of tensor {name!r} do not make up its shape {shape}")
    if math.prod(shape) == 0:
        return StoredTensor(name, dtype, shape, file, 0)
    return JoinedTensor(name, dtype, shape, file, parts[0].offset, parts)


def _tuple(arguments: tuple[object, ...]) -> tuple[object, ...]:
    """Paddle pickles a Tensor as ``tuple((name, array))``."""
    if len(arguments) != 1 or type(arguments[0]) is not tuple:
        raise Refused("its pickle builds a tuple in an unexpected way", NEVER_EXECUTED)
    return arguments[0]


def _data(arguments: tuple[object, ...]) -> object:
    """Paddle pickles a DenseTensor as ``eval("data", {"data": array})``: the result is that array.

    No other source is accepted, and nothing is evaluated.
    """
    if len(arguments) != 2 or not isinstance(arguments[0], str) or arguments[0] != "data":
        raise Refused("its pickle asks for eval() of a program", NEVER_EXECUTED)
    names = arguments[1]
    if type(names) is not dict or names.keys() != {"data"} or not isinstance(names["data"], NumpyArray):
        raise Refused("its pickle asks for eval() of something that is no array", NEVER_EXECUTED)
    return names["data"]


_KNOWN: Mapping[str, object] = {
    **PLAIN_NAMES,
    **NUMPY_NAMES,
    "builtins tuple": Builder(_tuple),
    "__builtin__ tuple": Builder(_tuple),
    "builtins eval": Builder(_data),
    "__builtin__ eval": Builder(_data),
}
