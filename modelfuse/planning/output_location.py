"""Where an output may appear: beside the inputs, in the place of nothing unasked, with room for it."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

from modelfuse.checkpoints.made_files import check_replaceable
from modelfuse.checkpoints.output.atomic_folder import bytes_left
from modelfuse.errors import CheckpointError, OutputError
from modelfuse.recipe.hub_names import HubName
from modelfuse.recipe.recipe import Recipe
from modelfuse.recipe.sizes import size
from modelfuse.storage import PathOrUrl, Url, is_dir, is_file


def check_places(recipe: Recipe) -> None:
    """Refuse an output that would touch an input, or replace anything unasked.

    Raises:
        OutputError: Naming both.
    """
    output = recipe.output_path
    if output is None:
        return
    for each in recipe.inputs:
        path = each.folder if isinstance(each, HubName) else each
        if path is not None and _meet(output, path):
            raise OutputError(
                f"output_path {output} and the input {path} lie inside each other", "Choose another output_path."
            )
    if isinstance(output, Url):
        _check_remote(output, recipe.overwrite)
        return
    try:
        _check_output(output, recipe.overwrite)
    except OSError as error:
        raise OutputError(f"output_path {output}: {error.strerror}") from error


def _meet(one: PathOrUrl, other: PathOrUrl) -> bool:
    """Whether two places are the same, or one is in the other."""
    if isinstance(one, Url) and isinstance(other, Url):
        places = [f"{place}/" for place in (one, other)]
        return places[0].startswith(places[1]) or places[1].startswith(places[0])
    if isinstance(one, Url) or isinstance(other, Url):
        return False
    place, another = Path(os.path.realpath(one)), Path(os.path.realpath(other))
    return place in (another, *another.parents) or another in place.parents


def _check_remote(output: Url, overwrite: bool) -> None:
    try:
        if is_dir(output) and not overwrite:
            raise OutputError(
                f"output_path {output} exists and is not empty", "Use --overwrite to replace it when all is done."
            )
        if not is_dir(output) and is_file(output):
            raise OutputError(f"output_path {output} is a file")
    except CheckpointError as error:
        raise OutputError(f"output_path {error.message}", error.hint) from error


def _check_output(output: Path, overwrite: bool) -> None:
    if os.path.islink(os.path.realpath(output)):
        raise OutputError(f"output_path {output} is a link that leads in a circle")
    if _is_something_else(output.parent):
        raise OutputError(f"{output.parent} is not a folder, so output_path {output} cannot be created")
    if _is_something_else(output):
        raise OutputError(f"output_path {output} is a file")
    if output.is_dir() and any(output.iterdir()):
        if not overwrite:
            hint = "Use --overwrite to replace it whole when all is done."
            raise OutputError(f"output_path {output} exists and is not empty", hint)
        check_replaceable(output)


def _is_something_else(path: Path) -> bool:
    """Whether there is anything but a folder; asked once, as another merge may be making or removing one."""
    try:
        return not stat.S_ISDIR(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def check_disk_space(output: PathOrUrl | None, needed: int) -> None:
    """Known before any work: the output and what it replaces exist side by side.

    Args:
        output: Where the output is to appear, if anywhere.
        needed: Its size in bytes.

    Raises:
        OutputError: If it does not fit on the disk.
    """
    if output is None or isinstance(output, Url):
        return
    parent = next(folder for folder in Path(os.path.realpath(output)).parents if folder.exists())
    free = shutil.disk_usage(parent).free + bytes_left(output)
    if needed > free:
        raise OutputError(
            f"output_path {output} needs {size(needed)}, but only {size(free)} are free there",
            "Free some space or choose an output_path on another disk.",
        )
