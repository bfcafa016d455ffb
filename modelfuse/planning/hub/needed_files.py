"""Select the files that a merge needs of a model on a hub."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from modelfuse.checkpoints import CONFIG_FILE
from modelfuse.checkpoints.adapters.adapter import PADDLE_CONFIG, PEFT_CONFIG
from modelfuse.checkpoints.side_files import (
    MODULE_WEIGHTS,
    MODULES_FILE,
    is_tokenizers,
    lists_modules,
    modules_of,
    usual_files,
    weights_of_modules,
)
from modelfuse.checkpoints.weight_files import find_files
from modelfuse.errors import CheckpointError
from modelfuse.planning.side_file_differences import compared_files
from modelfuse.recipe.hub_names import HubName
from modelfuse.recipe.recipe import Recipe

#: The prefix of an adapter's weight files, by the name of its configuration.
ADAPTERS = {PEFT_CONFIG: "adapter_model", PADDLE_CONFIG: "peft_model"}


class NeededFiles(NamedTuple):
    """The files that a merge needs of a model.

    Attributes:
        settings: Files that planning reads: configurations, the weights' index, and files that are compared.
        served: Files that are copied to the output.
        weights: Weight files.
    """

    settings: list[str]
    served: list[str]
    weights: list[str]

    @property
    def all(self) -> list[str]:
        """All of them, without duplicates."""
        return list(dict.fromkeys([*self.settings, *self.served, *self.weights]))


def needed_files(
    recipe: Recipe, name: HubName, pinned: HubName, sizes: Mapping[str, int], get: Callable[[str], Path]
) -> NeededFiles:
    """Select the files of a model.

    Args:
        recipe: The merge.
        name: The model, as in the recipe.
        pinned: The model with its commit.
        sizes: The names and sizes in bytes of all its files.
        get: Fetches a small file and returns its path.

    Raises:
        CheckpointError: If weights or a file in ``copy_file_list`` are missing.
    """
    served = _tokenizers(recipe, name, sizes)
    if name not in recipe.inputs:
        return NeededFiles([file for file in (CONFIG_FILE,) if file in sizes], served, [])
    prefix = next((stem for file, stem in ADAPTERS.items() if file in sizes), str(recipe.merge_prefix))
    form, weights, weight_map = find_files(pinned, {file for file in sizes if "/" not in file}, prefix, get)
    settings = [file for file in (CONFIG_FILE, *ADAPTERS) if file in sizes]
    if recipe.output_format != "lora":
        settings += compared_files(sizes)
    if weight_map is not None:
        settings.append(form.index_file)
    inside = any("/" in file and file.endswith(MODULE_WEIGHTS) for file in sizes)
    if inside and recipe.output_format != "lora" and lists_modules(sizes):
        settings += weights_of_modules(sizes, modules_of(get(MODULES_FILE).read_bytes()))
    leads = name == recipe.inputs[recipe.reference]
    # A mergekit configuration may use the tokenizer of any model, or of all.
    if (leads or recipe.mergekit is not None) and recipe.output_format != "lora":
        modules: tuple[str, ...] = ()
        if lists_modules(sizes):
            settings.append(MODULES_FILE)
            modules = modules_of(get(MODULES_FILE).read_bytes())
        served += usual_files(sizes, modules)
        for file in map(os.path.normpath, recipe.copy_file_list if leads else ()):
            if file not in sizes:
                raise CheckpointError(f"copy_file_list names {file}, which is not in {pinned}")
            served.append(file)
    return NeededFiles(settings, served, weights)


def _tokenizers(recipe: Recipe, name: HubName, sizes: Mapping[str, int]) -> list[str]:
    """The tokenizer files, if this model is ``tokenizer_from``."""
    if name != recipe.tokenizer_from or recipe.output_format == "lora":
        return []
    return [file for file in usual_files(sizes) if is_tokenizers(file)]
