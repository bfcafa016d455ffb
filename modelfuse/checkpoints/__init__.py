"""Read and write checkpoints.

``open_checkpoint(path)`` opens any folder with a model as a mapping of names to :class:`StoredTensor`, reading headers
only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

from modelfuse.checkpoints.formats.safetensors import read_safetensors
from modelfuse.checkpoints.json_files import read_json
from modelfuse.checkpoints.tensors import Checkpoint, StoredTensor
from modelfuse.checkpoints.weight_files import find_files, format_of
from modelfuse.dtypes import BF16, BY_NAME
from modelfuse.errors import CheckpointError
from modelfuse.printable import is_printable
from modelfuse.storage import PathOrUrl, Url, children, has_file, is_dir, is_file
from modelfuse.storage.concurrent import each_of

__all__ = ["CONFIG_FILE", "Checkpoint", "StoredTensor", "open_checkpoint", "read_config", "read_json"]

CONFIG_FILE = "config.json"

Tensors = dict[str, StoredTensor]


class Headers(NamedTuple):
    """The headers of one file, or of all files of a checkpoint together."""

    tensors: Tensors
    aliases: dict[str, str]
    metadata: dict[str, str]


def _from_safetensors(path: PathOrUrl) -> Headers:
    tensors, metadata = read_safetensors(path)
    hides = any(stored.dtype.name == "U16" for stored in tensors.values()) and _hides_bfloat16(path, metadata)
    return Headers(_as_bfloat16(tensors) if hides else tensors, {}, metadata)


def _from_torch(path: PathOrUrl) -> Headers:
    from modelfuse.checkpoints.formats.torch_reader import read_torch

    return Headers(*read_torch(path), {})


def _from_paddle(path: PathOrUrl) -> Headers:
    from modelfuse.checkpoints.formats.paddle_reader import read_paddle

    return Headers(*read_paddle(path), {})


_READERS: Mapping[str, Callable[[PathOrUrl], Headers]] = {
    "safetensors": _from_safetensors, "torch": _from_torch, "paddle": _from_paddle,
}  # fmt: skip


def open_checkpoint(path: PathOrUrl, prefix: str = "model") -> Checkpoint:
    """Open the checkpoint in a folder, reading its headers only.

    Args:
        path: A folder, or the one file that holds all the weights.
        prefix: ``model``, or ``master_weights`` for the float32 copies that mixed-precision
            training keeps; ``adapter_model`` and ``peft_model`` for the tensors of PEFT's and Paddle's adapters.

    Returns:
        The checkpoint: the name, type, shape and location of each tensor.

    Raises:
        CheckpointError: If there is no checkpoint, a shard is missing, or any file is malformed.
    """
    weight_map = None
    if is_dir(path):
        folder = path
        # On a disk all names count: a link that leads nowhere must not make another format the model.
        here = {each.name for each in children(folder) if not isinstance(each, Url) or is_file(each)}
        form, names, weight_map = find_files(folder, here, prefix, folder.__truediv__)
        _check_all_are_files(folder, names)
    elif is_file(path):
        folder, names, form = path.parent, [path.name], format_of(path, prefix)
    else:
        raise CheckpointError(f"There is no folder {path}", "Check the path. A hub name has the form org/model.")
    contents = _join(
        path, dict(zip(names, each_of(_READERS[form.kind], [folder / name for name in names]), strict=True))
    )
    if weight_map is not None:
        _check_index(path, weight_map, contents)
    if not contents.tensors:
        raise CheckpointError(f"{folder / names[0]} holds no tensors")
    return Checkpoint(path, form.kind, *contents, read_config(folder), stem=form.output_stem)


def _check_all_are_files(folder: PathOrUrl, names: list[str]) -> None:
    """Refuse dangling links, pipes and the like among local weight files."""
    for path in (folder / name for name in names if not isinstance(folder, Url)):
        try:
            has_file(path)
        except CheckpointError as error:
            message = f"{folder} holds no checkpoint that can be read: {error.message}"
            raise CheckpointError(message, error.hint) from error


def _join(path: PathOrUrl, files: Mapping[str, Headers]) -> Headers:
    """Combine the headers of all files; no name may be in two of them."""
    whole, owners = Headers({}, {}, {}), dict[str, str]()
    for name, part in files.items():
        for tensor in (*part.tensors, *part.aliases):
            if tensor in owners:
                raise CheckpointError(f"{path}: tensor {tensor!r} is in {owners[tensor]} and in {name}")
            owners[tensor] = name
        whole.tensors.update(part.tensors)
        whole.aliases.update(part.aliases)
        for key, value in part.metadata.items():
            whole.metadata.setdefault(key, value)
    for text in (*owners, *whole.metadata, *whole.metadata.values()):
        try:
            text.encode()
        except UnicodeEncodeError as error:  # An escape can stand for half a character.
            raise CheckpointError(f"{path} holds {text!r}, which is no valid text") from error
    if strange := next((name for name in owners if not is_printable(name)), None):
        message = f"{path} holds a tensor that is called {strange!r}, with control characters"
        raise CheckpointError(message, "Do not trust this checkpoint.")
    return whole


def read_config(folder: PathOrUrl) -> dict[str, object]:
    """The contents of config.json in a folder, or an empty dict.

    Raises:
        CheckpointError: If the file is there but cannot be read, or is not a JSON object.
    """
    path = folder / CONFIG_FILE
    return read_json(path) if has_file(path) else {}


def _check_index(path: PathOrUrl, weight_map: dict[str, str], contents: Headers) -> None:
    tensors, aliases = contents.tensors, contents.aliases
    for name, file in weight_map.items():
        stored = tensors.get(aliases.get(name, name))
        if stored is None or stored.file.path.name != file:
            raise CheckpointError(
                f"{path}: the index puts tensor {name!r} into {file}, which does not hold it",
                "The index and the shards do not belong together; fetch both again.",
            )
    if missing := [name for name in tensors if name not in weight_map]:
        raise CheckpointError(
            f"{path}: {len(missing)} tensors are in the shards but not in the index, such as {missing[0]!r}",
            "The index and the shards do not belong together; fetch both again.",
        )


def _hides_bfloat16(path: PathOrUrl, metadata: Mapping[str, str]) -> bool:
    """Whether a file's uint16 tensors are bfloat16: numpy has no such type, so Paddle's tools write U16."""
    config = read_config(path.parent)
    declared = config.get("dtype", config.get("torch_dtype"))
    return metadata.get("format") in ("np", "numpy", "pd", "paddle") or declared == "bfloat16"


def _as_bfloat16(tensors: Tensors) -> Tensors:
    unsigned = BY_NAME["U16"]
    return {
        name: replace(stored, dtype=BF16) if stored.dtype is unsigned else stored for name, stored in tensors.items()
    }
