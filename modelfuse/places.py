"""Where an output may go."""

from __future__ import annotations

from pathlib import Path

from modelfuse.errors import OutputError
from modelfuse.recipe import Recipe


def check_places(recipe: Recipe) -> None:
    """Refuse an output that lies inside an input or holds one, or that is there and not to be replaced.

    Raises:
        OutputError: If so.
    """
    output = recipe.output_path
    if output is None:
        return
    for path in recipe.input_paths:
        holds_it = output.resolve() in (path.resolve(), *path.resolve().parents)
        if holds_it or path.resolve() in output.resolve().parents:
            raise OutputError(
                f"output_path {output} and the input {path} lie inside each other", "Choose another output_path."
            )
    try:
        _check_output(output, recipe.overwrite)
    except OSError as error:
        raise OutputError(f"output_path {output}: {error.strerror}") from error


def _check_output(output: Path, overwrite: bool) -> None:
    if not output.parent.is_dir() and output.parent.exists():
        raise OutputError(f"{output.parent} is not a folder, so output_path {output} cannot be created")
    if output.exists() and not output.is_dir():
        raise OutputError(f"output_path {output} is a file")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise OutputError(
            f"output_path {output} exists and is not empty", "Use --overwrite to replace it whole when all is done."
        )
