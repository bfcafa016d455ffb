"""The result of a merge."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from modelfuse.checkpoints.made_files import REPORT_NAME
from modelfuse.execution.anomalies import Suspicious
from modelfuse.planning.tables import html
from modelfuse.recipe.sizes import size
from modelfuse.storage import PathOrUrl


@dataclass(frozen=True, slots=True, repr=False)
class Result:
    """The result of a merge.

    Attributes:
        output_path: The merged model.
        merged: The number of merged tensors.
        copied: The number of copied tensors.
        bytes_read: Bytes of the inputs' tensors.
        bytes_written: Bytes of the weight files.
        seconds: Wall time.
        bytes_kept: Bytes, read and written, that a resumed earlier run had already done.
        suspicious: Models with tensors that equal the base's, or are far from it.
        html: The page of the merge, if one was written.
    """

    output_path: PathOrUrl
    merged: int
    copied: int
    bytes_read: int
    bytes_written: int
    seconds: float
    bytes_kept: int = 0
    suspicious: tuple[Suspicious, ...] = ()
    html: Path | None = None

    def __repr__(self) -> str:
        suspicious = f", {len(self.suspicious)} suspicious models" if self.suspicious else ""
        return (
            f"<Result: merged {self.merged} tensors, copied {self.copied} in {self.seconds:.1f} s{suspicious}; "
            f"{self.output_path}>"
        )

    def _repr_html_(self) -> str:
        numbers = (("merged", self.merged), ("copied", self.copied), ("seconds", f"{self.seconds:.1f}"),
                   ("read", size(self.bytes_read)), ("written", size(self.bytes_written)))  # fmt: skip
        notes = [f"{each.path}: {each.summary} (listed in {REPORT_NAME})" for each in self.suspicious]
        notes += [] if self.html is None else [f"page: {self.html}"]
        return html(
            str(self.output_path), ([name for name, _ in numbers], [[value for _, value in numbers]]), notes=notes
        )
