"""Checks of output_path: apart from the inputs, replacing nothing without --overwrite, with enough disk space."""

from __future__ import annotations

import errno
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


def check_output_path(recipe: Recipe) -> None:
    """Check that the output overlaps no input, and replaces nothing unless ``overwrite`` is given.

    Raises:
        OutputError: If it does; names both paths.
    """
    output = recipe.output_path
    if output is None:
        return
    for each in recipe.inputs:
        path = each.folder if isinstance(each, HubName) else each
        if path is not None and _overlap(output, path):
            raise OutputError(
                f"output_path {output} and the input {path} are the same folder, or one contains the other",
                "Choose another output_path.",
            )
    if isinstance(output, Url):
        _check_remote(output, recipe.overwrite)
        return
    try:
        _check_output(output, recipe.overwrite)
    except OSError as error:
        raise OutputError(f"output_path {output}: {error.strerror}") from error


def _overlap(one: PathOrUrl, other: PathOrUrl) -> bool:
    """Whether two paths are the same, or one contains the other."""
    if isinstance(one, Url) and isinstance(other, Url):
        prefixes = [f"{each}/" for each in (one, other)]
        return prefixes[0].startswith(prefixes[1]) or prefixes[1].startswith(prefixes[0])
    if isinstance(one, Url) or isinstance(other, Url):
        return False
    first, second = Path(os.path.realpath(one)), Path(os.path.realpath(other))
    return first in (second, *second.parents) or second in first.parents


def _check_remote(output: Url, overwrite: bool) -> None:
    try:
        if is_dir(output) and not overwrite:
            raise OutputError(
                f"output_path {output} exists and is not empty", "Use --overwrite to replace it when the merge is done."
            )
        if not is_dir(output) and is_file(output):
            raise OutputError(f"output_path {output} is a file")
    except CheckpointError as error:
        raise OutputError(f"output_path {error.message}", error.hint) from error


def _check_output(output: Path, overwrite: bool) -> None:
    if os.path.islink(os.path.realpath(output)):
        raise OutputError(f"output_path {output} is a circular link")
    if _is_no_folder(output.parent):
        raise OutputError(f"{output.parent} is not a folder, so output_path {output} cannot be created")
    if _is_no_folder(output):
        raise OutputError(f"output_path {output} is a file")
    if output.is_dir() and any(output.iterdir()):
        if not overwrite:
            raise OutputError(
                f"output_path {output} exists and is not empty", "Use --overwrite to replace it when the merge is done."
            )
        check_replaceable(output)


def _is_no_folder(path: Path) -> bool:
    """Whether the path exists and is not a folder. One system call, as another merge may be replacing the folder.

    Raises:
        OSError: If that cannot be known, such as for a name that is too long; pathlib hides this since Python 3.14.
    """
    try:
        return not stat.S_ISDIR(path.stat().st_mode)
    except ValueError:
        return False
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return False
        raise


def check_disk_space(output: PathOrUrl | None, needed: int) -> None:
    """Check that the output fits on its disk, beside the one that it replaces.

    Args:
        output: The output's folder; None or a URL is not checked.
        needed: Its size in bytes.

    Raises:
        OutputError: If it does not fit.
    """
    if output is None or isinstance(output, Url):
        return
    parent = next(folder for folder in Path(os.path.realpath(output)).parents if folder.exists())
    free = shutil.disk_usage(parent).free + bytes_left(output)
    if needed > free:
        raise OutputError(
            f"output_path {output} needs {size(needed)}, but only {size(free)} are free on its disk",
            "Free some space or choose an output_path on another disk.",
        )
