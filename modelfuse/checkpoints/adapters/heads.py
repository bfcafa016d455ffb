"""Parts of an adapter that its base lacks: the head of another task, and rows for added tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from modelfuse.checkpoints import Checkpoint, StoredTensor
from modelfuse.checkpoints.adapters.adapter import Adapter
from modelfuse.checkpoints.adapters.config import AdapterConfig
from modelfuse.checkpoints.adapters.tensor_roles import AdapterContents
from modelfuse.checkpoints.tensor_names import EMBEDDINGS, HEADS
from modelfuse.errors import MismatchError
from modelfuse.recipe.missing import MissingRule

#: Suffixes of transformers' classes, by PEFT's task type.
CLASSES = {"SEQ_CLS": "ForSequenceClassification", "TOKEN_CLS": "ForTokenClassification",
           "QUESTION_ANS": "ForQuestionAnswering"}  # fmt: skip
#: Names of the heads of these classes, and of the heads that they replace.
NEW_HEAD = re.compile(r"(score|classifier|qa_outputs)\..+")
OLD_HEAD = re.compile(r"(lm_head|cls|embed_out)\..+")


def new_heads(
    contents: AdapterContents, settings: AdapterConfig, has: Callable[[str], bool]
) -> dict[str, StoredTensor]:
    """The head of a task that the base's class does not have."""
    if settings.task not in CLASSES:
        return {}
    return {name: replace(tensor, name=name) for name, tensor in contents.whole.items()
            if NEW_HEAD.fullmatch(name) and not has(name)}  # fmt: skip


def has_other_rows(name: str, tensor: StoredTensor, base: StoredTensor) -> bool:
    """Whether a matrix with a row per token has another number of rows than the base's, as with added tokens."""
    same = len(tensor.shape) == 2 and tensor.shape[1:] == base.shape[1:]
    return same and tensor.shape != base.shape and name.endswith((*EMBEDDINGS, *HEADS))


def with_new_heads(models: Sequence[Checkpoint]) -> tuple[tuple[Checkpoint, ...], tuple[MissingRule, ...]]:
    """The models, where adapters for a task's class lack the replaced heads; and rules for these.

    If all models are such adapters for one task, the output is of the task's class.
    """
    *adapters, base = models
    found = [model for model in adapters if isinstance(model, Adapter) and model.added]
    if not found or len(found) < len(adapters) or len({(each.task, each.added) for each in found}) > 1:
        return tuple(models), ()
    first = found[0]
    old = [name for name in (*base, *base.aliases) if OLD_HEAD.fullmatch(name)]
    changes = {**base.config_changes, **_of_class(base, first)}
    rules = [MissingRule(_exactly(name), "copy") for name in first.added]
    rules += [MissingRule(_exactly(name), "drop") for name in old]
    without = [
        replace(each, tensors={name: tensor for name, tensor in each.tensors.items() if name not in old},
                aliases={alias: name for alias, name in each.aliases.items() if alias not in old})
        for each in found
    ]  # fmt: skip
    return (*without, replace(base, config_changes=changes)), tuple(rules)


def _of_class(base: Checkpoint, adapter: Adapter) -> dict[str, object]:
    """The settings of config.json for the task's class."""
    named = base.config.get("architectures")
    family = str(named[0]) if isinstance(named, list) and named else ""
    family = re.sub(r"(For[A-Z]\w*|LMHead\w*)?(Model)?$", "", family)
    changes: dict[str, object] = {}
    if family:
        changes["architectures"] = [f"{family}{CLASSES[adapter.task]}"]
    labels = adapter.tensors[adapter.added[0]].shape[0] if adapter.task != "QUESTION_ANS" else 0
    if labels:
        changes["id2label"] = {str(number): f"LABEL_{number}" for number in range(labels)}
        changes["label2id"] = {f"LABEL_{number}": number for number in range(labels)}
    return changes


def _exactly(name: str) -> str:
    """A glob that matches one name."""
    return re.sub(r"([*?[])", r"[\1]", name)


def resized_rows(models: Sequence[Checkpoint]) -> tuple[tuple[Checkpoint, ...], tuple[str, ...]]:
    """The models with corrected vocabulary sizes, and the matrices that do not need the base's.

    Raises:
        MismatchError: If only one of the embedding and the head has other rows, or not all models have them.
    """
    *adapters, base = models
    names = {name for model in adapters if isinstance(model, Adapter) for name in model.resized}
    if not names:
        return tuple(models), ()
    problems = list(_row_problems(adapters, base, names))
    if problems:
        raise MismatchError(
            "An adapter has other rows for tokens than its base:\n" + "\n".join(f"  {each}" for each in problems),
            "Give the base as many rows first: resize_token_embeddings of transformers.",
        )
    rows = next(model.tensors[name].shape[0] for model in adapters for name in names)
    resized = replace(base, config_changes={**base.config_changes, "vocab_size": rows})
    return (*adapters, resized), tuple(sorted(names))


def _row_problems(adapters: Sequence[Checkpoint], base: Checkpoint, names: set[str]) -> Iterator[str]:
    matrices = [name for name in base if name.endswith((*EMBEDDINGS, *HEADS))]
    for name in matrices:
        rows = {str(model.path): model.tensors[name].shape[0] for model in adapters if name in model.tensors}
        if len(set(rows.values())) > 1 or name not in names:
            yield f"{name} has {', '.join(f'{count} in {path}' for path, count in rows.items())}"
