"""Torch models with reproducible weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def make(build: Callable[[], Any], noise: int) -> Any:
    """Create a model with the initial weights of seed 0, plus noise.

    Args:
        build: Creates the model.
        noise: The seed of the noise; 0: no noise.
    """
    import torch  # Not installed everywhere.

    torch.manual_seed(0)
    model = build().eval()
    torch.manual_seed(noise)
    with torch.no_grad():
        for parameter in model.parameters() if noise else ():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model
