"""What ``modelfuse diff`` found: how far models are from their base and from each other, tensor by tensor and summed.

Everywhere, τᵢ = xᵢ − b is the difference of model i to the base b, over the elements that were compared: of a tensor,
of all tensors of a layer, of a kind of module, or of the whole model. Norms are Frobenius norms. Shares are between 0
and 1. What is undefined (a quotient with a zero below, a share of nothing) is None. Sums are float64 and the same for
any number of workers and any memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from modelfuse.kernels.differences import BLOCK, OUTLYING
from modelfuse.kernels.interference import PROBES

#: Densities for which it is told what trim and dare would keep.
DENSITIES = (0.01, 0.05, 0.1, 0.2, 0.5)
#: "Large" and "outlying" are told from the root mean square of a block of BLOCK elements at most: whole rows of a
#: matrix of a layer (at least one), else a run of elements; tensors are cut into such blocks from their first element
#: on. A sketch keeps PROBES sums of outputs of a matrix.
__all__ = ["BLOCK", "DENSITIES", "OUTLYING", "PROBES"]


@dataclass(frozen=True, slots=True)
class Kept:
    """What sparsifiers would keep of a difference.

    Attributes:
        density: Their setting reserve_p, the share of elements to keep.
        trim_elements: Share of all elements that trim leaves different from the base: the density, or the share that
            differs at all where that is smaller.
        trim_squares: Share of ‖τ‖² in the largest elements, which trim keeps; each tensor keeps the same share of its
            elements. Counted in bins of magnitude, 32 an octave: it is off by less than 0.02. None where τ is zero.
        dare_elements: Share of all elements that dare leaves different from the base, on average. On average it keeps
            the share ``density`` of ‖τ‖², too.
    """

    density: float
    trim_elements: float
    trim_squares: float | None
    dare_elements: float


@dataclass(frozen=True, slots=True)
class Change:
    """How one model differs from the base.

    Attributes:
        norm: ‖τ‖.
        relative: ‖τ‖ / ‖b‖.
        unchanged: Share of elements that equal the base's.
        along_base: Cosine of τ and b: near −1 or 1 where the model is mostly the base scaled.
        largest: The largest |τ|.
        outliers: Number of elements whose |τ| is at least OUTLYING (8) times the root mean square of their block.
        nonfinite: Number of elements of the model that are NaN or infinite. They count nowhere else.
        density_90: The smallest share of the elements that has 90 % of ‖τ‖² (of each tensor, 90 % of its own); as exact
            as ``trim_squares``. Where it is small, trimming loses little.
        kept: What trim and dare would keep, for each of DENSITIES.
    """

    norm: float
    relative: float | None
    unchanged: float | None
    along_base: float | None
    largest: float
    outliers: int
    nonfinite: int
    density_90: float | None
    kept: tuple[Kept, ...]


@dataclass(frozen=True, slots=True)
class Pair:
    """How the differences of an ordered pair of models meet: what model i suffers from model j.

    Attributes:
        model: i, the number of the model that may be disturbed, from 0 on, in the order of ``Diff.models``.
        other: j, the number of the model that may disturb it.
        cosine: Cosine of τᵢ and τⱼ. The same for (j, i), as are the next three.
        both_changed: Share of elements that both change.
        sign_conflict: Of the elements that both change, the share that they change in opposite directions. One half for
            unrelated differences.
        sign_conflict_large: The same of the elements that are large in both: |τ| at least the root mean square of its
            block.
        interference: ‖τⱼ τᵢᵀ‖ / ‖τᵢ τᵢᵀ‖ over matrices of layers, as [outputs, inputs]: how strongly j's difference
            acts on the inputs that i's uses. 0: not at all; 1: as strongly as i's own. Of several matrices, roots of
            sums of squares are divided. None where there is no matrix or τᵢ is zero.
        interference_error: Standard error of ``interference`` as a sketch estimates it; 0 where it is exact.
    """

    model: int
    other: int
    cosine: float | None
    both_changed: float | None
    sign_conflict: float | None
    sign_conflict_large: float | None
    interference: float | None
    interference_error: float | None


@dataclass(frozen=True, slots=True)
class Group:
    """What was measured of some tensors together.

    Attributes:
        name: A tensor's name; ``layer 3``; a module's name without the numbers of layers and experts
            (``mlp.up_proj``); ``model`` for all.
        stack: Which layers ``layer`` counts where a model has several stacks of them (``vision_tower``); else empty.
        layer: The number of the layer, None outside of layers or of several ones.
        module: The kind of module, None for several ones.
        tensors: How many tensors.
        elements: How many elements.
        base_norm: ‖b‖.
        base_nonfinite: Number of elements of the base that are NaN or infinite; they count nowhere else.
        models: How each model differs, in the order of ``Diff.models``.
        pairs: Every ordered pair of different models, (0, 1), (0, 2), … (1, 0), …
    """

    name: str
    stack: str
    layer: int | None
    module: str | None
    tensors: int
    elements: int
    base_norm: float
    base_nonfinite: int
    models: tuple[Change, ...]
    pairs: tuple[Pair, ...]

    def pair(self, model: int, other: int) -> Pair:
        """What was measured of an ordered pair."""
        return self.pairs[model * (len(self.models) - 1) + other - (other > model)]


@dataclass(frozen=True, slots=True)
class Advice:
    """Settings that are worth trying.

    Attributes:
        text: Why, in words.
        settings: Settings of a merge, and their values.
    """

    text: str
    settings: dict[str, str | list[float]]

    @property
    def told(self) -> str:
        """The settings as flags."""
        values = {
            name: value if isinstance(value, str) else " ".join(f"{each:g}" for each in value)
            for name, value in self.settings.items()
        }
        return " ".join(f"--{name} {value}" for name, value in values.items())


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """What is known of a compared tensor beside its measures.

    Attributes:
        name: Its name, which is the base's; that of its group, too.
        dtype: The element type that it has in the base.
        shape: Its shape in the base, of a layout that all were brought into.
        matrix: Whether interference was measured: whether it is a matrix of a layer, several fused, or of experts.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    matrix: bool


@dataclass(frozen=True, slots=True)
class NotCompared:
    """A tensor that was not compared.

    Attributes:
        tensor: Its name.
        because: Why not: who lacks it, what it is tied to, or how its shapes differ.
    """

    tensor: str
    because: str


@dataclass(frozen=True, slots=True)
class SideDifference:
    """What a model says otherwise than the base beside the weights.

    Attributes:
        model: The number of the model, from 0 on.
        about: What kind of file it is in.
        text: What it is, in words.
        key: The setting of config.json, None for other files.
        base_value: Its value in the base, as JSON; None for other files.
        model_value: Its value in the model.
        fatal: Whether a merge of the two means nothing.
    """

    model: int
    about: Literal["config", "tokenizer", "template", "generation", "other"]
    text: str
    key: str | None = None
    base_value: str | None = None
    model_value: str | None = None
    fatal: bool = False
