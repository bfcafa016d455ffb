"""How one tensor of the output is made: of which tensors of which inputs, and by which method.

Whatever decides that (rules, a grammar with slices, a policy for tensors that some inputs lack) makes an
:class:`Operation`; what comes after it (layout, memory, execution, report, verification) looks at operations only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from modelfuse.checkpoints import StoredTensor
from modelfuse.checkpoints.buffers import is_buffer
from modelfuse.dtypes import DType
from modelfuse.kernels import Work
from modelfuse.kernels.matrices import Matrices
from modelfuse.methods.applied import Applied
from modelfuse.methods.registry import TAKE

Action = Literal["merge", "copy", "take"]


@dataclass(frozen=True, slots=True)
class Operation:
    """One tensor of the output.

    Attributes:
        name: Its name.
        dtype: The type it is stored in.
        shape: Its shape.
        action: ``merge``, ``copy`` for what cannot be merged and must be equal in all sources, or ``take`` for what is
            one source's as it is.
        sources: Tensors of the models, the base's last if there is one. They may have other names.
        inputs: For each source, the number of the input that it is of: models from 0 on, then the base.
        has_base: Whether the last source is the base's.
        method: What makes the tensor of its sources, with all of its parameters; None for a copy and for what is taken,
            but for what was computed by a method before.
        chosen: For a copy, the position of the source to take where they differ; None: they must not differ.
        rule: The number of the recipe's rule that decided, from 0 on; None if no rule did.
        matrices: How it is cut into matrices, if its method works on whole ones.
        file: The output file it goes to.
        offset: Its first byte in that file.
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
        """What a kernel is to do, if it is merged or taken."""
        merges = self.action == "merge" and self.method is not None
        method, matrices = (self.method or TAKE, self.matrices) if merges else (TAKE, None)
        dtypes, deltas = tuple(each.dtype for each in self.sources), tuple(each.is_delta for each in self.models)
        return Work(self.name, self.size, dtypes, self.has_base, self.dtype, method, deltas, matrices, self.shape)

    @property
    def grams(self) -> tuple[StoredTensor, ...]:
        """Gram matrices of the models' inputs, if its method takes given ones."""
        return () if self.matrices is None else self.matrices.grams  # type: ignore[return-value]

    @property
    def window(self) -> int:
        """The most elements that are read together where slices are not enough; zero where they are."""
        return self.matrices.window if self.matrices is not None and self.action == "merge" else 0

    @property
    def tolerance(self) -> float | None:
        """How far another machine's result may be apart, relative to its largest element; None: not by one bit."""
        if self.matrices is None or self.method is None or self.method.combination.matrix is None:
            return max((each.tolerance for each in self.sources if each.tolerance is not None), default=None)
        return self.method.combination.matrix.tolerance

    def at(self, file: str, offset: int) -> Operation:
        """The same with its place in the output."""
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
    """What a method makes of the sources; less where less gives the same, and a copy where nothing can be merged.

    Args:
        name: The tensor's name in the output.
        sources: As in :class:`Operation`; all of one shape.
        inputs: As in :class:`Operation`.
        method: As in :class:`Operation`.
        has_base: As in :class:`Operation`.
        dtype: The type to store; None: that of the base's tensor, else of the first model's.
        preferred: For a copy, the number of the input to take where the sources differ; None: they must not differ.
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
    """A tensor as it is in one input.

    Args:
        name: The tensor's name in the output.
        source: The input's tensor.
        number: The number of the input.
        base: What the source is a difference to, if it is one.
        base_input: The number of the input that the base is of.
        dtype: The type to store; None: that of the source, of a difference that of the base.
        rule: As in :class:`Operation`.
    """
    if base is not None:
        return merged(name, (source, base), (number, base_input), TAKE, has_base=True, dtype=dtype, rule=rule)
    return merged(name, (source,), (number,), TAKE, has_base=False, dtype=dtype, rule=rule)


def methods_of(operations: Iterable[Operation]) -> list[Applied]:
    """The methods of all operations, each once, in the order of their first use."""
    found = {id(each.method): each.method for each in operations if each.method is not None}
    return list(dict.fromkeys(found.values()))


def method_numbers(operations: Iterable[Operation]) -> dict[int, int]:
    """The number of a method among :func:`methods_of`, from 1 on, by the ``id`` of the object that an operation has."""
    found = {id(each.method): each.method for each in operations if each.method is not None}
    numbers = {method: number for number, method in enumerate(dict.fromkeys(found.values()), 1)}
    return {key: numbers[method] for key, method in found.items()}


def can_be_merged(name: str, tensor: StoredTensor) -> bool:
    """Whether arithmetic on a tensor means anything."""
    return tensor.dtype.compute is not None and not is_buffer(name, tensor.shape)


def _position_to_take(sources: tuple[StoredTensor, ...], method: Applied | None, has_base: bool) -> int | None:
    """The position of the source that is the result as it is; None if there is more to do."""
    if has_base and all(source == sources[-1] for source in sources[:-1]):
        return len(sources) - 1
    alone = method is not None and method.coefficients == (1.0,) and not sources[0].is_delta
    return 0 if alone else None
