"""The safetensors format: an 8-byte length, a JSON header, then all tensors without gaps.

The rules of a valid file are those of the reference implementation (https://github.com/huggingface/safetensors); all of
them are checked before the content is used.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

from modelfuse.checkpoints.tensors import Frame, StoredTensor
from modelfuse.dtypes import BY_NAME, DType
from modelfuse.errors import CheckpointError
from modelfuse.storage import PathOrUrl
from modelfuse.storage.files import SourceFile, read_bytes

MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 64
ALIGNMENT = 8
#: The start of a Git LFS pointer, which a clone without Git LFS has instead of a large file.
LFS_POINTER = b"version https://git-lfs"


def read_safetensors(path: PathOrUrl) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Read the header of one safetensors file.

    Returns:
        Its tensors by name in the order of their bytes, and its ``__metadata__``.

    Raises:
        CheckpointError: If the file breaks any rule of the format.
    """
    file = SourceFile.at(path)
    header, data_start = _read_header(file)
    metadata = _check_metadata(path, header.pop("__metadata__", {}))
    entries = [_check_entry(path, name, entry) for name, entry in header.items()]
    entries.sort(key=lambda entry: (entry[3], entry[4]))
    del header
    tensors: dict[str, StoredTensor] = {}
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}
    position = 0
    for name, dtype, shape, begin, end in entries:
        if begin != position:
            _invalid(path, f"tensor {name!r} starts at byte {begin:,}, expected {position:,} (gap or overlap)")
        # Saves memory: a model may have a hundred thousand tensors, and models share names and shapes.
        name, shape = sys.intern(name), shapes.setdefault(shape, shape)
        tensors[name] = StoredTensor(name, dtype, shape, file, data_start + begin)
        position = end
    if data_start + position != file.size:
        _invalid(
            path,
            f"the header describes {data_start + position:,} bytes, the file has {file.size:,}"
            + (" (truncated download?)" if file.size < data_start + position else ""),
        )
    return tensors, metadata


def frame_safetensors(tensors: Sequence[tuple[str, DType, Sequence[int]]], metadata: Mapping[str, str]) -> Frame:
    """Lay out a safetensors file: the tensors follow the header."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    starts: list[int] = []
    for name, dtype, shape in tensors:
        end = position + dtype.nbytes(math.prod(shape))
        header[name] = {"dtype": dtype.name, "shape": list(shape), "data_offsets": [position, end]}
        starts.append(position)
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    prefix = len(text).to_bytes(8, "little") + text
    offsets = tuple(len(prefix) + start for start in starts)
    return Frame(((0, prefix),), offsets, len(prefix) + position)


def _read_header(file: SourceFile) -> tuple[dict[str, object], int]:
    if file.size < 8:
        _invalid(file.path, f"it has {file.size} bytes, too few for a header")
    start = read_bytes(file, 0, min(file.size, len(LFS_POINTER)))
    if start == LFS_POINTER:
        raise CheckpointError(f"{file.path} is a Git LFS pointer, not the weights", "Run `git lfs pull` in its folder.")
    length = int.from_bytes(start[:8], "little")
    if length > MAX_HEADER_BYTES:
        _invalid(file.path, f"its header claims {length:,} bytes, more than the {MAX_HEADER_BYTES:,} allowed")
    if 8 + length > file.size:
        _invalid(file.path, f"its header claims {length:,} bytes, the file has {file.size:,} (truncated?)")
    text = read_bytes(file, 8, length)
    if not text.startswith(b"{"):
        _invalid(file.path, "its header does not start with '{'")
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        _invalid(file.path, f"its header is not valid JSON: {error}")
    return header, 8 + length


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the name {twice!r} occurs twice")
    return keys


def _check_metadata(path: PathOrUrl, metadata: object) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _invalid(path, "its __metadata__ is not a map of strings")
    return metadata


def _check_entry(path: PathOrUrl, name: str, entry: object) -> tuple[str, DType, tuple[int, ...], int, int]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        _invalid(path, f"tensor {name!r} needs exactly dtype, shape and data_offsets")
    dtype = BY_NAME.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        _invalid(path, f"tensor {name!r} has the unknown dtype {entry['dtype']!r}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_counts(shape):
        _invalid(path, f"tensor {name!r} has the impossible shape {shape!r}")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _invalid(path, f"tensor {name!r} has the impossible data_offsets {offsets!r}")
    begin, end = offsets
    bits = math.prod(shape) * dtype.bits
    if bits % 8 or bits // 8 != end - begin:
        _invalid(path, f"tensor {name!r} of shape {shape} and dtype {dtype.name} cannot fill {end - begin:,} bytes")
    return name, dtype, tuple(shape), begin, end


def _are_counts(values: object) -> bool:
    if not isinstance(values, list) or len(values) > MAX_DIMENSIONS:
        return False
    for value in values:  # noqa: SIM110 - a generator would take twice the time, for every tensor of a large model
        if type(value) is not int or not 0 <= value < 2**63:
            return False
    return True


def _invalid(path: PathOrUrl, why: str) -> NoReturn:
    raise CheckpointError(f"{path} is not a valid safetensors file: {why}", "Fetch or save it again.")
