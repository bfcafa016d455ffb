"""What ``modelfuse collect`` makes with torch, made here with the demo's forward pass: Gram matrices of inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from demo.llama import Floats, Llama, Numbers
from modelfuse.checkpoints.input_grams import frame_of


class Observed(Llama):
    """A model that adds up XᵀX of every layer's inputs X, by the layers' names."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.grams: dict[str, Floats] = {}

    def _linear(self, name: str, x: Floats) -> Floats:
        rows = x.reshape(-1, x.shape[-1])
        self.grams[name] = self.grams.get(name, np.float32(0)) + rows.T @ rows
        return super()._linear(name, x)


def write_grams(folder: Path, numbers: Numbers, output: Path, name: str) -> None:
    """Have a saved model read rows of tokens, and write what was collected.

    Args:
        folder: The model.
        numbers: The rows.
        output: The file to write.
        name: What the model is called where it is merged.
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
