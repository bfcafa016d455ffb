"""Where an output may appear: beside the inputs, in the place of nothing unasked, with room for it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from modelfuse.checkpoints.writer import bytes_left
from modelfuse.errors import OutputError
from modelfuse.hub_names import HubName
from modelfuse.recipe import Recipe


def check_places(recipe: Recipe) -> None:
    """Refuse an output that would touch an input, or replace anything unasked.

    Raises:
        OutputError: Naming both.
    """
    output = recipe.output_path
    if output is None:
        return
    place = Path(os.path.realpath(output))
    for each in recipe.inputs:
        path = each.folder if isinstance(each, HubName) else each
        if path is None:
            continue
        other = Path(os.path.realpath(path))
        if place in (other, *other.parents) or other in place.parents:
            raise OutputError(
                f"output_path {output} and the input {path} lie inside each other", "Choose another output_path."
            )
    try:
        _check_output(output, recipe.overwrite)
    except OSError as error:
        raise OutputError(f"output_path {output}: {error.strerror}") from error


def _check_output(output: Path, overwrite: bool) -> None:
    if os.path.islink(os.path.realpath(output)):
        raise OutputError(f"output_path {output} is a link that leads in a circle")
    if not output.parent.is_dir() and output.parent.exists():
        raise OutputError(f"{output.parent} is not a folder, so output_path {output} cannot be created")
    if output.exists() and not output.is_dir():
        raise OutputError(f"output_path {output} is a file")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise OutputError(
            f"output_path {output} exists and is not empty", "Use --overwrite to replace it whole when all is done."
        )


def check_room(output: Path | None, needed: int) -> None:
    """Known before any work: the output and what it replaces exist side by side.

    Args:
        output: Where the output is to appear, if anywhere.
        needed: Its size in bytes.

    Raises:
        OutputError: If it does not fit on the disk.
    """
    if output is None:
        return
    parent = next(folder for folder in Path(os.path.realpath(output)).parents if folder.exists())
    free = shutil.disk_usage(parent).free + bytes_left(output)
    if needed > free:
        raise OutputError(
            f"output_path {output} needs {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free there",
            "Free some space or choose an output_path on another disk.",
        )
