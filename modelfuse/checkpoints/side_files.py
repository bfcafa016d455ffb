"""The files beside the weights that a server needs: configuration, tokenizer, templates, code."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from msgspec import Struct

from modelfuse.checkpoints import Checkpoint, read_config
from modelfuse.checkpoints.made_files import CONFIG_NAME, MADE, REPORT_NAME
from modelfuse.checkpoints.weight_files import is_weights
from modelfuse.errors import CheckpointError, RecipeError
from modelfuse.printable import is_printable
from modelfuse.recipe.checks import is_inside
from modelfuse.recipe.recipe import Recipe
from modelfuse.storage import PathOrUrl, Url, children, folder_of, has_file, is_dir, is_file, look_up, size_of
from modelfuse.storage.files import read_whole

#: Patterns of files that training or an earlier merge leaves in a folder.
LEFTOVERS = (CONFIG_NAME, REPORT_NAME, "trainer_state.json", "trainer_log.jsonl", "training_args.*", "*_results.json",
             "README.md", "latest", "latest_checkpointed_iteration.txt", "zero_to_fp32.py", "saved_signal_*",
             "running_log.txt", "training_*.png", "llamaboard_config.yaml", "events.out.tfevents.*",
             "rng_state*", "*.log", "predict_results*", "generated_predictions*")  # fmt: skip
GENERATION_FILE = "generation_config.json"
TEMPLATES = "additional_chat_templates"
#: Files of tokenizers, chat templates and generation settings.
TOKENIZERS = re.compile(
    r"tokenizer[\w.]*\.(json|model)|(special_tokens_map|added_tokens|vocab|tekken|generation_config)\.json"
    r"|(vocab|merges)\.txt|(spiece|sentencepiece\.bpe|source|target)\.(model|spm)|[\w.-]+\.tiktoken"
    rf"|chat_template\.(json|jinja)|{TEMPLATES}/.+|tokenization_\w+\.py"
)
#: sentence-transformers lists a model's modules in this file; those beside the transformer have a folder each.
MODULES_FILE = "modules.json"
#: Suffixes of a module's weights; the first is preferred.
MODULE_WEIGHTS = (".safetensors", ".bin")
#: Suffixes of files; a folder with such a name is an error, as it replaces a file.
FILES = (".json", ".jinja", ".model", ".py", ".txt", ".tiktoken", ".vocab", ".yaml", ".yml")
#: The largest file that is copied unasked, and the largest listing of modules, in bytes.
LARGEST, LARGEST_LISTING = 200_000_000, 1_000_000


class SideFile(Struct, frozen=True):
    """A file to copy unchanged: its path, its name in the output and its size in bytes."""

    source: PathOrUrl
    name: str
    size: int

    @property
    def holds_weights(self) -> bool:
        """Whether it contains tensors, which are copied, not merged."""
        return is_weights(self.name)


def files_to_serve(recipe: Recipe, reference: Checkpoint) -> tuple[SideFile, ...]:
    """The files to copy from the reference's folder, and those that the recipe names.

    Raises:
        CheckpointError: If a file in ``copy_file_list`` is not there, or another one is a link out of the folder.
        RecipeError: If it is one that the merge itself makes.
    """
    folder = folder_of(reference.path)
    named = [os.path.normpath(name) for name in recipe.copy_file_list]
    look_up(folder, named)
    for name in named:
        _check_named(folder, name)
    usual = _usual_of(folder, named)
    files = {name: folder / name for name in (*usual, *named)}
    if (other := tokenizer_folder(recipe)) is not None:
        files = {name: path for name, path in files.items() if name in named or not is_tokenizers(name)}
        files |= {name: other / name for name in _usual_of(other, ()) if is_tokenizers(name) and name not in named}
    if not recipe.copy_tokenizer:
        files = {name: path for name, path in files.items() if name in named or not belongs_to_tokenizer(name)}
    return tuple(SideFile(path, name, size_of(path)) for name, path in files.items())


def _usual_of(folder: PathOrUrl, named: Collection[str]) -> list[str]:
    """The files of a folder that a server needs; ``named`` are those that the user has requested."""
    here = {path.name: path for path in children(folder)}
    sizes = _sizes(here)
    modules = modules_of(read_whole(here[MODULES_FILE])) if lists_modules(sizes) else ()
    for name, path in here.items():
        if name in (TEMPLATES, *modules) and is_dir(path):
            sizes |= _sizes({f"{name}/{file.name}": file for file in children(path)})
    usual = usual_files(sizes, modules)
    unasked = sorted(set(usual) - set(named))
    if strange := next((name for name in unasked if not is_printable(name)), None):
        raise CheckpointError(
            f"{folder} holds a file that is called {strange!r}, with control characters",
            "Remove it, if it does not belong to the model. Do not trust this checkpoint.",
        )
    _refuse_links_outside(folder, unasked)
    for name in unasked:
        if sizes[name] > LARGEST:
            raise CheckpointError(
                f"{folder / name}, which belongs to a module that is not merged, is too large to be copied unasked",
                f"If a server needs it: --copy_file_list {name}.",
            )
    return usual


def tokenizer_folder(recipe: Recipe) -> PathOrUrl | None:
    """The folder of the tokenizer and generation settings, if it is not the reference's.

    Raises:
        RecipeError: If it is none, or has no tokenizer.
    """
    path = recipe.tokenizer_path
    if path is None:
        return None
    folder = folder_of(path)
    if not is_dir(folder) or not any(is_tokenizers(each.name) for each in children(folder)):
        raise RecipeError(
            f"tokenizer_from is {recipe.tokenizer_from}, which has no tokenizer", "Name a folder that has one."
        )
    return folder


def encoded_json(content: Mapping[str, object]) -> bytes:
    """Encode a small JSON file, indented."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def belongs_to_tokenizer(name: str) -> bool:
    """Whether a file is a tokenizer's or a chat template, by its name."""
    return is_tokenizers(name) and name != GENERATION_FILE


def is_tokenizers(name: str) -> bool:
    """Whether a file is one of a tokenizer, a chat template or generation settings, by its name."""
    return TOKENIZERS.fullmatch(name) is not None


def special_tokens(recipe: Recipe) -> dict[str, object]:
    """The ids of special tokens for config.json, if the tokenizer is taken from elsewhere."""
    folder = tokenizer_folder(recipe)
    if folder is None:
        return {}
    config = read_config(folder)
    return {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}


def _check_named(folder: PathOrUrl, name: str) -> None:
    """Check a file of ``copy_file_list``."""
    if not is_file(folder / name):
        raise CheckpointError(f"copy_file_list names {name}, which is not in {folder}")
    if MADE.fullmatch(name):
        raise RecipeError(
            f"copy_file_list names {name}, which would take the place of what the merge writes",
            "Weights are merged, not copied: leave it out.",
        )


def _sizes(paths: Mapping[str, PathOrUrl]) -> dict[str, int]:
    """The sizes of the files among what is in a folder.

    Raises:
        CheckpointError: If something that would be copied is there but cannot be read: a server would lack it.
    """
    return {name: size_of(path) for name, path in paths.items() if _is_here(name, path)}


def _is_here(name: str, path: PathOrUrl) -> bool:
    own = name.rpartition("/")[2]
    if not own.startswith(".") and not is_weights(own) and not _is_left_over(own):
        return (own.endswith(FILES) or not is_dir(path)) and has_file(path)
    return is_file(path)


def _refuse_links_outside(folder: PathOrUrl, names: Iterable[str]) -> None:
    """Refuse links out of the folder: an untrusted checkpoint must not choose which other files are published."""
    if isinstance(folder, Url):  # A store has no links.
        return
    home = folder.resolve()
    homes = [home]
    if home.parent.name == "snapshots":  # The hub's cache keeps what is in them beside, or for all models together.
        homes += [home.parents[1] / "blobs", home.parents[2] / "blobs"]
    for name in names:
        target = (folder / name).resolve()
        if not any(each in target.parents for each in homes):
            raise CheckpointError(
                f"{folder / name} is a link to {target}, outside the model's folder: it is not copied unasked",
                f"If it belongs to the model: --copy_file_list {name}. Otherwise remove the link.",
            )


def lists_modules(sizes: Mapping[str, int]) -> bool:
    """Whether a model has a list of modules, of a size that may be read; ``sizes`` are its files'."""
    return sizes.get(MODULES_FILE, LARGEST_LISTING + 1) <= LARGEST_LISTING


def modules_of(content: bytes) -> tuple[str, ...]:
    """The folders that sentence-transformers' modules.json names, directly in the model's.

    >>> modules_of(b'[{"path": ""}, {"path": "1_Pooling"}, {"path": "../up"}]')
    ('1_Pooling',)
    """
    try:
        listed = json.loads(content)
        paths = [str(each["path"]) for each in listed]
    except (ValueError, TypeError, KeyError, RecursionError):
        return ()  # Whoever loads the model will say it.
    return tuple(Path(path).name for path in paths if is_inside(path) and len(Path(path).parts) == 1)


def usual_files(sizes: Mapping[str, int], modules: Collection[str] = ()) -> list[str]:
    """Select the files that a server needs, by name and size.

    Args:
        sizes: The files, by their paths in the model's folder.
        modules: The folders of sentence-transformers' modules.
    """
    return [name for name, size in sizes.items() if _is_usual(name, size, sizes, modules)]


def _is_left_over(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in LEFTOVERS)


def _is_usual(name: str, size: int, names: Collection[str], modules: Collection[str]) -> bool:
    if "/" not in name:
        return not name.startswith(".") and not is_weights(name) and not _is_left_over(name) and size <= LARGEST
    folder, _, file = name.rpartition("/")
    if folder == TEMPLATES:
        return file.endswith(".jinja")
    if folder not in modules or file.startswith("."):
        return False
    # A module may have weights of its own, in one of two formats or in both.
    own = [each for each in names if each.startswith(f"{folder}/")]
    form = MODULE_WEIGHTS[not any(each.endswith(MODULE_WEIGHTS[0]) for each in own)]
    return file.endswith((form, f"{form}.index.json")) or not is_weights(file)


def weights_of_modules(sizes: Mapping[str, int], modules: Collection[str]) -> list[str]:
    """Of a model's files, those with weights of modules."""
    return [name for name in sizes if name.partition("/")[0] in modules and "/" in name and is_weights(name)]
