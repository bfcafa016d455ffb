"""Compare the output of a merge with the inputs that its files name: ``modelfuse report``."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext

from modelfuse.checkpoints.made_files import CONFIG_NAME
from modelfuse.errors import CheckpointError
from modelfuse.inspection.merge_report import MergeReport, ShownBy, compare_output
from modelfuse.inspection.recompute import absent_inputs, in_stores, modified_inputs
from modelfuse.inspection.report_reader import Report, read_recipe, read_report
from modelfuse.planning.hub import QUIET, fetch
from modelfuse.recipe.recipe import Recipe
from modelfuse.storage import PathOrUrl, forget


def report_output(
    folder: PathOrUrl,
    *,
    exact: bool = False,
    n_process: int | None = None,
    memory: object = None,
    shown: ShownBy = lambda _: nullcontext(lambda *_: None),
) -> MergeReport:
    """Compare an output with its inputs, which must be available unchanged.

    Args:
        folder: The output.
        exact: Whether interference is computed without sketches.
        n_process: Parallel workers; None: as in the recipe.
        memory: The memory budget; None: as in the recipe.
        shown: Starts the display of progress.

    Raises:
        CheckpointError: If it is not the output of a merge, or an input is missing or was changed.
        ModelfuseError: If an input cannot be read.
    """
    forget()
    try:
        report, _ = read_report(folder)
        recipe, problems = read_recipe(folder, report)
    except OSError as error:
        raise CheckpointError(f"{error.filename or folder}: {error.strerror}") from error
    if recipe is None:
        raise CheckpointError(problems[0].message if problems else f"{folder} has no {CONFIG_NAME}",
                              "Compare it by hand: modelfuse diff MODEL … OUT --base BASE.")  # fmt: skip
    recipe = _at_hand(folder, recipe, report)
    changes = {"n_process": n_process, "memory": memory}
    recipe = _with_machine(recipe, {name: value for name, value in changes.items() if value is not None})
    return compare_output(recipe, folder, exact=exact, shown=shown)


def _at_hand(folder: PathOrUrl, recipe: Recipe, report: Report) -> Recipe:
    """The recipe with its inputs, which are never fetched: the files of an output may come from anyone."""
    recipe = recipe.changed(output_path=None)
    if recipe.hub_names:
        recipe = fetch(recipe, QUIET, ask=False)
    by_hand = "Fetch them, and compare by hand: modelfuse diff MODEL … OUT --base BASE."
    if urls := in_stores(report, recipe):
        raise CheckpointError(f"Inputs of {folder} are in stores, which report does not access: {urls[0]}", by_hand)
    if absent := absent_inputs(report, recipe):
        raise CheckpointError(f"Not all inputs of {folder} are available: {'; '.join(absent)}", by_hand)
    if modified := modified_inputs(report):
        raise CheckpointError(
            f"Inputs of {folder} were changed since the merge: {', '.join(modified)}",
            "Merge again, or compare by hand: modelfuse diff MODEL … OUT --base BASE.",
        )
    return recipe


def _with_machine(recipe: Recipe, changes: Mapping[str, object]) -> Recipe:
    """The recipe with other settings of the machine, after checking them."""
    if not changes:
        return recipe
    checked = Recipe.parse({"model_path_list": [*recipe.inputs, recipe.inputs[0]], **changes})
    return recipe.changed(**{name: getattr(checked, name) for name in changes})
