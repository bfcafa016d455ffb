"""``modelfuse.report`` and ``modelfuse.draw``: reports on merges; pages and images of results."""

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
    """Compare the output of a merge with its inputs: how much of each model it contains, and where.

    >>> found = report("c")  # doctest: +SKIP
    >>> found.whole.models[0].projection  # doctest: +SKIP
    0.62

    Args:
        path: The output; its inputs must be available unchanged.
        exact: Compute interference without sketches, which takes much longer.
        n_process: Parallel workers; by default as in the merge.
        memory: The memory budget; by default as in the merge.
        progress: Whether to show progress; None: on a terminal and in a notebook. Or a function, called from worker
            threads with the bytes read since the last call and the bytes to read in total.

    Returns:
        The measures of each tensor, layer, module and model; see ``docs/pictures.md``.

    Raises:
        ModelfuseError: If it is not the output of a merge, or an input is missing or was changed.
    """
    name_hosts([path])
    shown = showing_comparison(progress)
    return report_output(path_or_url(path), exact=exact, n_process=n_process, memory=memory, shown=shown)


def draw(
    found: Diff | MergeReport, path: str | os.PathLike[str], *, measure: str | None = None, overwrite: bool = False
) -> None:
    """Write a page or an image of a result of :func:`modelfuse.diff` or :func:`modelfuse.report`.

    >>> draw(report("c"), "report.html")  # doctest: +SKIP

    Args:
        found: The result.
        path: The file: ``.html`` for an interactive page, which works offline, ``.svg`` or ``.png`` for an image.
        measure: The measure of an image, such as ``relative``, ``cosine`` or ``interference``; by default the most
            informative one.
        overwrite: Replace a file that modelfuse has not written.

    Raises:
        ModelfuseError: If the extra ``modelfuse[report]`` is not installed, the suffix is unknown, or the file exists
            and modelfuse has not written it.
    """
    file = Path(path)
    if file.suffix.lower() not in (".html", ".htm"):
        from modelfuse.inspection.pictures.images import write_image

        write_image(found, file, measure, overwrite)
        return
    if measure is not None:
        raise RecipeError("A page shows all measures", "Leave measure out, or give an .svg or .png file.")
    from modelfuse.inspection.pictures.page import write_page

    write_page(found, file, overwrite)
