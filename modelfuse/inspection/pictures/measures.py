"""The measures that pages and images show: titles, descriptions and colours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from modelfuse.inspection.diff_result import Change, ModelPair, TensorGroup
from modelfuse.inspection.merge_outcome import MergeOutcome, ModelOutcome

Number = float | None
#: Colour schemes, for measures without and with a neutral middle.
SEQUENTIAL, DIVERGING = "viridis", "purpleorange"


@dataclass(frozen=True, slots=True)
class Measure:
    """A measure of each model, or of each pair of models, in a group of tensors.

    Attributes:
        key: Its name in data and on the command line.
        short: The heading of its column.
        title: Its title on a page.
        about: An explanation.
        of: ``model``; ``pair`` if it is symmetric; ``order`` if it is one of ordered pairs.
        values: Its values for all models or pairs of a group, in order.
        percent: Whether it is shown in percent.
        domain: The range of the colour scale; None: that of the values.
        middle: The neutral value, if there is one.
        sums: How the values of several groups are combined: root of the sum of squares, relative to the base's or not;
            sum; maximum; or mean, weighted by elements.
        outcome: For measures of a merge: the values of each model and of the output.
    """

    key: str
    short: str
    title: str
    about: str
    of: Literal["model", "pair", "order"]
    values: Callable[[TensorGroup], Sequence[Number]]
    percent: bool = False
    domain: tuple[float, float] | None = None
    middle: float | None = None
    sums: Literal["relative", "norm", "sum", "largest", "mean"] = "mean"
    outcome: Callable[[MergeOutcome], Sequence[Number]] | None = None

    @property
    def scheme(self) -> str:
        """The name of its colour scheme."""
        return SEQUENTIAL if self.middle is None else DIVERGING

    def described(self) -> dict[str, object]:
        """Its description for a page."""
        return {
            "key": self.key, "short": self.short, "title": self.title, "about": self.about, "of": self.of,
            "percent": self.percent, "domain": self.domain, "middle": self.middle, "scheme": self.scheme,
            "sums": self.sums,
        }  # fmt: skip


def _changes(get: Callable[[Change], Number]) -> Callable[[TensorGroup], Sequence[Number]]:
    return lambda group: [get(each) for each in group.models]


def _pairs(get: Callable[[ModelPair], Number]) -> Callable[[TensorGroup], Sequence[Number]]:
    return lambda group: [get(each) for each in group.pairs]


def _kept(density: float) -> Callable[[Change], Number]:
    return lambda change: next((each.trim_squares for each in change.kept if each.density == density), None)


def _outlying(group: TensorGroup) -> Sequence[Number]:
    return [each.outliers / group.elements * 1e6 if group.elements else None for each in group.models]


_ALL = (
    Measure("relative", "‖τ‖ / ‖b‖", "Size of the change, ‖τ‖ / ‖b‖",
            "Norm of the difference over the norm of the base.",
            "model", _changes(lambda each: each.relative), percent=True, sums="relative"),
    Measure("norm", "‖τ‖", "Norm of the change, ‖τ‖", "Norm of the difference.",
            "model", _changes(lambda each: each.norm), sums="norm"),
    Measure("unchanged", "unchanged", "Unchanged elements", "Share of elements that equal the base's.",
            "model", _changes(lambda each: each.unchanged), percent=True, domain=(0, 1)),
    Measure("density_90", "90 % in", "Elements with 90 % of the change",
            "The smallest share of elements that holds 90 % of ‖τ‖². Small: trimming loses little.",
            "model", _changes(lambda each: each.density_90), percent=True, domain=(0, 1)),
    Measure("kept_10", "trim 0.1", "What trim keeps at density 0.1",
            "Share of ‖τ‖² in the largest tenth of the elements.",
            "model", _changes(_kept(0.1)), percent=True, domain=(0, 1)),
    Measure("along_base", "cos(τ, b)", "Along the base, cos(τ, b)",
            "Near −1 or 1 where the model is mostly the base scaled.",
            "model", _changes(lambda each: each.along_base), domain=(-1, 1), middle=0),
    Measure("largest", "max |τ|", "Largest change, max |τ|", "The largest difference of an element.",
            "model", _changes(lambda each: each.largest), sums="largest"),
    Measure("outliers", "outliers/M", "Outlying elements in a million",
            "Elements whose difference is at least 8 times the root mean square of its block.", "model", _outlying),
    Measure("nonfinite", "not finite", "Values that are not finite", "Number of elements that are NaN or infinite.",
            "model", _changes(lambda each: each.nonfinite), sums="sum"),
    Measure("interference", "interference", "Interference, ‖τⱼτᵢᵀ‖ / ‖τᵢτᵢᵀ‖",
            "How strongly the other's difference acts on the inputs that this one's uses; 1: as its own.",
            "order", _pairs(lambda each: each.interference)),
    Measure("cosine", "cosine", "Cosine of the changes", "1: the same direction, 0: unrelated, −1: opposite.",
            "pair", _pairs(lambda each: each.cosine), domain=(-1, 1), middle=0),
    Measure("sign_conflict", "sign conflicts", "Sign conflicts",
            "Of the elements that both change, the share that they change in opposite directions; a half if unrelated.",
            "pair", _pairs(lambda each: each.sign_conflict), percent=True, domain=(0, 1), middle=0.5),
    Measure("sign_conflict_large", "among large", "Sign conflicts among large changes",
            "The same of the elements whose change is large in both.",
            "pair", _pairs(lambda each: each.sign_conflict_large), percent=True, domain=(0, 1), middle=0.5),
    Measure("both_changed", "both change", "Changed by both", "Share of elements that both change.",
            "pair", _pairs(lambda each: each.both_changed), percent=True, domain=(0, 1)),
)  # fmt: skip
MEASURES: Mapping[str, Measure] = {each.key: each for each in _ALL}


def _none(_: TensorGroup) -> Sequence[Number]:
    return ()


def _taken(get: Callable[[ModelOutcome], Number]) -> Callable[[MergeOutcome], Sequence[Number]]:
    return lambda outcome: [*map(get, outcome.models), None]


def _output(get: Callable[[MergeOutcome], Number]) -> Callable[[MergeOutcome], Sequence[Number]]:
    return lambda outcome: [*(None for _ in outcome.models), get(outcome)]


_OF_MERGES = (
    Measure("projection", "in output", "In the output, ⟨δ, τ⟩ / ‖τ‖²",
            "How often a model's difference τ is in the output's, δ, with what others add in its direction.",
            "model", _none, outcome=_taken(lambda each: each.projection)),
    Measure("coefficient", "own part", "Its own part in the output",
            "Its weight in the weighted sum of the models' differences that is nearest to the output's.",
            "model", _none, outcome=_taken(lambda each: each.coefficient)),
    Measure("left", "beside it", "Of the output, not in its direction", "√(1 − cos²) of the two differences.",
            "model", _none, percent=True, domain=(0, 1), outcome=_taken(lambda each: each.left)),
    Measure("dropped", "dropped", "Dropped elements",
            "Of the elements that a model changes, the share that the output has as they are in the base.",
            "model", _none, percent=True, domain=(0, 1), outcome=_taken(lambda each: each.dropped)),
    Measure("reversed", "reversed", "Elements that go the other way",
            "Of the elements that a model and the output change, the share that they change in opposite directions.",
            "model", _none, percent=True, domain=(0, 1), outcome=_taken(lambda each: each.reversed)),
    Measure("residual", "no sum", "Of the output, no weighted sum of the models",
            "What was dropped, outvoted or rounded: ‖δ − Σ cτ‖ / ‖δ‖.",
            "model", _none, percent=True, domain=(0, 1), outcome=_output(lambda each: each.residual)),
    Measure("cancelled", "cancelled", "Cancelled between models",
            "What the models' parts take from the sum of each other's squares.",
            "model", _none, percent=True, domain=(0, 1), outcome=_output(lambda each: each.cancelled)),
)  # fmt: skip
#: Measures of a merge: of each model in the output, and of the output.
OUTCOMES: Mapping[str, Measure] = {each.key: each for each in _OF_MERGES}
