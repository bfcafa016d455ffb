"""Operations: how each output tensor is computed, from which tensors of which inputs, and by which method.

Rules, mergekit configurations and the policy for missing tensors all create an :class:`Operation`; everything after
that (files, memory, execution, report, verification) uses operations only.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from msgspec import Struct

from modelfuse.checkpoints import StoredTensor
from modelfuse.checkpoints.buffers import is_buffer
from modelfuse.dtypes import DType
from modelfuse.kernels import Work
from modelfuse.kernels.matrices import Matrices
from modelfuse.methods.applied import Applied
from modelfuse.methods.registry import TAKE

Action = Literal["merge", "copy", "take"]


class Operation(Struct, frozen=True):
    """One tensor of the output.

    Attributes:
        name: Its name.
        dtype: The dtype that is stored.
        shape: Its shape.
        action: ``merge``; ``take`` for one source's values, unchanged but for the dtype; ``copy`` for tensors that
            cannot be merged, such as integers, and must be equal in all sources.
        sources: The models' tensors, the base's last if there is one. Their names may differ from ``name``.
        inputs: For each source, the index of its input: the models from 0 on, then the base.
        has_base: Whether the last source is the base's.
        method: The method with its parameters; None for ``copy`` and ``take``, except for a tensor of an adapter
            whose values a method has already computed.
        chosen: For ``copy``, the position of the source to use if they differ; None if they must be equal.
        rule: The index of the recipe's rule that applies, from 0 on; None if no rule does.
        matrices: How it is split into matrices, if its method works on whole matrices.
        file: The name of the output file that contains it.
        offset: The offset of its first byte in that file.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    action: Action
    sources: tuple[StoredTensor, ...]
    inputs: tuple[int, ...]
    has_base: bool = False
    method: Applied | None = None
    chosen: int | None = None
    rule: int | None = None
    matrices: Matrices | None = None
    file: str = ""
    offset: int = 0

    @property
    def models(self) -> tuple[StoredTensor, ...]:
        """The sources without the base's."""
        return self.sources[:-1] if self.has_base else self.sources

    @property
    def size(self) -> int:
        """The number of elements."""
        return self.sources[0].size

    @property
    def nbytes(self) -> int:
        """The number of bytes in the output."""
        return self.dtype.nbytes(self.size)

    @property
    def bytes_read(self) -> int:
        """The number of bytes in all sources together."""
        return sum(source.stored.nbytes(source.size) for source in self.sources)

    @property
    def work(self) -> Work:
        """The kernel's task, for ``merge`` and ``take``."""
        merges = self.action == "merge" and self.method is not None
        method, matrices = (self.method or TAKE, self.matrices) if merges else (TAKE, None)
        dtypes, deltas = tuple(each.dtype for each in self.sources), tuple(each.is_delta for each in self.models)
        return Work(self.name, self.size, dtypes, self.has_base, self.dtype, method, deltas, matrices, self.shape)

    @property
    def grams(self) -> tuple[StoredTensor, ...]:
        """Gram matrices of the layers' inputs from ``gram_list``, if its method uses them."""
        return () if self.matrices is None else self.matrices.grams  # type: ignore[return-value]

    @property
    def window(self) -> int:
        """The most elements that are read together, if that is more than a slice; else 0."""
        return self.matrices.window if self.matrices is not None and self.action == "merge" else 0

    @property
    def tolerance(self) -> float | None:
        """The tolerance of results from another machine, relative to the largest element; None if they are the same."""
        if self.matrices is None or self.method is None or self.method.combination.matrix is None:
            return max((each.tolerance for each in self.sources if each.tolerance is not None), default=None)
        return self.method.combination.matrix.tolerance

    def at(self, file: str, offset: int) -> Operation:
        """The operation with its file and offset."""
        return Operation(
            self.name, self.dtype, self.shape, self.action, self.sources, self.inputs, self.has_base, self.method,
            self.chosen, self.rule, self.matrices, file, offset,
        )  # fmt: skip


def merged(
    name: str,
    sources: tuple[StoredTensor, ...],
    inputs: tuple[int, ...],
    method: Applied,
    *,
    has_base: bool,
    dtype: DType | None = None,
    preferred: int | None = None,
    rule: int | None = None,
    matrices: Matrices | None = None,
) -> Operation:
    """The operation that merges sources: ``take`` if that gives the same result, ``copy`` if they cannot be merged.

    Args:
        name: The tensor's name in the output.
        sources: As in :class:`Operation`; all have the same shape.
        inputs: As in :class:`Operation`.
        method: As in :class:`Operation`.
        has_base: As in :class:`Operation`.
        dtype: The dtype to store; None: that of the base's tensor, or the first model's without a base.
        preferred: For ``copy``, the index of the input to use if the sources differ; None if they must be equal.
        rule: As in :class:`Operation`.
        matrices: As in :class:`Operation`.
    """
    reference = sources[-1 if has_base else 0]
    merges = can_be_merged(name, reference)
    stored = dtype if dtype is not None and merges else reference.natural
    only = _position_to_take(sources, method if merges else None, has_base)
    if only is not None:
        sources, inputs, has_base = (sources[only],), (inputs[only],), False
        action: Action = "take" if merges else "copy"
        return Operation(name, stored, reference.shape, action, sources, inputs, rule=rule)
    shape = reference.shape
    if merges:
        return Operation(name, stored, shape, "merge", sources, inputs, has_base, method, None, rule, matrices)
    chosen = inputs.index(preferred) if preferred in inputs else None
    return Operation(name, stored, shape, "copy", sources, inputs, has_base, None, chosen, rule)


def taken(
    name: str,
    source: StoredTensor,
    number: int,
    *,
    base: StoredTensor | None = None,
    base_input: int = 0,
    dtype: DType | None = None,
    rule: int | None = None,
) -> Operation:
    """The operation that takes one input's tensor unchanged.

    Args:
        name: The tensor's name in the output.
        source: The input's tensor.
        number: The index of the input.
        base: The base's tensor, if the source is a difference to it.
        base_input: The index of the base.
        dtype: The dtype to store; None: that of the source, or of the base if the source is a difference.
        rule: As in :class:`Operation`.
    """
    if base is not None:
        return merged(name, (source, base), (number, base_input), TAKE, has_base=True, dtype=dtype, rule=rule)
    return merged(name, (source,), (number,), TAKE, has_base=False, dtype=dtype, rule=rule)


def methods_of(operations: Iterable[Operation]) -> list[Applied]:
    """The methods of all operations without duplicates, in the order of their first use."""
    found = {id(each.method): each.method for each in operations if each.method is not None}
    return list(dict.fromkeys(found.values()))


def method_numbers(operations: Iterable[Operation]) -> dict[int, int]:
    """The position of each method in :func:`methods_of`, from 1 on, by the ``id`` of the operation's method object."""
    found = {id(each.method): each.method for each in operations if each.method is not None}
    numbers = {method: number for number, method in enumerate(dict.fromkeys(found.values()), 1)}
    return {key: numbers[method] for key, method in found.items()}


def can_be_merged(name: str, tensor: StoredTensor) -> bool:
    """Whether a tensor has floating point values that are not a computed buffer."""
    return tensor.dtype.compute is not None and not is_buffer(name, tensor.shape)


def _position_to_take(sources: tuple[StoredTensor, ...], method: Applied | None, has_base: bool) -> int | None:
    """The position of the source that equals the result; None if the result must be computed."""
    if has_base and all(source == sources[-1] for source in sources[:-1]):
        return len(sources) - 1
    alone = method is not None and method.coefficients == (1.0,) and not sources[0].is_delta
    return 0 if alone else None
