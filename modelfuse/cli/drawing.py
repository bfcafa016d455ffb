"""Pages and pictures of what commands find: the flags that ask for them, and the files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelfuse.cli.arguments import Options, Parser
from modelfuse.cli.console import err, out

#: Flags of commands that draw what they find, and what they do.
DRAWING = (
    ("--html FILE", "Write an interactive page: one file that needs no network, to be looked at or printed."),
    ("--image FILE", "Write a picture, .svg or .png: maps of layers × modules, and models in pairs."),
    ("--measure NAME", "What the picture shows, such as relative, cosine or interference. Default: what says most."),
    ("--overwrite", "Replace these files even where modelfuse has not written them."),
)


@dataclass(frozen=True, slots=True)
class Drawing:
    """What is to be drawn.

    Attributes:
        html: The file of a page; None for none.
        image: The file of a picture.
        measure: What the picture shows; None: what says most.
        overwrite: Whether other files are replaced.
    """

    html: Path | None = None
    image: Path | None = None
    measure: str | None = None
    overwrite: bool = False

    def check(self, of_merge: bool = False) -> None:
        """Refuse, before any work, what cannot be drawn or written.

        Raises:
            ModelfuseError: If so.
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
        """Write the files; which ones."""
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
    """Let a command take the flags of ``DRAWING``."""
    for flag in ("--html", "--image"):
        parser.add_argument(flag, type=Path)
    parser.add_argument("--measure")
    parser.add_argument("--overwrite", action="store_true")


def drawing_of(given: dict[str, Any]) -> Drawing:
    """Take what is to be drawn out of what was given."""
    names = ("html", "image", "measure", "overwrite")
    return Drawing(**{name: given.pop(name) for name in names if name in given})


def tell_written(paths: Sequence[Path], options: Options) -> None:
    """Say which files were written."""
    for path in () if options.quiet else paths:
        (err if options.json else out).say("wrote [bold]{}[/]", path)
