"""torch's own formats: a pickle that describes tensors, and the storages that hold their bytes.

Since torch 1.6 both are entries of an uncompressed zip archive; before, they followed one another
in a plain stream. What torch writes is defined by its ``torch/serialization.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from modelfuse.checkpoints.files import SourceFile, read_exactly
from modelfuse.checkpoints.pickle_bytes import Window
from modelfuse.checkpoints.pickle_machine import PickleMachine
from modelfuse.checkpoints.pickle_values import NEVER_EXECUTED, Builder, Inert, Refused, count, counts, naming
from modelfuse.checkpoints.state_dicts import find_state_dict, split_aliases
from modelfuse.checkpoints.strided import StridedTensor, extent_of, is_row_major
from modelfuse.checkpoints.tensors import StoredTensor
from modelfuse.checkpoints.zip_index import ZipIndex
from modelfuse.dtypes import BY_NAME, BY_TORCH_NAME, DType
from modelfuse.errors import CheckpointError

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_MAX_TENSOR_BYTES = 2**48

#: A storage's name and element type → where its bytes lie in the file: offset and count.
Locate = Callable[["_Storage"], tuple[int, int]]


def read_torch(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Read the header of one torch checkpoint: a ``pytorch_model.bin`` or a shard of one.

    Returns:
        Its tensors by name, and the names of tensors that are another one's: alias → name.

    Raises:
        CheckpointError: If the file is malformed, holds something other than a dict of tensors,
            or would need code to be executed.
    """
    file = SourceFile.at(path)
    with naming(path), file.open() as descriptor:
        start = Window(file, descriptor).take(min(file.size, 64))
        if start.startswith(b"PK\3\4"):
            value, locate, big_endian = _read_zip(file, descriptor)
        elif start.startswith(b"\x80"):
            value, locate = _read_stream(file, descriptor)
            big_endian = False  # torch writes streams in little-endian order on any machine
        else:
            raise not_this_format(start, "torch")
        entries = find_state_dict(value, lambda item: isinstance(item, _Tensor))
        tensors = {name: item for name, item in entries.items() if isinstance(item, _Tensor)}
        kept, aliases = split_aliases(tensors, lambda tensor: tensor if tensor.size else None)
        return {name: _place(name, tensor, file, locate, big_endian) for name, tensor in kept.items()}, aliases


def not_this_format(start: bytes, library: str) -> Refused:
    """The error for a file that begins with these bytes."""
    if start.startswith(b"version https://git-lfs"):
        return Refused("it is a Git LFS pointer, not the file itself", "Fetch it with: git lfs pull")
    return Refused(f"it is no file that {library} writes", "Check the path and the file's name.")


@dataclass(frozen=True, slots=True)
class _StorageType:
    dtype: DType


@dataclass(frozen=True, slots=True)
class _Storage:
    """A storage, or a view of it that starts ``start`` elements in."""

    key: str
    dtype: DType
    size: int
    start: int


@dataclass(frozen=True, slots=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: DType

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def _storage(saved_id: object) -> _Storage:
    if type(saved_id) is not tuple or len(saved_id) not in (5, 6) or saved_id[0] != "storage":
        whole = type(saved_id) is tuple and saved_id[:1] == ("module",)
        raise Refused(
            "it holds a whole pickled module" if whole else "it has a persistent id that is no storage",
            "Save the module's state_dict() instead.",
        )
    kind, key, size = saved_id[1], saved_id[2], count(saved_id[4], "the size of a storage")
    if not isinstance(kind, _StorageType) or type(key) is not str:
        raise Refused("a storage in it has no type or no key")
    view = saved_id[5] if len(saved_id) == 6 else None
    start = 0
    if view is not None:
        if type(view) is not tuple or len(view) != 3:
            raise Refused(f"the view of storage {key!r} is malformed")
        start = count(view[1], "the start of a view")
    return _Storage(key, kind.dtype, size, start)


def _rebuild_tensor(arguments: tuple[object, ...]) -> _Tensor:
    """``(storage, offset, shape, strides)``, then requires_grad, hooks, and perhaps metadata."""
    if not 4 <= len(arguments) <= 7:
        raise Refused(f"a tensor in it has {len(arguments)} arguments")
    storage = arguments[0]
    if not isinstance(storage, _Storage):
        raise Refused("a tensor in it has no storage")
    if len(arguments) == 7:
        _check_metadata(arguments[6])
    return _tensor(storage, arguments, storage.dtype)


def _rebuild_tensor_v3(arguments: tuple[object, ...]) -> _Tensor:
    """As before, but with the element type after the hooks, since the storage has none."""
    if not 7 <= len(arguments) <= 8:
        raise Refused(f"a tensor in it has {len(arguments)} arguments")
    storage, dtype = arguments[0], arguments[6]
    if not isinstance(storage, _Storage) or not isinstance(dtype, DType):
        raise Refused("a tensor in it has no storage or no type")
    if len(arguments) == 8:
        _check_metadata(arguments[7])
    return _tensor(storage, arguments, dtype)


def _tensor(storage: _Storage, arguments: tuple[object, ...], dtype: DType) -> _Tensor:
    shape = counts(arguments[2], "the shape of a tensor")
    strides = counts(arguments[3], "the strides of a tensor")
    if len(shape) != len(strides):
        raise Refused(f"a tensor of {len(shape)} dimensions has {len(strides)} strides")
    return _Tensor(storage, count(arguments[1], "the offset of a tensor"), shape, strides, dtype)


def _check_metadata(metadata: object) -> None:
    """Refuse tensors whose stored values are to be negated or conjugated when loaded."""
    if not isinstance(metadata, dict) or len(metadata) > 8 or any(metadata.values()):
        raise Refused(
            "a tensor in it is a negated or conjugated view",
            "Load it with torch, call resolve_neg() and resolve_conj() on its tensors, and save it again.",
        )


def _rebuild_parameter(arguments: tuple[object, ...]) -> _Tensor:
    if not arguments or not isinstance(arguments[0], _Tensor):
        raise Refused("a parameter in it has no tensor")
    return arguments[0]


def _size(arguments: tuple[object, ...]) -> tuple[int, ...]:
    return counts(arguments[0] if arguments else (), "a torch.Size")


def _ordered_dict(arguments: tuple[object, ...]) -> dict[object, object]:
    if arguments:
        raise Refused("an OrderedDict in it is not built as Python 3 does", NEVER_EXECUTED)
    return {}


_BUILD_TENSOR = Builder(_rebuild_tensor)
_BUILD_TENSOR_V3 = Builder(_rebuild_tensor_v3)
_BUILD_PARAMETER = Builder(_rebuild_parameter)


def _rebuild_from_type(arguments: tuple[object, ...]) -> _Tensor:
    """``(function, type, arguments, attributes)``: a tensor that somebody has given attributes."""
    if len(arguments) != 4 or type(arguments[2]) is not tuple:
        raise Refused("a tensor in it is malformed")
    # Not any builder: one that calls builders in turn could be nested without end.
    for builder, rebuild in (
        (_BUILD_TENSOR, _rebuild_tensor),
        (_BUILD_TENSOR_V3, _rebuild_tensor_v3),
        (_BUILD_PARAMETER, _rebuild_parameter),
    ):
        if arguments[0] is builder:
            return rebuild(arguments[2])
    raise Refused("a tensor in it is rebuilt in an unknown way", NEVER_EXECUTED)


_STORAGE_TYPES = {
    "Double": "float64",
    "Float": "float32",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "Bool": "bool",
    "ComplexFloat": "complex64",
    "Untyped": "uint8",
}

#: All that a torch checkpoint may name. Names without a Builder stand for themselves.
_KNOWN: Mapping[str, object] = {
    "torch._utils _rebuild_tensor": _BUILD_TENSOR,
    "torch._utils _rebuild_tensor_v2": _BUILD_TENSOR,
    "torch._utils _rebuild_tensor_v3": _BUILD_TENSOR_V3,
    "torch._utils _rebuild_parameter": _BUILD_PARAMETER,
    "torch._utils _rebuild_parameter_with_state": _BUILD_PARAMETER,
    "torch._tensor _rebuild_from_type_v2": Builder(_rebuild_from_type),
    "torch Tensor": Inert(),
    "torch._tensor Tensor": Inert(),
    "torch.nn.parameter Parameter": Inert(),
    "torch.nn.parameter Buffer": Inert(),
    "collections OrderedDict": Builder(_ordered_dict),
    "torch Size": Builder(_size),
    "torch device": Builder(lambda arguments: Inert(*arguments)),
    "argparse Namespace": Builder(lambda arguments: Inert(*arguments)),
    **{
        f"{module} {name}Storage": _StorageType(BY_TORCH_NAME[dtype])
        for module in ("torch", "torch.cuda", "torch.storage")
        for name, dtype in _STORAGE_TYPES.items()
    },
    **{f"torch {name}": dtype for name, dtype in BY_TORCH_NAME.items()},
}
