"""Where tensors come from and go to.

``open_checkpoint(path)`` turns any folder that holds a model into a Mapping of names to
:class:`StoredTensor`, reading headers only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from modelfuse.checkpoints.formats.safetensors import read_safetensors
from modelfuse.checkpoints.tensors import Checkpoint, StoredTensor
from modelfuse.dtypes import BF16, BY_NAME
from modelfuse.errors import CheckpointError
from modelfuse.storage import Place, Url, children, has_file, is_dir, is_file, look_up
from modelfuse.storage.concurrent import each_of
from modelfuse.storage.files import SourceFile, read_bytes

__all__ = ["CONFIG_FILE", "Checkpoint", "StoredTensor", "find_files", "open_checkpoint"]

MAX_JSON_BYTES = 256_000_000
CONFIG_FILE = "config.json"

Tensors = dict[str, StoredTensor]


class Contents(NamedTuple):
    """What the headers of one file, or of all of a checkpoint's, say."""

    tensors: Tensors
    aliases: dict[str, str]
    metadata: dict[str, str]


class Format(NamedTuple):
    """A way to store a model: its kind, its file's name, and how to read one file."""

    kind: str
    file: str
    read: Callable[[Place], Contents]


def _from_safetensors(path: Place) -> Contents:
    tensors, metadata = read_safetensors(path)
    hides = any(stored.dtype.name == "U16" for stored in tensors.values()) and _hides_bfloat16(path, metadata)
    return Contents(_as_bfloat16(tensors) if hides else tensors, {}, metadata)


def _from_torch(path: Place) -> Contents:
    from modelfuse.checkpoints.formats.torch_reader import read_torch

    return Contents(*read_torch(path), {})


def _from_paddle(path: Place) -> Contents:
    from modelfuse.checkpoints.formats.paddle_reader import read_paddle

    return Contents(*read_paddle(path), {})


#: What is known by one prefix: the names of its safetensors, torch and Paddle files; None where there are none.
_STEMS: Mapping[str, tuple[str, str | None, str | None]] = {
    "model": ("model", "pytorch_model", "model_state"),
    "master_weights": ("master_weights", "master_weights", "master_weights"),
    "adapter_model": ("adapter_model", "adapter_model", None),
    "peft_model": ("peft_model", None, "lora_model_state"),
}


def _formats(prefix: str) -> tuple[Format, ...]:
    """The formats of one prefix, best first: where a folder holds several, the first is read."""
    safe, torch, paddle = _STEMS[prefix]
    return (
        Format("safetensors", f"{safe}.safetensors", _from_safetensors),
        *([Format("torch", f"{torch}.bin", _from_torch)] if torch else []),
        *([Format("paddle", f"{paddle}.pdparams", _from_paddle)] if paddle else []),
    )


def open_checkpoint(path: Place, prefix: str = "model") -> Checkpoint:
    """Open the checkpoint in a folder, reading its headers only.

    Args:
        path: A folder, or the one file that holds all the weights.
        prefix: ``model``, or ``master_weights`` for the float32 copies that mixed-precision
            training keeps; ``adapter_model`` and ``peft_model`` for the tensors of PEFT's and Paddle's adapters.

    Returns:
        The checkpoint: every tensor's name, type, shape and place.

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
        _refuse_shard(path)
        folder, names, form = path.parent, [path.name], _format_of(path, prefix)
    else:
        raise CheckpointError(f"There is no folder {path}", "Check the path. A hub name has the form org/model.")
    contents = _join(path, dict(zip(names, each_of(form.read, [folder / name for name in names]), strict=True)))
    if weight_map is not None:
        _check_index(path, weight_map, contents)
    if not contents.tensors:
        raise CheckpointError(f"{folder / names[0]} holds no tensors")
    return Checkpoint(path, form.kind, *contents, read_config(folder))


def _check_all_are_files(folder: Place, names: list[str]) -> None:
    """Refuse links that lead nowhere, pipes and the like among the weight files on a disk."""
    for path in (folder / name for name in names if not isinstance(folder, Url)):
        try:
            has_file(path)
        except CheckpointError as error:
            message = f"{folder} holds no checkpoint that can be read: {error.message}"
            raise CheckpointError(message, error.hint) from error


def _join(path: Place, files: Mapping[str, Contents]) -> Contents:
    """The contents of all files as one; no name may be in two of them."""
    whole, owners = Contents({}, {}, {}), dict[str, str]()
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
    return whole


def read_config(folder: Place) -> dict[str, object]:
    """The contents of config.json in a folder, or an empty dict.

    Raises:
        CheckpointError: If the file is there but cannot be read, or is not a JSON object.
    """
    path = folder / CONFIG_FILE
    return read_json(path) if has_file(path) else {}


def read_json(path: Place) -> dict[str, object]:
    """Read a JSON object from a file.

    Raises:
        CheckpointError: If it is too large, not JSON, or not an object.
    """
    file = SourceFile.at(path)
    if file.size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path} has {file.size:,} bytes, too many for a file of its kind")
    try:
        content = json.loads(read_bytes(file, 0, file.size))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return content


def _refuse_shard(path: Place) -> None:
    number = re.search(r"-(\d+)-of-(\d+)\.\w+$", path.name)
    if number is not None and int(number[2]) > 1:
        raise CheckpointError(f"{path} is one shard of {int(number[2])}", f"Name the folder {path.parent} instead.")


def _format_of(path: Place, prefix: str) -> Format:
    for form in _formats(prefix):
        if path.suffix == Path(form.file).suffix:
            return form
    raise CheckpointError(f"{path} is no .safetensors, .bin or .pdparams file")


class Files(NamedTuple):
    """Which files hold a model: how they are stored, their names, and what the index says if there is one."""

    format: Format
    names: list[str]
    weight_map: dict[str, str] | None


def find_files(place: object, names: Collection[str], prefix: str, get: Callable[[str], Place]) -> Files:
    """Which of a folder's files hold the model: by index, as one file, or as numbered shards.

    Args:
        place: The folder, for errors.
        names: All its files.
        prefix: As for :func:`open_checkpoint`.
        get: Where to read a small one of them.

    Raises:
        CheckpointError: If there is no checkpoint, a shard is missing, or an index is malformed.
    """
    for form in _formats(prefix):
        index = f"{form.file}.index.json"
        if index in names:
            weight_map = _read_weight_map(place, names, index, get(index))
            if form.file not in weight_map.values() and form.file in names:
                raise CheckpointError(
                    f"{place} holds two models: {form.file}, and the shards that {index} names",
                    "Remove the one that is out of date.",
                )
            return Files(form, sorted(set(weight_map.values())), weight_map)
        if form.file in names:
            return Files(form, [form.file], None)
        if shards := _numbered_shards(place, names, form):
            return Files(form, shards, None)
    raise _no_checkpoint(place, names, prefix)


def _read_weight_map(place: object, names: Collection[str], index: str, path: Place) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{place}/{index} has no weight_map")
    look_up(path.parent, [file for file in weight_map.values() if isinstance(file, str)])  # Not all servers list all.
    for file in {file if isinstance(file, str) else "" for file in weight_map.values()}:
        if not file or "\0" in file or file in (".", "..") or Path(file).name != file or "\\" in file:
            raise CheckpointError(
                f"{place}/{index} names the file {file!r}, which is not in its folder",
                "An index may only name files beside it. Do not trust this checkpoint.",
            )
        if file not in names and not (isinstance(path, Url) and is_file(path.with_name(file))):
            raise CheckpointError(f"{place}/{file} is missing, but {index} names it", "Fetch the missing shard.")
    return weight_map


def _numbered_shards(place: object, names: Collection[str], form: Format) -> list[str]:
    stem, suffix = Path(form.file).stem, Path(form.file).suffix
    pattern = re.compile(rf"{re.escape(stem)}-(\d+)-of-(\d+){re.escape(suffix)}")
    found = {match[0]: match for name in names if (match := pattern.fullmatch(name))}
    totals = {int(match[2]) for match in found.values()}
    if not found:
        return []
    numbers = sorted(int(match[1]) for match in found.values())
    if len(totals) > 1 or numbers != list(range(1, max(totals) + 1)):
        raise CheckpointError(
            f"{place} holds {len(found)} of {max(totals)} shards of {stem}{suffix} and no index",
            f"Fetch the missing shards, or {form.file}.index.json.",
        )
    return sorted(found)


def _no_checkpoint(place: object, names: Collection[str], prefix: str) -> CheckpointError:
    expected = ", ".join(form.file for form in _formats(prefix))
    other = {"model": "master_weights", "master_weights": "model"}.get(prefix)
    found = [form.file for form in _formats(other) if form.file in names] if other else []
    hint = f"It has {found[0]}: use --merge_prefix {other}." if found else None
    return CheckpointError(f"{place} holds no checkpoint: looked for {expected} (and their shards)", hint)


def _check_index(path: Place, weight_map: dict[str, str], contents: Contents) -> None:
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


def _hides_bfloat16(path: Place, metadata: Mapping[str, str]) -> bool:
    """Whether a file's uint16 tensors are bfloat16: numpy has no such type, so Paddle's tools write U16."""
    config = read_config(path.parent)
    declared = config.get("dtype", config.get("torch_dtype"))
    return metadata.get("format") in ("np", "numpy", "pd", "paddle") or declared == "bfloat16"


def _as_bfloat16(tensors: Tensors) -> Tensors:
    unsigned = BY_NAME["U16"]
    return {
        name: replace(stored, dtype=BF16) if stored.dtype is unsigned else stored for name, stored in tensors.items()
    }
