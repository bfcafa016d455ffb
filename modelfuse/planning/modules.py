"""Merge the weights of sentence-transformers modules, such as a dense layer after the pooling, like the model's."""

from __future__ import annotations

from collections.abc import Sequence

from modelfuse.checkpoints import Checkpoint, StoredTensor, open_checkpoint
from modelfuse.checkpoints.adapters import Adapter
from modelfuse.checkpoints.adapters.module_file import ModuleFile, ModuleTensor
from modelfuse.checkpoints.side_files import SideFile
from modelfuse.checkpoints.weight_files import is_weights
from modelfuse.errors import MismatchError
from modelfuse.planning.operations import Operation
from modelfuse.planning.rules import Rules, operations_of
from modelfuse.recipe.recipe import Recipe
from modelfuse.storage import PathOrUrl, children, folder_of, is_dir, is_file


def merge_modules(
    recipe: Recipe, rules: Rules, models: Sequence[Checkpoint], side_files: Sequence[SideFile]
) -> tuple[tuple[ModuleFile, ...], tuple[SideFile, ...]]:
    """Merge the modules that all models have; the reference's other modules are copied.

    Args:
        recipe: The settings.
        rules: Its rules.
        models: The models in order, then the base if there is one.
        side_files: The files to copy, including those of modules.

    Returns:
        The merged files, and the files that are still to be copied.

    Raises:
        MismatchError: If a module's tensors differ between the models.
    """
    held = [file.name.partition("/") for file in side_files
            if file.holds_weights and file.name not in recipe.copy_file_list]  # fmt: skip
    folders = dict.fromkeys(folder for folder, inside, _ in held if inside)
    full = [model for model in models if not isinstance(model, Adapter)]
    made: list[ModuleFile] = []
    for folder in folders:
        modules = [folder_of(model.path) / folder for model in full]
        if not all(map(_has_weights, modules)) or len(full) < len(models):
            continue
        made.append(_merged(recipe, rules, folder, [open_checkpoint(module) for module in modules]))
    done = {file.name.partition("/")[0] for file in made}
    left = tuple(file for file in side_files if not (file.holds_weights and file.name.partition("/")[0] in done))
    return tuple(made), left


def _has_weights(folder: PathOrUrl) -> bool:
    return is_dir(folder) and any(is_weights(each.name) and is_file(each) for each in children(folder))


def _merged(recipe: Recipe, rules: Rules, folder: str, modules: Sequence[Checkpoint]) -> ModuleFile:
    names = list(modules[recipe.reference])
    for module in modules:
        other = {name: tensor.shape for name, tensor in module.items()}
        if other != {name: tensor.shape for name, tensor in modules[recipe.reference].items()}:
            raise MismatchError(
                f"The module {module.path} does not have the same tensors as {modules[recipe.reference].path}",
                "Merge models with the same modules.",
            )
    operations = operations_of(recipe, rules, modules, names)
    strict = recipe.on_nonfinite == "error"
    return ModuleFile(f"{folder}/model.safetensors", tuple(map(_tensor, operations)), strict)


def _tensor(operation: Operation) -> ModuleTensor:
    sources: tuple[StoredTensor, ...] = operation.sources
    method = operation.method if operation.action == "merge" else None
    dtype = operation.dtype if method is not None else sources[0].dtype
    return ModuleTensor(operation.name, dtype, operation.shape, sources, operation.has_base, method)
