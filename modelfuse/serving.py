"""The files beside the weights that a server needs: configuration, tokenizer, templates, code."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch

from modelfuse.checkpoints import Checkpoint
from modelfuse.errors import CheckpointError, RecipeError
from modelfuse.recipe import Recipe
from modelfuse.storage import Place, Url, children, is_dir, is_file, look_up, size_of

#: Endings of files that hold weights or training state: everything else beside the weights is small and copied.
WEIGHTS = (".safetensors", ".bin", ".pdparams", ".pt", ".pth", ".pdopt", ".msgpack", ".h5", ".gguf", ".onnx", ".ckpt",
           ".ot", ".index.json", ".pdiparams", ".pdmodel", ".pdstates", ".npz", ".distcp")  # fmt: skip
#: What a training run or an earlier merge leaves in the folder.
LEFTOVERS = ("merge_config.json", "merge_report.json", "trainer_state.json", "training_args.json",
             "all_results.json", "train_results.json", "eval_results.json", "README.md")  # fmt: skip
#: What the merge itself writes, and what a loader would take for it.
MADE = re.compile(
    r"(model|master_weights|pytorch_model|model_state)(-\d+-of-\d+)?\.(safetensors|bin|pdparams)(\.index\.json)?"
    r"|merge_(config|report)\.json"
)
TEMPLATES = "additional_chat_templates"
#: sentence-transformers lists a model's modules in this file; those that follow the transformer have a folder each.
MODULES_FILE, MODULES = "modules.json", "[0-9]*_*"
#: A module's weights, the format first that is loaded where there are both.
MODULE_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
#: Larger files are no configuration; tokenizers stay well below.
LARGEST = 200_000_000


@dataclass(frozen=True, slots=True)
class SideFile:
    """A file to copy as it is: from where, to which name in the output, its size in bytes."""

    source: Place
    name: str
    size: int

    @property
    def holds_weights(self) -> bool:
        """Whether there are tensors in it, which are not merged."""
        return self.name.endswith(WEIGHTS)


def files_to_serve(recipe: Recipe, lead: Checkpoint) -> tuple[SideFile, ...]:
    """The files to copy from the lead's folder, and those that the recipe names.

    Raises:
        CheckpointError: If a file in ``copy_file_list`` is not there, or another one is a link out of the folder.
        RecipeError: If it is one that the merge itself makes.
    """
    folder = lead.path if is_dir(lead.path) else lead.path.parent
    here = {path.name: path for path in children(folder)}
    for path in [path for name, path in here.items() if _has_more(name) and is_dir(path)]:
        here |= {f"{path.name}/{file.name}": file for file in children(path)}
    usual = usual_files({name: size_of(path) for name, path in here.items() if is_file(path)})
    named = [os.path.normpath(name) for name in recipe.copy_file_list]
    look_up(folder, named)
    _refuse_links_outside(folder, set(usual) - set(named))
    for name in named:
        if not is_file(folder / name):
            raise CheckpointError(f"copy_file_list names {name}, which is not in {folder}")
        if MADE.fullmatch(name):
            raise RecipeError(
                f"copy_file_list names {name}, which would take the place of what the merge writes",
                "Weights are merged, not copied: leave it out.",
            )
    return tuple(SideFile(folder / name, name, size_of(folder / name)) for name in dict.fromkeys([*usual, *named]))


def _refuse_links_outside(folder: Place, names: Iterable[str]) -> None:
    """A checkpoint may come from anybody, and its output go to everybody: it is not to say which files go with it."""
    if isinstance(folder, Url):  # A store has no links.
        return
    home = folder.resolve()
    homes = [home]
    if home.parent.name == "snapshots":  # The hub's cache keeps what is in them beside, or for all models together.
        homes += [home.parents[1] / "blobs", home.parents[2] / "blobs"]
    for name in sorted(names):
        target = (folder / name).resolve()
        if not any(each in target.parents for each in homes):
            raise CheckpointError(
                f"{folder / name} is a link to {target}, outside the model's folder: it is not copied unasked",
                f"If it belongs to the model: --copy_file_list {name}. Otherwise remove the link.",
            )


def usual_files(sizes: Mapping[str, int]) -> list[str]:
    """Of a model's files, by their names and sizes, those that a server needs."""
    return [name for name in sizes if _is_usual(name, sizes)]


def _has_more(folder: str) -> bool:
    """Whether a folder of this name may hold something that a server needs."""
    return folder == TEMPLATES or fnmatch(folder, MODULES)


def _is_usual(name: str, sizes: Mapping[str, int]) -> bool:
    if "/" not in name:
        small = sizes[name] <= LARGEST
        return not name.startswith(".") and not name.endswith(WEIGHTS) and name not in LEFTOVERS and small
    folder, _, file = name.rpartition("/")
    if folder == TEMPLATES:
        return file.endswith(".jinja")
    if MODULES_FILE not in sizes or "/" in folder or not fnmatch(folder, MODULES) or file.startswith("."):
        return False
    # A module may have weights of its own, in one of two formats or in both.
    preferred = next((each for each in MODULE_WEIGHTS if f"{folder}/{each}" in sizes), None)
    return file == preferred or not file.endswith(WEIGHTS)
