"""What a declaration of a method consists of.

A merge of one tensor takes up to four kinds of steps. *Measures* learn something of whole tensors, or of each of their
lines (rows, columns): magnitudes at given ranks, each magnitude's rank, sums, or the Gram matrix of the inputs. They
are taken one after the other, and what one has found may be used by the next. The *element* step of a
:class:`Sparsifier` acts on each model alone. A :class:`Combination` makes one element of the models' elements. Both are
written as expressions (:mod:`modelfuse.methods.expressions`). What works on whole matrices says what to multiply them
by (:class:`WholeMatrix`). A :class:`Method` names a pair of them, with defaults of its own.

Everything else follows from the declarations: settings, help, checks, passes, memory, compiled loops, array code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

from modelfuse.methods.expressions import Expression
from modelfuse.methods.measures import Divergence as Divergence
from modelfuse.methods.measures import Floats as Floats
from modelfuse.methods.measures import Gram as Gram
from modelfuse.methods.measures import LineRanks as LineRanks
from modelfuse.methods.measures import Magnitudes as Magnitudes
from modelfuse.methods.measures import OrderStatistics as OrderStatistics
from modelfuse.methods.measures import Ranks as Ranks
from modelfuse.methods.measures import Sums as Sums

#: A setting's value; one that may differ by model is a tuple with one for each.
Value = float | bool | str
#: Whether methods act on differences to a base model.
Base = Literal["optional", "required", "none"]


@dataclass(frozen=True, slots=True, eq=False)
class Parameter:
    """A setting of methods.

    Attributes:
        name: As recipes and flags have it.
        default: Its value where none is given.
        description: What it does, for help.
        choices: The texts that it may be; empty if it is a number or a switch.
        bounds: Of a number: ``gt``, ``ge``, ``lt`` and ``le``.
        per_model: Whether it may be given one a model.
        aliases: What other tools call it.
    """

    name: str
    default: Value
    description: str
    choices: tuple[str, ...] = ()
    bounds: Mapping[str, float] = field(default_factory=dict)
    per_model: bool = False
    aliases: tuple[str, ...] = ()

    @property
    def is_static(self) -> bool:
        """Whether compiled code depends on its value: switches and choices."""
        return isinstance(self.default, bool | str)


@dataclass(frozen=True, eq=False)
class WholeMatrix:
    """Works on whole matrices: the merged difference is Σ τᵢ·Kᵢ, τᵢ = xᵢ − b, with K made of Gram matrices of the τᵢ.

    All is float64. Kᵢ multiplies from the right if Gram matrices are τᵢᵀτⱼ, of the columns; where they are taken of the
    rows, all is as if the matrix were transposed. Decompositions differ in their last bits between processors and
    versions of libraries, so the bytes are the same on one machine and with one version of numpy.

    Attributes:
        factors: Of the Gram matrices, the weights, the settings and the number of inputs: K, shape (models, k, k);
            (1, k, k) for ``sum``.
        gram: Which Gram matrices there are: of the weighted ``sum`` M = Σ wᵢτᵢ, which the result then is a multiple of,
            shape (k, k); of ``each`` model, shape (models, k, k); of all ``pairs``, shape (models, models, k, k).
        side: Which side of the matrix they are of: the ``smaller`` one, or that of the ``inputs`` or ``outputs`` of a
            Linear layer.
        dual: The same computed otherwise, where all models' outputs together are fewer than the inputs.
        tolerance: How far results of other machines may be apart beside one rounding, relative to a tensor's largest
            element.
    """

    factors: Callable[[Floats, Sequence[float], Any, int], Floats]
    gram: Literal["sum", "each", "pairs"] = "sum"
    side: Literal["smaller", "inputs", "outputs"] = "smaller"
    dual: WholeMatrix | None = None
    tolerance: float = 1e-5

    def for_shape(self, outputs: int, inputs: int, models: int) -> WholeMatrix:
        """This, or its dual where that is less work."""
        return self.dual if self.dual is not None and models * outputs < inputs else self


@dataclass(frozen=True, eq=False, repr=False)
class Step:
    """What the two kinds of steps have in common.

    Attributes:
        name: As recipes have it.
        summary: One sentence.
        formula: What it computes.
        paper: Authors, year, title, arXiv number.
        parameters: Its settings.
        check: Raises ValueError for settings of one model (of a combination: of all) that cannot be: what is wrong,
            and as a second argument perhaps what to do.
    """

    name: str
    summary: str
    formula: str
    paper: str = ""
    parameters: tuple[Parameter, ...] = ()
    check: Callable[[Any], None] = lambda settings: None

    def __repr__(self) -> str:
        # The same in every process, as what a merge depends on is compared with what an earlier one has left.
        return f"{type(self).__name__}({self.name!r})"


@dataclass(frozen=True, eq=False, repr=False)
class Sparsifier(Step):
    """What is done to the elements of each model alone.

    Attributes:
        element: Of a namespace with the element ``x``, a uniform ``draw`` in [0, 1) (float32), the probability ``keep``
            of a :class:`Ranks`, the switches and choices among the settings, and all numbers by name: an element.
        numbers: Of a model's settings: numbers for ``element`` that are not measured (there, or at all), by name.
        measures: What must be known of the whole tensor before, in this order.
    """

    element: Callable[[Any], Expression] = lambda each: each.x
    numbers: Callable[[Any], Mapping[str, float]] = lambda settings: {}
    measures: tuple[OrderStatistics | Ranks | LineRanks | Sums, ...] = ()

    def __reduce__(self) -> tuple[Callable[[str], Sparsifier], tuple[str]]:
        return find_sparsifier, (self.name,)


@dataclass(frozen=True, eq=False, repr=False)
class Combination(Step):
    """What makes one element of the models' elements.

    Attributes:
        combine: Of a namespace with every model's element ``x`` and ``weight``, the switches and choices among the
            settings, and all numbers by name (``models`` is how many there are): an element.
        numbers: Of the settings: the same for ``combine``, one for all models.
        measures: What must be known of the whole tensors before, in this order.
        matrix: What is done to whole matrices; ``combine`` is not used then. Other tensors are averaged.
        models: The least and the most number of models; None for any.
        base: Whether it acts on differences to a base.
        weights: What weights are: ``given`` ones are absolute or, with ``normalize``, divided by their sum;
            ``relative`` ones stay as given, as ``combine`` divides by them itself; ``none`` may be given.
    """

    combine: Callable[[Any], Expression] = lambda each: each.x
    numbers: Callable[[Any], Mapping[str, float]] = lambda settings: {}
    measures: tuple[Gram | Sums | OrderStatistics | Divergence, ...] = ()
    matrix: WholeMatrix | None = None
    models: tuple[int, int | None] = (1, None)
    base: Base = "optional"
    weights: Literal["given", "relative", "none"] = "given"

    def __reduce__(self) -> tuple[Callable[[str], Combination], tuple[str]]:
        return find_combination, (self.name,)


@dataclass(frozen=True, eq=False, repr=False)
class Method:
    """A name for a combination, with or without a sparsifier, and defaults.

    Attributes:
        name: As ``merge_method`` has it.
        combination: Makes one tensor of all.
        sparsifier: Acts on each model before.
        defaults: Of settings whose default differs from the parameter's.
        base: Whether it acts on differences to a base, if not as the combination does.
    """

    name: str
    combination: Combination
    sparsifier: Sparsifier | None = None
    defaults: Mapping[str, Value] = field(default_factory=dict)
    base: Base | None = None

    def __repr__(self) -> str:
        return self.name

    @property
    def steps(self) -> tuple[str | None, str]:
        """The names of its sparsifier and its combination: (sparsify_type, merge_type)."""
        return self.sparsifier.name if self.sparsifier else None, self.combination.name

    @property
    def needs_base(self) -> bool:
        """Whether a base must be given."""
        return (self.base or self.combination.base) == "required"


def find_sparsifier(name: str) -> Sparsifier:
    """The sparsifier of a name: how a declaration arrives in another process."""
    found: Sparsifier = import_module("modelfuse.methods.registry").SPARSIFIERS[name]
    return found


def find_combination(name: str) -> Combination:
    """The combination of a name: how a declaration arrives in another process."""
    found: Combination = import_module("modelfuse.methods.registry").COMBINATIONS[name]
    return found
