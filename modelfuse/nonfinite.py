"""How a merge is refused whose values are not finite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from modelfuse.errors import CheckpointError
from modelfuse.plan import OutputTensor
from modelfuse.storage import Place


def nonfinite(
    tensor: OutputTensor, models: Sequence[Place], bad: np.ndarray[Any, np.dtype[np.int64]]
) -> CheckpointError:
    """Name the tensor, the models that hold such values, and how many; or that only the result is not finite.

    Args:
        tensor: The one that was to be merged.
        models: Whose its sources are.
        bad: int64, shape (sources + 1,): counts over the whole tensor, the last one of the result.
    """
    name, size = tensor.name, tensor.size
    holders = [f"{count:,} in {path}" for path, count in zip(models, bad[:-1], strict=True) if count]
    if holders:
        return CheckpointError(
            f"Tensor {name!r} holds NaN or infinite values: {' and '.join(holders)}, of {size:,} elements",
            "Use --on_nonfinite propagate to let such values through.",
        )
    return CheckpointError(
        f"The merged tensor {name!r} overflows its output dtype {tensor.dtype} in {bad[-1]:,} of {size:,} elements",
        "Use a wider --output_dtype, or --on_nonfinite propagate to store infinities.",
    )
