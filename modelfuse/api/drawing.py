"""``modelfuse.report`` and ``draw``: what a merge kept, and pages and pictures of it and of ``diff``."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from modelfuse.api.functions import showing_comparison
from modelfuse.errors import RecipeError
from modelfuse.inspection.diff_result import Diff
from modelfuse.inspection.merge_report import MergeReport
from modelfuse.inspection.report_output import report_output
from modelfuse.storage import PathOrUrl, path_or_url
from modelfuse.storage.named_hosts import name_hosts


def report(
    path: PathOrUrl | str,
    *,
    exact: bool = False,
    n_process: int | None = None,
    memory: int | str | None = None,
    progress: Callable[[int, int], None] | bool | None = None,
) -> MergeReport:
    """Compare the output of a merge with its inputs: how much of each model is in it, what was dropped and cancelled.

    >>> found = report("c")  # doctest: +SKIP
    >>> found.whole.models[0].projection  # doctest: +SKIP
    0.62

    Args:
        path: The output; its inputs are to be at hand, as they were.
        exact: Compute interference without sketches, which takes much longer.
        n_process: Parallel workers; by default as the merge had.
        memory: The most memory to use; by default as the merge had.
        progress: Whether to show how far it is; None: on a terminal and in a notebook. Or what is called with the
            bytes read since the last call and those to read in all, from worker threads.

    Returns:
        The numbers, for each tensor and summed by layer, module and model; see ``docs/pictures.md``.

    Raises:
        ModelfuseError: If it is no output of a merge, or an input is not at hand or was changed.
    """
    name_hosts([path])
    shown = showing_comparison(progress)
    return report_output(path_or_url(path), exact=exact, n_process=n_process, memory=memory, shown=shown)


def draw(
    found: Diff | MergeReport, path: str | os.PathLike[str], *, measure: str | None = None, overwrite: bool = False
) -> None:
    """Draw what :func:`modelfuse.diff` or :func:`modelfuse.report` found.

    >>> draw(report("c"), "report.html")  # doctest: +SKIP

    Args:
        found: What they gave.
        path: The file: ``.html`` for an interactive page that needs no network, ``.svg`` or ``.png`` for a picture.
        measure: What a picture shows, such as ``relative``, ``cosine`` or ``interference``; by default what says most.
        overwrite: Replace a file that modelfuse has not written.

    Raises:
        ModelfuseError: If the extra ``modelfuse[report]`` is not installed, the name has another ending, or somebody
            else's file is there.
    """
    file = Path(path)
    if file.suffix.lower() not in (".html", ".htm"):
        from modelfuse.inspection.pictures.images import write_image

        write_image(found, file, measure, overwrite)
        return
    if measure is not None:
        raise RecipeError("A page shows all measures", "Leave measure out, or name an .svg or .png file.")
    from modelfuse.inspection.pictures.page import write_page

    write_page(found, file, overwrite)
