"""The globals that the pickle of a torch checkpoint may use, and their replacements.

The names and their arguments are those of ``torch/_utils.py`` and ``torch/_tensor.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from modelfuse.checkpoints.formats.numpy_pickle_types import NUMPY_NAMES
from modelfuse.checkpoints.formats.pickle_types import (
    NEVER_EXECUTED,
    PLAIN_NAMES,
    Builder,
    Inert,
    Refused,
    count,
    counts,
)
from modelfuse.dtypes import BY_TORCH_NAME, DType


@dataclass(frozen=True, slots=True)
class StorageType:
    """The class of a storage, which has its element type."""

    dtype: DType


@dataclass(frozen=True, slots=True)
class Storage:
    """A storage, or a view of it that starts ``start`` elements in."""

    key: str
    dtype: DType
    size: int
    start: int


@dataclass(frozen=True, slots=True)
class TorchTensor:
    """A tensor as described by the pickle; offset and strides are in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: DType

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def identity(self) -> str:
        """Identifies its elements, to find aliases; a string, as a file could choose numbers with colliding hashes."""
        storage = self.storage
        return repr((storage.key, storage.dtype, storage.size, storage.start, self.offset, self.shape, self.strides,
                     self.dtype))  # fmt: skip


def storage_of(saved_id: object) -> Storage:
    """Read a persistent id: ``("storage", type, key, location, size)``, in old streams with a view.

    Raises:
        Refused: If it is anything else.
    """
    if type(saved_id) is not tuple or len(saved_id) not in (5, 6) or saved_id[0] != "storage":
        whole = type(saved_id) is tuple and saved_id[:1] == ("module",)
        raise Refused(
            "it holds a whole pickled module" if whole else "it has a persistent id that is no storage",
            "Save the module's state_dict() instead.",
        )
    kind, key, size = saved_id[1], saved_id[2], count(saved_id[4], "the size of a storage")
    if not isinstance(kind, StorageType) or type(key) is not str:
        raise Refused("a storage in it has no type or no key")
    view = saved_id[5] if len(saved_id) == 6 else None
    start = 0
    if view is not None:
        if type(view) is not tuple or len(view) != 3:
            raise Refused(f"the view of storage {key!r} is malformed")
        start = count(view[1], "the start of a view")
    return Storage(key, kind.dtype, size, start)


def _rebuild_tensor(arguments: tuple[object, ...]) -> TorchTensor:
    """``(storage, offset, shape, strides)``, then requires_grad, hooks, and perhaps metadata."""
    if not 4 <= len(arguments) <= 7:
        raise Refused(f"a tensor in it has {len(arguments)} arguments")
    storage = arguments[0]
    if not isinstance(storage, Storage):
        raise Refused("a tensor in it has no storage")
    if len(arguments) == 7:
        _check_metadata(arguments[6])
    return _tensor(storage, arguments, storage.dtype)


def _rebuild_tensor_v3(arguments: tuple[object, ...]) -> TorchTensor:
    """As before, but with the element type after the hooks, since the storage has none."""
    if not 7 <= len(arguments) <= 8:
        raise Refused(f"a tensor in it has {len(arguments)} arguments")
    storage, dtype = arguments[0], arguments[6]
    if not isinstance(storage, Storage) or not isinstance(dtype, DType):
        raise Refused("a tensor in it has no storage or no type")
    if len(arguments) == 8:
        _check_metadata(arguments[7])
    return _tensor(storage, arguments, dtype)


def _tensor(storage: Storage, arguments: tuple[object, ...], dtype: DType) -> TorchTensor:
    shape = counts(arguments[2], "the shape of a tensor")
    strides = counts(arguments[3], "the strides of a tensor")
    if len(shape) != len(strides):
        raise Refused(f"a tensor of {len(shape)} dimensions has {len(strides)} strides")
    return TorchTensor(storage, count(arguments[1], "the offset of a tensor"), shape, strides, dtype)


def _check_metadata(metadata: object) -> None:
    """Refuse tensors whose stored values are to be negated or conjugated when loaded."""
    if not isinstance(metadata, dict) or len(metadata) > 8 or any(metadata.values()):
        raise Refused(
            "a tensor in it is a negated or conjugated view",
            "Load it with torch, call resolve_neg() and resolve_conj() on its tensors, and save it again.",
        )


def _rebuild_parameter(arguments: tuple[object, ...]) -> TorchTensor:
    if not arguments or not isinstance(arguments[0], TorchTensor):
        raise Refused("a parameter in it has no tensor")
    return arguments[0]


def _size(arguments: tuple[object, ...]) -> tuple[int, ...]:
    return counts(arguments[0] if arguments else (), "a torch.Size")


_BUILD_TENSOR = Builder(_rebuild_tensor)
_BUILD_TENSOR_V3 = Builder(_rebuild_tensor_v3)
_BUILD_PARAMETER = Builder(_rebuild_parameter)
_BUILD_INERT = Builder(Inert)


def _rebuild_from_type(arguments: tuple[object, ...]) -> TorchTensor:
    """``(function, type, arguments, attributes)``: a tensor with attributes."""
    if len(arguments) != 4 or type(arguments[2]) is not tuple:
        raise Refused("a tensor in it is malformed")
    # Only these builders: others that call builders in turn could be nested without bound.
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

#: The globals that a torch checkpoint may use. Those without a Builder cannot be called.
KNOWN: Mapping[str, object] = {
    **PLAIN_NAMES,
    "torch._utils _rebuild_tensor": _BUILD_TENSOR,
    "torch._utils _rebuild_tensor_v2": _BUILD_TENSOR,
    "torch._utils _rebuild_tensor_v3": _BUILD_TENSOR_V3,
    "torch._utils _rebuild_parameter": _BUILD_PARAMETER,
    "torch._utils _rebuild_parameter_with_state": _BUILD_PARAMETER,
    "torch._tensor _rebuild_from_type_v2": Builder(_rebuild_from_type),
    "torch Tensor": "torch.Tensor",
    "torch._tensor Tensor": "torch.Tensor",
    "torch.nn.parameter Parameter": "torch.nn.Parameter",
    "torch.nn.parameter Buffer": "torch.nn.Buffer",
    "torch Size": Builder(_size),
    # Lightning uses classes of callbacks as keys of their state.
    **{
        f"{package}.callbacks.{module} {name}": name
        for package in ("pytorch_lightning", "lightning.pytorch")
        for module, name in (("model_checkpoint", "ModelCheckpoint"), ("early_stopping", "EarlyStopping"))
    },
    "torch device": _BUILD_INERT,
    "argparse Namespace": _BUILD_INERT,
    "numpy dtype": _BUILD_INERT,
    "numpy.core.multiarray scalar": _BUILD_INERT,
    "numpy._core.multiarray scalar": _BUILD_INERT,
    "_codecs encode": NUMPY_NAMES["_codecs encode"],
    **{
        f"{module} {name}Storage": StorageType(BY_TORCH_NAME[dtype])
        for module in ("torch", "torch.cuda", "torch.storage")
        for name, dtype in _STORAGE_TYPES.items()
    },
    **{f"torch {name}": dtype for name, dtype in BY_TORCH_NAME.items()},
}
