"""Find the weight files of a model in a folder, and name those of an output."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from modelfuse.checkpoints.json_files import read_json
from modelfuse.errors import CheckpointError
from modelfuse.printable import is_printable
from modelfuse.storage import PathOrUrl, Url, is_file, look_up

#: Suffixes of files with weights or training state.
WEIGHTS = (".safetensors", ".bin", ".pdparams", ".pt", ".pth", ".pdopt", ".msgpack", ".h5", ".gguf", ".onnx", ".ckpt",
           ".ot", ".pdiparams", ".pdmodel", ".pdstates", ".npz", ".distcp")  # fmt: skip
#: Suffixes of files that can be opened directly, and their formats.
READABLE = {".safetensors": "safetensors", ".bin": "torch", ".pt": "torch", ".pth": "torch", ".ckpt": "torch",
            ".pdparams": "paddle"}  # fmt: skip
#: diffusers' stem of weight files.
DIFFUSERS = "diffusion_pytorch_model"
#: For each prefix: format, stem and suffix of its files, the preferred first.
_KNOWN: Mapping[str, tuple[tuple[str, str, str], ...]] = {
    "model": (
        ("safetensors", "model", ".safetensors"), ("torch", "pytorch_model", ".bin"),
        ("paddle", "model_state", ".pdparams"),
        ("safetensors", DIFFUSERS, ".safetensors"), ("torch", DIFFUSERS, ".bin"),
    ),
    "master_weights": tuple(
        (READABLE[suffix], "master_weights", suffix) for suffix in (".safetensors", ".bin", ".pdparams")
    ),
    "adapter_model": (("safetensors", "adapter_model", ".safetensors"), ("torch", "adapter_model", ".bin")),
    "peft_model": (("safetensors", "peft_model", ".safetensors"), ("paddle", "lora_model_state", ".pdparams")),
}  # fmt: skip
#: Standard stems of whole models; an output's safetensors files have the stem ``model``.
_STANDARD = ("model", "pytorch_model", "model_state", "master_weights")
_INDEX = re.compile(r".+\.(?:safetensors|bin|pdparams)\.index(?:\.[\w-]+)?\.json")
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<total>\d+)")
#: Checkpoint folders of training, each with a model of its own.
_TRAINED = re.compile(r"(?:checkpoint|epoch|step|iter)[-_]\d+")
#: The most names that an error lists.
MOST_NAMED = 6


class Format(NamedTuple):
    """The format and file names of a model.

    Attributes:
        kind: ``safetensors``, ``torch`` or ``paddle``.
        stem: The stem of the file's name.
        suffix: The suffix.
        variant: A variant between both, such as ``fp16``, or an empty string.
    """

    kind: str
    stem: str
    suffix: str
    variant: str | None = None

    @property
    def whole_stem(self) -> str:
        """The file's name without its ending."""
        return self.stem if self.variant is None else f"{self.stem}.{self.variant}"

    @property
    def file(self) -> str:
        """The file's name."""
        return f"{self.whole_stem}{self.suffix}"

    @property
    def index_file(self) -> str:
        """The name of the index of its shards."""
        return index_of(self.file)

    @property
    def output_stem(self) -> str | None:
        """The stem of an output's files, so that loaders find them; None: the usual one."""
        if self.stem == DIFFUSERS:
            return self.whole_stem
        return f"model.{self.variant}" if self.variant is not None and self.stem in _STANDARD else None


def index_of(file: str) -> str:
    """The name of the index of a weight file's shards, as in transformers and diffusers.

    >>> index_of("model.safetensors"), index_of("model.fp16.safetensors")
    ('model.safetensors.index.json', 'model.safetensors.index.fp16.json')
    """
    whole, suffix = Path(file).stem, Path(file).suffix
    stem, _, variant = whole.partition(".")
    variants = stem in (*_STANDARD, DIFFUSERS) and variant
    return f"{stem}{suffix}.index.{variant}.json" if variants else f"{whole}{suffix}.index.json"


def is_index(name: str) -> bool:
    """Whether a file is an index of shards, by its name."""
    return _INDEX.fullmatch(name) is not None


def is_weights(name: str) -> bool:
    """Whether a file holds weights, training state, or their index, by its name."""
    return name.endswith(WEIGHTS) or is_index(name)


def format_of(path: PathOrUrl, prefix: str) -> Format:
    """The format of a weight file that the user has named.

    Raises:
        CheckpointError: If it is one shard of several, or of no known format.
    """
    shard = _SHARD.fullmatch(Path(path.name).stem)
    if shard is not None and int(shard["total"]) > 1:
        raise CheckpointError(
            f"{path} is one shard of {int(shard['total'])}", f"Name the folder {path.parent} instead."
        )
    if path.suffix not in READABLE:
        raise CheckpointError(f"{path} is none of {', '.join(READABLE)}")
    stem = shard["stem"] if shard is not None else Path(path.name).stem
    own, _, variant = stem.partition(".")
    known = {each for _, each, _ in _KNOWN.get(prefix, ())}
    if own in known and variant:
        return Format(READABLE[path.suffix], own, path.suffix, variant)
    return Format(READABLE[path.suffix], stem, path.suffix)


def _formats(prefix: str, names: Collection[str]) -> Iterator[Format]:
    """The formats of one prefix, preferred first: if a folder has several, the first is read.

    A variant is a model of its own; it is only used if there are no files without a variant.
    """
    plain = [Format(*each) for each in _KNOWN[prefix]]
    yield from plain
    for form in plain if prefix == "model" else ():
        found = {
            match["variant"]
            for name in names
            if (match := re.fullmatch(
                rf"{form.stem}\.(?P<variant>[\w-]+?)(?:-\d+-of-\d+)?{re.escape(form.suffix)}", name
            ))
        }  # fmt: skip
        if len(found) == 1:
            yield form._replace(variant=found.pop())


class WeightFiles(NamedTuple):
    """The weight files of a model: their format, their names, and the index's weight map if there is one."""

    format: Format
    names: list[str]
    weight_map: dict[str, str] | None


def find_files(folder: object, names: Collection[str], prefix: str, get: Callable[[str], PathOrUrl]) -> WeightFiles:
    """Find the weight files in a folder: by an index, as one file, or as numbered shards.

    Args:
        folder: The folder, for errors.
        names: All its files.
        prefix: As for :func:`open_checkpoint`.
        get: Returns the path to read a small file of the folder.

    Raises:
        CheckpointError: If there is no checkpoint, a shard is missing, or an index is malformed.
    """
    for form in _formats(prefix, names):
        index = form.index_file
        if index in names:
            weight_map = _read_weight_map(folder, names, index, get(index))
            if form.file not in weight_map.values() and form.file in names:
                raise CheckpointError(
                    f"{folder} holds two models: {form.file}, and the shards that {index} names",
                    "Remove the one that is out of date.",
                )
            return WeightFiles(form, sorted(set(weight_map.values())), weight_map)
        if form.file in names:
            return WeightFiles(form, [form.file], None)
        if shards := _numbered_shards(folder, names, form):
            return WeightFiles(form, shards, None)
    raise _no_checkpoint(folder, names, prefix)


def _read_weight_map(folder: object, names: Collection[str], index: str, path: PathOrUrl) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder}/{index} has no weight_map")
    look_up(path.parent, [file for file in weight_map.values() if isinstance(file, str)])  # Not all servers list all.
    for file in {file if isinstance(file, str) else "" for file in weight_map.values()}:
        if not file or not is_printable(file) or file in (".", "..") or Path(file).name != file or "\\" in file:
            raise CheckpointError(
                f"{folder}/{index} names the file {file!r}, which is not in its folder",
                "An index may only name files beside it. Do not trust this checkpoint.",
            )
        if file not in names and not (isinstance(path, Url) and is_file(path.with_name(file))):
            raise CheckpointError(f"{folder}/{file} is missing, but {index} names it", "Fetch the missing shard.")
    return weight_map


def _numbered_shards(folder: object, names: Collection[str], form: Format) -> list[str]:
    pattern = re.compile(rf"{re.escape(form.whole_stem)}-(\d+)-of-(\d+){re.escape(form.suffix)}")
    found = {match[0]: match for name in names if (match := pattern.fullmatch(name))}
    totals = {int(match[2]) for match in found.values()}
    if not found:
        return []
    numbers = sorted(int(match[1]) for match in found.values())
    if len(totals) > 1 or numbers != list(range(1, max(totals) + 1)):
        raise CheckpointError(
            f"{folder} holds {len(found)} of {max(totals)} shards of {form.file} and no index",
            f"Fetch the missing shards, or {form.index_file}.",
        )
    return sorted(found)


def _no_checkpoint(folder: object, names: Collection[str], prefix: str) -> CheckpointError:
    expected = ", ".join(Format(*each).file for each in _KNOWN[prefix])
    message = f"{folder} holds no checkpoint: looked for {expected} (and their shards)"
    return CheckpointError(message, _what_is_there(folder, sorted(names), prefix))


def _what_is_there(folder: object, names: list[str], prefix: str) -> str:
    """A hint for a folder without a model: what it has instead, and what to do with that."""
    other = {"model": "master_weights", "master_weights": "model"}.get(prefix)
    there = [Format(*each).file for each in _KNOWN[other] if Format(*each).file in names] if other else []
    if there:
        return f"It has {there[0]}: use --merge_prefix {other}."
    if "model_index.json" in names:
        return f"It is a pipeline of diffusers: name one of its parts, such as {folder}/unet."
    if trained := sorted((name for name in names if _TRAINED.fullmatch(name)), key=_number):
        return f"Training has left {_listed(trained)} in it: name one of them, such as {folder}/{trained[-1]}."
    states = [name for name in names if name.startswith("global_step")]
    if "zero_to_fp32.py" in names or states or any(name.endswith(".distcp") for name in names):
        how = "python zero_to_fp32.py . ." if "zero_to_fp32.py" in names else "the program that trained it"
        return f"It holds {_listed(states) or 'parts of'} a sharded training state: make a model of it with {how}."
    if weights := [name for name in names if Path(name).suffix in READABLE]:
        verb = "are" if len(weights) > 1 else "is"
        return f"There {verb} {_listed(weights)}: name the file itself, such as {folder}/{weights[0]}."
    return f"It holds {_listed(names) or 'nothing'}. A file with weights may be named, too."


def _number(name: str) -> int:
    return int(re.sub(r"\D", "", name))


def _listed(names: list[str]) -> str:
    more = [f"and {len(names) - MOST_NAMED} more"] if len(names) > MOST_NAMED else []
    return ", ".join([*names[:MOST_NAMED], *more])
