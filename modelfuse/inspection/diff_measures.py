"""Measures of ``modelfuse diff``: distances of models from their base and from each other, for groups of tensors.

τᵢ = xᵢ − b is the difference of model i to the base b, over the elements that were compared: of a tensor, of all
tensors of a layer, of a kind of module, or of the whole model. Norms are Frobenius norms. Shares are between 0 and 1.
Undefined quotients (0 / 0, x / 0) are None. Sums are float64 and do not depend on the number of workers or the memory.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from modelfuse.kernels.differences import BLOCK, OUTLYING
from modelfuse.kernels.interference import PROBES

#: Densities for which :class:`Kept` is computed.
DENSITIES = (0.01, 0.05, 0.1, 0.2, 0.5)
#: "Large" and "outlying" are relative to the root mean square of a block of at most BLOCK elements: whole rows of a
#: layer's matrix (at least one), else a run of elements, counted from the tensor's first element. The sketch of a
#: matrix has PROBES sums of its outputs.
__all__ = ["BLOCK", "DENSITIES", "OUTLYING", "PROBES"]


class Kept(Struct, frozen=True):
    """What trim and dare would keep of a difference at one density.

    Attributes:
        density: The setting reserve_p, the share of elements to keep.
        trim_elements: Share of all elements that trim leaves different from the base: the density or, if smaller, the
            share that differs from the base.
        trim_squares: Share of ‖τ‖² in the elements that trim keeps, the largest of each tensor. Computed from a
            histogram of magnitudes with 32 bins per octave; the error is below 0.02. None if τ is zero.
        dare_elements: Expected share of all elements that dare leaves different from the base. It keeps the share
            ``density`` of ‖τ‖² in expectation.
    """

    density: float
    trim_elements: float
    trim_squares: float | None
    dare_elements: float


class Change(Struct, frozen=True):
    """The difference of one model to the base.

    Attributes:
        norm: ‖τ‖.
        relative: ‖τ‖ / ‖b‖.
        unchanged: Share of elements that equal the base's.
        along_base: Cosine of τ and b: near −1 or 1 if the model is mostly the scaled base.
        largest: The largest |τ|.
        outliers: Number of elements whose |τ| is at least OUTLYING (8) times the root mean square of their block.
        nonfinite: Number of elements of the model that are NaN or infinite; all other measures exclude them.
        density_90: The smallest share of the elements that has 90 % of ‖τ‖² (in each tensor, 90 % of its own), as
            accurate as ``trim_squares``. If it is small, trimming loses little.
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


class ModelPair(Struct, frozen=True):
    """Measures of an ordered pair (i, j) of models; all but the interference of i by j are symmetric.

    Attributes:
        model: i, the index in ``Diff.models`` of the model that is interfered with.
        other: j, the index of the model that interferes with it.
        cosine: Cosine of τᵢ and τⱼ.
        both_changed: Share of elements that both models change.
        sign_conflict: Of the elements that both change, the share with opposite signs; one half for unrelated
            differences.
        sign_conflict_large: The same for elements that are large in both: |τ| at least the root mean square of their
            block.
        interference: ‖τⱼ τᵢᵀ‖ / ‖τᵢ τᵢᵀ‖ over matrices of layers, of shape [outputs, inputs]: how strongly j's
            difference acts on the inputs that i's uses. 0: not at all; 1: as strongly as i's own. Over several
            matrices, both norms are root sums of squares. None if there is no matrix or τᵢ is zero.
        interference_error: Standard error of ``interference`` as estimated from a sketch; 0 if it is exact.
    """

    model: int
    other: int
    cosine: float | None
    both_changed: float | None
    sign_conflict: float | None
    sign_conflict_large: float | None
    interference: float | None
    interference_error: float | None


class TensorGroup(Struct, frozen=True):
    """Measures of a group of tensors: one tensor, a layer, a kind of module, or the model.

    Attributes:
        name: The tensor's name; ``layer 3``; the module's name without the numbers of layers and experts
            (``mlp.up_proj``); ``model``.
        stack: The stack of the layer (``vision_tower``) if a model has several stacks, else empty.
        layer: The number of the layer; None outside of layers and for groups that span several.
        module: The kind of module; None for groups that span several.
        tensors: Number of tensors.
        elements: Number of elements.
        base_norm: ‖b‖.
        base_nonfinite: Number of elements of the base that are NaN or infinite; all other measures exclude them.
        models: The difference of each model, in the order of ``Diff.models``.
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
    pairs: tuple[ModelPair, ...]

    def pair(self, model: int, other: int) -> ModelPair:
        """The measures of an ordered pair of different models.

        Args:
            model: Index of the model that is interfered with.
            other: Index of the model that interferes.
        """
        return self.pairs[model * (len(self.models) - 1) + other - (other > model)]


class Suggestion(Struct, frozen=True):
    """Settings of a merge that are worth trying.

    Attributes:
        text: The reason.
        settings: The settings' values by name.
    """

    text: str
    settings: dict[str, str | list[float]]

    @property
    def flags(self) -> str:
        """The settings as flags of the command line."""
        values = {
            name: value if isinstance(value, str) else " ".join(f"{each:g}" for each in value)
            for name, value in self.settings.items()
        }
        return " ".join(f"--{name} {value}" for name, value in values.items())


class ComparedTensorFacts(Struct, frozen=True):
    """Type and shape of a compared tensor.

    Attributes:
        name: Its name in the base, as in ``Diff.tensors``.
        dtype: Its element type in the base.
        shape: Its shape in the base, in the layout that all inputs were converted to.
        matrix: Whether interference was measured, that is, whether it is a layer's matrix, fused ones, or experts'.
        rows: The number of rows that were compared, those of tokens that all models have, where the numbers of rows
            differ between models; None: all rows.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    matrix: bool
    rows: int | None = None


class NotCompared(Struct, frozen=True):
    """A tensor that was not compared.

    Attributes:
        tensor: Its name.
        because: The reason: which models lack it, what it is tied to, or how its shapes differ.
    """

    tensor: str
    because: str


class SideDifference(Struct, frozen=True):
    """A difference between a model and the base in the files beside the weights.

    Attributes:
        model: The index of the model in ``Diff.models``.
        about: The kind of file.
        text: The difference, in words.
        key: The setting of config.json; None for other files.
        base_value: Its value in the base, as JSON; None for other files.
        model_value: Its value in the model, as JSON; None for other files.
        fatal: Whether a merge of the two is meaningless.
    """

    model: int
    about: Literal["config", "tokenizer", "template", "generation", "other"]
    text: str
    key: str | None = None
    base_value: str | None = None
    model_value: str | None = None
    fatal: bool = False
