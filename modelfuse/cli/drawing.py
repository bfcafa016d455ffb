"""Flags of commands that write pages and images of their results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct

from modelfuse.cli.arguments import Options, Parser
from modelfuse.cli.console import err, out

#: These flags, with their help.
DRAWING = (
    ("--html FILE", "Write an interactive page: one file, which works offline and prints well."),
    ("--image FILE", "Write an image, .svg or .png: maps of layers × modules, and pairs of models."),
    (
        "--measure NAME",
        "The measure of the image, such as relative, cosine or interference. Default: the most informative one.",
    ),
    ("--overwrite", "Replace these files even if modelfuse has not written them."),
)


class Drawing(Struct, frozen=True):
    """The files to write.

    Attributes:
        html: The page; None: no page.
        image: The image; None: no image.
        measure: The measure of the image; None: the most informative one.
        overwrite: Whether to replace files that modelfuse has not written.
    """

    html: Path | None = None
    image: Path | None = None
    measure: str | None = None
    overwrite: bool = False

    def check(self, of_merge: bool = False) -> None:
        """Check that the files can be written, before any work is done.

        Raises:
            ModelfuseError: If they cannot.
        """
        if self.html is None and self.image is None:
            return
        from modelfuse.inspection.pictures.library import check_installed
        from modelfuse.inspection.pictures.picture_files import check_replaceable

        check_installed()
        if self.html is not None:
            check_replaceable(self.html, self.overwrite)
        if self.image is not None:
            from modelfuse.inspection.pictures.images import check_image

            check_image(self.image, self.measure, self.overwrite, of_merge)

    def draw(self, found: Any) -> list[Path]:
        """Write the files; returns their paths."""
        written = []
        if self.html is not None:
            from modelfuse.inspection.pictures.page import write_page

            write_page(found, self.html, self.overwrite)
            written.append(self.html)
        if self.image is not None:
            from modelfuse.inspection.pictures.images import write_image

            write_image(found, self.image, self.measure, self.overwrite)
            written.append(self.image)
        return written


def add_drawing(parser: Parser) -> None:
    """Add the flags of ``DRAWING`` to a parser."""
    for flag in ("--html", "--image"):
        parser.add_argument(flag, type=Path)
    parser.add_argument("--measure")
    parser.add_argument("--overwrite", action="store_true")


def drawing_of(given: dict[str, Any]) -> Drawing:
    """Remove these flags from the arguments of a command."""
    names = ("html", "image", "measure", "overwrite")
    return Drawing(**{name: given.pop(name) for name in names if name in given})


def print_written(paths: Sequence[Path], options: Options) -> None:
    """Print the paths of the files that were written."""
    for path in () if options.quiet else paths:
        (err if options.json else out).print("wrote [bold]{}[/]", path)
