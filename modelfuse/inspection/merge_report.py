"""What a merge kept: ``modelfuse report``, and the page of ``modelfuse merge --html``.

The output is one more model of a ``diff`` of the inputs; how its difference meets theirs tells what became of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from modelfuse.checkpoints import read_json
from modelfuse.checkpoints.made_files import CONFIG_NAME, REPORT_NAME
from modelfuse.errors import CheckpointError
from modelfuse.inspection.diff import Progress, carry_out
from modelfuse.inspection.diff_names import short_names
from modelfuse.inspection.diff_result import Diff
from modelfuse.inspection.merge_outcome import Outcome, outcome_of, outcomes_of
from modelfuse.inspection.outcome_sentences import sentences_of
from modelfuse.inspection.recompute import absent_inputs, in_stores, modified_inputs
from modelfuse.inspection.report_reader import Report, read_recipe, read_report
from modelfuse.planning.diff_plan import DiffPlan, make_diff_plan
from modelfuse.planning.diff_sample import sampled
from modelfuse.planning.hub import QUIET, fetch
from modelfuse.planning.tables import html
from modelfuse.recipe.recipe import Recipe
from modelfuse.storage import PathOrUrl, forget

#: Gives what shows how far it is with what was planned.
ShownBy = Callable[[DiffPlan], AbstractContextManager[Progress]]
#: Of a sample, every so many blocks are read.
SAMPLE = 255
#: Settings of a recipe that are not about what is merged.
MACHINE = frozenset((
    "output_path", "overwrite", "device", "tensor_type", "gpu_memory", "allow_cpu_fallback", "n_process", "memory",
    "max_shard_size", "engine", "ray_address", "ray_timeout", "hub_endpoint", "hub_anonymous", "intermediate_dir",
))  # fmt: skip


@dataclass(frozen=True, slots=True)
class SuspiciousModel:
    """What stood out in a model when it was merged.

    Attributes:
        model: The model.
        equal: Tensors that are the base's.
        far: Tensors that are far from the base's.
    """

    model: str
    equal: tuple[str, ...]
    far: tuple[str, ...]


@dataclass(frozen=True, slots=True, repr=False)
class MergeReport:
    """What a merge kept of its inputs.

    Attributes:
        output: The output, as it was named.
        base: What differences are taken to: the base or, where there is none, the first model.
        base_given: Whether the merge had a base.
        models: The models in order; without a base, those behind the first.
        settings: What was asked for, by name.
        whole: All tensors together.
        layers: Layer by layer.
        modules: By kind of module.
        cells: By layer and kind of module.
        tensors: Tensor by tensor.
        suspicious: Models with tensors that stood out.
        findings: What matters, in sentences.
        sample: Of so many blocks of elements one was read; None: all were.
        diff: How the models and, as the last one, the output differ from the base.
        seconds: Wall time.
    """

    output: str
    base: str
    base_given: bool
    models: tuple[str, ...]
    settings: Mapping[str, object]
    whole: Outcome
    layers: tuple[Outcome, ...]
    modules: tuple[Outcome, ...]
    cells: tuple[Outcome, ...]
    tensors: tuple[Outcome, ...]
    suspicious: tuple[SuspiciousModel, ...]
    findings: tuple[str, ...]
    sample: int | None
    diff: Diff
    seconds: float

    def _repr_html_(self) -> str:
        """The numbers of each model, for a notebook."""
        rows = [(name, *map(_told, (each.projection, each.coefficient, each.dropped, each.reversed)))
                for name, each in zip(short_names(self.models), self.whole.models, strict=True)]  # fmt: skip
        titles = ("model", "in output", "own part", "dropped", "reversed")
        return html(self.output, (titles, rows), notes=self.findings)

    def __repr__(self) -> str:
        parts = [
            f"{'–' if each.projection is None else format(each.projection, '.2f')} of {name}"
            for name, each in zip(short_names(self.models), self.whole.models, strict=True)
        ]
        return f"<MergeReport: {', '.join(parts)}; {self.output}>"


def report_output(
    folder: PathOrUrl,
    *,
    exact: bool = False,
    n_process: int | None = None,
    memory: object = None,
    shown: ShownBy = lambda _: nullcontext(lambda *_: None),
) -> MergeReport:
    """Compare an output with its inputs, which are to be at hand.

    Args:
        folder: The output.
        exact: Whether interference is to be computed exactly.
        n_process: Parallel workers; None: one a processor.
        memory: The most memory to use; None: as for a merge.
        shown: Gives what shows how far it is, once it is planned.

    Raises:
        CheckpointError: If it is no output of a merge, or an input is missing or was changed.
        ModelfuseError: If an input cannot be read.
    """
    forget()
    try:
        report, _ = read_report(folder)
        recipe, problems = read_recipe(folder, report)
    except OSError as error:
        raise CheckpointError(f"{error.filename or folder}: {error.strerror}") from error
    if recipe is None:
        raise CheckpointError(problems[0].message if problems else f"{folder} has no {CONFIG_NAME}",
                              "Compare it by hand: modelfuse diff MODEL … OUT --base BASE.")  # fmt: skip
    recipe = _at_hand(folder, recipe, report)
    changes = {"n_process": n_process, "memory": memory}
    recipe = _with_machine(recipe, {name: value for name, value in changes.items() if value is not None})
    return compare_output(recipe, folder, exact=exact, shown=shown)


def compare_output(
    recipe: Recipe,
    folder: PathOrUrl,
    *,
    exact: bool = False,
    sample: int | None = None,
    shown: ShownBy = lambda _: nullcontext(lambda *_: None),
) -> MergeReport:
    """Compare an output with the inputs of its recipe, which are at hand.

    Args:
        recipe: What was merged.
        folder: The output.
        exact: Whether interference is to be computed exactly.
        sample: Read one of so many blocks of elements only, and tell no interference.
        shown: Gives what shows how far it is, once it is planned.
    """
    started = time.perf_counter()
    inputs, has_base = recipe.inputs, recipe.has_base or _names_base(recipe)
    base, models = (inputs[-1], inputs[:-1]) if recipe.has_base else (inputs[0], inputs[1:])
    layout = recipe.input_layout if recipe.output_format is None and len(recipe.input_layout or ()) == 1 else None
    compared = Recipe.parse({
        "model_path_list": [*models, folder], "base_model_path": base, "input_layout": layout,
        "n_process": recipe.n_process, "memory": recipe.memory, "merge_prefix": recipe.merge_prefix,
        "on_nonfinite": "propagate",
    })  # fmt: skip
    plan = make_diff_plan(compared, exact)
    plan = plan if sample is None else sampled(plan, sample)
    with shown(plan) as advance:
        diff = carry_out(plan, has_base, advance)
    outcomes = {name: outcomes_of(getattr(diff, name)) for name in ("layers", "modules", "cells", "tensors")}
    whole = outcome_of(diff.whole)
    names = tuple(map(str, models))
    suspicious = tuple(_suspicious(folder))
    findings = sentences_of(short_names((*names, str(folder))), whole, outcomes["modules"], outcomes["layers"], diff)
    settings = {name: value for name, value in recipe.effective().items()
                if name not in MACHINE and value not in (None, [], False)}  # fmt: skip
    return MergeReport(
        str(folder), str(base), has_base, names, settings, whole, outcomes["layers"], outcomes["modules"],
        outcomes["cells"], outcomes["tensors"], suspicious, tuple(findings), sample, diff,
        time.perf_counter() - started,
    )  # fmt: skip


def _names_base(recipe: Recipe) -> bool:
    """Whether a configuration of mergekit's has a base, which is the first input then."""
    if recipe.mergekit is None or recipe.configurations.mixture is not None:
        return False
    return recipe.configuration.base_model is not None


def _at_hand(folder: PathOrUrl, recipe: Recipe, report: Report) -> Recipe:
    """The recipe with its inputs, none of which is fetched: anybody may have written the files of an output."""
    recipe = recipe.changed(output_path=None)
    if recipe.hub_names:
        recipe = fetch(recipe, QUIET, ask=False)
    by_hand = "Fetch them, and compare by hand: modelfuse diff MODEL … OUT --base BASE."
    if urls := in_stores(report, recipe):
        raise CheckpointError(f"Inputs of {folder} are in stores, which a report does not ask: {urls[0]}", by_hand)
    if absent := absent_inputs(report, recipe):
        raise CheckpointError(f"Not all inputs of {folder} are at hand: {'; '.join(absent)}", by_hand)
    if modified := modified_inputs(report):
        raise CheckpointError(
            f"Inputs of {folder} were written again since the merge: {', '.join(modified)}",
            "Merge again, or compare by hand: modelfuse diff MODEL … OUT --base BASE.",
        )
    return recipe


def _with_machine(recipe: Recipe, changes: Mapping[str, object]) -> Recipe:
    """The same recipe with settings of this machine, checked."""
    if not changes:
        return recipe
    checked = Recipe.parse({"model_path_list": [*recipe.inputs, recipe.inputs[0]], **changes})
    return recipe.changed(**{name: getattr(checked, name) for name in changes})


def _told(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _suspicious(folder: PathOrUrl) -> Iterator[SuspiciousModel]:
    listed = read_json(folder / REPORT_NAME).get("suspicious")
    for each in listed if isinstance(listed, list) else []:
        if isinstance(each, Mapping):
            yield SuspiciousModel(str(each.get("model")), _names(each, "equal_to_base"), _names(each, "far_from_base"))


def _names(entry: Mapping[str, object], key: str) -> tuple[str, ...]:
    found = entry.get(key)
    return tuple(map(str, found)) if isinstance(found, Sequence | Mapping) and not isinstance(found, str) else ()
