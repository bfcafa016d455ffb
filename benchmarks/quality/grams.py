"""Collect Gram matrices of inputs like ``modelfuse collect``, but with the demo's forward pass instead of torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from demo.llama import Floats, Llama, Numbers
from modelfuse.checkpoints.input_grams import frame_of


class Observed(Llama):
    """A model that sums XᵀX of the inputs X of every layer, by the layers' names."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.grams: dict[str, Floats] = {}

    def _linear(self, name: str, x: Floats) -> Floats:
        rows = x.reshape(-1, x.shape[-1])
        self.grams[name] = self.grams.get(name, np.float32(0)) + rows.T @ rows
        return super()._linear(name, x)


def write_grams(folder: Path, numbers: Numbers, output: Path, name: str) -> None:
    """Run a saved model on rows of tokens, and write its Gram matrices.

    Args:
        folder: The model.
        numbers: Token ids, int64, shape (rows, tokens).
        output: The file to write.
        name: The model's name in merges.
    """
    model = Observed(folder)
    model.logits(numbers)
    frame = frame_of([(module, gram.shape) for module, gram in model.grams.items()], name, numbers.size)
    content = bytearray(frame.size)
    for start, piece in frame.pieces:
        content[start : start + len(piece)] = piece
    for offset, gram in zip(frame.offsets, model.grams.values(), strict=True):
        content[offset : offset + gram.nbytes] = gram.astype("<f4").tobytes()
    output.write_bytes(content)
