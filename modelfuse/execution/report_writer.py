"""Write the files beside the weights: the shard index, merge_config.json and merge_report.json."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from msgspec import Struct

from modelfuse.checkpoints import Checkpoint
from modelfuse.checkpoints.adapters import Adapter
from modelfuse.checkpoints.made_files import CONFIG_NAME, REPORT_NAME
from modelfuse.execution.anomalies import Suspicious
from modelfuse.kernels import Procedure
from modelfuse.planning.operations import Operation, method_numbers, methods_of
from modelfuse.planning.plan import Plan
from modelfuse.planning.warnings import warnings_of
from modelfuse.storage.checksums import ALGORITHM, Checksum
from modelfuse.storage.files import SourceFile
from modelfuse.version import __version__

if TYPE_CHECKING:
    from modelfuse.execution.sink import OutputSink
    from modelfuse.kernels.compiled.base_distance import Distance, SpanDistances

#: The end of an indented JSON object.
END = b"\n}\n"
Counts = np.ndarray[Any, np.dtype[np.int64]]


class SpanResult(NamedTuple):
    """The result of a span.

    Attributes:
        found: What the pass has found, to be sent to the procedure.
        bad: For a pass that writes: counts of non-finite elements, one per source, then the output's.
        digests: Digests of its output bytes, which are part of the tensor's checksum.
        distances: Its part of the distances to the base, if there is a base.
        facts: Further report entries from its sources.
    """

    found: Any
    bad: Counts | None = None
    digests: bytes = b""
    distances: SpanDistances | None = None
    facts: Mapping[str, object] = {}


class Outcome(Struct):
    """The result of one output tensor.

    Attributes:
        tensor: The operation that makes it.
        checksum: The checksum of its output bytes; the hex digest once it is complete, as a model may have a hundred
            thousand tensors.
        nonfinite: Counts of non-finite elements for each span that has any: one per source, then the output's.
        distances: Each span's part of the distances to the base, until all spans are done.
        facts: Further report entries from its sources.
    """

    tensor: Operation
    checksum: Checksum | str
    nonfinite: list[Counts] | None = None
    distances: list[SpanDistances] | None = None
    facts: dict[str, object] | None = None
    _measured: array[float] | None = None

    def take(self, first: int, walked: SpanResult) -> None:
        """Add the result of the span at element ``first``, of this run or an earlier one; not thread-safe."""
        assert isinstance(self.checksum, Checksum)
        self.checksum.restore(self.tensor.dtype.nbytes(first), walked.digests)
        if walked.bad is not None and walked.bad.any():
            self.nonfinite = self.nonfinite or []
            self.nonfinite.append(walked.bad)
        if walked.distances is not None:
            self.distances = self.distances or []
            self.distances.append(walked.distances)
        if walked.facts:
            self.facts = {**(self.facts or {}), **walked.facts}

    def follow(self, procedure: Procedure) -> Procedure:
        """Wrap the procedure, and summarize the results of its spans when it ends."""
        yield from procedure
        self.checksum = self.hexdigest()
        if self.distances:
            from modelfuse.kernels.compiled.base_distance import pack

            self._measured, self.distances = pack(self.measured()), None

    def hexdigest(self) -> str:
        """The checksum's hex digest, once all bytes were added."""
        return self.checksum if isinstance(self.checksum, str) else self.checksum.hexdigest()

    def measured(self) -> Sequence[Distance]:
        """The distance of each model to the base, once all spans are done; empty without a base."""
        if self.distances is None and self._measured is None:
            return ()
        from modelfuse.kernels.compiled.base_distance import distances, unpack

        return distances(self.distances) if self.distances else unpack(self._measured or array("d"))


def write_index(plan: Plan, folder: OutputSink) -> None:
    """Write the index of the shards, if there are several, in the format of transformers."""
    if plan.index is None:
        return
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in plan.tensors)},
        "weight_map": {tensor.name: tensor.file for tensor in plan.tensors},
    }
    folder.write_file(plan.index, encode_parts(index))


def write_config(plan: Plan, folder: OutputSink) -> None:
    """Write merge_config.json: every effective setting. Used as a recipe, it gives the same bytes."""
    # Not recorded: a file must not decide which server the user's token is sent to.
    settings = {**plan.recipe.effective(), "hub_endpoint": None, "ray_address": None}
    folder.write_file(CONFIG_NAME, encode_json({"modelfuse_version": __version__, **settings}))


def write_report(
    plan: Plan, outcomes: Mapping[str, Outcome], suspicious: Sequence[Suspicious], folder: OutputSink
) -> None:
    """Write merge_report.json: what became of every tensor of every input, with checksums.

    It is written last, as it has the checksums of all other files (for a weight file, that of its header).
    """
    (merge_type, sparsify_type, weights), numbers = plan.recipe.method_told, method_numbers(plan.tensors)
    every = tuple(range(len(plan.models)))
    report: dict[str, object] = {
        "modelfuse_version": __version__,
        "method": {"merge_type": merge_type, "sparsify_type": sparsify_type, "effective_weights": weights,
                   "seed": plan.recipe.seed},
        "methods": [each.described() for each in methods_of(plan.tensors)],
        **({"rules": plan.recipe.effective()["rules"]} if plan.recipe.rules else {}),
        "inputs": [_input(plan, number, model) for number, model in enumerate(plan.models)],
        **_grams(plan),
        "warnings": list(warnings_of(plan.recipe)),
        "left_out": [{"tensor": tied.name, "because": f"tied to {tied.other}"} for tied in plan.tied],
        "suspicious": [_suspicious(each) for each in suspicious],
        "checksum": ALGORITHM,
        "files": {file.name: file.size for file in plan.files},
        "tensors": ((tensor.name, _tensor(outcomes[tensor.name], numbers, every)) for tensor in plan.tensors),
        "copied_files": [file.name for file in plan.side_files],
        "sha256": dict(folder.digests),
    }  # fmt: skip
    folder.write_file(REPORT_NAME, _sealed(encode_parts(report)))


def _sealed(parts: Iterator[bytes]) -> Iterator[bytes]:
    """Append the sha256 of a JSON object to it, as its last entry."""
    digest, last = hashlib.sha256(), b""
    for part in parts:
        digest.update(part)
        yield last
        last = part
    yield last.removesuffix(END) + f',\n  "report_sha256": "{digest.hexdigest()}"'.encode() + END


def _input(plan: Plan, number: int, model: Checkpoint) -> dict[str, object]:
    files = {file.path.name: file for file in model.files}
    entry: dict[str, object] = {
        "path": str(plan.recipe.inputs[number]),
        "role": "base" if plan.has_base and number == len(plan.models) - 1 else "model",
        "format": model.kind,
        "layout": model.layout,
        "tensors": len(model) + len(model.aliases) + len(model.left_out),
        "files": {name: _file(file) for name, file in sorted(files.items())},
        **_left_out(model),
    }
    if isinstance(model, Adapter):
        entry |= {"role": "adapter", "tensors": len(model.account), "went_into": dict(model.account)}
    return entry


def _grams(plan: Plan) -> dict[str, object]:
    """The files that Gram matrices of inputs came from."""
    files = [SourceFile.at(path) for path in plan.recipe.gram_list]
    entries = [{"path": str(file.path), "files": {file.path.name: _file(file)}} for file in files]
    return {"grams": entries} if entries else {}


def _file(file: SourceFile) -> dict[str, int]:
    return {"size": file.size, "modified_ns": file.mtime_ns}


def _left_out(model: Checkpoint) -> dict[str, object]:
    """The tensors of one input that cannot be in an output, by reason."""
    names: dict[str, list[str]] = {}
    for name, reason in model.left_out.items():
        names.setdefault(reason, []).append(name)
    return {"left_out": [{"because": reason, "tensors": own} for reason, own in names.items()]} if names else {}


def _suspicious(found: Suspicious) -> dict[str, object]:
    return {
        "model": str(found.path),
        "equal_to_base": list(found.equal),
        "far_from_base": dict(found.far),
        "median_relative_distance": found.median,
    }


def _tensor(outcome: Outcome, methods: Mapping[int, int], every: tuple[int, ...]) -> dict[str, object]:
    """A tensor's report entry; methods, rules and inputs are numbered from 1."""
    tensor = outcome.tensor
    done = {"merge": "merged", "copy": "copied", "take": "taken"}[tensor.action]
    entry: dict[str, object] = {
        "action": done,
        "dtype": tensor.dtype.name,
        "shape": list(tensor.shape),
        "file": tensor.file,
        "checksum": outcome.hexdigest(),
        "source_dtypes": [source.stored.name for source in tensor.sources],
    }
    if tensor.method is not None:
        entry["method"] = methods[id(tensor.method)]
    if tensor.tolerance is not None:
        entry["tolerance"] = tensor.tolerance
    if tensor.rule is not None:
        entry["rule"] = tensor.rule + 1
    if tensor.inputs != every:
        entry["inputs"] = [number + 1 for number in tensor.inputs]
    if any(source.name != tensor.name for source in tensor.sources):
        entry["source_names"] = [source.name for source in tensor.sources]
    entry |= outcome.facts or {}
    if outcome.nonfinite is not None:
        nonfinite = np.sum(outcome.nonfinite, axis=0)
        entry["nonfinite"] = {"sources": nonfinite[:-1].tolist(), "output": int(nonfinite[-1])}
    return entry


def encode_json(content: Mapping[str, object]) -> bytes:
    """Encode a JSON file as a merge writes it."""
    return b"".join(encode_parts(content))


def encode_parts(content: Mapping[str, object]) -> Iterator[bytes]:
    """The same in pieces: the text of a large report takes much more memory than its content.

    Args:
        content: The object. A value may be an iterator of (key, value) pairs instead of a mapping.
    """
    start = "{"
    for key, value in content.items():
        yield _encode(f"{start}\n  {_dump(key)}: ")
        start = ","
        if isinstance(value, Mapping):
            value = iter(value.items())
        if not isinstance(value, Iterator):
            yield _encode(_dump(value, 1))
            continue
        inner = "{"
        for name, entry in value:
            yield _encode(f"{inner}\n    {_dump(name)}: {_dump(entry, 2)}")
            inner = ","
        yield b"\n  }" if inner == "," else b"{}"
    yield END if start == "," else b"{}\n"


def _dump(value: object, depth: int = 0) -> str:
    # Newlines in strings are escaped, so all newlines in the text are json's indentation.
    return json.dumps(value, indent=2, ensure_ascii=False).replace("\n", "\n" + "  " * depth)


def _encode(text: str) -> bytes:
    # Bytes of a path that are not UTF-8 become JSON escapes, which give the same path when read back.
    return text.encode(errors="backslashreplace")
