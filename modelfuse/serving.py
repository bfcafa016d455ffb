"""The files beside the weights that a server needs: configuration, tokenizer, templates, code."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from modelfuse.checkpoints import Checkpoint
from modelfuse.errors import CheckpointError, RecipeError
from modelfuse.recipe import Recipe

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
#: Larger files are no configuration; tokenizers stay well below.
LARGEST = 200_000_000


@dataclass(frozen=True, slots=True)
class SideFile:
    """A file to copy as it is: from where, to which name in the output, its size in bytes."""

    source: Path
    name: str
    size: int


def files_to_serve(recipe: Recipe, lead: Checkpoint) -> tuple[SideFile, ...]:
    """The files to copy from the lead's folder, and those that the recipe names.

    Raises:
        CheckpointError: If a file in ``copy_file_list`` is not there, or another one is a link out of the folder.
        RecipeError: If it is one that the merge itself makes.
    """
    folder = lead.path if lead.path.is_dir() else lead.path.parent
    here = [*sorted(folder.iterdir()), *sorted((folder / TEMPLATES).glob("*.jinja"))]
    usual = usual_files({str(path.relative_to(folder)): path.stat().st_size for path in here if path.is_file()})
    named = [os.path.normpath(name) for name in recipe.copy_file_list]
    _refuse_links_outside(folder, set(usual) - set(named))
    for name in named:
        if not os.path.isfile(folder / name):
            raise CheckpointError(f"copy_file_list names {name}, which is not in {folder}")
        if MADE.fullmatch(name):
            raise RecipeError(
                f"copy_file_list names {name}, which would take the place of what the merge writes",
                "Weights are merged, not copied: leave it out.",
            )
    return tuple(
        SideFile(folder / name, name, (folder / name).stat().st_size) for name in dict.fromkeys([*usual, *named])
    )


def _refuse_links_outside(folder: Path, names: Iterable[str]) -> None:
    """A checkpoint may come from anybody, and its output go to everybody: it is not to say which files go with it."""
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
    return [name for name, size in sizes.items() if _is_usual(name, size)]


def _is_usual(name: str, size: int) -> bool:
    if "/" in name:
        return fnmatch(name, f"{TEMPLATES}/*.jinja") and name.count("/") == 1
    return not name.startswith(".") and not name.endswith(WEIGHTS) and name not in LEFTOVERS and size <= LARGEST
