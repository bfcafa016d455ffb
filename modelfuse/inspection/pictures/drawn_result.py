"""The result that a page or image shows: that of diff, or of report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from modelfuse.inspection.diff_names import short_names
from modelfuse.inspection.diff_result import Diff, TensorGroup
from modelfuse.inspection.merge_outcome import MergeOutcome
from modelfuse.inspection.merge_report import MergeReport
from modelfuse.inspection.pictures.measures import MEASURES, OUTCOMES, Measure, Number
from modelfuse.inspection.pictures.positions import positions_of
from modelfuse.printable import printable

Part = Literal["whole", "layers", "cells", "tensors"]


@dataclass(frozen=True)
class DrawnResult:
    """A comparison, and the report on a merge if the last model is its output.

    Attributes:
        diff: The comparison.
        report: The report; None for a plain comparison.
    """

    diff: Diff
    report: MergeReport | None = None
    _values: dict[tuple[str, Part], list[Sequence[Number]]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, found: Diff | MergeReport) -> DrawnResult:
        """The result of diff or report."""
        return cls(found) if isinstance(found, Diff) else cls(found.diff, found)

    @cached_property
    def names(self) -> list[str]:
        """Short, distinct names of the models."""
        found = short_names([printable(each) for each in self.diff.models])
        return found if self.report is None else [*found[:-1], f"{found[-1]} (output)"]

    @property
    def base(self) -> str:
        """The short name of the base."""
        return short_names([self.diff.base])[0]

    def places(self) -> dict[str, Any] | None:
        """The positions of the models; see :func:`~modelfuse.inspection.pictures.positions.positions_of`."""
        found = positions_of(self.diff.whole, self.names, self.base)
        if found is not None and self.report is not None:
            found["points"][-2]["kind"] = "output"
        return found

    def groups(self, part: Part) -> Sequence[TensorGroup]:
        """The groups of a part of the result."""
        return (self.diff.whole,) if part == "whole" else getattr(self.diff, part)

    def values(self, measure: Measure, part: Part) -> list[Sequence[Number]]:
        """The values of a measure for every group."""
        key = measure.key, part
        if key not in self._values:
            self._values[key] = self._computed(measure, part)
        return self._values[key]

    def _computed(self, measure: Measure, part: Part) -> list[Sequence[Number]]:
        if measure.outcome is None:
            return [measure.values(group) for group in self.groups(part)]
        assert self.report is not None
        outcomes: Sequence[MergeOutcome] = (self.report.whole,) if part == "whole" else getattr(self.report, part)
        return [measure.outcome(each) for each in outcomes]

    @property
    def known(self) -> Mapping[str, Measure]:
        """The measures of such a result by key, the most informative first."""
        return MEASURES if self.report is None else {**OUTCOMES, **MEASURES}

    def with_values(self) -> list[Measure]:
        """The measures that have values here."""
        found = []
        for measure in self.known.values():
            values = [value for part in ("whole", "cells") for row in self.values(measure, part) for value in row]
            if any(value is not None for value in values) and (measure.key != "nonfinite" or any(values)):
                found.append(measure)
        return found
