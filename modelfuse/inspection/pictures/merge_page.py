"""The page of a merge that was just made."""

from __future__ import annotations

import gc
from pathlib import Path

from modelfuse.errors import ModelfuseError
from modelfuse.inspection.merge_report import compare_output
from modelfuse.inspection.pictures.page import write_page
from modelfuse.recipe.recipe import Recipe
from modelfuse.storage import PathOrUrl


def write_merge_page(recipe: Recipe, folder: PathOrUrl, path: Path) -> None:
    """Write the page of a merge, from a sample of the elements, which takes a small part of the merge's time.

    Args:
        recipe: The recipe, with inputs that can be opened.
        folder: The output.
        path: The file; one that modelfuse has written is replaced.

    Raises:
        ModelfuseError: If an input was changed meanwhile, or the file cannot be written.
    """
    was_enabled = gc.isenabled()
    gc.disable()  # The results contain no cycles.
    try:
        write_page(compare_output(recipe, folder, sample=True), path)
    except (ModelfuseError, OSError) as error:
        error.add_note(f"The merge is complete, and {folder} is whole; only its page could not be written.")
        raise
    finally:
        if was_enabled:
            gc.enable()
