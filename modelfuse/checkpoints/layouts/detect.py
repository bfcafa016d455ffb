"""Detect the layout of each input, from shapes, other signs or the user's declaration; never guessed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from modelfuse.checkpoints import Checkpoint, StoredTensor
from modelfuse.checkpoints.layouts.paddleformers import ARCHITECTURES, FLEET, layout_of_names
from modelfuse.checkpoints.layouts.tables import (
    EMBEDDING_MODULES,
    HEAD,
    HF_PREFIX,
    LINEAR,
    WORDS,
    Geometry,
    Kind,
    module_of,
    prefix_of,
)
from modelfuse.checkpoints.tensor_names import EMBEDDINGS
from modelfuse.errors import MismatchError

ASK = "Say which it is with --input_layout hf or paddle: one for all, or one per model with the base last."


def kinds_of(
    models: Sequence[Checkpoint], declared: Sequence[Kind | None], geometry: Geometry
) -> tuple[Kind | None, ...]:
    """The kind of each input; None if nothing indicates a layout in any input.

    Args:
        models: The inputs.
        declared: The declared kind of each.
        geometry: The sizes in config.json.

    Raises:
        MismatchError: If signs contradict each other or the declaration, or only some models have signs.
    """
    kinds = [_kind(model, said, geometry) for model, said in zip(models, declared, strict=True)]
    known = next((number for number, kind in enumerate(kinds) if kind is not None), None)
    if known is None:
        return tuple(kinds)
    return tuple(
        _compare(model, models[known], kinds[known], geometry) if kind is None else kind
        for model, kind in zip(models, kinds, strict=True)
    )


def _kind(model: Checkpoint, said: Kind | None, geometry: Geometry) -> Kind | None:
    shapes = _shapes(model, geometry)
    if len(shapes) > 1:
        # Names of an unknown architecture may have another meaning.
        known = geometry.architecture in ARCHITECTURES
        if said is not None and not known:
            return said
        raise MismatchError(
            f"{model.path} holds weights in both layouts: {shapes['hf']}, but {shapes['paddle']}",
            "Save it again in one layout, with the library that wrote it."
            + ("" if known else f" If its architecture is meant so: {ASK[0].lower()}{ASK[1:]}"),
        )
    if said is not None:
        for kind, why in shapes.items():
            if kind != said:
                raise MismatchError(
                    f"{model.path} cannot be in {WORDS[said]}: {why}", "Check --input_layout and convert_from_hf."
                )
        return said
    found = dict(shapes)
    for kind, why in _other_signs(model, geometry):
        found.setdefault(kind, why)
    if len(found) > 1:
        raise MismatchError(f"The layout of {model.path} cannot be known: {found['hf']}, but {found['paddle']}", ASK)
    return next(iter(found), None)


def _shapes(model: Checkpoint, geometry: Geometry) -> dict[Kind, str]:
    """The kinds that shapes prove, and for each the first weight that does."""
    embeddings = [tensor for name, tensor in model.items() if name.endswith(EMBEDDINGS[0])]
    # An encoder may have another width: only the decoder counts.
    decoder = embeddings[0].name.removesuffix(EMBEDDINGS[0]).removesuffix("embedding.") if len(embeddings) == 1 else ""
    hidden = geometry.hidden or next((tensor.shape[-1] for tensor in embeddings if tensor.shape), None)
    first: dict[Kind, StoredTensor] = {}
    for name, tensor in model.items():
        kind = _kind_of_shape(tensor, hidden)
        if kind is not None and kind not in first and name.startswith(decoder):
            first[kind] = tensor
    return {
        kind: f"{tensor.name} is {list(tensor.shape)}, which is {WORDS[kind]} for a width of {hidden}"
        for kind, tensor in first.items()
    }


def _other_signs(model: Checkpoint, geometry: Geometry) -> Iterator[tuple[Kind, str]]:
    names = [*model, *model.aliases]
    prefix = prefix_of(names, geometry.architecture)
    if layout_of_names(geometry.architecture, names) == FLEET:
        yield "paddle", "its names are those of PaddleFormers' models that are built with paddlefleet"
    if model.config.get("source") == "paddle":
        yield "paddle", "its config.json says source: paddle"
    if model.kind == "paddle":
        yield "paddle", "it is in .pdparams files"
    if prefix != HF_PREFIX:
        yield "paddle", f"its names begin with {prefix!r}, as PaddleNLP's do"
    if model.kind == "torch":
        yield "hf", "it is in .bin files of torch"


def _kind_of_shape(tensor: StoredTensor, hidden: int | None) -> Kind | None:
    side = LINEAR.get(module_of(tensor.name))
    if side is None or len(tensor.shape) != 2 or not tensor.name.endswith(".weight"):
        return None
    rows, columns = tensor.shape
    if rows == columns or hidden not in (rows, columns):
        return None
    return "hf" if (columns == hidden) == (side == "in") else "paddle"


def _compare(model: Checkpoint, other: Checkpoint, kind: Kind | None, geometry: Geometry) -> Kind | None:
    """The kind of a model without signs, by comparing its shapes with those of a model of a known kind."""
    shapes = matrices(other, geometry)
    pairs = [(shape, shapes[name]) for name, shape in matrices(model, geometry).items() if name in shapes]
    if any(one == two[::-1] != two for one, two in pairs):
        return "paddle" if kind == "hf" else "hf"
    if any(one == two != two[::-1] for one, two in pairs) or not pairs:
        return kind
    raise MismatchError(
        f"The layout of {model.path} cannot be known: its Linear weights are square, and {other.path} may be in "
        "another layout",
        ASK,
    )


def matrices(model: Checkpoint, geometry: Geometry) -> Mapping[str, tuple[int, ...]]:
    """The shapes of possible Linear weights, by Hugging Face's names."""
    prefix = prefix_of([*model, *model.aliases], geometry.architecture)
    return {
        f"{HF_PREFIX}{name.removeprefix(prefix)}" if name.startswith(prefix) else name: tensor.shape
        for name, tensor in model.items()
        if len(tensor.shape) == 2 and module_of(name) not in (*EMBEDDING_MODULES, HEAD)
    }
