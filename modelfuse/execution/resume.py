"""Resume an interrupted merge: which spans are finished, and what they found, is read from the journal."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from modelfuse.checkpoints import StoredTensor
from modelfuse.execution.report_writer import Outcome, SpanResult
from modelfuse.planning.operations import Operation
from modelfuse.planning.plan import Plan
from modelfuse.recipe.hub_names import HubName
from modelfuse.version import __version__

#: Settings that never change a byte of the weights. All other settings are assumed to.
IMMATERIAL = ("output_path", "overwrite", "n_process", "memory", "split_pieces", "max_tensor_mem", "copy_file_list",
              "hub_endpoint", "hub_anonymous", "engine", "ray_address", "ray_timeout")  # fmt: skip


def facts_of(plan: Plan) -> dict[str, object]:
    """Everything that the bytes of the weights depend on, under names that messages can use.

    Inputs are identified by their headers and by the size, times and inode of every file: a retrained model has the
    same shapes, but not these.
    """
    facts: dict[str, object] = {"modelfuse's version": __version__}
    for named in plan.recipe.inputs:
        if isinstance(named, HubName):
            facts[f"the commit of {named.name}"] = named.revision
    for name, value in plan.recipe.effective().items():
        if name not in IMMATERIAL:
            facts[f"the setting {name}"] = value
    headers: dict[str, Any] = {}
    for tensor in plan.tensors:
        for source, model in zip(tensor.sources, plan.inputs_of(tensor), strict=True):
            headers.setdefault(str(model.path), hashlib.sha256()).update(_describe(source))
            for file in source.files:
                facts[str(file.path)] = file.identity
    for tensor in plan.tensors:
        for gram in tensor.grams:
            headers.setdefault(str(gram.file.path), hashlib.sha256()).update(_describe(gram))
            facts[str(gram.file.path)] = gram.file.identity
    facts |= {f"what the headers of {path} say": digest.hexdigest() for path, digest in headers.items()}
    layout = [[file.name, file.size, file.frame.digest] for file in plan.files]
    layout += [[tensor.name, tensor.action, tensor.inputs, tensor.chosen, tensor.rule] for tensor in plan.tensors]
    facts["the plan"] = hashlib.sha256(json.dumps(layout).encode()).hexdigest()
    known: dict[str, object] = json.loads(json.dumps(facts))  # As it is read back: lists instead of tuples.
    return known


def _describe(source: StoredTensor) -> bytes:
    """Bytes that identify a stored tensor; for a computed one, everything it is computed from."""
    if type(source) is StoredTensor:  # Nearly all are, and there may be hundreds of thousands.
        text = f"{source.name}\0{source.dtype.name}\0{source.shape}\0{source.offset}\0{source.file.path.name}\0"
    else:
        text = repr(source)
    return text.encode(errors="surrogateescape")


class Finished:
    """The spans that earlier runs have written.

    Args:
        plan: The plan, which is the same as that of the earlier runs.
    """

    def __init__(self, plan: Plan) -> None:
        self._tensors = {tensor.name: tensor for tensor in plan.tensors}
        self._spans: dict[str, dict[int, int]] = {}
        #: Their bytes, as progress counts them.
        self.nbytes = 0

    def restore(self, entries: Iterable[object], outcomes: Mapping[str, Outcome]) -> None:
        """Load journal entries made by :func:`entry_of`, and add what they found to the outcomes."""
        for entry in entries:
            if not isinstance(entry, dict):
                continue
            name, first, count = entry["tensor"], entry["first"], entry["count"]
            tensor, spans = self._tensors[name], self._spans.setdefault(name, {})
            if first not in spans:
                spans[first] = count
                outcomes[name].take(first, _walked(first, entry))
                self.nbytes += bytes_of(tensor, count)

    def has(self, name: str, first: int, count: int) -> bool:
        """Whether exactly this span of a tensor was written."""
        return self._spans.get(name, {}).get(first) == count

    def has_all(self, tensor: Operation) -> bool:
        """Whether all spans of a tensor were written."""
        return sum(self._spans.get(tensor.name, {}).values()) == tensor.size


def entry_of(tensor: Operation, first: int, count: int, walked: SpanResult) -> dict[str, object]:
    """The journal entry of a finished span."""
    distances = walked.distances
    return {
        "tensor": tensor.name,
        "first": first,
        "count": count,
        "digests": walked.digests.hex(),
        "nonfinite": None if walked.bad is None else walked.bad.tolist(),
        "distances": None if distances is None else [distances.differs.tolist(), distances.squares.tolist()],
        "facts": dict(walked.facts),
    }


def _walked(first: int, entry: Mapping[str, Any]) -> SpanResult:
    """The result of the span that a journal entry describes."""
    distances = None
    if entry["distances"] is not None:
        from modelfuse.kernels.compiled.base_distance import SpanDistances

        distances = SpanDistances(first, *map(np.array, entry["distances"]))
    bad = np.array(entry["nonfinite"], np.int64)
    return SpanResult(None, bad, bytes.fromhex(entry["digests"]), distances, entry["facts"])


def bytes_of(tensor: Operation, count: int) -> int:
    """The bytes that progress counts for ``count`` elements: bytes read (once per source) plus bytes written."""
    return tensor.dtype.nbytes(count) + sum(source.stored.nbytes(count) for source in tensor.sources)
