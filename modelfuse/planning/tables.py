"""Tables of a plan, as rows and as HTML."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import Protocol

from modelfuse.checkpoints import Checkpoint
from modelfuse.checkpoints.tensor_names import group_names, pattern
from modelfuse.planning.matching import Tied
from modelfuse.planning.operations import Operation
from modelfuse.recipe.recipe import Recipe
from modelfuse.recipe.sizes import size
from modelfuse.recipe.tensor_rules import Rule

Row = Sequence[object]


class PlanLike(Protocol):
    """The attributes of a :class:`~modelfuse.planning.plan.Plan` that tables show."""

    @property
    def recipe(self) -> Recipe: ...
    @property
    def models(self) -> Sequence[Checkpoint]: ...
    @property
    def tensors(self) -> Sequence[Operation]: ...
    @property
    def tied(self) -> Sequence[Tied]: ...
    @property
    def has_base(self) -> bool: ...
    @property
    def bytes_read(self) -> int: ...
    @property
    def bytes_written(self) -> int: ...


#: The most tensor names that are shown for a rule.
MOST_NAMES = 3


def models_of(plan: PlanLike) -> tuple[Sequence[str], list[Row]]:
    """Column titles, and one row per input."""
    if plan.recipe.mergekit is not None:  # Weights may differ from tensor to tensor.
        return ("model", "format", "tensors"), [row[:3] for row in _models(plan)]
    return ("model", "format", "tensors", "weight"), [*_models(plan)]


def _models(plan: PlanLike) -> Iterator[Row]:
    for number, model in enumerate(plan.models):
        is_base = plan.has_base and number == len(plan.models) - 1
        weight = f"{plan.recipe.weights[number - is_base]:.6g}" if plan.recipe.parameters.has_weights else "–"
        yield plan.recipe.inputs[number], model.kind, len(model), "base" if is_base else weight


def rules_of(plan: PlanLike) -> tuple[Sequence[str], list[Row]]:
    """Column titles, and one row per rule: its method or input, and the tensors that it applies to."""
    return ("rule", "tensors", "what", "count", "such as"), [*_rules(plan)]


def _rules(plan: PlanLike) -> Iterator[Row]:
    took: list[list[str]] = [[] for _ in plan.recipe.rules]
    for tensor in plan.tensors:
        if tensor.rule is not None:
            took[tensor.rule].append(tensor.name)
    for number, (rule, names) in enumerate(zip(plan.recipe.rules, took, strict=True), 1):
        shown = "; ".join(group_names(names)[:MOST_NAMES]) or "–"
        yield number, rule.tensors, _meaning(plan.recipe, rule), len(names), shown


def _meaning(recipe: Recipe, rule: Rule) -> str:
    """The method of a rule with the rule's own settings, or the input that it takes."""
    if isinstance(rule.take, int):
        return f"as in {recipe.inputs[rule.take]}"
    own = ", ".join(f"{name} {_plain(value)}" for name, value in rule.own if name != "merge_method")
    return f"{recipe.parameters_of(rule).name}{': ' if own else ''}{own}"


def _plain(value: object) -> str:
    return " ".join(f"{each:.6g}" for each in value) if isinstance(value, tuple) else str(value)


def tensors_of(plan: PlanLike) -> tuple[Sequence[str], list[Row]]:
    """Column titles, and one row for all tensors that differ only in numbers in their names, such as the layer's."""
    ruled = ("rule",) if plan.recipe.rules else ()
    return ("what", "tensors", "dtype", "shape", "count", *ruled), [*_tensors(plan)]


def _tensors(plan: PlanLike) -> Iterator[Row]:
    groups = Counter((each.action, pattern(each.name), each.dtype, each.shape, each.rule) for each in plan.tensors)
    for (action, name, dtype, shape, rule), count in groups.items():
        ruled = ("–" if rule is None else rule + 1,) if plan.recipe.rules else ()
        yield action, name, dtype, list(shape), count, *ruled
    for tied in plan.tied:
        yield "leave out", tied.name, "", f"tied to {tied.other}", 1, *(("",) if plan.recipe.rules else ())


def summary(plan: PlanLike) -> str:
    """A plan in one line."""
    number = len(plan.recipe.model_path_list)
    inputs = f"{number} model{'s' * (number != 1)}{' and a base' if plan.has_base else ''}"
    return (
        f"{_method(plan)} of {inputs}: "
        f"{len(plan.tensors)} tensors, reads {size(plan.bytes_read)}, writes {size(plan.bytes_written)}"
    )


def _method(plan: PlanLike) -> str:
    return plan.recipe.method_told[0] if plan.recipe.mergekit is not None else plan.recipe.parameters.name


def html(title: str, *tables: tuple[Sequence[str], Iterable[Row]], notes: Iterable[str] = ()) -> str:
    """HTML tables for a notebook, with a title above and notes below."""
    parts = [f"<p><b>{escape(title)}</b></p>"]
    for titles, rows in tables:
        head = "".join(f"<th style='text-align:left'>{escape(each)}</th>" for each in titles)
        body = "".join(f"<tr>{''.join(_cell(cell) for cell in row)}</tr>" for row in rows)
        parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")
    return "".join([*parts, *(f"<p>note: {escape(text)}</p>" for text in notes)])


def _cell(cell: object) -> str:
    return f"<td style='text-align:left'>{escape(str(cell))}</td>"
