"""What pictures are made of: what ``diff`` found, and of a merge what it kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from modelfuse.inspection.diff_names import short_names
from modelfuse.inspection.diff_result import Diff, Group
from modelfuse.inspection.merge_outcome import Outcome
from modelfuse.inspection.merge_report import MergeReport
from modelfuse.inspection.pictures.measures import MEASURES, OUTCOMES, Measure, Number
from modelfuse.inspection.pictures.places import places_of
from modelfuse.printable import printable

Part = Literal["whole", "layers", "cells", "tensors"]


@dataclass(frozen=True)
class Shown:
    """A diff, and what it tells of a merge where the last model is an output.

    Attributes:
        diff: How models differ.
        report: What the merge kept; None where there was none.
    """

    diff: Diff
    report: MergeReport | None = None
    _values: dict[tuple[str, Part], list[Sequence[Number]]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, found: Diff | MergeReport) -> Shown:
        """Of either."""
        return cls(found) if isinstance(found, Diff) else cls(found.diff, found)

    @cached_property
    def names(self) -> list[str]:
        """Short names of the models that tell them apart."""
        found = short_names([printable(each) for each in self.diff.models])
        return found if self.report is None else [*found[:-1], f"{found[-1]} (output)"]

    @property
    def base(self) -> str:
        """A short name of the base."""
        return short_names([self.diff.base])[0]

    def places(self) -> dict[str, Any] | None:
        """Where the models lie, as :func:`~modelfuse.inspection.pictures.places.places_of` has it."""
        found = places_of(self.diff.whole, self.names, self.base)
        if found is not None and self.report is not None:
            found["points"][-2]["kind"] = "output"
        return found

    def groups(self, part: Part) -> Sequence[Group]:
        """The groups of tensors of a part of what was found."""
        return (self.diff.whole,) if part == "whole" else getattr(self.diff, part)

    def values(self, measure: Measure, part: Part) -> list[Sequence[Number]]:
        """The numbers of every group."""
        key = measure.key, part
        if key not in self._values:
            self._values[key] = self._computed(measure, part)
        return self._values[key]

    def _computed(self, measure: Measure, part: Part) -> list[Sequence[Number]]:
        if measure.outcome is None:
            return [measure.values(group) for group in self.groups(part)]
        assert self.report is not None
        outcomes: Sequence[Outcome] = (self.report.whole,) if part == "whole" else getattr(self.report, part)
        return [measure.outcome(each) for each in outcomes]

    @property
    def known(self) -> Mapping[str, Measure]:
        """All measures that there are of such a result, by their keys; what says most comes first."""
        return MEASURES if self.report is None else {**OUTCOMES, **MEASURES}

    def telling(self) -> list[Measure]:
        """The measures that say anything here."""
        found = []
        for measure in self.known.values():
            values = [value for part in ("whole", "cells") for row in self.values(measure, part) for value in row]
            if any(value is not None for value in values) and (measure.key != "nonfinite" or any(values)):
                found.append(measure)
        return found
