"""Error messages for models whose tensors do not match, with a hint for the kind of mismatch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from modelfuse.checkpoints import Checkpoint
from modelfuse.checkpoints.tensor_names import EMBEDDINGS, HEADS, group_names
from modelfuse.errors import MismatchError

InputsOf = Callable[[str], tuple[int, ...]]
#: The most patterns that a hint lists.
MOST_PATTERNS = 4
#: The share of tensors that models must have in common to count as models of one architecture.
LEAST_SHARED = 0.5
_LAYER = re.compile(r"(?P<stack>.*?(?<![^.])(?:layers?|h|blocks?))\.(?P<number>\d+)\.")
_CLASSIFIER = re.compile(r"(?:.*\.)?(score|classifier|cls|v_head|value_head|reward_head)\..*")
_ADAPTER = re.compile(r"\blora_[AB]\b|\.base_layer\.|\bhada_|\blokr_|\.modules_to_save\.")
ONE_BASE = "Merge models that were fine-tuned from one base."
ROWS_HINT = (
    "Choose the output's vocabulary, such as --tokenizer union; or resize all models to the same number of rows "
    "(resize_token_embeddings of transformers)."
)


class Mismatch:
    """The mismatches of several models.

    Args:
        models: All models.
        missing: Names of tensors that a model lacks although it must have them.
        misshapen: Names of tensors whose shapes differ.
        untied: Descriptions of tied tensors that differ in shape or dtype.
        inputs_of: Gives the indices of the models that must have a tensor, by its name.
    """

    def __init__(
        self, models: Sequence[Checkpoint], missing: Sequence[str], misshapen: Sequence[str], untied: Sequence[str],
        inputs_of: InputsOf,
    ) -> None:  # fmt: skip
        self.models, self.missing, self.misshapen, self.untied = models, missing, misshapen, untied
        self.inputs_of = inputs_of

    def error(self) -> MismatchError:
        """The error, with a hint if there is one for this kind of mismatch."""
        kind = next((each for each in (self._not_gathered(), self._unmerged_adapter(), self._depths(), self._rows())
                     if each is not None), None)  # fmt: skip
        lines, hint = ([kind[0]], kind[1]) if kind is not None else ([], self._hint())
        lines += [*self._describe_missing(), *self._describe_shapes(), *self.untied]
        return MismatchError(
            "The models do not have the same tensors:\n" + "\n".join(f"  {line}" for line in lines), hint
        )

    # --- kinds -------------------------------------------------------------------------------------------------

    def _not_gathered(self) -> tuple[str, str] | None:
        for model in self.models:
            empty = sum(tensor.shape == (0,) for tensor in model.values())
            if empty and empty >= LEAST_SHARED * len(model):
                return (
                    f"{empty} of {len(model)} tensors of {model.path} have the shape [0]: it was saved under ZeRO-3 "
                    "without being gathered",
                    "Convert the training state with zero_to_fp32.py, or save the model again with "
                    "stage3_gather_16bit_weights_on_model_save.",
                )
        return None

    def _unmerged_adapter(self) -> tuple[str, str] | None:
        for model in self.models:
            found = [name for name in model if _ADAPTER.search(name)]
            if found:
                return (
                    f"{model.path} contains tensors of an adapter that is not merged, such as {found[0]}",
                    "Merge the adapter with PEFT's merge_and_unload, or save it alone and give its folder.",
                )
        return None

    def _depths(self) -> tuple[str, str] | None:
        """The message and hint if only the number of layers differs."""
        stacks = {match["stack"] for name in self.missing if (match := _LAYER.match(name))}
        if len(stacks) != 1 or any(_LAYER.match(name) is None for name in self.missing):
            return None
        stack = stacks.pop()
        depths = [_depth(model, stack) for model in self.models]
        least = min(depths)
        numbers = {int(match["number"]) for name in self.missing if (match := _LAYER.match(name))}
        if not least or least == max(depths) or min(numbers) < least:
            return None
        deep = " and ".join(str(model.path) for model, depth in zip(self.models, depths, strict=True) if depth > least)
        extra = _listed(sorted(numbers))
        counts = " and ".join(f"{depth} layers" if not at else str(depth) for at, depth in
                                 enumerate(sorted(set(depths))))  # fmt: skip
        return (
            f"{counts} ({stack}.{extra} only in {deep})",
            f"Merge models with the same number of layers. To leave the other layers out, or copy them: "
            f"{_missing_flag([f'{stack}.{number}.*' for number in sorted(numbers)][:MOST_PATTERNS], 'drop')}; "
            "to choose layers, use a mergekit configuration with slices:.",
        )

    def _rows(self) -> tuple[str, str] | None:
        """The message and hint if only embeddings and heads differ, and only in the number of rows."""
        if (
            self.missing
            or not self.misshapen
            or not all(name.endswith((*EMBEDDINGS, *HEADS)) for name in self.misshapen)
        ):
            return None
        rows = set[int]()
        for name in self.misshapen:
            shapes = {model.resolve(name).shape for model in self.models if model.has(name)}
            if len({shape[1:] for shape in shapes}) > 1:
                return None
            rows |= {shape[0] for shape in shapes if shape}
        return f"Rows {' and '.join(map(str, sorted(rows)))}: added tokens, or padding", ROWS_HINT

    def _hint(self) -> str | None:
        """The hint for tensors that only some models have; None if the models have few tensors in common."""
        if self.misshapen:
            return ONE_BASE
        if not self.missing or self.untied:
            return None
        shared = set.intersection(*({*model, *model.aliases} for model in self.models))
        if len(shared) < LEAST_SHARED * min(len(model) for model in self.models):
            return None
        heads = [name for name in self.missing if name.endswith(HEADS)]
        classifiers = [name for name in self.missing if _CLASSIFIER.fullmatch(name)]
        if heads and classifiers:
            return (
                f"One model has a classification head, another one a language model head: "
                f"{_missing_flag(_patterns(classifiers, shared), 'copy')} with "
                f"{_missing_flag(_patterns(heads, shared), 'drop', flag=False)} keeps the first one's, or the reverse."
            )
        keep = _missing_flag(_patterns(self.missing, shared), "copy")
        return f"{ONE_BASE} To copy the tensors that only some have: {keep}; to leave them out: drop instead of copy."

    # --- lines -------------------------------------------------------------------------------------------------

    def _describe_missing(self) -> Iterator[str]:
        lines: dict[tuple[str, ...], list[str]] = {}
        for name in self.missing:
            numbers = self.inputs_of(name)
            absent = tuple(str(self.models[number].path) for number in numbers if not self.models[number].has(name))
            lines.setdefault(absent, []).append(name)
        for absent, names in lines.items():
            yield from (f"not in {' and '.join(absent)}: {group}" for group in group_names(names))

    def _describe_shapes(self) -> Iterator[str]:
        lines: dict[str, list[str]] = {}
        for name in self.misshapen:
            holders = [self.models[number] for number in self.inputs_of(name)]
            shapes = [(model.resolve(name).shape, model.path) for model in holders]
            shown = ", ".join(f"{list(shape)} in {path}" for shape, path in shapes)
            lines.setdefault(shown, []).append(name)
        for shown, names in lines.items():
            yield from (f"{group} has the shapes {shown}" for group in group_names(names))


def _depth(model: Mapping[str, object], stack: str) -> int:
    found = (_LAYER.match(name) for name in model)
    return max((int(match["number"]) + 1 for match in found if match and match["stack"] == stack), default=0)


def _listed(numbers: Sequence[int]) -> str:
    """A short text for ascending numbers.

    >>> _listed([16, 17]), _listed([4, 5, 6, 7])
    ('16 and 17', '4 to 7')
    """
    if len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]} to {numbers[-1]}"
    return " and ".join(map(str, numbers))


def _patterns(names: Sequence[str], shared: set[str]) -> list[str]:
    """Globs that match these names, but none of the names that all models have."""
    found = list[str]()
    for name in names:
        if any(name.startswith(pattern.removesuffix("*")) for pattern in found):
            continue
        parts = name.split(".")
        for count in range(1, len(parts) + 1):
            start = ".".join(parts[:count]) + ("." if count < len(parts) else "")
            if not any(each.startswith(start) for each in shared):
                found.append(f"{start}*" if count < len(parts) else start)
                break
    return found if len(found) <= MOST_PATTERNS else ["*"]


def _missing_flag(patterns: Sequence[str], policy: str, flag: bool = True) -> str:
    rules = " ".join(policy if pattern == "*" else f"'{pattern}={policy}'" for pattern in patterns)
    return f"--missing {rules}" if flag else rules
