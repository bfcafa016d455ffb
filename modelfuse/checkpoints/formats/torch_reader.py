"""torch's formats: a pickle that describes tensors, and storages with their bytes.

Since torch 1.6 both are entries of an uncompressed zip archive; before, they were concatenated in one stream.
What torch writes is defined by its ``torch/serialization.py``.
"""

from __future__ import annotations

from collections.abc import Callable

from modelfuse.checkpoints.formats.byte_window import Window
from modelfuse.checkpoints.formats.pickle_types import Refused, naming, not_this_format
from modelfuse.checkpoints.formats.safe_unpickler import PickleMachine
from modelfuse.checkpoints.formats.state_dicts import find_state_dict, split_aliases
from modelfuse.checkpoints.formats.torch_pickle_types import KNOWN, Storage, TorchTensor, storage_of
from modelfuse.checkpoints.formats.zip_index import ZipIndex
from modelfuse.checkpoints.tensors import StoredTensor
from modelfuse.checkpoints.views.strided import extent_of, strided_tensor
from modelfuse.storage import PathOrUrl
from modelfuse.storage.files import OpenFile, SourceFile

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_MAX_TENSOR_BYTES = 2**48

#: Returns the extent of a storage in the file: offset and number of bytes.
Locate = Callable[[Storage], tuple[int, int]]


def read_torch(path: PathOrUrl) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Read the header of one torch checkpoint: a ``pytorch_model.bin`` or a shard of one.

    Returns:
        Its tensors by name, and aliases: alias → name.

    Raises:
        CheckpointError: If the file is malformed, does not contain a dict of tensors, or would need to execute code.
    """
    file = SourceFile.at(path)
    with naming(path), file.open() as opened:
        start = Window(opened).take(min(file.size, 64))
        if start.startswith(b"PK\3\4"):
            value, locate, big_endian = _read_zip(opened)
        elif start.startswith(b"\x80"):
            value, locate = _read_stream(opened)
            big_endian = False  # torch writes streams in little-endian order on any machine
        else:
            raise not_this_format(start, "torch")
        entries = find_state_dict(value, lambda item: isinstance(item, TorchTensor))
        tensors = {name: item for name, item in entries.items() if isinstance(item, TorchTensor)}
        kept, aliases = split_aliases(tensors, lambda tensor: tensor.identity if tensor.size else None)
        return {name: _stored(name, tensor, file, locate, big_endian) for name, tensor in kept.items()}, aliases


def _read_zip(file: OpenFile) -> tuple[object, Locate, bool]:
    """The value of an archive's pickle, the extents of its storages, and whether they are big-endian."""
    index = ZipIndex(file)
    roots = [name.removesuffix("data.pkl") for name in index if name.endswith("/data.pkl")]
    if len(roots) != 1 or f"{roots[0]}constants.pkl" in index:
        what = "a TorchScript program" if roots else "a zip archive without a data.pkl"
        raise Refused(f"it is {what}, not a checkpoint", "Save the model's state_dict() with torch.save.")
    root = roots[0]
    start, size = index.locate(f"{root}data.pkl")
    machine = PickleMachine(Window(file, start, start + size), KNOWN, storage_of)
    order = index.read(f"{root}byteorder", 16) if f"{root}byteorder" in index else b"little"
    if order not in (b"little", b"big"):
        raise Refused(f"its byte order is {order!r}")
    return machine.load(), lambda storage: index.locate(f"{root}data/{storage.key}"), order == b"big"


def _read_stream(file: OpenFile) -> tuple[object, Locate]:
    """The value of a stream, and the extents of its storages."""
    window = Window(file)
    magic = PickleMachine(window, KNOWN).load()
    if type(magic) is not int or magic != _MAGIC:
        raise Refused("it is a pickle, but not one that torch.save wrote", "Check the file's name.")
    version = PickleMachine(window, KNOWN).load()
    if type(version) is not int or version != _PROTOCOL:
        raise Refused("its stream has an unknown version")
    PickleMachine(window, KNOWN).load()  # facts about the machine that wrote it
    storages: dict[str, Storage] = {}

    def remember(saved_id: object) -> Storage:
        storage = storage_of(saved_id)
        storages.setdefault(storage.key, storage)
        return storage

    value = PickleMachine(window, KNOWN, remember).load()
    extents = _walk_storages(window, storages)
    return value, lambda storage: extents[storage.key]


def _walk_storages(window: Window, storages: dict[str, Storage]) -> dict[str, tuple[int, int]]:
    keys = PickleMachine(window, KNOWN).load()
    if type(keys) is not list or not all(type(key) is str for key in keys) or set(keys) != storages.keys():
        raise Refused("its list of storages does not fit its tensors")
    if len(keys) != len(storages):
        raise Refused("its list of storages has duplicates")
    extents: dict[str, tuple[int, int]] = {}
    for key in keys:
        storage = storages[key]
        size = int.from_bytes(window.take(8), "little", signed=True)
        if size != storage.size:
            raise Refused(f"storage {key!r} has {size:,} elements, its tensors say {storage.size:,}")
        nbytes = storage.dtype.nbytes(size)
        extents[key] = window.skip(nbytes), nbytes
    return extents


def _stored(name: str, tensor: TorchTensor, file: SourceFile, locate: Locate, big_endian: bool) -> StoredTensor:
    dtype, shape, strides = tensor.dtype, tensor.shape, tensor.strides
    if tensor.size == 0:
        return StoredTensor(name, dtype, shape, file, 0)
    if dtype.nbytes(tensor.size) > _MAX_TENSOR_BYTES:
        raise Refused(f"tensor {name!r} claims the shape {shape}, too large for any tensor")
    start, available = locate(tensor.storage)
    first = tensor.storage.dtype.nbytes(tensor.storage.start) + dtype.nbytes(tensor.offset)
    end = first + dtype.nbytes(extent_of(shape, strides))
    if max(end, tensor.storage.dtype.nbytes(tensor.storage.size)) > available:
        raise Refused(f"tensor {name!r} reaches beyond its storage of {available:,} bytes (truncated?)")
    return strided_tensor(name, dtype, shape, file, start + first, strides, big_endian)
