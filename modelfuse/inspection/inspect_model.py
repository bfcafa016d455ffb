"""Describe a model from its headers and configuration, without reading tensors: ``modelfuse inspect``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Literal, TypeVar

from modelfuse.checkpoints import CONFIG_FILE, Checkpoint, StoredTensor, open_checkpoint
from modelfuse.checkpoints.adapters.adapter import PEFT_CONFIG, config_of
from modelfuse.checkpoints.buffers import is_buffer
from modelfuse.checkpoints.config_checks import contradictions
from modelfuse.checkpoints.layouts.detect import kinds_of
from modelfuse.checkpoints.layouts.tables import FUSED, geometry_of, module_of
from modelfuse.checkpoints.made_files import CONFIG_NAME
from modelfuse.checkpoints.quantization import dequantized
from modelfuse.checkpoints.tensor_names import EMBEDDINGS, group_names, pattern
from modelfuse.checkpoints.ties import has_head, is_tied, pair_of
from modelfuse.errors import ModelfuseError
from modelfuse.inspection.inspected_model import Amount, Inspection, Remark, Shard, TensorFacts, Tie
from modelfuse.inspection.model_facts import TokenizerFacts, adapter_facts, config_facts, tokenizer_facts
from modelfuse.inspection.module_tree import tree_of
from modelfuse.planning.hub import FetchDisplay, headers
from modelfuse.planning.side_file_differences import FolderFiles
from modelfuse.planning.whole_matrices import THIRDS
from modelfuse.recipe.recipe import Recipe
from modelfuse.storage import PathOrUrl, forget

T = TypeVar("T")

#: Fused modules that are never split, and their parts.
OTHER_FUSED = dict.fromkeys(("query_key_value", *THIRDS), "queries, keys and values")


def inspect_model(path: PathOrUrl, prefix: str = "model", named: object = None) -> Inspection:
    """Describe a model from its headers and the files beside the weights.

    Args:
        path: A folder, or the only file with weights.
        prefix: The name of the folder's weight files, as for a merge: ``model`` or ``master_weights``.
        named: The user's name for the model, if it is not the path.

    Raises:
        CheckpointError: If there is no model, or its files cannot be read.
    """
    forget()
    config_file = config_of(path)
    stem = prefix if config_file is None else "adapter_model" if config_file.name == PEFT_CONFIG else "peft_model"
    model = open_checkpoint(path, stem)
    served = FolderFiles.of(path)
    tokenizer = tokenizer_facts(served)
    remarks: list[Remark] = []
    adapter = _tried(remarks, lambda: adapter_facts(path, model), None)
    values = model if config_file is not None else _tried(remarks, lambda: dequantized(model), model)
    layout = None if config_file is not None else _tried(remarks, lambda: _layout(values), None)
    if config_file is None:
        remarks += _remarks(values, tokenizer, served)
    dtypes = _amounts(model)
    return Inspection(
        str(path if named is None else named),
        "model" if config_file is None else "adapter",
        model.kind,
        layout,
        sum(each.parameters for each in dtypes.values()),
        sum(each.bytes for each in dtypes.values()),
        dtypes,
        _shards(model),
        tree_of(model),
        [_facts(name, tensor) for name, tensor in model.items()],
        [*_ties(model)] if config_file is None else [],
        _fused(model),
        values.left_out,
        config_facts(model.config),
        tokenizer,
        adapter,
        remarks,
    )


def _tried(remarks: list[Remark], look: Callable[[], T], otherwise: T) -> T:
    """The result of ``look``; if it fails, ``otherwise``, and the error becomes a remark."""
    try:
        return look()
    except ModelfuseError as error:
        remarks.append(Remark("problem", error.message, error.hint))
        return otherwise


def _layout(model: Checkpoint) -> Literal["hf", "paddle"] | None:
    return kinds_of([model], [None], geometry_of([model]))[0]


def _amounts(model: Checkpoint) -> dict[str, Amount]:
    tensors, parameters, stored = Counter[str](), Counter[str](), Counter[str]()
    for tensor in model.values():
        name = str(tensor.dtype)
        tensors[name] += 1
        parameters[name] += tensor.size
        stored[name] += tensor.nbytes
    return {name: Amount(count, parameters[name], stored[name]) for name, count in tensors.most_common()}


def _shards(model: Checkpoint) -> list[Shard]:
    counts = Counter(tensor.file for tensor in model.values())
    return [Shard(file.path.name, file.size, count) for file, count in counts.items()]


def _facts(name: str, tensor: StoredTensor) -> TensorFacts:
    return TensorFacts(name, str(tensor.dtype), tensor.shape, tensor.nbytes, tensor.file.path.name)


def _ties(model: Checkpoint) -> Iterator[Tie]:
    for name, to in model.aliases.items():
        yield Tie(name, to, "the file stores both once")
    pair = pair_of(model)
    if pair is not None and pair.head not in model.aliases and is_tied(model) and has_head(model):
        yield Tie(pair.head, pair.embedding, f"{CONFIG_FILE}, or the model's class")


def _fused(model: Checkpoint) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, tensor in model.items():
        module = module_of(name) if name.endswith((".weight", ".bias")) else name.rpartition(".")[2]
        if len(tensor.shape) == 3 and "expert" in name:
            found.setdefault(pattern(name), f"{tensor.shape[0]} experts")
        elif module in FUSED:
            found.setdefault(pattern(name), ", ".join(FUSED[module].parts))
        elif module in OTHER_FUSED:
            found.setdefault(pattern(name), OTHER_FUSED[module])
    return found


def _remarks(model: Checkpoint, tokenizer: TokenizerFacts | None, served: FolderFiles) -> Iterator[Remark]:
    """Remarks on how a merge would treat the model, and on what may fail when it is loaded."""
    shapes = {name: tensor.shape for name, tensor in model.items()}
    for _, text in contradictions(model.config, shapes):
        yield Remark("warning", text)
    if CONFIG_NAME in served.names and (method := served.json(CONFIG_NAME).get("merge_method")):
        yield Remark("note", f"It was merged by modelfuse: {str(method)[:40]}.", "`modelfuse verify` checks it.")
    if CONFIG_FILE not in served.names:
        yield Remark("warning", f"It has no {CONFIG_FILE}: its architecture is inferred from names and shapes alone.")
    if model.dequantized:
        yield Remark("note", "Its fp8 codes are merged as values, which outputs store in bfloat16.")
    buffers = [name for name, shape in shapes.items() if is_buffer(name, shape)]
    if buffers:
        yield Remark("note", f"Computed from {CONFIG_FILE}, and not merged: {_listed(buffers)}.")
    whole = [name for name, each in model.items() if each.dtype.compute is None and name not in buffers]
    if whole:
        yield Remark("note", f"Not floating point, so they must be equal in all inputs: {_listed(whole)}.")
    pair = pair_of(model)
    if pair is not None and is_tied(model) and pair.head in model.tensors:
        text = f"It ties {pair.head} to {pair.embedding} and stores both; loaders use only one of them."
        yield Remark("note", text)
    rows = [tensor.shape[0] for name, tensor in model.items() if name.endswith(EMBEDDINGS) and tensor.shape]
    if tokenizer is not None and tokenizer.rows is not None and len(rows) == 1 and tokenizer.rows > rows[0]:
        yield Remark("warning", f"Its tokenizer needs {tokenizer.rows} rows, but its embedding has {rows[0]}.")


def _listed(names: list[str]) -> str:
    return ", ".join(group_names(names))


def inspect_named(
    model: object,
    *,
    merge_prefix: str | None = None,
    hub_endpoint: str | None = None,
    hub_anonymous: bool = False,
    watch: FetchDisplay | None = None,
) -> Inspection:
    """Describe a model given as a folder, a file, a URL or a hub name.

    Args:
        model: The model.
        merge_prefix: The name of the folder's weight files: ``model`` or ``master_weights``.
        hub_endpoint: The URL of the hub.
        hub_anonymous: Whether to send no token to the hub.
        watch: Displays the progress of downloads.

    Raises:
        RecipeError: If a setting is invalid.
        CheckpointError: If there is no model, or its files cannot be read.
        HubError: If the model cannot be fetched.
    """
    given = {"merge_prefix": merge_prefix, "hub_endpoint": hub_endpoint, "hub_anonymous": hub_anonymous}
    # A recipe checks the settings, and fetching headers takes one.
    recipe = Recipe.parse(
        {"model_path_list": [model, model], **{name: value for name, value in given.items() if value is not None}}
    )
    with headers(recipe, watch) as fetched:
        return inspect_model(fetched.input_paths[0], fetched.merge_prefix, fetched.inputs[0])
