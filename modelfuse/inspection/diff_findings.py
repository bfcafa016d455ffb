"""Summarize a comparison in at most ten sentences, unexpected facts first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from modelfuse.inspection.diff_names import short_names
from modelfuse.inspection.diff_result import Diff, ModelPair, TensorGroup

MOST_FINDINGS = 10
#: Most names in a sentence.
MOST_NAMES = 3
#: Differences with at least this |cosine| are reported as similar or opposite.
ALIKE = 0.5
#: The least ratio of the largest to the smallest difference that is reported.
UNEVEN = 2.0
#: The density whose kept share is reported.
DENSITY = 0.2


def findings_of(diff: Diff) -> tuple[str, ...]:
    """The sentences on a comparison."""
    writer = _Sentences(diff)
    parts = (writer.strange, writer.beside, writer.sizes, writer.places, writer.elements, writer.directions,
             writer.interference, writer.left_out)  # fmt: skip
    return tuple([sentence for part in parts for sentence in part()][:MOST_FINDINGS])


class _Sentences:
    def __init__(self, diff: Diff) -> None:
        self._diff, self._names = diff, short_names(diff.models)
        self._base = short_names([diff.base])[0]
        self._changed = [number for number, each in enumerate(diff.whole.models) if each.norm > 0]

    def strange(self) -> Iterator[str]:
        """Unchanged models, non-finite values, outlying elements."""
        for name, each in zip(self._names, self._diff.whole.models, strict=True):
            if not each.norm and not each.nonfinite:
                yield f"{name} is the base: no element that was compared differs."
        bad = [
            (name, each.nonfinite) for name, each in zip(self._names, self._diff.whole.models, strict=True)
        ]  # fmt: skip
        bad = [each for each in [(self._base, self._diff.whole.base_nonfinite), *bad] if each[1]]
        if bad:
            yield f"NaN or infinite: {', '.join(f'{count:,} elements of {name}' for name, count in bad)}."
        outlying = [(n, each.outliers) for n, each in zip(self._names, self._diff.whole.models, strict=True)]
        if any(count for _, count in outlying):
            told = ", ".join(f"{name} {count:,}" for name, count in outlying if count)
            yield f"Outlying changes of single elements (at least 8 times the rms of their block): {told}."

    def beside(self) -> Iterator[str]:
        """Differences of configurations, tokenizers and other files."""
        found = self._diff.side_differences
        fatal = [each for each in found if each.fatal]
        for each in fatal[:1]:
            more = f" ({len(fatal) - 1} more such)" if len(fatal) > 1 else ""
            yield f"{self._names[each.model]}: {each.text}, so a merge would be meaningless{more}."
        others = [each for each in found if not each.fatal]
        if others:
            kinds = ", ".join(dict.fromkeys(each.about for each in others))
            models = list(dict.fromkeys(self._names[each.model] for each in others))
            yield f"Not only weights differ: {kinds} of {_some(models)} (listed below)."

    def sizes(self) -> Iterator[str]:
        """The distance of each model from the base."""
        sizes = sorted(((self._diff.whole.models[number].norm, number) for number in self._changed), reverse=True)
        told = [
            f"{self._names[number]} {_percent(self._diff.whole.models[number].relative)}" for _, number in sizes
        ]  # fmt: skip
        if told:
            yield f"Distance from the base, relative to its norm: {_some(told, 6)}."
        if len(sizes) > 1 and sizes[0][0] >= UNEVEN * sizes[-1][0]:
            one, other = self._names[sizes[0][1]], self._names[sizes[-1][1]]
            yield f"{one} has moved {sizes[0][0] / sizes[-1][0]:.1f} times as far as {other}."

    def places(self) -> Iterator[str]:
        """The modules and layers that have changed most, and those that have not."""
        modules = [each for each in self._diff.modules if _mean(each) > 0]
        if not modules:
            return
        still = [each.name for each in self._diff.modules if _mean(each) == 0 and not each.base_nonfinite]
        if still:
            yield f"Nothing has changed in {_some(still)}."
        most = max(modules, key=_mean)
        layers = [each for each in self._diff.layers if _mean(each) > 0]
        where = f" and in {max(layers, key=_mean).name}" if len(layers) > 1 else ""
        yield f"Relative to the base, most has changed in {most.name} ({_percent(_mean(most))}){where}."

    def elements(self) -> Iterator[str]:
        """The share of unchanged elements, and how concentrated the changes are."""
        models = [self._diff.whole.models[number] for number in self._changed]
        kept = [kept for each in models for kept in each.kept if kept.density == DENSITY]
        shares = [each.trim_squares for each in kept if each.trim_squares is not None]
        unchanged = [each.unchanged for each in models if each.unchanged is not None]
        if shares:
            yield (
                f"Unchanged elements: {_range(unchanged, _percent)}; the largest {100 * DENSITY:g} % have "
                f"{_range(shares, _percent)} of the sum of squares, which trim would keep."
            )

    def directions(self) -> Iterator[str]:
        """Cosines and sign conflicts of pairs of models."""
        pairs = [each for each in self._diff.whole.pairs if each.model < each.other and each.cosine is not None]
        if not pairs:
            return
        cosines = [each.cosine or 0.0 for each in pairs]
        largest = max(pairs, key=lambda each: abs(each.cosine or 0.0))
        if abs(largest.cosine or 0.0) >= ALIKE:
            how = "much in common" if (largest.cosine or 0.0) > 0 else "opposite directions"
            yield f"{self._both(largest)} have {how}: cosine {largest.cosine:.2f}."
        else:
            yield f"Differences are {'nearly ' * (max(map(abs, cosines)) < 0.1)}orthogonal: " \
                f"cosines {_range(cosines, _cosine)}."  # fmt: skip
        conflicts = [each.sign_conflict for each in pairs if each.sign_conflict is not None]
        if conflicts:
            yield f"Where two models change an element, their signs differ in {_range(conflicts, _percent)}."

    def interference(self) -> Iterator[str]:
        """The pairs with the most and the least interference."""
        pairs = [each for each in self._diff.whole.pairs if each.interference is not None]
        if not pairs:
            return
        worst = max(pairs, key=lambda each: each.interference or 0.0)
        yield (
            f"{self._names[worst.model]} may suffer most: on its inputs, {self._names[worst.other]} acts "
            f"{_interference(worst)} times as strongly as its own difference."
        )
        least = min(pairs, key=lambda each: each.interference or 0.0)
        if len(pairs) > 2:
            yield (
                f"Least disturbed is {self._names[least.model]} by {self._names[least.other]} "
                f"({_interference(least)}). For a given model, partners with more interference were found to cost more."
            )

    def left_out(self) -> Iterator[str]:
        """Tensors that were not compared, or not whole."""
        for each in self._diff.facts:
            if each.rows is not None:
                yield (
                    f"Of {each.name}, {each.rows:,} rows were compared, those of tokens that all models have; the base "
                    f"has {max(each.shape[:2]):,}."
                )
        found = [each for each in self._diff.not_compared if not each.because.startswith("tied to")]
        if found:
            yield f"Not compared: {_some([f'{each.tensor} ({each.because})' for each in found], 1)}."

    def _both(self, pair: ModelPair) -> str:
        return f"{self._names[pair.model]} and {self._names[pair.other]}"


def _cosine(value: float) -> str:
    return f"{value:.2f}".replace("-0.00", "0.00")


def _interference(pair: ModelPair) -> str:
    error = f" (± {pair.interference_error:.1g})" if pair.interference_error else ""
    return f"{pair.interference:.2f}{error}"


def _mean(group: TensorGroup) -> float:
    """The root mean square of the models' relative differences."""
    found = [(each.relative or 0.0) ** 2 for each in group.models]
    return float((sum(found) / len(found)) ** 0.5)


def _percent(share: float | None) -> str:
    """A share in percent, with about two significant digits."""
    if share is None:
        return "–"
    return f"{100 * share:.1f} %" if share >= 0.0995 or share == 0 else f"{100 * share:.2g} %"


def _range(values: Sequence[float], told: Callable[[float], str]) -> str:
    low, high = told(min(values)), told(max(values))
    return low if low == high else f"{low.removesuffix(' %')} to {high}"


def _some(words: Sequence[str], most: int = MOST_NAMES) -> str:
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return f"{', '.join(words[:most])}{more}"
