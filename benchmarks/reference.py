"""The reference work: a base of 357 M parameters and three fine-tunes of it, in bfloat16.

The shapes are those of a Llama with 24 layers of width 1024. The base is normal with standard deviation 0.02, like the
initialization of such models; each fine-tune adds a normal delta of standard deviation 0.001, large enough to survive
rounding to bfloat16 almost everywhere. All four files are written in parallel, in pieces.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

BASE_DEVIATION = 0.02
DELTA_DEVIATION = 0.001
FINE_TUNES = 3
PIECE = 1 << 20
NAMES = ("base", *(f"model_{number}" for number in range(1, FINE_TUNES + 1)))
#: Written last: it is missing if the writing was interrupted.
STAMP = "reference.json"


@dataclass(frozen=True, slots=True)
class Shape:
    """The size of a Llama; the default has 357 352 448 parameters.

    Attributes:
        narrow: Rows of the key and value projections; None: as many as of the query projection.
        experts: Experts per layer; 0: one MLP and no router.
    """

    hidden: int = 1024
    intermediate: int = 2592
    layers: int = 24
    heads: int = 16
    vocabulary: int = 32000
    narrow: int | None = None
    experts: int = 0

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """The names and shapes of all tensors, in the order of the file."""
        width = (self.hidden, self.hidden)
        up = (self.intermediate, self.hidden)
        narrow = (self.narrow or self.hidden, self.hidden)
        layer: dict[str, tuple[int, ...]] = {"input_layernorm": (self.hidden,)}
        for mlp in [f"mlp.experts.{number}" for number in range(self.experts)] or ["mlp"]:
            layer |= {f"{mlp}.down_proj": up[::-1], f"{mlp}.gate_proj": up, f"{mlp}.up_proj": up}
        if self.experts:
            layer["mlp.gate"] = (self.experts, self.hidden)
        layer |= {
            "post_attention_layernorm": (self.hidden,),
            "self_attn.k_proj": narrow,
            "self_attn.o_proj": width,
            "self_attn.q_proj": width,
            "self_attn.v_proj": narrow,
        }
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for number in range(self.layers):
            shapes |= {f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()}
        shapes["model.norm.weight"] = (self.hidden,)
        shapes["lm_head.weight"] = (self.vocabulary, self.hidden)
        return shapes

    def parameters(self) -> int:
        """The number of parameters of a model."""
        return sum(math.prod(shape) for shape in self.tensors().values())

    def config(self) -> dict[str, object]:
        """The content of ``config.json``, which other tools need."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads * (self.narrow or self.hidden) // self.hidden,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }


def make_reference(folder: Path, shape: Shape, seed: int = 0) -> None:
    """Write ``base`` and ``model_1`` … to a folder, unless it has them already."""
    stamp = folder / STAMP
    wanted = json.dumps({"shape": asdict(shape), "seed": seed, "version": 1})
    if stamp.exists() and stamp.read_text() == wanted:
        return
    stamp.unlink(missing_ok=True)
    with ExitStack() as stack:
        files: list[BinaryIO] = []
        for name in NAMES:
            (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / name / "config.json").write_text(json.dumps(shape.config(), indent=2) + "\n")
            files.append(stack.enter_context(open(folder / name / "model.safetensors", "wb")))
        header = _header(shape)
        for file in files:
            file.write(header)
        for pieces in _pieces(shape, np.random.default_rng(seed)):
            for file, piece in zip(files, pieces, strict=True):
                file.write(piece.tobytes())
    stamp.write_text(wanted)


def _header(shape: Shape) -> bytes:
    """The safetensors header, padded so that the data begins at a multiple of 8."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, each in shape.tensors().items():
        end = start + 2 * math.prod(each)
        entries[name] = {"dtype": "BF16", "shape": each, "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _pieces(shape: Shape, draw: np.random.Generator) -> Iterator[list[npt.NDArray[np.uint16]]]:
    """Pieces of all tensors in order; each piece is a list of the base's and each fine-tune's elements."""
    for each in shape.tensors().values():
        left = math.prod(each)
        # Norms are vectors near one; everything else is near zero.
        centre = np.float32(1.0 if len(each) == 1 else 0.0)
        while left:
            count = min(left, PIECE)
            base = draw.standard_normal(count, dtype=np.float32) * np.float32(BASE_DEVIATION) + centre
            models = [base]
            for _ in range(FINE_TUNES):
                delta = draw.standard_normal(count, dtype=np.float32) * np.float32(DELTA_DEVIATION)
                models.append(base + delta)
            yield [to_bfloat16(model) for model in models]
            left -= count


def to_bfloat16(x: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Round to nearest, ties to even; all values here are finite."""
    bits = x.view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype("<u2")
