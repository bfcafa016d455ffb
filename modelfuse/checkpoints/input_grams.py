"""Gram matrices of the inputs of a model's layers, in a file: what `modelfuse collect` writes and regmean takes.

The file is a safetensors one. It has a tensor a module, called as the module's weight without ``.weight``: XᵀX, summed
over tokens, float32, shape [inputs, inputs], or [experts, inputs, inputs]. Its metadata says of which model it is, and
has a JSON object of ``aliases``: modules with the inputs of one that has a tensor, such as keys and values.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence

from msgspec import Struct

from modelfuse.checkpoints.formats.safetensors import frame_safetensors, read_safetensors
from modelfuse.checkpoints.name_rules import by_key, key_of
from modelfuse.checkpoints.same_names import BlockTensor
from modelfuse.checkpoints.tensors import Frame, StoredTensor
from modelfuse.dtypes import F32
from modelfuse.errors import CheckpointError
from modelfuse.storage import PathOrUrl

#: What the metadata says that it is.
KIND = "gram matrices of inputs"
WEIGHT = ".weight"
#: A matrix of one expert, by its key, whose inputs may be in one tensor with those of the others.
EXPERT = re.compile(r"(?P<experts>.*\bexperts)\.(?P<number>\d+)\.(?P<part>gate_proj|up_proj|down_proj)\.weight")
FUSED = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"}


class InputGrams(Struct, frozen=True):
    """The Gram matrices of one model's inputs.

    Attributes:
        path: The file.
        model: What the model's folder was called.
        tokens: How many tokens it has read.
        tensors: The tensors by the keys of the weights.
    """

    path: PathOrUrl
    model: str
    tokens: str
    tensors: Mapping[str, StoredTensor]

    def of(self, name: str) -> StoredTensor | None:
        """The Gram matrices of a weight's inputs; None if there are none."""
        key = key_of(name if name.endswith(WEIGHT) else name + WEIGHT)
        if key in self.tensors:
            return self.tensors[key]
        expert = EXPERT.fullmatch(key)
        whole = self.tensors.get(f"{expert['experts']}.{FUSED[expert['part']]}{WEIGHT}") if expert else None
        if whole is None or expert is None or len(whole.shape) != 3 or int(expert["number"]) >= whole.shape[0]:
            return None
        _, rows, columns = whole.shape
        first = int(expert["number"]) * rows * columns
        return BlockTensor(name, whole.dtype, (rows, columns), whole.file, whole.offset, whole, first)


def open_input_grams(path: PathOrUrl) -> InputGrams:
    """Open a file of Gram matrices, reading its header only.

    Raises:
        CheckpointError: If it is none.
    """
    tensors, metadata = read_safetensors(path)
    if metadata.get("kind") != KIND:
        raise CheckpointError(
            f"{path} holds no Gram matrices of a model's inputs", "Name a file that `modelfuse collect` has written."
        )
    for name, tensor in tensors.items():
        if tensor.dtype.name not in ("F32", "F64") or len(tensor.shape) not in (2, 3):
            raise CheckpointError(
                f"{path}: {name} is {tensor.dtype.name} {list(tensor.shape)}, which is no Gram matrix of floats",
                "Collect it again.",
            )
    tensors = {**tensors, **_aliases(path, metadata.get("aliases", "{}"), tensors)}
    names = by_key(name + WEIGHT for name in tensors)
    own = {key: tensors[name.removesuffix(WEIGHT)] for key, name in names.items()}
    return InputGrams(path, metadata.get("model", ""), metadata.get("tokens", ""), own)


def _aliases(path: PathOrUrl, text: str, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors of modules that have none of their own, by name."""
    with contextlib.suppress(ValueError, RecursionError):
        aliases = json.loads(text)
        if isinstance(aliases, dict) and all(
            isinstance(other, str) and other in tensors and name not in tensors for name, other in aliases.items()
        ):
            return {name: tensors[other] for name, other in aliases.items()}
    raise CheckpointError(f"{path}: its metadata has no valid `aliases`", "Collect it again.")


def frame_of(
    shapes: Sequence[tuple[str, Sequence[int]]], model: str, tokens: int, aliases: Mapping[str, str] | None = None
) -> Frame:
    """How a file of Gram matrices is laid out.

    Args:
        shapes: The modules' names and the shapes of their matrices.
        model: What the model's folder is called.
        tokens: How many tokens it has read.
        aliases: Modules with the inputs of another one: its name.
    """
    metadata = {"format": "pt", "kind": KIND, "model": model, "tokens": str(tokens)}
    if aliases:
        metadata["aliases"] = json.dumps(dict(aliases))
    return frame_safetensors([(name, F32, shape) for name, shape in shapes], metadata)
