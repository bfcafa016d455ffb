"""Which of a model's files a merge needs."""

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

#: The prefix of an adapter's weights, by the file that says that it is one.
ADAPTERS = {PEFT_CONFIG: "adapter_model", PADDLE_CONFIG: "peft_model"}


class Wanted(NamedTuple):
    """The files that a merge needs of a model.

    Attributes:
        settings: What is read before anything else: configuration and the weights' index.
        served: What is copied beside the result.
        weights: What holds tensors.
    """

    settings: list[str]
    served: list[str]
    weights: list[str]

    @property
    def all(self) -> list[str]:
        """All of them, each once."""
        return list(dict.fromkeys([*self.settings, *self.served, *self.weights]))


def wanted(
    recipe: Recipe, name: HubName, place: HubName, sizes: Mapping[str, int], get: Callable[[str], Path]
) -> Wanted:
    """Choose among a model's files.

    Args:
        recipe: What is to be merged.
        name: The model, as the recipe names it.
        place: The same with its commit.
        sizes: All its files.
        get: Where to read a small one of them.

    Raises:
        CheckpointError: If weights are missing, or a file in ``copy_file_list``.
    """
    served = _tokenizers(recipe, name, sizes)
    if name not in recipe.inputs:
        return Wanted([file for file in (CONFIG_FILE,) if file in sizes], served, [])
    prefix = next((stem for file, stem in ADAPTERS.items() if file in sizes), str(recipe.merge_prefix))
    form, weights, weight_map = find_files(place, {file for file in sizes if "/" not in file}, prefix, get)
    settings = [file for file in (CONFIG_FILE, *ADAPTERS) if file in sizes]
    if recipe.output_format != "lora":
        settings += compared_files(sizes)
    if weight_map is not None:
        settings.append(form.index_file)
    inside = any("/" in file and file.endswith(MODULE_WEIGHTS) for file in sizes)
    if inside and recipe.output_format != "lora" and lists_modules(sizes):
        settings += weights_of_modules(sizes, modules_of(get(MODULES_FILE).read_bytes()))
    leads = name == recipe.inputs[recipe.reference]
    # A configuration may take the tokenizer of any model, and the union of all.
    if (leads or recipe.mergekit is not None) and recipe.output_format != "lora":
        modules: tuple[str, ...] = ()
        if lists_modules(sizes):
            settings.append(MODULES_FILE)
            modules = modules_of(get(MODULES_FILE).read_bytes())
        served += usual_files(sizes, modules)
        for file in map(os.path.normpath, recipe.copy_file_list if leads else ()):
            if file not in sizes:
                raise CheckpointError(f"copy_file_list names {file}, which is not in {place}")
            served.append(file)
    return Wanted(settings, served, weights)


def _tokenizers(recipe: Recipe, name: HubName, sizes: Mapping[str, int]) -> list[str]:
    """What is taken of a model that only the tokenizer comes from."""
    if name != recipe.tokenizer_from or recipe.output_format == "lora":
        return []
    return [file for file in usual_files(sizes) if is_tokenizers(file)]
