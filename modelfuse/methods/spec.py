"""The classes that methods are declared with.

A merge of one tensor has up to four kinds of steps. *Measures* are taken of whole tensors, or of each of their lines
(rows, columns): magnitudes at given ranks, each magnitude's rank, sums, or the Gram matrix of the inputs. They are
taken in order, and each may use the results of those before. The *element* step of a :class:`Sparsifier` acts on each
model alone. A :class:`Combination` combines the models' elements. Both are expressions
(:mod:`modelfuse.methods.expressions`). Methods of whole matrices compute the factors to multiply them by
(:class:`WholeMatrix`). A :class:`Method` names a sparsifier and a combination, with defaults of its own.

Everything else follows from the declarations: settings, help, checks, passes, memory, compiled loops, array code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, Literal, NamedTuple, Protocol

from msgspec import Struct, field

from modelfuse.methods.expressions import Expression
from modelfuse.methods.measures import Divergence as Divergence
from modelfuse.methods.measures import Floats as Floats
from modelfuse.methods.measures import Gram as Gram
from modelfuse.methods.measures import LineRanks as LineRanks
from modelfuse.methods.measures import Magnitudes as Magnitudes
from modelfuse.methods.measures import OrderStatistics as OrderStatistics
from modelfuse.methods.measures import Ranks as Ranks
from modelfuse.methods.measures import Sums as Sums

#: A setting's value; a setting that differs by model has a tuple of these.
Value = float | bool | str
#: Whether methods act on differences to a base model.
Base = Literal["optional", "required", "none"]


class Parameter(Struct, frozen=True, eq=False):
    """A setting of methods.

    Attributes:
        name: Its name in recipes and flags.
        default: The default value.
        description: The help text.
        choices: The allowed strings; empty for a number or a switch.
        bounds: Bounds of a number: ``gt``, ``ge``, ``lt`` and ``le``.
        per_model: Whether it may be a list with one value per model.
        aliases: Its names in other tools.
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
        """Whether compiled code depends on its value (switches and choices)."""
        return isinstance(self.default, bool | str)


class Algebra(Protocol):
    """What methods compute with float64 matrices beside elementwise operations."""

    def product(self, left: Floats, right: Floats) -> Floats:
        """The matrix product."""

    def eigh(self, matrix: Floats) -> tuple[Floats, Floats]:
        """Eigenvalues, ascending, and eigenvectors, as columns, of a symmetric matrix."""

    def solve(self, matrix: Floats, right: Floats) -> Floats:
        """The matrix X of matrix · X = right, for a symmetric positive definite matrix."""

    def inverse(self, matrix: Floats) -> Floats:
        """The inverse of a symmetric positive definite matrix."""


class Factors(NamedTuple):
    """The factors Kᵢ of a method, as products of one of each model and one that all share.

    Attributes:
        each: Shape (models, k, k).
        shared: Shape (k, k); None: the identity.
    """

    each: Floats
    shared: Floats | None = None


class WholeMatrix(Struct, frozen=True, eq=False):
    """A step on whole matrices: the merged difference is Σ τᵢ·Kᵢ, τᵢ = xᵢ − b, with K computed from Gram matrices.

    All is float64. Kᵢ multiplies from the right if Gram matrices are those of the columns, τᵢᵀτⱼ; with those of the
    rows, everything is transposed. LAPACK's decompositions differ in their last bits between processors and library
    versions, so bytes are reproducible only on one machine with one version of numpy; with ``fixed_order`` they are on
    any processor.

    Attributes:
        factors: Maps the Gram matrices, the weights, the settings, the number of inputs and the algebra to compute with
            to K, shape (models, k, k), or (1, k, k) for ``sum``.
        gram: Which Gram matrices are needed: that of the weighted ``sum`` M = Σ wᵢτᵢ, shape (k, k) (the result is then
            M·K); those of ``each`` model, shape (models, k, k); of all ``pairs``, shape (models, models, k, k).
            ``given`` ones are read from files: those of the inputs of each model's layer, shape (models, k, k).
        side: The side of the matrix: the ``smaller`` one, or the ``inputs`` or ``outputs`` of a Linear layer.
        work: Maps the number of models to the cost of ``factors``, in products of two Gram matrices. An eigenvalue
            decomposition costs about 5, an inverse or a linear system about 1.5.
        fixed_order: Whether all is products and linear systems, which are computed in a fixed order: ``factors`` uses
            nothing but the algebra and elementwise operations.
        dual: An equivalent that is cheaper if all models have together not many more outputs than inputs.
        tolerance: How much results of other machines may differ beyond one rounding, relative to a tensor's largest
            element.
    """

    factors: Callable[[Floats, Sequence[float], Any, int, Algebra], Factors]
    gram: Literal["sum", "each", "pairs", "given"] = "sum"
    side: Literal["smaller", "inputs", "outputs"] = "smaller"
    work: Callable[[int], float] = lambda models: 5.5
    fixed_order: bool = False
    dual: WholeMatrix | None = None
    tolerance: float = 1e-5

    def for_shape(self, outputs: int, inputs: int, models: int) -> WholeMatrix:
        """This step, or its dual if that is cheaper for the shape."""
        return self.dual if self.dual is not None and 4 * models * outputs < 5 * inputs else self


class Step(Struct, frozen=True, eq=False):
    """Base class of sparsifiers and combinations.

    Attributes:
        name: Its name in recipes.
        summary: One sentence for help.
        formula: The formula.
        paper: Authors, year, title, arXiv number.
        measured: How it does beside task arithmetic, as docs/quality.md has it.
        parameters: Its settings.
        check: Raises ValueError for invalid settings of one model (for a combination: of all); its arguments are the
            problem and, optionally, a hint.
    """

    name: str
    summary: str
    formula: str
    paper: str = ""
    measured: str = ""
    parameters: tuple[Parameter, ...] = ()
    check: Callable[[Any], None] = lambda settings: None

    def __repr__(self) -> str:
        # Stable across processes: resuming compares it with what an earlier run has recorded.
        return f"{type(self).__name__}({self.name!r})"


class Sparsifier(Step, frozen=True, eq=False):
    """A step on the elements of each model alone.

    Attributes:
        element: Maps a namespace to the new element: it has the element ``x``, a uniform ``draw`` in [0, 1) (float32),
            the probability ``keep`` of a :class:`Ranks`, the switches and choices, and all numbers by name.
        numbers: Maps a model's settings to further numbers for ``element``, by name.
        measures: The measures of the whole tensor that it needs, in order.
    """

    element: Callable[[Any], Expression] = lambda each: each.x
    numbers: Callable[[Any], Mapping[str, float]] = lambda settings: {}
    measures: tuple[OrderStatistics | Ranks | LineRanks | Sums, ...] = ()

    def __reduce__(self) -> tuple[Callable[[str], Sparsifier], tuple[str]]:
        return find_sparsifier, (self.name,)


class Combination(Step, frozen=True, eq=False):
    """A step that combines the models' elements.

    Attributes:
        combine: Maps a namespace to the merged element: it has each model's element ``x`` and ``weight``, the switches
            and choices, and all numbers by name (``models`` is the number of models).
        numbers: Maps the settings to further numbers for ``combine``, shared by all models.
        measures: The measures of the whole tensors that it needs, in order.
        matrix: The step on whole matrices, which replaces ``combine`` for them; other tensors are averaged.
        models: The least and the greatest number of models; None for any.
        base: Whether it acts on differences to a base.
        weights: The meaning of weights: ``given`` ones are absolute or, with ``normalize``, divided by their sum;
            ``relative`` ones stay as given, as ``combine`` normalizes itself; ``none``: weights are not allowed.
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


class Method(Struct, frozen=True, eq=False):
    """A name for a combination, with or without a sparsifier, and defaults.

    Attributes:
        name: The ``merge_method``.
        combination: Combines the models' tensors.
        sparsifier: Acts on each model first; None: there is none.
        defaults: Defaults that differ from the parameters' own.
        base: Whether it acts on differences to a base, if that differs from the combination's ``base``.
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
    """The sparsifier of a name; used to unpickle declarations in other processes."""
    found: Sparsifier = import_module("modelfuse.methods.registry").SPARSIFIERS[name]
    return found


def find_combination(name: str) -> Combination:
    """The combination of a name; used to unpickle declarations in other processes."""
    found: Combination = import_module("modelfuse.methods.registry").COMBINATIONS[name]
    return found
